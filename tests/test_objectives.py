"""The loss: literal numbers, laws, TorchRL's loss protocol, compilation."""

import copy
import math

import pytest
import torch
from conftest import ACT, OBS, make_batch, no_wait, small_actor, small_qvalue, specs
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import CompositeDistribution, NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.data.postprocs import MultiStep
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from omnet_torchrl import EnsembleMLP, OMNetSACLoss, SubnetActor, SubnetModule, SubnetQValueOperator
from omnet_torchrl.objectives.networks import called_with


def make_loss(actor=None, qvalue=None, *, tau=0.1, gamma=0.9, **kwargs):
    loss = OMNetSACLoss(actor or small_actor(), qvalue or small_qvalue(), **kwargs)
    loss.make_value_estimator(gamma=gamma)
    if kwargs.get("delay_qvalue", True):
        SoftUpdate(loss, tau=tau)
    return loss


def grads(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def is_zero(grad):
    return grad is None or not grad.any()


def any_network(module):
    """The network of a masked actor or critic as a SubnetModule of a plain one, with the same weights and masks."""
    state = module.state_dict()
    plain = MLP(
        in_features=module[0].in_features,
        out_features=module[-1].out_features,
        num_cells=[16, 16],
        activation_class=nn.ReLU,
        norm_class=nn.LayerNorm,
        norm_kwargs=[{"normalized_shape": 16}] * 2,
    )
    plain.load_state_dict({name: value.clone() for name, value in state.items() if not name.endswith("masks")})
    return SubnetModule(plain, {f"{i}.weight": layer.masks for i, layer in enumerate(module) if hasattr(layer, "masks")})


def test_any_network_as_actor_and_critic_trains_as_the_masked_one_does():
    masked_actor, masked_qvalue = small_actor(), small_qvalue()
    actor = SubnetActor(any_network(masked_actor.module[0].network), specs()[1])
    qvalue = SubnetQValueOperator(any_network(masked_qvalue.module))
    outputs = []
    for networks in ((masked_actor, masked_qvalue), (actor, qvalue)):
        loss = OMNetSACLoss(*networks)
        updater, optim = SoftUpdate(loss, tau=0.1), torch.optim.Adam(loss.parameters(), lr=1e-2)
        for i in range(4):
            batch = make_batch(8, seed=i, done=0.3)
            output = loss(batch, draws=loss.draw(batch, torch.Generator().manual_seed(i)))
            sum(output[name] for name in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
            optim.step(), optim.zero_grad(), updater.step()
        outputs.append(output.detach())
    torch.testing.assert_close(*(output.to_dict() for output in outputs), rtol=1e-4, atol=1e-5)
    assert len(list(qvalue.parameters())) == 10


def test_a_critic_that_writes_another_key_is_named():
    qvalue = SubnetQValueOperator(small_qvalue().module, out_keys=["q"])
    with pytest.raises(KeyError, match=r"the critic writes \['q'\] and no 'state_action_value'.*set_keys"):
        make_loss(qvalue=qvalue)(make_batch(8))


# Literal numbers -------------------------------------------------------------------------------------------------------


class LinearCritics(nn.Module):
    """Q_k(s, a) = value_k + slope_k * a."""

    def __init__(self, values, slopes):
        super().__init__()
        self.num_subnets = len(values)
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float32))
        self.slopes = nn.Parameter(torch.tensor(slopes, dtype=torch.float32))

    def forward(self, observation, action, subnet):
        value, slope = (p[subnet].unsqueeze(-1) for p in (self.values, self.slopes))
        return value + slope * action


class ConstantAction(torch.distributions.Distribution):
    """The action is ``loc``, its log-probability a constant."""

    arg_constraints = {}
    log_prob_value = 0.0

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:])

    def rsample_and_log_prob(self, sample_shape=()):
        return self.loc, self.loc.new_full(self.loc.shape[:-1], self.log_prob_value)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, observation):
        return self.value.expand(*observation.shape[:-1], 1)


def constant_loss(values, targets, slopes, action=0.5, alpha=1.0, **kwargs):
    actor = ProbabilisticActor(
        TensorDictModule(Constant(action), in_keys=["observation"], out_keys=["loc"]),
        in_keys=["loc"],
        distribution_class=ConstantAction,
        spec=Bounded(-1, 1, (1,)),
    )
    qvalue = SubnetQValueOperator(LinearCritics(values, slopes))
    loss = make_loss(
        actor, qvalue, target_entropy=-2.0, alpha_init=alpha, reduction="none", scalar_output_mode="exclude", **kwargs
    )
    loss.target_qvalue_network_params["module", "values"].copy_(torch.tensor(targets))
    return loss


def constant_batch():
    # The first goes on, the second terminates, the third is cut by a time limit.
    return TensorDict(
        {
            "observation": torch.zeros(3, OBS),
            "action": torch.zeros(3, 1),
            "next": {
                "observation": torch.zeros(3, OBS),
                "reward": torch.tensor([[1.0], [2.0], [3.0]]),
                "done": torch.tensor([[False], [True], [True]]),
                "terminated": torch.tensor([[False], [True], [False]]),
            },
        },
        [3],
    )


def draws_of(**kwargs):
    indices = {"critic": [0], "target": [0], "value": [0], "actor": 0, "next_actor": 0, **kwargs}
    return TensorDict({name: torch.tensor(index) for name, index in indices.items()})


@pytest.mark.parametrize(
    ("row", "counts", "draws", "target", "qvalue_loss", "td_error", "value_grad", "actor_loss", "actor_grad"),
    [
        # gamma 0.9; next action 0.5; target_k = 10 (k + 1) + slope_k / 2; y = r + 0.9 * min, 2 where terminated.
        # OMNet: min(30 + 0.5 * 3, 40 + 0.5 * 4) = 31.5 -> y = 29.35, 2, 31.35; trained Q_1 = 2;
        # actor: mean of Q_k(0.5) = mean(1.5, 3, 4.5, 6) = 3.75, slope 2.5.
        (
            "omnet",
            {"num_trained_subnets": 1, "num_target_subnets": 2},
            {"critic": [1], "target": [3, 2], "value": [0, 1, 2, 3]},
            [29.35, 2.0, 31.35],
            [27.35**2, 0.0, 29.35**2],
            [27.35, 0.0, 29.35],
            [0.0, -2 * (27.35 + 29.35), 0.0, 0.0],
            -3.75,
            -2.5,
        ),
        # REDQ: all four trained on min(20 + 1, 30 + 1.5) = 21 -> y = 19.9, 2, 21.9.
        (
            "redq",
            {"num_trained_subnets": None, "num_target_subnets": 2},
            {"critic": [0, 1, 2, 3], "target": [1, 2], "value": [0, 1, 2, 3]},
            [19.9, 2.0, 21.9],
            [18.9**2 + 17.9**2 + 16.9**2 + 15.9**2, 1.0 + 0 + 1 + 4, 20.9**2 + 19.9**2 + 18.9**2 + 17.9**2],
            [18.9, 2.0, 20.9],
            [-2 * (18.9 + 1 + 20.9), -2 * (17.9 + 19.9), -2 * (16.9 - 1 + 18.9), -2 * (15.9 - 2 + 17.9)],
            -3.75,
            -2.5,
        ),
        # SAC: both trained on min(10.5, 21) = 10.5 -> y = 10.45, 2, 12.45; actor: mean(1.5, 3) = 2.25, slope 1.5.
        (
            "sac",
            {"num_trained_subnets": None, "num_target_subnets": None},
            {"critic": [0, 1], "target": [0, 1], "value": [0, 1]},
            [10.45, 2.0, 12.45],
            [9.45**2 + 8.45**2, 1.0, 11.45**2 + 10.45**2],
            [9.45, 1.0, 11.45],
            [-2 * (9.45 + 1 + 11.45), -2 * (8.45 + 10.45)],
            -2.25,
            -1.5,
        ),
        # One critic: trained on 10.5; actor Q = 1.5, slope 1.
        (
            "sin-sac",
            {"num_trained_subnets": 1, "num_target_subnets": 1},
            {},
            [10.45, 2.0, 12.45],
            [9.45**2, 1.0, 11.45**2],
            [9.45, 1.0, 11.45],
            [-2 * (9.45 + 1 + 11.45)],
            -1.5,
            -1.0,
        ),
    ],
)
def test_losses_and_gradients_equal_the_values_worked_out_by_hand(
    row, counts, draws, target, qvalue_loss, td_error, value_grad, actor_loss, actor_grad
):
    num = len(value_grad)
    loss = constant_loss([1.0, 2.0, 3.0, 4.0][:num], [10.0, 20.0, 30.0, 40.0][:num], [1.0, 2.0, 3.0, 4.0][:num], **counts)
    batch, draws = constant_batch(), draws_of(**draws)

    torch.testing.assert_close(loss.compute_target(batch, draws=draws), torch.tensor(target))
    output = loss(batch, draws=draws)
    torch.testing.assert_close(output["loss_qvalue"], torch.tensor(qvalue_loss))
    torch.testing.assert_close(batch["td_error"], torch.tensor(td_error))
    torch.testing.assert_close(output["loss_actor"], torch.full((3,), actor_loss))
    torch.testing.assert_close(output["loss_alpha"], torch.zeros(3))  # log alpha is 0

    params = loss.qvalue_network_params
    (value,) = torch.autograd.grad(output["loss_qvalue"].sum(), [params["module", "values"]])
    torch.testing.assert_close(value, torch.tensor(value_grad))
    (loc,) = torch.autograd.grad(output["loss_actor"].mean(), list(loss.actor_network_params.parameters()))
    torch.testing.assert_close(loc, torch.tensor(actor_grad))
    (alpha,) = torch.autograd.grad(output["loss_alpha"].mean(), [loss.log_alpha])
    torch.testing.assert_close(alpha, torch.tensor(2.0))  # -(0 + target entropy)


def test_entropy_terms_equal_the_values_worked_out_by_hand(monkeypatch):
    # alpha 2, log pi 0.25: the next value loses 0.5, the actor loss gains 0.5, loss_alpha is -log 2 * (0.25 - 2).
    monkeypatch.setattr(ConstantAction, "log_prob_value", 0.25)
    loss = constant_loss([1.0], [10.0], [1.0], alpha=2.0, num_target_subnets=1)
    batch = constant_batch()
    output = loss(batch, draws=draws_of())
    torch.testing.assert_close(loss.compute_target(batch, draws=draws_of()), torch.tensor([10.0, 2.0, 12.0]))
    torch.testing.assert_close(output["loss_actor"], torch.full((3,), -1.0))
    torch.testing.assert_close(output["loss_alpha"], torch.full((3,), 1.75 * math.log(2)))


def test_an_offset_of_the_log_probability_is_an_offset_wherever_it_counts(monkeypatch):
    monkeypatch.setattr(ConstantAction, "log_prob_value", 0.0)
    loss = constant_loss([1.0], [10.0], [1.0], alpha=2.0, num_target_subnets=1, log_prob_offset=0.25)
    output = loss(batch := constant_batch(), draws=draws_of())
    torch.testing.assert_close(loss.compute_target(batch, draws=draws_of()), torch.tensor([10.0, 2.0, 12.0]))
    torch.testing.assert_close(output["loss_actor"], torch.full((3,), -1.0))
    torch.testing.assert_close(output["loss_alpha"], torch.full((3,), 1.75 * math.log(2)))


def test_n_step_data_is_discounted_by_its_number_of_steps():
    loss = constant_loss([1.0], [10.0], [1.0], num_target_subnets=1)
    batch = constant_batch().set("steps_to_next_obs", torch.tensor([[1.0], [2.0], [3.0]]))
    expected = torch.tensor([1 + 0.9 * 10.5, 2.0, 3 + 0.9**3 * 10.5])
    torch.testing.assert_close(loss.compute_target(batch, draws=draws_of()), expected)


def test_min_over_the_value_subnets_is_an_option():
    loss = constant_loss([4.0, 2.0], [0.0, 0.0], [0.0, 0.0], value_reduction="min")
    value, _ = loss.actor_loss(constant_batch(), draws=draws_of(value=[0, 1]))
    torch.testing.assert_close(value, torch.full((3,), -2.0))


# Draws -----------------------------------------------------------------------------------------------------------------


def test_draws_have_the_shapes_of_the_contract():
    loss, batch = make_loss(num_trained_subnets=2, num_target_subnets=3), make_batch(7)
    draws = loss.draw(batch)
    shapes = {key: tuple(value.shape) for key, value in draws.items()}
    assert shapes == {
        "critic": (2,), "target": (3,), "value": (3,), "actor": (), "next_actor": (), "noise": (7, ACT), "next_noise": (7, ACT),
    }  # fmt: skip
    assert all(draws[key].dtype == torch.int64 for key in ("critic", "target", "value", "actor", "next_actor"))


def test_the_draws_of_several_updates_have_a_leading_dimension_and_are_those_of_one_each():
    loss, batch = make_loss(num_trained_subnets=2), make_batch(7)
    draws = loss.draw(batch, torch.Generator().manual_seed(0), num_updates=4)
    assert draws.batch_size == (4,)
    assert (draws == loss.draw(batch, torch.Generator().manual_seed(0), num_updates=4)).all()
    one = loss.draw(batch)
    for each in draws.unbind(0):
        assert {key: value.shape for key, value in each.items()} == {key: value.shape for key, value in one.items()}
        assert loss(batch, draws=each).isfinite().all()
    assert not torch.equal(draws["noise"][0], draws["noise"][1])


def test_the_noise_of_updates_without_an_actor_step_is_not_drawn():
    loss, batch, generator = make_loss(), make_batch(7), torch.Generator().manual_seed(0)
    every = loss.draw(batch, generator, num_updates=3)
    some = loss.draw(batch, generator.manual_seed(0), num_updates=3, delayed=[False, True, False])
    assert {key for key in every.keys() if not torch.equal(every[key], some[key])} == {"noise"}
    assert torch.equal(some["noise"].any(-1).any(-1), torch.tensor([False, True, False]))
    assert some["noise"][1].std() > 0.5
    assert (loss.draw(batch, generator.manual_seed(0), num_updates=3, delayed=[True] * 3)["noise"].std((1, 2)) > 0.5).all()
    for options in ({"num_updates": 3, "delayed": [True]}, {"delayed": [True]}):
        with pytest.raises(ValueError, match="delayed must have num_updates"):
            loss.draw(batch, **options)


@pytest.mark.parametrize("together", [False, True])
def test_drawn_indices_are_uniform_and_without_replacement(together):
    loss, batch = make_loss(qvalue=small_qvalue(num_subnets=5), actor=small_actor(num_subnets=4)), make_batch(1)
    draws = loss.draw(batch, num_updates=4000) if together else torch.stack([loss.draw(batch) for _ in range(4000)])
    for name, num, count in [("critic", 5, 1), ("target", 5, 2), ("actor", 4, 1), ("next_actor", 4, 1)]:
        frequency = torch.bincount(draws[name].flatten(), minlength=num) / (4000 * count)
        torch.testing.assert_close(frequency, torch.full((num,), 1 / num), atol=0.03, rtol=0)
    assert (draws["target"][:, 0] != draws["target"][:, 1]).all()
    assert (draws["value"].sort().values == torch.arange(5)).all()


def test_the_two_actors_are_drawn_independently():
    loss, batch = make_loss(), make_batch(1)
    draws = torch.stack([loss.draw(batch) for _ in range(3000)])
    pairs = torch.bincount(draws["actor"] * 3 + draws["next_actor"], minlength=9) / 3000
    torch.testing.assert_close(pairs, torch.full((9,), 1 / 9), atol=0.03, rtol=0)


def test_the_actor_can_be_trained_against_some_of_the_critics():
    loss, batch = make_loss(num_value_subnets=2), make_batch(1)
    value = torch.stack([loss.draw(batch) for _ in range(300)])["value"]
    assert value.shape == (300, 2)
    assert (value[:, 0] != value[:, 1]).all()
    assert set(value.flatten().tolist()) == {0, 1, 2}


def test_indices_with_replacement_repeat():
    loss = make_loss(replacement=True, num_target_subnets=2)
    target = torch.stack([loss.draw(make_batch(1)) for _ in range(300)])["target"]
    assert 60 < (target[:, 0] == target[:, 1]).sum() < 140  # 1 / 3 of them


@pytest.mark.parametrize("num_updates", [None, 2])
def test_all_are_all_with_replacement_too(num_updates):
    loss = make_loss(replacement=True, num_trained_subnets=None)
    draws = loss.draw(make_batch(1), num_updates=num_updates)
    for name in ("critic", "value"):
        assert (draws[name] == torch.arange(3)).all()


def test_draws_come_from_the_generator_alone():
    loss, batch = make_loss(), make_batch(4)
    state = torch.get_rng_state()
    first, second = (loss.draw(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert (first == second).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num", [1, 2])
def test_nothing_to_choose_draws_no_index(num):
    loss = make_loss(small_actor(1, 0.0), small_qvalue(num, 0.0), num_trained_subnets=None, num_target_subnets=None)
    state = torch.get_rng_state()
    loss.draw(make_batch(4).exclude("action").set("action", TensorDict(batch_size=[4])))
    assert torch.equal(torch.get_rng_state(), state)


def test_given_draws_leave_the_global_generator_alone():
    loss, batch = make_loss(), make_batch(4)
    draws = loss.draw(batch)
    state = torch.get_rng_state()
    first, second = (loss(batch, draws=draws) for _ in range(2))
    assert (first == second).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_indices_per_element_choose_per_element():
    # The task's own subnetwork for every transition, as in multi-task learning.
    loss, batch = make_loss(reduction="none", scalar_output_mode="exclude"), make_batch(6)
    task, draws = torch.tensor([0, 1, 2, 0, 1, 2]), loss.draw(batch)
    for name in ("critic", "target", "value"):
        draws[name] = task[None]
    draws["actor"] = draws["next_actor"] = task
    output = loss(batch, draws=draws)
    for k in range(3):
        alone = draws.clone()
        alone["critic"] = alone["target"] = alone["value"] = torch.tensor([k])
        alone["actor"] = alone["next_actor"] = torch.tensor(k)
        expected = loss(batch, draws=alone)
        torch.testing.assert_close(output[task == k], expected[task == k])


# Laws ------------------------------------------------------------------------------------------------------------------


def test_gradient_is_zero_outside_the_drawn_mask_and_only_there():
    loss, batch = make_loss(), make_batch(64)
    draws = loss.draw(batch)
    draws["critic"], draws["actor"] = torch.tensor([1]), torch.tensor(2)
    output = loss(batch, draws=draws)
    (output["loss_qvalue"] + output["loss_actor"]).backward()
    networks = [(loss.qvalue_network.module, 1), (loss.actor_network.module[0].network, 2)]
    for network, drawn in networks:
        for layer in (network[0], network[3], network[6]):
            mask = layer.masks[drawn]
            assert not layer.weight.grad[~mask].any()
            assert layer.weight.grad[mask].any()


@pytest.mark.parametrize("separate_losses", [False, True])
def test_each_loss_reaches_its_own_parameters_and_no_other(separate_losses):
    loss, batch = make_loss(separate_losses=separate_losses), make_batch(16)
    output = loss(batch)
    own = {
        "loss_qvalue": loss.qvalue_network_params,
        "loss_actor": loss.actor_network_params,
        "loss_alpha": nn.ParameterList([loss.log_alpha]),
    }
    assert {key for key in output.keys() if key.startswith("loss")} == set(own)
    for key, module in own.items():
        loss.zero_grad()
        output[key].backward(retain_graph=True)
        mine = {id(p) for p in module.parameters()}
        for name, p in loss.named_parameters():
            assert is_zero(p.grad) == (id(p) not in mine), f"{key} and {name}"
    assert not any(p.requires_grad for p in loss.target_qvalue_network_params.values(True, True))


def test_batch_is_unchanged_but_for_the_priority():
    loss, batch = make_loss(), make_batch(8)
    batch["subnet"] = torch.arange(8) % 3
    batch["next", "subnet"] = batch["subnet"].clone()
    before = batch.clone()
    loss(batch)
    assert (batch.exclude("td_error") == before).all()
    assert set(batch.keys(True)) - set(before.keys(True)) == {"td_error"}


def test_behaviour_index_in_the_batch_is_ignored():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    expected = loss(batch.clone(), draws=draws)
    batch["subnet"], batch["next", "subnet"] = torch.full((8,), 99), torch.full((8,), 99)
    assert (loss(batch, draws=draws) == expected).all()


def test_parts_do_not_write_to_the_batch_and_add_up_to_forward():
    loss, batch = make_loss(), make_batch(8)
    draws, before = loss.draw(batch), batch.clone()
    qvalue, data = loss.qvalue_loss(batch, draws=draws)
    actor, actor_data = loss.actor_loss(batch, draws=draws)
    alpha = loss.alpha_loss(actor_data["log_prob"]).mean()
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))
    output = loss(batch, draws=draws)
    assert [qvalue, actor, alpha] == [output[key] for key in ("loss_qvalue", "loss_actor", "loss_alpha")]
    assert torch.equal(batch["td_error"], data["td_error"])
    assert output["entropy"] == -actor_data["log_prob"].mean()


def test_masks_survive_copies_moves_resets_and_target_updates():
    loss = make_loss()
    masks = {name: b.clone() for name, b in loss.named_buffers() if "masks" in name}
    assert len(masks) == 9  # three layers of the actor, the critic and its target

    def held(module):
        return all(torch.equal(b, masks[name]) for name, b in module.named_buffers() if "masks" in name)

    other = make_loss(qvalue=small_qvalue(), actor=small_actor())
    assert held(copy.deepcopy(loss))
    other.load_state_dict(loss.state_dict())
    assert held(other)
    assert held(loss.to(torch.float64).to(torch.float32))
    loss.reset_parameters_recursive()
    assert held(loss)
    updater = SoftUpdate(loss, tau=0.5)
    updater.step()
    assert held(loss)
    HardUpdate(loss, value_network_update_interval=1).step()
    assert held(loss)


def test_changing_the_masks_changes_the_target():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    for layer in loss.qvalue_network.module:
        if hasattr(layer, "masks"):
            layer.masks.logical_not_()
    dense = make_loss(copy.deepcopy(loss.actor_network), copy.deepcopy(loss.qvalue_network))
    after = loss.compute_target(batch, draws=draws)
    assert not torch.isclose(after, before).any()
    assert torch.equal(after, dense.compute_target(batch, draws=draws))


def test_target_moves_only_with_its_updater():
    loss, batch = make_loss(), make_batch(8)
    updater = SoftUpdate(loss, tau=0.1)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    old = loss.target_qvalue_network_params.clone()
    with torch.no_grad():
        for p in loss.qvalue_network_params.parameters():
            p.add_(1.0)
    assert torch.equal(loss.compute_target(batch, draws=draws), before)
    updater.step()
    for key, value in loss.target_qvalue_network_params.items(True, True):
        expected = old.get(key) + 0.1 if value.is_floating_point() else old.get(key)
        torch.testing.assert_close(value.data, expected.data)


def test_without_delay_the_target_is_the_online_network():
    loss, batch = make_loss(delay_qvalue=False), make_batch(8)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    with torch.no_grad():
        loss.qvalue_network.module[-1].bias.add_(1.0)
    torch.testing.assert_close(loss.compute_target(batch, draws=draws), before + 0.9)


def test_given_parameters_are_used_and_own_ones_are_not():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    names = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")
    other = make_loss(small_actor(), small_qvalue(), alpha_init=0.3)
    params = TensorDict({name: TensorDict(getattr(other, name).data.to_dict()) for name in names})
    params["log_alpha"] = other.log_alpha.data
    qvalue, _ = loss.qvalue_loss(batch, draws=draws, params=params)
    actor, data = loss.actor_loss(batch, draws=draws, params=params)
    alpha = loss.alpha_loss(data["log_prob"], params=params).mean()
    expected = other(batch, draws=draws)
    assert torch.stack([qvalue, actor, alpha]).tolist() == [
        expected[k].item() for k in ("loss_qvalue", "loss_actor", "loss_alpha")
    ]


def test_given_masks_are_used_in_the_target_and_a_given_temperature_gets_no_gradient_from_the_actor():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    other = make_loss(copy.deepcopy(loss.actor_network), copy.deepcopy(loss.qvalue_network))
    other.qvalue_network.module[3].masks.logical_not_()
    params = TensorDict({"qvalue_network_params": TensorDict(other.qvalue_network_params.data.to_dict())})
    expected = other.compute_target(batch, draws=draws)
    assert torch.equal(loss.compute_target(batch, draws=draws, params=params), expected)
    assert not torch.isclose(loss.compute_target(batch, draws=draws), expected).any()

    log_alpha = torch.zeros((), requires_grad=True)
    actor, _ = loss.actor_loss(batch, draws=draws, params=TensorDict(log_alpha=log_alpha))
    assert torch.autograd.grad(actor, [log_alpha], allow_unused=True) == (None,)


def test_without_delay_given_parameters_are_their_own_target():
    loss, other = (make_loss(small_actor(), small_qvalue(), delay_qvalue=False) for _ in range(2))
    batch = make_batch(8)
    draws = loss.draw(batch)
    names = ("actor_network_params", "qvalue_network_params")
    params = TensorDict({name: TensorDict(getattr(other, name).data.to_dict()) for name in names})
    expected = other.compute_target(batch, draws=draws)
    assert torch.equal(loss.compute_target(batch, draws=draws, params=params), expected)


def test_low_precision_networks_train():
    loss = make_loss(small_actor().to(torch.bfloat16), small_qvalue().to(torch.bfloat16))
    output = loss(make_batch(8).apply(lambda t: t.bfloat16() if t.is_floating_point() else t))
    assert output["loss_actor"].dtype == torch.bfloat16
    assert output.isfinite().all()


def test_it_learns_a_constant_reward():
    # A probe: reward 1, every step terminal. The value is 1 everywhere, for every subnetwork.
    loss, updater_batch = make_loss(), make_batch(64, done=1.0)
    updater_batch["next", "reward"].fill_(1.0)
    updater_batch["next", "terminated"].fill_(True)
    optim = torch.optim.Adam(loss.qvalue_network_params.parameters(), lr=3e-3)
    for _ in range(600):
        optim.zero_grad()
        loss.qvalue_loss(updater_batch)[0].backward()
        optim.step()
    every = torch.arange(3)[:, None]
    values = loss.qvalue_network(
        TensorDict(observation=updater_batch["observation"], action=updater_batch["action"], subnet=every)
    )["state_action_value"]
    assert ((values - 1).abs().mean((1, 2)) < 0.05).all()


# TorchRL's loss protocol -----------------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_and_known_ones_are_set():
    loss = make_loss()
    defaults = {
        "priority": "td_error", "value": "state_value", "state_action_value": "state_action_value", "action": "action",
        "log_prob": "action_log_prob", "reward": "reward", "done": "done", "terminated": "terminated", "subnet": "subnet",
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown_key is not an accepted"):
        loss.set_keys(unknown_key="test2")
    for key, value in defaults.items():
        assert getattr(loss.tensor_keys, key) == value
        loss.set_keys(**{key: "test1"})
        assert getattr(loss.tensor_keys, key) == "test1"
        loss.set_keys(**{key: None})
        assert getattr(loss.tensor_keys, key) == (value if key != "log_prob" else loss.default_keys().log_prob)


@pytest.mark.parametrize("td_est", [ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda])
def test_keys_reach_the_value_estimator(td_est):
    loss = make_loss()
    loss.set_keys(value="v", reward="r", done=("d", "one"), terminated=("d", "two"))
    loss.make_value_estimator(td_est)
    keys = loss.value_estimator.tensor_keys
    assert (keys.value, keys.reward, keys.done, keys.terminated) == ("v", "r", ("d", "one"), ("d", "two"))


@pytest.mark.parametrize("td_est", list(ValueEstimators))
def test_supported_value_estimators_run_and_others_are_refused(td_est):
    loss, batch = make_loss(), make_batch(4, 6)
    batch.names = [None, "time"]
    if td_est not in (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda):
        with pytest.raises(NotImplementedError):
            loss.make_value_estimator(td_est)
        return
    loss.make_value_estimator(td_est)
    output = loss(batch)
    assert output.isfinite().all()
    assert batch["td_error"].shape == batch.shape


def test_in_keys_are_ordered_and_hold_no_index():
    assert make_loss().in_keys == [
        "action",
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
        ("next", "observation"),
        "observation",
    ]
    assert make_loss().out_keys == ["loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy"]


@pytest.mark.parametrize("rename", [False, True])
def test_it_can_be_called_without_tensordicts(rename):
    names = ("action", "reward", "done", "terminated")
    keys = {name: name + "2" if rename else name for name in names}
    actor, qvalue = (make(action_key=keys["action"]) for make in (small_actor, small_qvalue))
    loss = make_loss(actor, qvalue)
    loss.set_keys(**keys)
    batch = make_batch(8)
    kwargs = {
        keys["action"]: batch["action"],
        "observation": batch["observation"],
        "next_observation": batch["next", "observation"],
        **{f"next_{keys[name]}": batch["next", name] for name in names[1:]},
    }
    renamed = TensorDict(kwargs, [8]).unflatten_keys("_")
    torch.manual_seed(1)
    values = loss(**kwargs)
    torch.manual_seed(1)
    expected = loss(renamed)
    assert list(values) == [expected[key] for key in loss.out_keys]
    torch.manual_seed(1)
    loss.select_out_keys("loss_actor", "loss_alpha")
    assert list(loss(**kwargs)) == [expected["loss_actor"], expected["loss_alpha"]]


def test_nested_keys_work():
    keys = {"observation_key": ("agent", "observation"), "action_key": ("agent", "action"), "subnet_key": ("agent", "subnet")}
    actor, qvalue = (make(**keys) for make in (small_actor, small_qvalue))
    loss = OMNetSACLoss(actor, qvalue)
    SoftUpdate(loss, tau=0.1)
    loss.set_keys(
        subnet=("agent", "subnet"), action=("agent", "action"), reward=("metrics", "reward"), priority=("replay", "error")
    )
    batch = make_batch(8)
    for prefix in ((), ("next",)):
        batch.rename_key_((*prefix, "observation"), (*prefix, "agent", "observation"))
    batch.rename_key_("action", ("agent", "action"))
    batch.rename_key_(("next", "reward"), ("next", "metrics", "reward"))
    assert loss.in_keys[0] == ("agent", "action")
    assert ("next", "agent", "observation") in loss.in_keys
    assert not any("subnet" in key for key in loss.in_keys)
    assert loss(batch).isfinite().all()
    assert batch["replay", "error"].shape == (8,)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("batch_size", [(8,), (4, 3)])
def test_reductions(reduction, batch_size):
    options = {"scalar_output_mode": "exclude"} if reduction == "none" else {}
    loss = make_loss(reduction=reduction, alpha_init=0.5, **options)
    none = make_loss(reduction="none", scalar_output_mode="exclude")
    none.load_state_dict(loss.state_dict())
    batch = make_batch(*batch_size)
    draws = loss.draw(batch)
    output, each = loss(batch, draws=draws), none(batch, draws=draws)
    for key in ("loss_actor", "loss_qvalue", "loss_alpha"):
        assert each[key].shape == batch_size
        expected = each[key] if reduction == "none" else getattr(each[key], reduction)()
        torch.testing.assert_close(output[key], expected)


def test_scalars_can_be_returned_beside_unreduced_losses():
    loss = make_loss(reduction="none", scalar_output_mode="non_tensor")
    output = loss(make_batch(8))
    assert output.batch_size == (8,)
    assert float(output["alpha"]) == 1.0


def test_priority_weights_weigh_the_losses():
    loss, batch = make_loss(alpha_init=0.5), make_batch(8)
    draws = loss.draw(batch)
    batch["priority_weight"] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    only_first = loss(batch[:1].exclude("priority_weight"), draws=_first(draws))
    weighted = loss(batch, draws=draws)
    for key in ("loss_actor", "loss_qvalue", "loss_alpha"):
        torch.testing.assert_close(weighted[key], only_first[key])
    unweighted = make_loss(use_prioritized_weights=False)
    unweighted.load_state_dict(loss.state_dict())
    assert not torch.isclose(unweighted(batch, draws=draws)["loss_qvalue"], weighted["loss_qvalue"])


def _first(draws):
    return TensorDict({key: value[:1] if "noise" in key else value for key, value in draws.items()})


def test_masked_positions_do_not_count():
    loss, batch = make_loss(alpha_init=0.5), make_batch(8)
    draws = loss.draw(batch)
    batch["collector", "mask"] = torch.arange(8) == 0
    only_first = loss(batch[:1], draws=_first(draws))
    masked = loss(batch, draws=draws)
    for key in ("loss_actor", "loss_qvalue", "loss_alpha"):
        torch.testing.assert_close(masked[key], only_first[key])


@pytest.mark.parametrize("kwargs", [{}, {"action_spec": Bounded(-1, 1, (ACT,))}])
def test_automatic_target_entropy_is_minus_the_action_dimension(kwargs):
    assert make_loss(**kwargs).target_entropy == -ACT


@pytest.mark.parametrize("target_entropy", [-1.0, -5.0, 0.0])
def test_target_entropy_can_be_given(target_entropy):
    assert make_loss(target_entropy=target_entropy).target_entropy == target_entropy


def test_state_dict_round_trip_repeats_the_losses():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected = loss(batch, draws=draws)
    other = OMNetSACLoss(small_actor(), small_qvalue())
    SoftUpdate(other, tau=0.1)
    other.load_state_dict(loss.state_dict())
    copied = copy.deepcopy(loss)
    assert (other(batch, draws=draws) == expected).all()
    assert (copied(batch, draws=draws) == expected).all()


def test_reset_draws_every_parameter_anew():
    loss = make_loss()
    before = {}
    for name in ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params"):
        params = getattr(loss, name)
        with torch.no_grad():
            for p in params.values(True, True):
                if p.is_floating_point():
                    p += 1000
        before[name] = params.clone()
    loss.reset_parameters_recursive()
    for name, old in before.items():
        for key, value in getattr(loss, name).items(True, True):
            assert not value.is_floating_point() or (value != old.get(key)).all(), (name, key)
    for key, value in loss.target_qvalue_network_params.items(True, True):
        assert torch.equal(value, loss.qvalue_network_params.get(key))


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_stands_in_a_terminal_next_state_has_no_effect_when_done_states_are_skipped(everywhere):
    loss, batch = make_loss(skip_done_states=True), make_batch(6)
    terminal = torch.ones(6, 1, dtype=torch.bool) if everywhere else torch.tensor([[True], [False], [False]] * 2)
    batch["next", "terminated"], batch["next", "done"] = terminal, terminal.clone()
    draws = loss.draw(batch)
    expected = loss.compute_target(batch, draws=draws)
    batch["next", "observation"][terminal.squeeze(-1)] = float("nan")
    target = loss.compute_target(batch, draws=draws)
    assert torch.equal(target, expected)
    torch.testing.assert_close(target[terminal.squeeze(-1)], batch["next", "reward"][terminal])
    output = loss(batch, draws=draws)
    (output["loss_actor"] + output["loss_qvalue"] + output["loss_alpha"]).backward()
    assert all(g.isfinite().all() for g in grads(loss).values())


def test_a_truncated_next_state_is_not_skipped():
    loss, batch = make_loss(skip_done_states=True), make_batch(6)
    draws = loss.draw(batch)
    expected = loss.compute_target(batch, draws=draws)
    batch["next", "done"] = torch.ones(6, 1, dtype=torch.bool)
    assert torch.equal(loss.compute_target(batch, draws=draws), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_multi_step_data(n):
    loss, batch = make_loss(gamma=0.9), make_batch(4, 6)
    batch.names, draws = [None, "time"], loss.draw(batch)
    stepped = MultiStep(gamma=0.9, n_steps=n)(batch.clone())
    one, many = loss(batch, draws=draws), loss(stepped, draws=draws)
    same = torch.isclose(one["loss_qvalue"], many["loss_qvalue"])
    assert bool(same) == (n == 1)
    many["loss_qvalue"].backward()
    assert all(not is_zero(p.grad) for p in loss.qvalue_network_params.parameters())


def test_fixed_and_bounded_temperatures():
    fixed = make_loss(fixed_alpha=True, alpha_init=0.3)
    assert "log_alpha" not in dict(fixed.named_parameters())
    torch.testing.assert_close(fixed(make_batch(4))["alpha"], torch.tensor(0.3))
    bounded = make_loss(alpha_init=3.0, min_alpha=0.1, max_alpha=2.0)
    torch.testing.assert_close(bounded(make_batch(4))["alpha"], torch.tensor(2.0))
    draws = bounded.draw(make_batch(4))
    loss, _ = bounded.actor_loss(make_batch(4), draws=draws)
    given, _ = bounded.actor_loss(make_batch(4), draws=draws, params=TensorDict(log_alpha=torch.tensor(3.0).log()))
    torch.testing.assert_close(given, loss)


@pytest.mark.parametrize("bounds", [{"max_alpha": 2.0}, {"min_alpha": 0.1, "max_alpha": 2.0}])
def test_a_given_temperature_is_bounded_from_above_alone_too(bounds):
    loss, batch = make_loss(**bounds), make_batch(4)
    draws = loss.draw(batch)
    high, limit = (
        loss.actor_loss(batch, draws=draws, params=TensorDict(log_alpha=torch.tensor(alpha).log()))[0] for alpha in (3.0, 2.0)
    )
    torch.testing.assert_close(high, limit)


def dense_actor(features=OBS, in_keys=("observation",), **kwargs):
    net = nn.Sequential(nn.Linear(features, 2 * ACT), NormalParamExtractor())
    module = TensorDictModule(net, in_keys=list(in_keys), out_keys=["loc", "scale"])
    return ProbabilisticActor(module, in_keys=["loc", "scale"], distribution_class=TanhNormal, spec=specs()[1], **kwargs)


def test_plain_torchrl_networks_are_one_subnetwork():
    qvalue = ValueOperator(MLP(OBS + ACT, 1, num_cells=[8]), in_keys=["observation", "action"])
    loss = make_loss(dense_actor(), qvalue, num_target_subnets=1)
    output = loss(make_batch(8))
    assert (loss.num_subnets, loss.num_actor_subnets) == (1, 1)
    assert output.isfinite().all()


def test_a_critic_that_ignores_the_index_is_expanded_and_not_reduced():
    class Deaf(nn.Module):
        num_subnets = 3

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(OBS + ACT, 1)

        def forward(self, observation, action, subnet):
            return self.linear(torch.cat([observation, action], -1))

    deaf = SubnetQValueOperator(Deaf())
    loss = make_loss(dense_actor(), deaf, num_trained_subnets=3)
    one = make_loss(loss.actor_network, ValueOperator(MLP(OBS + ACT, 1), ["observation", "action"]), num_target_subnets=1)
    one.qvalue_network.module[0].load_state_dict(deaf.module.linear.state_dict())
    HardUpdate(one, value_network_update_interval=1).step()
    batch = make_batch(8)
    draws = loss.draw(batch)
    alone = draws.clone().update(TensorDict({name: torch.tensor([0]) for name in ("critic", "target", "value")}))
    assert torch.equal(loss.compute_target(batch, draws=draws), one.compute_target(batch, draws=alone))
    torch.testing.assert_close(loss(batch, draws=draws)["loss_qvalue"], 3 * one(batch, draws=alone)["loss_qvalue"])


def test_networks_may_share_a_trunk():
    trunk = TensorDictModule(MLP(OBS, 8, num_cells=[8]), in_keys=["observation"], out_keys=["hidden"])
    head = SubnetQValueOperator(EnsembleMLP(8 + ACT, 1, num_cells=[8]), in_keys=["hidden", "action", "subnet"])
    actor = TensorDictSequential(trunk, dense_actor(8, ["hidden"])[0])
    actor = ProbabilisticActor(actor, in_keys=["loc", "scale"], distribution_class=TanhNormal, spec=specs()[1])
    loss = make_loss(actor, TensorDictSequential(trunk, head), num_trained_subnets=None, separate_losses=True)
    output = loss(make_batch(8))
    output["loss_qvalue"].backward()
    assert all(is_zero(p.grad) for p in trunk.parameters())
    output["loss_actor"].backward()
    assert all(not is_zero(p.grad) for p in trunk.parameters())


def test_composite_actions_are_sampled_by_their_distribution():
    spec = Composite(action=Composite(action1=Bounded(-1, 1, (ACT,))))
    net = TensorDictModule(
        nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor()),
        in_keys=["observation"],
        out_keys=[("params", "action1", "loc"), ("params", "action1", "scale")],
    )

    class Composed(CompositeDistribution):
        def __init__(self, params):
            super().__init__(params, distribution_map={"action1": TanhNormal})

    actor = ProbabilisticActor(net, in_keys=["params"], out_keys=["action"], distribution_class=Composed, spec=spec)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MLP(OBS + ACT, 1, num_cells=[8])

        def forward(self, observation, action):
            return self.net(observation, action["action1"])

    qvalue = ValueOperator(Critic(), in_keys=["observation", "action"])
    loss = make_loss(actor, qvalue, num_target_subnets=1, action_spec=spec)
    batch = make_batch(8)
    batch["action"] = TensorDict(action1=batch["action"], batch_size=[8])
    assert "noise" not in loss.draw(batch).keys()
    output = loss(batch)
    assert loss.target_entropy == -ACT
    assert output.isfinite().all()
    output["loss_actor"].backward()
    assert all(not is_zero(p.grad) for p in loss.actor_network_params.parameters())


def test_a_fresh_draw_is_scored_without_inverting_it(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("inverse-scored a freshly sampled TanhNormal")

    monkeypatch.setattr(TanhNormal, "log_prob", refuse)
    assert make_loss()(make_batch(8)).isfinite().all()


def test_the_value_estimator_is_made_on_the_device_of_the_networks():
    loss = OMNetSACLoss(small_actor().to("meta"), small_qvalue().to("meta"))
    assert loss.value_estimator.gamma.device.type == "meta"
    assert loss.make_value_estimator(gamma=0.5).value_estimator.gamma.device.type == "meta"
    assert loss.make_value_estimator(gamma=0.5, device="cpu").value_estimator.gamma.device.type == "cpu"


def test_target_updater_is_asked_for():
    loss = OMNetSACLoss(small_actor(), small_qvalue())
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(make_batch(4))


def test_value_estimator_constructor_returns_the_loss():
    loss = OMNetSACLoss(small_actor(), small_qvalue())
    assert loss.make_value_estimator(ValueEstimators.TD0, gamma=0.5) is loss
    assert loss.value_estimator.gamma == 0.5
    estimator = loss.value_estimator
    assert loss.make_value_estimator(estimator) is loss
    assert loss.value_estimator is estimator


# Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1.5, True])
def test_a_count_that_is_no_int_is_refused(count):
    with pytest.raises(TypeError, match="num_target_subnets must be an int or None"):
        OMNetSACLoss(small_actor(), small_qvalue(), num_target_subnets=count)


def test_an_index_under_another_key_is_asked_for():
    loss, batch = make_loss(small_actor(subnet_key="task"), small_qvalue(subnet_key="task")), make_batch(4)
    batch["task"] = batch["next", "task"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"reads .*'task'.* and no 'subnet': .*set_keys\(subnet=...\)"):
        loss(batch)
    loss.set_keys(subnet="task")
    assert loss(batch).isfinite().all()
    assert "task" not in loss.in_keys

    silent = TensorDictModule(
        nn.Bilinear(OBS, ACT, 1), in_keys=["observation", "action", "task"], out_keys=["state_action_value"]
    )
    with pytest.raises(ValueError, match="its module needs num_subnets"):
        make_loss(dense_actor(), silent, num_target_subnets=1).set_keys(subnet="task")


@pytest.mark.parametrize("name", ["num_trained_subnets", "num_target_subnets", "num_value_subnets"])
@pytest.mark.parametrize("count", [0, 4])
def test_asking_for_more_subnets_than_there_are_is_refused(name, count):
    with pytest.raises(ValueError, match=rf"{name} must be in \[1, num_subnets=3\], got {count}"):
        OMNetSACLoss(small_actor(), small_qvalue(), **{name: count})


def test_two_targets_of_a_critic_of_one_network_are_refused_and_by_default_it_has_one():
    qvalue = ValueOperator(MLP(OBS + ACT, 1), in_keys=["observation", "action"])
    with pytest.raises(ValueError, match=r"num_target_subnets must be in \[1, num_subnets=1\], got 2"):
        OMNetSACLoss(dense_actor(), qvalue, num_target_subnets=2)
    for num_subnets, expected in ((1, 1), (2, 2), (3, 2)):
        assert OMNetSACLoss(dense_actor(), small_qvalue(num_subnets)).num_target_subnets == expected
    loss = make_loss(dense_actor(), qvalue)
    assert loss.num_target_subnets == 1
    assert loss.draw(make_batch(4))["target"].shape == (1,)
    assert loss(make_batch(4))["loss_qvalue"].isfinite()


@pytest.mark.parametrize(
    ("argument", "advice"),
    [
        ({"num_qvalue_nets": 2}, r"make_qvalue\(\.\.\., network_class=EnsembleMLP, num_subnets=2\)"),
        ({"value_network": None}, "there is no separate state-value network"),
        ({"delay_actor": True}, "targets are computed with the current actor"),
        ({"delay_value": True}, "there is no separate state-value network"),
        ({"gamma": 0.9}, r"loss\.make_value_estimator\(gamma=\.\.\.\)"),
        ({"priority_key": "td"}, r"loss\.set_keys\(priority=\.\.\.\)"),
    ],
)
def test_an_argument_of_saclosss_that_it_lacks_says_what_takes_its_place(argument, advice):
    (name,) = argument
    with pytest.raises(TypeError, match=f"OMNetSACLoss has no argument '{name}' of SACLoss: .*{advice}"):
        OMNetSACLoss(small_actor(), small_qvalue(), **argument)


def test_its_steps_are_the_critics_and_the_delayed_one_of_actor_and_temperature():
    critic, actor = make_loss().steps()
    assert (critic.name, critic.trains, critic.delayed) == ("critic", ("qvalue_network_params",), False)
    assert critic.targets == critic.trains
    assert (actor.name, actor.trains, actor.delayed) == ("actor", ("actor_network_params", "log_alpha"), True)
    assert actor.targets == ()
    critic, actor = make_loss(fixed_alpha=True, delay_qvalue=False).steps()
    assert critic.targets == ()
    assert actor.trains == ("actor_network_params",)


def test_the_objectives_of_its_steps_are_its_losses():
    loss, batch = make_loss(alpha_init=0.5), make_batch(6)
    draws = loss.draw(batch)
    expected = loss(batch.clone(), draws=draws)
    critic, actor = (step.objective(batch, draws, loss.parameter_groups()) for step in loss.steps())
    assert torch.equal(critic[0], expected["loss_qvalue"])
    assert torch.equal(actor[0], expected["loss_actor"] + expected["loss_alpha"])
    assert critic[1]["td_error"].shape == (6,)
    assert {key: value for key, value in actor[1].items() if value.requires_grad} == {}


def test_other_mistakes_are_refused_where_they_enter():
    with pytest.raises(TypeError, match="EnsembleMLP"):
        OMNetSACLoss(small_actor(), [small_qvalue(), small_qvalue()])
    with pytest.raises(ValueError, match="value_reduction must be one of 'mean', 'min', 'first', got 'max'"):
        OMNetSACLoss(small_actor(), small_qvalue(), value_reduction="max")

    class Silent(nn.Module):
        def forward(self, observation, action, subnet):
            return observation[..., :1]

    critic = TensorDictModule(Silent(), in_keys=["observation", "action", "subnet"], out_keys=["state_action_value"])
    with pytest.raises(ValueError, match="its module needs num_subnets"):
        OMNetSACLoss(small_actor(), critic)
    per_dimension = make_loss(dense_actor(distribution_kwargs={"event_dims": 0}))
    with pytest.raises(RuntimeError, match="log-probability must have the batch's shape"):
        per_dimension(make_batch(4))


def test_target_entropy_without_a_spec_is_asked_for_when_it_is_needed():
    net = TensorDictModule(nn.Sequential(nn.Linear(OBS, 2 * ACT), NormalParamExtractor()), ["observation"], ["loc", "scale"])
    actor = ProbabilisticActor(net, in_keys=["loc", "scale"], distribution_class=TanhNormal)
    loss = make_loss(actor)
    with pytest.raises(RuntimeError, match="Cannot infer the dimensionality of the action"):
        loss(make_batch(4))
    loss._action_spec = Unbounded((ACT,))  # what SACTrainer does
    assert loss.target_entropy == -ACT


# Compilation and vmap --------------------------------------------------------------------------------------------------


def backward(loss, batch, draws):
    loss.zero_grad()
    output = loss(batch, draws=draws)
    sum(output[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
    return output.detach(), {name: grad.clone() for name, grad in grads(loss).items()}


def compiled(function, backend="aot_eager"):
    """Traced whole, forwards and backwards; by default, torch itself computes what was traced."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_loss_equals_eager(backend):
    loss, batch = make_loss(), make_batch(16, done=0.3)
    compiled_loss = compiled(loss, backend)
    for _ in range(3):
        draws = loss.draw(batch)
        output, gradients = backward(loss, batch.clone(), draws)
        loss.zero_grad()
        actual = compiled_loss(batch, draws=draws)
        sum(actual[key] for key in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
        torch.testing.assert_close(actual.detach(), output)
        torch.testing.assert_close(grads(loss), gradients)


def test_compiled_parts_draw_by_themselves_anew_at_each_call():
    loss, batch = make_loss(), make_batch(16)
    part = compiled(lambda td: loss.qvalue_loss(td)[0])
    assert len({part(batch).item() for _ in range(8)}) > 4


def test_two_runs_side_by_side_under_vmap_equal_a_loop():
    losses = [make_loss(small_actor(), small_qvalue(), alpha_init=0.5 + i) for i in range(2)]
    batches = [make_batch(8, seed=i, done=0.3) for i in range(2)]
    draws = [loss.draw(batch) for loss, batch in zip(losses, batches, strict=True)]
    names = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")

    def params_of(loss):
        params = TensorDict({name: TensorDict(getattr(loss, name).data.to_dict()) for name in names})
        return params.set("log_alpha", loss.log_alpha.data)

    def run(params, batch, draws):
        qvalue, critic = losses[0].qvalue_loss(batch, draws=draws, params=params)
        actor, data = losses[0].actor_loss(batch, draws=draws, params=params)
        return qvalue, actor, losses[0].alpha_loss(data["log_prob"], params=params).mean(), critic["td_error"]

    def total(params, batch, draws):
        return sum(run(params, batch, draws)[:3])

    params = [params_of(loss) for loss in losses]
    floating = [p.select(*(k for k, v in p.items(True, True) if v.is_floating_point())) for p in params]

    def gradient(floating, params, batch, draws):
        return torch.func.grad(lambda f: total(params.copy().update(f), batch, draws))(floating)

    gradients = torch.vmap(gradient)(*(torch.stack(x) for x in (floating, params, batches, draws)))
    for i in range(2):
        alone = gradient(floating[i], params[i], batches[i], draws[i])
        assert any(g.any() for g in alone.values(True, True))
        torch.testing.assert_close(gradients[i].to_dict(), alone.to_dict())
    together = torch.vmap(run)(torch.stack(params), torch.stack(batches), torch.stack(draws))
    for i, loss in enumerate(losses):
        expected = loss(batches[i], draws=draws[i])
        for value, key in zip(together, ("loss_qvalue", "loss_actor", "loss_alpha"), strict=False):
            torch.testing.assert_close(value[i], expected[key])
        torch.testing.assert_close(together[3][i], batches[i]["td_error"])


class HoldsParams(nn.Module):
    """A network that holds parameters of another one as such, besides its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3).eval()
        self.other = TensorDictParams(TensorDict.from_module(nn.Linear(3, 2)))

    def forward(self, x):
        return self.norm(self.linear(x)) @ self.other["weight"].t()


@pytest.mark.parametrize("detach", [False, True])
def test_a_network_called_with_parameters_has_them_and_then_its_own_again(detach):
    network, x = HoldsParams(), torch.randn(4, 3)
    before, expected = dict(network.state_dict(keep_vars=True)), network(x)
    params = TensorDict.from_module(copy.deepcopy(network))
    params = params.apply(lambda t: (t.detach() + 1).requires_grad_(t.requires_grad), filter_empty=False)
    with params.to_module(network):
        under = network(x)
    with called_with(network, params, detach):
        assert torch.equal(network(x), under)
        assert network(x).requires_grad is not detach
    with pytest.raises(ZeroDivisionError), called_with(network, params, detach):
        raise ZeroDivisionError
    assert torch.equal(network(x), expected)
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.gpu
def test_losses_on_a_gpu_equal_those_on_the_cpu():
    actor, qvalue, batch = small_actor(), small_qvalue(), make_batch(16)
    loss = make_loss(copy.deepcopy(actor), copy.deepcopy(qvalue))
    on_gpu = make_loss(actor.to("cuda"), qvalue.to("cuda"))
    draws = loss.draw(batch)
    output = on_gpu(batch.to("cuda"), draws=draws.to("cuda"))
    torch.testing.assert_close(output.cpu(), loss(batch, draws=draws), rtol=1e-4, atol=1e-5)
    assert on_gpu.draw(batch.to("cuda")).device.type == "cuda"


@pytest.mark.gpu
def test_a_compiled_critic_loss_and_its_draws_wait_for_nothing_on_a_gpu():
    loss = make_loss(small_actor(device="cuda"), small_qvalue(device="cuda"))
    batch = make_batch(16).to("cuda")
    draws, part = loss.draw(batch), compiled(lambda td, d: loss.qvalue_loss(td, draws=d)[0])
    part(batch, draws)
    with no_wait():
        part(batch, draws)
        loss.draw(batch)

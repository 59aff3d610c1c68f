"""TD3 over subnetworks: literal numbers, TorchRL's TD3Loss, TD3 and its REDQ-style variant in plain torch, updates."""

import copy

import pytest
import torch
from conftest import ACT, OBS, make_batch, small_actor, small_deterministic_actor, small_qvalue, small_qvalue_actor, specs
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from test_objectives import Constant, LinearCritics, constant_batch, draws_of
from test_update import compiler  # noqa: F401
from torch.optim import Adam
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.modules import AdditiveGaussianModule
from torchrl.objectives import SoftUpdate, TD3BCLoss, TD3Loss

from omnet_torchrl import (
    EnsembleMLP,
    OMNetTD3Loss,
    SubnetDeterministicActor,
    SubnetQValueOperator,
    Update,
    make_deterministic_actor,
    make_qvalue,
)

GAMMA, TAU = 0.9, 0.1


def make_loss(actor=None, qvalue=None, **kwargs):
    loss = OMNetTD3Loss(actor or small_deterministic_actor(), qvalue or small_qvalue(), **kwargs)
    if kwargs.get("delay_actor", True):
        SoftUpdate(loss, tau=TAU)
    return loss.make_value_estimator(gamma=GAMMA)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Literal numbers -------------------------------------------------------------------------------------------------------


class ConstantOfTasks(Constant):
    """The same action of each of several subnetworks."""

    num_subnets = 2

    def forward(self, observation, subnet):
        return super().forward(observation)


def tasks_of_one_action():
    return TensorDictModule(ConstantOfTasks(0.5), in_keys=["observation", "subnet"], out_keys=["action"])


def constant_loss(num, actor=None, **kwargs):
    """Q_k(s, a) = k + 1 + (k + 1) a, in the target network 10 (k + 1) + (k + 1) a; the actor's action is 0.5."""
    actor = actor or TensorDictModule(Constant(0.5), in_keys=["observation"], out_keys=["action"])
    values = [1.0, 2.0, 3.0, 4.0][:num]
    options = {"action_spec": Bounded(-1, 1, (1,)), "noise_clip": 0.6, "reduction": "none", **kwargs}
    loss = make_loss(actor, SubnetQValueOperator(LinearCritics(values, values)), **options)
    loss.target_qvalue_network_params["module", "values"].copy_(10 * torch.tensor(values))
    return loss


# Noise of 0.2 times these: -0.8, clipped to -0.6; 0.2; and 0.8, clipped to 0.6, whose action 1.1 is clipped to 1.
NOISE = torch.tensor([[-4.0], [1.0], [4.0]])
EVERYTHING = {"num_trained_subnets": None, "num_target_subnets": None}


@pytest.mark.parametrize(
    ("options", "draws", "target", "qvalue_loss", "td_error", "value_grad", "actor"),
    [
        # Next actions -0.1, (0.7), 1. OMNet: min(30 + 3 a, 40 + 4 a) = 29.7, 33 -> y = 27.73, 2 (terminal), 32.7; Q_1 = 2.
        # The actor: the mean of Q_k(0.5) = mean(1.5, 3, 4.5, 6) = 3.75, slope 2.5.
        (
            {},
            {"critic": [1], "target": [3, 2], "value": [0, 1, 2, 3]},
            [27.73, 2.0, 32.7],
            [25.73**2, 0.0, 30.7**2],
            [25.73**2, 0.0, 30.7**2],
            [0.0, -2 * (25.73 + 30.7), 0.0, 0.0],
            (3.75, 2.5),
        ),
        # REDQ-style: all four are trained on min(20 + 2 a, 30 + 3 a) = 19.8, 22 -> y = 18.82, 2, 22.8.
        (
            {"num_trained_subnets": None},
            {"critic": [0, 1, 2, 3], "target": [1, 2], "value": [0, 1, 2, 3]},
            [18.82, 2.0, 22.8],
            [17.82**2 + 16.82**2 + 15.82**2 + 14.82**2, 1.0 + 0 + 1 + 4, 21.8**2 + 20.8**2 + 19.8**2 + 18.8**2],
            [17.82**2, 4.0, 21.8**2],
            [-2 * (17.82 + 1 + 21.8), -2 * (16.82 + 20.8), -2 * (15.82 - 1 + 19.8), -2 * (14.82 - 2 + 18.8)],
            (3.75, 2.5),
        ),
        # TD3: both are trained on min(10 + a, 20 + 2 a) = 9.9, 11 -> y = 9.91, 2, 12.9; the actor against the first.
        (
            {**EVERYTHING, "value_reduction": "first"},
            {"critic": [0, 1], "target": [0, 1], "value": [0, 1]},
            [9.91, 2.0, 12.9],
            [8.91**2 + 7.91**2, 1.0, 11.9**2 + 10.9**2],
            [8.91**2, 1.0, 11.9**2],
            [-2 * (8.91 + 1 + 11.9), -2 * (7.91 + 10.9)],
            (1.5, 1.0),
        ),
    ],
    ids=["omnet", "redq", "td3"],
)
def test_losses_and_gradients_equal_the_values_worked_out_by_hand(
    options, draws, target, qvalue_loss, td_error, value_grad, actor
):
    loss, batch = constant_loss(len(value_grad), **options), constant_batch()
    draws = draws_of(**draws).set("next_noise", NOISE)
    torch.testing.assert_close(loss.compute_target(batch, draws=draws), torch.tensor(target))
    output = loss(batch, draws=draws)
    torch.testing.assert_close(output["loss_qvalue"], torch.tensor(qvalue_loss))
    torch.testing.assert_close(batch["td_error"], torch.tensor(td_error))
    torch.testing.assert_close(output["loss_actor"], torch.full((3,), -actor[0]))
    (value,) = torch.autograd.grad(output["loss_qvalue"].sum(), [loss.qvalue_network_params["module", "values"]])
    torch.testing.assert_close(value, torch.tensor(value_grad))
    (action,) = torch.autograd.grad(output["loss_actor"].mean(), list(loss.actor_network_params.parameters()))
    torch.testing.assert_close(action, torch.tensor(-actor[1]))


def test_td3_bc_equals_the_values_worked_out_by_hand():
    """Q_0(0.5) = 1.5 for all, so lambda = 2.5 / 1.5; the squared distances of 0.5 to the actions -1, 0 and 0.25."""
    loss, batch = constant_loss(2, **EVERYTHING, value_reduction="first", bc=2.5), constant_batch()
    batch["action"] = torch.tensor([[-1.0], [0.0], [0.25]])
    output = loss(batch, draws=draws_of(critic=[0, 1], target=[0, 1], value=[0, 1]).set("next_noise", NOISE))
    distance = torch.tensor([2.25, 0.25, 0.0625])
    torch.testing.assert_close(output["loss_actor"], -2.5 + distance)
    torch.testing.assert_close(output["bc_loss"], distance.mean())
    # -2.5 / 1.5 * dQ/da + 2 (0.5 - a), where lambda is no function of the action.
    (action,) = torch.autograd.grad(output["loss_actor"].mean(), list(loss.actor_network_params.parameters()))
    torch.testing.assert_close(action, torch.tensor(-2.5 / 1.5 + 2 * (1.5 + 0.5 + 0.25) / 3))


def test_td3_bc_scales_each_tasks_values_by_their_own_mean():
    """Two tasks with a critic each, Q_0 = 1 + a and Q_1 = 2 + 2 a: lambda 1 / 1.5 and 1 / 3, so that both terms are -1."""
    loss = constant_loss(2, actor=tasks_of_one_action(), choose="batch", bc=1.0)
    batch = torch.stack([constant_batch(), constant_batch()]).set("subnet", torch.tensor([[0], [1]]).expand(2, 3))
    _, data = loss.actor_loss(batch, draws=TensorDict())
    torch.testing.assert_close(data["loss_actor_task"], torch.full((2,), -1 + 0.25))
    torch.testing.assert_close(data["bc_loss_task"], torch.full((2,), 0.25))
    output = loss(batch, draws=TensorDict(next_noise=NOISE.expand(2, 3, 1)))
    assert not [name for name in output.keys() if name.endswith("_task")], "whoever sums loss_* counts each once"


def test_n_step_data_is_discounted_by_its_number_of_steps():
    loss = constant_loss(1, policy_noise=0.0)
    batch = constant_batch().set("steps_to_next_obs", torch.tensor([[1.0], [2.0], [3.0]]))
    expected = torch.tensor([1 + 0.9 * 10.5, 2.0, 3 + 0.9**3 * 10.5])
    torch.testing.assert_close(loss.compute_target(batch, draws=draws_of().set("next_noise", NOISE)), expected)


def test_the_smoothing_noise_is_the_only_noise_and_a_draw():
    loss, batch = make_loss(), make_batch(7)
    draws, state = loss.draw(batch), torch.get_rng_state()
    assert {key: tuple(value.shape) for key, value in draws.items()} == {
        "critic": (1,), "target": (2,), "value": (3,), "actor": (), "next_actor": (), "next_noise": (7, ACT),
    }  # fmt: skip
    first, second = (loss.qvalue_loss(batch, draws=draws)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    other = loss.qvalue_loss(batch, draws=draws.clone().set("next_noise", -draws["next_noise"]))[0]
    assert not torch.isclose(other, first)


def test_the_target_actor_has_the_masks_of_the_actor_and_weights_of_its_own():
    loss, batch = make_loss(), make_batch(8)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    with torch.no_grad():
        loss.actor_network.module[0].module[-1].bias.add_(1.0)
    assert torch.equal(loss.compute_target(batch, draws=draws), before)
    for layer in loss.actor_network.module[0].module:
        if hasattr(layer, "masks"):
            layer.masks.logical_not_()
    assert not torch.isclose(loss.compute_target(batch, draws=draws), before).any()
    online = make_loss(small_deterministic_actor(), small_qvalue(), delay_actor=False, delay_qvalue=False)
    before = online.compute_target(batch, draws=draws)
    with torch.no_grad():
        online.actor_network.module[0].module[-1].bias.add_(1.0)
    assert not torch.isclose(online.compute_target(batch, draws=draws), before).any()
    assert [step.targets for step in online.steps()] == [(), ()]


# TorchRL's TD3Loss -------------------------------------------------------------------------------------------------------


def torchrl_loss(actor, qvalues, **kwargs):
    # A list of one network leaves the loss without critic parameters; a single one it draws anew, so they are put back.
    weights = TensorDict.from_modules(*qvalues).data.clone()
    networks = qvalues if len(qvalues) > 1 else qvalues[0]
    options = {"num_qvalue_nets": len(qvalues), "action_spec": specs()[1], "deactivate_vmap": True, **kwargs}
    loss = TD3Loss(actor, networks, **options)
    updater = SoftUpdate(loss, tau=TAU)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        params.data.update_(weights)
    loss.make_value_estimator(gamma=GAMMA)
    return loss, updater


def history(loss, updater, num=5):
    """Losses, priorities and what else there is of several optimiser steps, each on a batch of its own."""
    optim, values = Adam(loss.parameters(), lr=1e-2), []
    for i in range(num):
        batch = make_batch(16, seed=i, done=0.2)
        torch.manual_seed(100 + i)  # TD3Loss takes its noise from the global generator
        output = loss(batch)
        optim.zero_grad()
        (output["loss_actor"] + output["loss_qvalue"]).backward()
        optim.step()
        updater.step()
        values.append(torch.cat([output[key].flatten() for key in sorted(output.keys())] + [batch["td_error"]]).detach())
    return torch.stack(values)


@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
@pytest.mark.usefixtures("_double")
def test_one_dense_subnet_is_td3_with_one_critic_exactly_over_several_steps(loss_function):
    actor, qvalue = small_deterministic_actor(1, 0.0), small_qvalue(1, 0.0)
    plain, updater = torchrl_loss(actor.extract(0), [qvalue.extract(0)], loss_function=loss_function)
    loss = make_loss(actor, qvalue, loss_function=loss_function)
    assert loss.out_keys == plain.out_keys
    assert torch.equal(history(loss, SoftUpdate(loss, tau=TAU)), history(plain, updater))


@pytest.mark.usefixtures("_double")
def test_two_separate_critics_are_td3_over_several_steps():
    actor = small_deterministic_actor(1, 0.0)
    qvalue = make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16))
    plain = [qvalue.extract(k) for k in range(2)]
    expected = history(*torchrl_loss(actor.extract(0), plain, loss_function="l2"))
    loss = make_loss(actor, qvalue, **EVERYTHING, value_reduction="first")
    torch.testing.assert_close(history(loss, SoftUpdate(loss, tau=TAU)), expected)


@pytest.mark.usefixtures("_double")
def test_two_separate_critics_with_bc_are_torchrls_td3_bc():
    actor = small_deterministic_actor(1, 0.0)
    qvalue = make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16))
    critics = [qvalue.extract(k) for k in range(2)]
    plain = TD3BCLoss(actor.extract(0), critics, action_spec=specs()[1], alpha=1.5, deactivate_vmap=True)
    weights = TensorDict.from_modules(*critics).data
    plain.qvalue_network_params.data.update_(weights)
    loss, batch = make_loss(actor, qvalue, **EVERYTHING, value_reduction="first", bc=1.5), make_batch(16)
    expected, data = plain.actor_loss(batch)
    got, own = loss.actor_loss(batch)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(own["bc_loss"], data["bc_loss"])
    grads = (
        torch.autograd.grad(value, list(each.actor_network_params.parameters()))
        for value, each in ((got, loss), (expected, plain))
    )
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


# TD3 with ten critics, in plain torch ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_double")
def test_ten_separate_critics_train_as_a_redq_of_td3_in_plain_torch():
    num, delay, lr, clip = 10, 2, 1e-2, (-1.0, 1.0)
    actor = small_deterministic_actor(1, 0.0)
    qvalue = make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=num, num_cells=(16, 16))
    mu, critics = actor.extract(0)[0].module, [qvalue.extract(k).module for k in range(num)]
    target_mu, target_critics = copy.deepcopy(mu), copy.deepcopy(critics)
    optims = [Adam([p for q in critics for p in q.parameters()], lr=lr), Adam(mu.parameters(), lr=lr)]
    loss = make_loss(actor, qvalue, num_trained_subnets=None)
    update = Update(loss, lr=lr, tau=TAU, policy_update_delay=delay, compile=False)
    for i in range(1, 7):
        batch = make_batch(16, seed=i, done=0.2)
        draws = loss.draw(batch, torch.Generator().manual_seed(i))
        update(batch.clone(), draws=draws)

        state, following = batch["observation"], batch["next"]
        with torch.no_grad():
            noise = (0.2 * draws["next_noise"]).clamp(-0.5, 0.5)
            action = (target_mu(following["observation"]).tanh() + noise).clamp(*clip)
            pair = [target_critics[j](following["observation"], action) for j in draws["target"].tolist()]
            y = following["reward"] + GAMMA * (~following["terminated"]) * torch.minimum(*pair)
        optims[0].zero_grad()
        sum(((q(state, batch["action"]) - y) ** 2).mean() for q in critics).backward()
        optims[0].step()
        moves = list(zip(target_critics, critics, strict=True))
        if i % delay == 0:
            optims[1].zero_grad()
            (-sum(q(state, mu(state).tanh()) for q in critics) / num).mean().backward()
            optims[1].step()
            moves.append((target_mu, mu))
        with torch.no_grad():
            for target, online in moves:
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.lerp_(new, TAU)
    batch, every = make_batch(16), torch.arange(num)
    state, action = batch["observation"], batch["action"]
    for params, networks in ((loss.qvalue_network_params, critics), (loss.target_qvalue_network_params, target_critics)):
        expected = torch.stack([q(state, action).squeeze(-1) for q in networks])
        torch.testing.assert_close(loss.value(batch, action, every, params=params), expected)
    for params, network in ((loss.actor_network_params, mu), (loss.target_actor_network_params, target_mu)):
        action = loss.deterministic_action(batch, torch.tensor(0), params=params)
        torch.testing.assert_close(action, network(state).tanh())


# The update --------------------------------------------------------------------------------------------------------------


def make_update(compile, **kwargs):
    torch.manual_seed(0)
    return Update(make_loss(), lr=1e-2, tau=TAU, compile=compile, **kwargs)


def run(update, count, calls=3):
    """Some calls of ``count`` updates each; what the last one returned."""
    for i in range(calls):
        batch = make_batch(count, 8, seed=i, done=0.3)
        metrics = update(batch, generator=torch.Generator().manual_seed(i))
    return metrics, batch["td_error"]


@pytest.mark.parametrize("options", [{}, {"policy_update_delay": 2}, {"policy_update_delay": 2, "target_update_interval": 2}])
def test_an_update_is_backward_adam_and_target_step_bit_for_bit(options):
    update = make_update(False, **options)
    loss = make_update(False).loss
    optims = [Adam(getattr(loss, f"{name}_network_params").parameters(), lr=1e-2) for name in ("qvalue", "actor")]
    delay, interval = (options.get(name, 1) for name in ("policy_update_delay", "target_update_interval"))
    groups = {name: getattr(loss, f"{name}_network_params") for name in ("qvalue", "actor", "target_qvalue", "target_actor")}
    for i in range(1, 6):
        batch = make_batch(8, seed=i, done=0.3)
        draws = loss.draw(batch, torch.Generator().manual_seed(i))
        metrics = update(batch.clone(), draws=draws)
        made = ["qvalue", "actor"] if i % delay == 0 else ["qvalue"]
        for name, optim in zip(made, optims, strict=False):
            optim.zero_grad()
            value, _ = (loss.qvalue_loss if name == "qvalue" else loss.actor_loss)(batch, draws=draws)
            value.backward()
            optim.step()
            assert torch.equal(metrics[f"loss_{name}"], value)
            moved = [name] if interval == 1 else ["qvalue", "actor"] if i % interval == 0 and name == made[-1] else []
            for each in moved:
                for key, weight in groups[each].items(True, True):
                    if weight.requires_grad:
                        groups[f"target_{each}"].get(key).data.lerp_(weight.data, TAU)
    for name, value in loss.state_dict().items():
        assert torch.equal(update.loss.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{"policy_update_delay": 2}, {"policy_update_delay": 2, "target_update_interval": 3}])
def test_traced_steps_equal_eager_ones_with_several_updates_a_call(options, compiler):  # noqa: F811
    eager, traced = (make_update(compile, **options) for compile in (False, True))
    outputs = run(eager, 4), run(traced, 4)
    for name, value in eager.loss.state_dict().items():
        assert torch.equal(traced.loss.state_dict()[name], value), name
    assert (outputs[0][0] == outputs[1][0]).all()
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert {name: int(step.delayed) for name, step in traced.steps.items() if step.trains} == {"critic": 0, "actor": 1}
    assert "critic: 481 parameters, actor (every 2): " in repr(traced)
    assert ("targets every 3" in repr(traced)) == ("target_update_interval" in options)


def tasks_update(compile, **kwargs):
    """TD3+BC of three tasks with two critics each, and transitions (T, B)."""
    torch.manual_seed(0)
    loss = make_loss(small_deterministic_actor(3), small_qvalue(6), choose="batch", bc=2.5, **kwargs)
    batch = make_batch(3, 8, done=0.2).set("subnet", torch.arange(3)[:, None].expand(3, 8))
    return Update(loss, lr=1e-2, tau=TAU, compile=compile), batch


@pytest.mark.parametrize("task", range(3))
def test_a_tasks_td3_bc_changes_no_weight_outside_its_masks(task):
    update, batch = tasks_update(False)
    before = copy.deepcopy(dict(update.state["params"].items(True, True)))
    update(batch[task : task + 1])
    for key, weight in update.state["params"].items(True, True):
        if key[-1] == "weight" and (*key[:-1], "masks") in update.state["params"].keys(True) and weight.ndim == 2:
            masks = update.state["params"].get((*key[:-1], "masks"))
            each = len(masks) // 3
            changed = weight != before[key]
            assert changed.any(), key
            assert not (changed & ~masks[each * task : each * (task + 1)].any(0)).any(), key


def test_td3_bc_of_tasks_is_compiled_and_logs_each(compiler):  # noqa: F811
    (eager, batch), (traced, _) = tasks_update(False), tasks_update(True)
    draws = eager.loss.draw(batch)
    metrics = [update(batch.clone(), draws=draws) for update in (eager, traced)]
    assert {"bc_loss", "bc_loss_task", "loss_actor_task", "loss_qvalue_task"} <= set(metrics[0].keys())
    for name, value in metrics[0].items():
        assert torch.equal(metrics[1][name], value), name
    for name, value in eager.loss.state_dict().items():  # gradients of several networks are rounded otherwise
        torch.testing.assert_close(traced.loss.state_dict()[name], value, msg=name)
    torch.testing.assert_close(metrics[0]["loss_actor_task"].sum(), metrics[0]["loss_actor"])


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    options = {"policy_update_delay": 2, "target_update_interval": 3}
    eager, compiled = (make_update(compile, **options) for compile in (False, True))
    run(eager, 4), run(compiled, 4)
    for name, value in eager.loss.state_dict().items():
        torch.testing.assert_close(compiled.loss.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_targets_that_are_copies_are_renewed_at_their_interval_and_only_then():
    loss = make_loss()
    update, online = Update(loss, lr=1e-2, tau=1.0, target_update_interval=3, compile=False), loss.qvalue_network_params
    for i in range(1, 7):
        update(make_batch(8, seed=i))
        weights = [(online.get(key), value) for key, value in loss.target_qvalue_network_params.items(True, True)]
        assert all(torch.equal(*pair) for pair in weights) == (i % 3 == 0)
    assert copy.deepcopy(update).target_update_interval == 3
    with pytest.raises(ValueError, match="target_update_interval must be an int of at least 1, got 0"):
        Update(loss, target_update_interval=0)


# Acting ------------------------------------------------------------------------------------------------------------------


def test_the_actor_acts_within_its_bounds_and_a_subnetwork_can_be_taken_out():
    spec = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 0.5]), (ACT,))
    actor = make_deterministic_actor(specs()[0], Composite(action=spec), num_subnets=3, num_cells=(16, 16), sparsity=0.4)
    td = TensorDict(observation=100 * torch.randn(64, OBS), subnet=torch.randint(3, (64,)), batch_size=[64])
    action = actor(td)["action"]
    assert spec.is_in(action)
    for k in range(3):
        alone = actor.extract(k)(td.exclude("subnet", "action"))["action"]
        torch.testing.assert_close(alone[td["subnet"] == k], action[td["subnet"] == k])
    assert actor.make_tensordict_primer().num_subnets == 3
    with pytest.raises(KeyError, match="'subnet', the index of the subnetwork: append SubnetPrimer"):
        actor(td.exclude("subnet"))


def test_exploration_noise_is_torchrls():
    actor = small_deterministic_actor()
    noise = AdditiveGaussianModule(actor.spec, sigma_init=0.1, sigma_end=0.1, annealing_num_steps=1)
    td = TensorDict(observation=torch.zeros(64, OBS), subnet=torch.zeros(64, dtype=torch.int64), batch_size=[64])
    explored = noise(actor(td.clone()))["action"] - actor(td.clone())["action"]
    assert 0.05 < explored.std() < 0.15


# Bad input ---------------------------------------------------------------------------------------------------------------


def test_discrete_actions_are_refused_and_dqn_is_named():
    for make in (
        lambda: make_deterministic_actor(specs()[0], OneHot(3)),
        lambda: SubnetDeterministicActor(small_deterministic_actor().module[0].module, OneHot(3)),
        lambda: make_loss(action_spec=OneHot(3)),
        lambda: make_loss(action_spec=Composite(action=OneHot(3), other=Unbounded((2,)))),
    ):
        with pytest.raises(TypeError, match=r"(?s)must be a Bounded .*OneHot.*OMNetDQNLoss"):
            make()


def test_other_mistakes_are_refused_where_they_enter():
    plain = TensorDictModule(torch.nn.Linear(OBS, ACT), in_keys=["observation"], out_keys=["action"])
    with pytest.raises(ValueError, match="the actor has no spec with the bounds of the action: give action_spec or bounds"):
        make_loss(plain)
    assert make_loss(plain, bounds=(-1.0, 1.0)).num_actor_subnets == 1
    with pytest.raises(ValueError, match="but not both or none"):
        make_loss(plain, bounds=(-1.0, 1.0), action_spec=specs()[1])
    with pytest.raises(TypeError, match=r"OMNetTD3Loss has no argument 'num_qvalue_nets' of TD3Loss: .*EnsembleMLP"):
        make_loss(num_qvalue_nets=2)
    with pytest.raises(ValueError, match=r"num_target_subnets must be in \[1, num_subnets=3\], got 4"):
        make_loss(num_target_subnets=4)
    with pytest.raises(ValueError, match="value_reduction must be one of"):
        make_loss(value_reduction="max")
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bc must be a positive number, or None"):
            make_loss(bc=wrong)
    wide = SubnetDeterministicActor(small_qvalue().module, Bounded(-1, 1, (1,)), in_keys=["observation", "action", "subnet"])
    wide.spec["action"] = specs()[1]
    td = TensorDict(observation=torch.zeros(4, OBS), action=torch.zeros(4, ACT), subnet=torch.tensor(0))
    with pytest.raises(ValueError, match="must have action_dim=2 outputs, got 1"):
        wide(td)


def test_every_actor_is_called_with_tensors():
    observation, subnet = torch.randn(7, OBS), torch.tensor(1)
    for make in (small_actor, small_deterministic_actor, small_qvalue_actor):
        actor = make()
        batch = actor(TensorDict(observation=observation, subnet=subnet.expand(7), batch_size=[7]))
        output = actor(observation=observation, subnet=subnet)
        assert len(output) == len(actor.out_keys)
        for key, value in zip(actor.out_keys, output, strict=True):
            if make is not small_actor:  # whose actions are drawn
                torch.testing.assert_close(value, batch[key])


@pytest.mark.parametrize("batch_size", [[], [3], [3, 2]])
def test_the_mean_of_all_values_is_of_whatever_is_there(batch_size):
    actor = small_qvalue_actor()
    observation = torch.randn(3, 2, OBS)
    policy = actor.mean_policy()
    found = policy(TensorDict(observation=observation, batch_size=batch_size))["action_value"]
    every = [actor.extract(k)(TensorDict(observation=observation))["action_value"] for k in range(actor.num_subnets)]
    torch.testing.assert_close(found, torch.stack(every).mean(0))
    assert policy(observation=observation[0])[0].shape == actor.extract(0)(observation=observation[0])[0].shape

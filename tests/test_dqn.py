"""DQN over subnetworks: literal numbers, TorchRL's DQNLoss, Bootstrapped DQN in plain torch, updates, policies."""

import copy

import pytest
import torch
from conftest import OBS, make_batch, small_qvalue, small_qvalue_actor, specs
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from test_objectives import draws_of
from test_update import compiler  # noqa: F401
from torch import nn
from torch.optim import Adam
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiOneHot, OneHot
from torchrl.modules import EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, HardUpdate, SoftUpdate

from omnet_torchrl import EnsembleMLP, OMNetDQNLoss, RedrawnMLP, SubnetQValueActor, Update, make_qvalue_actor

GAMMA, TAU, ACTIONS = 0.9, 0.1, 3
SPACES = {"one-hot": OneHot(ACTIONS), "categorical": Categorical(ACTIONS)}
each_space = pytest.mark.parametrize("space", SPACES)


def make_loss(network=None, **kwargs):
    loss = OMNetDQNLoss(network or small_qvalue_actor(), **kwargs)
    SoftUpdate(loss, tau=TAU)
    return loss.make_value_estimator(gamma=GAMMA)


def discrete(batch, seed=0, space="one-hot"):
    """The batch with discrete actions."""
    index = torch.randint(ACTIONS, batch.batch_size, generator=torch.Generator().manual_seed(seed))
    return batch.set("action", index if space == "categorical" else nn.functional.one_hot(index, ACTIONS).bool())


def dqn_batch(*batch, seed=0, done=0.3, space="one-hot"):
    return discrete(make_batch(*batch, seed=seed, done=done), seed, space)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Literal numbers -------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """The action values of each subnetwork, whatever the observation."""

    def __init__(self, values):
        super().__init__()
        self.num_subnets, self.values = len(values), nn.Parameter(torch.tensor(values, dtype=torch.float32))

    def forward(self, observation, subnet):
        return self.values[subnet].expand(*torch.broadcast_shapes(subnet.shape, observation.shape[:-1]), -1)


ONLINE = [[1.0, 2.0, 3.0], [4.0, 1.0, 0.0], [0.0, 5.0, 2.0]]
TARGET = [[10.0, 20.0, 30.0], [20.0, 10.0, 40.0], [15.0, 25.0, 5.0]]


def table_loss(space="one-hot", **kwargs):
    loss = make_loss(SubnetQValueActor(Table(ONLINE), SPACES[space]), reduction="none", **kwargs)
    loss.target_value_network_params["module", "0", "module", "values"].copy_(torch.tensor(TARGET))
    return loss


def table_batch(space="one-hot"):
    # The first goes on, the second terminates, the third is cut by a time limit; their actions are 0, 1, 2.
    index = torch.arange(3)
    following = {
        "observation": torch.zeros(3, OBS),
        "reward": torch.tensor([[1.0], [2.0], [3.0]]),
        "done": torch.tensor([[False], [True], [True]]),
        "terminated": torch.tensor([[False], [True], [False]]),
    }
    action = index if space == "categorical" else torch.eye(3, dtype=torch.bool)
    return TensorDict({"observation": torch.zeros(3, OBS), "action": action, "next": following}, [3])


# Trained 1 (whose best action is 0, and whose values of the batch's actions are 4, 1, 0), target 0 and 2.
ONE = {"critic": [1], "target": [0, 2]}
# Trained are all, whose best actions are 2, 0, 1; values of the batch's actions 1, 2, 3; 4, 1, 0; and 0, 5, 2.
ALL = {"critic": [0, 1, 2], "target": [0, 2]}


@each_space
@pytest.mark.parametrize(
    ("options", "draws", "target"),
    [
        # The minimum of targets 0 and 2 is 10, 20, 5: 10 at action 0.
        ({}, ONE, [[10.0, 2.0, 12.0]]),
        # Maxmin: its largest is 20.
        ({"double_dqn": False}, ONE, [[19.0, 2.0, 21.0]]),
        # Averaged: the mean is 12.5, 22.5, 17.5, its largest 22.5.
        ({"double_dqn": False, "target_reduction": "mean"}, ONE, [[21.25, 2.0, 23.25]]),
        # Bootstrapped: the largest of target 1 is 40.
        ({"double_dqn": False, "target_reduction": "subnet"}, ONE, [[37.0, 2.0, 39.0]]),
        # The minimum at the best action of each: 5, 10, 20.
        ({}, ALL, [[5.5, 2.0, 7.5], [10.0, 2.0, 12.0], [19.0, 2.0, 21.0]]),
        # The largest of each target: 30, 40, 25.
        ({"double_dqn": False, "target_reduction": "subnet"}, ALL, [[28.0, 2.0, 30.0], [37.0, 2.0, 39.0], [23.5, 2.0, 25.5]]),
        # Each target at the best action of the same subnetwork: 30, 20, 25.
        ({"target_reduction": "subnet"}, ALL, [[28.0, 2.0, 30.0], [19.0, 2.0, 21.0], [23.5, 2.0, 25.5]]),
        # One target for all: the largest minimum.
        ({"double_dqn": False}, ALL, [[19.0, 2.0, 21.0]]),
    ],
)
def test_losses_and_gradients_equal_the_values_worked_out_by_hand(options, draws, target, space):
    loss, batch, draws = table_loss(space, num_trained_subnets=None, **options), table_batch(space), draws_of(**draws)
    target = torch.tensor(target)
    torch.testing.assert_close(loss.compute_target(batch, draws=draws).expand_as(target), target)
    errors = torch.tensor(ONLINE)[draws["critic"]] - target
    output = loss(batch, draws=draws)
    torch.testing.assert_close(output["loss"], (errors**2).sum(0))
    torch.testing.assert_close(batch["td_error"], (errors**2).amax(0))
    (gradient,) = torch.autograd.grad(output["loss"].sum(), list(loss.value_network_params.parameters()))
    torch.testing.assert_close(gradient, torch.zeros(3, 3).index_copy(0, draws["critic"], 2 * errors))


def test_the_numbers_of_one_row_written_out():
    loss, batch = table_loss(), table_batch()
    assert loss(batch, draws=draws_of(**ONE))["loss"].tolist() == [36.0, 1.0, 144.0]
    assert batch["td_error"].tolist() == [36.0, 1.0, 144.0]


def test_n_step_data_is_discounted_by_its_number_of_steps():
    loss, batch = table_loss(), table_batch().set("steps_to_next_obs", torch.tensor([[1.0], [2.0], [3.0]]))
    target = loss.compute_target(batch, draws=draws_of(**ONE))
    torch.testing.assert_close(target, torch.tensor([1 + 0.9 * 10, 2.0, 3 + 0.9**3 * 10]))
    several = loss.compute_target(batch, draws=draws_of(**ALL))
    torch.testing.assert_close(several[2], torch.tensor([1 + 0.9 * 20, 2.0, 3 + 0.9**3 * 20]))


def test_the_l1_norm_of_the_hidden_layers_is_added():
    network = small_qvalue_actor()
    batch, weights = dqn_batch(8), [each for each in network.parameters() if each.ndim > 1]
    plain, with_norm = (make_loss(copy.deepcopy(network), l1=each) for each in (0.0, 0.5))
    draws = plain.draw(batch)
    expected = plain.qvalue_loss(batch, draws=draws)[0] + 0.5 * sum(each.abs().sum() for each in weights[:-1])
    torch.testing.assert_close(with_norm.qvalue_loss(batch, draws=draws)[0], expected)
    update = Update(with_norm, lr=1e-3, compile=False)
    before = expected.item() - plain.qvalue_loss(batch, draws=draws)[0].item()
    for _ in range(30):
        update(batch)
    with_norm.l1, (loss, _) = 0, with_norm.qvalue_loss(batch, draws=draws)
    assert (loss - with_norm.qvalue_loss(batch, draws=draws)[0]).item() < 0.9 * before


def test_a_mask_of_each_transition_weighs_the_loss_of_each_subnetwork():
    loss, batch = table_loss(num_trained_subnets=None), table_batch()
    every = loss(batch, draws=draws_of(**ALL))["loss"].detach()
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    batch["bootstrap_mask"] = mask
    # 5.5 - 1, 10 - 4 and 19 - 0 of the first transition: only the first of them counts.
    torch.testing.assert_close(loss(batch, draws=draws_of(**ALL))["loss"], torch.tensor([4.5**2, 0.0, every[2]]))
    assert torch.equal(loss(batch, draws=draws_of(**ONE))["loss"], torch.tensor([0.0, 0.0, 144.0]))
    per_element = draws_of(**ONE).set("critic", torch.tensor([[0, 2, 1]]))
    torch.testing.assert_close(loss(batch, draws=per_element)["loss"], torch.tensor([4.5**2, 0.0, 144.0]))
    loss.set_keys(bootstrap_mask="m")
    assert loss.optional_in_keys[-1] == "m"
    assert torch.equal(loss(batch, draws=draws_of(**ALL))["loss"], every)


def test_an_update_draws_indices_alone_and_one_network_draws_nothing():
    draws = make_loss(num_target_subnets=2).draw(dqn_batch(4))
    assert {key: value.shape for key, value in draws.items()} == {"critic": (1,), "target": (2,)}
    single, batch = make_loss(small_qvalue_actor(1, 0.0)), dqn_batch(4)
    state = torch.get_rng_state()
    single.draw(batch)
    assert torch.equal(torch.get_rng_state(), state)


# TorchRL's DQNLoss -------------------------------------------------------------------------------------------------------


def history(loss, updater, space, num=5):
    """Losses and priorities of several optimiser steps, each on a batch of its own."""
    optim, values = Adam(loss.parameters(), lr=1e-2), []
    for i in range(num):
        batch = dqn_batch(16, seed=i, space=space)
        output = loss(batch)
        optim.zero_grad()
        output["loss"].backward()
        optim.step()
        updater.step()
        values.append(torch.cat([output["loss"].detach().reshape(1), batch["td_error"].flatten()]))
    return torch.stack(values)


@each_space
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
@pytest.mark.usefixtures("_double")
def test_one_dense_subnet_is_dqn_exactly_over_several_steps(space, double, loss_function):
    actor, options = small_qvalue_actor(1, 0.0, SPACES[space]), {"double_dqn": double, "loss_function": loss_function}
    plain = DQNLoss(actor.extract(0), **options)
    plain.make_value_estimator(gamma=GAMMA)
    expected = history(plain, SoftUpdate(plain, tau=TAU), space)
    loss = make_loss(actor, **options)
    assert loss.out_keys == plain.out_keys == ["loss"]
    assert torch.equal(history(loss, SoftUpdate(loss, tau=TAU), space), expected)


def test_a_plain_network_of_torchrl_is_one_subnetwork():
    actor, batch = small_qvalue_actor(1, 0.0), dqn_batch(8)
    plain, own = make_loss(actor.extract(0)), make_loss(actor)
    assert (plain.num_subnets, plain.num_target_subnets, plain.in_keys) == (1, 1, own.in_keys)
    assert torch.equal(plain(batch)["loss"], own(batch)["loss"])


# Bootstrapped DQN in plain torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.usefixtures("_double")
def test_ten_networks_train_as_a_bootstrapped_dqn_in_plain_torch(double):
    num, lr, interval = 10, 1e-2, 2
    networks = {"network_class": EnsembleMLP, "num_subnets": num, "num_cells": (16, 16)}
    actor = make_qvalue_actor(specs()[0], OneHot(ACTIONS), **networks)
    heads = [actor.extract(k).module[0].module for k in range(num)]
    targets, optim = copy.deepcopy(heads), Adam([p for q in heads for p in q.parameters()], lr=lr)
    loss = make_loss(actor, num_trained_subnets=None, target_reduction="subnet", double_dqn=double)
    update = Update(loss, lr=lr, tau=1.0, target_update_interval=interval, compile=False)
    for i in range(1, 7):
        batch = dqn_batch(16, seed=i)
        batch["bootstrap_mask"] = torch.rand(16, num, generator=torch.Generator().manual_seed(i)) < 0.5
        update(batch.clone())
        following, total = batch["next"], 0
        for k, (head, target) in enumerate(zip(heads, targets, strict=True)):
            with torch.no_grad():
                best = (head if double else target)(following["observation"]).argmax(-1, keepdim=True)
                value = target(following["observation"]).gather(-1, best)
                y = following["reward"] + GAMMA * (~following["terminated"]) * value
            chosen = head(batch["observation"]).gather(-1, batch["action"].int().argmax(-1, keepdim=True))
            total = total + (batch["bootstrap_mask"][:, k] * ((chosen - y) ** 2).squeeze(-1)).mean()
        optim.zero_grad()
        total.backward()
        optim.step()
        if i % interval == 0:
            for head, target in zip(heads, targets, strict=True):
                target.load_state_dict(head.state_dict())
    batch = dqn_batch(16)
    for params, plain in ((loss.value_network_params, heads), (loss.target_value_network_params, targets)):
        expected = torch.stack([q(batch["observation"]) for q in plain])
        torch.testing.assert_close(loss.value(batch, None, torch.arange(num), params=params), expected)


# The update --------------------------------------------------------------------------------------------------------------


def make_update(compile, space="one-hot", **kwargs):
    torch.manual_seed(0)
    loss = make_loss(small_qvalue_actor(spec=SPACES[space]), **kwargs)
    return Update(loss, lr=1e-2, tau=1.0, target_update_interval=3, compile=compile)


def run(update, space="one-hot"):
    """Three calls of four updates each; what the last one returned."""
    for i in range(3):
        batch = dqn_batch(4, 8, seed=i, space=space)
        batch["bootstrap_mask"] = torch.rand(4, 8, 3, generator=torch.Generator().manual_seed(i)) < 0.5
        metrics = update(batch, generator=torch.Generator().manual_seed(i))
    return metrics, batch["td_error"]


@each_space
@pytest.mark.parametrize("options", [{}, {"num_trained_subnets": None, "target_reduction": "subnet", "double_dqn": False}])
def test_traced_updates_equal_eager_ones(space, options, compiler):  # noqa: F811
    eager, traced = (make_update(compile, space, **options) for compile in (False, True))
    outputs = run(eager, space), run(traced, space)
    assert (outputs[0][0] == outputs[1][0]).all()
    assert sorted(outputs[0][0].keys()) == ["loss", "qvalue", "td_error"]
    assert torch.equal(outputs[0][1], outputs[1][1])
    for name, value in eager.loss.state_dict().items():
        assert torch.equal(traced.loss.state_dict()[name], value), name


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones():
    eager, compiled = (make_update(compile) for compile in (False, True))
    run(eager), run(compiled)
    for name, value in eager.loss.state_dict().items():
        torch.testing.assert_close(compiled.loss.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_hard_update_of_torchrl_copies_the_network():
    loss = OMNetDQNLoss(small_qvalue_actor())
    updater = HardUpdate(loss, value_network_update_interval=2)
    with torch.no_grad():
        loss.value_network.module[0].module[-1].bias.add_(1.0)
    batch, every = dqn_batch(4), torch.arange(3)
    online, target = loss.value_network_params, loss.target_value_network_params
    for equal in (False, False, True):  # TorchRL counts so
        updater.step()
        values = [loss.value(batch, None, every, params=params) for params in (online, target)]
        assert torch.equal(*values) == equal


def test_it_learns_the_values_of_a_bandit():
    # A probe: every step is terminal, and the reward is the number of the action.
    loss, batch = make_loss(), dqn_batch(64, done=1.0)
    batch["next", "reward"] = batch["action"].int().argmax(-1, keepdim=True).float()
    update = Update(loss, lr=1e-2, compile=False)
    for _ in range(150):
        update(batch)
    values = loss.value(batch, None, torch.arange(3))
    assert ((values - torch.arange(3.0)).abs().mean((0, 1)) < 0.15).all()
    acting = TensorDict(observation=batch["observation"], subnet=torch.arange(64) % 3, batch_size=[64])
    assert (loss.value_network(acting)["action"].int().argmax(-1) == 2).float().mean() > 0.95


# Policies ----------------------------------------------------------------------------------------------------------------


@each_space
def test_each_environment_plays_the_best_action_of_its_subnetwork(space):
    actor = small_qvalue_actor(spec=SPACES[space])
    td = TensorDict(observation=torch.randn(64, OBS), subnet=torch.arange(64) % 3, batch_size=[64])
    played = actor(td.clone())
    for k in range(3):
        alone, rows = actor.extract(k)(td.exclude("subnet")), td["subnet"] == k
        assert torch.equal(played["action"][rows], alone["action"][rows])
        torch.testing.assert_close(played["action_value"][rows], alone["action_value"][rows])
    assert actor.spec["action"].is_in(played["action"].to(actor.spec["action"].dtype))
    torch.testing.assert_close(played["chosen_action_value"].squeeze(-1), played["action_value"].amax(-1))
    assert actor.make_tensordict_primer().num_subnets == 3
    with pytest.raises(KeyError, match="'subnet', the index of the subnetwork: append SubnetPrimer"):
        actor(td.exclude("subnet"))


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_the_policy_of_the_mean_is_greedy_on_the_mean_and_follows_the_weights(batch):
    actor = small_qvalue_actor()
    policy, td = actor.mean_policy(), TensorDict(observation=torch.randn(*batch, OBS), batch_size=batch)
    assert policy.in_keys == ["observation"]
    for _ in range(2):
        mean = sum(actor.extract(k)(td.clone())["action_value"] for k in range(3)) / 3
        played = policy(td.clone())
        torch.testing.assert_close(played["action_value"], mean)
        assert torch.equal(played["action"].int().argmax(-1), mean.argmax(-1))
        actor.module[0].module[-1].weight.data.neg_()


def test_a_mean_of_too_many_subnetworks_is_refused():
    actor = make_qvalue_actor(specs()[0], OneHot(ACTIONS), network_class=RedrawnMLP, num_cells=(16, 16))
    with pytest.raises(ValueError, match="the mean is of at most 1024 subnetworks, got 2147483648"):
        actor.mean_policy()


@each_space
def test_epsilon_greedy_is_torchrls(space):
    actor = small_qvalue_actor(spec=SPACES[space])
    explore = EGreedyModule(actor.spec, eps_init=1.0, eps_end=0.5, annealing_num_steps=10)
    policy = TensorDictSequential(actor, explore)
    td = TensorDict(observation=torch.zeros(300, OBS), subnet=torch.zeros(300, dtype=torch.int64), batch_size=[300])
    action = policy(td.clone())["action"]
    index = action if space == "categorical" else action.int().argmax(-1)
    assert (index.bincount(minlength=ACTIONS) > 60).all()
    explore.step(100)
    assert explore.eps == 0.5


# Bad input ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Bounded(-1, 1, (2,)), MultiOneHot([2, 2]), Binary(3)])
def test_actions_that_are_not_discrete_are_refused_and_losses_of_continuous_ones_are_named(spec):
    for make in (
        lambda: make_qvalue_actor(specs()[0], spec),
        lambda: SubnetQValueActor(small_qvalue().module, spec),
        lambda: make_loss(action_space=spec),
        lambda: make_loss(action_space=Composite(action=spec)),
    ):
        with pytest.raises(TypeError, match=r"(?s)must be a OneHot or a Categorical, got .*OMNetSACLoss and OMNetTD3Loss"):
            make()
    with pytest.raises(TypeError, match="must be one-hot or categorical, got the action space 'mult_one_hot'"):
        make_loss(action_space="mult-one-hot")


def test_other_mistakes_are_refused_where_they_enter():
    with pytest.raises(ValueError, match="target_reduction must be one of 'min', 'mean', 'subnet', got 'max'"):
        make_loss(target_reduction="max")
    with pytest.raises(TypeError, match=r"OMNetDQNLoss has no argument 'gamma' of DQNLoss: call loss.make_value_estimator"):
        make_loss(gamma=0.9)
    with pytest.raises(ValueError, match="double_dqn=True requires delay_value=True"):
        make_loss(delay_value=False)
    with pytest.raises(TypeError, match="value_network must be one module"):
        make_loss([small_qvalue_actor()])
    silent = QValueActor(small_qvalue_actor().module[0].module, spec=OneHot(ACTIONS), in_keys=["observation"])
    with pytest.raises(ValueError, match=r"reads \['observation'\] and no 'subnet'.*set_keys"):
        make_loss(silent)(dqn_batch(4))

"""What TD3 and DQN over subnetworks promise alike: laws, TorchRL's loss protocol, compilation."""

import copy

import pytest
import torch
from conftest import OBS, make_batch, small_deterministic_actor, small_qvalue, small_qvalue_actor
from tensordict import TensorDict
from test_dqn import discrete
from test_update import compiler  # noqa: F401
from torchrl.data.postprocs import MultiStep
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from omnet_torchrl import OMNetDQNLoss, OMNetTD3Loss, Update
from omnet_torchrl.metrics import subnet_disagreement

TD3, DQN = "td3", "dqn"
both = pytest.mark.parametrize("kind", [TD3, DQN])


def make_loss(kind, updater=True, **kwargs):
    dropout = {"dropout": kwargs.pop("dropout")} if "dropout" in kwargs else {}
    if kind == TD3:
        loss = OMNetTD3Loss(small_deterministic_actor(**dropout), small_qvalue(**dropout), **kwargs)
    else:
        loss = OMNetDQNLoss(small_qvalue_actor(**dropout), **kwargs)
    if updater:
        SoftUpdate(loss, tau=0.1)
    return loss.make_value_estimator(gamma=0.9)


def batch_of(kind, *batch, seed=0, done=0.3):
    made = make_batch(*batch, seed=seed, done=done)
    return made if kind == TD3 else discrete(made, seed)


def names(loss):
    return [key for key in loss.out_keys if key.startswith("loss")]


def total(loss, output):
    return sum(output[name] for name in names(loss))


def is_zero(grad):
    return grad is None or not grad.any()


# Laws ------------------------------------------------------------------------------------------------------------------


@both
def test_gradient_is_zero_outside_the_drawn_mask_and_only_there(kind):
    loss, batch = make_loss(kind), batch_of(kind, 64)
    draws = loss.draw(batch)
    draws["critic"] = torch.tensor([1])
    if kind == TD3:
        draws["actor"] = torch.tensor(2)
    total(loss, loss(batch, draws=draws)).backward()
    critic = loss.qvalue_network.module if kind == TD3 else loss.value_network.module[0].module
    networks = [(critic, 1), *([(loss.actor_network.module[0].module, 2)] if kind == TD3 else [])]
    for network, drawn in networks:
        for layer in (network[0], network[3], network[6]):
            mask = layer.masks[drawn]
            assert not layer.weight.grad[~mask].any()
            assert layer.weight.grad[mask].any()


@both
def test_each_loss_reaches_its_own_parameters_and_no_other(kind):
    loss, batch = make_loss(kind), batch_of(kind, 16)
    output = loss(batch)
    own = {"loss_qvalue": "qvalue_network_params", "loss_actor": "actor_network_params", "loss": "value_network_params"}
    for key in names(loss):
        loss.zero_grad()
        output[key].backward(retain_graph=True)
        mine = {id(p) for p in getattr(loss, own[key]).parameters()}
        assert {id(p) for p in loss.parameters() if not is_zero(p.grad)} == mine
    targets = [params for name, params in loss.parameter_groups().items() if name.startswith("target_")]
    assert len(targets) == (2 if kind == TD3 else 1)
    assert not any(p.requires_grad for params in targets for p in params.values(True, True))


@both
def test_the_batch_gets_the_priority_alone_and_its_index_is_ignored(kind):
    loss, batch = make_loss(kind), batch_of(kind, 8)
    draws, expected = loss.draw(batch), loss(batch.clone(), draws=loss.draw(batch, torch.Generator().manual_seed(0)))
    draws = loss.draw(batch, torch.Generator().manual_seed(0))
    batch["subnet"] = batch["next", "subnet"] = torch.full((8,), 99)
    before = batch.clone()
    assert (loss(batch, draws=draws) == expected).all()
    assert (batch.exclude("td_error") == before).all()
    assert batch["td_error"].shape == (8,)


@both
def test_masks_are_live_and_survive_copies_moves_resets_and_target_updates(kind):
    loss, batch = make_loss(kind), batch_of(kind, 8, done=0.0)
    masks = {name: buffer.clone() for name, buffer in loss.named_buffers() if "masks" in name}
    assert len(masks) == (12 if kind == TD3 else 6)  # three layers of each network and of its target

    def held(module):
        return all(torch.equal(buffer, masks[name]) for name, buffer in module.named_buffers() if "masks" in name)

    other = make_loss(kind)
    assert held(copy.deepcopy(loss))
    other.load_state_dict(loss.state_dict())
    assert held(other)
    assert held(loss.to(torch.float64).to(torch.float32))
    loss.reset_parameters_recursive()
    SoftUpdate(loss, tau=0.5).step()
    HardUpdate(loss, value_network_update_interval=1).step()
    assert held(loss)
    draws = loss.draw(batch)
    before = loss.compute_target(batch, draws=draws)
    online = loss.qvalue_network_params if kind == TD3 else loss.value_network_params
    for key, value in online.items(True, True):
        if key[-1] == "masks":
            value.logical_not_()
    assert not torch.isclose(loss.compute_target(batch, draws=draws), before).any()


@both
def test_indices_per_element_choose_per_element(kind):
    loss, batch = make_loss(kind, reduction="none"), batch_of(kind, 6)
    task, draws = torch.tensor([0, 1, 2, 0, 1, 2]), loss.draw(batch)
    for name in draws.keys():
        if name in ("critic", "target", "value"):
            draws[name] = task[None]
        elif "actor" in name:
            draws[name] = task
    output = loss(batch, draws=draws)
    for k in range(3):
        alone = draws.apply(lambda value, k=k: torch.full_like(value[..., 0], k) if value.dtype == torch.int64 else value)
        expected = loss(batch, draws=alone)
        for name in names(loss):
            torch.testing.assert_close(output[name][task == k], expected[name][task == k])


@both
def test_given_parameters_are_used_and_own_ones_are_not(kind):
    loss, batch, other = make_loss(kind), batch_of(kind, 8), make_loss(kind)
    draws = loss.draw(batch)
    params = TensorDict({name: TensorDict(group.data.to_dict()) for name, group in other.parameter_groups().items()})
    expected = other(batch, draws=draws)
    assert loss.qvalue_loss(batch, draws=draws, params=params)[0] == expected[names(loss)[-1]]
    if kind == TD3:
        assert loss.actor_loss(batch, draws=draws, params=params)[0] == expected["loss_actor"]


# TorchRL's loss protocol -----------------------------------------------------------------------------------------------


@both
def test_unknown_keys_are_refused_and_known_ones_are_set(kind):
    loss = make_loss(kind)
    defaults = {key: key for key in ("action", "reward", "done", "terminated", "subnet", "priority_weight")}
    defaults |= {"priority": "td_error"}
    defaults |= {"state_action_value": "state_action_value"} if kind == TD3 else {"action_value": "action_value"}
    with pytest.raises(ValueError, match="unknown_key is not an accepted"):
        loss.set_keys(unknown_key="test2")
    for key, value in defaults.items():
        assert getattr(loss.tensor_keys, key) == value
        loss.set_keys(**{key: "test1"})
        assert getattr(loss.tensor_keys, key) == "test1"
        loss.set_keys(**{key: None})
        assert getattr(loss.tensor_keys, key) == value


@both
@pytest.mark.parametrize("td_est", list(ValueEstimators))
@pytest.mark.parametrize("trained", [1, None])
def test_supported_value_estimators_run_and_others_are_refused(kind, td_est, trained):
    loss, batch = make_loss(kind, num_trained_subnets=trained), batch_of(kind, 4, 6)
    batch.names = [None, "time"]
    if td_est not in (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda):
        with pytest.raises(NotImplementedError):
            loss.make_value_estimator(td_est)
        return
    assert loss.make_value_estimator(td_est) is loss
    assert loss(batch).isfinite().all()
    assert batch["td_error"].shape == batch.shape


def test_targets_along_time_are_those_of_each_trained_subnetwork_alone():
    # TD(lambda) looks ahead in time, which must not be mistaken for the dimension of the subnetworks.
    loss, batch = make_loss(DQN, num_trained_subnets=None, target_reduction="subnet"), batch_of(DQN, 4, 6)
    batch.names = [None, "time"]
    loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.9)
    draws = loss.draw(batch)
    together = loss.compute_target(batch, draws=draws)
    for k in range(3):
        alone = loss.compute_target(batch, draws=draws.clone().set("critic", torch.tensor([k])))
        torch.testing.assert_close(together[k], alone)


@both
def test_in_keys_are_ordered_and_hold_no_index(kind):
    ends = [("next", "reward"), ("next", "done"), ("next", "terminated")]
    assert make_loss(kind).in_keys == ["action", *ends, ("next", "observation"), "observation"]


@both
@pytest.mark.parametrize("nested", [False, True])
def test_it_can_be_called_without_tensordicts_and_with_other_keys(kind, nested):
    loss, batch = make_loss(kind), batch_of(kind, 8)
    if nested:
        loss.set_keys(reward=("metrics", "reward"), priority=("replay", "error"))
        batch.rename_key_(("next", "reward"), ("next", "metrics", "reward"))
        assert loss(batch).isfinite().all()
        assert batch["replay", "error"].shape == (8,)
        return
    kwargs = {"action": batch["action"], "observation": batch["observation"]}
    kwargs |= {f"next_{key}": batch["next", key] for key in ("observation", "reward", "done", "terminated")}
    torch.manual_seed(1)
    values = loss(**kwargs)
    torch.manual_seed(1)
    expected = [value for key, value in loss(batch).items() if key in loss.out_keys]
    assert all(any(torch.equal(value, other) for other in expected) for value in (values if kind == TD3 else [values]))


@both
def test_nested_keys_work(kind):
    keys = {"observation_key": ("agent", "observation"), "action_key": ("agent", "action"), "subnet_key": ("agent", "subnet")}
    if kind == TD3:
        loss = OMNetTD3Loss(small_deterministic_actor(**keys), small_qvalue(**keys))
    else:
        loss = OMNetDQNLoss(small_qvalue_actor(**keys))
    SoftUpdate(loss, tau=0.1)
    loss.set_keys(subnet=("agent", "subnet"), action=("agent", "action"))
    batch, plain = batch_of(kind, 8), make_loss(kind).make_value_estimator()
    plain.load_state_dict({name.replace("agent_", ""): value for name, value in loss.state_dict().items()})
    expected = plain(batch.clone(), draws=plain.draw(batch, torch.Generator().manual_seed(0)))
    for key in ("observation", ("next", "observation"), "action"):
        nested = ("agent", key) if isinstance(key, str) else ("next", "agent", "observation")
        batch.rename_key_(key, nested)
    assert loss.in_keys[0] == ("agent", "action")
    assert (loss(batch, draws=loss.draw(batch, torch.Generator().manual_seed(0))) == expected).all()


@both
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("batch_size", [(8,), (4, 3)])
def test_reductions(kind, reduction, batch_size):
    loss, none = make_loss(kind, reduction=reduction), make_loss(kind, reduction="none")
    none.load_state_dict(loss.state_dict())
    batch = batch_of(kind, *batch_size)
    draws = loss.draw(batch)
    output, each = loss(batch, draws=draws), none(batch, draws=draws)
    for key in names(loss):
        assert each[key].shape == batch_size
        expected = each[key] if reduction == "none" else getattr(each[key], reduction)()
        torch.testing.assert_close(output[key], expected)


def first(draws):
    return TensorDict({key: value[:1] if "noise" in key else value for key, value in draws.items()})


@both
@pytest.mark.parametrize("key", ["priority_weight", ("collector", "mask")])
def test_priority_weights_and_masked_positions_weigh_the_losses(kind, key):
    loss, batch = make_loss(kind), batch_of(kind, 8)
    draws = loss.draw(batch)
    expected = loss(batch[:1].clone(), draws=first(draws))
    batch[key] = torch.arange(8) == 0 if key == ("collector", "mask") else (torch.arange(8) == 0).float()
    weighted = loss(batch, draws=draws)
    for name in names(loss):
        torch.testing.assert_close(weighted[name], expected[name])
    unweighted = make_loss(kind, use_prioritized_weights=False)
    unweighted.load_state_dict(loss.state_dict())
    name = names(loss)[-1]
    assert torch.isclose(unweighted(batch, draws=draws)[name], weighted[name]) == (key != "priority_weight")


@both
def test_state_dict_round_trip_repeats_the_losses(kind):
    loss, batch = make_loss(kind), batch_of(kind, 8)
    draws = loss.draw(batch)
    with torch.no_grad():
        for p in loss.parameters():
            p.add_(0.1 * torch.randn_like(p))
    expected, other = loss(batch, draws=draws), make_loss(kind)
    other.load_state_dict(loss.state_dict())
    assert (other(batch, draws=draws) == expected).all()
    assert (copy.deepcopy(loss)(batch, draws=draws) == expected).all()


@both
def test_reset_draws_every_parameter_anew_and_targets_start_as_the_networks(kind):
    loss = make_loss(kind)
    before = {name: params.clone() for name, params in loss.parameter_groups().items()}
    update = Update(loss, lr=0.1, compile=False)
    update(batch_of(kind, 8))
    update.reset()
    for name, old in before.items():
        for key, value in getattr(loss, name).items(True, True):
            if value.is_floating_point() and value.ndim > 1:
                assert (value != old.get(key)).any(), (name, key)
            if name.startswith("target_"):
                assert torch.equal(value, getattr(loss, name.removeprefix("target_")).get(key))


@both
@pytest.mark.parametrize("n", [1, 3])
def test_multi_step_data(kind, n):
    loss, batch = make_loss(kind), batch_of(kind, 4, 6, done=0.0)
    batch.names, draws = [None, "time"], loss.draw(batch)
    stepped = MultiStep(gamma=0.9, n_steps=n)(batch.clone())
    one, many = loss(batch, draws=draws), loss(stepped, draws=draws)
    name = names(loss)[-1]
    assert bool(torch.isclose(one[name], many[name])) == (n == 1)


@both
def test_target_updater_is_asked_for(kind):
    loss = make_loss(kind, updater=False)
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(batch_of(kind, 4))


@both
def test_dropout_is_a_function_of_the_draws(kind):
    loss, batch = make_loss(kind, dropout=0.5), batch_of(kind, 8)
    draws = loss.draw(batch)
    assert draws["dropout"].shape == (5,)
    one, same = (loss(batch, draws=draws) for _ in range(2))
    assert (one == same).all()
    draws["dropout"] += 1
    assert not torch.isclose(loss(batch, draws=draws)[names(loss)[-1]], one[names(loss)[-1]])


@both
def test_an_index_under_another_key_is_asked_for(kind):
    loss, batch = make_loss(kind), batch_of(kind, 4)
    loss.set_keys(subnet="task")
    with pytest.raises(ValueError, match=r"reads .* and no 'task'.*set_keys\(subnet=\.\.\.\)"):
        loss(batch)


# Compilation, vmap and metrics -------------------------------------------------------------------------------------------


@both
def test_losses_and_gradients_trace_with_fullgraph(kind):
    loss, batch = make_loss(kind), batch_of(kind, 16)
    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="eager")
    for _ in range(2):
        results = []
        draws = loss.draw(batch)
        for function in (loss, traced):
            loss.zero_grad()
            output = function(batch.clone(), draws=draws)
            total(loss, output).backward()
            results.append((output.detach(), {name: p.grad.clone() for name, p in loss.named_parameters()}))
        torch.testing.assert_close(results[1][0].to_dict(), results[0][0].to_dict())
        torch.testing.assert_close(results[1][1], results[0][1])


@both
def test_two_runs_side_by_side_under_vmap_equal_a_loop(kind):
    losses, batches = [make_loss(kind) for _ in range(2)], [batch_of(kind, 8, seed=i) for i in range(2)]
    draws = [loss.draw(batch) for loss, batch in zip(losses, batches, strict=True)]
    params = [
        TensorDict({name: TensorDict(group.data.to_dict()) for name, group in loss.parameter_groups().items()})
        for loss in losses
    ]

    def run(params, batch, draws):
        parts = [losses[0].qvalue_loss(batch, draws=draws, params=params)[0]]
        return parts + ([losses[0].actor_loss(batch, draws=draws, params=params)[0]] if kind == TD3 else [])

    together = torch.vmap(run)(torch.stack(params), torch.stack(batches), torch.stack(draws))
    for i, loss in enumerate(losses):
        expected = loss(batches[i], draws=draws[i])
        for value, name in zip(together, reversed(names(loss)), strict=True):
            torch.testing.assert_close(value[i], expected[name])


# The update --------------------------------------------------------------------------------------------------------------


def make_update(kind, compile=False):
    torch.manual_seed(0)
    return Update(make_loss(kind), lr=1e-2, policy_update_delay=2, target_update_interval=4, compile=compile)


def train(update, kind, count, start=0):
    for i in range(start, start + count):
        update(batch_of(kind, 8, seed=i), generator=torch.Generator().manual_seed(i))


def same(update, other):
    state, expected = update.loss.state_dict(), other.loss.state_dict()
    return [name for name in expected if not torch.equal(state[name], expected[name])] == []


@both
def test_an_update_goes_on_from_its_state_as_if_it_had_not_stopped(kind):
    whole, first, second = (make_update(kind) for _ in range(3))
    train(whole, kind, 9)
    train(first, kind, 5)  # in the middle of both intervals
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, kind, 4, start=5)
    assert same(second, whole)
    assert not same(first, whole)


@both
def test_masks_that_are_written_count_in_a_traced_update_too(kind, compiler):  # noqa: F811
    eager, traced = make_update(kind), make_update(kind, compile=True)
    for update in (eager, traced):
        train(update, kind, 5)
        for name, buffer in update.loss.named_buffers():
            if "masks" in name and not name.startswith("target_"):  # those of the targets are never read
                buffer.copy_(buffer.roll(1, 0))
        train(update, kind, 4, start=5)
    assert same(traced, eager)
    untouched = make_update(kind)
    train(untouched, kind, 9)
    assert not same(untouched, eager)


def test_the_disagreement_of_subnetworks_is_measured_of_td3_too():
    measured = subnet_disagreement(make_loss(TD3), batch_of(TD3, 8))
    assert all(value > 0 for value in measured.values())


def test_prepared_batches_may_be_on_any_shape_of_observation():
    loss = make_loss(DQN)
    assert loss.value(TensorDict(observation=torch.zeros(OBS)), None, torch.arange(2)).shape == (2, 3)

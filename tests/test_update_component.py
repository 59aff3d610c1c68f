"""The update in a script of a user's own: optimisers, schedulers, loading, copies, masks, replay buffers, precision."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_batch, small_actor, small_qvalue
from tensordict import TensorDict, lazy_stack
from test_update import (
    BATCH,
    CLOSE,
    Plain,
    assert_same_state,
    build,
    compiler,  # noqa: F401
    leaves,
    make_parts,
    make_update,
    snapshot,
    stacked,
    tensors,
    updates,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictPrioritizedReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.postprocs import MultiStep
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate, group_optimizers

from omnet_torchrl import CompiledPolicy, GatherStorage, LazyAdam, OMNetSACLoss, Update
from omnet_torchrl.masks import bernoulli_masks
from omnet_torchrl.updates import kernels as kernels_module

compile_or_not = pytest.mark.parametrize("compile", [False, True], ids=["eager", "traced"])


def eager_and_traced(names, traced):
    """Each case eager and traced, which takes ten times as long: beyond the cases ``traced``, that is slow."""
    cases = [pytest.param(name, False, id=f"{name}-eager") for name in names]
    cases += [pytest.param(name, True, id=f"{name}-traced") for name in names if name in traced]
    cases += [pytest.param(name, True, id=f"{name}-traced", marks=pytest.mark.slow) for name in names if name not in traced]
    return pytest.mark.parametrize(("name", "compile"), cases)


GROUPS = ("qvalue_network_params", "actor_network_params", "log_alpha")


class Together:
    """Several optimisers as one, gradients clipped before they step: a plain script's lines around its backward."""

    def __init__(self, loss, optims, norms=None):
        self.loss, self.optims, self.norms = loss, optims, norms or {}

    def zero_grad(self):
        for optim in self.optims:
            optim.zero_grad()

    def step(self):
        for name, norm in self.norms.items():
            group = getattr(self.loss, name)
            clip_grad_norm_([group] if name == "log_alpha" else [p for p in group.parameters() if p.requires_grad], norm)
        for optim in self.optims:
            optim.step()


def pair(make, compile=False, norms=None, **kwargs):
    """An update, and plain torch, with the optimisers that ``make`` makes of a loss."""
    losses = [make_parts()[0] for _ in range(2)]
    update = Update(losses[0], make(losses[0]), tau=0.1, compile=compile, **kwargs)
    together = Together(losses[1], make(losses[1]), norms)
    together.optims = list(together.optims) if isinstance(together.optims, (list, tuple)) else [together.optims]
    return update, Plain(losses[1], together, together, SoftUpdate(losses[1], tau=0.1))


def both(update, plain, count, first=0, delay=2):
    """The same updates by both; those of plain torch with an actor step after every ``delay`` of them."""
    update.policy_update_delay = delay
    for i, (batch, draws) in enumerate(updates(plain.loss, count, first), first + 1):
        update(batch.clone(), draws=draws)
        plain.critic_step(batch, draws)
        if i % delay == 0:
            plain.actor_step(batch, draws)


def assert_same(update, plain, rtol=0.0, atol=0.0):
    """Networks and optimisers are equal, bit for bit unless tolerances are given."""
    expected = {"loss": plain.loss.state_dict(), **dict(enumerate(o.state_dict() for o in plain.critic_optim.optims))}
    got = {"loss": update.loss.state_dict(), **dict(enumerate(o.state_dict() for o in update.optims))}
    expected, got = tensors(expected), tensors(got)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# Optimisers -------------------------------------------------------------------------------------------------------------


def critic(loss):
    return list(loss.qvalue_network_params.parameters())


def actor(loss):
    return list(loss.actor_network_params.parameters())


def flat(params):
    return list(params.flatten_keys().values())


def three(loss, lr=1e-2):
    return [Adam(critic(loss), lr=lr), Adam(actor(loss), lr=2 * lr), Adam([loss.log_alpha], lr=3 * lr)]


OPTIMISERS = {
    "one": lambda loss: Adam(loss.parameters(), lr=1e-2),
    "two": lambda loss: [Adam(critic(loss), lr=1e-2), Adam([*actor(loss), loss.log_alpha], lr=3e-3)],
    "three": three,
    "three, in another order": lambda loss: three(loss)[::-1],
    "AdamW": lambda loss: AdamW(loss.parameters(), lr=1e-2, weight_decay=0.1),
    "AdamW and Adam": lambda loss: [AdamW(critic(loss), lr=1e-2), Adam([*actor(loss), loss.log_alpha], lr=1e-2)],
    "groups": lambda loss: Adam(
        [
            {"params": critic(loss)[:3], "lr": 1e-3, "weight_decay": 0.1},
            {"params": critic(loss)[3:]},
            {"params": [*actor(loss), loss.log_alpha], "lr": 2e-2, "betas": (0.5, 0.9)},
        ],
        lr=1e-2,
    ),
    "grouped": lambda loss: group_optimizers(*three(loss)),
    "masks among them": lambda loss: [
        Adam(flat(loss.qvalue_network_params), lr=1e-2),
        Adam([*flat(loss.actor_network_params), loss.log_alpha], lr=1e-2),
    ],
    "a learning rate that is a tensor": lambda loss: Adam(loss.parameters(), lr=torch.tensor(1e-2)),
}
# Of a learning rate that is a tensor of float32, torch computes a step in float32; an update in double precision.
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}


@eager_and_traced(OPTIMISERS, {"groups", "AdamW and Adam", "masks among them", "a learning rate that is a tensor"})
def test_optimisers_of_any_recipe_step_as_they_would_by_themselves(name, compile, compiler):  # noqa: F811
    update, plain = pair(OPTIMISERS[name], compile)
    both(update, plain, 5)
    assert_same(update, plain, **(ROUNDED if "tensor" in name else {}))


def test_masks_among_the_parameters_of_an_optimiser_have_no_state():
    update, _ = pair(OPTIMISERS["masks among them"])
    masks = {id(p) for optim in update.optims for group in optim.param_groups for p in group["params"] if p.dtype == torch.bool}
    assert masks
    copy.deepcopy(update)
    assert not masks & {id(p) for optim in update.optims for p in optim.state}


def test_a_state_of_an_optimiser_with_masks_goes_round():
    update, plain = pair(OPTIMISERS["masks among them"])
    both(update, plain, 2)
    other, _ = pair(OPTIMISERS["masks among them"])
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    both(other, plain, 2, first=2)
    assert_same(other, plain)


def schedulers(optims, make):
    return [make(optim) for optim in optims]


SCHEDULERS = {
    "exponential": lambda optim: ExponentialLR(optim, 0.5),
    "warm-up": lambda optim: LambdaLR(optim, lambda epoch: min(1.0, (epoch + 1) / 8)),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@eager_and_traced(SCHEDULERS, {"warm-up"})
def test_a_schedulers_learning_rate_is_that_of_the_next_call_and_compiles_nothing(name, tensor, compile, compiler):  # noqa: F811
    update, plain = pair(lambda loss: three(loss, torch.tensor(1e-2) if tensor else 1e-2), compile)
    own, other = (schedulers(optims, SCHEDULERS[name]) for optims in (update.optims, plain.critic_optim.optims))
    for i in range(4):
        both(update, plain, 1, first=i, delay=1)
        for scheduler in (*own, *other):
            scheduler.step()
        assert_same(update, plain, **(ROUNDED if tensor else {}))
    assert own[0].get_last_lr() == other[0].get_last_lr() != [1e-2]
    assert len(compiler) == (2 if compile else 0)


def test_a_scheduler_that_steps_before_any_update_is_warned_of_as_ever():
    update, _ = pair(three)
    scheduler = ExponentialLR(update.optims[0], 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()


@compile_or_not
def test_a_state_loaded_into_an_optimiser_takes_effect_and_its_scheduler_goes_on(compile, compiler):  # noqa: F811
    update, plain = pair(three, compile)
    other, _ = pair(lambda loss: three(loss, 3e-2))
    both(other, pair(three)[1], 3)
    both(update, plain, 2)
    for optims in (update.optims, plain.critic_optim.optims):
        for optim, source in zip(optims, other.optims, strict=True):
            optim.load_state_dict(copy.deepcopy(source.state_dict()))
    both(update, plain, 2, first=2)
    assert_same(update, plain)
    own, others = (schedulers(optims, SCHEDULERS["exponential"]) for optims in (update.optims, plain.critic_optim.optims))
    both(update, plain, 2, first=4)
    for scheduler in (*own, *others):
        scheduler.step()
    both(update, plain, 2, first=6)
    assert_same(update, plain)


def test_a_learning_rate_that_changes_after_the_update_loaded_a_state_takes_effect():
    update, plain = pair(three)
    both(update, plain, 2)
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    for optim in (*update.optims, *plain.critic_optim.optims):
        optim.param_groups[0]["lr"] = 0.1
    both(update, plain, 2, first=2)
    assert_same(update, plain)


NORMS = {"each": 0.05, "one": {"qvalue_network_params": 0.5}, "some": {"actor_network_params": 0.01, "log_alpha": 0.1}}


@eager_and_traced(NORMS, {"each"})
def test_gradients_are_clipped_by_group_as_torch_does(name, compile, compiler):  # noqa: F811
    norms = NORMS[name] if isinstance(NORMS[name], dict) else dict.fromkeys(GROUPS, NORMS[name])
    update, plain = pair(three, compile, norms, max_grad_norm=NORMS[name])
    both(update, plain, 4)
    assert_same(update, plain, **ROUNDED)  # torch may sum the squares in another order
    unclipped, _ = pair(three)
    both(unclipped, pair(three)[1], 4)
    assert not torch.equal(flat(update.loss.qvalue_network_params)[0], flat(unclipped.loss.qvalue_network_params)[0]) or (
        "qvalue_network_params" not in norms
    )


# What is loaded or replaced after the update was built --------------------------------------------------------------------


def other_parts():
    """A loss of the same shapes in another state, masks included."""
    return make_parts(lambda device: small_actor(sparsity=0.2), lambda device: small_qvalue(sparsity=0.2), alpha_init=0.3)


@compile_or_not
def test_a_state_loaded_into_the_loss_takes_effect_masks_included(compile, compiler):  # noqa: F811
    update, other = build(make_parts(), compile=compile), build(other_parts(), compile=False)
    update.prepare(make_batch(BATCH))
    update.loss.load_state_dict(other.loss.state_dict())
    for each in (update, other):
        batches, draws = stacked(each, 4)
        each(batches, draws=draws)
    assert_same_state(update, other)


def replace_temperature(loss):
    loss.log_alpha = nn.Parameter(torch.zeros(()))


def replace_masks(loss):
    params = loss.qvalue_network_params
    key = next(iter(leaves(params, floating=False)))
    with params.unlock_():
        params[key] = ~params[key]


MOVES = {
    "to double precision": lambda loss: loss.to(torch.float64),
    "double()": lambda loss: loss.double(),
    "assigned by load_state_dict": lambda loss: loss.load_state_dict(copy.deepcopy(loss.state_dict()), assign=True),
    "another temperature": replace_temperature,
    "other masks": replace_masks,
    "a layer frozen": lambda loss: next(loss.qvalue_network_params.parameters()).requires_grad_(False),
    "another network": lambda loss: setattr(loss, "qvalue_network_params", copy.deepcopy(loss.qvalue_network_params)),
}


@eager_and_traced(MOVES, {"double()", "other masks"})
def test_a_loss_that_was_moved_or_whose_tensors_were_replaced_is_refused(name, compile, compiler):  # noqa: F811
    update = build(make_parts(), compile=compile)
    batch = make_batch(BATCH)
    update(batch.clone())
    MOVES[name](update.loss)
    with pytest.raises(RuntimeError, match=r"is another tensor than when the update was built.*load_state_dict, copy_"):
        update(batch.clone())


# Settings ---------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "tau": lambda update: setattr(update, "tau", 0.5),
    "gamma": lambda update: update.loss.make_value_estimator(gamma=0.5),
    "gamma, in place": lambda update: update.loss.value_estimator.gamma.fill_(0.5),
    "gamma, of a state": lambda update: update.loss.load_state_dict(
        {**update.loss.state_dict(), "_value_estimator.gamma": torch.tensor(0.5)}
    ),
    "target_entropy": lambda update: update.loss.target_entropy.fill_(-7.0),
    "log_prob_offset": lambda update: setattr(update.loss, "log_prob_offset", 3.0),
    "value_reduction": lambda update: setattr(update.loss, "value_reduction", "min"),
    "optim": lambda update: update.optims[0].param_groups[0].update(betas=(0.5, 0.9)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_are_those_of_the_next_call_and_compile_it_once_for_each_value(name, compiler):  # noqa: F811
    update, reference = (build(make_parts(), compile=compile) for compile in (True, False))
    for each in (update, reference):
        batches, draws = stacked(each, 3)
        each(batches, draws=draws)
    compiled = len(compiler)
    for each in (update, reference):
        SETTINGS[name](each)
    with pytest.warns(UserWarning, match=f"^{name.split(',')[0]} changed since the update was compiled.*compile=False") as said:
        update(batches, draws=draws)
    assert said[0].filename == __file__  # the caller's line
    reference(batches, draws=draws)
    assert_same_state(update, reference)
    assert len(compiler) == 2 * compiled
    update(batches, draws=draws)
    assert len(compiler) == 2 * compiled


def test_a_setting_that_is_as_it_was_compiles_nothing(compiler):  # noqa: F811
    update = build(make_parts(), compile=True)
    batches, draws = stacked(update, 3)
    update(batches, draws=draws)
    compiled = len(compiler)
    update.loss.make_value_estimator()
    update.loss.load_state_dict(update.loss.state_dict())
    update(batches, draws=draws)
    assert len(compiler) == compiled


# Copies -----------------------------------------------------------------------------------------------------------------


@eager_and_traced(
    ["two", "groups", "masks among them", "AdamW", "a learning rate that is a tensor"], {"groups", "masks among them"}
)
def test_a_copy_goes_on_as_the_original_would_and_leaves_it_alone(name, compile, compiler):  # noqa: F811
    update, reference = (pair(OPTIMISERS[name], compile=each, policy_update_delay=2)[0] for each in (compile, False))
    for each in (update, reference):
        batches, draws = stacked(each, 3)
        each(batches, draws=draws)
    before, compiled = snapshot(update), len(compiler)
    copied = copy.deepcopy(update)
    assert_same_state(copied, update)
    for each in (copied, reference):
        batches, draws = stacked(each, 4)
        each(batches, draws=draws)
    assert_same_state(copied, reference)
    assert copied.updates == 7
    assert update.updates == 3
    assert {name for name, value in tensors(update.state_dict()).items() if not torch.equal(value, before[name])} == set()
    assert len(compiler) == compiled
    batches, draws = stacked(update, 4)
    update(batches, draws=draws)
    assert_same_state(update, copied)


def test_a_copys_masks_and_learning_rate_are_its_own():
    for name in ("two", "a learning rate that is a tensor"):
        update = pair(OPTIMISERS[name])[0]
        copied = copy.deepcopy(update)
        before = snapshot(update)
        for optim in copied.optims:
            for group in optim.param_groups:
                group["lr"] = group["lr"].mul_(2) if isinstance(group["lr"], torch.Tensor) else group["lr"] * 2
        flip(copied.loss.qvalue_network_params)
        assert {name for name, value in tensors(update.state_dict()).items() if not torch.equal(value, before[name])} == set()
        assert float(update.optims[0].param_groups[0]["lr"]) == pytest.approx(1e-2)
        masks = leaves(update.loss.qvalue_network_params, floating=False)
        assert all(torch.equal(~leaves(copied.loss.qvalue_network_params, floating=False)[key], masks[key]) for key in masks)


def test_a_copy_in_a_container_shares_its_loss_and_optimisers_with_the_rest_of_it():
    update = pair(OPTIMISERS["two"])[0]
    copied = copy.deepcopy({"update": update, "loss": update.loss, "optims": list(update.optims)})
    assert copied["update"].loss is copied["loss"] is not update.loss
    assert all(one is other for one, other in zip(copied["update"].optims, copied["optims"], strict=True))


# Masks are live ---------------------------------------------------------------------------------------------------------


def flip(network):
    """Invert all masks in place, of a module or of parameters."""
    if isinstance(network, nn.Module) and not hasattr(network, "flatten_keys"):
        for module in network.modules():
            if hasattr(module, "masks"):
                module.masks.copy_(~module.masks)
    else:
        for masks in leaves(network, floating=False).values():
            masks.data.copy_(~masks)


def inverted(*args, **kwargs):
    return ~bernoulli_masks(*args, **kwargs)


def networks(**kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lose every one of their")  # inverted masks are sparse
        return small_actor(**kwargs), small_qvalue(**kwargs)


def update_of(actor, qvalue, compile=False):
    return build(make_parts(lambda device: actor, lambda device: qvalue), compile=compile, policy_update_delay=2)


def fresh(update):
    """An update of newly built networks under inverted masks, with the numbers of another one."""
    actor, qvalue = networks(mask_fn=inverted)
    new = update_of(actor, qvalue)
    for key, value in new.state.items(True, True):
        if value.is_floating_point():
            value.copy_(update.state.get(key))
    new.updates = update.updates
    return new, actor, qvalue


@pytest.fixture(params=["modules", "parameters"])
def written(request):
    """An update that was made of networks whose masks were then inverted in place, and a newly built one."""
    actor, qvalue = networks()
    update = update_of(actor, qvalue)
    batches, draws = stacked(update, 3)
    update(batches, draws=draws)
    loss = update.loss
    for network in (actor, qvalue) if request.param == "modules" else (loss.actor_network_params, loss.qvalue_network_params):
        flip(network)
    return (update, actor, qvalue), fresh(update)


def test_masks_written_in_place_are_those_of_online_critic_target_and_actor(written):
    batch, draws = next(updates(written[0][0].loss, 1))
    (loss, *_), (new, *_) = ((update.loss, actor, qvalue) for update, actor, qvalue in written)
    for part in (lambda loss: loss.qvalue_loss(batch, draws=draws)[0], lambda loss: loss.actor_loss(batch, draws=draws)[0]):
        assert torch.equal(part(loss), part(new))
    assert torch.equal(loss.compute_target(batch, draws=draws), new.compute_target(batch, draws=draws))
    expected = new(batch.clone(), draws=draws)
    assert all(torch.equal(value, expected[name]) for name, value in loss(batch.clone(), draws=draws).items())


def test_masks_written_in_place_are_those_of_the_modules_and_of_extracted_subnetworks(written):
    (_, actor, qvalue), (_, new_actor, new_qvalue) = written
    batch = make_batch(BATCH).set("subnet", torch.arange(BATCH) % 3)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(actor(batch.clone())["action"], new_actor(batch.clone())["action"])
        assert torch.equal(qvalue(batch.clone())["state_action_value"], new_qvalue(batch.clone())["state_action_value"])
        for k in range(3):
            own, other = batch.clone(), batch.clone()
            assert torch.equal(actor.extract(k)(own)["action"], new_actor.extract(k)(other)["action"])
            own, other = qvalue.extract(k)(batch.clone()), new_qvalue.extract(k)(batch.clone())
            assert torch.equal(own["state_action_value"], other["state_action_value"])


def test_masks_written_in_place_go_through_a_state_dict(written):
    (update, *_), (new, *_) = written
    other = update_of(*networks())
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    batches, draws = stacked(other, 2)
    for each in (other, new):
        each(batches.clone(), draws=draws)
    assert tensors(other.loss.state_dict()).keys() == tensors(new.loss.state_dict()).keys()
    for name, value in floats_of(new.loss).items():
        assert torch.equal(floats_of(other.loss)[name], value), name


def floats_of(loss):
    """All of a loss's state but the masks of its targets, which nothing reads."""
    return {name: value for name, value in loss.state_dict().items() if value.is_floating_point()}


@compile_or_not
def test_masks_written_in_place_are_those_of_the_updates_next_call(compile, compiler):  # noqa: F811
    actor, qvalue = networks()
    update = update_of(actor, qvalue, compile)
    batches, draws = stacked(update, 3)
    update(batches.clone(), draws=draws)
    flip(actor)
    flip(update.loss.qvalue_network_params)
    new = fresh(update)[0]
    for each in (update, new):
        each(batches.clone(), draws=draws)
    assert floats_of(update.loss).keys() == floats_of(new.loss).keys()
    for name, value in floats_of(new.loss).items():
        assert torch.equal(floats_of(update.loss)[name], value), name


def test_masks_written_in_place_are_those_of_a_compiled_policys_next_action(compiler):  # noqa: F811
    actor, _ = networks()
    policy, batch = CompiledPolicy(actor), make_batch(BATCH).set("subnet", torch.arange(BATCH) % 3)
    with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
        policy.prepare(batch)
        before = policy(batch.clone())["action"]
        flip(actor)
        after = policy(batch.clone())["action"]
        assert len(compiler) == 1
        new = networks(mask_fn=inverted)[0]
        new.load_state_dict({**new.state_dict(), **dict(actor.named_parameters())})
        torch.testing.assert_close(after, new(batch.clone())["action"])
        assert not torch.equal(before, after)


def test_really_compiled_masks_are_live_loading_takes_effect_and_a_copy_works():
    actor, qvalue = networks()
    update = update_of(actor, qvalue, compile=True)
    batches, draws = stacked(update, 4)
    update(batches.clone(), draws=draws)
    flip(actor)
    flip(qvalue)
    new = fresh(update)[0]
    load_moments(new, update)
    for each in (update, new):
        each(batches.clone(), draws=draws)
    assert_close_floats(update, new)

    other = build(other_parts(), compile=False, policy_update_delay=2)
    update.loss.load_state_dict(other.loss.state_dict())
    copied = copy.deepcopy(update)
    load_moments(other, update)
    other.updates = update.updates
    before = snapshot(update)
    for each in (copied, other):
        each(batches.clone(), draws=draws)
    assert_close_floats(copied, other)
    assert all(torch.equal(value, before[name]) for name, value in tensors(update.state_dict()).items())
    assert next(iter(copied._code.values())) is next(iter(update._code.values()))
    update(batches.clone(), draws=draws)
    assert_same_state(update, copied)


def load_moments(update, source):
    for optim, other in zip(update.optims, source.optims, strict=True):
        optim.load_state_dict(copy.deepcopy(other.state_dict()))


def assert_close_floats(update, other):
    for name, value in floats_of(other.loss).items():
        torch.testing.assert_close(floats_of(update.loss)[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# Replay buffers ---------------------------------------------------------------------------------------------------------


def transitions(count, **extra):
    return make_batch(count, done=0.1).set("collector", TensorDict({"traj_ids": torch.arange(count)}, [count])).update(extra)


BUFFERS = {
    "tensors": lambda path: TensorDictReplayBuffer(storage=LazyTensorStorage(64)),
    "memory-mapped": lambda path: TensorDictReplayBuffer(storage=LazyMemmapStorage(64, scratch_dir=path)),
    "list": lambda path: TensorDictReplayBuffer(storage=ListStorage(64)),
    "gathered": lambda path: ReplayBuffer(storage=GatherStorage(64)),
}


@eager_and_traced(BUFFERS, {"gathered"})
def test_it_trains_from_any_replay_buffer(name, compile, compiler, tmp_path):  # noqa: F811
    buffer = BUFFERS[name](tmp_path)
    buffer.extend(transitions(64))
    update, eager = (build(make_parts(), compile=each, policy_update_delay=2) for each in (compile, False))
    for _ in range(2):
        batch = buffer.sample(3 * BATCH).reshape(3, BATCH)
        draws = update.loss.draw(batch[0], num_updates=3)
        eager(plainly(batch), draws=draws)
        metrics = update(batch, draws=draws)
        assert batch["td_error"].shape == (3, BATCH)
        assert all(value.isfinite() for value in metrics.values())
    assert_same_state(update, eager)


def plainly(batch):
    """A batch of contiguous tensors with the keys of a loss, and no more."""
    return batch.select("observation", "action", "next").clone().contiguous()


@pytest.mark.parametrize("alpha", [0.7])
def test_priorities_go_back_into_a_prioritised_buffer(alpha):
    try:
        buffer = TensorDictPrioritizedReplayBuffer(alpha=alpha, beta=0.9, storage=LazyTensorStorage(64))
        buffer.extend(transitions(64))
        batch = buffer.sample(2 * BATCH)
    except (ImportError, RuntimeError, NameError, AttributeError, OSError) as error:
        pytest.skip(f"this torchrl has no C++ extension for this torch: {error}")
    update = make_update()
    batch = batch.reshape(2, BATCH)
    weights = [key for key in ("priority_weight", "_weight") if key in batch.keys()]
    assert weights == ["priority_weight"]
    update(batch)
    buffer.update_tensordict_priority(batch.reshape(-1))
    index = batch["index"].reshape(-1)
    expected = (batch["td_error"].reshape(-1) + buffer._sampler._eps) ** alpha
    found = torch.as_tensor(buffer._sampler._sum_tree[index])
    last = {int(i): value for i, value in zip(index, expected, strict=True)}  # a transition may have been drawn twice
    torch.testing.assert_close(found.float(), torch.stack([last[int(i)] for i in index]).float())


@compile_or_not
def test_n_step_transitions_are_discounted_by_their_steps(compile, compiler):  # noqa: F811
    trajectory = make_batch(1, 32)
    trajectory["next", "observation"][:, :-1] = trajectory["observation"][:, 1:]
    several = MultiStep(gamma=0.9, n_steps=3)(trajectory.clone()).reshape(-1)
    assert several["steps_to_next_obs"].max() == 3
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(32))
    buffer.extend(several)
    update, other = build(make_parts(), compile=compile), make_update()
    batch = buffer.sample(BATCH)
    draws = update.loss.draw(batch)
    expected = update.loss.qvalue_loss(batch, draws=draws)[0].detach()
    assert torch.equal(update(batch.clone(), draws=draws)["loss_qvalue"], expected)
    assert not torch.equal(other(batch.exclude("steps_to_next_obs"), draws=draws)["loss_qvalue"], expected)


def odd_batches():
    batches = make_batch(2, BATCH)
    wide = torch.stack([batches, batches], -1)[..., 0]
    assert not wide["observation"].is_contiguous()
    return {
        "lazy stack": lazy_stack([part.clone() for part in batches.unbind(0)]),
        "lazy stack of transitions": lazy_stack([part.clone() for part in batches.unbind(1)], dim=1),
        "other keys": batches.clone().set("pixels", torch.zeros(2, BATCH, 3, 4)).set("subnet", torch.full((2, BATCH), 99)),
        "not contiguous": wide,
        "of requires_grad": batches.clone().set("observation", batches["observation"].clone().requires_grad_()),
    }


@eager_and_traced(odd_batches(), {"lazy stack", "not contiguous"})
def test_a_batch_of_any_make_is_as_good_as_another(name, compile, compiler):  # noqa: F811
    update, eager = build(make_parts(), compile=compile), make_update()
    batch = odd_batches()[name]
    draws = update.loss.draw(batch[0], num_updates=2)
    expected = plainly(batch).detach()
    eager(expected, draws=draws)
    update(batch, draws=draws)
    assert_same_state(update, eager)
    assert torch.equal(batch["td_error"], expected["td_error"])
    assert not any(value.requires_grad for value in update.state.values(True, True))


def test_the_order_of_a_batchs_keys_compiles_nothing_anew(compiler):  # noqa: F811
    update, batch = build(make_parts()), make_batch(BATCH)
    update.prepare(batch)
    turned = TensorDict({key: batch[key] for key in reversed(list(batch.keys(True, True)))}, batch.batch_size)
    assert list(turned.keys(True, True)) != list(batch.keys(True, True))
    update(turned)
    update(lazy_stack(list(batch.unbind(0))))
    assert len(compiler) == 2


# Precision --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _low(monkeypatch):
    """Products of any size are made in the lower precision."""
    monkeypatch.setattr(kernels_module, "WORTH", 0)


def in_bfloat16(parts=None, **kwargs):
    return build(parts or make_parts(), precision="bfloat16", policy_update_delay=2, **kwargs)


@pytest.mark.usefixtures("_low")
def test_in_bfloat16_eager_and_traced_agree_bit_for_bit_and_a_resumed_update_repeats_itself(compiler):  # noqa: F811
    update, eager, resumed = in_bfloat16(), in_bfloat16(compile=False), in_bfloat16(other_parts())
    batches, draws = stacked(update, 4)
    for each in (update, eager):
        each(batches.clone(), draws=draws)
    assert_same_state(update, eager)
    resumed.load_state_dict(copy.deepcopy(update.state_dict()))
    metrics = [each(batches.clone(), draws=draws) for each in (update, eager, resumed)]
    for each, own in zip((eager, resumed), metrics[1:], strict=True):
        assert_same_state(each, update)
        assert all(torch.equal(value, own[name]) for name, value in metrics[0].items())


@pytest.mark.usefixtures("_low")
def test_in_bfloat16_weights_and_moments_stay_float32_and_losses_are_close_to_float32s():
    update, full = in_bfloat16(compile=False), build(make_parts(), compile=False, policy_update_delay=2)
    batches, draws = stacked(update, 2)
    low, high = (each(batches[:1].clone(), draws=draws[:1]) for each in (update, full))
    assert low["loss_qvalue"] != high["loss_qvalue"]
    torch.testing.assert_close(low["loss_qvalue"], high["loss_qvalue"], rtol=0.03, atol=0)
    low, high = (each(batches[1:].clone(), draws=draws[1:]) for each in (update, full))
    torch.testing.assert_close(low["loss_actor"], high["loss_actor"], rtol=0.05, atol=0.02)
    before = {key: value.dtype for key, value in full.state.items(True, True)}
    assert {key: value.dtype for key, value in update.state.items(True, True)} == before
    assert all(value.dtype == torch.float32 for value in floats_of(update.loss).values())
    assert all(value.dtype == torch.float32 for value in low.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@compile_or_not
def test_networks_without_a_product_of_matrices_train_too(compile, precision, compiler):  # noqa: F811
    from conftest import specs

    from omnet_torchrl import make_actor, make_qvalue

    updates, options = [], {"num_cells": (1,), "num_subnets": 2, "sparsity": 0.0}
    for each in (compile, False):
        torch.manual_seed(0)
        loss = OMNetSACLoss(make_actor(*specs(), **options), make_qvalue(*specs(), **options))
        updates.append(Update(loss, lr=1e-2, precision=precision, compile=each))
        batch = make_batch(1)
        metrics = updates[-1](batch, draws=loss.draw(batch, torch.Generator().manual_seed(0)))
        assert all(value.isfinite() for value in metrics.values())
    assert_same_state(*updates)


# The count of updates, generators, and how it presents itself -------------------------------------------------------------


@compile_or_not
def test_delayed_steps_are_counted_over_calls_of_any_size(compile, compiler):  # noqa: F811
    whole, parts = (build(make_parts(), compile=each, policy_update_delay=3) for each in (False, compile))
    batches, draws = stacked(whole, 7)
    whole(batches.clone(), draws=draws)
    first = 0
    for size in (1, 4, 2):
        metrics = parts(batches[first : first + size].clone(), draws=draws[first : first + size])
        assert ("loss_actor" in metrics.keys()) == any((i + 1) % 3 == 0 for i in range(first, first + size))
        first += size
    assert_same_state(parts, whole)
    assert parts.updates == parts.state_dict()["updates"] == 7


def test_the_count_of_updates_is_part_of_its_state():
    first, second, expected = (build(make_parts(), compile=False, policy_update_delay=3) for _ in range(3))
    batches, draws = stacked(first, 4)
    expected(batches.clone(), draws=draws)
    first(batches[:2].clone(), draws=draws[:2])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.updates == 2
    second(batches[2:].clone(), draws=draws[2:])
    assert_same_state(second, expected)


def test_a_generator_makes_the_draws_and_the_global_one_is_left_alone():
    one, other = make_update(), make_update()
    batch, state = make_batch(3, BATCH), torch.get_rng_state()
    generator = torch.Generator(one.loss.log_alpha.device).manual_seed(5)
    one(batch.clone(), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    generator.manual_seed(5)
    other(batch.clone(), draws=other.loss.draw(batch[0], generator, num_updates=3))
    assert_same_state(one, other)


def test_it_says_its_steps_their_sizes_and_what_is_not_the_default():
    loss, *optims, _ = make_parts()
    numbers = [sum(p.numel() for p in group) for group in (critic(loss), [*actor(loss), loss.log_alpha])]
    expected = f"critic: {numbers[0]:,} parameters, actor: {numbers[1]:,} parameters"
    assert repr(Update(loss, optims)) == f"Update(OMNetSACLoss, steps=[{expected}], tau=0.005, 0 updates made)"
    update = Update(loss, lr=1e-3, tau=0.1, policy_update_delay=20, precision="bfloat16", compile=False)
    expected = expected.replace("actor:", "actor (every 20):")
    update(make_batch(2, BATCH))
    assert repr(update) == f"Update(OMNetSACLoss, steps=[{expected}], tau=0.1, bfloat16, 2 updates made)"


def test_it_makes_an_adam_for_each_step_where_none_is_given():
    update, lazy = Update(make_parts()[0], lr=1e-2, compile=False), make_update(optimiser=LazyAdam)
    assert [type(optim) for optim in update.optims] == [Adam, Adam]
    assert [optim.param_groups[0]["lr"] for optim in Update(make_parts()[0]).optims] == [3e-4, 3e-4]
    assert [type(optim) for optim in copy.deepcopy(lazy).optims] == [LazyAdam, LazyAdam]


# A script that has only torch, tensordict and torchrl ---------------------------------------------------------------------


@pytest.mark.slow  # the environment core of tox does it where nothing else is installed
def test_the_script_of_the_core_runs_without_what_the_training_job_needs():
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['gymnasium', 'gym', 'hydra', 'matplotlib', 'wandb'])); "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    script = Path(__file__).with_name("core_script.py")
    result = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1].startswith("critic's loss")

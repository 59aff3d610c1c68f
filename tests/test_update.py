"""The update: plain torch is its oracle, compiled and captured steps are compared with it, and a state goes round."""

import copy

import pytest
import torch
from conftest import OBS, make_batch, no_wait, small_actor, small_qvalue, specs
from torch import nn
from torch.optim import SGD, Adam
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from omnet_torchrl import (
    EnsembleMLP,
    LazyAdam,
    OMNetSACLoss,
    RedrawnMLP,
    SubnetQValueOperator,
    UnitMaskedMLP,
    Update,
    make_actor,
    make_qvalue,
)
from omnet_torchrl.metrics import subnet_disagreement
from omnet_torchrl.updates import compiled as compiled_module
from omnet_torchrl.updates import kernels as kernels_module

BATCH = 8
NETWORKS = ("actor_network_params", "qvalue_network_params", "target_qvalue_network_params")


def make_parts(actor=None, qvalue=None, *, tau=0.1, adam=None, optimiser=Adam, device=None, **kwargs):
    """Loss, both optimisers and the target updater: what an update is built of, and what plain torch trains."""
    torch.manual_seed(0)
    loss = OMNetSACLoss((actor or small_actor)(device=device), (qvalue or small_qvalue)(device=device), **kwargs)
    adam = {"lr": 1e-2, **(adam or {})}
    critic_optim = optimiser(loss.qvalue_network_params.parameters(), **adam)
    temperature = [] if loss.fixed_alpha else [loss.log_alpha]
    actor_optim = optimiser([*loss.actor_network_params.parameters(), *temperature], **adam)
    return loss, critic_optim, actor_optim, SoftUpdate(loss, tau=tau)


def build(parts, compile=True, **kwargs):
    """The update of these parts."""
    loss, critic_optim, actor_optim, updater = parts
    return Update(loss, [critic_optim, actor_optim], tau=1 - updater.eps, compile=compile, **kwargs)


def make_update(*args, **kwargs):
    return build(make_parts(*args, **kwargs), compile=False)


def critic_step(update, batch, draws):
    """The critic's step alone."""
    return only(update, "critic", batch, draws)


def actor_step(update, batch, draws):
    """The step of actor and temperature alone."""
    return only(update, "actor", batch, draws)


def only(update, name, batch, draws):
    if isinstance(update, Plain):
        return getattr(update, f"{name}_step")(batch, draws)
    # As a call reads it: in another order of keys, everything would be compiled anew.
    outputs = update._run(((name, 0),), update._read(batch.unsqueeze(0)), draws.unsqueeze(0))
    outputs.pop("priority", None)
    return outputs


def block(update, batches, draws, actor):
    """Critic steps of all batches, and an actor step after those that ``actor`` names."""
    outputs = {}
    for i, follows in enumerate(actor):
        outputs |= critic_step(update, batches[i], draws[i])
        outputs |= actor_step(update, batches[i], draws[i]) if follows else {}
    return outputs


class Plain:
    """The oracle: what an update would be without Update."""

    def __init__(self, loss, critic_optim, actor_optim, target_updater):
        self.loss, self.critic_optim, self.actor_optim, self.updater = loss, critic_optim, actor_optim, target_updater

    def critic_step(self, batch, draws):
        self.critic_optim.zero_grad()
        loss, data = self.loss.qvalue_loss(batch, draws=draws)
        loss.backward()
        self.critic_optim.step()
        self.updater.step()
        return {"loss_qvalue": loss, "qvalue": data["pred_value"].mean(), "td_error": data["td_error"].mean()}

    def actor_step(self, batch, draws):
        self.actor_optim.zero_grad()
        loss_actor, data = self.loss.actor_loss(batch, draws=draws)
        loss_alpha = self.loss._reduced(self.loss.alpha_loss(data["log_prob"]), batch)
        (loss_actor + loss_alpha).backward()
        self.actor_optim.step()
        entropy = -data["log_prob"].mean()
        return {"loss_actor": loss_actor, "loss_alpha": loss_alpha, "entropy": entropy, "alpha": self.loss._alpha}

    def state_dict(self):
        optims = {"critic_optim": self.critic_optim.state_dict(), "actor_optim": self.actor_optim.state_dict()}
        return {"loss": self.loss.state_dict(), **optims}


def updates(loss, count, first=0):
    """Batches and draws of some updates, the same ones for the same loss."""
    device, dtype = loss.log_alpha.device, next(loss.actor_network_params.parameters()).dtype
    for i in range(first, first + count):
        batch = make_batch(BATCH, seed=i, done=0.3).to(device)
        batch = batch.apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
        yield batch, loss.draw(batch, generator=torch.Generator(device).manual_seed(i))


def train(update, count, first=0, every=2):
    """Critic steps, and an actor step after ``every`` of them; what the last ones returned."""
    output = {}
    for i, (batch, draws) in enumerate(updates(update.loss, count, first)):
        output |= critic_step(update, batch, draws)
        if (i + 1) % every == 0:
            output |= actor_step(update, batch, draws)
    return {name: value.detach().clone() for name, value in output.items()}


def tensors(state, prefix=""):
    """All tensors of a nested state, by the path to them."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{prefix}/{key}").items()}


def assert_same_state(update, other, rtol=0.0, atol=0.0):
    expected, got = tensors(other.state_dict()), tensors(update.state_dict())
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        # Adam may keep its counts of steps on another device than the weights.
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=atol, check_device=False, msg=lambda text, name=name: f"{name}: {text}"
        )


def snapshot(update):
    return {name: value.clone() for name, value in tensors(update.state_dict()).items()}


def assert_unchanged(update, before):
    after = tensors(update.state_dict())
    assert after.keys() == before.keys()
    assert [name for name, value in before.items() if not torch.equal(after[name], value)] == []


def leaves(params, floating=True):
    return {key: value for key, value in params.items(True, True) if value.is_floating_point() == floating}


def dense_actor(device=None):
    return small_actor(device=device).extract(0)


def dense_qvalue(device=None):
    return small_qvalue(device=device).extract(0)


def ensemble(device=None):
    return make_qvalue(*specs(), network_class=EnsembleMLP, num_subnets=2, num_cells=(16, 16), device=device)


def droq(device=None):
    ensembles = {"network_class": EnsembleMLP, "num_subnets": 2, "num_cells": (16, 16), "dropout": 0.3}
    return make_qvalue(*specs(), **ensembles, device=device)


def redrawn(make):
    return lambda device=None: make(*specs(), network_class=RedrawnMLP, num_cells=(16, 16), generator=3, device=device)


def units(device=None):
    return make_qvalue(*specs(), network_class=UnitMaskedMLP, num_subnets=3, num_cells=(16, 16), generator=4, device=device)


ROWS = {
    "OMNet": {},
    "DroQ": {"qvalue": droq, "num_trained_subnets": None},
    "redrawn": {
        **{"actor": redrawn(make_actor), "qvalue": redrawn(make_qvalue)},
        **{"num_value_subnets": 5, "replacement": True},
    },
    "SAC": {"qvalue": ensemble, "num_trained_subnets": None},
    "single critic": {"actor": dense_actor, "qvalue": dense_qvalue, "num_target_subnets": 1},
    "REDQ's minimum": {"value_reduction": "min", "num_trained_subnets": 2, "replacement": True},
}
OTHERS = {
    **{name: kwargs for name, kwargs in ROWS.items() if kwargs},
    **{"fixed temperature": {"fixed_alpha": True}, "bounded temperature": {"max_alpha": 1.02, "target_entropy": 10.0}},
    **{"lazy Adam": {"optimiser": LazyAdam}, "units": {"qvalue": units}},
}
OPTIONS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True},
    {"betas": (0.5, 0.9), "eps": 1e-3},
]


def masked_otherwise(device=None):
    """An update of the same shapes in another state: other weights, moments and masks, and another temperature."""
    networks = {"actor": lambda device: small_actor(sparsity=0.2, device=device)}
    networks["qvalue"] = lambda device: small_qvalue(sparsity=0.2, device=device)
    update = make_update(**networks, alpha_init=0.3, device=device)
    train(update, 3)
    return update


# The oracle: plain torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_it_is_backward_adam_and_soft_update_bit_for_bit(row):
    update, plain = make_update(**ROWS[row]), Plain(*make_parts(**ROWS[row]))
    outputs = train(update, 6), train(plain, 6)
    assert_same_state(update, plain)
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        assert value.shape == ()
        assert torch.equal(value, outputs[1][name]), name


@pytest.mark.parametrize("optimiser", [Adam, LazyAdam])
@pytest.mark.parametrize("adam", OPTIONS, ids=str)
def test_it_is_adam_bit_for_bit_whatever_its_options(adam, optimiser):
    options = {"adam": adam, "optimiser": optimiser}
    update, plain = make_update(**options), Plain(*make_parts(**options))
    train(update, 6), train(plain, 6)
    assert_same_state(update, plain)


def test_lazy_adam_is_adam_where_the_gradient_is_not_zero_and_nothing_elsewhere():
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
    optims = [LazyAdam(weights[:1], lr=0.1), Adam(weights[1:], lr=0.1)]
    idle = torch.rand(4, 5, generator=generator) < 0.5

    def state():
        return weights[0].detach().clone(), *(optims[0].state[weights[0]][key].clone() for key in ("exp_avg", "exp_avg_sq"))

    for step in range(3):
        grad = torch.randn(4, 5, generator=generator)
        for weight in weights:
            weight.grad = grad.clone()
        weights[0].grad[idle] = 0.0 if step else grad[idle]
        for optim in optims:
            optim.step()
        if not step:
            before = state()
    for value, old in zip(state(), before, strict=True):
        assert torch.equal(value[idle], old[idle])
        assert (value[~idle] != old[~idle]).all()
    assert torch.equal(weights[0][~idle], weights[1][~idle])
    calls = []
    optims[0].register_step_post_hook(lambda *args: calls.append(args))
    assert optims[0].step(lambda: 3.0) == 3.0
    assert len(calls) == 1


@pytest.mark.parametrize(("optimiser", "moves"), [(Adam, True), (LazyAdam, False)])
def test_momentum_moves_weights_of_other_subnetworks_unless_adam_is_lazy(optimiser, moves):
    update = make_update(optimiser=optimiser)
    train(update, 4)
    weight, masks = (update.loss.qvalue_network_params["module", "0", key] for key in ("weight", "masks"))
    batch, draws = next(updates(update.loss, 1, first=4))
    outside = ~masks[draws["critic"]].squeeze(0)
    before = weight.detach().clone()
    critic_step(update, batch, draws)
    assert bool((weight != before)[outside].any()) == moves
    assert (weight != before)[~outside].any()


def test_it_goes_on_from_an_optimiser_that_has_stepped():
    parts, plain = make_parts(), Plain(*make_parts())
    train(Plain(*parts), 3), train(plain, 3)
    update = build(parts, compile=False)
    train(update, 3, first=3), train(plain, 3, first=3)
    assert_same_state(update, plain)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_reduces_all_three_losses_as_the_loss_does(reduction):
    update = make_update(reduction=reduction, alpha_init=0.5)
    batch, draws = next(updates(update.loss, 1))
    losses = update.loss(batch, draws=draws)
    for output in (
        critic_step(update, batch, draws),
        actor_step(make_update(reduction=reduction, alpha_init=0.5), batch, draws),
    ):
        for name in output.keys() & {"loss_qvalue", "loss_actor", "loss_alpha"}:
            assert torch.equal(output[name], losses[name]), name


@pytest.mark.parametrize(
    "bounds",
    [{"min_alpha": 0.9, "max_alpha": 1.1}, {"max_alpha": 1.02}, {"min_alpha": 0.98}, {"alpha_init": 3.0, "max_alpha": 2.0}],
)
def test_a_bounded_temperature_stays_where_sac_keeps_it(bounds):
    kwargs = {**bounds, "target_entropy": 10.0 if "max_alpha" in bounds else -10.0}
    update, plain = make_update(**kwargs), Plain(*make_parts(**kwargs))
    outputs = train(update, 20, every=1), train(plain, 20, every=1)
    assert_same_state(update, plain)
    for name, value in outputs[0].items():
        assert torch.equal(value, outputs[1][name]), name
    bound = bounds.get("max_alpha", bounds.get("min_alpha"))
    torch.testing.assert_close(outputs[0]["alpha"], torch.tensor(bound))


def test_a_fixed_temperature_is_left_alone():
    kwargs = {"fixed_alpha": True, "alpha_init": 0.5}
    update, plain = make_update(**kwargs), Plain(*make_parts(**kwargs))
    outputs = train(update, 6), train(plain, 6)
    assert_same_state(update, plain)
    for name, value in outputs[0].items():
        assert torch.equal(value, outputs[1][name]), name
    assert update.loss.log_alpha.exp() == outputs[0]["alpha"] == 0.5


class Normalised(nn.Module):
    """A critic with what is neither a mask nor trained: statistics, a frozen layer, and a boolean choice of features."""

    num_subnets = 3

    def __init__(self):
        super().__init__()
        self.network = small_qvalue().module
        self.register_buffer("scale", torch.full((OBS,), 0.5))
        self.register_buffer("seen", torch.tensor([True, False, True, True, True]))
        self.frozen = nn.Linear(OBS, OBS).requires_grad_(False)

    def forward(self, observation, action, subnet):
        observation = self.frozen(observation * self.scale).masked_fill(~self.seen, 0.0)
        return self.network(observation, action, subnet)


def test_only_what_needs_a_gradient_is_trained_and_a_boolean_buffer_stays_boolean():
    def qvalue(device=None):
        return SubnetQValueOperator(Normalised())

    def parts():
        loss, _, actor_optim, updater = make_parts(qvalue=qvalue)
        trained = [p for p in loss.qvalue_network_params.parameters() if p.requires_grad]
        return loss, Adam(trained, lr=1e-2), actor_optim, updater

    update, plain = build(parts(), compile=False), Plain(*parts())
    train(update, 4), train(plain, 4)
    assert_same_state(update, plain)


# Masks ------------------------------------------------------------------------------------------------------------------


def test_a_weight_that_no_drawn_mask_keeps_never_moves_nor_do_its_moments():
    update = make_update()
    params, optim = update.loss.qvalue_network_params, update.optims[0]
    before = {key: value.clone() for key, value in params.items(True, True)}
    for batch, draws in updates(update.loss, 5):
        critic_step(update, batch, draws.set("critic", torch.tensor([1])))
    for key in [key for key in before if key[-1] == "masks"]:
        key, dropped = (*key[:-1], "weight"), ~before[key][1]
        assert dropped.any()
        assert torch.equal(params[key][dropped], before[key][dropped])
        assert not torch.equal(params[key][~dropped], before[key][~dropped])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optim.state[params[key]][moment][dropped].any()


def test_masks_never_change_and_stay_boolean():
    update = make_update()
    networks = [getattr(update.loss, name) for name in NETWORKS]
    before = [{key: (mask, mask.clone()) for key, mask in leaves(params, floating=False).items()} for params in networks]
    train(update, 4)
    for params, masks in zip(networks, before, strict=True):
        assert masks.keys() == leaves(params, floating=False).keys() != set()
        for key, (mask, value) in masks.items():
            assert params[key].dtype == torch.bool
            assert params[key].data_ptr() == mask.data_ptr()
            assert torch.equal(params[key], value)


def test_the_target_moves_by_tau_towards_the_new_critic_and_the_actor_step_leaves_it():
    update = make_update(tau=0.25)
    train(update, 2)
    online, target = leaves(update.loss.qvalue_network_params), leaves(update.loss.target_qvalue_network_params)
    batch, draws = next(updates(update.loss, 1))
    before = {key: value.clone() for key, value in target.items()}
    critic_step(update, batch, draws)
    for key, value in target.items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * online[key].data)
    moved = {key: value.clone() for key, value in target.items()}
    actor_step(update, batch, draws)
    assert all(torch.equal(value, moved[key]) for key, value in target.items())


# Isolation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "moves"),
    [
        ("critic", {"qvalue_network_params", "target_qvalue_network_params", "critic_optim"}),
        ("actor", {"actor_network_params", "log_alpha", "actor_optim"}),
    ],
)
def test_a_step_moves_its_own_part_of_the_state_only(step, moves):
    update = make_update()
    before = snapshot(update)
    only(update, step, *next(updates(update.loss, 1)))
    moved = {name for name, value in tensors(update.state_dict()).items() if not torch.equal(value, before[name])}
    assert {name.split("/")[2 if name.startswith("/loss") else 1].split(".")[0] for name in moved} == moves


def test_a_step_reads_batch_and_draws_and_changes_neither_nor_the_gradients_nor_the_global_generator():
    update = make_update()
    batch, draws = next(updates(update.loss, 1))
    before, state = (batch.clone(), draws.clone()), torch.get_rng_state()
    critic_step(update, batch, draws)
    actor_step(update, batch, draws)
    assert set(batch.keys(True)) == set(before[0].keys(True))
    assert (batch == before[0]).all()
    assert (draws == before[1]).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in update.loss.parameters())


def test_the_loss_and_the_users_modules_see_the_new_weights():
    actor, qvalue = small_actor(), small_qvalue()
    update = make_update(actor=lambda device: actor, qvalue=lambda device: qvalue)
    batch, draws = next(updates(update.loss, 1))
    before = update.loss(batch.clone(), draws=draws), qvalue.extract(0)(batch.clone()), actor.extract(0)(batch.clone())["loc"]
    pointers = {name: p.data_ptr() for name, p in update.loss.named_parameters()}
    train(update, 4)
    assert pointers == {name: p.data_ptr() for name, p in update.loss.named_parameters()}
    after = update.loss(batch.clone(), draws=draws), qvalue.extract(0)(batch.clone()), actor.extract(0)(batch.clone())["loc"]
    assert before[0]["loss_qvalue"] != after[0]["loss_qvalue"]
    assert not torch.equal(before[1]["state_action_value"], after[1]["state_action_value"])
    assert not torch.equal(before[2], after[2])


# Round trip -------------------------------------------------------------------------------------------------------------


def test_another_update_takes_over_a_saved_state_masks_included_and_goes_on_bit_for_bit(tmp_path):
    first = make_update()
    train(first, 5)
    torch.save(first.state_dict(), tmp_path / "update.pt")
    train(first, 5, first=5)

    second = masked_otherwise()
    pointers = {name: value.data_ptr() for name, value in tensors(second.state_dict()).items()}
    second.load_state_dict(torch.load(tmp_path / "update.pt", weights_only=True))
    assert {name: value.data_ptr() for name, value in tensors(second.state_dict()).items()} == pointers
    train(second, 5, first=5)
    assert_same_state(second, first)


def test_nothing_remembers_how_the_state_came_about():
    # A tensor that is part of a graph would keep every update since then in memory, and compile anew.
    update = make_update()
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    train(update, 2)
    assert not any(tensor.requires_grad for tensor in update.state.values(True, True))
    assert all(p.is_leaf for p in update.loss.parameters())


def test_plain_torch_takes_over_the_state_of_an_update():
    update, plain = make_update(), Plain(*make_parts())
    train(update, 4)
    state = copy.deepcopy(update.state_dict())
    plain.loss.load_state_dict(state["loss"])
    plain.critic_optim.load_state_dict(state["critic_optim"])
    plain.actor_optim.load_state_dict(state["actor_optim"])
    train(update, 4, first=4), train(plain, 4, first=4)
    assert_same_state(update, plain)


def test_a_state_of_other_options_is_refused_before_anything_is_loaded():
    first, second = make_update(), make_update(adam={"eps": 1e-3})
    train(first, 2)
    before = snapshot(second)
    with pytest.raises(ValueError, match=r"critic_optim has eps=0\.001, the state to load has eps=1e-08"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(
        ValueError, match=r"the state to load must have critic_optim, actor_optim, got loss, critic_actor_optim"
    ):
        second.load_state_dict(build_of(everything).state_dict())
    assert_unchanged(second, before)


# Errors -----------------------------------------------------------------------------------------------------------------


def everything(loss):
    return [p for p in loss.parameters() if p.requires_grad]


def critic(loss):
    return list(loss.qvalue_network_params.parameters())


def build_of(make, **kwargs):
    """An eager update with the optimisers that ``make`` makes of its loss."""
    loss = make_parts(**kwargs)[0]
    optims = make(loss)
    return Update(loss, Adam(optims, lr=1e-2) if isinstance(optims[0], nn.Parameter) else optims, tau=0.1, compile=False)


def actor(loss):
    return [*loss.actor_network_params.parameters(), loss.log_alpha]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda loss: critic(loss),
            r"must hold the 21 parameters .* missing: (actor_network_params\.\S*, ){2}actor\S* and \d+ more; others: 0\.",
        ),
        (lambda loss: [*everything(loss)[1:], nn.Parameter(torch.ones(1))], r"missing: log_alpha; others: 1\."),
        (
            lambda loss: [Adam(everything(loss)), Adam(critic(loss))],
            r"two optimisers hold the same parameter, of shape \(16, 7\)",
        ),
        (lambda loss: [Adam(everything(loss), amsgrad=True)], r"without amsgrad, got Adam with amsgrad=True\."),
        (lambda loss: [SGD(everything(loss))], r"must be torch\.optim\.Adam, AdamW or LazyAdam, .*got SGD\."),
    ],
)
def test_an_optimiser_that_it_cannot_stand_for_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        build_of(make)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0\.0"),
        ({"policy_update_delay": 0}, "policy_update_delay must be an int of at least 1, got 0"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, got 'half'"),
        ({"max_grad_norm": {"critic": 1.0}}, "groups qvalue_network_params, actor_network_params, log_alpha, got critic: 1.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a positive number"),
    ],
)
def test_options_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Update(make_parts()[0], **kwargs)


def test_a_learning_rate_beside_optimisers_and_a_loss_of_another_kind_are_refused():
    loss, *optims, _ = make_parts()
    with pytest.raises(ValueError, match=r"lr must be left out where optimisers are given, got lr=0\.1"):
        Update(loss, optims, lr=0.1)
    with pytest.raises(TypeError, match="loss must be a loss over subnetworks, such as OMNetSACLoss, got Linear"):
        Update(nn.Linear(1, 1))


def test_losses_that_are_not_reduced_are_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        make_update(reduction="none", scalar_output_mode="exclude")


# What a run watches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [*NETWORKS, "log_alpha"])
def test_it_is_not_finite_after_a_nan_anywhere(where):
    update = make_update()
    assert update.is_finite()
    part = getattr(update.loss, where)
    with torch.no_grad():
        (part if where == "log_alpha" else next(iter(leaves(part).values()))).view(-1)[-1] = float("nan")
    assert not update.is_finite()


def test_disagreement_is_that_of_the_extracted_subnets():
    actor, qvalue = small_actor(), small_qvalue()
    update = make_update(actor=lambda device: actor, qvalue=lambda device: qvalue)
    train(update, 2)
    batch = make_batch(BATCH)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        q = torch.stack([qvalue.extract(k)(batch.clone())["state_action_value"] for k in range(3)])
        action = torch.stack([actor.extract(k)(batch.clone())["action"] for k in range(3)])
    distances = [(action[i] - action[j]).norm(dim=-1).mean() for i, j in [(0, 1), (0, 2), (1, 2)]]
    found = subnet_disagreement(update.loss, batch)
    torch.testing.assert_close(found["subnets/q_std"], q.std(0, correction=0).mean())
    torch.testing.assert_close(found["subnets/action_distance"], sum(distances) / 3)
    assert min(found.values()) > 0


@pytest.mark.parametrize("row", ["one subnet", "masks of ones", "no index"])
def test_nothing_disagrees(row):
    kwargs = {
        "one subnet": {
            "actor": lambda device: small_actor(1),
            "qvalue": lambda device: small_qvalue(1),
            "num_target_subnets": 1,
        },
        "masks of ones": {"actor": lambda device: small_actor(sparsity=0), "qvalue": lambda device: small_qvalue(sparsity=0)},
        "no index": ROWS["single critic"],
    }[row]
    update = make_update(**kwargs)
    for value in subnet_disagreement(update.loss, make_batch(BATCH)).values():
        torch.testing.assert_close(value, torch.zeros(()), rtol=0, atol=1e-6)


def test_disagreement_has_no_dropout():
    update, batch = make_update(**ROWS["DroQ"]), make_batch(BATCH)
    found = subnet_disagreement(update.loss, batch)
    update.loss.eval()
    torch.testing.assert_close(found, subnet_disagreement(update.loss, batch), rtol=0, atol=0)


def test_disagreement_changes_neither_the_batch_nor_the_state():
    update, batch = make_update(**ROWS["DroQ"]), make_batch(BATCH)
    before, state = batch.clone(), snapshot(update)
    subnet_disagreement(update.loss, batch)
    assert all(module.training for module in update.loss.qvalue_network.modules())
    assert set(batch.keys(True)) == set(before.keys(True))
    assert_unchanged(update, state)


# Preparation, with a compiler that does nothing -------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for Inductor: counts the traced graphs that it is given, and returns them."""
    graphs = []
    monkeypatch.setattr(compiled_module, "translate", lambda graph, inputs: graphs.append(graph) or graph)
    return graphs


def dropout_qvalue(device=None):
    return small_qvalue(dropout=0.5, device=device)


def test_preparing_leaves_the_state_and_the_global_generator_as_they_were(compiler):
    update = build(make_parts(qvalue=dropout_qvalue))
    train(update, 2)
    before, state = snapshot(update), torch.get_rng_state()
    update.prepare(make_batch(BATCH))
    assert_unchanged(update, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_step_prepares_what_was_not(compiler):
    update, eager = build(make_parts()), make_update()
    train(update, 3), train(eager, 3)
    assert len(compiler) == 2  # critic and actor
    assert_same_state(update, eager)


@pytest.mark.parametrize("name", ["OMNet", "DroQ", "single critic"])
def test_what_the_compiler_is_given_has_the_same_numbers(name, monkeypatch):
    graphs, kwargs = [], ROWS[name]

    def keep(graph, inputs):
        graphs.append(compiled_module.decomposed(graph, inputs))
        return graphs[-1]

    monkeypatch.setattr(compiled_module, "translate", keep)
    torch.set_default_dtype(torch.float64)
    try:
        update, eager = build(make_parts(**kwargs)), make_update(**kwargs)
        train(update, 20, every=2), train(eager, 20, every=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(update, eager, **CLOSE_DOUBLE)
    left = {node.target for graph in graphs for node in graph.graph.nodes} & kernels_module.DECOMPOSITIONS.keys()
    kept = torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.index_select
    assert left <= {operation.default for operation in kept}  # those that are large


def test_an_eager_update_compiles_nothing(compiler):
    update = make_update()
    update.prepare(make_batch(BATCH))
    train(update, 2)
    assert compiler == []


def test_a_failed_preparation_leaves_the_state_as_it_was_and_can_be_tried_again(monkeypatch):
    def broken(graph, inputs):
        graphs.append(graph)
        if len(graphs) == 2:
            raise RuntimeError("no compiler")
        return graph

    graphs = []
    update, eager = build(make_parts()), make_update()
    before, state = snapshot(update), torch.get_rng_state()
    monkeypatch.setattr(compiled_module, "translate", broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        update.prepare(make_batch(BATCH))
    assert_unchanged(update, before)
    assert torch.equal(torch.get_rng_state(), state)
    train(update, 3), train(eager, 3)
    assert_same_state(update, eager)


TRACED = {**ROWS, "fixed temperature": {"fixed_alpha": True}, "bounded": {"max_alpha": 1.02, "target_entropy": 10.0}}


@pytest.mark.parametrize("row", TRACED)
def test_what_is_traced_is_the_eager_step_bit_for_bit(row, compiler):
    update, eager = build(make_parts(**TRACED[row])), make_update(**TRACED[row])
    outputs = train(update, 6), train(eager, 6)
    assert_same_state(update, eager)
    for name, value in outputs[1].items():
        assert torch.equal(outputs[0][name], value), name


def test_what_is_traced_goes_on_from_a_loaded_state_masks_included(compiler):
    update, other = build(make_parts()), masked_otherwise()
    train(update, 2)
    update.load_state_dict(other.state_dict())
    train(update, 4), train(other, 4)
    assert_same_state(update, other)


def stacked(update, count):
    """Batches ``(U, B)`` and draws ``(U,)``."""
    batches, draws = zip(*updates(update.loss, count), strict=True)
    return torch.stack(batches), torch.stack(draws)


@pytest.mark.parametrize("compile", [False, True])
def test_a_call_is_its_steps_one_after_the_other(compile, compiler):
    update, single = build(make_parts(), compile=compile, policy_update_delay=2), make_update()
    update.updates = 1
    batches, draws = stacked(update, 5)
    output = update(batches, draws=draws)
    expected = block(single, batches, draws, [True, False, True, False, True])
    assert_same_state(update, single)
    assert set(output.keys()) == expected.keys()
    assert all(torch.equal(output[name], value) for name, value in expected.items())
    assert update.updates == 6


@pytest.mark.parametrize("compile", [False, True])
def test_the_priority_of_each_transition_comes_back(compile, compiler):
    update, single = build(make_parts(), compile=compile), make_update()
    batches, draws = stacked(update, 3)
    expected = []
    for i in range(3):
        expected.append(single.loss.qvalue_loss(batches[i], draws=draws[i])[1]["td_error"])
        single(batches[i].clone(), draws=draws[i])
    metrics = update(batches, draws=draws)
    assert torch.equal(batches["td_error"], torch.stack(expected))
    assert torch.equal(metrics["td_error"], expected[-1].mean())


@pytest.mark.parametrize("compile", [False, True])
def test_draws_are_made_of_a_generator_or_of_the_global_one(compile, compiler):
    updates = [build(make_parts(), compile=compile, policy_update_delay=2) for _ in range(3)]
    batches = stacked(updates[0], 4)[0]
    updates[0](batches, generator=torch.Generator().manual_seed(3))
    actor = [False, True, False, True]
    draws = updates[1].loss.draw(batches[0], torch.Generator().manual_seed(3), num_updates=4, delayed=actor)
    updates[1](batches, draws=draws)
    assert_same_state(*updates[:2])
    torch.manual_seed(3)
    updates[2](batches)
    assert_same_state(*updates[1:])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [("steps_to_next_obs", torch.arange(1.0, 9.0).unsqueeze(-1)), ("priority_weight", torch.linspace(0, 2, 8))],
)
def test_what_a_loss_reads_where_it_is_there_counts(key, value, compile, compiler):
    plain, eager, update = make_update(), make_update(), build(make_parts(), compile=compile)
    batches, draws = stacked(update, 2)
    with_it = batches.clone().set(key, value.expand(2, *value.shape).clone())
    # Compiled for batches without it first: another kind of batch is compiled anew.
    for each in (plain, eager, update):
        each(batches.clone(), draws=draws)
    update(with_it.clone(), draws=draws), eager(with_it.clone(), draws=draws), plain(batches.clone(), draws=draws)
    assert any(not torch.equal(value, snapshot(plain)[name]) for name, value in snapshot(eager).items())
    assert_same_state(update, eager)


def test_a_batch_of_another_shape_is_compiled_too(compiler):
    update, eager = build(make_parts()), make_update()
    (batch, draws), (other, _) = updates(update.loss, 2)
    for each in (update, eager):
        each(batch.clone(), draws=draws)
        each(
            other[:-3].clone(),
            draws=draws.clone().set("next_noise", draws["next_noise"][:-3]).set("noise", draws["noise"][:-3]),
        )
        each(batch.clone(), draws=draws)
    assert_same_state(update, eager)
    assert len(compiler) == 4


def test_a_batch_of_no_or_three_dimensions_and_one_without_a_key_are_refused():
    update = make_update()
    batch, _ = next(updates(update.loss, 1))
    for wrong in (batch[0], batch.reshape(2, 2, 2)):
        with pytest.raises(ValueError, match=r"batch must have batch size \(B,\) or \(U, B\), got"):
            update(wrong)
    with pytest.raises(KeyError, match="the batch has no 'action'"):
        update(batch.exclude("action"))


def test_a_batch_may_hold_more_keys_and_lie_in_memory_as_it_likes(compiler):
    update, eager = build(make_parts()), make_update()
    batch, draws = next(updates(update.loss, 1))
    update.prepare(batch)
    scattered = torch.stack([batch, batch], 1)[:, 0].set("index", torch.arange(BATCH))
    assert not scattered["observation"].is_contiguous()
    critic_step(update, scattered, draws), critic_step(eager, batch, draws)
    assert_same_state(update, eager)


# Compiled ---------------------------------------------------------------------------------------------------------------

# Measured after 100 updates of learning rate 0.01, which move weights by 0.3: rounding alone, as the test in double shows.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CLOSE_DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def assert_outputs_close(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def compiled():
    """A compiled update, and what there was before: compiled once, as it takes a while."""
    update = build(make_parts())
    before, state = snapshot(update), torch.get_rng_state()
    update.prepare(make_batch(BATCH))
    return update, before, state, torch.get_rng_state(), snapshot(update)


def test_compiling_leaves_the_state_and_the_global_generator_as_they_were(compiled):
    _, before, state, state_after, after = compiled
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, state_after)


def test_traced_with_lazy_adam_it_is_the_eager_one_bit_for_bit(compiler):
    update, eager = (build(make_parts(optimiser=LazyAdam), compile=compile, policy_update_delay=2) for compile in (True, False))
    batches, draws = stacked(update, 20)
    update(batches, draws=draws), eager(batches, draws=draws)
    assert_same_state(update, eager)


@pytest.mark.slow
def test_compiled_with_lazy_adam_it_agrees_with_eager():
    update, eager = (build(make_parts(optimiser=LazyAdam), compile=compile, policy_update_delay=2) for compile in (True, False))
    batches, draws = stacked(update, 20)
    assert_outputs_close(update(batches, draws=draws), eager(batches, draws=draws))
    assert_same_state(update, eager, **CLOSE)


def test_compiled_and_eager_agree_for_100_updates(compiled):
    update, eager = compiled[0], make_update()
    update.load_state_dict(eager.state_dict())
    outputs = train(update, 100, every=5), train(eager, 100, every=5)
    assert_same_state(update, eager, **CLOSE)
    assert_outputs_close(*outputs)


def test_a_compiled_update_takes_over_a_state_masks_included(compiled):
    update, other = compiled[0], masked_otherwise()
    update.load_state_dict(other.state_dict())
    train(update, 10), train(other, 10)
    assert_same_state(update, other, **CLOSE)


@pytest.mark.slow
def test_in_double_precision_a_compiled_update_agrees_far_closer():
    torch.set_default_dtype(torch.float64)
    try:
        update, eager = build(make_parts()), make_update()
        train(update, 100), train(eager, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(update.loss.parameters()).dtype == update.loss.log_alpha.dtype == torch.float64
    assert_same_state(update, eager, **CLOSE_DOUBLE)


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", OTHERS.values(), ids=OTHERS)
def test_other_rows_compile_too(kwargs):
    update, eager = build(make_parts(**kwargs)), make_update(**kwargs)
    outputs = train(update, 20), train(eager, 20)
    assert_same_state(update, eager, **CLOSE)
    assert_outputs_close(*outputs)


# Captured ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured():
    """A compiled update captured in a CUDA graph, and what there was before."""
    update = build(make_parts(device="cuda"))
    before, state = snapshot(update), torch.cuda.get_rng_state()
    update.prepare(make_batch(BATCH).to("cuda"))
    return update, before, state, torch.cuda.get_rng_state(), snapshot(update)


@pytest.mark.gpu
def test_capturing_leaves_the_state_and_the_devices_generator_as_they_were(captured):
    _, before, state, state_after, after = captured
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, state_after)


@pytest.mark.gpu
def test_a_captured_graph_agrees_with_eager_for_100_updates_and_waits_for_nothing(captured):
    update, eager = captured[0], make_update(device="cuda")
    update.load_state_dict(eager.state_dict())
    steps = [(i, *step) for i, step in enumerate(updates(update.loss, 100))]
    outputs = []
    with no_wait():
        for i, batch, draws in steps:
            output = dict(critic_step(update, batch, draws))
            if i % 5 == 4:
                output |= actor_step(update, batch, draws)
            outputs.append({name: value.clone() for name, value in output.items()})
    for (i, batch, draws), got in zip(steps, outputs, strict=True):
        output = dict(critic_step(eager, batch, draws))
        if i % 5 == 4:
            output |= actor_step(eager, batch, draws)
        assert_outputs_close(got, output)
    assert_same_state(update, eager, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", OTHERS.values(), ids=OTHERS)
def test_other_rows_are_captured_too_and_go_on_after_a_reset(kwargs):
    both = update, eager = build(make_parts(device="cuda", **kwargs)), make_update(device="cuda", **kwargs)
    actor, kept = [False, True, False, True], torch.cuda.get_rng_state()
    for turn in range(3):
        outputs = [block(each, *stacked(each, 4), actor) for each in both]
        assert_outputs_close(*outputs)
        assert_same_state(update, eager, **CLOSE)
        assert turn or torch.equal(torch.cuda.get_rng_state(), kept)
        for each in both:
            torch.manual_seed(turn)
            each.reset()


@pytest.mark.gpu
def test_a_captured_graph_takes_over_a_state_masks_included(captured):
    update, other = captured[0], masked_otherwise(device="cuda")
    update.load_state_dict(other.state_dict())
    train(update, 10), train(other, 10)
    assert_same_state(update, other, **CLOSE)


@pytest.mark.gpu
def test_an_optimiser_that_stepped_on_the_device_is_taken_over():
    parts, eager = make_parts(device="cuda"), Plain(*make_parts(device="cuda"))
    train(Plain(*parts), 2), train(eager, 2)
    update = build(parts, compile=False)
    train(update, 2, first=2), train(eager, 2, first=2)
    assert_same_state(update, eager, **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_is_captured_on_the_device_of_its_loss_whatever_the_current_one():
    update, eager = build(make_parts(device="cuda:1")), make_update(device="cuda:1")
    assert torch.cuda.current_device() == 0
    for each in (update, eager):
        block(each, *stacked(each, 4), [False, True, False, True])
    assert_same_state(update, eager, **CLOSE)
    assert torch.cuda.current_device() == 0

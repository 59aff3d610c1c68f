"""The update: plain torch is its oracle, compiled and captured steps are compared with it, and a state goes round."""

import copy

import pytest
import torch
from conftest import OBS, make_batch, no_wait, small_actor, small_qvalue, specs
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.utils import _pytree as pytree
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import HardUpdate, SoftUpdate

from omnet_torchrl import EnsembleMLP, OMNetSACLoss, RedrawnMLP, SubnetQValueOperator, UnitMaskedMLP, make_actor, make_qvalue
from omnet_torchrl.training import SACUpdate
from omnet_torchrl.training import compiled as compiled_module
from omnet_torchrl.training import update as update_module
from omnet_torchrl.training.adam import LazyAdam

BATCH = 8


def make_parts(actor=None, qvalue=None, *, tau=0.1, adam=None, optimiser=Adam, device=None, **kwargs):
    """Loss, both optimisers and the target updater: the arguments of SACUpdate, and what plain torch trains."""
    torch.manual_seed(0)
    loss = OMNetSACLoss((actor or small_actor)(device=device), (qvalue or small_qvalue)(device=device), **kwargs)
    adam = {"lr": 1e-2, **(adam or {})}
    critic_optim = optimiser(loss.qvalue_network_params.parameters(), **adam)
    temperature = [] if loss.fixed_alpha else [loss.log_alpha]
    actor_optim = optimiser([*loss.actor_network_params.parameters(), *temperature], **adam)
    return loss, critic_optim, actor_optim, SoftUpdate(loss, tau=tau)


def make_update(*args, **kwargs):
    return SACUpdate(*make_parts(*args, **kwargs), compile=False)


class Plain:
    """The oracle: what an update would be without SACUpdate."""

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
        output |= update.critic_step(batch, draws)
        if (i + 1) % every == 0:
            output |= update.actor_step(batch, draws)
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
    update.critic_step(batch, draws)
    assert bool((weight != before)[outside].any()) == moves
    assert (weight != before)[~outside].any()


def test_it_goes_on_from_an_optimiser_that_has_stepped():
    parts, plain = make_parts(), Plain(*make_parts())
    train(Plain(*parts), 3), train(plain, 3)
    update = SACUpdate(*parts, compile=False)
    train(update, 3, first=3), train(plain, 3, first=3)
    assert_same_state(update, plain)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_reduces_all_three_losses_as_the_loss_does(reduction):
    update = make_update(reduction=reduction, alpha_init=0.5)
    batch, draws = next(updates(update.loss, 1))
    losses = update.loss(batch, draws=draws)
    for output in (update.critic_step(batch, draws), make_update(reduction=reduction, alpha_init=0.5).actor_step(batch, draws)):
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

    update, plain = SACUpdate(*parts(), compile=False), Plain(*parts())
    train(update, 4), train(plain, 4)
    assert_same_state(update, plain)


# Masks ------------------------------------------------------------------------------------------------------------------


def test_a_weight_that_no_drawn_mask_keeps_never_moves_nor_do_its_moments():
    update = make_update()
    params, optim = update.loss.qvalue_network_params, update._critic_adam.optim
    before = {key: value.clone() for key, value in params.items(True, True)}
    for batch, draws in updates(update.loss, 5):
        update.critic_step(batch, draws.set("critic", torch.tensor([1])))
    for key in [key for key in before if key[-1] == "masks"]:
        key, dropped = (*key[:-1], "weight"), ~before[key][1]
        assert dropped.any()
        assert torch.equal(params[key][dropped], before[key][dropped])
        assert not torch.equal(params[key][~dropped], before[key][~dropped])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optim.state[params[key]][moment][dropped].any()


def test_masks_never_change_and_stay_boolean():
    update = make_update()
    networks = [getattr(update.loss, name) for name in update_module.NETWORKS]
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
    update.critic_step(batch, draws)
    for key, value in target.items():
        torch.testing.assert_close(value, 0.75 * before[key] + 0.25 * online[key].data)
    moved = {key: value.clone() for key, value in target.items()}
    update.actor_step(batch, draws)
    assert all(torch.equal(value, moved[key]) for key, value in target.items())


# Isolation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "moves"),
    [
        ("critic_step", {"qvalue_network_params", "target_qvalue_network_params", "critic_optim"}),
        ("actor_step", {"actor_network_params", "log_alpha", "actor_optim"}),
    ],
)
def test_a_step_moves_its_own_part_of_the_state_only(step, moves):
    update = make_update()
    before = snapshot(update)
    getattr(update, step)(*next(updates(update.loss, 1)))
    moved = {name for name, value in tensors(update.state_dict()).items() if not torch.equal(value, before[name])}
    assert {name.split("/")[2 if name.startswith("/loss") else 1].split(".")[0] for name in moved} == moves


def test_a_step_reads_batch_and_draws_and_changes_neither_nor_the_gradients_nor_the_global_generator():
    update = make_update()
    batch, draws = next(updates(update.loss, 1))
    before, state = (batch.clone(), draws.clone()), torch.get_rng_state()
    update.critic_step(batch, draws)
    update.actor_step(batch, draws)
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
    assert not any(tensor.requires_grad for tensor in pytree.tree_leaves(update._state))
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


def test_a_state_of_another_learning_rate_is_refused_before_anything_is_loaded():
    first, second = make_update(), make_update(adam={"lr": 1e-3})
    train(first, 2)
    before = snapshot(second)
    with pytest.raises(ValueError, match=r"critic_optim has lr=0\.001, the state to load has lr=0\.01"):
        second.load_state_dict(first.state_dict())
    assert_unchanged(second, before)


# Errors -----------------------------------------------------------------------------------------------------------------


def everything(loss):
    return [p for p in loss.parameters() if p.requires_grad]


def critic(loss):
    return list(loss.qvalue_network_params.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: Adam(everything(loss)), r"critic_optim must hold the 10 parameters .* missing: none; others: 11\."),
        (lambda loss: Adam(critic(loss)[1:]), r"missing: module\.0\.weight; others: 0\."),
        (lambda loss: Adam([{"params": [p]} for p in critic(loss)]), r"critic_optim must have one parameter group, got 10"),
        (lambda loss: Adam(critic(loss), amsgrad=True), r"without amsgrad, got Adam with lr=0\.001, amsgrad=True\."),
        (lambda loss: Adam(critic(loss), lr=torch.tensor(0.1)), r"with a number as lr .*got Adam with lr=tensor\(0\.1000\)"),
        (lambda loss: AdamW(critic(loss)), r"critic_optim must be torch\.optim\.Adam or LazyAdam, .*got AdamW\."),
        (lambda loss: SGD(critic(loss)), r"critic_optim must be torch\.optim\.Adam or LazyAdam, .*got SGD\."),
    ],
)
def test_an_optimiser_that_it_cannot_stand_for_is_refused(make, message):
    loss, _, actor_optim, updater = make_parts()
    with pytest.raises(ValueError, match=message):
        SACUpdate(loss, make(loss), actor_optim, updater)


def test_an_actor_optimiser_without_the_temperature_is_refused():
    loss, critic_optim, _, updater = make_parts()
    with pytest.raises(ValueError, match=r"actor_optim must hold the 11 parameters .*missing: log_alpha; others: 0"):
        SACUpdate(loss, critic_optim, Adam(loss.actor_network_params.parameters()), updater)


def test_a_target_updater_of_another_kind_or_loss_is_refused():
    loss, critic_optim, actor_optim, _ = make_parts()
    with pytest.raises(ValueError, match="target_updater must be a SoftUpdate of this loss, got HardUpdate"):
        SACUpdate(loss, critic_optim, actor_optim, HardUpdate(loss, value_network_update_interval=10))
    with pytest.raises(ValueError, match="target_updater must be a SoftUpdate of this loss, got one of another loss"):
        SACUpdate(loss, critic_optim, actor_optim, make_parts()[-1])


def test_losses_that_are_not_reduced_are_refused():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        make_update(reduction="none", scalar_output_mode="exclude")


# What a run watches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [*update_module.NETWORKS, "log_alpha"])
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
    found = update.disagreement(batch)
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
    for value in update.disagreement(make_batch(BATCH)).values():
        torch.testing.assert_close(value, torch.zeros(()), rtol=0, atol=1e-6)


def test_disagreement_has_no_dropout():
    update, batch = make_update(**ROWS["DroQ"]), make_batch(BATCH)
    found = update.disagreement(batch)
    update.loss.eval()
    torch.testing.assert_close(found, update.disagreement(batch), rtol=0, atol=0)


def test_disagreement_changes_neither_the_batch_nor_the_state():
    update, batch = make_update(**ROWS["DroQ"]), make_batch(BATCH)
    before, state = batch.clone(), snapshot(update)
    update.disagreement(batch)
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
    update = SACUpdate(*make_parts(qvalue=dropout_qvalue))
    train(update, 2)
    before, state = snapshot(update), torch.get_rng_state()
    update.prepare(make_batch(BATCH))
    assert_unchanged(update, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_step_prepares_what_was_not(compiler):
    update, eager = SACUpdate(*make_parts()), make_update()
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
        update, eager = SACUpdate(*make_parts(**kwargs)), make_update(**kwargs)
        train(update, 20, every=2), train(eager, 20, every=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(update, eager, **CLOSE_DOUBLE)
    left = {node.target for graph in graphs for node in graph.graph.nodes} & compiled_module.DECOMPOSITIONS.keys()
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
    update, eager = SACUpdate(*make_parts()), make_update()
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
    update, eager = SACUpdate(*make_parts(**TRACED[row])), make_update(**TRACED[row])
    outputs = train(update, 6), train(eager, 6)
    assert_same_state(update, eager)
    for name, value in outputs[1].items():
        assert torch.equal(outputs[0][name], value), name


def test_what_is_traced_goes_on_from_a_loaded_state_masks_included(compiler):
    update, other = SACUpdate(*make_parts()), masked_otherwise()
    train(update, 2)
    update.load_state_dict(other.state_dict())
    train(update, 4), train(other, 4)
    assert_same_state(update, other)


def stacked(update, count):
    """Batches ``(U, B)`` and draws ``(U,)``."""
    batches, draws = zip(*updates(update.loss, count), strict=True)
    return torch.stack(batches), torch.stack(draws)


@pytest.mark.parametrize("compile", [False, True])
def test_a_block_is_its_steps_one_after_the_other(compile, compiler):
    update, single = SACUpdate(*make_parts(), compile=compile), make_update()
    output = update.block(*stacked(update, 5), actor=[False, True, False, False, True])
    expected = {}
    for i, step in enumerate(updates(single.loss, 5)):
        expected |= single.critic_step(*step)
        expected |= single.actor_step(*step) if i in (1, 4) else {}
    assert_same_state(update, single)
    assert output.keys() == expected.keys()
    assert all(torch.equal(output[name], value) for name, value in expected.items())


def indexed(update, count, device=None):
    """Batches, rows in which they lie, and draws that name these rows."""
    batches, draws = stacked(update, count)
    order = torch.randperm(count * BATCH, generator=torch.Generator().manual_seed(0))
    rows = batches.reshape(-1)[order.argsort()].to(device or batches.device)
    index = order.argsort().argsort().view(count, BATCH).to(rows.device)
    assert (rows[index] == batches.to(rows.device)).all()
    return batches, rows, draws.clone().set("index", index)


@pytest.mark.parametrize("compile", [False, True])
def test_a_batch_may_be_rows_that_an_index_among_the_draws_names(compile, compiler):
    update, single = SACUpdate(*make_parts(), compile=compile), make_update()
    batches, rows, draws = indexed(update, 4)
    kept = rows.clone()
    actor = [False, True, False, True]
    output, expected = update.block(rows, draws, actor), single.block(batches, draws.exclude("index"), actor)
    assert_same_state(update, single)
    assert all(torch.equal(output[name], value) for name, value in expected.items())
    update.critic_step(rows, draws[2]), single.critic_step(batches[2], draws[2].exclude("index"))
    update.actor_step(rows, draws[2]), single.actor_step(batches[2], draws[2].exclude("index"))
    assert_same_state(update, single)
    assert (rows == kept).all()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [("steps_to_next_obs", torch.arange(1.0, 9.0).unsqueeze(-1)), ("priority_weight", torch.linspace(0, 2, 8))],
)
def test_what_a_loss_reads_where_it_is_there_counts_in_a_batch_and_in_rows(key, value, compile, compiler):
    plain, batched, update = make_update(), make_update(), SACUpdate(*make_parts(), compile=compile)
    batches, _, draws = indexed(update, 2)
    batches[key] = value.expand(2, *value.shape).clone()
    rows, own = batches.reshape(-1), draws.exclude("index")
    batched.block(batches, own, [True, True])
    plain.block(batches.exclude(key), own, [True, True])
    assert any(not torch.equal(value, snapshot(plain)[name]) for name, value in snapshot(batched).items())
    update.block(rows, own.set("index", torch.arange(16).view(2, 8)), [True, True])
    assert_same_state(update, batched)


@pytest.mark.parametrize("key", ["steps_to_next_obs", "priority_weight"])
def test_compiled_without_it_an_update_refuses_what_its_loss_would_read(key, compiler):
    update = SACUpdate(*make_parts())
    batch, draws = next(updates(update.loss, 1))
    update.critic_step(batch, draws)
    before = snapshot(update)
    with pytest.raises(ValueError, match=f"compiled for batches without '{key}', got one with it"):
        update.critic_step(batch.set(key, torch.ones(BATCH, 1)), draws)
    assert_unchanged(update, before)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("wrong", [-1, 16])
def test_an_index_of_no_row_is_refused(wrong, compile, compiler):
    update = SACUpdate(*make_parts(), compile=compile)
    _, rows, draws = indexed(update, 2)
    draws["index"][1, 3] = wrong
    before = snapshot(update)
    with pytest.raises(IndexError, match=r"must be in \[0, 16\), the rows, got"):
        update.block(rows, draws, [True, True])
    assert_unchanged(update, before)


def test_rows_that_would_have_to_be_copied_are_refused(compiler):
    update = SACUpdate(*make_parts())
    _, rows, draws = indexed(update, 2)
    scattered = torch.stack([rows, rows], 1)[:, 0]
    with pytest.raises(ValueError, match=r"rows must be contiguous, got 'observation' with strides \(10, 1\)"):
        update.block(scattered, draws, [True, True])
    update.block(rows, draws, [True, True])
    with pytest.raises(ValueError, match="rows must be contiguous"):
        update.block(scattered, draws, [True, True])
    assert not update._inputs.examples


def test_it_is_compiled_for_rows_without_a_look_at_them(compiler):
    update = SACUpdate(*make_parts())
    _, rows, draws = indexed(update, 2)
    made_up = rows.apply(lambda row: torch.full_like(row, torch.nan) if row.is_floating_point() else row.clone())
    kept, before = made_up.clone(), snapshot(update)
    update.prepare(made_up, batch_size=BATCH)
    assert_unchanged(update, before)
    for key, value in kept.items(True, True):
        assert torch.equal(made_up[key].nan_to_num(7), value.nan_to_num(7))
    update.block(rows, draws, [True, True])
    assert update.is_finite()
    with pytest.raises(ValueError, match=r"compiled for 'observation' of shape \(16, 5\), .*, got shape \(15, 5\)"):
        update.block(rows[:-1], draws.clone().set("index", draws["index"].clamp(max=14)), [True, True])
    with pytest.raises(ValueError, match=r"compiled for 'index' of shape \(8,\), .*, got None"):
        update.block(rows, draws.exclude("index"), [True, True])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch[:-1], r"compiled for .* of shape \(8, .*got shape \(7, "),
        (lambda batch: batch.exclude("action"), r"compiled for 'action' of shape .*, got None: build another one"),
        (lambda batch: batch.set("action", batch["action"].double()), r"float32, cpu, got shape .*, torch.float64"),
    ],
)
def test_a_batch_of_another_kind_than_compiled_is_refused(change, message, compiler):
    update = SACUpdate(*make_parts())
    batch, draws = next(updates(update.loss, 1))
    update.critic_step(batch, draws)
    before = snapshot(update)
    with pytest.raises(ValueError, match=message):
        update.critic_step(change(batch.clone()), draws)
    assert_unchanged(update, before)


def test_a_batch_may_hold_more_keys_and_lie_in_memory_as_it_likes(compiler):
    update, eager = SACUpdate(*make_parts()), make_update()
    batch, draws = next(updates(update.loss, 1))
    update.prepare(batch)
    scattered = torch.stack([batch, batch], 1)[:, 0].set("index", torch.arange(BATCH))
    assert not scattered["observation"].is_contiguous()
    update.critic_step(scattered, draws), eager.critic_step(batch, draws)
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
    update = SACUpdate(*make_parts())
    before, state = snapshot(update), torch.get_rng_state()
    update.prepare(make_batch(BATCH))
    return update, before, state, torch.get_rng_state(), snapshot(update)


def test_compiling_leaves_the_state_and_the_global_generator_as_they_were(compiled):
    _, before, state, state_after, after = compiled
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, state_after)


def test_compiled_for_rows_and_with_lazy_adam_it_agrees_with_eager():
    update, eager = SACUpdate(*make_parts(optimiser=LazyAdam)), make_update(optimiser=LazyAdam)
    batches, rows, draws = indexed(update, 20)
    actor = [i % 2 == 1 for i in range(20)]
    output = update.block(rows, draws, actor)
    assert_outputs_close(output, eager.block(batches, draws.exclude("index"), actor))
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
        update, eager = SACUpdate(*make_parts()), make_update()
        train(update, 100), train(eager, 100)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(update.loss.parameters()).dtype == update.loss.log_alpha.dtype == torch.float64
    assert_same_state(update, eager, **CLOSE_DOUBLE)


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", OTHERS.values(), ids=OTHERS)
def test_other_rows_compile_too(kwargs):
    update, eager = SACUpdate(*make_parts(**kwargs)), make_update(**kwargs)
    outputs = train(update, 20), train(eager, 20)
    assert_same_state(update, eager, **CLOSE)
    assert_outputs_close(*outputs)


# Captured ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured():
    """A compiled update captured in a CUDA graph, and what there was before."""
    update = SACUpdate(*make_parts(device="cuda"))
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
            output = dict(update.critic_step(batch, draws))
            if i % 5 == 4:
                output |= update.actor_step(batch, draws)
            outputs.append({name: value.clone() for name, value in output.items()})
    for (i, batch, draws), got in zip(steps, outputs, strict=True):
        output = dict(eager.critic_step(batch, draws))
        if i % 5 == 4:
            output |= eager.actor_step(batch, draws)
        assert_outputs_close(got, output)
    assert_same_state(update, eager, **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", OTHERS.values(), ids=OTHERS)
def test_other_rows_are_captured_too_and_go_on_after_a_reset(kwargs):
    both = update, eager = SACUpdate(*make_parts(device="cuda", **kwargs)), make_update(device="cuda", **kwargs)
    actor, kept = [False, True, False, True], torch.cuda.get_rng_state()
    for turn in range(3):
        outputs = [each.block(*stacked(each, 4), actor) for each in both]
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
def test_a_captured_graph_writes_its_outputs_anew(captured):
    update = captured[0]
    (batch, draws), (other, other_draws) = updates(update.loss, 2)
    first = update.critic_step(batch, draws)["loss_qvalue"]
    value = first.clone()
    assert update.critic_step(other, other_draws)["loss_qvalue"] is first
    assert first != value


@pytest.mark.gpu
def test_a_captured_graph_gathers_rows_where_they_are():
    update, eager = SACUpdate(*make_parts(device="cuda")), make_update(device="cuda")
    batches, rows, draws = indexed(update, 4)
    actor = [False, True, False, True]
    for turn in range(3):
        rows.set_("observation", rows["observation"] + turn)
        batches.set_("observation", batches["observation"] + turn)
        update.block(rows, draws, actor), eager.block(batches, draws.exclude("index"), actor)
    assert_same_state(update, eager, **CLOSE)
    with pytest.raises(ValueError, match="captured for the rows of one storage"):
        update.block(rows.clone(), draws, actor)


@pytest.mark.gpu
def test_an_optimiser_that_stepped_on_the_device_is_taken_over():
    parts, eager = make_parts(device="cuda"), Plain(*make_parts(device="cuda"))
    train(Plain(*parts), 2), train(eager, 2)
    update = SACUpdate(*parts, compile=False)
    train(update, 2, first=2), train(eager, 2, first=2)
    assert_same_state(update, eager, **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_is_captured_on_the_device_of_its_loss_whatever_the_current_one():
    update, eager = SACUpdate(*make_parts(device="cuda:1")), make_update(device="cuda:1")
    assert torch.cuda.current_device() == 0
    for each in (update, eager):
        each.block(*stacked(each, 4), actor=[False, True, False, True])
    assert_same_state(update, eager, **CLOSE)
    assert torch.cuda.current_device() == 0

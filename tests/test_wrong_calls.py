"""Wrong inputs of the components: one line that says what was expected and what came, before anything is changed."""

import re

import pytest
import torch
from conftest import ACT, OBS, make_batch, small_actor, small_deterministic_actor, small_qvalue, small_qvalue_actor, specs
from test_update import compiler  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torchrl.data import Bounded, Categorical, Composite, MultiOneHot, OneHot, Unbounded
from torchrl.modules import QValueActor

from omnet_torchrl import (
    EnsembleMLP,
    MaskedMLP,
    MaskSchedule,
    OMNetDQNLoss,
    OMNetSACLoss,
    OMNetTD3Loss,
    RedrawnMLP,
    RunningNormalization,
    UnitMaskedMLP,
    Update,
    bernoulli_masks,
    make_actor,
    make_deterministic_actor,
    make_qvalue,
    make_qvalue_actor,
)
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.layers import IndexedSequential, MaskedConv2d, MaskedLinear, SharedMLP
from omnet_torchrl.layers.ensembles import EnsembleLinear
from omnet_torchrl.masks import unit_masks

B, ACTIONS = 4, 3
LOSSES = {
    "sac": lambda: OMNetSACLoss(small_actor(), small_qvalue()),
    "td3": lambda: OMNetTD3Loss(small_deterministic_actor(), small_qvalue()),
    "dqn": lambda: OMNetDQNLoss(small_qvalue_actor()),
    "categorical": lambda: OMNetDQNLoss(small_qvalue_actor(spec=Categorical(ACTIONS))),
}


def batch_of(name, **changes):
    batch = make_batch(B)
    if name in ("dqn", "categorical"):
        index = torch.arange(B) % ACTIONS
        batch["action"] = F.one_hot(index, ACTIONS) if name == "dqn" else index
    for key, value in changes.items():
        batch[tuple(key.split("__")) if "__" in key else key] = value
    return batch


def one_line(error, *said):
    """The error is one line that says all this."""
    message = str(error.value)
    assert "\n" not in message
    for each in said:
        assert each in message


ENDS = {
    key: {f"next__{key}": torch.zeros(B, dtype=kind)}
    for key, kind in {"reward": None, "done": bool, "terminated": bool}.items()
}
# What is wrong, and what its line says.
BATCHES = {
    "observation": ({"observation": torch.zeros(B, OBS + 1)}, (f"'observation' ({B}, {OBS + 1})", "(*batch, ")),
    "next observation": (
        {"next__observation": torch.zeros(B, OBS - 1)},
        (f"'observation' ({B}, {OBS - 1})", f"(*batch, {OBS})"),
    ),
    "float64": ({"observation": torch.zeros(B, OBS).double()}, ("torch.float64", "must have inputs", "DoubleToFloat()")),
    **{key: (changes, (f"('next', '{key}') must have shape ({B}, 1), got ({B},)",)) for key, changes in ENDS.items()},
}
ACTIONS_OF = {
    "sac": [((B, ACT + 1), (B, ACT)), ((B, 1), (B, ACT))],
    "td3": [((B, ACT + 1), (B, ACT)), ((B, 1), (B, ACT))],
    "dqn": [((B, ACTIONS + 1), (B, ACTIONS)), ((B, 1), (B, ACTIONS)), ((B,), (B, ACTIONS))],
    "categorical": [((B, ACTIONS), (B,))],
}
HOW = {
    "loss": lambda loss: loss,
    "update": lambda loss: Update(loss, compile=False),
    "compiled": Update,
}


def refused(name, how, batch, *said):
    torch.manual_seed(0)
    loss = LOSSES[name]()
    call = HOW[how](loss)
    before = {key: value.clone() for key, value in loss.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="must ") as error:
        call(batch)
    one_line(error, *said)
    assert str(error.value).count(" must ") == 1 + ("inputs" in str(error.value))
    after = loss.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    if how != "compiled":  # which takes seconds
        call(batch_of(name))


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("wrong", BATCHES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["sac", "td3", "dqn"])
def test_a_batch_of_other_sizes_or_types_is_one_line_with_its_key(name, how, wrong, compiler):  # noqa: F811
    changes, said = BATCHES[wrong]
    refused(name, how, batch_of(name, **changes), *said)


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize(("name", "got", "expected"), [(name, *pair) for name, pairs in ACTIONS_OF.items() for pair in pairs])
@pytest.mark.parametrize("how", HOW)
def test_an_action_of_another_size_is_one_line_and_never_broadcast(name, how, got, expected, compiler):  # noqa: F811
    action = torch.zeros(got, dtype=torch.int64 if name == "categorical" else None)
    refused(name, how, batch_of(name, action=action), f"'action' must have shape {expected}, got {got}")


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_a_batch_without_its_batch_size_is_one_line():
    batch = batch_of("sac")
    batch.batch_size = []
    with pytest.raises(ValueError, match=re.escape(f"must have shape (1,), got ({B}, 1): ")) as error:
        LOSSES["sac"]()(batch)
    one_line(error, "batch size")


def test_renamed_keys_are_named():
    loss = OMNetSACLoss(small_actor(action_key="act"), small_qvalue(action_key="act"))
    loss.set_keys(action="act", reward="gain")
    batch = batch_of("sac").rename_key_("action", "act").rename_key_(("next", "reward"), ("next", "gain"))
    with pytest.raises(ValueError, match=r"'act' must have shape"):
        loss.qvalue_loss(batch.clone().set("act", torch.zeros(B, ACT + 1)))
    with pytest.raises(ValueError, match=r"\('next', 'gain'\) must have shape"):
        loss.qvalue_loss(batch.clone().set(("next", "gain"), torch.zeros(B)))


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_what_a_foreign_network_can_not_read_is_named():
    foreign = QValueActor(nn.Linear(OBS, ACTIONS), in_keys=["observation"], action_space="one_hot")
    with pytest.raises(RuntimeError) as error:
        OMNetDQNLoss(foreign).qvalue_loss(batch_of("dqn", observation=torch.zeros(B, OBS + 1)))
    one_line(error, f"'observation' ({B}, {OBS + 1}) torch.float32", "mat1 and mat2 shapes")


def test_the_gradients_that_masks_are_chosen_by_name_a_wrong_batch_too():
    schedule = MaskSchedule(Update(LOSSES["sac"](), compile=False), density=0.5)
    with pytest.raises(ValueError, match=rf"got 'observation' \({B}, {OBS + 1}\)"):
        schedule.step(batch_of("sac", observation=torch.zeros(B, OBS + 1)), 1_000)


# Networks

SIZES = {"in_features": OBS, "out_features": 2, "num_cells": [8]}
NETWORKS = {
    "masked": lambda: MaskedMLP(**SIZES, sparsity=0.0),
    "units": lambda: UnitMaskedMLP(**SIZES, num_subnets=5),
    "ensemble": lambda: EnsembleMLP(**SIZES, num_subnets=5),
    "redrawn": lambda: RedrawnMLP(**SIZES),
    "shared": lambda: SharedMLP(**SIZES, num_subnets=5),
    "sequence": lambda: IndexedSequential(NETWORKS["masked"](), nn.ReLU()),
    "layer": lambda: MaskedLinear(OBS, 2, masks=bernoulli_masks(5, (2, OBS), 0.0)),
}


@pytest.mark.parametrize("index", [torch.tensor(0), torch.arange(5)[:, None], torch.arange(B)], ids=["one", "rows", "each"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_says_which_inputs_it_takes(name, index):
    network = NETWORKS[name]()
    for wrong in (torch.zeros(B, OBS + 1), torch.zeros(B, OBS - 1), torch.zeros(B, OBS).double()):
        with pytest.raises(ValueError, match="must have inputs") as error:
            network(wrong, index)
        one_line(error, f"(*batch, {OBS}) of torch.float32", f"got {tuple(wrong.shape)} of {wrong.dtype}")
    assert network(torch.zeros(B, OBS), index).shape[-1] == 2


def test_a_convolution_and_a_normalisation_say_which_inputs_they_take():
    layer = MaskedConv2d(4, 2, 3, masks=bernoulli_masks(3, (2, 4, 3, 3), 0.0))
    for wrong in (torch.zeros(B, 5, 6, 6), torch.zeros(6, 6), torch.zeros(B, 6, 6, 4)):
        with pytest.raises(
            ValueError, match=re.escape(f"MaskedConv2d must have inputs (*batch, 4, H, W), got {tuple(wrong.shape)}")
        ):
            layer(wrong, 0)
    actor = small_actor(normalize=RunningNormalization(OBS))
    with pytest.raises(ValueError, match=rf"must have {OBS} features, got shape \({B}, {OBS - 1}\)"):
        actor.module[0].network(torch.zeros(B, OBS - 1), 0)


SWAPPED = {
    "swapped, SAC": (lambda: OMNetSACLoss(small_qvalue(), small_actor()), "got a SubnetQValueOperator that writes"),
    "swapped, TD3": (
        lambda: OMNetTD3Loss(small_qvalue(), small_deterministic_actor()),
        "got a SubnetQValueOperator that writes",
    ),
    "two critics": (lambda: OMNetTD3Loss(small_qvalue(), small_qvalue()), "got a SubnetQValueOperator that writes"),
    "TD3's in SAC": (lambda: OMNetSACLoss(small_deterministic_actor(), small_qvalue()), "for a deterministic: OMNetTD3Loss"),
    "SAC's in TD3": (lambda: OMNetTD3Loss(small_actor(), small_qvalue()), "for a stochastic: OMNetSACLoss"),
    "DQN's as critic": (
        lambda: OMNetSACLoss(small_actor(), small_qvalue_actor()),
        "a SubnetQValueActor that reads ['observation', ",
    ),
    "SAC's actor in DQN": (lambda: OMNetDQNLoss(small_actor()), "got SubnetActor, which writes"),
    "TD3's actor in DQN": (lambda: OMNetDQNLoss(small_deterministic_actor()), "got SubnetDeterministicActor, which writes"),
    "a critic in DQN": (lambda: OMNetDQNLoss(small_qvalue()), "got SubnetQValueOperator, which writes"),
    "a network without keys": (
        lambda: OMNetSACLoss(small_actor(), NETWORKS["masked"]()),
        "qvalue_network must be one module with",
    ),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_network_of_another_kind_than_the_losss_is_refused(name):
    make, said = SWAPPED[name]
    with pytest.raises(TypeError, match="network must ") as error:
        make()
    one_line(error, said)


# Keywords


class Mine(MaskedMLP):
    """A user's network, which hands keywords on."""

    def __init__(self, *args, scale=1.0, **kwargs):
        super().__init__(*args, **kwargs)


KEYWORDS = {
    "SAC": (lambda: OMNetSACLoss(small_actor(), small_qvalue(), num_trained_subnet=1), "OMNetSACLoss", "num_trained_subnets"),
    "SAC's own": (lambda: OMNetSACLoss(small_actor(), small_qvalue(), alpha_int=1), "OMNetSACLoss", "alpha_init"),
    "TD3": (lambda: OMNetTD3Loss(small_deterministic_actor(), small_qvalue(), policy_nois=1), "OMNetTD3Loss", "policy_noise"),
    "DQN": (lambda: OMNetDQNLoss(small_qvalue_actor(), double=True), "OMNetDQNLoss", "double_dqn"),
    "update": (lambda: Update(LOSSES["sac"](), lrr=1), "Update", "lr"),
    "schedule": (lambda: MaskSchedule(None, density=0.5, metod="set"), "MaskSchedule", "method"),
    **{
        kind.__name__: (lambda kind=kind: kind(**SIZES, droput=0.1), kind.__name__, "dropout")
        for kind in (MaskedMLP, UnitMaskedMLP, EnsembleMLP, RedrawnMLP, Mine)
    },
    "shared": (lambda: SharedMLP(**SIZES, num_subnets=5, head=True), "SharedMLP", "heads"),
    "grid": (lambda: make_grid_qvalue_actor(Unbounded((5, 5, 2)), OneHot(2), mask_bia=True), "MaskedMLP", "mask_bias"),
    "a builder's own": (lambda: small_qvalue(observation_keys="pixels"), "MaskedMLP", "observation_key"),
    "a user's": (lambda: small_qvalue(network_class=Mine, scal=2.0), "Mine", "scale"),
    "a user's base": (lambda: small_qvalue(network_class=Mine, mask_bia=True), "Mine", "mask_bias"),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_unknown_keyword_is_refused_by_the_class_that_was_called_with_the_closest_known_one(name):
    make, taker, close = KEYWORDS[name]
    with pytest.raises(TypeError, match=rf"^{taker} takes no '\w+': did you mean '{close}'\? It takes ") as error:
        make()
    one_line(error)
    assert "gamma" not in str(error.value), "a loss lists what it takes"


def test_a_users_network_takes_what_its_base_does():
    assert make_actor(*specs(), network_class=Mine, num_cells=(8,), num_subnets=2, sparsity=0.0, scale=2.0).num_subnets == 2


# Masks

MASK_FNS = {
    "a word": ("block", "got 'block'"),
    "of units": (unit_masks, "use UnitMaskedMLP), got unit_masks"),
    "no keywords": (lambda n, shape, s: torch.ones(n, *shape).bool(), "got <lambda>: "),
    "numbers": (lambda n, shape, s, **_: torch.ones(n, *shape), "got (3, 16, 5) of torch.float32"),
    "transposed": (lambda n, shape, s, **_: torch.ones(n, *shape[::-1]).bool(), "got (3, 5, 16) of torch.bool"),
    "too many": (lambda n, shape, s, **_: torch.ones(n + 1, *shape).bool(), "got (4, 16, 5) of torch.bool"),
    "one mask": (lambda n, shape, s, **_: torch.tensor(True), "got () of torch.bool"),
    "nothing": (lambda n, shape, s, **_: None, "got NoneType"),
}


@pytest.mark.parametrize("name", MASK_FNS)
def test_a_mask_fn_that_draws_no_masks_of_weights_is_refused(name):
    mask_fn, said = MASK_FNS[name]
    with pytest.raises((TypeError, ValueError), match=r"mask_fn must return boolean masks \(3, 16, 5\) for mask_fn\(") as error:
        small_actor(mask_fn=mask_fn)
    one_line(error, said)


def without(k, masks):
    masks[k] = False
    return masks


@pytest.mark.parametrize("many", [3, 200])
def test_a_mask_that_keeps_nothing_is_a_warning_that_names_layer_and_subnetwork(many):
    def second_of_layer_1(n, shape, s, **source):
        return without(1, torch.ones(n, *shape).bool()) if shape == (7, 8) else torch.ones(n, *shape).bool()

    sizes = {"in_features": OBS, "out_features": 1, "num_cells": [8, 7], "num_subnets": many}
    with pytest.warns(UserWarning, match=r"masks of layer 1.* subnetworks \[1\] keep no weight at all") as warned:
        network = MaskedMLP(**sizes, mask_fn=second_of_layer_1)
    assert len(warned) == 1
    assert network(torch.zeros(B, OBS), 1).shape == (B, 1)
    for make in (
        lambda: EnsembleLinear(OBS, 8, num_subnets=many, masks=without(1, torch.ones(many, 8, OBS).bool())),
        lambda: MaskedConv2d(4, 2, 3, masks=without(1, torch.ones(many, 2, 4, 3, 3).bool())),
    ):
        with pytest.warns(UserWarning, match=r"subnetworks \[1\] keep no weight at all"):
            make()


def test_a_schedule_that_empties_a_layer_names_it():
    update = Update(LOSSES["sac"](), compile=False)
    schedule = MaskSchedule(update, density=0.001)
    with pytest.warns(UserWarning, match=r"keep no weight .*, actor_network_params\.[\w.]+\.\d of the subnetworks \["):
        schedule.step(batch_of("sac"), 1_000)


# Specs and optimisers

SPECS = {
    "unbounded": (Unbounded((ACT,)), "finite bounds"),
    "infinite": (Bounded(-torch.inf, torch.inf, (ACT,)), "finite bounds"),
    "discrete": (OneHot(3), "make_qvalue_actor"),
    "several": (Composite(a=Bounded(-1, 1, (2,)), b=OneHot(2)), "Composite of shape () and the keys ['a', 'b']"),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("make", [make_actor, make_qvalue, make_deterministic_actor])
def test_a_spec_of_the_action_that_does_not_fit_is_one_line(make, name):
    spec, said = SPECS[name]
    with pytest.raises((TypeError, ValueError), match="the action spec must ") as error:
        make(specs()[0], spec)
    one_line(error, said)


@pytest.mark.parametrize("spec", [specs()[1], Unbounded((2,)), MultiOneHot([2, 2])])
def test_an_action_that_is_not_discrete_is_one_line(spec):
    with pytest.raises(TypeError, match="the action spec must be a OneHot or a Categorical, got ") as error:
        make_qvalue_actor(specs()[0], spec)
    one_line(error, type(spec).__name__, "OMNetSACLoss")


def test_an_optimiser_of_other_parameters_is_told_which_and_names_few():
    loss = LOSSES["sac"]()
    with pytest.raises(ValueError, match=r"no others: give it loss.parameters\(\); missing: ") as error:
        Update(loss, torch.optim.Adam(small_actor().parameters()))
    one_line(error, "and 18 more; others: 10")
    assert str(error.value).count("qvalue_network_params") == 3
    assert Update(loss, torch.optim.Adam(loss.parameters()), compile=False)(batch_of("sac"))["loss_qvalue"].isfinite()


@pytest.mark.parametrize(
    "build",
    [
        lambda init: MaskedMLP(12, 2, num_cells=[8], init_fn=init),
        lambda init: UnitMaskedMLP(12, 2, num_cells=[8], init_fn=init),
        lambda init: EnsembleMLP(12, 2, num_cells=[8], num_subnets=2, init_fn=init),
        lambda init: RedrawnMLP(12, 2, num_cells=[8], init_fn=init),
        lambda init: SharedMLP(12, 2, num_cells=[8], num_subnets=2, init_fn=init),
        lambda init: MaskedConv2d(4, 6, 3, masks=bernoulli_masks(2, (6, 4, 3, 3), 0.5, generator=0), init_fn=init),
    ],
    ids=["masked", "unit", "ensemble", "redrawn", "shared", "convolution"],
)
def test_an_init_fn_that_is_no_function_says_what_one_is(build):
    with pytest.raises(TypeError, match=r"init_fn must be a function .*xavier_uniform_, got 'xavier'\."):
        build("xavier")
    torch.manual_seed(0)
    weights = [weight for weight in build(nn.init.zeros_).parameters() if weight.ndim > 1]
    assert weights
    assert not any(weight.any() for weight in weights)


def test_layers_with_another_number_of_masks_are_refused():
    masks = torch.ones(3, 4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks must be one for all layers or num_subnets=2, got 3\."):
        EnsembleLinear(5, 4, num_subnets=2, masks=masks)
    assert EnsembleLinear(5, 4, num_subnets=3, masks=masks).masks.equal(masks)
    assert EnsembleLinear(5, 4, num_subnets=2, masks=masks[:1]).masks.equal(masks[:1].expand(2, -1, -1))


def test_a_schedule_of_a_loss_says_that_it_takes_an_update():
    with pytest.raises(TypeError, match=r"update must be an Update, got OMNetSACLoss: of a loss, MaskSchedule\(Update\(loss\)"):
        MaskSchedule(LOSSES["sac"](), density=0.5)

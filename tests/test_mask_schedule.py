"""Masks that follow the weights between updates: which are chosen, who sees them, and what happens to weights and moments."""

import copy
import warnings

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from omnet_torchrl import (
    EnsembleMLP,
    MaskSchedule,
    OMNetSACLoss,
    OMNetTD3Loss,
    Update,
    make_actor,
    make_deterministic_actor,
    make_qvalue,
)
from omnet_torchrl.topology import mask_overlap
from omnet_torchrl.updates import compiled as compiled_module

SPECS = Unbounded(5), Bounded(-1, 1, (2,))
NUDGE = 1e-3
NETWORK = {"num_cells": (16, 16), "layer_norm": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*units of the subnetworks keep no weight")  # of 16 units, some do


def transitions(size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    end = torch.rand(size, 1, generator=generator) < 0.1
    following = {"observation": randn(size, 5), "reward": randn(size, 1), "done": end, "terminated": end}
    return TensorDict({"observation": randn(size, 5), "action": randn(size, 2).tanh(), "next": following}, [size])


def dapd(compile=False, seed=0, **kwargs):
    """Two separate critics under a mask each, and an actor under one mask."""
    torch.manual_seed(seed)
    qvalue = make_qvalue(*SPECS, network_class=EnsembleMLP, num_subnets=2, sparsity=0.0, **NETWORK)
    actor = make_actor(*SPECS, num_subnets=1, sparsity=0.0, **NETWORK)
    loss = OMNetSACLoss(actor, qvalue, num_trained_subnets=None, num_target_subnets=None)
    update = Update(loss, lr=1e-3, compile=compile)
    return update, MaskSchedule(update, **{"density": 0.2, "interval": 100, **kwargs})


def omnet(**kwargs):
    torch.manual_seed(0)
    nets = {"num_subnets": 3, "sparsity": [0.0, 0.5, 0.5], **NETWORK}
    loss = OMNetSACLoss(make_actor(*SPECS, generator=0, **nets), make_qvalue(*SPECS, generator=1, **nets))
    update = Update(loss, lr=1e-3, compile=False)
    return update, MaskSchedule(update, **{"density": 0.5, "interval": 100, **kwargs})


def masks(update, network="qvalue"):
    params = update.state["params", f"{network}_network_params"]
    return {".".join(key): value for key, value in params.items(True, True) if key[-1] == "masks"}


def weights(update, network="qvalue"):
    params = update.state["params", f"{network}_network_params"]
    return {".".join(key): params[(*key[:-1], "weight")] for key, value in params.items(True, True) if key[-1] == "masks"}


def kept(found):
    return sum(int(mask.sum()) for mask in found.values())


# Which weights ------------------------------------------------------------------------------------------------------------


def recorded_draws(loss):
    """The draws that the loss makes from now on."""
    made, original = [], loss.draw

    def draw(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    loss.draw = draw
    return made


def test_dapds_masks_are_the_largest_products_over_both_critics_together():
    update, schedule = dapd()
    batch, draws = transitions(), recorded_draws(update.loss)
    (network,) = (each for each in schedule._networks if each.group == "qvalue_network_params")
    scored = schedule._gradients(network, slice(None), None, batch, 100)
    loss, _ = update.loss.qvalue_loss(batch, draws=draws[-1])
    params = [update.loss.qvalue_network_params.get(path[1:]) for path in network.paths]
    gradients = torch.autograd.grad(loss, params)
    for gradient, value in zip(gradients, scored.values(), strict=True):
        torch.testing.assert_close(gradient, value)
    scores = torch.cat([(p * g).abs().flatten() for p, g in zip(params, gradients, strict=True)])
    schedule.step(batch, 100)
    got = torch.cat([update.state[("params", *network.mask_path(path))].flatten() for path in network.paths])
    assert got.sum() == round(0.2 * len(got))
    assert scores[got].min() > scores[~got].max()


def test_the_gradient_of_the_dense_network_and_of_the_masked_one_are_what_autograd_says():
    """At the weights as they enter the network: outside the mask too, where autograd's own gradient of a weight is zero."""
    update, schedule = dapd(method="static", layers="uniform", density=0.5)
    batch, draws = transitions(), recorded_draws(update.loss)
    network = schedule._networks[1]
    assert network.group == "qvalue_network_params"
    chosen = network.masks(update)
    masked = schedule._gradients(network, slice(None), chosen, batch, 7)
    loss, _ = update.loss.qvalue_loss(batch, draws=draws[-1])
    own = torch.autograd.grad(loss, [update.loss.qvalue_network_params.get(path[1:]) for path in network.paths])
    for gradient, (path, value) in zip(own, masked.items(), strict=True):
        torch.testing.assert_close(gradient, value * chosen[path])
        assert (value[~chosen[path]] != 0).any()
    # Nudge one weight that is asleep: the loss of the network with this one connection more changes by its gradient.
    path = network.paths[0]
    index = tuple((~chosen[path]).nonzero()[0].tolist())
    effective = weights(update)["module.0.masks"]
    kept_mask, kept_weight = chosen[path].clone(), effective.clone()
    values = []
    for nudge in (-NUDGE, NUDGE):
        chosen[path][index] = True
        effective[index] = nudge
        with torch.no_grad():
            chosen[path].copy_(kept_mask)
            target = update.loss.compute_target(batch, draws=draws[-1])
            chosen[path][index] = True
            value = update.loss.value(batch, batch["action"], torch.arange(2))
        values.append(((value - target) ** 2).sum(0).mean().item())
        chosen[path].copy_(kept_mask)
        effective.copy_(kept_weight)
    assert (values[1] - values[0]) / (2 * NUDGE) == pytest.approx(masked[path][index].item(), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("method", ["saliency", "rigl", "set", "static"])
@pytest.mark.parametrize("layers", ["global", "erk", "uniform"])
def test_exactly_as_many_weights_are_kept_after_every_change(method, layers):
    if layers == "global" and method != "saliency":
        layers = "erk"
    update, schedule = dapd(method=method, layers=layers)
    total = sum(mask.numel() for mask in masks(update).values())
    counts = set()
    for frames in range(100, 600, 100):
        update(transitions(seed=frames))
        metrics = schedule.step(transitions(seed=frames), frames)
        counts.add(kept(masks(update)))
        assert bool(metrics) == (method != "static" or frames == 100)
    assert len(counts) == 1
    assert counts.pop() == pytest.approx(0.2 * total, abs=4)


def test_changes_are_due_at_intervals_of_frames_until_the_end():
    _, schedule = dapd(method="set", interval=100, end=450)
    due = [frames for frames in range(10, 700, 10) if schedule.step(transitions(), frames)]
    assert due == [10, 100, 200, 300, 400]


def test_overlap_and_density_are_those_of_the_masks():
    update, schedule = dapd(method="set", fraction=0.3)
    before = {
        f"{network}.{name}": mask.clone() for network in ("actor", "qvalue") for name, mask in masks(update, network).items()
    }
    metrics = schedule.step(transitions(), 100)
    after = {f"{network}.{name}": mask for network in ("actor", "qvalue") for name, mask in masks(update, network).items()}
    assert metrics["masks/overlap"] == pytest.approx(mask_overlap(before, after))
    assert metrics["masks/density"] == pytest.approx(0.2, abs=0.01)
    assert 0.4 < metrics["masks/overlap"] < 0.7


def test_subnetworks_of_one_network_follow_their_own_scores():
    """Under RigL's gradient of the masked network they stay apart; under the dense network's they become one."""
    update, schedule = omnet(method="rigl", layers="uniform")
    for frames in (100, 200):
        update(transitions(seed=frames))
        schedule.step(transitions(seed=frames), frames)
    assert not any(torch.equal(mask[0], mask[1]) for mask in masks(update).values())
    update, schedule = omnet(method="saliency")
    schedule.step(transitions(), 100)
    overlap = [mask_overlap({"m": mask[0]}, {"m": mask[1]}) for mask in masks(update).values()]
    assert np.mean(overlap) > 0.8


# Who sees them ------------------------------------------------------------------------------------------------------------


def test_target_actor_and_extracted_networks_have_the_new_masks_at_the_next_call():
    update, schedule = dapd()
    batch = transitions()
    schedule.step(batch, 100)
    torch.manual_seed(5)
    fresh, _ = dapd(seed=5)
    fresh.loss.load_state_dict(update.loss.state_dict())
    draws = update.loss.draw(batch, torch.Generator().manual_seed(1))
    for name in ("qvalue_loss", "actor_loss"):
        assert torch.equal(getattr(update.loss, name)(batch, draws=draws)[0], getattr(fresh.loss, name)(batch, draws=draws)[0])
    plain = update.loss.actor_network.extract(0)
    zeros = sum(int((p == 0).sum()) for p in plain.parameters() if p.ndim == 2)
    assert zeros >= 0.75 * sum(p.numel() for p in plain.parameters() if p.ndim == 2)


@pytest.mark.parametrize("method", ["saliency", pytest.param("rigl", marks=pytest.mark.slow)])
def test_compiled_and_eager_agree_and_nothing_is_compiled_again(method, monkeypatch):
    runs, compilations, translate = {}, [], compiled_module.translate
    monkeypatch.setattr(compiled_module, "translate", lambda *args: compilations.append(args) or translate(*args))
    for compiled in (False, True):
        update, schedule = dapd(compile=compiled, method=method)
        generator = torch.Generator().manual_seed(3)
        for i in range(1, 7):
            batch = transitions(seed=i)
            update(batch, generator=generator)
            schedule.step(batch, 100 * i)
        runs[compiled] = update
    assert len(runs[True]._code) == 1
    assert len(compilations) == 2  # the critic's step and the actor's, before the masks changed
    assert kept(masks(runs[True])) == kept(masks(runs[False]))
    for name, mask in masks(runs[False]).items():
        assert (mask == masks(runs[True])[name]).float().mean() > 0.95  # a rounding error may swap two that are nearly equal
    if method == "saliency":
        got, expected = (runs[c].state["params", "qvalue_network_params"] for c in (True, False))
        for key, value in expected.items(True, True):
            if key[-1] == "bias":
                torch.testing.assert_close(got[key], value, atol=2e-3, rtol=0.1)


# Weights and moments --------------------------------------------------------------------------------------------------------


def test_a_weight_that_sleeps_keeps_its_value_and_does_not_move():
    update, schedule = dapd()
    update(transitions())
    schedule.step(transitions(), 100)
    asleep = {name: ~mask for name, mask in masks(update).items()}
    before = {name: weight.clone() for name, weight in weights(update).items()}
    for i in range(5):
        update(transitions(seed=i))
    for name, weight in weights(update).items():
        assert torch.equal(weight[asleep[name]], before[name][asleep[name]])
        assert (weight[asleep[name]] != 0).any()
        assert not torch.equal(weight[~asleep[name]], before[name][~asleep[name]])
    for network in schedule._networks:
        for path, moments in network.moments(update).items():
            for moment in moments:
                assert (moment[~network.masks(update)[path].view(moment.shape)] == 0).all()


def test_without_a_reset_of_moments_a_sleeping_weight_drifts():
    update, schedule = dapd(reset_moments=False)
    update(transitions())
    schedule.step(transitions(), 100)
    asleep = ~masks(update)["module.0.masks"]
    before = weights(update)["module.0.masks"].clone()
    update(transitions(seed=1))
    assert not torch.equal(weights(update)["module.0.masks"][asleep], before[asleep])


@pytest.mark.parametrize(("grown", "zero"), [("kept", False), ("zero", True)])
def test_a_weight_that_comes_has_the_value_that_the_option_says(grown, zero):
    update, schedule = dapd(method="set", grown_weights=grown)
    before = {name: mask.clone() for name, mask in masks(update).items()}
    schedule.step(transitions(), 100)
    for name, mask in masks(update).items():
        came = weights(update)[name][mask & ~before[name]]
        assert len(came) == 0 or bool((came == 0).all()) == zero


# Freezing -------------------------------------------------------------------------------------------------------------------


def test_masks_are_frozen_by_overlap_by_return_or_not_at_all():
    batch = transitions()
    update, schedule = dapd(freeze_overlap=0.99)
    for frames in (100, 200, 300):
        assert schedule.step(batch, frames)
    assert schedule.frozen_at is None
    update, schedule = dapd(freeze_overlap=0.3)
    assert schedule.step(batch, 100)
    assert schedule.frozen_at is None  # the first masks have none before them
    assert schedule.step(batch, 200)["masks/overlap"] >= 0.3
    assert schedule.frozen_at == 200
    frozen = {name: mask.clone() for name, mask in masks(update).items()}
    update(batch)
    assert schedule.step(transitions(seed=9), 10_000) == {}
    assert all(torch.equal(mask, frozen[name]) for name, mask in masks(update).items())
    assert "frozen at frame" in repr(schedule)

    update, schedule = dapd(freeze_return=50.0)
    assert schedule.step(batch, 100, evaluation=50.0)
    assert schedule.step(batch, 200, evaluation=50.5) == {}
    assert schedule.frozen_at == 200


# State ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"average_decay": 0.9}, {"method": "rigl"}, {"method": "set"}, {"freeze_overlap": 0.1}])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(options, tmp_path):
    def run(update, schedule, generator, numbers):
        for i in numbers:
            update(transitions(seed=i), generator=generator)
            schedule.step(transitions(seed=i), 100 * i)

    whole, schedule = dapd(**options)
    run(whole, schedule, torch.Generator().manual_seed(2), range(1, 9))
    first, own = dapd(**options)
    generator = torch.Generator().manual_seed(2)
    run(first, own, generator, range(1, 5))
    torch.save({"update": first.state_dict(), "schedule": own.state_dict()}, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    second, other = dapd(seed=77, **options)
    second.load_state_dict(stored["update"])
    other.load_state_dict(stored["schedule"])
    run(second, other, generator, range(5, 9))
    assert other.frozen_at == schedule.frozen_at
    for key, value in whole.state["params"].items(True, True):
        assert torch.equal(value, second.state["params"][key]), key


def test_the_global_generator_stays_where_it_was():
    _, schedule = dapd()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    schedule.step(transitions(), 100)
    assert torch.equal(before, torch.get_rng_state())


def test_a_change_reads_the_newest_of_several_batches():
    batches = torch.stack([transitions(seed=1), transitions(seed=2)])
    several, schedule = dapd()
    schedule.step(batches, 100)
    one, schedule = dapd()
    schedule.step(transitions(seed=2), 100)
    assert all(torch.equal(mask, masks(one)[name]) for name, mask in masks(several).items())


# Masks of an ensemble -------------------------------------------------------------------------------------------------------


def test_an_ensemble_under_masks_is_its_networks_with_masked_weights():
    net = EnsembleMLP(in_features=4, out_features=2, num_cells=[8], num_subnets=3, sparsity=[0.0, 0.5], generator=0)
    x = torch.randn(6, 4)
    answers = net(x, torch.arange(3)[:, None])
    for k in range(3):
        torch.testing.assert_close(net.extract(k)(x), answers[k])
        assert torch.equal(net.extract(k)[2].weight, net[2].weight[k] * net[2].masks[k])
    assert "2.masks" in net.state_dict()
    assert "2.masks" not in EnsembleMLP(in_features=4, out_features=2, num_cells=[8]).state_dict()
    other = copy.deepcopy(net)
    net[2].masks.fill_(True)
    assert not torch.equal(net(x, 0), other(x, 0))


def test_a_layer_that_loses_every_weight_is_said_and_units_without_inputs_are_counted():
    update, schedule = dapd(density=0.01)
    with pytest.warns(UserWarning, match=r"^\d+ layers? and \d+ units of the subnetworks keep no weight .* raise density=0.01"):
        metrics = schedule.step(transitions(), 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        schedule.step(transitions(), 200)
    dead = sum(int((~mask.any(-1)).sum()) for of in ("actor", "qvalue") for mask in masks(update, of).values())
    assert metrics["masks/units_without_inputs"] == dead > 10
    assert metrics["masks/layers_without_weights"] > 0


# Bad input ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snip"}, "method must be one of 'saliency', 'rigl'"),
        ({"layers": "er"}, "layers must be one of"),
        ({"layers": "global", "method": "set"}, "layers must be 'erk' or 'uniform' with method='set'"),
        ({"scored_under": "mine"}, "scored_under must be one of 'dense', 'own', got 'mine'"),
        ({"scored_by": "actor"}, "scored_by must be one of 'critic', 'both'"),
        ({"density": 0.0}, r"density must be in \(0, 1\]"),
        ({"interval": 0}, "interval and end must be at least 1"),
        ({"end": 0}, "interval and end must be at least 1"),
        ({"grown_weights": "random"}, "grown_weights must be one of 'kept', 'zero'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        dapd(**options)


def test_a_network_without_masks():
    loss = OMNetSACLoss(
        make_actor(*SPECS, network_class=EnsembleMLP, num_subnets=1, **NETWORK),
        make_qvalue(*SPECS, network_class=EnsembleMLP, **NETWORK),
    )
    with pytest.raises(ValueError, match="no network of the loss has weights with masks"):
        MaskSchedule(Update(loss, compile=False), density=0.5)


def test_scores_that_are_not_finite():
    update, schedule = dapd()
    update.state["params", "qvalue_network_params", "module", "0", "weight"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores must be finite"):
        schedule.step(transitions(), 100)


# Scores ---------------------------------------------------------------------------------------------------------------------


def test_dapds_mask_on_a_toy_regression_is_the_one_computed_in_numpy():
    """A critic w2 relu(w1 x + b1) + b2 of the reward, with a squared error."""
    torch.manual_seed(2)
    network = {"num_cells": (6,), "layer_norm": False, "num_subnets": 1, "sparsity": 0.0}
    loss = OMNetSACLoss(make_actor(*SPECS, **network), make_qvalue(*SPECS, network_class=EnsembleMLP, **network))
    loss.make_value_estimator(gamma=0.0)  # the target is the reward
    update = Update(loss, compile=False)
    batch = transitions(32)
    value = {name: tensor[0].double().numpy() for name, tensor in weights(update).items()}
    bias = {name: update.state["params", "qvalue_network_params", *name.split(".")[:-1], "bias"][0] for name in value}
    (first, second), (b1, b2) = value.values(), (tensor.double().numpy() for tensor in bias.values())
    x = torch.cat([batch["observation"], batch["action"]], -1).double().numpy()
    before = x @ first.T + b1
    hidden = np.maximum(before, 0)
    error = 2 * (hidden @ second.T + b2 - batch["next", "reward"].double().numpy()) / len(x)
    gradients = [((error @ second) * (before > 0)).T @ x, error.T @ hidden]
    scores = np.concatenate([np.abs(w * g).ravel() for w, g in zip((first, second), gradients, strict=True)])
    expected = np.zeros(len(scores), dtype=bool)
    expected[np.argsort(-scores, kind="stable")[: round(0.3 * len(scores))]] = True
    MaskSchedule(update, density=0.3).step(batch, 100)
    got = np.concatenate([mask.flatten().numpy() for mask in masks(update).values()])
    assert (got == expected).all()
    assert got.sum() == 14


@pytest.mark.parametrize(("method", "begin", "end"), [("saliency", 20, 20), ("rigl", 1, None)])
def test_a_linear_problem_keeps_the_inputs_that_are_used(method, begin, end):
    """A reward that two of seven inputs make.

    DAPD's masks come after some updates of the dense network, and are frozen: once the inputs that are used explain everything,
    their gradient is 0, and a weight that sleeps with another value than 0 has the larger score of the dense network.
    """
    torch.manual_seed(0)
    network = {"layer_norm": False, "num_subnets": 1, "sparsity": 0.0}
    loss = OMNetSACLoss(make_actor(*SPECS, num_cells=(8,), **network), make_qvalue(*SPECS, num_cells=(), **network))
    loss.make_value_estimator(gamma=0.0)
    update = Update(loss, lr=3e-2, compile=False)
    schedule = MaskSchedule(update, density=2 / 7, method=method, interval=10, end=end)
    for i in range(1, 201):
        batch = transitions(64, seed=i)
        batch["next", "reward"] = 2 * batch["observation"][:, 1:2] - 2 * batch["action"][:, :1]
        update(batch)
        if i >= begin:
            schedule.step(batch, i)
    (mask,) = masks(update).values()
    assert mask.flatten().nonzero().flatten().tolist() == [1, 5]


def test_scores_under_a_subnetworks_own_masks_differ_and_those_of_the_dense_network_do_not():
    batch = transitions()
    for under, equal in (("own", False), ("dense", True)):
        update, schedule = omnet(scored_under=under, layers="uniform")
        overlap = schedule.step(batch, 100)["masks/overlap_subnets"]
        first, second = (torch.cat([mask[k].flatten() for mask in masks(update).values()]) for k in (0, 1))
        assert torch.equal(first, second) == equal
        assert (overlap == pytest.approx(1)) == equal


def test_the_score_of_a_subnetworks_own_masks_is_its_gradient_times_the_weight():
    update, schedule = omnet(scored_under="own")
    batch, draws = transitions(), recorded_draws(update.loss)
    network = next(each for each in schedule._networks if each.role == "critic")
    chosen = {path: mask[1].clone() for path, mask in network.masks(update).items()}
    found = schedule._gradients(network, 1, chosen, batch, 100)
    assert draws[-1]["critic"].tolist() == [1]
    assert set(draws[-1]["target"].tolist()) == {1}
    loss, _ = update.loss.qvalue_loss(batch, draws=draws[-1])
    own = torch.autograd.grad(loss, [update.loss.qvalue_network_params.get(path[1:]) for path in network.paths])
    for gradient, (path, value) in zip(own, found.items(), strict=True):
        torch.testing.assert_close(gradient, value * chosen[path])


def test_the_actors_loss_scores_the_critic_too_if_asked():
    """As the released code, whose gradient of the actor's loss stays in the critic's."""
    batch = transitions()
    update, own = dapd()
    _, both = dapd(scored_by="both")
    draws = recorded_draws(update.loss)
    network = own._networks[1]
    critic = own._gradients(network, slice(None), None, batch, 100)
    both.update = update
    summed = both._gradients(network, slice(None), None, batch, 100)
    action = update.loss.actor_loss(batch, draws=draws[-1])[1]["action"]
    value = update.loss.value(batch, action, torch.arange(2)).mean()
    actors = torch.autograd.grad(-value, [update.loss.qvalue_network_params.get(path[1:]) for path in network.paths])
    for gradient, (path, total) in zip(actors, summed.items(), strict=True):
        torch.testing.assert_close(total, critic[path] + gradient)


def test_a_batch_is_asked_for_only_where_masks_are_scored():
    asked = []

    def batch():
        asked.append(None)
        return transitions()

    for method, expected in (("saliency", 1), ("rigl", 1), ("set", 0), ("static", 0)):
        asked.clear()
        _, schedule = dapd(method=method)
        for frames in (100, 150):
            schedule.step(batch, frames)
        assert len(asked) == expected, method


def test_no_freeze_rule_counts_before_the_end_of_the_warm_up():
    _, schedule = dapd(freeze_overlap=0.1, freeze_return=0.0, warm_up_frames=300)
    for frames in (100, 200):
        assert schedule.step(transitions(), frames, evaluation=1.0)
    assert schedule.step(transitions(), 300, evaluation=1.0) == {}
    assert schedule.frozen_at == 300


def pathways(loss_class, critics=2, **kwargs):
    """Two tasks, whose critics are masks 2t and 2t + 1."""
    torch.manual_seed(0)
    make = make_actor if loss_class is OMNetSACLoss else make_deterministic_actor
    nets = {"sparsity": [0.0, 0.5, 0.5], **NETWORK}
    actor, qvalue = make(*SPECS, num_subnets=2, **nets), make_qvalue(*SPECS, num_subnets=2 * critics, **nets)
    update = Update(loss_class(actor, qvalue, choose="batch"), lr=1e-3, compile=False)
    return update, MaskSchedule(update, **{"density": 0.5, "interval": 100, **kwargs})


def rows(*seeds):
    batch = torch.stack([transitions(seed=seed) for seed in seeds])
    return batch.set("subnet", torch.arange(len(seeds))[:, None].expand(batch.shape))


@pytest.mark.parametrize("loss_class", [OMNetSACLoss, OMNetTD3Loss])
def test_a_tasks_masks_are_chosen_by_its_own_transitions(loss_class):
    """In a single shot: other transitions of the second task change its masks alone; a task's two critics differ."""
    found = []
    for seeds in ((1, 2), (1, 3)):
        update, schedule = pathways(loss_class)
        schedule.step(rows(*seeds), 0)
        found.append({name: {key: mask.clone() for key, mask in masks(update, name).items()} for name in ("qvalue", "actor")})
        assert kept(masks(update)) == 4 * round(0.5 * kept({k: m[0] | True for k, m in masks(update).items()}))
    for name, count in (("qvalue", 2), ("actor", 1)):
        one, other = (torch.cat([mask.flatten(1) for mask in each[name].values()], 1) for each in found)
        assert torch.equal(one[:count], other[:count])
        assert all(not torch.equal(one[k], other[k]) for k in range(count, 2 * count))
    critics = torch.cat([mask.flatten(1) for mask in found[0]["qvalue"].values()], 1)
    assert not torch.equal(critics[0], critics[1])


def test_the_score_of_a_tasks_critic_is_the_gradient_of_its_own_loss_on_its_half_of_the_row():
    update, schedule = pathways(OMNetSACLoss, scored_under="own")
    batch, draws = rows(1, 2), recorded_draws(update.loss)
    network = next(each for each in schedule._networks if each.role == "critic")
    own = {path: mask[3].clone() for path, mask in network.masks(update).items()}
    found = schedule._gradients(network, 3, own, batch, 100)
    for mask in network.masks(update).values():  # its target is its own too
        mask[2].copy_(mask[3])
    loss, _ = update.loss.qvalue_loss(batch[1:, 1::2], draws=draws[-1])
    expected = torch.autograd.grad(loss, [update.loss.qvalue_network_params.get(path[1:]) for path in network.paths])
    for gradient, (path, value) in zip(expected, found.items(), strict=True):
        torch.testing.assert_close(gradient, value * own[path])


def test_masks_of_tasks_follow_their_data_until_the_end_and_need_a_row_of_each():
    update, schedule = pathways(OMNetTD3Loss, interval=2, end=4)
    changes = []
    for i in range(8):
        changes.append(bool(schedule.step(rows(i, i + 100), i)))
        update(rows(i, i + 100))
    assert changes == [True, False, True, False, True, False, False, False]
    with pytest.raises(ValueError, match="one row of each task, got of task 1 0 with 64 transitions"):
        pathways(OMNetTD3Loss)[1].step(rows(1), 0)

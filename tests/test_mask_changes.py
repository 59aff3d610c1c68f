"""Masks that change within a run: at which frames, on which transitions, what is logged, and what is refused."""

import contextlib
import itertools
import math

import pytest
import torch
from test_algorithms import compose, options_of, session
from test_resume import Crash, Stopping, differing, result, untimed
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from omnet_torchrl.training import Trainer
from omnet_torchrl.training.options import to_config
from omnet_torchrl.updates.masked_networks import masked_networks

pytestmark = pytest.mark.filterwarnings("ignore:.*keep no weight")


def run(path, name="dapd", **options):
    trainer = compose(path, options_of(name, **options), Stopping([], 10**9))
    return trainer, trainer.run()


def masks_of(trainer):
    params = trainer.update.state["params"]
    return {key: value.clone() for key, value in params.items(True, True) if key[-1] == "masks"}


def logged(trainer, name):
    return {frames: value for frames, key, value in trainer.reporter.rows if key == name}


def test_masks_change_at_set_frames_and_are_counted(tmp_path):
    """The first ones with the first updates, at frame 21."""
    trainer, status = run(tmp_path)
    assert status == "finished"
    overlap, density = logged(trainer, "masks/overlap"), logged(trainer, "masks/density")
    assert list(density) == [21, 30, 40, 50, 60]
    assert list(overlap) == [30, 40, 50, 60]  # of the masks of frame 30 with those before
    assert all(value == pytest.approx(0.5, abs=0.01) for value in density.values())
    networks = masked_networks(trainer.update)
    for network in networks:
        for i, mask in enumerate(network.masks(trainer.update).values()):
            assert logged(trainer, f"masks/density_{network.role}_{i}")[60] == pytest.approx(mask.float().mean().item())
    assert sum(len(network.paths) for network in networks) == 6
    assert not logged(trainer, "masks/overlap_subnets")
    assert logged(trainer, "subnets/q_std")


def test_the_masks_of_omnet_are_compared_with_one_another(tmp_path):
    trainer, _ = run(tmp_path, "omnet_adaptive")
    overlaps = logged(trainer, "masks/overlap_subnets")
    assert list(overlaps) == [21, 30, 40, 50, 60]
    assert 0.3 < overlaps[60] < 1
    masks = masks_of(trainer)["actor_network_params", "module", "0", "network", "0", "masks"]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1
    assert masks.flatten(1).sum(1).unique().numel() == 1  # each keeps equally many


@pytest.mark.parametrize(
    ("name", "topology", "network"),
    [
        ("omnet_td3", {"method": "rigl"}, {"sparsity": 0.5}),
        pytest.param("td3", {"method": "saliency"}, {"actor": "sparse", "sparsity": 0.5}, marks=pytest.mark.slow),
        pytest.param("omnet_dqn", {"method": "set"}, {"sparsity": 0.5}, marks=pytest.mark.slow),
        ("dqn", {"method": "saliency", "layers": "erk"}, {"sparsity": 0.5}),
        pytest.param("bootstrapped_dqn", {"method": "rigl"}, {"sparsity": 0.5}, marks=pytest.mark.slow),
        ("sr_sac", {"method": "saliency", "scored_by": "both"}, {"actor": "sparse", "sparsity": 0.5}),
    ],
)
def test_a_killed_run_of_any_loss_goes_on_with_changing_masks(name, topology, network, tmp_path):
    base = options_of(name)["network"]
    more = {"topology": {"interval": 10, **topology}, "network": {**base, **network}}
    whole, rows, parts = tmp_path / "whole", [], []
    trainer = session(whole, name, rows, **more)
    for stop in (47, 10**9):
        session(tmp_path / "parts", name, parts, stop, **more)
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(whole)) == []
    assert len([1 for _, key, _ in rows if key == "masks/density"]) > 3
    assert 0.4 < trainer.last["masks/density"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapd", "omnet_adaptive"])
def test_a_compiled_run_that_is_killed_goes_on_as_if_it_had_not_been(name, tmp_path):
    rows, parts = [], []
    trainer = session(tmp_path / "whole", name, rows, compile=True)
    for stop in (43, 10**9):
        session(tmp_path / "parts", name, parts, stop, compile=True)
    assert untimed(parts) == untimed(rows)
    assert differing(result(tmp_path / "parts"), result(tmp_path / "whole")) == []
    assert len(trainer.update._code) == 1
    eager = []
    session(tmp_path / "eager", name, eager)
    overlaps = [[value for _, key, value in each if key == "masks/overlap"] for each in (rows, eager)]
    assert overlaps[0] == pytest.approx(overlaps[1], abs=0.1)  # a rounding error may swap two weights that are nearly equal


def test_a_row_without_a_schedule_keeps_its_masks_and_its_checkpoint(tmp_path):
    trainer, _ = run(tmp_path, "omnet")
    assert "topology" not in trainer._state()
    assert not logged(trainer, "masks/density")


# Which transitions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [30, 90])
def test_masks_are_scored_on_the_newest_transitions_also_where_the_buffer_has_gone_round(stored, tmp_path):
    trainer, _ = run(tmp_path, topology={"recent_frames": 5})
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(40))
    numbered = trainer.buffer.storage.get(torch.zeros(1, dtype=torch.int64))
    for i in range(stored):
        numbered["next", "reward"] = torch.full((1, 1), float(i))
        buffer.extend(numbered)
    trainer.masks.buffer = buffer
    drawn = trainer.masks._recent(30)["next", "reward"].flatten().tolist()
    assert len(drawn) == trainer.config.optim.batch_size
    assert set(drawn) <= set(range(stored - 5, stored))
    assert drawn == trainer.masks._recent(30)["next", "reward"].flatten().tolist()  # the frame's number draws
    assert drawn != trainer.masks._recent(31)["next", "reward"].flatten().tolist()


# Freezing -------------------------------------------------------------------------------------------------------------------


def test_a_freeze_rule_that_is_never_met_is_said_at_the_end(tmp_path):
    (tmp_path / "first").mkdir()
    trainer, _ = run(tmp_path / "first", topology={"freeze_overlap": 1.0, "end": None})
    (said,) = (text for text in trainer.reporter.said if "never frozen" in text)
    newest = list(logged(trainer, "masks/overlap").values())[-1]
    assert f"(topology.freeze_overlap=1, newest {newest:.3g}): lower it, or give topology.end" in said
    trainer.config.topology.end, said = 60, []
    trainer.masks.say_if_never_frozen({}, said.append)
    assert said[0].endswith("newest nan): lower it.")
    (tmp_path / "second").mkdir()
    trainer, _ = run(tmp_path / "second", topology={"freeze_overlap": 0.01, "warm_up_frames": 35, "end": None})
    assert trainer.masks.schedule.frozen_at == 40
    assert list(logged(trainer, "masks/overlap")) == [30, 40]
    assert not any("never frozen" in text for text in trainer.reporter.said)


def test_masks_are_frozen_by_the_return_of_an_evaluation(tmp_path):
    rules = {"freeze_return": 0.5, "freeze_overlap": None, "warm_up_frames": 0, "end": None}
    trainer, _ = run(tmp_path, topology=rules)  # of a pole that falls after a few steps, at frame 30
    assert trainer.masks.schedule.frozen_at == 31
    assert list(logged(trainer, "masks/density")) == [21, 30]


def test_masks_stay_after_the_end(tmp_path):
    trainer = compose(tmp_path, options_of("dapd", topology={"end": 40}), Stopping([], 45))
    with contextlib.suppress(Crash):
        trainer.run()
    before = masks_of(trainer)
    trainer.reporter.stop = 10**9
    trainer.run()
    assert all(torch.equal(mask, before[key]) for key, mask in masks_of(trainer).items())


# What is refused --------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_own_schedule_only(tmp_path):
    session(tmp_path, "dapd", [], 40)
    with pytest.raises(ValueError, match=r"other options: topology.interval was 10, now 20\.$"):
        session(tmp_path, "dapd", [], topology={"interval": 20})
    with pytest.raises(ValueError, match=r"other options: topology.method was saliency, now set"):
        session(tmp_path, "dapd", [], topology={"method": "set", "recent_frames": 1_000})


def test_scores_that_are_not_finite_end_the_run(tmp_path):
    trainer = compose(tmp_path, options_of("dapd", log_interval=1_000), Stopping([], 39))
    with contextlib.suppress(Crash):
        trainer.run()
    trainer.reporter.stop = 10**9
    with torch.no_grad():
        next(trainer.update.loss.qvalue_network_params.parameters()).fill_(math.nan)
    assert trainer.run() == "diverged"
    assert any("diverged: at frame 40, scores must be finite" in text for text in trainer.reporter.said)


def test_the_trainer_is_given_the_schedule_that_the_options_name(tmp_path):
    trainer = compose(tmp_path, options_of("dapd"), Stopping([], 10**9))
    parts = (trainer.collector, trainer.buffer, trainer.update, trainer.evaluate, trainer.checkpointer, trainer.reporter)
    with pytest.raises(ValueError, match=r"a schedule of masks where topology.method names one, got topology.method=saliency"):
        Trainer(*parts, trainer.config)


WRONG = [
    ({"topology": {"methd": "set"}}, "unknown option 'topology.methd'; did you mean 'topology.method'?"),
    ({"topology": {"method": "snip"}}, "topology.method must be one of saliency, rigl, set, static, got 'snip'; did you mean"),
    ({"topology": {"interval": 0}}, r"topology.interval must be in \[1, 1e12\], got 0"),
    ({"topology": {"freeze_overlap": 1.5}}, r"topology.freeze_overlap must be in \(0, 1\], got 1.5"),
    ({"topology": {"fraction": 0.3}}, "topology.fraction=0.3 is read only with topology.method=rigl or set, got .*=saliency"),
    ({"topology": {"layers": "local"}}, "topology.layers must be one of global, erk, uniform, got 'local'"),
    (
        {"algorithm": "rigl", "topology": {"layers": "global"}},
        "topology.layers must be erk or uniform with topology.method=rigl",
    ),
    ({"algorithm": "static_erk", "topology": {"end": 9}}, "topology.end=9 is read only with .*, got topology.method=static"),
    ({"algorithm": "omnet", "topology": {"interval": 9}}, "topology.interval=9 is read only with .*, got topology.method=null"),
    ({"topology": {"freeze_return": 9.0}, "eval": {"episodes": 0}}, "freeze_return=9 needs evaluations, got eval.episodes=0"),
    ({"topology": {"end": 4_000}}, "topology.end must be above init_random_frames=5000, .* got 4000: raise it"),
    ({"network": {"sparsity": [0.5, 0.5, 0.5]}}, "network.sparsity must be one number with topology.method=saliency"),
    ({"network": {"masks": "unit"}}, "network.masks must be weight with topology.method=saliency, .* got unit"),
    ({"network": {"dense_input": True}}, "network.dense_input must be false with topology.method=saliency, .* got True"),
    ({"algorithm": "sac", "network": {"actor": "sparse"}}, "network.actor=sparse needs topology.method, .* got null"),
    (
        {"algorithm": "td3", "topology": {"method": "saliency", "scored_by": "both"}},
        "topology.scored_by must be critic with algorithm=td3",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        to_config({"algorithm": "dapd", **options})


def test_the_small_row_has_as_many_parameters_as_the_sparse_ones_have_active():
    def active(name, sparse):
        network = to_config({"algorithm": name}).network
        cells, total = network.num_cells, 0
        for inputs, outputs, copies in ((17, 12, 1), (23, 1, 2)):  # HalfCheetah: an actor and two critics
            sizes = [inputs, *cells, outputs]
            weights = sum(a * b for a, b in itertools.pairwise(sizes))
            total += copies * ((1 - network.sparsity if sparse else 1) * weights + sum(sizes[1:]))
        return total

    assert active("sac_small", False) == pytest.approx(active("dapd", True), rel=0.02)

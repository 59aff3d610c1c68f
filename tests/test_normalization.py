"""Running statistics of observations: their numbers, the networks that read them, and the runs that keep them."""

import contextlib
import copy
import io
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ACT,
    OBS,
    make_batch,
    small_actor,
    small_deterministic_actor,
    small_qvalue,
    small_qvalue_actor,
    specs,
)
from tensordict import TensorDict
from test_foreign_environments import untimed_records
from test_resume import differing, result
from torch import nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import HardUpdate, SoftUpdate

from omnet_torchrl import (
    CompiledPolicy,
    EnsembleMLP,
    OMNetDQNLoss,
    OMNetSACLoss,
    OMNetTD3Loss,
    RedrawnMLP,
    RunningNormalization,
    UnitMaskedMLP,
    Update,
    make_actor,
    make_qvalue,
)
from omnet_torchrl.training import load_policy
from omnet_torchrl.training.record import reporter
from omnet_torchrl.training.record.checkpoint import Checkpointer, load_replay
from omnet_torchrl.training.record.reporter import Reporter

EXAMPLES = Path(__file__).parent.parent / "examples"


def observations(*batch, seed=0):
    """Far from mean 0 and variance 1, and of several sizes."""
    size = torch.tensor([1e-2, 1.0, 30.0, 1.0, 1.0])
    return torch.randn(*batch, OBS, generator=torch.Generator().manual_seed(seed)) * size + torch.tensor([0.0, 3, -50, 0, 1])


def shown(*batches):
    normalize = RunningNormalization(OBS)
    for batch in batches:
        normalize.update(batch)
    return normalize


def by_hand(observation, seen):
    """What NumPy makes of it."""
    mean, var = seen.double().numpy().mean(0), seen.double().numpy().var(0)
    return torch.from_numpy(np.clip((observation.double().numpy() - mean) / np.sqrt(var + 1e-8), -10, 10)).float()


# The statistics.


def test_statistics_of_literal_numbers():
    normalize = RunningNormalization(2, eps=1.0, clip=1.5)
    normalize.update(torch.tensor([[1.0, -2.0], [3.0, -2.0]]))
    assert (normalize.count.item(), normalize.mean.tolist(), normalize.var.tolist()) == (2, [2, -2], [1, 0])
    normalize.update(torch.tensor([8.0, -2.0]))
    assert (normalize.count.item(), normalize.mean.tolist()) == (3, [4, -2])
    torch.testing.assert_close(normalize.var, torch.tensor([26 / 3, 0], dtype=torch.float64))
    output = normalize(torch.tensor([[6.0, -1.75, 7.0], [99.0, -99.0, -7.0]]))
    torch.testing.assert_close(output, torch.tensor([[2 / math.sqrt(26 / 3 + 1), 0.25, 7.0], [1.5, -1.5, -7.0]]))


@pytest.mark.parametrize("sizes", [[1] * 200, [200], [3, 150, 47]], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_statistics_are_those_of_numpy_however_the_observations_come(sizes, offset):
    seen = observations(200) + offset
    normalize = shown(*seen.split(sizes))
    assert normalize.count == 200
    np.testing.assert_allclose(normalize.mean, seen.double().numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normalize.var, seen.double().numpy().var(0), rtol=1e-9)


def test_leading_dimensions_do_not_matter_and_no_observation_changes_nothing():
    seen = observations(2, 3, 4)
    normalize, flat = shown(seen), shown(seen.flatten(0, 1))
    before = copy.deepcopy(normalize.state_dict())
    normalize.update(seen[:0])
    for name, value in flat.state_dict().items():
        assert torch.equal(value, normalize.state_dict()[name])
        assert torch.equal(value, before[name])


def test_a_single_observation_still_counts_after_twenty_million():
    normalize = shown(observations(10))
    normalize.count.fill_(2e7)
    before = normalize.mean.clone()
    for _ in range(3):
        normalize.update(before.float() + 1)
    assert normalize.count == 2e7 + 3
    torch.testing.assert_close(normalize.mean - before, torch.full((OBS,), 3 / 2e7, dtype=torch.float64), rtol=1e-3, atol=0)


def test_nothing_seen_leaves_observations_as_they_are():
    observation = torch.randn(3, OBS)
    torch.testing.assert_close(RunningNormalization(OBS)(observation), observation)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_observation_that_is_not_finite_leaves_the_statistics_as_they_are(wrong):
    normalize, bad = shown(observations(10)), observations(4)
    before = copy.deepcopy(normalize.state_dict())
    bad[2, 1] = wrong
    with pytest.raises(ValueError, match=r"^observations must be finite, got others in the features \[1\]: they are not taken"):
        normalize.update(bad)
    assert all(torch.equal(value, before[name]) for name, value in normalize.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RunningNormalization(0), ValueError, "num_features must be above 0, got 0"),
        (lambda: RunningNormalization(3, eps=0.0), ValueError, r"eps must be above 0, got 0\.0"),
        (lambda: RunningNormalization(3, clip=-1.0), ValueError, r"clip must be above 0, got -1\.0"),
        (lambda: shown(torch.zeros(4, OBS + 1)), ValueError, r"must have 5 features, got shape \(4, 6\)"),
        (lambda: small_actor(normalize=RunningNormalization(OBS + ACT)), ValueError, "of the observation's 5 features, got 7"),
        (
            lambda: small_actor(normalize=True),
            TypeError,
            "normalize must be a RunningNormalization, .* got bool for a MaskedMLP",
        ),
    ],
)
def test_errors_say_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Networks.

KINDS = {
    "masks": {},
    "units": {"network_class": UnitMaskedMLP},
    "separate": {"network_class": EnsembleMLP, "sparsity": None},
    "redrawn": {"network_class": RedrawnMLP, "num_subnets": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_reads_normalised_observations_and_actions_as_they_are(kind):
    seen, batch = observations(50), make_batch(7).set("observation", observations(7, seed=1))
    for make in (small_actor, small_qvalue):
        torch.manual_seed(0)
        plain = make(**KINDS[kind])
        torch.manual_seed(0)
        network = make(**KINDS[kind], normalize=shown(seen))
        for subnet in (torch.tensor(1), torch.tensor([[0], [2]])):
            found = network(batch.clone().auto_batch_size_(0).set("subnet", subnet))
            expected = plain(
                batch.clone().auto_batch_size_(0).set("observation", by_hand(batch["observation"], seen)).set("subnet", subnet)
            )
            for key in plain.out_keys[:2]:
                if key != "action":
                    torch.testing.assert_close(found[key], expected[key])
        single = network.extract(1)
        (module,) = [each for each in single.modules() if isinstance(each, RunningNormalization)]
        key = plain.out_keys[0]
        before = single(batch.clone())[key]
        torch.testing.assert_close(
            before, plain.extract(1)(batch.clone().set("observation", by_hand(batch["observation"], seen)))[key]
        )
        module.update(observations(9, seed=3))
        assert not torch.equal(single(batch.clone())[key], before), "an extracted network has statistics of its own"
        torch.testing.assert_close(network.extract(1)(batch.clone())[key], before)


# Losses and updates.

LOSSES = {
    "sac": (OMNetSACLoss, small_actor, small_qvalue),
    "td3": (OMNetTD3Loss, small_deterministic_actor, small_qvalue),
    "dqn": (OMNetDQNLoss, small_qvalue_actor, None),
}


def parts(kind, normalize=None):
    """Loss and actor of networks with the same first weights each time."""
    make, make_policy, make_critic = LOSSES[kind]
    torch.manual_seed(0)
    actor = make_policy(normalize=normalize)
    if make_critic is None:
        return make(actor, delay_value=True), actor
    return make(actor, make_critic(normalize=normalize)), actor


def transitions(count, kind, seed=0):
    batch = make_batch(count, seed=seed, done=0.2)
    batch["observation"], batch["next", "observation"] = observations(count, seed=seed), observations(count, seed=seed + 1)
    if kind == "dqn":
        batch["action"] = nn.functional.one_hot(torch.arange(count) % 3, 3)
    return batch


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_updates_are_those_of_networks_that_are_fed_normalised_observations(kind, precision, compile):
    """Over steps between which the statistics change, of compiled code that is compiled once."""
    normalize = RunningNormalization(OBS)
    loss, plain = parts(kind, normalize)[0], parts(kind)[0]
    options = {"lr": 1e-3, "tau": 0.1, "policy_update_delay": 2, "precision": precision}
    update, expected = Update(loss, **options, compile=compile), Update(plain, **options, compile=False)
    seen = torch.zeros(0, OBS)
    for step in range(6):
        new = observations(20, seed=50 + step)
        normalize.update(new)
        seen, batch = torch.cat([seen, new]), transitions(16, kind, seed=step)
        fed = batch.clone()
        for key in ("observation", ("next", "observation")):
            fed[key] = by_hand(batch[key], seen)
        draws = loss.draw(batch, torch.Generator().manual_seed(step))
        found, wanted = update(batch, draws=draws), expected(fed, draws=draws)
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if precision == "float32" else {"rtol": 0.1, "atol": 0.05}
        torch.testing.assert_close(found.to_dict(), wanted.to_dict(), **tolerance)
    assert len(update._code) == int(compile)
    assert not any(name.split(".")[-1] in ("mean", "var", "count") for name, _ in loss.named_parameters())
    assert normalize.count == 120


@pytest.mark.parametrize("kind", LOSSES)
def test_statistics_are_one_for_all_networks_and_only_update_changes_them(kind):
    normalize = shown(observations(20))
    loss, actor = parts(kind, normalize)
    update = Update(loss, lr=1e-2, tau=0.5, compile=False)
    before = copy.deepcopy(normalize.state_dict())
    update(transitions(16, kind))
    update.reset()
    updater = SoftUpdate(loss, tau=0.5) if kind != "dqn" else HardUpdate(loss, value_network_update_interval=1)
    updater.step()
    actor(TensorDict(observation=observations(3), subnet=torch.tensor(0)))
    assert all(torch.equal(value, before[name]) for name, value in normalize.state_dict().items())
    places = {name: value for name, value in loss.state_dict().items() if name.endswith(".mean") and "target" not in name}
    assert len(places) == (1 if kind == "dqn" else 2)
    normalize.update(observations(20, seed=1))
    assert all(torch.equal(value, normalize.mean) for value in places.values())


def test_the_target_network_reads_the_statistics_of_now():
    later = observations(500, seed=9) * 3
    normalize, batch = shown(observations(20)), transitions(16, "dqn")
    loss, fresh = parts("dqn", normalize)[0], parts("dqn", shown(observations(20), later))[0]
    for each in (loss, fresh):
        SoftUpdate(each, tau=0.5)  # somebody moves the targets
    draws = loss.draw(batch)
    first = loss(batch.clone(), draws=draws)["loss"]
    normalize.update(later)
    second = loss(batch.clone(), draws=draws)["loss"]
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh(batch.clone(), draws=draws)["loss"])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", LOSSES)
def test_an_acting_policy_reads_the_statistics_of_now(kind, compile):
    normalize = RunningNormalization(OBS)
    _, actor = parts(kind, normalize)
    policy, td = CompiledPolicy(actor, compile=compile), TensorDict(observation=observations(3), subnet=torch.tensor(1))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        policy.prepare(td)
        for seed in range(3):
            normalize.update(observations(20, seed=seed))
            torch.testing.assert_close(policy(td.clone())["action"], actor(td.clone())["action"])
        assert len(policy._code) == int(compile)
    expected = actor(td.clone().set("observation", observations(3)))
    torch.testing.assert_close(policy(td.clone()).get("loc", expected.get("loc")), expected.get("loc"))


def test_the_state_of_an_update_holds_the_statistics():
    normalize, other = shown(observations(20)), RunningNormalization(OBS)
    update, restored = (Update(parts("sac", each)[0], compile=False) for each in (normalize, other))
    restored.load_state_dict(update.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in normalize.state_dict().items())


@pytest.mark.gpu
def test_statistics_follow_the_network_to_its_device():
    normalize = RunningNormalization(OBS)
    actor, qvalue = (make(*specs(), normalize=normalize, device="cuda") for make in (make_actor, make_qvalue))
    normalize.update(observations(20))
    assert {normalize.mean.device.type, normalize.count.device.type} == {"cuda"}
    update = Update(OMNetSACLoss(actor, qvalue))
    first = update(transitions(16, "sac"))["loss_qvalue"]
    normalize.update(1e3 * observations(20))
    assert (first - update(transitions(16, "sac"))["loss_qvalue"]).abs() > 0


# Runs.

TINY = [
    *("env=InvertedPendulum-v4", "compile=false", "num_threads=1", "device=cpu", "progress=false"),
    *("network.num_cells=[8,8]", "network.sparsity=0.2", "optim.batch_size=8", "total_frames=60", "init_random_frames=21"),
    *("utd_ratio=1", "policy_update_delay=2", "log_interval=10", "eval.interval=60", "eval.episodes=2"),
    *("checkpoint.interval=8", "normalize_observations=true"),
]


def train(script, *arguments):
    """The main job, in this process; what it prints for a person."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(reporter, "learning_curve", lambda path: path)  # nobody looks at it
        patch.setattr(sys, "argv", [str(EXAMPLES / f"{script}.py"), *arguments])
        runpy.run_path(sys.argv[0], run_name="__main__")
    return printed.getvalue()


def newest(folder):
    """The state of the newest checkpoint, and the stored observations."""
    state, files = Checkpointer(folder / "checkpoints").load()
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(60))
    load_replay(buffer, files, state["writer"])
    return state, buffer.storage.get(slice(0, len(buffer)))["observation"]


@pytest.mark.filterwarnings("ignore:.*keep no weight")
@pytest.mark.parametrize("case", [("omnet_sac", 1), ("omnet_td3", 3), ("dapd_sac", 1)], ids=str)
def test_a_run_normalises_by_all_that_it_has_collected_and_resumes_bit_for_bit(case, tmp_path, monkeypatch):
    """The replay buffer has the raw observations, the random first ones too; their statistics are every network's."""
    script, num_envs = case
    options = [*TINY, f"num_envs={num_envs}"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert "normalised by running mean and variance" in train(script, *options, f"folder={whole}")
    state, stored = newest(whole)
    assert len(stored) == 60
    statistics = {name: value for name, value in state["update"]["loss"].items() if name.split(".")[-1] in ("mean", "var")}
    for name, value in statistics.items():
        if not name.startswith("target"):
            expected = getattr(stored.double().numpy(), name.split(".")[-1])(0)
            np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    assert len(statistics) == (8 if script == "omnet_td3" else 6)

    progress = Reporter.progress

    def stop(self, frames, *rest):
        progress(self, frames, *rest)
        if frames >= 43:
            raise RuntimeError("killed")

    monkeypatch.setattr(Reporter, "progress", stop)
    with pytest.raises((RuntimeError, SystemExit)):
        train(script, *options, f"folder={halves}")
    monkeypatch.setattr(Reporter, "progress", progress)
    train(script, f"resume={halves}")
    assert untimed_records(whole / "metrics.csv") == untimed_records(halves / "metrics.csv")
    different = differing(result(whole / "checkpoints"), result(halves / "checkpoints"))
    assert [name for name in different if not name.startswith("/log/")] == []  # whose seconds may have another number of digits


@pytest.mark.parametrize("script", ["omnet_sac", "omnet_td3"])
def test_a_loaded_policy_normalises_as_the_run_did(script, tmp_path):
    train(script, *TINY, f"folder={tmp_path / 'run'}")
    state, stored = newest(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["actor"]["normalize"] is True
    policy = load_policy(tmp_path / "run")
    (normalize,) = [each for each in policy.modules() if isinstance(each, RunningNormalization)]
    np.testing.assert_allclose(normalize.mean, stored.double().numpy().mean(0), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(value, state["policy"][name]) for name, value in policy.state_dict().items())
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for k in range(5):
            single = load_policy(tmp_path / "run", k)
            expected = policy(TensorDict(observation=stored, subnet=torch.tensor(k)))["action"]
            torch.testing.assert_close(single(TensorDict(observation=stored.double()))["action"], expected)
        exported = torch.export.export(single.select_out_keys("action"), (), {"observation": stored[:1]}).module()
        torch.testing.assert_close(exported(observation=stored[:1]), expected[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["env=MinAtar/breakout", "algorithm=dqn"],
            "normalize_observations must be false with env=MinAtar/breakout, whose cells",
        ),
        (
            ["wrappers=[gymnasium.wrappers.NormalizeObservation]"],
            "normalize_observations must be false with NormalizeObservation around InvertedPendulum-v4: leave out the one or",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        train("omnet_sac", *TINY, *arguments, f"folder={tmp_path / 'run'}")
    assert str(raised.value).startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_own_choice(tmp_path):
    train("omnet_sac", *TINY, f"folder={tmp_path / 'run'}")
    with pytest.raises(SystemExit, match="normalize_observations is True, got False"):
        train("omnet_sac", f"resume={tmp_path / 'run'}", "normalize_observations=false")

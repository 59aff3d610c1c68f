"""benchmarks/learning: which cells there are, and that a runner makes each once, whatever interrupts it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rates
import torch
from conftest import make_batch, specs
from experiments import EXAMPLES, EXPERIMENTS, TASKS, Cell, Variant, select
from omegaconf import OmegaConf
from rates import Rate, Rates
from records import SIZES, Record, _is, config_of

from omnet_torchrl.training.build import build
from omnet_torchrl.training.command_line import check_overrides
from omnet_torchrl.training.options import ROWS, TrainConfig, to_config
from omnet_torchrl.training.record.metrics import read_metrics

LEARNING = Path(__file__).parent.parent / "benchmarks" / "learning"
SMALL = [
    *("network.num_cells=[8,8]", "optim.batch_size=8", "compile=false", "init_random_frames=20", "utd_ratio=1"),
    *("policy_update_delay=1", "eval.interval=50", "eval.episodes=1", "eval.bias_episodes=1", "checkpoint.interval=10"),
]


def load(name):
    """A module of benchmarks/learning whose name benchmarks/speed has too."""
    spec = importlib.util.spec_from_file_location(f"learning_{name}", LEARNING / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load("run")


# The cells


def test_the_papers_experiments_have_the_papers_size():
    sizes = {"fig2a": 6 * 4 * 10, "fig2b": 4 * 4 * 10, "fig4": 6 * 10, "fig10": 5 * 4 * 10, "fig11": 3 * 4 * 10}
    assert {name: len(EXPERIMENTS[name].cells()) for name in sizes} == sizes
    assert {cell.frames for cell in select(["all"])} == {
        300_000,
        31_000,
        30_000,
        5_000,
        500_000,
        400_000,
        6_000,
        8_000,
    }  # maze, readings, quick, MinAtar, four tasks, adaptive masks and TD3 in the quick start
    assert len(EXPERIMENTS["table1"].cells()) == 8 * 4 * 10
    assert (len(EXPERIMENTS["controls"].cells()), len(EXPERIMENTS["readings"].cells())) == (10 * 4 * 10, 11 * 2)
    new = {cell.path for cell in EXPERIMENTS["readings"].cells()} - {cell.path for cell in select(["fig2a", "controls"])}
    assert len(new) == 5 * 2
    assert len(select(["fig2a", "fig2b", "table1"])) == (6 + 4 - 1 + 8 - 2) * 4 * 10  # a chosen dropout rate is the row's own


def test_every_cell_is_a_valid_run_and_has_a_folder_of_its_own():
    cells = select(["all"], seeds=[0])
    assert len({cell.path for cell in cells}) == len(cells)
    for cell in cells:
        overrides = cell.variant.overrides(cell.task, 3, 30_000)
        check_overrides(overrides)
        config = to_config({**cell.variant.nested(), "env": cell.task, "total_frames": cell.frames})
        assert config.algorithm == cell.variant.algorithm
    names = {cell.variant.name: cell.variant.label for cell in cells}
    assert {"omnet", "redq", "droq-dropout-0.003", "omnet-num_subnets-2", "redq-observation_offset-0.1"} <= set(names)
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("name", ["controls", "readings"])
def test_dropout_at_the_masks_own_rate_is_a_control(name):
    rate = TrainConfig().network.sparsity
    rows = {variant.name: variant for variant in EXPERIMENTS[name].variants}
    config = config_of(rows[f"sin_droq-dropout-{rate}"], "Hopper-v4")
    assert (config.network.num_subnets, config.network.dropout) == (1, rate)
    variant = rows[f"omnet-dropout-{rate}"]
    network = {**variant.nested()["network"], "num_cells": [16, 16]}
    config = to_config({"algorithm": "omnet", "env": "Hopper-v4", "compile": False, "network": network})
    critic = build(config, *specs()).loss.qvalue_network
    batch = make_batch(6).select("observation", "action")
    batch = batch.expand(2, 6).set("subnet", torch.arange(2)[:, None].expand(2, 6))
    # Without masks, the networks that a target asks differ by the noise of their dropout alone.
    first, second = critic(batch.clone())["state_action_value"]
    assert not torch.isclose(first, second).any()
    critic.eval()
    first, second = critic(batch.clone())["state_action_value"]
    assert torch.equal(first, second)


def test_a_cell_of_several_experiments_is_there_once_and_the_first_seeds_come_first():
    cells = select(["fig2a", "fig2b", "fig3"], tasks=["Hopper-v4"], rows=["omnet", "sac"], seeds=range(2), frames=30_000)
    assert [str(cell.path) for cell in cells] == [
        "Hopper-v4/sac/seed0",
        "Hopper-v4/omnet/seed0",
        "Hopper-v4/sac/seed1",
        "Hopper-v4/omnet/seed1",
    ]
    assert {cell.frames for cell in cells} == {30_000}


@pytest.mark.parametrize("names", [["hopper_30k", "fig2a"], ["fig2a", "hopper_30k"], ["readings", "hopper_30k", "fig2a"]])
def test_a_cell_of_several_experiments_has_the_frames_of_the_longest(names):
    cells = select(names, rows=["omnet"], tasks=["Hopper-v4"])
    assert {cell.frames for cell in cells} == {300_000}
    assert len(cells) == 10


@pytest.mark.parametrize("algorithm", ["droq", "sin_droq"])
@pytest.mark.parametrize("task", TASKS)
def test_the_dropout_rate_of_a_task_is_the_rows_own_cell(algorithm, task):
    rate = ROWS[algorithm].dropout[task]
    (chosen,) = select(["table1"], rows=[f"{algorithm}-dropout-{rate}"], tasks=[task], seeds=[0])
    (own,) = select(["fig2a", "fig2b"], rows=[algorithm], tasks=[task], seeds=[0])
    assert chosen.path == own.path == Path(task, algorithm, "seed0")
    assert config_of(chosen.variant, task).network == config_of(own.variant, task).network
    elsewhere = [other for other in TASKS if ROWS[algorithm].dropout[other] != rate]
    assert {cell.row for cell in select(["table1"], rows=[chosen.variant.name], tasks=elsewhere)} == {chosen.variant.name}


def test_more_seeds_than_an_experiments_own_can_be_asked_for():
    assert {cell.seed for cell in select(["hopper_30k"], seeds=range(4))} == {0, 1, 2, 3}
    assert [cell.seed for cell in select(["fig2a"], rows=["sac"], tasks=["Ant-v4"], seeds=[12])] == [12]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experiments": ["fig2"]}, r"unknown experiment 'fig2'; known are fig2a, .*, all; did you mean fig2"),
        ({"experiments": ["fig2a"], "rows": ["redQ"]}, "unknown row 'redQ'; known are sac, sac_20, redq, .*mean redq"),
        ({"experiments": ["fig4"], "tasks": ["Hopper-v4"]}, "unknown task 'Hopper-v4'; known are Humanoid-v4"),
        ({"experiments": ["fig2a"], "seeds": []}, r"no cell is left of fig2a: expected a seed, .*got seeds \[\]"),
        (
            {"experiments": ["fig2a", "fig5"], "rows": ["sac"], "tasks": ["Maze2D"]},
            r"no cell .* rows \['sac'\], tasks \['Maze2D'\]: leave some out",
        ),
    ],
)
def test_an_unknown_name_lists_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(**arguments)


# The runner


def cell(seed=0, frames=60):
    variant = Variant("sac", "SAC", "sac", tuple(option.split("=", 1) for option in SMALL))
    return Cell(variant, "InvertedPendulum-v4", seed, frames)


def rows(root, cell):
    metrics = read_metrics(root / cell.path / "metrics.csv")
    return {name: series for name, series in metrics.items() if not name.startswith("time/")}


def runner(root, jobs=2):
    return run.Runner(root, jobs, "cpu")


def test_missing_cells_are_run_side_by_side_and_those_that_are_done_are_left_alone(tmp_path, capsys):
    cells = [cell(seed) for seed in range(2)]
    outcomes = runner(tmp_path).run(cells)
    assert outcomes == {"finished at 60 frames": 2}
    assert all(run.is_done(each, tmp_path) for each in cells)
    assert not run.is_done(cell(0, 90), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    assert runner(tmp_path).run(cells) == {"done before": 2}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")} == before

    # More frames go on from there, and are those of a run in one go.
    assert runner(tmp_path).run([cell(0, 90)]) == {"finished at 90 frames": 1}
    info = json.loads((tmp_path / cells[0].path / "run.json").read_text())
    assert [session["frames"] for session in info["sessions"]] == [0, 60]
    assert "bias/mean" in rows(tmp_path, cell())


@pytest.mark.slow
def test_an_interrupted_runner_saves_and_goes_on(tmp_path):
    arguments = [
        "fig2a",
        "--rows",
        "sac",
        "--tasks",
        "Hopper-v4",
        "--seeds",
        "1",
        "--frames",
        "3000",
        "--folder",
        str(tmp_path),
    ]
    arguments += [part for option in SMALL for part in ("--option", option)]
    command = [sys.executable, str(LEARNING / "run.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = tmp_path / "Hopper-v4" / "sac" / "seed0"
    while not list(folder.glob("checkpoints/checkpoint_*.json")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "interrupted" in said, said
    frames = run.state(folder)["frames"]
    assert run.state(folder)["status"] == "interrupted"
    assert 0 < frames < 3000
    listed = subprocess.run([*command, "--commands"], capture_output=True, text=True, check=True).stdout
    assert f"resume={folder}" in listed
    # With fewer frames than the run was begun with, it is done where it has them.
    fewer = [str(frames // 2) if part == "3000" else part for part in command]
    assert "0 missing" in subprocess.run(fewer, capture_output=True, text=True, check=True).stdout


def test_a_failed_run_is_said(tmp_path, capsys):
    variant = Variant("broken", "broken", "sac", (*cell().variant.options, ("num_subnets", 3)))
    (failed,) = runner(tmp_path, 1).run([Cell(variant, "InvertedPendulum-v4", 0, 60)])
    assert failed.startswith("failed (exit status 1, see ")
    assert "unknown option 'num_subnets'" in (tmp_path / "InvertedPendulum-v4" / "broken" / "seed0.log").read_text()


@pytest.mark.parametrize(
    ("status", "frames", "done"),
    [
        ("diverged", 7, True),
        ("finished", 60, True),
        ("finished", 30, False),
        ("interrupted", 60, False),  # in the last evaluation
        ("failed", 60, False),  # as the last checkpoint was written
        ("interrupted", 90, True),
    ],
)
def test_a_cell_is_done_with_its_last_evaluation_or_when_it_has_diverged(status, frames, done, tmp_path):
    folder = tmp_path / cell().path
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": status, "frames": frames}))
    assert run.is_done(cell(), tmp_path) == done


def ended(monkeypatch, status, code, order, slow=()):
    """Runs that end at once: their ``run.json``."""

    def process(self, arguments, output, held):
        folder = Path(next(each for each in arguments if each.startswith("folder=")).removeprefix("folder="))
        self._processes.add(folder)
        if folder.parent.name in slow:
            time.sleep(0.5)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": status, "frames": 500_000}))
        order.append(folder.parent.name)
        self._processes.discard(folder)
        return code

    monkeypatch.setattr(run.Runner, "_process", process)


def test_a_run_that_diverges_has_not_failed(tmp_path, monkeypatch):
    ended(monkeypatch, "diverged", 1, [])
    assert runner(tmp_path).run([cell()]) == {"diverged at 500,000 frames": 1}


def test_a_cell_waits_for_the_run_that_its_structure_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WAIT_S", 0.01)
    rows = ["dqn_l1", "dqn_l1_source", "dqn_dense"]
    cells = {each.variant.name: each for each in select(["minatar_structures"], rows, ["MinAtar/breakout"], seeds=[0])}
    order = []
    ended(monkeypatch, "finished", 0, order, slow=["dqn_l1_source"])
    assert runner(tmp_path, 3).run([cells["dqn_l1_source"], cells["dqn_l1"], cells["dqn_dense"]])
    assert order == ["dqn_dense", "dqn_l1_source", "dqn_l1"]
    (outcome,) = runner(tmp_path / "other").run([cells["dqn_l1"]])
    assert outcome.startswith("left for later (")


@pytest.mark.parametrize("name", ROWS)
def test_a_measurement_is_a_run_that_there_is(name):
    row = {"algorithm": name, "total_frames": rates.INIT + rates.FRAMES, "init_random_frames": rates.INIT}
    task = {"dqn": "MinAtar/breakout", "tasks": "HalfCheetah/forward+backward"}.get(ROWS[name].loss, "Hopper-v4")
    to_config({**row, "env": task})


def test_cells_without_checkpoints_or_damaged_are_named_and_one_that_was_left_half_made_is_made_anew(tmp_path):
    half, damaged, gone = (tmp_path / cell(seed).path for seed in range(3))
    (half / "checkpoints").mkdir(parents=True)
    damaged.mkdir(parents=True)
    (damaged / "metrics.csv").write_text("frames,seconds,name,value\n")
    (damaged / "run.json").write_text("{")
    gone.mkdir(parents=True)
    (gone / "run.json").write_text(json.dumps({"status": "finished", "frames": 30}))
    outcomes = runner(tmp_path).run([cell(seed) for seed in range(3)])
    assert outcomes["finished at 60 frames"] == 1
    assert f"failed (there is no run.json that can be read in {damaged}: move it away)" in outcomes
    assert any(outcome.startswith("failed (its checkpoints are gone: ") for outcome in outcomes)
    assert [path.name for path in gone.iterdir()] == ["run.json"]


# Its lock


def test_a_cell_that_another_runner_has_is_left_to_it_and_a_dead_ones_lock_is_taken_over(tmp_path):
    held = run.lock(cell(), tmp_path)
    assert run.lock(cell(), tmp_path) is None
    assert runner(tmp_path).run([cell()]) == {"left to another runner": 1}
    assert not (tmp_path / cell().path).exists()
    held.close()
    assert (tmp_path / cell().path).with_suffix(".lock").exists()
    with run.lock(cell(), tmp_path) as again:
        assert again is not None


def test_a_run_that_outlives_its_runner_keeps_its_cell(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(LEARNING)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import os, subprocess, test_learning as t; from pathlib import Path; "
        f"held = t.run.lock(t.cell(), Path({str(tmp_path)!r})); "
        "child = subprocess.Popen(['sleep', '100'], pass_fds=(held.fileno(),)); print(child.pid, flush=True); "
        "os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    try:
        assert run.lock(cell(), tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (held := run.lock(cell(), tmp_path)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    held.close()


# How long it takes


def test_rates_are_kept_for_this_machine_and_its_share(tmp_path):
    path, rate = tmp_path / "rates.csv", Rate(0.001, 0.1, 0.005)
    Rates(path, "cpu", 2).add(cell(), rate)
    assert Rates(path, "cpu", 2).get(cell()) == rate
    assert Rates(path, "cpu", 1).get(cell()) is None
    Rates(path, "cpu", 1).add(cell(), Rate(0.002, 0.2, 0.01))
    assert Rates(path, "cpu", 2).get(cell()) == rate
    assert path.read_text().count("machine") == 1


def test_a_forecast_counts_what_is_left_and_names_what_it_does_not_know(tmp_path):
    known = Rates(tmp_path / "rates.csv", "cpu", 1)
    known.add(cell(), Rate(0.01, 3.6, 0.18))
    other = Cell(EXPERIMENTS["fig2a"].variants[-1], TASKS[0], 0, 30_000)
    text = rates.forecast([cell(0, 6_000), cell(1, 6_000), other], lambda each: 5_500 * (1 - each.seed), known, 2)
    # 500 frames of the first one; 20 random and 5,980 others of the second.
    assert "| InvertedPendulum-v4 | sac | 2 | 3.6000 | 180.00 | 6.5 |" in text
    assert "| Hopper-v4 | omnet | 1 | not measured | | |" in text
    assert "6.5 hours of runs, 3.2 hours with 2 at a time, and 1 cells whose rate is not known" in text
    measured = rates.forecast([other], lambda _: 0, known, 1, lambda *_: Rate(0.0, 0.36, 0.018))
    assert "| Hopper-v4 | omnet | 1 | 0.3600 | 18.00 | 2.5 |" in measured
    assert known.get(other).training == 0.36


def test_a_forecast_knows_a_rows_own_random_frames(tmp_path):
    known = rates.Rates(tmp_path / "rates.csv", "cpu", 1)
    (quick,) = select(["units_quick"], rows=["omnet"], seeds=[0])
    text = rates.forecast([quick], lambda _: 0, known, 1, lambda *_: Rate(0.0, 3.6, 0.45))
    assert "| 4.0 |" in text  # 4,000 of 5,000 frames


def test_the_quick_start_is_the_examples():
    preset = OmegaConf.load(EXAMPLES / "quick_start.yaml")
    (cell,) = select(["units_quick"], rows=["omnet"], seeds=[0])
    own = OmegaConf.from_dotlist([f"{name}={value}" for name, value in cell.variant.options])
    assert OmegaConf.merge(own, {"env": cell.task, "total_frames": cell.frames, "defaults": preset.defaults}) == preset


def test_every_task_of_an_experiment_has_sizes():
    assert {cell.task for cell in select(["all"]) if not cell.task.startswith("MinAtar/")} <= set(SIZES)


def test_the_rates_of_a_run_are_its_clocks(tmp_path):
    path = tmp_path / "metrics.csv"
    lines = ["frames,seconds,name,value"]
    for frames, updates, seconds in ((520, 400, 3.0), (540, 800, 5.0), (560, 1200, 7.0)):
        lines += [f"{frames},0.0,time/frames_per_second,{frames / seconds}"]
        lines += [f"{frames},0.0,time/updates_per_second,{updates / seconds}"]
    path.write_text("\n".join(lines) + "\n")
    rate = rates.of_metrics(path, 500)
    assert rate == pytest.approx((0.002, 0.1, 0.005))


@pytest.mark.slow
def test_a_rate_is_measured_with_the_examples_own_clock(monkeypatch):
    monkeypatch.setattr(rates, "INIT", 100)
    monkeypatch.setattr(rates, "FRAMES", 60)
    options = tuple(option.split("=", 1) for option in SMALL if option.split(".")[0] in ("network", "compile=false", "optim"))
    rate = rates.measure(Cell(Variant("sac", "SAC", "sac", options), "InvertedPendulum-v4", 0, 60), "cpu", 1)
    assert 0 <= rate.random < rate.training < 10
    assert rate.update == pytest.approx(rate.training)


def test_the_runs_of_every_experiment_are_told_by_their_options():
    """Also where an option is a list, as the width of MinAtar's networks is."""
    for experiment in EXPERIMENTS.values():
        for variant in experiment.variants:
            own = Record(Path(), config_of(variant, experiment.tasks[0]), "finished", {})
            assert _is(own, variant, experiment.tasks[0])
    source, dense = (each for each in EXPERIMENTS["minatar_structures"].variants[:2])
    assert config_of(source, "MinAtar/breakout").network.num_cells == [1_000]
    assert "network.num_cells=[1000]" in source.overrides("MinAtar/breakout", 0, 10)
    assert not _is(Record(Path(), config_of(dense, "MinAtar/breakout"), "finished", {}), source, "MinAtar/breakout")

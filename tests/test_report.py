"""benchmarks/learning: what a report says of runs, and what it refuses."""

import itertools
import json
import re
import subprocess
import warnings
from dataclasses import replace

import maze_pictures
import numpy as np
import pytest
import torch
from experiments import EXPERIMENTS, Cell, select
from maze import read_trajectories, read_visits, write_trajectories, write_visits
from records import Record, assign, find
from test_algorithms import options_of, session
from test_learning import load

from omnet_torchrl.training.options import save_config, to_config

report = load("report")


# Runs


def write_run(root, cell, score, *, status="finished", frames=None, bias=30.0, name=""):
    """The raw data of a run whose evaluations are ``score`` at each of its frames."""
    folder = root / cell.path / name
    folder.mkdir(parents=True)
    options = {**cell.variant.nested(), "env": cell.task, "seed": cell.seed, "total_frames": cell.frames}
    save_config(to_config({**options, "folder": str(folder)}), folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"status": status, "frames": cell.frames, "sessions": []}))
    lines = ["frames,seconds,name,value"]
    for at in range(5_000, (frames or cell.frames) + 1, 5_000):
        lines += [f"{at},0,eval/return,{score}", f"{at},0,time/frames_per_second,10"]
        lines += [] if bias is None else [f"{at},0,bias/mean,{bias}"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def results(tmp_path):
    """Two seeds of two rows on two tasks; one run is not complete, one diverged, and a row is missing on a task."""
    root = tmp_path / "results"
    for cell in select(["fig2a"], rows=["omnet", "redq"], tasks=["Hopper-v4", "Ant-v4"], seeds=range(2), frames=30_000):
        score = {"omnet": 3000, "redq": 1500}[cell.variant.name] + 200 * cell.seed
        where = cell.variant.name, cell.task, cell.seed
        if where == ("redq", "Ant-v4", 1):
            write_run(root, cell, score, status="interrupted", frames=20_000)
        elif where == ("redq", "Hopper-v4", 1):
            write_run(root, cell, score, status="diverged", frames=10_000)
        else:
            write_run(root, cell, score)
    return root


def written(results, *arguments):
    output = results.parent / "output"
    path = report.write(report.parse([*arguments, "--results", str(results), "--output", str(output)]))
    return path.read_text()


def test_the_report_has_means_intervals_what_diverged_and_what_is_missing(results):
    text = written(results, "fig2a", "--frames", "30000")
    assert "| OMNet | 3100 [1829, 4371] (n=2) | missing | 3100 [1829, 4371] (n=2) | missing |" in text
    assert "| REDQ | 1600 [329, 2871] (n=2, 1 diverged) | missing | 1500 (n=1) | missing |" in text
    assert "divided by the best row's mean return here: Hopper-v4 3100, Ant-v4 3100." in text
    assert "| REDQ | 2, 1 | 0.50 | 0.44 | 0.46 |" in text
    assert "An interval of an IQM needs three seeds of each task" in text.replace("\n", " ")
    assert "- Ant-v4: 1 of 10 seeds, seed 1 at 20,000 (interrupted) of REDQ" in text
    assert "- Walker2d-v4: no run of any row" in text
    assert "The paper's runs have 300,000 frames, these 30,000." in text
    assert "| REDQ | 1213 (1.00) / 1195 (1.00) |" in text
    assert "have not been measured here" in text
    pictures = {path.name for path in (results.parent / "output").glob("*.png")}
    assert pictures == {"fig2a.png", "fig2a_bias.png"}
    assert all((results.parent / "output" / name).stat().st_size > 20_000 for name in pictures)


def test_a_report_is_the_same_when_it_is_made_again(results):
    first = written(results, "fig3"), (results.parent / "output" / "fig3.png").read_bytes()
    assert (written(results, "fig3"), (results.parent / "output" / "fig3.png").read_bytes()) == first


def test_experiments_without_a_run_are_said_and_those_with_one_are_drawn(results):
    text = written(results, "all")
    missing = "fig4, fig5, fig6, fig7, fig8, fig10, fig11, table1, units_quick, precision_quick, minatar_structures,"
    assert f"Without a run so far: {missing}" in text
    for name in ("fig2a", "fig2b", "fig3", "units", "controls"):
        assert f"## {name}: " in text
        assert (results.parent / "output" / f"{name}.png").exists()


@pytest.mark.parametrize("name", ["fig4", "fig8", "table1"])
def test_the_figures_of_their_own_kind_are_drawn(name, tmp_path):
    root = tmp_path / "results"
    for cell in select([name], tasks=["Humanoid-v4"], seeds=range(2), frames=30_000):
        write_run(root, cell, 100 * (1 + cell.seed) + 1000 * float(dict(cell.variant.options).get("network.dropout", 0)))
    text = written(root, name)
    assert (tmp_path / "output" / f"{name}.png").stat().st_size > 10_000
    assert ("- Humanoid-v4: 2 of 10 seeds of any row") in text
    if name == "table1":
        assert "| DroQ | missing | missing | missing | 0.1 of 5 (paper: 0.03) |" in text


@pytest.mark.parametrize(
    "name", ["td3_quick", "minatar_structures", "minatar", "tasks", "dapd", "dapd_quick", "adaptive_quick", "precision_quick"]
)
def test_each_row_of_an_experiment_is_found_and_drawn(name, tmp_path):
    experiment, root = EXPERIMENTS[name], tmp_path / "results"
    cells = [cell for cell in experiment.cells([0]) if cell.task == experiment.tasks[0]]
    for i, cell in enumerate(cells):
        write_run(root, cell, 100 * (1 + i))
    text = written(root, name)
    for i, cell in enumerate(cells):
        assert f"| {cell.variant.label} | {100 * (1 + i)} (n=1) |" in text
    assert (tmp_path / "output" / f"{name}.png").stat().st_size > 10_000


@pytest.fixture
def without_pictures(monkeypatch):
    """Most of a report's time."""
    monkeypatch.setattr(report, "draw", lambda *args: [])


@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_file_is_named_and_skipped(results):
    (damaged,) = results.glob("Hopper-v4/omnet/seed0/metrics.csv")
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(b"eval/return,3000", b"eval/return,3\xff00", 1))
    with pytest.warns(UserWarning, match=rf"{damaged} is skipped: .*line 2"):
        assert "| OMNet | 3200 (n=1) |" in written(results, "fig2a", "--frames", "30000")
    # A last row that was cut short is left out alone.
    damaged.write_bytes(content[:-3])
    with pytest.warns(UserWarning, match="the last record is cut short"):
        assert "| OMNet | 3100 [1829, 4371] (n=2) |" in written(results, "fig2a", "--frames", "30000")
    for empty in (b"", b"frames,seconds,name,value\n"):
        damaged.write_bytes(empty)
        with pytest.warns(UserWarning, match=f"{damaged} is skipped"):
            assert "| OMNet | 3200 (n=1) |" in written(results, "fig2a", "--frames", "30000")
    damaged.write_bytes(content)
    (damaged.parent / "run.json").write_text("{")
    with pytest.warns(UserWarning, match=f"{damaged} is skipped: .*run.json can't be read"):
        written(results, "fig2a")


@pytest.mark.usefixtures("without_pictures")
def test_every_seed_that_there_is_counts(tmp_path):
    for cell in select(["hopper_30k"], rows=["omnet"], seeds=range(3)):
        write_run(tmp_path / "results", cell, 100.0 * cell.seed)
    text = written(tmp_path / "results", "hopper_30k")
    assert "| OMNet | 100 [-148, 348] (n=3) |" in text
    assert "of OMNet" not in text


@pytest.mark.usefixtures("without_pictures")
def test_more_seeds_than_an_experiments_own_count_where_they_have_its_frames(tmp_path):
    cells = select(["hopper_30k"], rows=["omnet"], seeds=range(6))
    for cell, frames in zip(cells, (30_000, 30_000, 10_000, 10_000, 30_000, 10_000), strict=True):
        write_run(tmp_path / "results", cell, 100.0 * cell.seed, status="interrupted", frames=frames)
    text = written(tmp_path / "results", "hopper_30k")
    assert "| score at 30,000 frames | Hopper-v4 |" in text
    assert "| OMNet | 167 [-350, 684] (n=3) |" in text
    assert "of OMNet" not in text


def test_a_run_is_told_by_its_options_and_the_longer_of_two_is_taken(tmp_path):
    cell = select(["fig2a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=[0], frames=30_000)[0]
    sparse = select(["fig9a"], rows=["omnet-sparsity-0.3"], tasks=["Hopper-v4"], seeds=[0], frames=30_000)[0]
    short = write_run(tmp_path, cell, 1.0, name="a", frames=20_000)
    long = write_run(tmp_path, Cell(cell.variant, cell.task, cell.seed, 60_000), 2.0, name="b")
    write_run(tmp_path, sparse, 3.0)
    with pytest.warns(UserWarning, match=f"{short} is left out: {long} is the same cell"):
        found = assign(find([tmp_path]), [cell, sparse])
    assert {path: record.score(30_000) for path, record in found.items()} == {cell.path: 2.0, sparse.path: 3.0}
    assert found[cell.path].path == long
    assert found[cell.path].hours(np.array([36_000])) == pytest.approx([1.0])
    assert found[cell.path].flops(np.array([5_000, 5_001]), exact=False) == pytest.approx([0, 20 * 236.5e6], rel=1e-3)


def test_a_run_with_the_tasks_own_dropout_rate_counts_in_both_rows(tmp_path):
    for row, seed in (("droq", 0), ("droq-dropout-0.001", 1)):
        write_run(tmp_path, select(["fig3"], rows=[row], tasks=["Hopper-v4"], seeds=[seed], frames=30_000)[0], 1.0)
    assert {path.parent.name for path in tmp_path.glob("Hopper-v4/*/*")} == {"droq"}
    experiment = EXPERIMENTS["fig3"]
    runs = report.group(experiment, assign(find([tmp_path]), experiment.cells()))
    assert {name: len(tasks["Hopper-v4"]) for name, tasks in runs.items()} == {"droq": 2, "droq-dropout-0.001": 2}


def test_a_run_in_the_cells_own_folder_goes_before_a_longer_one_elsewhere(tmp_path):
    cell = select(["fig2a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=[0], frames=30_000)[0]
    own = write_run(tmp_path / "results", cell, 1.0)
    other = write_run(tmp_path / "results" / "before", Cell(cell.variant, cell.task, cell.seed, 60_000), 2.0, name="x")
    with pytest.warns(UserWarning, match=f"{other} is left out: {own} is the same cell"):
        assert assign(find([tmp_path]), [cell])[cell.path].path == own


# The maze


def test_the_pictures_of_the_maze_are_drawn_from_the_runs_files_and_coverage_is_a_number(tmp_path):
    for cell in select(["fig6"], seeds=range(2)):
        folder = write_run(tmp_path / "results", cell, 0.0)
        steps = 1_000 if cell.variant.name == "omnet" else 500
        write_visits(folder / "visits.csv", cell.variant.label, cell.seed, torch.full((steps, 2), 0.5))
        write_trajectories(folder / "trajectories.csv", cell.seed, 500, torch.full((5, 51, 2), 0.5))
    text = written(tmp_path / "results", "fig6", "fig7")
    assert "| OMNet | 0.1% [0.1%, 0.1%] (n=2) | 0.1% [0.1%, 0.1%] (n=2) | 0.1% [0.1%, 0.1%] (n=2) |" in text
    assert "| a dense actor | 0.1% [0.1%, 0.1%] (n=2) | 0.1% [0.1%, 0.1%] (n=2) | missing |" in text
    for name in ("fig6", "fig7"):
        assert (tmp_path / "output" / f"{name}.png").stat().st_size > 10_000


def test_a_runs_first_positions_come_from_the_replay_buffer_of_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(maze_pictures, "STEPS", (5, 30))
    trainer = session(tmp_path / "checkpoints", "omnet", [], env="Maze2D")
    record = Record(tmp_path, to_config(options_of("omnet", env="Maze2D")), "finished", {})
    positions = maze_pictures._positions(record)
    assert torch.equal(positions, trainer.buffer.storage.get(slice(20, 50))["next", "observation"])
    monkeypatch.setattr(maze_pictures, "STEPS", (5, 41))
    with pytest.raises(ValueError, match="nor a checkpoint with 41 steps"):
        maze_pictures._positions(record)


def test_a_run_whose_data_are_damaged_is_left_out_of_the_mazes_figures(tmp_path):
    variants = [variant for variant in EXPERIMENTS["fig6"].variants if variant.name == "omnet"]
    records = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        write_visits(tmp_path / str(seed) / "visits.csv", "as it was called", seed, torch.rand(5, 2))
        write_trajectories(tmp_path / str(seed) / "trajectories.csv", seed, 500, torch.rand(3, 4, 2))
        records.append(Record(tmp_path / str(seed), to_config(options_of("omnet", env="Maze2D", seed=seed)), "finished", {}))
    for name in ("visits.csv", "trajectories.csv"):
        (tmp_path / "1" / name).write_text((tmp_path / "1" / name).read_text()[:-4] + "x,")
    for gather, read in ((maze_pictures.gather_visits, read_visits), (maze_pictures.gather_trajectories, read_trajectories)):
        target = tmp_path / "target.csv"
        with pytest.warns(UserWarning, match=r"/1 is left out of figure [67]: .*line"):
            gather(target, variants, {"omnet": {"Maze2D": records}})
        found = read(target)
        assert list(found.get("OMNet", found)) == [0]
        target.unlink()


# References


def test_a_reference_is_drawn_dashed_and_stays_out_of_the_numbers(results, tmp_path):
    reference = tmp_path / "published.csv"
    rows = [f"REDQ_utd20,Hopper-v4,{seed},{frames},9999" for seed in range(3) for frames in range(0, 60_000, 10_000)]
    reference.write_text("\n".join(["method,env,seed,env_step,return", *rows, "SAC,Hopper-v4,0,1,2"]) + "\n")
    protocol = ["--protocol", "REDQ_utd20=published, one episode"]
    text = written(results, "fig2a", "--reference", str(reference), "--methods", "REDQ_utd20", *protocol, "--frames", "30000")
    assert "Dashed: REDQ_utd20 (published, one episode); from published.csv." in text
    assert "| REDQ_utd20 (published, one episode) | 9999, 9999, 9999 (n=3, at 30,000) | missing | missing | missing |" in text
    assert text.count("9999") == 3
    assert (results.parent / "output" / "fig2a_reference.png").exists()
    with pytest.raises(ValueError, match="unknown method 'redq'; known are REDQ_utd20, SAC; did you mean REDQ_utd20"):
        written(results, "fig2a", "--reference", str(reference), "--methods", "redq")
    reference.write_text("method,env,return\n")
    with pytest.raises(ValueError, match=r"published.csv is no table .*expected the columns .*; missing: seed, env_step"):
        written(results, "fig2a", "--reference", str(reference))


def test_each_published_seed_is_drawn_beside_each_run(figures, results):
    published = {"REDQ (theirs)": {"Hopper-v4": [([0, 20_000, 40_000], [0.0, k, 2.0 * k]) for k in (1000, 2000, 3000)]}}
    records = find([results])
    runs = report.group(EXPERIMENTS["fig2a"], assign(records, EXPERIMENTS["fig2a"].cells()))
    variants = [variant for variant in EXPERIMENTS["fig2a"].variants if variant.name in runs]
    path = results / "returns.png"
    report.figures.curves(path, "title", variants, ["Hopper-v4"], runs, 30_000, references=published)
    lines = figures[-1].axes[0].lines
    assert len(figures) == 1
    dashed = [line for line in lines if line.get_linestyle() == "--"]
    assert sorted(line.get_ydata()[-1] for line in dashed) == [2000, 4000, 4000, 6000]  # three seeds and their mean
    assert next(line.get_label() for line in dashed if not line.get_label().startswith("_")) == "REDQ (theirs), 3 seeds"
    ours = sum(len(runs[variant.name]["Hopper-v4"]) for variant in variants)
    assert len(lines) - len(dashed) >= ours
    legend = figures[-1].legends[0]
    figures[-1].canvas.draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figures[-1].bbox.width


def test_a_mean_is_over_the_runs_that_have_all_frames(figures, results):
    experiment = EXPERIMENTS["fig2a"]
    runs = report.group(experiment, assign(find([results]), experiment.cells()))
    first, *others = runs["omnet"]["Hopper-v4"]
    assert others
    end = 2 * first.frames
    frames, values = first.metrics["eval/return"]
    longer = replace(first, metrics={**first.metrics, "eval/return": ([*frames, end], [*values, 7.0])})
    runs = {"omnet": {"Hopper-v4": [longer, *others]}}
    variants = [variant for variant in experiment.variants if variant.name == "omnet"]
    report.figures.curves(results / "returns.png", "title " * 30, variants, ["Hopper-v4"], runs, end)
    (mean,) = (line for line in figures[0].axes[0].lines if not line.get_label().startswith("_"))
    assert mean.get_label() == f"OMNet (1 of {1 + len(others)} seeds)"
    assert mean.get_xdata()[-1] == end
    figures[0].canvas.draw()
    title = figures[0]._suptitle.get_window_extent()
    assert title.x0 >= 0
    assert title.x1 <= figures[0].bbox.width


def test_names_of_points_that_lie_close_do_not_touch(figures, tmp_path):
    scores = {"Sin-SAC": (0.15, 0.16), "OMNet": (0.19, 0.14), "SAC-20": (0.27, 0.15), "DroQ": (0.27, 0.16), "REDQ": (1.0, 1.0)}
    points = {name: (flops, report.figures.Interval(score, np.nan, np.nan)) for name, (flops, score) in scores.items()}
    report.figures.scatter(tmp_path / "points.png", "title", points)
    figures[-1].canvas.draw()
    names = {text.get_text(): text.get_window_extent() for text in figures[-1].axes[0].texts}
    assert names.keys() == scores.keys()
    assert not any(a.overlaps(b) for a, b in itertools.combinations(names.values(), 2))
    assert all(figures[-1].axes[0].bbox.x1 > box.x1 for box in names.values())


def test_an_unknown_experiment_lists_the_known_ones(results):
    with pytest.raises(ValueError, match=r"unknown experiment 'fig99'; known are fig2a, .*, all"):
        written(results, "fig99")


def committed(pattern):
    listed = subprocess.run(["git", "ls-files", "-z", "--", pattern], cwd=report.RESULTS, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("which results are committed is known to git alone")
    return listed.stdout.strip("\0").split("\0")


@pytest.mark.filterwarnings("ignore:.*is the same cell")
def test_all_draws_every_committed_picture_but_the_one_that_needs_published_curves(tmp_path, monkeypatch):
    for name in ("curves", "bias", "scatter", "normalised", "against"):
        monkeypatch.setattr(report.figures, name, lambda path, *args, **kwargs: path)
    monkeypatch.setattr(report, "map_figure", lambda path: path)
    monkeypatch.setattr(maze_pictures, "draw", lambda name, path, *args: [path])
    monkeypatch.setattr(maze_pictures, "coverage", lambda *args: "")
    text = report.write(report.parse(["all", "--output", str(tmp_path)])).read_text()
    drawn = re.findall(r"!\[.*?\]\((.*?)\)", text)
    by_themselves = {f"{name}/fig2a_reference.png" for name in ("hopper_60k", "walker2d_300k")}
    by_themselves |= {"structures_breakout.png"}  # by structures.py
    assert set(committed("*.png")) - set(drawn) == by_themselves
    assert "## fig5 (maze_7000): " in text
    assert "| score at 7,000 frames | Maze2D |" in text.split("## fig5 (maze_7000): ")[1]
    assert "| score at 60,000 frames | Hopper-v4 |" in text.split("## fig2a (hopper_60k): ")[1]


def test_the_committed_results_can_be_read():
    tracked = committed("*metrics.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = find([(report.RESULTS / path).parent for path in tracked])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several runs may be one cell
        found = assign(records, EXPERIMENTS["fig2a"].cells())
    assert select(["fig2a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=[0])[0].path in found


def test_a_run_that_diverged_later_counts_and_the_budget_is_one_that_runs_have(tmp_path):
    root = tmp_path / "results"
    cells = select(["fig2a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=range(2), frames=30_000)
    write_run(root, cells[0], 100, frames=15_000)
    write_run(root, cells[1], 200, status="diverged", frames=25_000)
    assert "| OMNet | 150 [-485, 785] (n=2) |" in written(root, "fig2a", "--frames", "15000")
    found = report.find([root])
    assert sorted(record.frames for record in found) == [15_000, 25_000]
    assert "score at 25,000 frames" in written(root, "fig2a")

"""The learning curve: drawn from metrics.csv alone, whatever is in it."""

import math
import subprocess
import sys
from types import SimpleNamespace

import matplotlib
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from omnet_torchrl.training.record import plots, reporter
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.metrics import HEADER, CSVLogger
from omnet_torchrl.training.record.plots import learning_curve
from omnet_torchrl.training.record.terminal import Terminal


@pytest.fixture
def folder(tmp_path):
    """A run with all that it logs."""
    folder = RunFolder.create(tmp_path / "run")
    folder.write_info(env="Hopper-v4", seed=7)
    log = CSVLogger(folder.metrics_path)
    for frames in range(1000, 10_001, 1000):
        log.log(frames, 1.0, {"train/episode_return": frames / 9, "train/loss_qvalue": frames**2, "train/alpha": 1 / frames})
        log.log(frames, 1.0, {"train/qvalue": 1.0, "train/entropy": -2.0, "subnets/q_std": 0.1, "time/updates": 5})
        log.log(frames, 1.0, {"eval/return": frames / 10, "eval/return_subnet_0": 1.0, "eval/return_subnet_1": 2.0})
    log.close()
    return folder


def test_each_task_has_a_colour_of_its_own_and_the_mean_another(folder, figures):
    with folder.metrics_path.open("a") as file:
        file.write("11000,1.0,eval/return_forward,1.0\n11000,1.0,eval/return_backward,2.0\n")
    kept = [line for line in folder.metrics_path.read_text().splitlines(True) if "subnet" not in line]
    folder.metrics_path.write_text("".join(kept))
    learning_curve(folder)
    lines = {line.get_label(): to_hex(line.get_color()) for line in figures[0].axes[0].lines}
    assert len({lines[name] for name in ("forward", "backward", "evaluation, mean")}) == 3


def test_the_picture_shows_what_was_logged(folder, figures):
    assert learning_curve(folder) == folder.curve_path
    assert imread(folder.curve_path).std() > 0
    top, *panels = figures[0].axes
    assert figures[0].get_suptitle() == "Hopper-v4, seed 7"
    lines = {line.get_label(): line for line in top.lines}
    assert lines["evaluation, mean"].get_ydata().tolist() == [100.0 * i for i in range(1, 11)]
    assert {"training episode", "evaluation of each subnet"} <= set(lines)
    assert len(top.lines) == 4
    assert [axes.get_title() for axes in panels] == [
        *("critic loss", "Q value, mean of the batch", "temperature", "entropy of the policy, nats"),
        "disagreement of the subnets on Q",
    ]
    assert [axes.get_yscale() for axes in panels] == ["log", "linear", "linear", "linear", "linear"]
    assert top.xaxis.get_major_formatter()(10_000) == "10K"


def test_nothing_global_of_matplotlib_changes(folder):
    before = dict(matplotlib.rcParams)
    learning_curve(folder.path)
    assert dict(matplotlib.rcParams) == before


def test_a_run_without_an_evaluation_has_a_picture_that_says_so(tmp_path, figures):
    metrics = tmp_path / "metrics.csv"
    metrics.write_bytes(HEADER)
    assert learning_curve(metrics) == tmp_path / "learning_curve.png"
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["no evaluation yet"]


def test_values_that_are_not_finite_or_not_positive_are_no_obstacle(tmp_path, figures):
    log = CSVLogger(tmp_path / "metrics.csv")
    for frames, value in enumerate((math.nan, math.inf, 0.0, -1e30, 1e30)):
        log.log(frames, 0.0, {"train/loss_qvalue": value, "train/alpha": math.nan, "eval/return": value})
    log.close()
    learning_curve(log.path, tmp_path / "other.png", title="a title")
    assert (tmp_path / "other.png").exists()
    assert figures[0].get_suptitle() == "a title"
    assert figures[0].axes[0].lines[0].get_xdata().tolist() == [2, 3, 4]
    assert len(figures[0].axes) == 2


def test_a_picture_that_can_not_be_drawn_leaves_the_old_one(folder, monkeypatch):
    learning_curve(folder)
    before = folder.curve_path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space"):
        learning_curve(folder)
    assert folder.curve_path.read_bytes() == before


def test_a_run_draws_one_a_minute_at_most_and_the_last_one_at_its_end(tmp_path, monkeypatch):
    clock, seen = [0.0], []
    monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(reporter, "learning_curve", lambda _: seen.append(clock[0]))
    run = reporter.Reporter(RunFolder.create(tmp_path / "run"), Terminal(100))
    run.begin("csv", {}, 0)
    for clock[0] in (20.0, 59.0, 61.0, 90.0, 130.0, 140.0):
        run.log(1, clock[0], {"eval/return": 1.0})
    clock[0] = 150.0
    run.close()
    run.close()
    assert seen == [61.0, 130.0, 150.0]
    assert run.close_csv()


def test_it_is_a_command_that_needs_no_display(folder):
    command = [sys.executable, "-X", "importtime", "-m", "omnet_torchrl.training.record.plots", str(folder.path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(folder.curve_path)
    assert folder.curve_path.exists()
    assert "matplotlib.figure" in result.stderr
    assert "matplotlib.pyplot" not in result.stderr


def test_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit):
        plots.main()
    assert "nowhere" in capsys.readouterr().err


def test_masks_that_change_have_their_overlap_and_the_density_of_each_layer(tmp_path, monkeypatch):
    figures, names = [], ("overlap", "density_actor_0", "density_critic_0")
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure) or path)
    records = [f"{f},1.0,masks/{name},{v}" for f, v in ((100, 0.5), (200, 0.02)) for name in names]
    (tmp_path / "metrics.csv").write_text("\n".join(["frames,seconds,name,value", *records]) + "\n")
    learning_curve(tmp_path)
    overlap, densities = (axes for axes in figures[0].axes if axes.get_title())
    assert overlap.get_title() == "overlap of the masks with those before"
    assert [line.get_label() for line in densities.lines] == ["actor 0", "critic 0"]
    assert densities.get_yscale() == "log"

"""benchmarks/learning/tables.py: the numbers of a report, and what it says is missing."""

from dataclasses import asdict

import numpy as np
import pytest
import settings
from experiments import select
from test_report import report, write_run, written

from omnet_torchrl.training.options import ROWS, to_config


@pytest.fixture
def without_pictures(monkeypatch):
    """Most of a report's time."""
    monkeypatch.setattr(report, "draw", lambda *args: [])


def write_bias(root, row, seed, bias, *, task="Hopper-v4", name="fig2a", **more):
    """A run of 30,000 frames whose value bias is ``bias`` until 25,000 frames and ten times that at the end."""
    (each,) = select([name], rows=[row], tasks=[task], seeds=[seed], frames=30_000)
    folder = write_run(root, each, 100.0, bias=None, **more)
    with (folder / "metrics.csv").open("a") as file:
        for frames in range(5_000, 30_001, 5_000) if bias is not None else ():
            last = bias * (10 if frames == 30_000 else 1)
            for of, value in (("mean", last), ("std", 7.0), ("normalised_mean", last / 100), ("normalised_std", 0.5)):
                file.write(f"{frames},0,bias/{of},{value}\n")
            file.write(f"{frames},0,bias/min_mean,{last - 3}\n{frames},0,bias/min_std,6.0\n")
    return folder


def write_scores(root, name, rows, tasks, seeds):
    for task, scale in zip(tasks, (1.0, 10.0), strict=False):
        for each in select([name], rows=list(rows), tasks=[task], seeds=range(seeds), frames=30_000):
            write_run(root, each, scale * (rows[each.variant.name] + each.seed), bias=None)


def test_figure_9_is_one_panel_of_the_score_over_the_tasks_of_all_rows(tmp_path, figures):
    write_scores(tmp_path / "results", "fig9a", {"omnet": 99.0, "omnet-sparsity-0.3": 49.0}, ["Hopper-v4", "Ant-v4"], 3)
    write_scores(tmp_path / "results", "fig9a", {"omnet": 5.0}, ["Walker2d-v4"], 3)
    written(tmp_path / "results", "fig9a")
    (figure,) = figures
    (panel,) = figure.axes
    assert {line.get_label(): line.get_ydata()[-1] for line in panel.lines} == pytest.approx({"OMNet": 1, "sparsity 0.3": 0.5})
    assert len(panel.collections) == 2  # the intervals
    assert "Hopper-v4 (n=3, divided by 100), Ant-v4 (n=3, divided by 1000)" in panel.get_title().replace("\n", " ")


@pytest.mark.parametrize(("seeds", "bars"), [(2, 0), (3, 2)])
def test_figure_3_says_what_it_is_made_of_and_has_bars_from_three_seeds_on(tmp_path, figures, seeds, bars):
    write_scores(tmp_path / "results", "fig3", {"omnet": 99.0, "sac_20": 49.0}, ["Hopper-v4"], seeds)
    written(tmp_path / "results", "fig3")
    (panel,) = figures[0].axes
    title = panel.get_title().replace("\n", " ")
    assert f"Hopper-v4 (n={seeds}, divided by {99 + (seeds - 1) / 2:.0f})" in title
    assert ("no interval: it needs three seeds" in title) == (not bars)
    assert sum(np.isfinite(each.get_segments()).all() for each in panel.collections) == bars


def test_figure_3_says_which_rows_have_a_bar_where_not_all_have(tmp_path, figures):
    write_scores(tmp_path / "results", "fig3", {"omnet": 99.0}, ["Hopper-v4"], 3)
    write_scores(tmp_path / "results", "fig3", {"sac_20": 49.0}, ["Hopper-v4"], 2)
    written(tmp_path / "results", "fig3")
    (panel,) = figures[0].axes
    title = panel.get_title().replace("\n", " ")
    assert title.endswith("95 % bootstrap over seeds, of rows with three seeds of each task")
    assert sum(np.isfinite(each.get_segments()).all() for each in panel.collections) == 1


def test_a_diverged_run_keeps_its_last_score_in_figure_9(tmp_path, figures):
    for each in select(["fig9a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=range(2), frames=30_000):
        more = {"status": "diverged", "frames": 10_000} if each.seed else {}
        write_run(tmp_path / "results", each, 100.0 * (1 + each.seed), bias=None, **more)
    written(tmp_path / "results", "fig9a", "--frames", "30000")
    (line,) = figures[0].axes[0].lines
    assert line.get_xdata().tolist() == list(range(5_000, 30_001, 5_000))
    assert line.get_ydata() == pytest.approx(np.ones(6))


@pytest.mark.usefixtures("without_pictures")
def test_the_value_bias_at_the_end_has_numbers_and_missing_bias_is_said(tmp_path):
    for seed, bias in enumerate((-1.0, -3.0)):
        write_bias(tmp_path / "results", "omnet", seed, bias)
    write_bias(tmp_path / "results", "sac_20", 0, 5.0)
    write_bias(tmp_path / "results", "sac_20", 1, None)
    text = written(tmp_path / "results", "fig2a")
    assert "| value bias at 30,000 frames | task | n | mean | spread | normalised (spread) | min of two (spread) |" in text
    assert "| OMNet | Hopper-v4 | 2 | -20.0 [-147.1, 107.1] | 7.0 | -0.20 (0.50) | -23.0 (6.0) |" in text
    assert "| SAC-20 | Hopper-v4 | 1 | 50.0 | 7.0 | 0.50 (0.50) | 47.0 (6.0) |" in text
    assert "- without bias: SAC-20 on Hopper-v4, seed 1\n" in text
    assert "without bias: OMNet" not in text


@pytest.mark.usefixtures("without_pictures")
def test_a_figure_of_the_value_bias_without_any_says_so(tmp_path):
    write_bias(tmp_path / "results", "omnet", 0, None, task="Humanoid-v4", name="fig4")
    text = written(tmp_path / "results", "fig4")
    assert "| OMNet | Humanoid-v4 | missing |" in text
    assert "- without bias: OMNet on Humanoid-v4, seed 0\n" in text


def test_differences_have_an_interval_from_three_seeds_on_and_say_how_many_would_do(tmp_path, without_pictures):
    write_scores(tmp_path / "results", "controls", {"omnet": 999.0, "sac_20_layer_norm": 899.0}, ["Hopper-v4"], 3)
    write_scores(tmp_path / "results", "controls", {"sin_sac_layer_norm": 999.0}, ["Hopper-v4"], 2)
    text = written(tmp_path / "results", "controls")
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| OMNet less")}
    apart = lines["| OMNet less SAC-20 + LayerNorm"]
    assert "| 3, 3 | 100 [" in apart
    assert apart.endswith("], apart from 0 | 2 |")
    assert lines["| OMNet less Sin-SAC + LayerNorm"].endswith("| 3, 2 | 0 | 2 |")  # no interval


def test_every_row_has_all_of_its_hyper_parameters_in_one_table():
    text = settings.settings()
    for name in ROWS:
        assert text.count(f"| `{name}` |") == 1, name
    sac = text[text.index("### SAC\n") : text.index("### TD3")]
    shared, *lines = [line for line in sac.splitlines() if line.startswith(("In all rows", "| `"))]
    assert "`optim.lr` 0.0003" in shared
    assert "utd_ratio" not in shared  # which SAC's own row has otherwise
    assert not any(word in sac for word in ("policy_noise", "epsilon", "target_reduction", "fan_in"))
    (redq,) = (line for line in lines if line.startswith("| `redq` |"))
    assert "num_subnets 10, critic separate" in redq
    assert "utd_ratio 20" in redq
    (dapd,) = (line for line in lines if line.startswith("| `dapd` |"))
    assert "method saliency" in dapd
    assert redq.endswith("| - |")  # no masks that change


def test_an_option_that_no_row_changes_is_shared_by_all_of_them():
    for name, row in ROWS.items():
        env = settings.KINDS[row.loss][1]
        config = asdict(to_config({"algorithm": name, "env": env}))
        for option, value in settings._options(name, env).items():
            group, _, short = option.rpartition(".")
            assert (config[group] if group else config)[short] == value

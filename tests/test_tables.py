"""benchmarks/learning/tables.py: the numbers of a report, and what it says is missing."""

import pytest
from experiments import select
from test_report import report, write_run, written


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

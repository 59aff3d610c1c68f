"""What a person sees: on a terminal, in a log file, and where there is no one to see it."""

import io
import re
import sys
from contextlib import closing

import pytest

from omnet_torchrl.training.record import terminal
from omnet_torchrl.training.record.terminal import Terminal, count, duration, shares


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])  # the bar's own clock
    return now


@pytest.fixture(autouse=True)
def _columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_a_log_file_gets_a_line_a_minute(clock):
    file = io.StringIO()
    shown = Terminal(300_000, file=file)
    for frames in range(3000):
        clock[0] += 0.05
        shown.update(frames, 20 * frames, episode_return=12.3)
    shown.close()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert "| 1200/300000 [01:00<4:09:00, 20.00 frames/s, episode=12, updates=24,000]" in lines[0]
    assert "| 2400/300000 [02:00<4:08:00, 20.00 frames/s, episode=12, updates=48,000]" in lines[1]


def test_the_bar_is_refreshed_ten_times_a_second(clock):
    screen = Screen()
    shown = Terminal(1000, file=screen)
    for frames in range(1000):
        clock[0] += 0.001
        shown.update(frames, frames)
    assert 9 <= screen.getvalue().count("\r") <= 13
    assert max(map(len, screen.getvalue().split("\r"))) <= 80
    shown.close()


def test_rates_are_of_the_last_seconds(clock):
    screen = Screen()
    shown = Terminal(300_000, file=screen)  # of a run that goes on from frame 100,000
    for frames in range(100_000, 105_000, 10):  # 1,000 a second
        clock[0] += 0.01
        shown.update(frames, 2_000_000)
    for frames in range(105_000, 106_000):  # then 20
        clock[0] += 0.05
        shown.update(frames, 2_000_000 + 20 * (frames - 105_000), eval_return=2345.6)
    last = screen.getvalue().split("\r")[-1]
    shown.close()
    assert " 35%|" in last
    assert re.search(r"/300000 \[00:5[45]<2:4\d:\d\d, +20\.\d+ frames/s, eval=2346, updates=2,019,\d+\]", last)


def test_evaluations_are_printed_whatever_the_progress_does(clock):
    file = io.StringIO()
    shown = Terminal(1000, enabled=False, file=file)
    shown.evaluation(5000, {"eval/return": 1234.5, "eval/length": 1000, "eval/return_subnet_0": 1, "eval/return_subnet_1": 3})
    shown.evaluation(10_000, {"eval/return": 2.0}, seconds=90)
    clock[0] += 1000
    shown.update(1000, 5)
    assert file.getvalue().splitlines() == [
        "      5,000 frames   return    1234.5 ± 1.0       length 1000.0      0.0 min",
        "     10,000 frames   return       2.0      1.5 min",
    ]


def test_header_and_summary_are_aligned_and_fit_the_width():
    file = io.StringIO()
    shown = Terminal(1000, file=file)
    shown.block({"env": "Hopper-v4", "networks": "word " * 30}, title="OMNet")
    shown.block({"status": "finished", "frames": 1000, "nothing": ""})
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["OMNet", "  env       Hopper-v4"]
    assert lines[2].startswith("  networks  word")
    assert lines[3].startswith("            word")
    assert lines[-3:] == ["  status   finished", "  frames   1000", "  nothing"]
    assert max(map(len, lines)) <= 80


def test_a_terminal_that_has_gone_away_does_not_stop_the_run(clock):
    class Gone(Screen):
        def write(self, text):
            raise OSError(5, "Input/output error")

    with closing(Terminal(1000, file=Gone())) as shown:
        shown.block({"env": "Hopper-v4"})
        clock[0] += 1
        shown.update(10, 10)
        shown.evaluation(10, {"eval/return": 1.0})
        clock[0] += 1
        shown.update(20, 20)
        shown.block({"status": "finished"})


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (0.25, "0.25"), (22.4, "22"), (999, "999"), (1500, "1.5K"), (300_000, "300K"), (1e6, "1M")]
)
def test_count_is_short(number, text):
    assert count(number) == text


def test_duration_and_shares():
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 90_061)] == ["0:00", "1:00", "59:59", "1:00:00", "25:01:01"]
    assert shares({"collect": 1.0, "update": 3.0}) == "update 75%, collect 25%"
    assert shares({"update": 0.0}) == "update 0%"


@pytest.mark.filterwarnings("error")
def test_returns_that_are_not_finite_are_a_line():
    file = io.StringIO()
    returns = {"eval/return": float("inf"), "eval/return_subnet_0": 1.0, "eval/return_subnet_1": float("inf")}
    Terminal(100, file=file).evaluation(10, returns, 60)
    assert file.getvalue() == "         10 frames   return       inf ± nan          1.0 min\n"


def test_what_has_nowhere_to_be_printed_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    terminal = Terminal(10)
    terminal.block({"a": 1})
    terminal.update(5, 5)
    terminal.close()

"""metrics.csv is exact and survives what kills a process; a logger beside it never stops or slows a run."""

import math
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from omnet_torchrl.training.record import trackers
from omnet_torchrl.training.record.files import CheckpointError, WriteError
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.metrics import CSVLogger, read_metrics
from omnet_torchrl.training.record.trackers import BackgroundLogger, check_logger, make_logger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


# metrics.csv


def test_values_come_back_exactly(path):
    values = [0.1, 1 / 3, 1e-300, -1e22, 5.0, math.inf]
    log = CSVLogger(path)
    for frames, value in enumerate(values):
        log.log(frames, 1.25, {"a/b": value, "not, a number": math.nan})
    log.close()
    metrics = read_metrics(path)
    assert metrics["a/b"] == (list(range(6)), values)
    assert all(map(math.isnan, metrics["not, a number"][1]))


def write(path, frames, metrics):
    """A log of one call, closed; its position."""
    with closing(CSVLogger(path)) as log:
        log.log(frames, 0.1, metrics)
        return log.position


def test_rows_are_tidy_and_in_the_file_at_once(path):
    log = CSVLogger(path)
    log.log(5_000, 61.26, {"eval/return": 12.5, "eval/length": 3})
    # What another process sees now outlives this one, however it ends.
    assert path.read_text() == "frames,seconds,name,value\n5000,61.3,eval/return,12.5\n5000,61.3,eval/length,3.0\n"
    log.close()


def test_a_resumed_run_goes_on_where_its_checkpoint_was(path):
    log = CSVLogger(path)
    log.log(1, 0.1, {"x": 1.0})
    position = log.position
    log.log(2, 0.2, {"x": 2.0})
    log.close()
    resumed = CSVLogger(path, position)
    assert resumed.position == position
    resumed.log(2, 9.0, {"x": 2.5})
    resumed.sync()
    resumed.close()
    assert read_metrics(path) == {"x": ([1, 2], [1.0, 2.5])}


def test_a_file_that_is_not_the_one_of_the_position_is_refused_and_left_alone(path):
    with pytest.raises(CheckpointError, match=r"metrics.csv is missing"):
        CSVLogger(path, {"size": 40, "sha256": ""})
    position = write(path, 1, {"x": 1.0})
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole.replace(b"1.0", b"2.0"), whole.replace(b"\n", b"\r\n")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"the first 38 bytes of .*metrics.csv are not those of the checkpoint: put"):
            CSVLogger(path, position)
        assert path.read_bytes() == content


def test_a_new_log_does_not_overwrite_an_old_one(path):
    write(path, 1, {"x": 1.0})
    with pytest.raises(ValueError, match="exists already"):
        CSVLogger(path)
    assert read_metrics(path) == {"x": ([1], [1.0])}


@pytest.mark.parametrize("rest", ["3", "3,0.1,x", "3,0.1,x,12", "\0\0\0\0\n", "3,0.1,x\n", '3,0.1,"x\n'])
def test_a_torn_last_row_is_left_out_with_a_warning(path, rest):
    write(path, 1, {"x": 1.0, "y": 2.0})
    with path.open("a") as file:
        file.write(rest)
    with pytest.warns(UserWarning, match=r"metrics.csv, line 4: the last record is cut short"):
        assert read_metrics(path) == {"x": ([1], [1.0]), "y": ([1], [2.0])}


def test_damage_before_the_last_row_is_an_error(path):
    path.write_text("frames,seconds,name,value\n1,0.1,x,1.0\n2,0.1,\n3,0.1,x,3.0\n")
    with pytest.raises(ValueError, match=r"line 3: expected frames,seconds,name,value, got b'2,0.1,'"):
        read_metrics(path)
    path.write_text("step,reward\n")
    with pytest.raises(ValueError, match="must begin with 'frames,seconds,name,value', got b'step,reward'"):
        read_metrics(path)


def test_a_full_disk_is_an_error_of_the_run(tmp_path):
    log = CSVLogger(tmp_path / "metrics.csv")
    log.close()
    log._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(WriteError, match=r"metrics.csv can't be written \(No space left"):
        log.log(1, 0.1, {"x": 1.0})
    with pytest.raises(OSError, match="No space left"):
        log.close()


# The logger beside it


class FakeTracker:
    place = "nowhere"

    def __init__(self, fail_at=None, hang_at=None, fail_at_close=False):
        self.fail_at, self.hang_at, self.fail_at_close = fail_at, hang_at, fail_at_close
        self.rows, self.closed, self.go_on = [], False, threading.Event()

    def write(self, frames, seconds, metrics):
        if frames == self.fail_at:
            raise OSError(28, "No space left on device")
        if frames == self.hang_at:
            self.go_on.wait(30)
        self.rows.append((frames, seconds, metrics))

    def close(self):
        self.closed = True
        if self.fail_at_close:
            raise OSError(28, "No space left on device")


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_a_logger_writes_everything_in_order():
    tracker = FakeTracker()
    logger = BackgroundLogger("fake", lambda say: tracker)
    for frames in range(100):
        logger.log(frames, 0.5, {"x": frames})
    logger.close()
    assert tracker.rows == [(frames, 0.5, {"x": float(frames)}) for frames in range(100)]
    assert tracker.closed


def test_a_failure_is_told_once_and_turns_the_logger_off():
    messages, tracker = [], FakeTracker(fail_at=1)
    logger = BackgroundLogger("fake", lambda say: tracker, warn=messages.append)
    for frames in range(3):
        logger.log(frames, 0.0, {"x": 1.0})
    wait_until(lambda: tracker.closed)
    for frames in range(3, 10):
        logger.log(frames, 0.0, {"x": 1.0})
    logger.close()
    assert [row[0] for row in tracker.rows] == [0]
    (message,) = messages
    assert message == "fake: failed, and is off from now on (OSError: [Errno 28] No space left on device); metrics.csv has all."


def test_a_failure_at_the_end_is_told_too():
    logger = BackgroundLogger("fake", lambda say: FakeTracker(fail_at_close=True))
    with pytest.warns(RuntimeWarning, match="fake: failed"):
        logger.close()
    logger.close()
    logger.log(1, 0.0, {"x": 1.0})


def test_a_tracker_that_hangs_costs_no_time_and_loses_counted_values():
    messages, tracker = [], FakeTracker(hang_at=0)
    logger = BackgroundLogger("fake", lambda say: tracker, warn=messages.append, size=4)
    logger.log(0, 0.0, {"x": 1.0})
    wait_until(logger._queue.empty)
    start = time.monotonic()
    for frames in range(1, 11):
        logger.log(frames, 0.0, {"x": 1.0, "y": 2.0})
    assert time.monotonic() - start < 0.5
    start = time.monotonic()
    logger.close(timeout=0.2)
    assert time.monotonic() - start < 2
    tracker.go_on.set()
    assert ["not done within" in messages[0], "12 values were left out" in messages[1]] == [True, True]


def test_a_process_ends_although_a_tracker_hangs():
    code = (
        "import threading; from omnet_torchrl.training.record.trackers import BackgroundLogger\n"
        "class Hanging:\n    place = 'x'\n    def write(self, *values): threading.Event().wait()\n    close = write\n"
        "logger = BackgroundLogger('x', lambda say: Hanging(), warn=print)\n"
        "logger.log(1, 0.0, {'x': 1.0}); logger.close(timeout=0.1)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "x: not done within 0 s" in result.stdout


def test_csv_and_disabled_wandb_log_nothing_more(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for kind, mode in (("csv", "offline"), ("wandb", "disabled")):
        logger = make_logger(kind, folder, mode=mode)
        logger.log(1, 0.0, {"x": 1.0})
        logger.close()
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "run.json"]


def test_an_unknown_logger_or_missing_package_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"one of csv, tensorboard, wandb, got 'tensorbord'; tensorboard\?"):
        check_logger("tensorbord")
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="logger=tensorboard needs the package tensorboard: pip install tensorboard"):
        make_logger("tensorboard", RunFolder.create(tmp_path / "run"))


def test_a_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="needs the package wandb"):
        check_logger("wandb")


def test_a_logger_that_can_not_start_is_off(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(trackers, "start_tensorboard", fail)
    logger = make_logger("tensorboard", RunFolder.create(tmp_path / "run"))
    with pytest.warns(RuntimeWarning, match=r"tensorboard: could not be started, and is off \(OSError: .*Read-only"):
        logger.close()
    logger.log(1, 0.0, {"x": 1.0})
    logger.close()


def test_a_logger_that_hangs_while_it_starts_costs_no_time():
    go_on, messages, tracker = threading.Event(), [], FakeTracker()
    start = time.monotonic()
    logger = BackgroundLogger("fake", lambda say: go_on.wait(30) and tracker, warn=messages.append)
    logger.log(1, 0.0, {"x": 1.0})
    logger.close(timeout=0.2)
    assert time.monotonic() - start < 2
    assert messages == ["fake: not done within 0 s, the last values may be missing; metrics.csv has all."]
    # One that starts too late is closed all the same.
    go_on.set()
    wait_until(lambda: tracker.closed)
    assert tracker.rows == [(1, 0.0, {"x": 1.0})]


def test_the_variables_of_wandb_are_read_for_wandb_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "shared")
    folder = RunFolder.create(tmp_path / "run")
    for kind, mode in (("csv", None), ("tensorboard", None), ("wandb", "disabled")):
        make_logger(kind, folder, mode=mode).close()
    with pytest.raises(ValueError, match=r"WANDB_MODE must be one of .*, got 'shared'"):
        check_logger("wandb")

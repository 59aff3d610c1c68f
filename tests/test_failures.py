"""A run that fails says why, where and how to go on, whatever fails; so does a member of a sweep, and the others go on."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from conftest import EXAMPLE, run_script

from omnet_torchrl.training import Run, Trainer
from omnet_torchrl.training.record import checkpoint, folder

OPTIONS = [
    *("env=Failing-v0", "network.num_cells=[16,16]", "network.sparsity=0", "compile=false", "progress=false"),
    *("total_frames=60", "init_random_frames=20", "optim.batch_size=8", "utd_ratio=1", "policy_update_delay=1"),
    *("eval.interval=20", "eval.episodes=2", "checkpoint.interval=20", "num_threads=1"),
]


class Failing(gymnasium.Env):
    """Raises ``error`` the ``at``-th time that it is made, reset or stepped."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    what, at, error = "", 0, RuntimeError

    def _count(self, what):
        if what == Failing.what:
            Failing.at -= 1
            if Failing.at == 0:
                raise Failing.error(f"the {what} broke")

    def __init__(self):
        self._count("constructor")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._count("reset")
        self.steps = 0
        return self.observation_space.low, {}

    def step(self, action):
        self._count("step")
        self.steps += 1
        return self.observation_space.low, 1.0, self.steps == 10, False, {}


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """A function to say what is to fail."""
    monkeypatch.chdir(tmp_path)
    gymnasium.register("Failing-v0", Failing, disable_env_checker=True)

    def fail(what, at, error=RuntimeError):
        Failing.what, Failing.at, Failing.error = what, at, error

    fail("", 0)
    yield fail
    del gymnasium.registry["Failing-v0"]


def info(run):
    return json.loads((Path(run) / "run.json").read_text())


@pytest.mark.parametrize("error", [RuntimeError, ValueError, MemoryError, SystemExit])
@pytest.mark.parametrize("what", ["constructor", "reset", "step"])
def test_an_environment_that_fails_leaves_its_error_and_a_run_that_can_go_on(what, error, failing):
    # The check before anything is made makes it once, resets it four times and makes a step.
    failing(what, {"constructor": 2, "reset": 5, "step": 91}[what], error)
    code, printed = run_script(*OPTIONS, "folder=run")
    said = f"{error.__name__}: the {what} broke"
    if what == "constructor" and error is not SystemExit:
        kind = "" if error is ValueError else f"{error.__name__}: "
        said = f"ValueError: env 'Failing-v0' can't be made: {kind}the constructor broke"
    assert (code, info("run")["status"], info("run")["error"]) == (1, "failed", said)
    assert printed.count(f"failed: {said}\n") == 1
    assert ("Traceback" in printed) == said.startswith(("RuntimeError", "ValueError"))
    assert printed.splitlines()[-1].startswith("to go on, in this directory: python ")
    code, printed = run_script("resume=run")
    assert (code, info("run")["status"], info("run")["error"]) == (0, "finished", None), printed
    assert ("goes on from frame 40" in printed) == (what == "step")


@pytest.mark.parametrize("what", ["make_actor", "Evaluation", "describe"])
def test_whatever_the_script_calls_may_fail(what, failing, monkeypatch):
    import omnet_torchrl
    from omnet_torchrl import training

    module = omnet_torchrl if what == "make_actor" else training
    monkeypatch.setattr(module, what, lambda *_, **__: 1 / 0, raising=False)
    code, printed = run_script(*OPTIONS, "folder=run")
    assert (code, info("run")["status"], info("run")["error"]) == (1, "failed", "ZeroDivisionError: division by zero")
    assert "in train" in printed


def test_a_full_disk_is_a_line_and_the_status_says_so(failing, monkeypatch):
    """Nothing can be written until what was half written is gone."""
    replace = checkpoint.replace_file

    def full(path, content):
        if "checkpoint_000000040" in path.name:
            path.with_name(path.name + ".tmp").write_bytes(content[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if list(Path("run").rglob("*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace(path, content)

    with monkeypatch.context() as patch:
        for module in (checkpoint, folder):
            patch.setattr(module, "replace_file", full)
        code, printed = run_script(*OPTIONS, "folder=run")
    assert (code, info("run")["status"], info("run")["saved"]) == (1, "failed", 20)
    assert "failed: OSError: [Errno 28] No space left on device" in printed
    assert "Traceback" not in printed
    assert run_script("resume=run")[0] == 0


def test_a_disk_that_stays_full_is_two_lines(failing, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begin = Trainer.prepare
    monkeypatch.setattr(
        Trainer,
        "prepare",
        lambda self: [monkeypatch.setattr(m, "replace_file", full) for m in (checkpoint, folder)] and begin(self),
    )
    code, printed = run_script(*OPTIONS, "folder=run")
    assert code == 1
    assert "warning: run.json could not be written: OSError: [Errno 28] No space left on device" in printed
    assert "failed: OSError: [Errno 28]" in printed
    assert "Traceback" not in printed


def test_a_folder_that_is_moved_away_is_a_line_and_nothing_is_written_in_its_place(failing, monkeypatch):
    evaluate = Trainer._evaluate

    def move(trainer):
        evaluate(trainer)
        if trainer.frames == 30:
            shutil.move("run", "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", move)
        code, printed = run_script(*OPTIONS, "folder=run")
    assert code == 1
    assert "failed: FileNotFoundError: " in printed
    assert "was it moved?" in printed
    assert "Traceback" not in printed
    assert not Path("run").exists()
    code, printed = run_script("resume=elsewhere")
    assert code == 0, printed


def test_a_member_of_a_sweep_that_fails_says_so_at_once_and_the_others_go_on(failing):
    failing("constructor", 4)  # the first member's last, after the check of the whole sweep and its own
    code, printed = run_script("-m", *OPTIONS, "seed=0,1,2", "folder=sweep/${seed}")
    assert code == 1
    assert [info(f"sweep/{seed}")["status"] for seed in range(3)] == ["failed", "finished", "finished"]
    said = "failed: ValueError: env 'Failing-v0' can't be made: RuntimeError: the constructor broke"
    assert printed.index(said) < printed.index("seed 1, on")
    assert printed.splitlines()[-1] == "error: the run in sweep/0: failed"


def test_a_sweep_with_a_member_that_diverged_does_not_end_well(failing):
    code, printed = run_script("-m", *OPTIONS, "optim.lr=1e30,1e-3", "folder=sweep/${optim.lr}", "log_interval=10")
    assert code == 1
    assert {info(run)["status"] for run in Path("sweep").iterdir()} == {"diverged", "finished"}
    assert printed.splitlines()[-1].endswith(": diverged")


def test_a_member_that_is_refused_is_a_line_and_the_sweep_goes_on(failing):
    assert run_script(*OPTIONS, "folder=sweep/0", "total_frames=40")[0] == 0
    shutil.rmtree("sweep/0/checkpoints")
    code, printed = run_script("-m", "resume=sweep/0,sweep/0")
    assert code == 1
    assert printed.count("has no checkpoint in it") >= 2
    assert "Traceback" not in printed


def test_a_with_statement_records_errors_in_a_script_of_ones_own(failing):
    options = {"folder": "run", "env": "Failing-v0", "progress": False}
    with pytest.raises(KeyError, match="mine"), Run(options):
        raise KeyError("mine")
    assert (info("run")["status"], info("run")["error"]) == ("failed", "KeyError: 'mine'")
    with Run({"resume": "run"}):
        pass
    assert (info("run")["status"], info("run")["error"]) == ("failed", "it ended before it was trained")


@pytest.mark.parametrize(
    ("closed", "buffered"),
    [
        (">&-", True),
        pytest.param(">&-", False, marks=pytest.mark.slow),
        pytest.param("2>&1 | true", True, marks=pytest.mark.slow),
        ("2>&1 | true", False),
    ],
)
def test_a_run_needs_neither_output_nor_a_reader(closed, buffered, tmp_path):
    options = " ".join(["env=InvertedPendulum-v4", *(f"'{each}'" for each in OPTIONS[1:]), "folder=run"])
    shell = f"{sys.executable} {EXAMPLE} {options} {closed}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, info(tmp_path / "run")["status"]) == (0, "finished"), done.stderr

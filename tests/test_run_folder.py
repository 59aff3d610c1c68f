"""The folder of a run: made once, found again, and its run.json always whole."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from omnet_torchrl.training.record import folder as folder_module
from omnet_torchrl.training.record.folder import RunFolder, git_commit, peak_memory, versions


def test_a_new_run_never_takes_the_folder_of_another(tmp_path):
    names = [RunFolder.create(tmp_path / "runs" / "seed0").path.name for _ in range(3)]
    assert names == ["seed0", "seed0-1", "seed0-2"]


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    barrier, paths = threading.Barrier(8), []

    def start():
        barrier.wait()
        paths.append(RunFolder.create(tmp_path / "run").path)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 8


def test_a_new_run_says_what_runs(tmp_path):
    info = RunFolder.create(tmp_path / "run").info
    assert info["status"] == "running"
    assert info["command"] == sys.argv
    assert info["versions"] == versions()
    assert info["git_commit"] == git_commit()


def test_info_is_kept_across_open_and_write(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.begin_session(seed=3, device="cpu")
    folder.write_info(status="interrupted", ended="2026-01-01T00:00:00+00:00")
    again = RunFolder.open(folder.path)
    again.begin_session(frames=500)
    info = again.info
    assert (info["seed"], info["device"], info["status"], info["ended"]) == (3, "cpu", "running", None)
    assert [session["frames"] for session in info["sessions"]] == [0, 500]
    assert "versions" not in info["sessions"][0]
    assert info["sessions"][1]["versions"] == versions()


def test_the_end_of_a_session_keeps_its_peak_memory(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.begin_session()
    folder.end_session("interrupted", torch.device("cpu"), frames=500)
    folder.begin_session(frames=500)
    folder.end_session("finished", torch.device("cpu"), frames=900)
    info, (first, second) = folder.info, folder.info["sessions"]
    assert (info["status"], info["frames"], second["frames"]) == ("finished", 900, 500)
    assert info["ended"] is not None
    assert first["peak_memory_mib"] <= second["peak_memory_mib"]
    assert "peak_gpu_memory_mib" not in second


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_memory_is_what_the_kernel_says():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kernel = int(lines["VmHWM"].split()[0]) / 1024  # of kB
    assert peak_memory(torch.device("cpu")) == {"peak_memory_mib": pytest.approx(kernel, abs=64)}


@pytest.mark.gpu
def test_the_peak_memory_of_a_gpu_is_that_of_its_tensors():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    tensor = torch.ones(2**26, device=device)
    assert peak_memory(device)["peak_gpu_memory_mib"] >= tensor.nbytes // 2**20


def test_run_json_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run")
    before = folder.info

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        folder.write_info(status="finished")
    assert folder.info == before


def test_what_a_run_must_have_is_there_before_it_is_one(tmp_path):
    seen = []
    folder = RunFolder.create(tmp_path / "run", lambda folder: seen.append(list(folder.path.iterdir())))
    assert seen == [[folder.checkpoint_path]]
    assert folder.info["status"] == "running"


def test_a_locked_folder_is_nobody_elses(tmp_path):
    folder, other = RunFolder.create(tmp_path / "run"), RunFolder.open(tmp_path / "run")
    folder.lock()
    folder.lock()
    with pytest.raises(ValueError, match=rf"still goes on \(process {os.getpid()} on .+\): stop it first"):
        other.lock()
    lock = f"from omnet_torchrl.training.record.folder import RunFolder; RunFolder({str(folder.path)!r}).lock()"
    assert "still goes on" in subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True).stderr
    folder.unlock()
    other.lock()
    del other
    folder.lock()


def test_paths_lie_in_the_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    assert folder.checkpoint_path.is_dir()
    names = [path.name for path in (folder.config_path, folder.metrics_path, folder.checkpoint_path, folder.curve_path)]
    assert names == ["config.yaml", "metrics.csv", "checkpoints", "learning_curve.png"]


def test_a_folder_that_is_no_run_names_the_runs_beneath(tmp_path):
    for seed in range(5):
        RunFolder.create(tmp_path / "sweep" / f"seed{seed}")
    with pytest.raises(ValueError, match=r"sweep is no run folder: expected run.json.*runs beneath it, e.g. .*seed") as caught:
        RunFolder.open(tmp_path / "sweep")
    assert str(caught.value).count("/seed") == 3


def test_a_folder_that_is_missing_or_damaged_says_so(tmp_path):
    with pytest.raises(ValueError, match="no run folder: it does not exist"):
        RunFolder.open(tmp_path / "nowhere")
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "run.json").write_text('{"status": "runn')
    with pytest.raises(ValueError, match=r"run.json can't be read \("):
        RunFolder.open(folder.path)


OTHER_TYPES = [
    '{"status": 3, "sessions": []}',
    '{"status": "finished", "sessions": 3}',
    '{"status": "finished", "sessions": [3]}',
    '{"status": "finished", "sessions": [{"frames": "3"}]}',
    '{"status": "finished", "sessions": [], "saved": "3"}',
    '{"status": "finished", "sessions": [], "spaces": []}',
]


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"status": "finished"}', "\udcff", *OTHER_TYPES, 9999 * "["])
def test_a_run_json_of_something_else_is_damaged(content, tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "run.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"no run folder: its run.json can't be read \("):
        RunFolder.open(folder.path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / "file" / "deep" / "run", "/proc/x/y"):
        with pytest.raises(ValueError, match=rf"folder must be one that can be made, got .*{path} \(.*: choose another"):
            RunFolder.create(path)


def test_versions_name_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(folder_module, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]
    assert found["no-such-package"] is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with a package in it, as if it were ours."""
    package = tmp_path / "checkout" / "package"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(folder_module, "__file__", str(package / "training" / "record" / "folder.py"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*command):
        identity = ("-c", "user.name=n", "-c", "user.email=e@e")
        return subprocess.run(
            ["git", *identity, *command], cwd=package, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    return package, git


def test_commit_is_that_of_the_checkout(checkout):
    package, git = checkout
    head = git("rev-parse", "HEAD")
    assert git_commit() == head
    (package / "training" / "new.py").touch()
    assert git_commit() == f"{head}-dirty"


def test_a_package_installed_inside_a_checkout_has_no_commit(checkout):
    _, git = checkout
    git("rm", "--cached", "__init__.py")
    assert git_commit() is None


def test_there_is_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


@pytest.mark.parametrize("field", ["status", "spaces", "saved"])
def test_a_run_json_that_was_edited_is_refused_unless_its_user_vouches_for_it(field, tmp_path):
    folder = RunFolder.create(tmp_path / "run", lambda _: {"options": {"env_kwargs": {1: 2}, "folder": Path("x")}})
    folder.write_info(spaces={"low": [-1.0], "high": [float("inf")]}, saved=3)
    assert RunFolder.open(folder.path).info["spaces"] == {"low": [-1.0], "high": [float("inf")]}
    info = json.loads((folder.path / "run.json").read_text())
    edits = {"status": "finished", "spaces": {"low": [-1.0], "high": [2.0]}, "saved": 4}
    edited = {**info, field: edits[field]}
    (folder.path / "run.json").write_text(json.dumps(edited))
    with pytest.raises(
        ValueError, match=r"no run folder: its run\.json can't be read \(it is not what the run wrote: put it back"
    ):
        RunFolder.open(folder.path)
    del edited["sha256"]  # as the runs of earlier versions
    (folder.path / "run.json").write_text(json.dumps(edited))
    assert RunFolder.open(folder.path).info[field] == edits[field]

"""TensorBoard and wandb, the real ones, with the network away."""

import time

import pytest

from omnet_torchrl.training.record import trackers
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.trackers import make_logger

CONFIG = {"env": "Hopper-v4", "network": {"num_subnets": 5}}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run")


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def scalars(folder, name):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_goes_on_from_the_checkpoint_in_the_same_folder(folder):
    pytest.importorskip("tensorboard")
    logger = make_logger("tensorboard", folder, CONFIG)
    for frames in (100, 200, 300):
        logger.log(frames, 1.0, {"eval/return": frames / 2})
    logger.close()
    resumed = make_logger("tensorboard", folder, CONFIG, frames=200)
    resumed.log(300, 1.0, {"eval/return": 7.0})
    resumed.close()
    assert scalars(folder, "eval/return") == [(100, 50.0), (200, 100.0), (300, 7.0)]
    assert str(folder.path / "tensorboard") in resumed.place


def test_tensorboard_writer_that_raises_does_not_stop_the_run(folder):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    messages = []
    logger = make_logger("tensorboard", folder, CONFIG, warn=messages.append)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorboard.SummaryWriter, "add_scalar", full_disk)
        logger.log(1, 0.0, {"x": 1.0})
        logger.close()
    assert messages == [
        "tensorboard: failed, and is off from now on (OSError: [Errno 28] No space left on device); metrics.csv has all."
    ]


@pytest.fixture
def wandb(monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return wandb


def test_wandb_without_a_server_falls_back_to_offline_with_one_warning(folder, wandb, monkeypatch):
    given = {}

    def no_network(**kwargs):
        raise wandb.errors.AuthenticationError("no such host")

    def spy(init=wandb.init, **kwargs):
        given.update(kwargs)
        return init(**kwargs)

    monkeypatch.setattr(wandb, "login", no_network)
    monkeypatch.setattr(wandb, "init", spy)
    messages = []
    logger = make_logger("wandb", folder, CONFIG, mode="online", warn=messages.append, project="p", group=None)
    logger.log(5, 1.0, {"eval/return": 3.0})
    logger.close()
    assert messages == ["wandb can't be reached, and is offline in this run (AuthenticationError: no such host)."]
    (file,) = folder.path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stem == f"run-{folder.info['wandb_id']}"
    # wandb's own process writes the file, a moment after it was told to finish.
    wait_until(lambda: b"eval/return" in file.read_bytes())
    content = file.read_bytes()
    # Nothing of the code and of what is installed is in what a sync would upload.
    assert b"tensordict==" not in content
    assert (given["settings"].disable_git, given["settings"].save_code, given["settings"].console) == (True, False, "off")
    assert logger.place == f"wandb sync {file.parent}"


def test_wandb_without_a_key_asks_nobody(folder, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: prompt)
    messages = []
    trackers.start_wandb(folder, CONFIG, "id", "online", messages.append, {}).close()
    assert len(messages) == 1
    assert "ConnectionError: there is no key" in messages[0]


def test_a_resumed_run_is_the_same_run_of_wandb(folder, monkeypatch):
    seen = []

    def start(folder, config, run_id, *rest):
        seen.append(run_id)
        return trackers.Tracker("somewhere", lambda *values: None, lambda: None)

    monkeypatch.setattr(trackers, "start_wandb", start)
    for each in (folder, RunFolder.open(folder.path)):
        make_logger("wandb", each, CONFIG).close()
    assert seen == 2 * [folder.info["wandb_id"]]


@pytest.mark.parametrize("given", [True, False])
def test_wandbs_environment_variables_hold_where_no_option_says_otherwise(given, folder, wandb, monkeypatch, tmp_path):
    runs, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **kwargs: runs.append(init(**kwargs)) or runs[0])
    (tmp_path / "elsewhere").mkdir()
    for name, value in {"PROJECT": "mine", "RUN_GROUP": "ours", "MODE": "offline", "DIR": tmp_path / "elsewhere"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    options = {"project": "yours", "group": "theirs"} if given else {"project": None, "group": None}
    make_logger("wandb", folder, CONFIG, mode=None, entity=None, **options).close()
    (run,) = runs
    assert (run.project, run.group) == (("yours", "theirs") if given else ("mine", "ours"))
    assert run.settings.mode == "offline"
    assert list((tmp_path / "elsewhere").rglob("offline-run-*"))


def test_wandb_is_off_where_its_environment_variable_says_so(folder, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make_logger("wandb", folder, CONFIG).close()
    assert "wandb_id" not in folder.info
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(ValueError, match="WANDB_MODE must be one of offline, online, disabled, got 'dryrun'"):
        make_logger("wandb", folder, CONFIG)

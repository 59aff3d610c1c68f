"""A run from its options to its summary."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import warnings

import pytest
import torch
from tensordict import TensorDict
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch.optim import Adam
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl import OMNetSACLoss, SubnetPrimer, Update, make_actor, make_qvalue
from omnet_torchrl.metrics import sac_flops
from omnet_torchrl.training import Run, Trainer, describe, evaluate, load_policy, make_env
from omnet_torchrl.training import run as run_module
from omnet_torchrl.training.build import network_options
from omnet_torchrl.training.loop import trainer as trainer_module
from omnet_torchrl.training.loop.stopping import RunError
from omnet_torchrl.training.options import load_config
from omnet_torchrl.training.record import checkpoint, files
from omnet_torchrl.training.record import folder as folder_module

OPTIONS = {
    "env": "InvertedPendulum-v4",
    "compile": False,
    "progress": False,
    "total_frames": 80,
    "init_random_frames": 40,
    "utd_ratio": 1,
    "policy_update_delay": 1,
    "network": {"num_cells": [16, 16], "num_subnets": 3, "sparsity": 0.1},
    "optim": {"batch_size": 8},
    "eval": {"interval": 40, "episodes": 3},
}


def train(run, evaluation=None):
    """What examples/omnet_sac.py does."""
    config = run.config
    env = make_env(config.env, SubnetPrimer(3, generator=0), num_envs=config.num_envs, seed=config.seed)
    actor = make_actor(env.observation_spec, env.action_spec, **network_options(config, "actor"))
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **network_options(config, "critic"))
    loss = OMNetSACLoss(actor, qvalue)
    optims = Adam(qvalue.parameters()), Adam([*actor.parameters(), loss.log_alpha])
    options = {"tau": config.optim.tau, "policy_update_delay": config.policy_update_delay}
    update = Update(loss, optims, **options, compile=False)
    collector = Collector(
        env, actor, frames_per_batch=config.num_envs, init_random_frames=40, auto_register_policy_transforms=False
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(config.total_frames))
    eval_env = make_env(config.env, num_envs=3)
    evaluation = evaluation or (lambda frames: evaluate(actor, eval_env, seed=frames))
    trainer = Trainer(collector, buffer, update, evaluation, run.checkpointer, run.reporter, config)
    return run.train(trainer, describe(config, actor, qvalue))


def options(tmp_path, **changed):
    return {**OPTIONS, "folder": str(tmp_path / "run"), **changed}


def info(tmp_path):
    return json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_folder_says_what_ran_and_how_it_ended(tmp_path, capsys):
    assert train(Run(options(tmp_path, seed=3))) == "finished"
    said = info(tmp_path)
    assert (said["status"], said["env"], said["seed"], said["frames"], said["updates"]) == (
        "finished",
        "InvertedPendulum-v4",
        3,
        80,
        40,
    )
    assert said["versions"]["torch"] == torch.__version__
    assert said["ended"] >= said["started"]
    assert load_config(tmp_path / "run" / "config.yaml").optim.batch_size == 8
    printed = capsys.readouterr().err
    assert "4 - 16 - 16 - 2, 450 parameters" in printed
    assert "5 - 16 - 16 - 1, 449 parameters" in printed


def described_run(tmp_path, algorithm="omnet", **network):
    run = Run({"folder": str(tmp_path / "run"), "progress": False, "algorithm": algorithm, "network": network})
    env = make_env("Hopper-v4")
    networks = (
        make(env.observation_spec, env.action_spec, **network_options(run.config, role))
        for make, role in ((make_actor, "actor"), (make_qvalue, "critic"))
    )
    return describe(run.config, *networks)


def test_what_is_about_to_run_has_its_flops_and_their_share_of_redq(tmp_path):
    described = described_run(tmp_path)
    assert described["subnets"] == "5, weight masks of sparsity 0.5, in the critic and the actor"
    assert described["training FLOPs"].startswith("236.5 M per update, 19% of REDQ's")  # 1 / 5.13, REFERENCES of the paper
    assert described["critic"] == "14 - 256 - 256 - 1, 70,913 parameters"


def test_a_row_says_what_it_is(tmp_path):
    described = described_run(tmp_path, algorithm="redq")
    assert described["algorithm"] == "REDQ"
    assert described["subnets"] == "10 separate critics, one actor"
    assert described["training FLOPs"].startswith("1213.3 M per update, 100% of REDQ's")
    assert described["critic"] == "14 - 256 - 256 - 1, 698,890 parameters"
    assert described["actor"] == "11 - 256 - 256 - 6, 70,406 parameters"
    infinity = described_run(tmp_path, algorithm="omnet_infinity")
    assert infinity["subnets"].startswith(
        "2^31, drawn at each call, redrawn masks of sparsity 0.5, in the critic and the actor"
    )


def test_masks_over_units_count_the_flops_of_the_units_that_are_kept(tmp_path):
    described = described_run(tmp_path, masks="unit", sparsity=[0.5, 0.25])
    assert described["subnets"] == (
        "5, unit masks of sparsity [0.5, 0.25], 128 - 192 hidden units, in the critic and the actor"
    )
    assert described["critic"] == "14 - 256 - 256 - 1, 70,913 parameters"
    flops, redq = sac_flops(11, 3, (128, 192)), sac_flops(11, 3, num_online=10, num_value=10)
    assert described["training FLOPs"].startswith(
        f"{flops / 1e6:.1f} M per update, {flops / redq:.0%} of REDQ's with 10 critics"
    )


def test_a_run_of_masks_over_units_goes_on_and_leaves_its_policy(tmp_path):
    network = {"masks": "unit", "num_cells": [16, 16], "num_subnets": 3, "sparsity": 0.5}
    assert train(Run(options(tmp_path, network=network))) == "finished"
    assert train(Run({"resume": str(tmp_path / "run")}, ["total_frames=90"])) == "finished"
    policies = load_policy(tmp_path / "run"), load_policy(tmp_path / "run", subnet=2)
    assert [p.shape for p in policies[1].parameters()][4] == (8, 8)
    td = TensorDict(observation=torch.randn(7, 4))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        expected = policies[0](td.copy().set("subnet", torch.tensor(2)))["action"]
        assert torch.equal(policies[1](td.copy())["action"], expected)
    with pytest.raises(ValueError, match=r"network\.masks is unit, got weight"):
        Run({"resume": str(tmp_path / "run")}, ["network.masks=weight"])


def test_a_run_whose_evaluation_raises_has_failed_and_can_go_on(tmp_path, capsys):
    def broken(frames):
        raise RuntimeError("no display")

    with pytest.raises(RuntimeError, match="no display"):
        train(Run(options(tmp_path)), broken)
    assert info(tmp_path)["status"] == "failed"
    assert "resume=" in capsys.readouterr().err
    assert train(Run({"resume": str(tmp_path / "run")})) == "finished"
    assert info(tmp_path)["status"] == "finished"
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [int(row["frames"]) for row in csv.DictReader(file) if row["name"] == "eval/return"] == [40, 80]


def test_a_run_that_starts_anew_keeps_what_it_had_logged(tmp_path, capsys):
    def broken(frames):
        raise RuntimeError("no display")

    before = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no display"):
            train(Run({"resume": str(tmp_path / "run")} if before else options(tmp_path, log_interval=40)), broken)
        before.append((tmp_path / "run" / "metrics.csv").read_bytes())
        folder_module.RunFolder.open(tmp_path / "run").write_info(status="running")  # kill -9
    assert train(Run({"resume": str(tmp_path / "run")})) == "finished"
    assert [(tmp_path / "run" / name).read_bytes() for name in ("metrics.csv.old", "metrics.csv.old1")] == before
    assert "what metrics.csv had is in metrics.csv.old1" in capsys.readouterr().err


def test_links_to_nothing_are_seen(tmp_path):
    options = {**OPTIONS, "folder": str(tmp_path / "run")}
    with pytest.raises(KeyError), Run(options):  # before the first checkpoint
        raise KeyError
    for name in ("metrics.csv", "metrics.csv.old"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        (tmp_path / "run" / name).symlink_to("nowhere")
    with Run({"resume": str(tmp_path / "run")}) as run:
        train(run)
    assert os.readlink(tmp_path / "run" / "metrics.csv.old1") == "nowhere"
    assert not (tmp_path / "run" / "metrics.csv").is_symlink()
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "run.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"run\.json"):
        Run({**options, "resume": "auto"})


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_results(tmp_path):
    train(Run(options(tmp_path, checkpoint={"interval": 30})))
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    info = folder_module.RunFolder.open(tmp_path / "run").info
    for change in ({}, {"status": "running"}, {"status": "running", "saved": None}, {"status": "diverged"}):
        folder_module.RunFolder.open(tmp_path / "run").write_info(**{**info, **change})
        with pytest.raises(ValueError, match=r"can't be resumed: .* has no checkpoint in it, .*: put its checkpoints back, or"):
            Run({"resume": str(tmp_path / "run")}, ["total_frames=90"])
        assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(("reached", "begun_anew"), [(36, True), (40, False)])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(reached, begun_anew, tmp_path):
    train(Run(options(tmp_path, num_envs=4, checkpoint={"interval": 33})))  # which saves at 36
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.csv").write_text(f"frames,seconds,name,value\n{reached},0.1,train/episode_return,1.0\n")
    folder_module.RunFolder.open(tmp_path / "run").write_info(status="running", saved=None, frames=0)
    if begun_anew:
        assert train(Run({"resume": str(tmp_path / "run")})) == "finished"
    else:
        with pytest.raises(ValueError, match="has no checkpoint in it, and would start from frame 0"):
            Run({"resume": str(tmp_path / "run")})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_frame_leaves_a_run_that_can_go_on(number, tmp_path, monkeypatch, capsys):

    def compiling(trainer):
        params = trainer.update.loss.actor_network_params
        with params.to_module(trainer.update.loss.actor_network):  # which raises a RuntimeError in the place of the signal's
            os.kill(os.getpid(), number)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), Run(options(tmp_path)):
        os.kill(os.getpid(), number)  # while networks are made
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "prepare", compiling)
        assert train(Run(options(tmp_path))) == "interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    for name in ("run", "run-1"):
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "interrupted"
    assert len(re.findall(r"to go on, in this directory: python \S+ resume=\S+/run(?:-1)?\n", capsys.readouterr().err)) == 2
    assert train(Run({"resume": str(tmp_path / "run-1")})) == "finished"


def test_a_missing_compiler_is_one_line(tmp_path, monkeypatch):
    def prepare(trainer):
        raise InductorError(InvalidCxxCompiler(), None)

    monkeypatch.setattr(Trainer, "prepare", prepare)
    with pytest.raises(RunError, match=r"^compiling needs a C\+\+ compiler, .* or set compile=false\.$"):
        train(Run(options(tmp_path)))
    assert info(tmp_path)["status"] == "failed"


def test_the_time_of_compiling_is_said_and_is_no_part_of_the_others(tmp_path, monkeypatch, capsys):
    train(Run(options(tmp_path)))
    said = capsys.readouterr().err
    assert "compiled in" not in said
    assert "without compiling" not in said
    monkeypatch.setattr(Update, "compiled", property(lambda _: True, lambda *_: None), raising=False)
    monkeypatch.setattr(Trainer, "prepare", lambda _: None)
    monkeypatch.setattr(Trainer, "run", lambda _: "finished")
    train(Run(options(tmp_path)))
    said = capsys.readouterr().err
    assert re.search(r"\ncompiled in 0:\d\d, which no time or rate below includes\n", said)
    assert re.search(r"\n  time +0:\d\d without compiling\n", said)


def test_a_folder_that_exists_is_said_and_stays_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(Run(options(tmp_path)))
    kept = (tmp_path / "run" / "run.json").read_text()
    assert "exists already" not in capsys.readouterr().err
    train(Run({**OPTIONS, "folder": "run"}))
    assert "\nfolder=run exists already: the results go to run-1\n" in f"\n{capsys.readouterr().err}"
    assert (tmp_path / "run" / "run.json").read_text() == kept


def test_a_finished_run_says_so_and_what_goes_on(tmp_path, capsys):
    train(Run(options(tmp_path)))
    capsys.readouterr()
    assert train(Run(options(tmp_path, resume="auto"))) == "finished"
    said = capsys.readouterr().err
    assert "already finished at 80 frames: nothing is left to do; a larger total_frames goes on, e.g. total_frames=160" in said
    assert "goes on from frame" not in said
    assert train(Run(options(tmp_path, resume="auto", total_frames=160))) == "finished"
    assert "goes on from frame 80" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "plural"), [(1, "1 environment"), (2, "2 environments")])
def test_counts_have_their_plural_and_updates_their_unit(number, plural, tmp_path):
    run = Run(options(tmp_path, num_envs=number, policy_update_delay=20, total_frames=80 * number))
    env = make_env(run.config.env)
    actor = make_actor(env.observation_spec, env.action_spec, **network_options(run.config, "actor"))
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **network_options(run.config, "critic"))
    described = describe(run.config, actor, qvalue)
    assert described["frames"].endswith(f" random; {plural}")
    assert described["updates"] == "1 per frame, actor every 20 updates, batch 8"
    assert "training FLOPs" not in described


def test_a_run_that_still_goes_on_is_not_resumed(tmp_path):
    run = Run(options(tmp_path))
    with pytest.raises(ValueError, match=r"still goes on \(process .*\): stop it first"):
        Run({"resume": str(tmp_path / "run")})
    train(run)
    assert train(Run({"resume": str(tmp_path / "run")}, ["total_frames=90"])) == "finished"


def test_a_resume_that_fails_changes_nothing_and_lets_go_of_the_folder(tmp_path):
    train(Run(options(tmp_path)))
    kept = (tmp_path / "run" / "config.yaml").read_text()
    for path in (tmp_path / "run" / "checkpoints").glob("replay*"):
        path.write_bytes(b"damaged")
    run = Run({"resume": str(tmp_path / "run")}, ["total_frames=900"])
    with pytest.raises(SystemExit, match="can't be resumed"):
        train(run)
    assert (tmp_path / "run" / "config.yaml").read_text() == kept
    Run({"resume": str(tmp_path / "run")})


def test_a_resumed_run_keeps_its_own_options_but_those_that_are_given(tmp_path):
    train(Run(options(tmp_path)))
    resumed = Run({"resume": str(tmp_path / "run")}, ["resume='x(\\'y'", "++total_frames=90", "eval.episodes=2"])
    assert (resumed.config.total_frames, resumed.config.eval.episodes, resumed.config.optim.batch_size) == (90, 2, 8)
    for wrong, message in (
        ("+foo=3", "unknown option 'foo'"),
        ("~seed", "own options, got '~seed': leave it"),
        ("seed", "form"),
    ):
        with pytest.raises(ValueError, match=message):
            Run({"resume": str(tmp_path / "run")}, [wrong])
    with pytest.raises(ValueError, match=r"optim.lr is 0.0003, got 0.1; seed is 0, got 1|seed is 0, got 1; .*optim.lr is"):
        Run({"resume": str(tmp_path / "run")}, ["seed=1", "optim.lr=0.1"])
    assert load_config(tmp_path / "run" / "config.yaml").total_frames == 80  # until it goes on
    train(resumed)
    (tmp_path / "run" / "metrics.csv").rename(tmp_path / "elsewhere.csv")
    with pytest.raises(ValueError, match=r"can't be resumed: its metrics.csv is missing, .*: put it back"):
        Run({"resume": str(tmp_path / "run")})
    with pytest.raises(ValueError, match="total_frames is 90, got 60"):
        Run({"resume": str(tmp_path / "run")}, ["total_frames=60"])


EDITS = {
    "- 16\n  - 16": ("- 8\n  - 8", r"network.num_cells was \[16, 16\], now \[8, 8\]"),
    "num_subnets: 3": ("num_subnets: 4", "network.num_subnets was 3, now 4"),
    "actor_layer_norm: true": ("actor_layer_norm: false", "network.actor_layer_norm was True, now False"),
    "num_envs: 1": ("num_envs: 2", "num_envs was 1, now 2"),
    "tau: 0.005": ("tau: 0.05", "optim.tau was 0.005, now 0.05"),
    "seed: 0\n": ("", None),  # which is its default
    "utd_ratio: 1.0\n": ("", "utd_ratio was 1.0, now 20.0"),  # which is not
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    train(Run(options(folder, checkpoint={"interval": 30})))
    return folder / "run"


@pytest.mark.parametrize("before", EDITS)
def test_options_that_were_edited_are_named_before_anything_is_made(before, finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run") / "config.yaml"
    text, (after, message) = path.read_text(), EDITS[before]
    assert before in text
    path.write_text(text.replace(before, after))
    if message is None:
        return Run({"resume": str(tmp_path / "run")}).folder.unlock()
    with pytest.raises(ValueError, match=rf"config.yaml is not what the checkpoint was saved with: {message}: put the file"):
        Run({"resume": str(tmp_path / "run")})


def test_a_trainer_refuses_the_checkpoint_of_other_options(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(run_module, "_check_files", lambda *_: None)
    monkeypatch.setattr(trainer_module, "load_replay", lambda *_: pytest.fail("something is loaded"))
    run = Run({"resume": str(tmp_path / "run")})
    run.config.optim.tau = 0.05
    with pytest.raises(
        SystemExit, match=r"can't be resumed: the checkpoint is of a run with other options: optim.tau was 0.005"
    ):
        train(run)


def test_what_else_is_not_as_it_was_is_said_whatever_the_user_does_with_warnings(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    versions = folder_module.versions()
    monkeypatch.setattr(folder_module, "versions", lambda: {**versions, "torch": "9.9"})
    with open(sorted((tmp_path / "run" / "checkpoints").glob("state_*"))[-1], "ab") as state:
        state.write(b"more")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train(Run({"resume": str(tmp_path / "run")}, ["total_frames=90", "eval.interval=45"])) == "finished"
    printed = capsys.readouterr().err
    for line in (
        r"warning: a damaged checkpoint is passed over for the one before: checkpoint_000000080\.json: state_.* bytes",
        rf"warning: the run goes on, inexactly: torch was {re.escape(torch.__version__)}, now 9\.9\.",
        r"goes on with other options than the checkpoint's: total_frames was 80, now 90; eval\.interval was 40, now 45",
        r"goes on from frame 60",
    ):
        assert re.search(rf"^{line}", printed, re.MULTILINE), line


def broken(frames):
    raise RuntimeError("no display")


def stopped_before_a_checkpoint(tmp_path, **changed):
    with pytest.raises(RuntimeError, match="no display"):
        train(Run(options(tmp_path, **changed)), broken)
    return tmp_path / "run" / "config.yaml"


def test_options_are_bound_before_the_first_checkpoint_too(tmp_path, capsys):
    path = stopped_before_a_checkpoint(tmp_path, env_kwargs={"width": 64})
    content = path.read_text()
    path.write_text(content.replace("tau: 0.005", "tau: 0.05").replace("width: 64", "width: 65"))
    with pytest.raises(
        ValueError, match=r"is not what the run was started with: env_kwargs was .*; optim\.tau was 0\.005, now 0\.05"
    ):
        Run({"resume": str(tmp_path / "run")})
    path.write_text(content.replace("interval: 40", "interval: 20"))
    assert train(Run({"resume": str(tmp_path / "run")}), lambda frames: {}) == "finished"
    said = "no checkpoint yet: starts from the beginning, with other options than before: eval.interval was 40, now 20"
    assert said in capsys.readouterr().err
    assert info(tmp_path)["options"]["eval.interval"] == 20


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its run.json has neither hash nor options, and its checkpoint lacks the options that are newer."""
    path = stopped_before_a_checkpoint(tmp_path).with_name("run.json")
    old = {name: value for name, value in info(tmp_path).items() if name not in ("sha256", "options")}
    path.write_text(json.dumps(old))
    assert train(Run({"resume": str(tmp_path / "run")})) == "finished"
    assert {"sha256", "options"} <= info(tmp_path).keys()


@pytest.mark.parametrize("damage", ["edited", "cut", "a folder", "a pipe"])
def test_records_that_are_not_those_of_the_checkpoint_are_refused_in_one_line(damage, finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / "run") / "metrics.csv"
    content = path.read_bytes()
    path.unlink()
    if damage in ("edited", "cut"):
        path.write_bytes(content.replace(b"train", b"drain") if damage == "edited" else content[:-9])
    else:
        (path.mkdir if damage == "a folder" else lambda: os.mkfifo(path))()
    with pytest.raises(SystemExit, match=r"^error: .*can't be resumed: .*metrics.csv.*(put the file back|is no file)\.$"):
        train(Run({"resume": str(tmp_path / "run")}))


@pytest.mark.parametrize("everything", [False, True])
def test_a_full_disk_ends_the_run_in_one_line_and_it_can_go_on(everything, tmp_path, monkeypatch, capsys):
    """Where something can still be written, the status is ``failed``."""
    write = files.replace_file

    def full(path, content):
        if path.name.startswith("state_000000060") or (everything and full.seen):
            full.seen = True
            with files.writing(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    full.seen = False
    with monkeypatch.context() as patch:
        for module in (checkpoint, folder_module):
            patch.setattr(module, "replace_file", full)
        with pytest.raises(files.WriteError, match=r"state_\w+\.pt can't be written \(No space left on device\)"):
            train(Run(options(tmp_path, checkpoint={"interval": 30})))
    assert info(tmp_path)["status"] == ("running" if everything else "failed")
    printed = capsys.readouterr().err
    assert re.search(r"^failed: .*state_\w+\.pt can't be written .*: make room or mend that, and go on", printed, re.MULTILINE)
    assert ("run.json could not be written" in printed) == everything
    assert train(Run({"resume": str(tmp_path / "run")})) == "finished"
    assert "goes on from frame 30" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_a_line_and_no_end(pictures, tmp_path, capsys):
    run = Run(options(tmp_path))
    run.folder.curve_path.mkdir()
    assert train(run) == "finished"
    assert "learning_curve.png could not be drawn" in capsys.readouterr().err


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_beside_the_csv(logger, tmp_path):
    assert train(Run(options(tmp_path, logger=logger))) == "finished"
    assert list((tmp_path / "run").glob(f"{logger}/**/*"))

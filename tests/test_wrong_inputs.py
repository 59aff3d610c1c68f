"""Wrong command lines and configurations: one line that names what is wrong, a code that is not 0, and nothing is made.

Most go through the script's entry point in this process; a dozen are processes of their own, three of them not slow.
"""

import os
import shlex
import subprocess
import sys
import time

import pytest
from conftest import EXAMPLE, run_script

from omnet_torchrl import doctor
from omnet_torchrl.training import Run

HUGE = "9" * 20
TIB = 10**12
ABSENT = ["rq", *(package.split("-")[1] for module, package in doctor.LAUNCHERS.items() if not doctor._exists(module))]
# Kind: what is wrong, and what its line says.
LINES = {
    "no value": {
        **{f"{name}=???": f"{name} must have a value, got" for name in ("env", "seed", "total_frames", "optim.lr", "folder")},
        "network.num_cells=???": "network.num_cells must have a value, got",
        "env=null": "env",
        "env=": "env must not be empty",
        "algorithm=": "algorithm",
        "folder=": "folder must not be empty",
        "seed=null": "seed",
        "compile=null": "compile",
        "network.num_cells=null": "network.num_cells",
        "loss=null": "loss",
    },
    "too large": {
        **{f"{name}={HUGE}": f"{name} must be in [1, 1e12], got {HUGE}" for name in ("total_frames", "log_interval")},
        f"eval.interval={HUGE}": "eval.interval must be in",
        f"buffer_size={HUGE}": "buffer_size must be in",
        f"seed={HUGE}": "seed must be in [0, 2147483648)",
        "utd_ratio=1e308": "utd_ratio must be in (0, 1e6]",
        "utd_ratio=inf": "utd_ratio must be in",
        "num_threads=100000000": "num_threads must be in [1, 1024]",
        "num_envs=100000": "num_envs must be in [1, 4096]",
        "network.freeze_hidden=true": "network.freeze_hidden must be false but with env=MinAtar/<game>",
        "loss.l1=0.1": "loss.l1 must be 0 with algorithm=omnet",
        "network.structure_run=there": "network.structure=l1 and network.structure_run must be given together",
        "network.structure=random": "network.structure must be null but with env=MinAtar/<game>",
        "algorithm=dqn": "plays MinAtar's games: env must be one of MinAtar/asterix, MinAtar/breakout, ",
        "eval.episodes=1000000": "eval.episodes must be in [0, 4096]",
        "eval.bias_episodes=1000000": "eval.bias_episodes must be in",
        "network.num_subnets=100000000": "network.num_subnets must be in",
        f"checkpoint.keep={HUGE}": "checkpoint.keep must be in",
        f"checkpoint.interval={HUGE}": "checkpoint.interval must be in",
        f"policy_update_delay={HUGE}": "policy_update_delay must be in",
        f"optim.batch_size={HUGE}": "optim.batch_size must be in",
        f"network.num_cells=[{','.join(['8'] * 65)}]": "one to 64 numbers of at least 1, got 65 numbers",
    },
    "more memory than there is": {
        f"buffer_size={TIB} total_frames={TIB}": f"buffer_size={TIB} with total_frames={TIB} must fit into the memory of",
        "network.num_cells=[1000000,1000000]": "network.num_cells=[1000000, 1000000] with network.num_subnets=5 must fit",
        "network.num_cells=[10000000,10000000] algorithm=redq": "with network.num_subnets=10 must fit into the memory",
        "network.num_subnets=1000000 network.num_cells=[4096,4096]": "with network.num_subnets=1000000 must fit",
        "utd_ratio=1000000 init_random_frames=100000 optim.batch_size=100000": "utd_ratio=1e+06 with optim.batch_size=100000",
    },
    "too small": {
        **{f"{name}=0": f"{name} must be in [1, " for name in ("total_frames", "num_envs", "num_threads", "eval.interval")},
        **{
            f"{name}=-1": f"{name} must be in"
            for name in ("seed", "utd_ratio", "buffer_size", "init_random_frames", "optim.lr")
        },
        **{f"{name}=-1": f"{name} must be in" for name in ("optim.tau", "loss.gamma", "loss.alpha_init", "observation_offset")},
        "checkpoint.keep=1": "checkpoint.keep must be in",
        "network.num_cells=[]": "network.num_cells must be one to 64 numbers",
        "network.num_cells=[0]": "network.num_cells must be",
        "network.dropout=1": "network.dropout must be in [0, 1)",
        "network.sparsity=1": "network.sparsity must be",
        "network.sparsity=-0.1": "network.sparsity must be",
        "loss.gamma=nan": "loss.gamma must be in",
        "optim.lr=nan": "optim.lr must be in",
        "loss.target_entropy=inf": "loss.target_entropy must be in",
    },
    "of another type": {
        "seed=1.5": "seed must be a whole number, got 1.5.",
        "seed=one": "seed must be a whole number, got 'one'.",
        "seed=[1]": "seed must be a whole number, got [1].",
        "total_frames=1e5": "total_frames must be a whole number, got 100000.0: write 100000.",
        "max_episode_steps=foo": "max_episode_steps must be a whole number or null, got 'foo'.",
        "compile=maybe": "compile must be true or false, got 'maybe'.",
        "network.dense_input=yes_please": "network.dense_input must be true or false, got 'yes_please'.",
        "utd_ratio=many": "utd_ratio must be a number, got 'many'.",
        "loss.target_entropy=low": "loss.target_entropy must be a number or null, got 'low'.",
        "folder=null": "folder must be a text, got null.",
        "total_frames=true": "total_frames must be a whole number, got true.",
        "network=3": "network must be options in braces, as network={name:value}, got 3.",
        "optim=[1,2]": "optim must be options in braces, as optim={name:value}, got something else.",
        "env_kwargs=3": "env_kwargs must be options in braces, as env_kwargs={name:value}, got 3.",
        "wrappers=a.B": "wrappers must be a list of texts, got 'a.B'.",
        "network.num_cells=256": "network.num_cells must be a list of whole numbers, got 256.",
        "network.num_cells=[a]": "network.num_cells must be a list of whole numbers, got 'a'.",
        "network.num_cells=[1.5]": "network.num_cells must be a list of whole numbers, got 1.5.",
        "network.sparsity=half": "network.sparsity must be",
        "network.sparsity=[0.5,a,0.5]": "network.sparsity must be",
        "network.sparsity={a:1}": "network.sparsity must be",
        "eval.episodes={a:1}": "eval.episodes must be a whole number, got {'a': 1}.",
    },
    "no choice": {
        "device=gpu": "device must be auto, cpu, cuda or",
        "device=cuda:99": "device",
        "precision=float16": "precision must be one of float32, bfloat16, got 'float16'",
        "logger=tensorbord": "did you mean tensorboard",
        "wandb.mode=on": "wandb.mode must be one of offline, online, disabled",
        "network.critic=mask": "did you mean masked",
        "network.actor=none": "network.actor must be one of",
        "network.masks=units": "did you mean unit",
        "algorithm=omnett": "the closest are omnet",
        "algorithm=1": "algorithm must be one of",
        "env=Hoper-v4": "the closest are Hopper-v",
        "env=CartPole-v1": "the action of env must be",
        "env=nomodule:Env-v0": "env 'nomodule:Env-v0'",
        "env=3": "env must be a gymnasium id",
        "env=Hinge": "got 'Hinge'; a class, function or id of your own is module:Name, as my_module:Hinge.",
        "env=mybots.Hinge": "module:Name, as mybots:Hinge.",
        "env=minatar/Breakout": "the closest are MinAtar/breakout",
        "env=dm_control/cheetah-run-v0": "shimmy registers it: write env=shimmy:dm_control/cheetah-run-v0.",
        "env=Hopper-v4 env_kwargs.frame_skips=2": "frame_skip, observation_space",
        "algorithm=td3": "algorithm=td3 is trained by omnet_td3.py, got omnet_sac.py: start that one",
        "env=MinAtar/breakout": "algorithm must be one of omnet_dqn, dqn",
        "algorithm=pathways": "env=Hopper-v4 is 1 task, which algorithm=pathways is not for: join two or more by '+'",
        "env=HalfCheetah/forward+backward": "is 2 tasks, which algorithm=omnet is not for: use one of pathways, ",
    },
    "no option": {
        "sed=1": "unknown option 'sed'; did you mean 'seed'",
        "num_subnets=3": "did you mean 'network.num_subnets'",
        "network.num_subnet=3": "did you mean 'network.num_subnets'",
        "network.num_cells.0=3": "unknown option 'network.num_cells.0'",
        "+new=1": "unknown option 'new'",
        "++optim.betas=[0.9,0.99]": "unknown option 'optim.betas'",
        "~nothing": "nothing",
        "seed": "options have the form name=value, got 'seed'",
        "=1": "unknown option ''",
        "seed=1=2=": "seed",
        "seed=[1": "options have the form name=value",
        "folder='a": "options have the form name=value",
        "network={num_subnet:3}": "unknown option 'network.num_subnet'; did you mean 'network.num_subnets'",
        "network={num_subnets:": "options have the form name=value",
        "seed=${nothing}": "seed",
        "seed=${env}": "seed",
        "folder=${nothing:x}": "nothing",
        "seed=0,1": "sweep over it, add --multirun",
        "seed=range(0,2)": "seed",
        "algorithm=redq,sac": "algorithm",
    },
    "two that contradict each other": {
        "init_random_frames=300000": "init_random_frames must be below total_frames=300000",
        "total_frames=5000": "init_random_frames must be below total_frames=5000",
        "optim.batch_size=6000": "optim.batch_size must be at most init_random_frames=5000",
        "buffer_size=100": "buffer_size must be at least optim.batch_size=256",
        "num_envs=7": "must be a multiple of num_envs=7",
        "policy_update_delay=10000000": "(utd_ratio=20.0 in each of 295000 frames)",
        "network.num_subnets=1": "loss.num_target_subnets must be in [1, network.num_subnets=1], got 2",
        "loss.num_trained_subnets=6": "loss.num_trained_subnets must be in [1, network.num_subnets=5]",
        "network.masks=redrawn": "loss.replacement must be true with network.masks=redrawn",
        "network.masks=unit network.dense_input=true": "network.dense_input must be false with network.masks=unit",
        "network.masks=unit network.mask_bias=true": "network.mask_bias must be false with network.masks=unit",
        "network.sparsity=[0.5]": "network.sparsity must have one number for each of 3 linear layers",
        "network.sparsity=[0.5,0.5,0.5] network.dense_output=true": "with network.dense_output=true",
        "resume=auto folder=runs/${now:%H}": "resume=auto needs a folder without the time of day, got folder=runs/",
        "resume=nowhere": "is no run folder: it does not exist",
        "resume=/dev/null": "is no run folder",
    },
    "folders that can't be": {
        "folder=/proc/x": "folder must be one that can be made, got /proc/x",
        "folder=/dev/null/x": "folder must be one that can be made",
        f"folder={'x' * 300}": "folder must be one that can be made",
        "hydra.run.dir=/proc/x": "/proc/x",
        "hydra.run.dir=/dev/null": "/dev/null",
    },
    "Hydra's own": {
        "--resolve": "--resolve flag can only be used",
        "--nope": "unrecognized arguments: --nope",
        "--cfg": "--cfg",
        "--cfg nothing": "invalid choice: 'nothing'",
        "--info nothing": "invalid choice: 'nothing'",
        "--run --multirun": "Only one of --run, --multirun",
        "seed=1 -m env=Hopper-v4": "unrecognized arguments: env=Hopper-v4",
        "--config-name nope": "Cannot find primary config 'nope'",
        "--config-path nope": "nope",
        "--config-dir nope": "nope' not found",
        **{f"hydra/launcher={name}": f"pip install hydra-{name}-launcher." for name in ABSENT},
        "hydra/launcher=ray_aws": "pip install hydra-ray-launcher.",
        "-m hydra/sweeper=optuna": "needs a plugin of Hydra's that is not installed: pip install hydra-optuna-sweeper.",
        "hydra/launcher=nope": "Could not find 'hydra/launcher/nope'",
        "hydra/nope=x": "hydra/nope",
        "hydra.nope=x": "nope",
        "hydra.verbose=[1": "options have the form name=value",
        "--experimental-rerun": "expected one argument",
    },
    "sweeps": {
        "-m seed=interval(0,1)": "does not support sweep type : INTERVAL",
        "-m seed=range(0,-1)": "a sweep needs at least one value of each option, got 'seed=range(0,-1)'",
        "-m seed=choice()": "seed",
        "-m seed=0,-1": "(the job seed=-1 of the sweep; none was started)",
        "-m seed=0,???": "seed must have a value",
        "-m env=Hopper-v4,Nope-v4": "the closest are",
        "-m env=CartPole-v1,Hopper-v4": "the action of env must be",
        "-m algorithm=omnet,reqd": "the closest are redq",
        "-m sed=0,1": "unknown option 'sed'",
        "-m seed=0,one": "seed must be a whole number, got 'one'. (the job seed=one of the sweep; none was started)",
        "-m utd_ratio=1,1e308": "utd_ratio must be in",
        "-m network.num_cells=[64,64],[0]": "network.num_cells must be",
        "-m resume=nowhere,nothing": "is no run folder",
        "-m hydra.sweep.dir=/proc/x": "/proc/x",
        "-m hydra/sweeper=nope": "Could not find 'hydra/sweeper/nope'",
        "-m seed=range(0,2,0)": "range() arg 3 must not be zero",
    },
}
CONFIGS = {
    "seed: [": "mine.yaml",
    "seed: -1": "seed must be in",
    "sed: 1": "In 'mine': unknown option 'sed'; did you mean 'seed'?",
    "- seed": "",
    "seed": "",
    "network: {num_cells: 3}": "In 'mine': network.num_cells must be a list of whole numbers, got 3.",
    "optim: {lr: .nan}": "optim.lr must be in",
    "algorithm: nope": "algorithm must be one of",
    "env: null": "env",
    "seed: ${nothing}": "nothing",
    "defaults: [nope]": "nope",
    "defaults: 3": "defaults",
    "\0": "",
    "a: b: c": "",
    "!!python/object:os.system {}": "",
}
PROCESSES = [  # refused by our checks before Hydra, by Hydra, and as the run begins
    "network.num_cells=[1000000,1000000]",
    *("-m seed=interval(0,1)", "sed=1"),
]
SLOW_PROCESSES = [
    *("env=???", f"total_frames={HUGE}", "utd_ratio=1e308", "num_threads=100000000"),
    *("-m seed=range(0,-1)", "--resolve", "hydra.run.dir=/proc/x", "--nope", "seed=0,1"),
]
CASES = [(line, said) for lines in LINES.values() for line, said in lines.items()]


def check(code, printed, said, folder):
    lines = printed.splitlines()
    assert code not in (0, None)
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Error:" not in lines[0] or "/" in lines[0], "the name of an exception is for programmers, but for a file's"
    assert list(folder.iterdir()) == []


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """An empty working directory, and no training whatever is accepted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("it is trained"))
    return tmp_path


@pytest.mark.parametrize(("line", "said"), CASES, ids=[line[:60] for line, _ in CASES])
def test_a_wrong_command_line_is_one_line_and_nothing_is_made(line, said, nowhere):
    start = time.process_time()
    code, printed = run_script(*shlex.split(line, posix="'" not in line))
    check(code, printed, said, nowhere)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("content", CONFIGS)
def test_a_wrong_configuration_is_one_line_and_nothing_is_made(content, nowhere, tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    defaults = "" if "defaults" in content else "defaults: [omnet_sac, _self_]\n"
    (folder / "mine.yaml").write_text(defaults + content)
    code, printed = run_script("--config-dir", str(folder), "--config-name", "mine")
    check(code, printed, CONFIGS[content], nowhere)


@pytest.mark.parametrize("variable", ["online please", "dryrun"])
def test_what_wandb_does_not_know_is_one_line(variable, nowhere, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", variable)
    check(*run_script("logger=wandb"), f"WANDB_MODE must be one of offline, online, disabled, got '{variable}'", nowhere)


@pytest.mark.parametrize("line", [*PROCESSES, *(pytest.param(line, marks=pytest.mark.slow) for line in SLOW_PROCESSES)])
def test_a_process_with_a_wrong_command_line_is_one_line_too(line, tmp_path):
    start = sum(os.times()[2:4])  # of processes that have ended: other work on the machine does not count
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, *shlex.split(line)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    check(done.returncode, done.stderr, dict(CASES)[line], tmp_path)
    assert done.stdout == ""
    assert sum(os.times()[2:4]) - start < 10


def test_there_are_many():
    assert len(CASES) + len(CONFIGS) >= 150

"""What is said of a command line before Hydra reads it, and what Hydra reads of what we write."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser

from omnet_torchrl.training.command_line import (
    JOBS,
    _Flags,
    argument,
    check_command_line,
    check_job,
    check_overrides,
    parse,
    register,
)

EXAMPLE = Path(__file__).parent.parent / "examples" / "omnet_sac.py"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["algorithm=omnet,redq", "-m"],
        ["-m", "seed=0,1,2", "env=Walker2d-v4", "utd_ratio=range(1,5)"],
        ["network.num_cells=[64,64]", "network.sparsity=[0,0.5,0]", "optim.lr=1e-4"],
        ["network={num_subnets:3}"],
        ["env=my_module:MyEnv-v0", "env_kwargs.of_its_own=1", "env_kwargs={of_its_own:2}", "wrappers=[a.B,c.D]"],
        ["hydra.run.dir=x", "hydra/launcher=joblib", "+new=1", "++new.deep=1", "~seed", "~optim.lr=3e-4"],
        ["--config-name", "other", "-cn", "other", "-cp", "conf", "--config-dir", "conf", "-p", "a.b", "--config-name=other"],
        ["--config-path", "conf", "-cd", "conf", "--package", "a.b", "--info", "all", "--cfg=job"],
        *(["--cfg", "job"], ["-c", "job", "seed=1"], ["--cfg", "all", "--resolve"], ["-sc", "install=bash"], ["--info"]),
    ],
)
def test_options_that_exist_pass(arguments):
    check_overrides(arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("network.num_subnet=3", "unknown option 'network.num_subnet'; did you mean 'network.num_subnets'?"),
        ("num_subnets=3", "unknown option 'num_subnets'; did you mean 'network.num_subnets'?"),
        ("env_kwarg.size=3", "unknown option 'env_kwarg.size'; did you mean 'env_kwargs'?"),
        ("Seed=3", "unknown option 'Seed'; did you mean 'seed'?"),
        ("utd=1,2", "unknown option 'utd'; did you mean 'utd_ratio'?"),
        ("hydr.run.dir=x", "unknown option 'hydr.run.dir'; did you mean "),
    ],
)
def test_an_unknown_option_names_the_closest(argument, message):
    with pytest.raises(ValueError) as error:
        check_overrides(["-m", "seed=1", argument])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("word", ["seed", "seed=a=b"])
def test_an_argument_that_is_no_option_is_repeated(word):
    with pytest.raises(ValueError, match=f"options have the form name=value, got '{word}': "):
        check_overrides([word])


def test_hydras_flags_are_those_that_hydra_reads():
    def flags(parser):
        return {
            action.dest: (tuple(sorted(action.option_strings)), action.choices and list(action.choices))
            for action in parser._actions
        }

    assert flags(_Flags()) == flags(get_args_parser())


@pytest.mark.parametrize("wrong", [["--nope"], ["--cfg"], ["--cfg", "x"], ["seed=0", "-m", "env=x"], ["--info", "x"], ["-x"]])
def test_flags_that_hydra_does_not_read_are_one_line(wrong):
    with pytest.raises(
        ValueError, match=r"^[^\n]+ \(first Hydra's flags, see --hydra-help, then options in the form name=value\)$"
    ):
        check_overrides(wrong)


@pytest.mark.parametrize("argument", ["algorithm=red", "algorithm=omnet,red"])
def test_an_unknown_row_on_the_command_line_names_the_closest(argument):
    with pytest.raises(ValueError, match=r"algorithm must be one of omnet, .*, got 'red'; the closest are redq"):
        check_overrides([argument])


SWEEPS = {
    "network.num_subnets=5,1,8": "loss.num_target_subnets must be in [1, network.num_subnets=1], got 2: ",
    "env=Hopper-v4,Nope-v4": "env must be a gymnasium id with its version, got 'Nope-v4'; ",
    "algorithm=omnet,td3": "algorithm=td3 is trained by omnet_td3.py, got omnet_sac.py: start that one, or choose another row.",
    "seed=range(-1,2)": "seed must be in [0, 2147483648), got -1.",
}


@pytest.mark.parametrize("option", SWEEPS)
def test_every_job_of_a_sweep_is_checked_before_the_first(option):
    register()
    with pytest.raises(ValueError) as error:
        check_command_line(["--multirun", "compile=false", option, "hydra/launcher=basic"], EXAMPLE)
    assert str(error.value).startswith(SWEEPS[option])
    assert f"(the job compile=False {option.split('=')[0]}=" in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["-m", "seed=0,1", "env=Hopper-v4,Walker2d-v4"], ["-m", "-cn", "quick_start", "algorithm=omnet,redq"]),
        *(["-m", "algorithm=glob(*)", "seed=-1"], ["-m", "optim.lr=interval(0,1)"], ["seed=-1"], ["-c", "job", "seed=3"]),
    ],
)
def test_what_is_no_wrong_sweep_passes(arguments):
    register()
    check_command_line(arguments, EXAMPLE)


JOBS_THAT_DIFFER = [("dqn", "omnet_td3"), ("omnet", "minatar_dqn"), ("pathways", "dapd_sac"), ("sac", "multitask")]


@pytest.mark.parametrize(("algorithm", "job"), JOBS_THAT_DIFFER)
def test_a_row_of_another_job_names_it(algorithm, job):
    with pytest.raises(ValueError, match=rf"algorithm={algorithm} is trained by \w+\.py.*, got {job}\.py: start that one"):
        check_job(algorithm, job)
    check_job(algorithm, "my_own_script")


def test_the_jobs_are_the_examples_and_take_their_own_rows():
    assert set(JOBS) <= {path.stem for path in EXAMPLE.parent.glob("*.py")}
    register()
    for job in JOBS:
        with initialize_config_dir(str(EXAMPLE.parent), version_base="1.3"):
            check_job(compose(job).algorithm, job)


@pytest.mark.parametrize(
    "value", ["runs/x", "runs/lr=0.1", "a(b)", "my runs/x", "it's", "0", "1e3", "a,b", "null", "[x]", " x"]
)
def test_hydra_reads_an_argument_as_it_was_meant(value):
    (word,) = shlex.split(argument("resume", value))
    assert parse(word).value() == value


def test_an_argument_is_quoted_only_where_it_must_be():
    assert argument("resume", "runs/x-1") == "resume=runs/x-1"

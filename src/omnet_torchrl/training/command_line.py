"""Hydra's command line: checked before Hydra reads it, whose errors say little, and written so that it reads what is meant."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from omnet_torchrl.training.loop.environments import check_env, env_options
from omnet_torchrl.training.loop.stopping import RunError
from omnet_torchrl.training.options import ROWS, TrainConfig, row, to_config
from omnet_torchrl.training.options.checks import OPTIONS, refused, unknown
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.training.record.terminal import flush

# Hydra's flags (hydra.cc/docs/advanced/hydra-command-line-flags), of which it has no public list.
SWITCHES = {"help": "h", "hydra-help": "", "version": "", "resolve": "", "run": "r", "multirun": "m", "shell-completion": "sc"}
VALUES = {"cfg": "c", "package": "p", "config-path": "cp", "config-name": "cn", "config-dir": "cd", "experimental-rerun": ""}
# Hydra's own plugins, which are packages of their own: hydra-joblib-launcher.
PLUGINS = {"launcher": ("joblib", "ray", "rq", "submitit"), "sweeper": ("ax", "nevergrad", "optuna")}
# The example jobs, and the loss that each of them makes.
JOBS = {"omnet_sac": "sac", "dapd_sac": "sac", "omnet_td3": "td3", "minatar_dqn": "dqn", "multitask": "tasks"}
CHOICES = {"cfg": ("job", "hydra", "all"), "info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")}


class _Flags(argparse.ArgumentParser):
    """Reads Hydra's flags; what it can't read is a ``ValueError``."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        for name, short in SWITCHES.items():
            self.add_argument(f"--{name}", *([f"-{short}"] if short else []), action="store_true")
        for name, short in VALUES.items():
            self.add_argument(f"--{name}", *([f"-{short}"] if short else []), choices=CHOICES.get(name))
        self.add_argument("--info", "-i", nargs="?", const="all", choices=CHOICES["info"])
        self.add_argument("overrides", nargs="*")

    def error(self, message: str) -> NoReturn:
        """Say it without the usage."""
        raise ValueError(f"{message} (first Hydra's flags, see --hydra-help, then options in the form name=value)")


def execute(main: Callable[[], object], script: str | Path) -> None:
    """Run a script's ``main``, which :func:`hydra.main` decorates: whatever is refused is one line and a code that is not 0.

    A run says itself how it ended, see :meth:`~omnet_torchrl.training.Run.start`. With ``HYDRA_FULL_ERROR=1`` in the
    environment, errors are tracebacks.

    Args:
        main (callable): the job.
        script (str or Path): its ``__file__``; the configurations lie beside it.
    """
    register()
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):  # Hydra's own errors come here
            check_command_line(sys.argv[1:], script)
            main()
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        known = isinstance(error, ValueError | HydraException | OmegaConfBaseException | RunError)
        text = _said(error) if known else f"{type(error).__name__}: {error}"
        sys.exit(f"error: {' '.join(text.split())}")
    finally:
        flush()


def register() -> None:
    """Offer :class:`TrainConfig` to Hydra's ``defaults`` lists, named ``train``, and the rows as its group ``algorithm``."""
    store = ConfigStore.instance()
    options = OmegaConf.structured(TrainConfig)
    OmegaConf.set_struct(options.env_kwargs, False)  # whose names are the environment's
    store.store(name="train", node=options)
    for name, each in ROWS.items():
        store.store(group="algorithm", name=name, node={"algorithm": name, **each.options}, package="_global_")


def check_job(algorithm: str, job: str) -> None:
    """Raise a ``ValueError`` if ``job``, the name of a script, is one of the examples, and not the one for the row's loss."""
    kind = row(algorithm).loss
    if JOBS.get(job, kind) != kind:
        others = " or ".join(f"{name}.py" for name, loss in JOBS.items() if loss == kind)
        raise ValueError(f"algorithm={algorithm} is trained by {others}, got {job}.py: start that one, or choose another row.")


def parse(argument: str) -> Override:
    """An option as Hydra reads it; a ``ValueError`` repeats an argument that is no option."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise ValueError(f"options have the form name=value, got {argument!r}: {error}") from error


def check_overrides(arguments: Sequence[str]) -> None:
    """Raise a ``ValueError`` with the closest option if the command line, ``sys.argv[1:]``, sets one that does not exist.

    Hydra would say only that the key is not in its struct. What is added (``+``), deleted (``~``) or Hydra's own is left to it.
    """
    for override in map(parse, _split(arguments)[1]):
        key = override.key_or_group
        known = key in OPTIONS or key.startswith("env_kwargs.")  # whose names are the environment's
        if override.type is OverrideType.CHANGE and not _is_hydras(override) and not known:
            raise ValueError(unknown(key))
        value = override.value()
        if key == "algorithm" and not isinstance(value, Glob):
            for name in value.list if isinstance(value, ChoiceSweep) else [value]:
                row(str(name))


def check_command_line(arguments: Sequence[str], script: str | Path) -> None:
    """Check the command line as :func:`check_overrides` does, and the options and the environment of every job of a sweep.

    Jobs of sweepers other than Hydra's own, of ``glob()`` and of other folders of configurations are checked as they start.

    Args:
        arguments (sequence of str): ``sys.argv[1:]``.
        script (str or Path): the file whose configurations lie beside it, the default one under its own name.
    """
    check_overrides(arguments)
    script, (flags, options) = Path(script).resolve(), _split(arguments)
    overrides = [override for override in map(parse, options) if not _is_hydras(override)]
    beyond = any(isinstance(override.value(), Glob | IntervalSweep) for override in overrides)
    if not flags.multirun or flags.config_path or flags.config_dir or beyond:
        return
    environments = set()
    with initialize_config_dir(str(script.parent), version_base="1.3"):
        values = []
        for each in overrides:
            own = list(each.sweep_string_iterator()) if each.is_sweep_override() else [each.get_value_element_as_str()]
            if not own:
                raise ValueError(f"a sweep needs at least one value of each option, got {each.input_line!r}, which has none.")
            values.append([f"{each.get_key_element()}={value}" for value in own])
        for job in map(list, itertools.product(*values)):
            try:
                config = to_config(compose(flags.config_name or script.stem, job))
                check_job(config.algorithm, script.stem)
                environment = f"{config.env} {env_options(config)}"
                if environment not in environments:
                    check_env(config.env, **env_options(config))
                environments.add(environment)
                if config.resume not in (None, "auto"):
                    RunFolder.open(config.resume)
            except (ValueError, HydraException) as error:
                raise ValueError(f"{_said(error)} (the job {shlex.join(job)} of the sweep; none was started)") from error


def merge_overrides(options: Mapping[str, Any], overrides: Sequence[str], what: str) -> DictConfig:
    """Nested options with those changed that a command line gives; a ``ValueError`` refuses to delete one, for ``what``."""
    merged = OmegaConf.create(dict(options))
    for override in map(parse, overrides):
        if override.type is OverrideType.DEL:
            raise ValueError(f"{what} goes on with the run's own options, got {override.input_line!r}: leave it out.")
        if override.key_or_group == "folder":
            raise ValueError(f"{what} goes on in that folder, got {override.input_line!r} as well: leave out one of the two.")
        OmegaConf.update(merged, override.key_or_group, override.value(), force_add=True)
    return merged


def argument(name: str, value: str) -> str:
    """``name=value`` for a shell, such that Hydra reads just this value."""
    given = f"{name}={value}"
    try:
        as_it_is: Any = parse(given).value()
    except ValueError:
        as_it_is = None
    return shlex.quote(given if as_it_is == value else f"{name}={QuotedString(value, Quote.single).with_quotes()}")


def _split(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags, and the options, of which ``install=bash`` is no part."""
    flags = _Flags().parse_args(list(arguments))
    return flags, [] if flags.shell_completion else flags.overrides


def _said(error: Exception) -> str:
    """What an error says, with the reason that Hydra keeps to itself."""
    text, cause = str(error), error.__cause__ or error.__context__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException) and "hydra" not in str(cause.full_key):
        where = re.match("In '.*?': ", text)  # the file
        return f"{where[0] if where else ''}{refused(cause)}"
    plugin = re.search(r"Could not find 'hydra/(launcher|sweeper)/(([a-z]+)\w*)'", text)
    if plugin is None or plugin[3] not in PLUGINS[plugin[1]]:
        return text
    install = f"pip install hydra-{plugin[3]}-{plugin[1]}"
    return f"hydra/{plugin[1]}={plugin[2]} needs a plugin of Hydra's that is not installed: {install}."


def _is_hydras(override: Override) -> bool:
    return re.split("[./]", override.key_or_group)[0] == "hydra"

"""What is said of an environment that can't be found or made: which names there are, and which arguments it takes."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from omnet_torchrl.envs import MinAtarEnv, make_meta_world
from omnet_torchrl.envs.minatar import GAMES
from omnet_torchrl.envs.suites import HALF_CHEETAH, META_WORLD
from omnet_torchrl.training.options.contradictions import MINATAR

LIBRARIES = {"dm_control": "shimmy"}  # the namespace of ids, and the module that registers them


def unknown_env(name: str, others: Iterable[str]) -> str:
    """The message that neither gymnasium nor ``others`` have an environment of this name."""
    expected = f"env must be a gymnasium id with its version, got {name!r}; "
    if library := LIBRARIES.get(name.partition("/")[0]):
        return f"{expected}{library} registers it: write env={library}:{name}."
    ids = difflib.get_close_matches(name, [*others, *(MINATAR + game for game in GAMES), *gymnasium.registry], n=3)
    module, _, attribute = name.rpartition(".")
    closest = f"the closest are {', '.join(ids)}; " if ids else ""
    return f"{expected}{closest}a class, function or id of your own is module:Name, as {module or 'my_module'}:{attribute}."


def member(module: ModuleType, name: str) -> Any:
    """What a module has under a name; a ``ValueError`` has the closest names, those of the ids that it registers too."""
    if hasattr(module, name):
        return getattr(module, name)
    own = [each for each, value in vars(module).items() if callable(value)]
    homes = {each: getattr(spec.entry_point, "__module__", spec.entry_point) for each, spec in gymnasium.registry.items()}
    ids = [each for each, home in homes.items() if re.split("[.:]", str(home))[0] == module.__name__.split(".")[0]]
    closest = ", ".join(difflib.get_close_matches(name, [*own, *ids], n=3, cutoff=0)) or "none, it is empty"
    raise ValueError(f"{module.__name__} has no class, function or id {name!r}; the closest are {closest}.")


def failure(name: str, what: str, error: Exception, kwargs: Mapping[str, Any] | None = None) -> str:
    """Why an environment can't be ``what``, e.g. ``"made"`` of these arguments, in one line that says what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled):
        where = f"; it is neither installed nor in {os.getcwd()}: start in the directory that has it, or install it"
        missing = isinstance(error, ModuleNotFoundError) and error.name
        return f"env {name!r} needs a package that can't be imported: {text}{where if missing else ''}"
    found = re.search(r"(unexpected|missing)[^']* argument[^']* '(\w+)'", text) if isinstance(error, TypeError) else None
    names = _arguments(name) if found else []
    key, given = found[2] if found else "", kwargs or {}
    if names and key in given and key not in names:
        closest = difflib.get_close_matches(key, names, n=1, cutoff=0)[0]
        return f"env_kwargs of {name!r} must be among {', '.join(names)}, got {key!r}; did you mean {closest!r}?"
    if key in names and key not in given:
        return f"env {name!r} needs its argument {key!r}: give env_kwargs.{key}=..."
    kind = "" if isinstance(error, gymnasium.error.Error | ValueError) else f"{type(error).__name__}: "
    return f"env {name!r} can't be {what}: {kind}{text}".rstrip(": ")


def _arguments(name: str) -> list[str]:
    """The arguments that the constructor or function of an environment takes, those of base classes too."""
    module, _, attribute = ("HalfCheetah-v5" if name.startswith(HALF_CHEETAH) else name).rpartition(":")
    spec = gymnasium.registry.get(attribute)
    creator: Any = spec.entry_point if spec else getattr(sys.modules.get(module), attribute, None)
    for prefix, each in {MINATAR: MinAtarEnv, META_WORLD: make_meta_world}.items():
        creator = each if name.startswith(prefix) else creator
    names: dict[str, None] = {}
    with suppress(Exception):  # of what has no signature
        creator = load_env_creator(creator) if isinstance(creator, str) else creator
        inherited = [vars(one).get("__init__", lambda **_: None) for one in getattr(creator, "__mro__", [])]
        for each in inherited or [creator]:
            kinds = {key: parameter.kind for key, parameter in inspect.signature(each).parameters.items() if key != "self"}
            names |= {key: None for key, kind in kinds.items() if kind in (kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY)}
            if inspect.Parameter.VAR_KEYWORD not in kinds.values():
                break
    return list(names)

"""The random numbers of a foreign environment: the generators that it holds, and the global ones that it may draw from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

KINDS = (np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random, torch.Generator)
LEAVES = (type, ModuleType, type(None), str, bytes, int, float, complex, np.ndarray, torch.Tensor)
MAX_OBJECTS = 100_000  # that are looked through; generators beyond are not found


class OwnGlobals:
    """The global generators of NumPy, Python and torch (CPU) as one environment sees them.

    Within ``with``, they go on from where the block before left them; code outside of it sees no difference. A Gaussian that
    NumPy's legacy functions draw in pairs is never kept from one block to the next.

    Args:
        seed (int): see :meth:`seed`.
    """

    def __init__(self, seed: int):
        self._numpy: Any = np.random.MT19937(0)
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin as after ``np.random.seed(seed)``, ``random.seed(seed)`` and ``torch.manual_seed(seed)``."""
        with self:
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            torch.default_generator.manual_seed(seed)

    def __enter__(self) -> None:
        self._outside = mtrand.get_bit_generator(), random.getstate(), torch.get_rng_state()
        self._exchange(self._numpy, self._python, self._torch)

    def __exit__(self, *error: object) -> None:
        self._numpy, self._python, self._torch = mtrand.get_bit_generator(), random.getstate(), torch.get_rng_state()
        self._exchange(*self._outside)

    def _exchange(self, numpy: Any, python: Any, of_torch: torch.Tensor) -> None:
        mtrand.set_bit_generator(numpy)
        random.setstate(python)
        torch.set_rng_state(of_torch)

    def getstate(self) -> list[Any]:
        """Where the three stand."""
        return [self._numpy.state, self._python, _hex(self._torch)]

    def setstate(self, state: Sequence[Any]) -> None:
        """Go on from a :meth:`getstate`."""
        numpy, self._python, self._torch = state[0], state[1], _bytes(state[2])
        self._numpy = getattr(np.random, numpy["bit_generator"])()
        self._numpy.state = numpy


def held_generators(*roots: Any) -> dict[str, Any]:
    """The generators of NumPy, Python and torch that objects hold, by the way to each, as ``0._task._random``."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = [(str(i), root) for i, root in reversed([*enumerate(roots)])]
    while waiting and len(seen) < MAX_OBJECTS:
        way, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, KINDS):
            found[way] = value
        else:
            waiting += [(way + step, each) for step, each in _parts(value) if not isinstance(each, LEAVES)]
    return found


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object holds, and the way to it."""
    if isinstance(value, dict):
        return ((f"[{key!r}]", each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return ((f"[{i}]", each) for i, each in enumerate(value))
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str))
    held = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)}
    return ((f".{name}", each) for name, each in {**held, **getattr(value, "__dict__", {})}.items())


def states(generators: Mapping[str, Any]) -> dict[str, Any]:
    """Where each of some generators stands."""
    return {way: _state(generator) for way, generator in generators.items()}


def restore(generators: Mapping[str, Any], states: Mapping[str, Any]) -> list[str]:
    """Have generators go on from their :func:`states`; the ways of those that can't."""
    missing = []
    for way, state in states.items():
        try:
            _set_state(generators[way], state)
        except Exception:  # it is not there, tells no state, or is of another kind by now
            missing.append(way)
    return missing


def dumps(states: Mapping[str, Any]) -> str:
    """States as text."""
    return json.dumps(states, default=_plain)


def loads(text: str) -> dict[str, Any]:
    """The states of a :func:`dumps`."""
    return json.loads(text, object_hook=lambda each: np.array(each["array"], each["dtype"]) if "array" in each else each)


def _state(generator: Any) -> Any:
    """``None`` where it tells none, as a ``random.SystemRandom`` does."""
    try:
        if isinstance(generator, np.random.RandomState):
            return generator.get_state(legacy=False)
        if isinstance(generator, np.random.Generator):
            return generator.bit_generator.state
        if isinstance(generator, torch.Generator):
            return _hex(generator.get_state())
        return generator.state if isinstance(generator, np.random.BitGenerator) else generator.getstate()
    except NotImplementedError:
        return None


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator):
        generator.set_state(_bytes(state))
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.setstate(_tuple(state))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)


def _tuple(state: Any) -> Any:
    """Lists as the tuples that Python's own generator takes."""
    return tuple(map(_tuple, state)) if isinstance(state, list | tuple) else state


def _plain(value: Any) -> Any:
    return {"array": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, np.ndarray) else value.item()

"""Which keywords a class or a function takes, so that an unknown one comes with the closest known one."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torchrl.modules import MLP
from torchrl.objectives.common import LossModule

Init = TypeVar("Init", bound=Callable[..., None])
# Not the user's to give: a builder, or a network of this package, does.
OURS = {"self", "args", "kwargs", "in_features", "out_features", "num_cells", "layer_class", "layer_kwargs"}


def check_keywords(
    function: Callable[..., Any], given: Iterable[str], others: Iterable[str] = (), lacking: Iterable[str] = ()
) -> None:
    """Raise a ``TypeError`` at a keyword that a function or class does not take, nor the base to which it hands keywords on.

    ``others`` are what its caller takes, and the user may have meant; ``lacking`` are the base's that it refuses.
    """
    known: set[str] = set()
    bases = inspect.getmro(function) if inspect.isclass(function) and issubclass(function, MLP | LossModule) else ()
    for each in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [function]:
        parameters = inspect.signature(each).parameters
        known |= parameters.keys() - OURS.union(lacking)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    else:
        return  # nobody knows which keywords it hands on
    for name in sorted(set(given) - known):
        close = difflib.get_close_matches(name, sorted(known.union(others)), 1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise TypeError(
            f"{getattr(function, '__name__', function)} takes no {name!r}{hint} It takes {', '.join(sorted(known))}."
        )


def suggesting(init: Init) -> Init:
    """Decorate a constructor, so that an unknown keyword comes with the closest known one."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        check_keywords(type(self), kwargs)
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]

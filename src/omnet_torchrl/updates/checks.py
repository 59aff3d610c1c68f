"""What an update checks of its arguments before anything is built, and what its compiled code takes for given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from omnet_torchrl.objectives.subnet_loss import SubnetLoss
from omnet_torchrl.updates.kernels import PRECISIONS

PLAIN = frozenset([bool, int, float, str, type(None)])


def check_options(loss: Any, optim: Any, lr: Any, tau: Any, precision: Any, **counts: Any) -> None:
    """Raise if an argument of :class:`~omnet_torchrl.Update` is of a wrong type or out of its range."""
    if not isinstance(loss, SubnetLoss):
        raise TypeError(f"loss must be a loss over subnetworks, such as OMNetSACLoss, got {type(loss).__name__}.")
    if loss.reduction not in ("mean", "sum"):
        raise ValueError(f"the loss's reduction must be 'mean' or 'sum', got {loss.reduction!r}.")
    if optim is not None and lr is not None:
        raise ValueError(f"lr must be left out where optimisers are given, got lr={lr}: set it in the optimisers.")
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}.")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {count!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")


def check_batch(loss: SubnetLoss, batches: Any, given: Any) -> None:
    """Raise unless a batch has the keys and dimensions of some updates; with tasks, one in each row (seen on the CPU alone)."""
    if batches.ndim != loss.batch_dims + 1:
        expected = "(B,) or (U, B)" if loss.batch_dims == 1 else "(T, B) or (U, T, B), a task in each row"
        raise ValueError(f"batch must have batch size {expected}, got {tuple(given.batch_size)}.")
    for key in loss.in_keys:
        if batches.get(key, None) is None:
            raise KeyError(f"the batch has no {key!r}: the loss reads {loss.in_keys}.")
    tasks = batches.get(loss.tensor_keys.subnet, None) if loss.batch_dims == 2 else None
    if tasks is not None and tasks.device.type == "cpu" and (tasks != tasks[..., :1]).any():
        raise ValueError(f"each row of a batch must be of one task, got {loss.tensor_keys.subnet!r} of several in a row.")


def checked_norms(given: float | Mapping[str, float] | None, groups: Sequence[str]) -> dict[str, float]:
    """The largest norm of the gradient of each parameter group that has one; one number is for all of them."""
    norms = dict(given) if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(groups, given)
    for name, norm in norms.items():
        if name not in groups or not 0 < norm < math.inf:
            raise ValueError(
                f"max_grad_norm must be a positive number for some of the groups {', '.join(groups)}, got {name}: {norm}."
            )
    return norms


class Settings:
    """The settings that are compiled into an update: numbers and words of its loss and of the value estimator (the discount).

    A tensor is read again only after it was written, so that a call waits for no device.
    """

    def __init__(self, loss: SubnetLoss):
        self.loss = loss
        self._tensors: dict[str, tuple[Tensor, int, str]] = {}

    def read(self, **others: Any) -> tuple[tuple[str, Any], ...]:
        """Return name and value of each, as they are now; ``others`` come first."""
        found = others
        for module in (self.loss, self.loss.value_estimator):
            found[type(module).__name__] = True  # another kind of estimator
            for name, value in vars(module).items():
                if type(value) in PLAIN and name[0] != "_":
                    found[name] = value
                elif type(value) is Tensor:
                    found[name] = self._value(name, value)
            for name, value in module._buffers.items():
                if value is not None:
                    found[name] = self._value(name, value)
        return tuple((name, value) for name, value in found.items() if name not in self.loss._unread_settings)

    def _value(self, name: str, tensor: Tensor) -> str:
        known, version, value = self._tensors.get(name, (None, 0, ""))
        if known is not tensor or version != tensor._version:
            value = repr(tensor.tolist())
            self._tensors[name] = tensor, tensor._version, value
        return value


def warn_of_changes(kinds: Mapping[tuple[Any, Any], Any], kind: tuple[Any, Any]) -> None:
    """Say which settings have changed since batches of these shapes were last compiled, if they were."""
    for leaves, settings in reversed(list(kinds)):
        if leaves == kind[0]:
            changed = ", ".join(name.lstrip("_") for name, value in kind[1] if (name, value) not in settings)
            warnings.warn(
                f"{changed} changed since the update was compiled: it is compiled anew, once for each value, which takes up to "
                "a minute. Where values change often, compile=False is sooner done.",
                stacklevel=6,
            )
            return

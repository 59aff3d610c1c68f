"""What is said of numbers that are not finite any more."""

from __future__ import annotations

import math

from tensordict import NestedKey
from torch import Tensor


class DivergenceError(RuntimeError):
    """Something is not finite any more."""


def check_finite(key: NestedKey, value: Tensor, when: str) -> None:
    """Raise a :class:`DivergenceError` that names the environments whose row of ``value (*batch, F)`` is not finite."""
    # One number of a sum tells: a sum of finite numbers that overflows is looked at more closely.
    if not math.isfinite(value.sum().item()) and not bool(value.isfinite().all()):
        rows = value.reshape(-1, value.shape[-1])
        wrong = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        name, where = key if isinstance(key, str) else key[-1], ", ".join(map(str, wrong))
        raise DivergenceError(f"{name} of environment {where} is not finite {when}: {rows[wrong[0]].tolist()}.")

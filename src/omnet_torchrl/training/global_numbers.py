"""Torch's global random numbers, as a stream of one's own."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


class GlobalNumbers:
    """Within ``with``, the global generators go on from where the block before left them; outside, nothing is seen of it.

    For what takes no generator and draws from the global one: TorchRL's collectors, random actions and distributions.

    Args:
        seed (int): of the stream.
        device (torch.device): whose global generator is meant, beside the CPU's.
    """

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        with self._forked():
            torch.manual_seed(seed)
            self._state = self._get()

    def _forked(self) -> contextlib.AbstractContextManager:
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def _get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)

    def __enter__(self) -> None:
        self._outside = self._get()
        self._set(self._state)

    def __exit__(self, *error: object) -> None:
        self._state = self._get()
        self._set(self._outside)

    def state_dict(self) -> list[Tensor]:
        """Where the stream stands."""
        return list(self._state)

    def load_state_dict(self, state: list[Tensor]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._state = list(state)

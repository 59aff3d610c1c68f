"""The random numbers of a run: a stream for each purpose, torch's global one among them."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor


def derived_seed(*purpose: int | str) -> int:
    """A seed in [0, 2^31) for each purpose: those of neighbouring runs have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=4).digest(), "big") >> 1


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


class Streams:
    """What a run draws from, beside its environment.

    Args:
        seed (int): of all.
        device (torch.device): of the update.
        storage_device (torch.device): of the replay buffer.

    Attributes:
        exploration (GlobalNumbers): of the collector and its policy.
        draws (torch.Generator): of the update's draws.
        replay (torch.Generator): of the buffer's samples.
    """

    def __init__(self, seed: int, device: torch.device, storage_device: torch.device):
        self.seed, self.device = seed, device
        self.exploration = GlobalNumbers(derived_seed(seed, "exploration"), device)
        self.draws = torch.Generator(device).manual_seed(derived_seed(seed, "draws"))
        self.replay = torch.Generator(storage_device).manual_seed(derived_seed(seed, "replay"))

    def state_dict(self) -> dict[str, Any]:
        """Where each stands, and on which kind of device."""
        return {
            "device": self.device.type,
            "exploration": self.exploration.state_dict(),
            "draws": self.draws.get_state(),
            "replay": self.replay.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any], frames: int) -> None:
        """Go on from a :meth:`state_dict`; one of another kind of device starts anew from seed and frames, with a warning."""
        if state["device"] == self.device.type:
            self.exploration.load_state_dict(state["exploration"])
            self.draws.set_state(state["draws"])
            self.replay.set_state(state["replay"])
            return
        self.exploration = GlobalNumbers(derived_seed(self.seed, "exploration", frames), self.device)
        self.draws.manual_seed(derived_seed(self.seed, "draws", frames))
        self.replay.manual_seed(derived_seed(self.seed, "replay", frames))
        warnings.warn(
            f"the run was on {state['device']}, whose random numbers can't go on on {self.device.type}: they start anew, and "
            f"the run goes on, inexactly. With device={state['device']} it is exact.",
            stacklevel=3,
        )

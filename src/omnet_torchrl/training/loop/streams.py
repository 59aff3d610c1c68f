"""The random streams of a run: one for each purpose, torch's global generator among them."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor


def derived_seed(*purpose: int | str) -> int:
    """A seed in [0, 2^31) for a purpose. Seeds of neighbouring runs and of other purposes have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=4).digest(), "big") >> 1


class GlobalStream:
    """A stream of its own for code that takes no generator and draws from torch's global ones, such as TorchRL's collectors.

    Within ``with``, the generators of the CPU and of ``device`` go on from where the block before left them. Code outside of it
    sees no difference.
    """

    def __init__(self, seed: int, device: torch.device):
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self.state = self._get()  # where the stream stands

    def _get(self) -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for device, each in zip(self._devices, state[1:], strict=True):
            torch.cuda.set_rng_state(each, device)

    def __enter__(self) -> None:
        self._outside = self._get()
        self._set(self.state)

    def __exit__(self, *error: object) -> None:
        self.state = self._get()
        self._set(self._outside)


class Streams:
    """The streams of a run beside those of its environment: ``exploration`` of the collector and its policy, ``draws`` of the
    update, on its device, and ``replay`` of the buffer's samples, on the device of its storage.
    """

    def __init__(self, seed: int, device: torch.device, storage_device: torch.device):
        self.seed, self.device = seed, device
        self.draws, self.replay = torch.Generator(device), torch.Generator(storage_device)
        self._start()

    def _start(self, *frames: int) -> None:
        self.exploration = GlobalStream(derived_seed(self.seed, "exploration", *frames), self.device)
        self.draws.manual_seed(derived_seed(self.seed, "draws", *frames))
        self.replay.manual_seed(derived_seed(self.seed, "replay", *frames))

    def state_dict(self) -> dict[str, Any]:
        """Where each stream stands, and on which kind of device."""
        generators = {"draws": self.draws.get_state(), "replay": self.replay.get_state()}
        return {"device": self.device.type, "exploration": list(self.exploration.state), **generators}

    def load_state_dict(self, state: dict[str, Any], frames: int) -> None:
        """Go on from a :meth:`state_dict`. Those of another kind of device start anew, from seed and frames, with a warning."""
        if state["device"] == self.device.type:
            self.exploration.state = list(state["exploration"])
            self.draws.set_state(state["draws"])
            self.replay.set_state(state["replay"])
            return
        self._start(frames)
        warnings.warn(
            f"the run was on {state['device']}, whose random numbers can't go on on {self.device.type}: they start anew, and "
            f"the run goes on, inexactly. With device={state['device']} it is exact.",
            stacklevel=3,
        )

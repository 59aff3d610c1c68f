"""The update of a loss over subnetworks as one compiled function, for any script.

:class:`Update` trains, :class:`MaskSchedule` changes masks between updates, :class:`CompiledPolicy` acts,
:class:`GatherStorage` stores; torch, tensordict and torchrl are enough.
"""

from typing import Any

from omnet_torchrl.updates.acting import CompiledPolicy
from omnet_torchrl.updates.adam import LazyAdam
from omnet_torchrl.updates.mask_schedule import MaskSchedule
from omnet_torchrl.updates.replay import GatherStorage
from omnet_torchrl.updates.update import Update

__all__ = ["CompiledPolicy", "GatherStorage", "LazyAdam", "MaskSchedule", "Update", "UpdateStepper"]


def __getattr__(name: str) -> Any:
    # TorchRL's trainers take seconds to import, and few scripts use them.
    if name == "UpdateStepper":
        from omnet_torchrl.updates.stepper import UpdateStepper

        return UpdateStepper
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What runs a job: options, the loop and what it records, and the policy that is left.

Needs the extra ``train``: ``pip install "omnet-torchrl[train]"``. A name is imported when it is first asked for: who loads a
policy needs neither an environment nor a compiler.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnet_torchrl.training.build import describe
    from omnet_torchrl.training.loop.backends import make_collector
    from omnet_torchrl.training.loop.environments import make_env
    from omnet_torchrl.training.loop.evaluation import Evaluation, evaluate
    from omnet_torchrl.training.loop.exploration import Exploring
    from omnet_torchrl.training.loop.trainer import Trainer
    from omnet_torchrl.training.policy import load_policy
    from omnet_torchrl.training.record.datasets import read_dataset, write_dataset
    from omnet_torchrl.training.run import Run

__all__ = [
    "Evaluation",
    "Exploring",
    "Run",
    "Trainer",
    "describe",
    "evaluate",
    "load_policy",
    "make_collector",
    "make_env",
    "read_dataset",
    "write_dataset",
]
_ROOMS = {
    **{"describe": "build", "load_policy": "policy", "Run": "run", "Trainer": "loop.trainer"},
    **{
        "make_collector": "loop.backends",
        "make_env": "loop.environments",
        "Evaluation": "loop.evaluation",
        "Exploring": "loop.exploration",
        "evaluate": "loop.evaluation",
        **dict.fromkeys(("read_dataset", "write_dataset"), "record.datasets"),
    },
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)

"""What runs a job: options, environments, the compiled update, the loop, checkpoints, logging and plots.

Needs the extra ``train``: ``pip install "omnet-torchrl[train]"``.
"""

from omnet_torchrl.training.acting import CompiledPolicy
from omnet_torchrl.training.adam import LazyAdam
from omnet_torchrl.training.environments import make_env
from omnet_torchrl.training.evaluation import Evaluation, evaluate
from omnet_torchrl.training.policy import load_policy
from omnet_torchrl.training.run import Run, describe, schedule
from omnet_torchrl.training.storage import GatherStorage
from omnet_torchrl.training.trainer import Trainer
from omnet_torchrl.training.update import SACUpdate

__all__ = [
    "CompiledPolicy",
    "Evaluation",
    "GatherStorage",
    "LazyAdam",
    "Run",
    "SACUpdate",
    "Trainer",
    "describe",
    "evaluate",
    "load_policy",
    "make_env",
    "schedule",
]

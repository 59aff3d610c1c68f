"""OMNet for TorchRL: many value functions and policies for the price of one network.

Reading order: :mod:`~omnet_torchrl.masks`, :mod:`~omnet_torchrl.layers`, :mod:`~omnet_torchrl.ensembles`,
:mod:`~omnet_torchrl.units`, :mod:`~omnet_torchrl.modules`, :mod:`~omnet_torchrl.builders`,
:mod:`~omnet_torchrl.transforms`, :mod:`~omnet_torchrl.objectives`; beside them :mod:`~omnet_torchrl.envs`,
:mod:`~omnet_torchrl.metrics`.
"""

from omnet_torchrl.builders import make_actor, make_qvalue
from omnet_torchrl.dropout import SeededDropout
from omnet_torchrl.ensembles import EnsembleLayerNorm, EnsembleLinear, EnsembleMLP
from omnet_torchrl.envs import Maze2DEnv
from omnet_torchrl.layers import MaskedLinear, MaskedMLP
from omnet_torchrl.masks import (
    bernoulli_masks,
    bernoulli_module_masks,
    hashed_masks,
    mask_density,
    mask_iou,
    shared_fraction,
    unit_masks,
    unused_fraction,
)
from omnet_torchrl.modules import SubnetActor, SubnetModule, SubnetQValueOperator
from omnet_torchrl.objectives import OMNetSACLoss
from omnet_torchrl.redrawn import RedrawnLinear, RedrawnMLP
from omnet_torchrl.transforms import ObservationOffset, SubnetPrimer
from omnet_torchrl.units import UnitLayerNorm, UnitLinear, UnitMaskedMLP

__version__ = "0.1.0.dev0"

__all__ = [
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "MaskedLinear",
    "MaskedMLP",
    "Maze2DEnv",
    "OMNetSACLoss",
    "ObservationOffset",
    "RedrawnLinear",
    "RedrawnMLP",
    "SeededDropout",
    "SubnetActor",
    "SubnetModule",
    "SubnetPrimer",
    "SubnetQValueOperator",
    "UnitLayerNorm",
    "UnitLinear",
    "UnitMaskedMLP",
    "bernoulli_masks",
    "bernoulli_module_masks",
    "hashed_masks",
    "make_actor",
    "make_qvalue",
    "mask_density",
    "mask_iou",
    "shared_fraction",
    "unit_masks",
    "unused_fraction",
]

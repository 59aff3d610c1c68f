"""OMNet for TorchRL: many value functions and policies for the price of one network.

Reading order: :mod:`~omnet_torchrl.masks`, :mod:`~omnet_torchrl.structures`, :mod:`~omnet_torchrl.layers`,
:mod:`~omnet_torchrl.modules`, :mod:`~omnet_torchrl.deterministic`, :mod:`~omnet_torchrl.builders`,
:mod:`~omnet_torchrl.transforms`, :mod:`~omnet_torchrl.objectives`, :mod:`~omnet_torchrl.updates`; beside them
:mod:`~omnet_torchrl.offset`, :mod:`~omnet_torchrl.envs`, :mod:`~omnet_torchrl.metrics`.
"""

from omnet_torchrl.builders import make_actor, make_deterministic_actor, make_qvalue, make_qvalue_actor
from omnet_torchrl.deterministic import SubnetDeterministicActor, SubnetQValueActor
from omnet_torchrl.envs import Maze2DEnv, MinAtarEnv, TasksEnv
from omnet_torchrl.layers import (
    EnsembleLayerNorm,
    EnsembleLinear,
    EnsembleMLP,
    IndexedSequential,
    MaskedConv2d,
    MaskedLinear,
    MaskedMLP,
    RedrawnLinear,
    RedrawnMLP,
    RunningNormalization,
    SeededDropout,
    SharedMLP,
    SparseLinear,
    StructuredLinear,
    UnitLayerNorm,
    UnitLinear,
    UnitMaskedMLP,
)
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
from omnet_torchrl.objectives import OMNetDQNLoss, OMNetSACLoss, OMNetTD3Loss
from omnet_torchrl.offset import ObservationOffset
from omnet_torchrl.transforms import SubnetPrimer
from omnet_torchrl.updates import CompiledPolicy, GatherStorage, LazyAdam, MaskSchedule, Update

__version__ = "0.2.0"

__all__ = [
    "CompiledPolicy",
    "EnsembleLayerNorm",
    "EnsembleLinear",
    "EnsembleMLP",
    "GatherStorage",
    "IndexedSequential",
    "LazyAdam",
    "MaskSchedule",
    "MaskedConv2d",
    "MaskedLinear",
    "MaskedMLP",
    "Maze2DEnv",
    "MinAtarEnv",
    "OMNetDQNLoss",
    "OMNetSACLoss",
    "OMNetTD3Loss",
    "ObservationOffset",
    "RedrawnLinear",
    "RedrawnMLP",
    "RunningNormalization",
    "SeededDropout",
    "SharedMLP",
    "SparseLinear",
    "StructuredLinear",
    "SubnetActor",
    "SubnetDeterministicActor",
    "SubnetModule",
    "SubnetPrimer",
    "SubnetQValueActor",
    "SubnetQValueOperator",
    "TasksEnv",
    "UnitLayerNorm",
    "UnitLinear",
    "UnitMaskedMLP",
    "Update",
    "bernoulli_masks",
    "bernoulli_module_masks",
    "hashed_masks",
    "make_actor",
    "make_deterministic_actor",
    "make_qvalue",
    "make_qvalue_actor",
    "mask_density",
    "mask_iou",
    "shared_fraction",
    "unit_masks",
    "unused_fraction",
]

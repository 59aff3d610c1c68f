"""Layers that are N layers, and multi-layer perceptrons that are N of them, behind one index.

:mod:`~omnet_torchrl.layers.indexed` has the index's contract. Each other file has one way to be N networks, but for
:mod:`~omnet_torchrl.layers.dropout`, whose noise is data, :mod:`~omnet_torchrl.layers.normalization`, for observations,
:mod:`~omnet_torchrl.layers.sparse`, for one that is deployed, and :mod:`~omnet_torchrl.layers.structured`, where all N are
one.
"""

from omnet_torchrl.layers.convolutions import IndexedSequential, MaskedConv2d
from omnet_torchrl.layers.dropout import SEED, SeededDropout, seed_dropout, with_seed
from omnet_torchrl.layers.ensembles import EnsembleLayerNorm, EnsembleLinear, EnsembleMLP
from omnet_torchrl.layers.indexed import IndexedMLP, as_index, check_subnet, indexed_linear
from omnet_torchrl.layers.masked import MaskedLinear, MaskedMLP, apply_masks
from omnet_torchrl.layers.normalization import RunningNormalization
from omnet_torchrl.layers.redrawn import RedrawnLinear, RedrawnMLP
from omnet_torchrl.layers.shared import SharedMLP, SharedTaskLayerNorm, SharedTaskLinear
from omnet_torchrl.layers.sparse import SparseLinear, sparsified
from omnet_torchrl.layers.structured import StructuredLinear
from omnet_torchrl.layers.units import UnitLayerNorm, UnitLinear, UnitMaskedMLP

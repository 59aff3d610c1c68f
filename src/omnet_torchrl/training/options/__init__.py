"""The options of a run: data, checked before anything is made. Needs omegaconf, and nothing else that is not the core's."""

from omnet_torchrl.training.device import resolve_device
from omnet_torchrl.training.options.checks import differences, load_config, save_config, to_config, validate
from omnet_torchrl.training.options.options import LossConfig, NetworkConfig, OptimConfig, TopologyConfig, TrainConfig
from omnet_torchrl.training.options.rows import ROWS, Row, row

__all__ = [
    "ROWS",
    "LossConfig",
    "NetworkConfig",
    "OptimConfig",
    "Row",
    "TopologyConfig",
    "TrainConfig",
    "differences",
    "load_config",
    "resolve_device",
    "row",
    "save_config",
    "to_config",
    "validate",
]

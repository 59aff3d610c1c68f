"""Sparse structures of a run on MinAtar: which cells the first layer sees, and which layers stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torchrl.data import TensorSpec

from omnet_torchrl.deterministic import SubnetQValueActor
from omnet_torchrl.envs import MinAtarEnv
from omnet_torchrl.layers import MaskedConv2d, MaskedLinear, StructuredLinear
from omnet_torchrl.structures import (
    l1_structure,
    predict_inputs,
    predictive_structure,
    random_structure,
    spatial_structure,
)
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.options.contradictions import MINATAR
from omnet_torchrl.training.policy import load_policy

GRID = 10  # rows and columns of MinAtar's games
PREDICTION_FRAMES = 100_000  # of a random policy, from which cells are predicted


def structure_options(config: TrainConfig, observation_spec: TensorSpec) -> dict[str, Tensor]:
    """The argument ``structure`` of :func:`~omnet_torchrl.grids.make_grid_qvalue_actor`, where the options ask for one."""
    if config.network.structure is None:
        return {}
    return {"structure": structure(config, observation_spec["observation"].shape[-1])}


def structure(config: TrainConfig, channels: int) -> Tensor:
    """The inputs of the first layer's units: a function of the seed and, where it follows predictions, of a random policy."""
    units, size = config.network.num_cells[0], GRID**2 * channels
    generator, kind = derived_seed(config.seed, "structure"), config.network.structure
    if kind == "spatial":
        return spatial_structure(units, (GRID, GRID, channels), generator=generator)
    fan_in = 9 * channels if config.network.fan_in is None else config.network.fan_in
    if kind == "random":
        return random_structure(units, size, fan_in, generator=generator)
    if kind == "l1":
        return l1_structure(_trained_weight(config, (units, size)), fan_in)
    return predictive_structure(units, _predictions(config.env.removeprefix(MINATAR), config.seed), fan_in, generator=generator)


def freeze_hidden(config: TrainConfig, qvalue: SubnetQValueActor) -> None:
    """Keep the hidden layers as they are, where the options ask for it: the output layer alone is trained."""
    layers = [each for each in qvalue.modules() if isinstance(each, MaskedLinear | MaskedConv2d | StructuredLinear)]
    for layer in layers[:-1] if config.network.freeze_hidden else ():
        layer.requires_grad_(False)


def _trained_weight(config: TrainConfig, shape: tuple[int, int]) -> Tensor:
    """The first layer's weights of the run that was trained with an L1 penalty."""
    policy = load_policy(str(config.network.structure_run))
    first = next(each for each in policy.modules() if isinstance(each, MaskedLinear | MaskedConv2d | StructuredLinear))
    if first.weight.shape != shape:
        sizes = f"this run's {shape} weights, got {tuple(first.weight.shape)}"
        raise ValueError(f"the first layer of network.structure_run must have {sizes}: use another run.")
    return first.weight


def _predictions(game: str, seed: int) -> Tensor:
    """Weights of the predictions of every cell, from one game of a random policy, played again and again."""
    env = MinAtarEnv(game, categorical_action_encoding=True)
    env.set_seed(derived_seed(seed, "random policy"))
    generator = torch.Generator().manual_seed(derived_seed(seed, "random actions"))
    actions = torch.randint(env.action_spec.space.n, (PREDICTION_FRAMES,), generator=generator)
    state, observations, ended = env.reset(), [], []
    for action in actions:
        observations.append(state["observation"].flatten())
        step, state = env.step_and_maybe_reset(state.set("action", action))
        ended.append(step["next", "done"])
    observations.append(state["observation"].flatten())
    return predict_inputs(torch.stack(observations), torch.cat(ended))

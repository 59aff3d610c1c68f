"""Sparse structures of a run on MinAtar: which cells the first layer sees, and which layers stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from omnet_torchrl.deterministic import SubnetQValueActor
from omnet_torchrl.envs import MinAtarEnv
from omnet_torchrl.layers import MaskedConv2d, MaskedLinear
from omnet_torchrl.structures import (
    l1_structure,
    predict_inputs,
    predictive_structure,
    random_structure,
    set_structure,
    spatial_structure,
)
from omnet_torchrl.training.loop.streams import derived_seed
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.options.contradictions import MINATAR
from omnet_torchrl.training.policy import load_policy

GRID = 10  # rows and columns of MinAtar's games
PREDICTION_FRAMES = 100_000  # of a random policy, from which cells are predicted


def prepare_grid(config: TrainConfig, qvalue: SubnetQValueActor) -> None:
    """Give the first layer its structure, and keep the hidden layers as they are, where the options ask for it."""
    network = config.network
    layers = [each for each in qvalue.modules() if isinstance(each, MaskedLinear | MaskedConv2d)]
    if network.structure is not None:
        first = layers[0]
        assert isinstance(first, MaskedLinear)  # no convolution with a structure
        set_structure(first, structure(config, first), generator=derived_seed(config.seed, "structure weights"))
    for layer in layers[:-1] if network.freeze_hidden else ():
        layer.requires_grad_(False)


def structure(config: TrainConfig, layer: MaskedLinear) -> Tensor:
    """The mask of the first layer: a function of the seed and, where it follows predictions, of a random policy's games."""
    units, size = layer.weight.shape
    channels = size // GRID**2
    generator, kind = derived_seed(config.seed, "structure"), config.network.structure
    if kind == "spatial":
        return spatial_structure(units, (GRID, GRID, channels), generator=generator)
    fan_in = 9 * channels if config.network.fan_in is None else config.network.fan_in
    if kind == "random":
        return random_structure(units, size, fan_in, generator=generator)
    if kind == "l1":
        return l1_structure(_trained_weight(config, layer), fan_in)
    game = config.env.removeprefix(MINATAR)
    return predictive_structure(units, _predictions(game, config.seed), fan_in, generator=generator)


def _trained_weight(config: TrainConfig, layer: MaskedLinear) -> Tensor:
    """The first layer's weights of the run that was trained with an L1 penalty."""
    policy = load_policy(str(config.network.structure_run))
    first = next(each for each in policy.modules() if isinstance(each, MaskedLinear | MaskedConv2d))
    if first.weight.shape != layer.weight.shape:
        sizes = f"{tuple(layer.weight.shape)} weights, got {tuple(first.weight.shape)}"
        raise ValueError(f"the first layer of network.structure_run must have this run's {sizes}: use another run.")
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

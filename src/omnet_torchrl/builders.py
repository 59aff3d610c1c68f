"""The networks of the paper from two TorchRL specs.

Section 4.1 of https://arxiv.org/abs/2310.14009: two hidden layers of 256 units, each Linear, LayerNorm, ReLU; 5 subnetworks at
sparsity 0.5 in critic and actor. The initialisation is REDQ's: Xavier-uniform weights and zero biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torch import nn
from torchrl.data import Composite, TensorSpec

from omnet_torchrl.arguments import check_keywords
from omnet_torchrl.deterministic import SubnetDeterministicActor, SubnetQValueActor
from omnet_torchrl.layers import IndexedMLP, MaskedMLP, RunningNormalization
from omnet_torchrl.modules import SubnetActor, SubnetQValueOperator
from omnet_torchrl.specs import check_action_spec, check_discrete_spec

# What the builders take themselves.
OPTIONS = ("layer_norm", "normalize", "network_class", "observation_key", "action_key", "subnet_key")


def make_actor(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    network_class: Callable[..., nn.Module] = MaskedMLP,
    num_subnets: int | None = None,
    sparsity: float | Sequence[float] | None = None,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
    num_cells: Sequence[int] = (256, 256),
    layer_norm: bool = True,
    normalize: RunningNormalization | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    subnet_key: NestedKey = "subnet",
    **kwargs: Any,
) -> SubnetActor:
    """The paper's actor from two specs.

    Args:
        observation_spec (TensorSpec): of the environment (a Composite with ``observation_key``) or of the observation itself;
            its last dimension is the number of features.
        action_spec (TensorSpec): continuous with finite bounds, e.g. ``env.action_spec``.

    Keyword Args:
        network_class: :class:`~omnet_torchrl.MaskedMLP` (default), :class:`~omnet_torchrl.UnitMaskedMLP`,
            :class:`~omnet_torchrl.EnsembleMLP` or :class:`~omnet_torchrl.RedrawnMLP`.
        num_subnets, sparsity, generator, device: as in ``network_class``, whose defaults hold for ``None``: 5 subnetworks of
            sparsity 0.5, or 2 separate ones without masks. ``RedrawnMLP`` takes no number.
        num_cells (sequence of int): hidden units of each layer.
        layer_norm (bool): Linear, LayerNorm, ReLU instead of Linear, ReLU.
        normalize (RunningNormalization or None): of the observation, first; give actor and critic the same one.
        observation_key, action_key, subnet_key (NestedKey): the keys read and written.
        **kwargs: others of ``network_class``: ``mask_bias``, ``init_fn``, ``activation_class``, ``dropout``, ...

    Raises:
        TypeError: a keyword that ``network_class`` does not take, or an observation of another dtype than the parameters.
        ValueError, KeyError: specs that are no vectors, unbounded actions, or no observation under its key.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("Pendulum-v1")
        >>> make_actor(env.observation_spec, env.action_spec, num_subnets=8, sparsity=[0.0, 0.5, 0.5]).num_subnets
        8
    """
    spec, observation = check_action_spec(action_spec), _observation(observation_spec, observation_key)
    options = {"num_subnets": num_subnets, "sparsity": sparsity, "generator": generator, "device": device}
    sizes = (observation.shape[-1], 2 * spec.shape[-1])
    network = _paper_network(network_class, *sizes, num_cells, layer_norm, observation, normalize, options, kwargs)
    return SubnetActor(network, spec, [observation_key, subnet_key], action_key)


def make_qvalue(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    network_class: Callable[..., nn.Module] = MaskedMLP,
    num_subnets: int | None = None,
    sparsity: float | Sequence[float] | None = None,
    generator: torch.Generator | int | None = None,
    device: torch.device | str | None = None,
    num_cells: Sequence[int] = (256, 256),
    layer_norm: bool = True,
    normalize: RunningNormalization | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    subnet_key: NestedKey = "subnet",
    **kwargs: Any,
) -> SubnetQValueOperator:
    """The paper's critic from two specs; arguments as in :func:`make_actor`.

    With ``network_class=EnsembleMLP``, ``num_subnets`` separate critics: 2 for SAC, 10 for REDQ.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from omnet_torchrl import EnsembleMLP
        >>> env = GymEnv("Pendulum-v1")
        >>> qvalue = make_qvalue(env.observation_spec, env.action_spec, num_subnets=8, sparsity=[0.0, 0.5, 0.5])
        >>> redq = make_qvalue(env.observation_spec, env.action_spec, network_class=EnsembleMLP, num_subnets=10)
    """
    options = {"num_subnets": num_subnets, "sparsity": sparsity, "generator": generator, "device": device}
    observation = _observation(observation_spec, observation_key)
    features = observation.shape[-1] + check_action_spec(action_spec).shape[-1]
    network = _paper_network(network_class, features, 1, num_cells, layer_norm, observation, normalize, options, kwargs)
    return SubnetQValueOperator(network, in_keys=[observation_key, action_key, subnet_key])


def make_deterministic_actor(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    network_class: Callable[..., nn.Module] = MaskedMLP,
    num_cells: Sequence[int] = (256, 256),
    layer_norm: bool = True,
    normalize: RunningNormalization | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    subnet_key: NestedKey = "subnet",
    **kwargs: Any,
) -> SubnetDeterministicActor:
    """TD3's actor from two specs; arguments as in :func:`make_actor`.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("Pendulum-v1")
        >>> actor = make_deterministic_actor(env.observation_spec, env.action_spec, sparsity=[0.0, 0.5, 0.5])
    """
    spec, observation = check_action_spec(action_spec), _observation(observation_spec, observation_key)
    sizes = (observation.shape[-1], spec.shape[-1])
    network = _paper_network(network_class, *sizes, num_cells, layer_norm, observation, normalize, kwargs, {})
    return SubnetDeterministicActor(network, spec, [observation_key, subnet_key], action_key)


def make_qvalue_actor(
    observation_spec: TensorSpec,
    action_spec: TensorSpec,
    *,
    network_class: Callable[..., nn.Module] = MaskedMLP,
    num_cells: Sequence[int] = (256, 256),
    layer_norm: bool = True,
    normalize: RunningNormalization | None = None,
    observation_key: NestedKey = "observation",
    action_key: NestedKey = "action",
    subnet_key: NestedKey = "subnet",
    **kwargs: Any,
) -> SubnetQValueActor:
    """DQN's network and greedy policy from two specs, the action's discrete; other arguments as in :func:`make_actor`.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> env = GymEnv("CartPole-v1")
        >>> actor = make_qvalue_actor(env.observation_spec, env.action_spec, sparsity=[0.0, 0.5, 0.5])
    """
    spec, observation = check_discrete_spec(action_spec), _observation(observation_spec, observation_key)
    sizes = (observation.shape[-1], spec.space.n)
    network = _paper_network(network_class, *sizes, num_cells, layer_norm, observation, normalize, kwargs, {})
    return SubnetQValueActor(network, spec, [observation_key, subnet_key], action_key)


def _paper_network(
    network_class: Callable[..., nn.Module],
    in_features: int,
    out_features: int,
    num_cells: Sequence[int],
    layer_norm: bool,
    observation: TensorSpec,
    normalize: RunningNormalization | None,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> nn.Module:
    if isinstance(num_cells, int):
        raise TypeError(
            f"num_cells must be a sequence with the hidden units of each layer, got {num_cells}: say [{num_cells}]."
        )
    given = {**{name: value for name, value in options.items() if value is not None}, **kwargs}
    check_keywords(network_class, given, OPTIONS)
    norm = {"norm_class": nn.LayerNorm, "norm_kwargs": [{"normalized_shape": n} for n in num_cells]} if layer_norm else {}
    defaults = {"activation_class": nn.ReLU, "init_fn": nn.init.xavier_uniform_, **norm}
    network = network_class(in_features=in_features, out_features=out_features, num_cells=num_cells, **{**defaults, **given})
    parameter = next(network.parameters(), None)
    if parameter is not None and parameter.dtype != observation.dtype:
        raise TypeError(
            f"the observation must be of the network's {parameter.dtype}, got {observation.dtype}: append "
            "torchrl.envs.DoubleToFloat() to the environment, or build the network under torch.set_default_dtype."
        )
    if normalize is not None:
        _begin_with(normalize, network, observation.shape[-1])
    return network


def _begin_with(normalize: RunningNormalization, network: nn.Module, num_features: int) -> None:
    """Make ``normalize``, which other networks may begin with too, the first layer of ``network``."""
    if not isinstance(normalize, RunningNormalization) or not isinstance(network, IndexedMLP):
        got = f"{type(normalize).__name__} for a {type(network).__name__}"
        raise TypeError(f"normalize must be a RunningNormalization, and the network one of this package, got {got}.")
    if normalize.num_features != num_features:
        raise ValueError(f"normalize must be of the observation's {num_features} features, got {normalize.num_features}.")
    network.insert(0, normalize.to(next(network.parameters()).device))


def _observation(spec: TensorSpec, key: NestedKey) -> TensorSpec:
    if isinstance(spec, Composite):
        if key not in spec.keys(True, True):
            raise KeyError(f"the observation spec has no {key!r}, only {list(spec.keys(True, True))}; pass observation_key.")
        spec = spec[key]
    if not spec.shape or not spec.dtype.is_floating_point:
        raise ValueError(f"the observation must be a floating point vector, got shape {tuple(spec.shape)} of {spec.dtype}.")
    return spec

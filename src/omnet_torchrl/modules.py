r"""TensorDictModules that read ``"subnet"``.

Which subnetwork answers is data: an int64 index in the TensorDict, next to the observation. A module reads it and applies that
mask; it does not matter to it who wrote the index: a loss, an environment transform or a user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase, dispatch, skip_existing
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torchrl.data import Bounded, Categorical, Composite, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator

from omnet_torchrl.layers import IndexedMLP, apply_masks, as_index, check_subnet, sparsified
from omnet_torchrl.masks import check_module_masks
from omnet_torchrl.specs import check_action_spec
from omnet_torchrl.transforms import SubnetPrimer

LOG_STD_BOUNDS = (-20.0, 2.0)


class SubnetQValueOperator(ValueOperator):
    r"""State-action value of one subnetwork: :math:`Q_{\theta_k}(s, a)`.

    Args:
        module (nn.Module): called as ``module(*inputs, subnet)`` and with an attribute ``num_subnets``, e.g. a
            :class:`~omnet_torchrl.MaskedMLP`, :class:`~omnet_torchrl.EnsembleMLP` or :class:`SubnetModule`; returns ``(*batch,
            1)``.
        in_keys (sequence of NestedKey): the inputs, the index last. Defaults to ``["observation", "action", "subnet"]``.
        out_keys (sequence of NestedKey): defaults to ``["state_action_value"]``.

    Raises:
        KeyError: the TensorDict has no index.
        ValueError: an index is out of range (seen on the CPU; a GPU raises a device-side assertion), or has the shape ``(B,
            1)`` in a TensorDict of batch size ``(B,)``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from omnet_torchrl import MaskedMLP
        >>> qvalue = SubnetQValueOperator(MaskedMLP(in_features=23, out_features=1, num_cells=[256, 256], generator=0))
        >>> td = TensorDict(observation=torch.zeros(32, 17), action=torch.zeros(32, 6), subnet=torch.tensor(3))
        >>> qvalue(td)["state_action_value"].shape
        torch.Size([32, 1])
    """

    def __init__(
        self,
        module: nn.Module,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
    ):
        self.num_subnets = get_num_subnets(module)
        super().__init__(
            module,
            in_keys=["observation", "action", "subnet"] if in_keys is None else in_keys,
            out_keys=["state_action_value"] if out_keys is None else out_keys,
        )

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the output of the subnetwork that the index names."""
        return call_indexed(super().forward, self.num_subnets, self.in_keys, tensordict, *args, **kwargs)

    def extract(self, subnet: int, *, sparse: bool = False) -> ValueOperator:
        """Return subnetwork ``subnet`` as a plain :class:`~torchrl.modules.ValueOperator`; see :class:`SubnetActor`."""
        plain = ValueOperator(self.module.extract(subnet), in_keys=self.in_keys[:-1], out_keys=self.out_keys)
        return (sparsified(plain) if sparse else plain).train(self.training)


class SubnetPolicy:
    """What every policy over subnetworks offers an environment: its index is ``subnet_key``, of ``num_subnets``."""

    num_subnets: int
    subnet_key: NestedKey
    action_key: NestedKey

    def make_tensordict_primer(self, **kwargs: Any) -> SubnetPrimer:
        """Return the transform that draws this policy's index; ``kwargs`` as in :class:`~omnet_torchrl.SubnetPrimer`."""
        return SubnetPrimer(self.num_subnets, key=self.subnet_key, **kwargs)

    def check_env(self, env: EnvBase) -> None:
        """Raise unless ``env`` draws the index of as many subnetworks as this policy has.

        Raises:
            KeyError: the environment has no index.
            ValueError: it draws from another number of subnetworks.
        """
        if self.subnet_key not in env.full_observation_spec.keys(True, True):
            raise KeyError(_missing(self.subnet_key, "the environment"))
        spec = env.full_observation_spec[self.subnet_key]
        if not isinstance(spec, Categorical) or spec.space.n != self.num_subnets:
            drawn = f"one of {spec.space.n} subnetworks" if isinstance(spec, Categorical) else f"a {type(spec).__name__}"
            raise ValueError(
                f"the environment's {self.subnet_key!r} is {drawn}, the actor has {self.num_subnets}: build the primer with "
                "actor.make_tensordict_primer()."
            )


class SubnetActor(SubnetPolicy, ProbabilisticActor):
    r"""Squashed Gaussian policy of one subnetwork, :math:`\pi_{\phi_k}(\cdot \mid s)`.

    A :class:`~torchrl.modules.ProbabilisticActor` with :class:`~torchrl.modules.TanhNormal` within the bounds of the action
    spec. It always acts with the current weights; to act many times with weights that stay, :meth:`extract` a subnetwork.

    Args:
        module (nn.Module): called as ``module(*inputs, subnet)`` and with an attribute ``num_subnets``; returns
            ``(*batch, 2 * action_dim)``, the mean before squashing and the logarithm of the standard deviation, which is
            clamped to [-20, 2].
        action_spec (Bounded): the action's specification: continuous, with finite bounds.
        in_keys (sequence of NestedKey): the inputs, the index last. Defaults to ``["observation", "subnet"]``.
        action_key (NestedKey): defaults to ``"action"``.

    Raises:
        ValueError, TypeError: the action spec is not a bounded continuous one; an index is not int64, out of range (seen on
            the CPU; a GPU raises a device-side assertion), or of shape ``(B, 1)`` in a TensorDict of batch size ``(B,)``.
            An environment that draws from another number of subnetworks is not seen before an index is out of range: ask
            :meth:`check_env`. The network has another number of outputs.
        KeyError: the TensorDict has no index, and the message says what adds it; or none of another input.

    Examples:
        >>> from tensordict import TensorDict
        >>> from omnet_torchrl import MaskedMLP
        >>> network = MaskedMLP(in_features=17, out_features=12, num_cells=[256, 256], generator=0)
        >>> actor = SubnetActor(network, Bounded(-1, 1, (6,)))
        >>> td = TensorDict(observation=torch.zeros(32, 17), subnet=torch.randint(5, (32,)), batch_size=[32])
        >>> actor(td)["action"].shape
        torch.Size([32, 6])
    """

    def __init__(
        self,
        module: nn.Module,
        action_spec: TensorSpec,
        in_keys: Sequence[NestedKey] | None = None,
        action_key: NestedKey = "action",
    ):
        in_keys = ["observation", "subnet"] if in_keys is None else list(in_keys)
        spec, parameter = check_action_spec(action_spec), next(module.parameters(), None)
        if parameter is not None:  # the bounds, which each call reads, belong where the network is
            spec = spec.to(parameter.device)
        num_subnets = get_num_subnets(module)
        _init_actor(super().__init__, _SquashedGaussian(module, in_keys, spec.shape[-1]), spec, action_key)
        self.num_subnets, self.subnet_key, self.action_key = num_subnets, in_keys[-1], action_key

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Write the output of the subnetwork that the index names."""
        # Where nothing else is asked, call one module after the other: at batch 1, what a TensorDictSequential does besides
        # takes as long as the network.
        forward = super().forward if args or kwargs or skip_existing() else self._in_order
        return call_indexed(forward, self.num_subnets, self.module[0].in_keys, tensordict, *args, **kwargs)

    def _in_order(self, tensordict: TensorDictBase) -> TensorDictBase:
        for module in self.module:
            tensordict = module(tensordict)
        return tensordict

    def extract(self, subnet: int, *, sparse: bool = False) -> ProbabilisticActor:
        """Return subnetwork ``subnet`` as a plain :class:`~torchrl.modules.ProbabilisticActor` that reads no index.

        With ``sparse=True`` its linear layers are :class:`~omnet_torchrl.SparseLinear`; see there whether that is
        faster.
        """
        head, distribution = self.module[0], self.module[-1]
        spec = self.spec[self.action_key]
        plain = _SquashedGaussian(head.network.extract(subnet), head.in_keys[:-1], head.action_dim)
        actor = _init_actor(ProbabilisticActor, plain, spec, distribution.out_keys[0])
        return (sparsified(actor) if sparse else actor).train(self.training)


class SubnetModule(nn.Module):
    r"""Any network as N subnetworks, :math:`f_{\theta \odot m_k}`, e.g. a convolutional or a recurrent one.

    The network is called once for each index asked, with its parameters masked; for multi-layer perceptrons,
    :class:`~omnet_torchrl.MaskedMLP` is faster. An index per element is not supported, and torch traces recurrent layers only
    with ``torch._dynamo.config.allow_rnn = True``.

    Args:
        network (nn.Module): the network; its parameters stay where they are and are trained through this module.
        masks (mapping): parameter name to boolean masks ``(N, *parameter.shape)``, e.g. of
            :func:`~omnet_torchrl.bernoulli_module_masks`. Parameters without masks are shared whole.
        event_dims (int or sequence of int): dimensions of one element of each input: 1 for vectors (default), 3 for images
            ``(C, H, W)``, 2 for sequences ``(T, features)``. Tells inputs ``(B, ...)``, which all rows of an index ``(K, 1)``
            share, from inputs ``(K, B, ...)``.

    Shape:
        inputs, then the index: ``()`` or ``(1,)`` for one subnetwork, or ``(K, 1)`` (``(K, 1, 1)`` for two batch dimensions)
        for one per leading row; the outputs then have a leading dimension K.

    Raises:
        TypeError, ValueError: masks that do not fit the network; an index of another dtype or shape.

    Examples:
        >>> from omnet_torchrl.masks import bernoulli_module_masks
        >>> cnn = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        >>> net = SubnetModule(cnn, bernoulli_module_masks(cnn, 5, 0.5, generator=0), event_dims=3)
        >>> net(torch.zeros(2, 3, 8, 8), torch.arange(5)[:, None]).shape
        torch.Size([5, 2, 4])
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor], event_dims: int | Sequence[int] = 1):
        super().__init__()
        self.num_subnets = check_module_masks(masks, network)
        self.network, self.event_dims = network, event_dims
        # Neither a buffer's name nor the keys of a loss's parameters may hold a dot.
        self._buffer_of = {name: "masks-" + name.replace(".", "-") for name in masks}
        for name, buffer in self._buffer_of.items():
            self.register_buffer(buffer, masks[name].to(network.get_parameter(name).device, copy=True))

    def forward(self, *inputs: Any) -> Any:
        """Call the network for each index asked."""
        *args, subnet = inputs
        subnet = as_index(subnet, self.num_subnets, getattr(self, next(iter(self._buffer_of.values()))).device)
        if subnet.shape[1:].numel() != 1 or (subnet.ndim == 1 and len(subnet) != 1):
            raise ValueError(f"SubnetModule takes an index of shape () or (K, 1, ...), got {tuple(subnet.shape)}.")
        if subnet.ndim < 2:
            return functional_call(self.network, self._masked(subnet.reshape(1)), tuple(args))
        events = [self.event_dims] * len(args) if isinstance(self.event_dims, int) else self.event_dims
        batch_dims = [x.ndim - event for x, event in zip(args, events, strict=True)]
        if any(dims > subnet.ndim for dims in batch_dims):
            raise ValueError(
                f"inputs of {batch_dims} batch dimensions need an index (K, 1, ...) of as many, got {tuple(subnet.shape)}."
            )
        rows = [
            x.expand(subnet.shape[0], *x.shape[1:]).unbind(0) if dims == subnet.ndim else [x] * subnet.shape[0]
            for x, dims in zip(args, batch_dims, strict=True)
        ]
        index = subnet.reshape(-1, 1).unbind(0)
        outputs = [functional_call(self.network, self._masked(k), tuple(x)) for k, *x in zip(index, *rows, strict=True)]
        return pytree.tree_map(lambda *row: torch.stack(row), *outputs)

    def _masked(self, index: Tensor) -> dict[str, Tensor]:
        # By attribute, not by named_parameters: a loss may have put plain tensors in the parameters' place.
        network: Any = self.network
        return {
            name: apply_masks(reduce(getattr, name.split("."), network), getattr(self, buffer), index).squeeze(0)
            for name, buffer in self._buffer_of.items()
        }

    def extract(self, subnet: int) -> nn.Module:
        """Return subnetwork ``subnet`` as a plain copy of the network, with parameters of its own."""
        index = check_subnet(subnet, self.num_subnets, next(self.buffers()).device)
        plain = copy.deepcopy(self.network)
        plain.load_state_dict({**plain.state_dict(), **self._masked(index)})
        return plain


class _SquashedGaussian(TensorDictModuleBase):
    """Splits a network's output into the mean and the standard deviation of a Gaussian to be squashed.

    It is no :class:`~tensordict.nn.TensorDictModule`, whose handling of outputs costs more than the network at batch 1.
    """

    def __init__(self, network: nn.Module, in_keys: Sequence[NestedKey], action_dim: int):
        super().__init__()
        self.network, self.in_keys, self.out_keys, self.action_dim = network, list(in_keys), ["loc", "scale"], action_dim

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = [tensordict.get(key, None) for key in self.in_keys]
        try:
            output = self.network(*inputs)
        except (TypeError, AttributeError) as error:
            missing = [key for key, value in zip(self.in_keys, inputs, strict=True) if value is None]
            if missing:
                raise KeyError(f"the actor reads {self.in_keys}, the TensorDict has no {missing}.") from error
            raise
        if output.shape[-1] != 2 * self.action_dim:
            raise ValueError(
                f"the actor's network must have 2 * action_dim={2 * self.action_dim} outputs, means and logarithms of standard "
                f"deviations, got {output.shape[-1]}."
            )
        loc, log_std = output.chunk(2, -1)
        return tensordict.set("loc", loc).set("scale", log_std.clamp(*LOG_STD_BOUNDS).exp())


def _init_actor(init: Callable[..., Any], module: _SquashedGaussian, spec: Bounded, action_key: NestedKey) -> Any:
    return init(
        module=module,
        in_keys=["loc", "scale"],
        out_keys=[action_key],
        spec=Composite({action_key: spec}),
        distribution_class=TanhNormal,
        distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
        default_interaction_type=InteractionType.RANDOM,
    )


def get_num_subnets(module: nn.Module) -> int:
    """Return the number of subnetworks of a module that takes an index."""
    num_subnets = getattr(module, "num_subnets", None)
    if isinstance(num_subnets, int):
        return num_subnets
    message = f"a module that takes an index needs an int attribute num_subnets; {type(module).__name__} has none."
    inner = next((type(m).__name__ for m in module.modules() if isinstance(m, IndexedMLP | SubnetModule)), None)
    if inner is not None:
        message += (
            f" It holds a {inner}, to which it hands no index: pass the {inner} alone. SubnetActor itself splits the output "
            "into mean and standard deviation, without NormalParamExtractor."
        )
    raise TypeError(message)


def _missing(key: NestedKey, where: str) -> str:
    return (
        f"{where} has no {key!r}, the index of the subnetwork: append SubnetPrimer(num_subnets), or "
        "actor.make_tensordict_primer(), to the environment, which draws it at each reset; or set it by hand."
    )


def call_indexed(
    forward: Callable[..., TensorDictBase],
    num_subnets: int,
    in_keys: Sequence[NestedKey],
    tensordict: TensorDictBase,
    *args: Any,
    **kwargs: Any,
) -> TensorDictBase:
    """Call ``forward``; explain an index that is missing, of the wrong shape or, on the CPU, out of range."""
    *input_keys, key = in_keys
    index, batch = tensordict.get(key, None), tensordict.batch_size
    if index is None:
        raise KeyError(_missing(key, "the TensorDict"))
    if batch and index.shape == (*batch, 1) and any(tensordict.get(k).ndim == len(batch) + 1 for k in input_keys):
        raise ValueError(
            f"{key!r} must have shape {tuple(batch)} in a TensorDict of that batch size, got {tuple(index.shape)}, which asks "
            "every subnetwork that it names for every element: use squeeze(-1)."
        )
    try:
        return forward(tensordict, *args, **kwargs)
    except (IndexError, RuntimeError) as error:
        if ((index < 0) | (index >= num_subnets)).any():
            raise ValueError(f"{key!r} must be in [0, num_subnets={num_subnets}), got {index.unique().tolist()}.") from error
        raise

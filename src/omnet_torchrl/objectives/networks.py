"""What a loss over subnetworks checks of the networks that it is given, and how it calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from omnet_torchrl.arguments import check_keywords
from omnet_torchrl.layers.dropout import seed_dropout

# Arguments of TorchRL's losses that ours lack, and what takes their place.
EVERYWHERE = {
    "num_qvalue_nets": "the number of critics is the critic's: make_qvalue(..., network_class=EnsembleMLP, num_subnets=2)",
    "gamma": "call loss.make_value_estimator(gamma=...)",
    "priority_key": "call loss.set_keys(priority=...)",
}
ELSEWHERE = {
    "OMNetSACLoss": EVERYWHERE
    | {
        "value_network": "there is no separate state-value network: this is the version of SAC without one",
        "delay_actor": "targets are computed with the current actor",
        "delay_value": "there is no separate state-value network",
    },
}


def refuse_arguments(kind: type, given: Mapping[str, Any]) -> None:
    """Raise a ``TypeError`` at an argument that a loss lacks: it says what takes the place of one of TorchRL's loss."""
    loss = kind.__name__
    elsewhere = ELSEWHERE.get(loss, EVERYWHERE)
    for name in elsewhere.keys() & given.keys():
        raise TypeError(f"{loss} has no argument {name!r} of {loss.removeprefix('OMNet')}: {elsewhere[name]}.")
    check_keywords(kind, given, lacking=elsewhere)


def prepare_networks(**networks: Any) -> None:
    """Check the networks of a loss before it is built, and make their dropout a function of a seed.

    Raises:
        TypeError: a network is no module with keys, but e.g. a list of critics, as TorchRL's losses take.
    """
    for name, network in networks.items():
        if not isinstance(network, nn.Module) or not hasattr(network, "in_keys"):
            raise TypeError(
                f"{name} must be one module with in_keys; separate critics are one module too: "
                f"SubnetQValueOperator(EnsembleMLP(..., num_subnets=2)). Got {type(network).__name__}."
            )
        seed_dropout(network)


def check_actor(actor: Any, critic: Any, *, stochastic: bool) -> None:
    """Raise a ``TypeError`` unless the actor is of the kind that the loss needs, and the critic reads what it writes."""
    suits = hasattr(actor, "get_dist") if stochastic else "scale" not in actor.out_keys
    written, read = ({key if isinstance(key, str) else key[0] for key in keys} for keys in (actor.out_keys, critic.in_keys))
    if not suits or not written & read:
        kind, other = (
            ("stochastic", "deterministic: OMNetTD3Loss") if stochastic else ("deterministic", "stochastic: OMNetSACLoss")
        )
        raise TypeError(
            f"actor_network must be a {kind} actor (for a {other}) and qvalue_network a critic of its action, got a "
            f"{type(actor).__name__} that writes {actor.out_keys} and a {type(critic).__name__} that reads {critic.in_keys}."
        )


class BatchShapeError(ValueError):
    """What a batch has under a key is of another shape than the loss expects."""


def check_shape(key: NestedKey, value: Tensor, expected: Sequence[int]) -> None:
    """Raise a :class:`BatchShapeError` unless what a batch has under a key is of the shape that the loss expects."""
    if value.shape != expected:
        raise BatchShapeError(
            f"the batch's {key!r} must have shape {tuple(expected)}, got {tuple(value.shape)}: reshape it, give the batch its "
            "batch size, or take networks that were built for its environment."
        )


def count_subnets(network: TensorDictModuleBase, subnet_key: NestedKey, name: str) -> int:
    """Number of subnetworks that a network says it has; 1 for one that reads no index.

    Raises:
        ValueError: its layers disagree, or it reads the index and has no ``num_subnets``.
    """
    answers = (getattr(module, "num_subnets", None) for module in network.modules())
    said = {answer for answer in answers if isinstance(answer, int)}
    if len(said) > 1:
        raise ValueError(f"the layers of {name} disagree on the number of subnetworks: {sorted(said)}.")
    if not said and subnet_key in network.in_keys:
        raise ValueError(f"{name} reads {subnet_key!r} but does not say of how many: its module needs num_subnets.")
    return said.pop() if said else 1


@contextlib.contextmanager
def called_with(
    network: nn.Module, params: TensorDictBase, detach: bool = False, inputs: TensorDictBase | None = None
) -> Iterator[None]:
    """Within, a network has these parameters and buffers, as with ``params.to_module(network)``, or these detached.

    That is what happens where a graph is traced. Elsewhere the tensors are put in their places by hand, in a fifth of the time:
    a loss makes five such calls, and they were a tenth of it. What the network can't take of ``inputs``, its error names.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        if torch.compiler.is_compiling():
            with (params.detach() if detach else params).to_module(network, preserve_module_state=False):
                yield
        else:
            _replace(network, params, detach, replaced)
            yield
    except (RuntimeError, TypeError, ValueError) as error:
        kind = type(error)  # a lack of memory, and a shape of the batch that is named already, are others
        if inputs is None or kind not in (RuntimeError, TypeError, ValueError):
            raise
        given = ", ".join(f"{key!r} {tuple(value.shape)} {value.dtype}" for key, value in inputs.items(True, True))
        raise kind(f"a network of the loss must be able to read the batch and its 'next', got {given}: {error}") from error
    finally:
        for place, name, before in reversed(replaced):
            place[name] = before


def _replace(module: nn.Module, params: TensorDictBase, detach: bool, replaced: list[tuple[dict[str, Any], str, Any]]) -> None:
    """Put the tensors of ``params`` into a module and its children, and append what was there before to ``replaced``."""
    params = params._param_td if isinstance(params, TensorDictParams) else params
    if isinstance(module, TensorDictParams):  # parameters that a network holds as such
        replaced.append((module.__dict__, "_param_td", module._param_td))
        module.__dict__["_param_td"] = params.detach() if detach else params
        return
    for name, value in params.items():
        if isinstance(value, Tensor):
            place: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            replaced.append((place, name, place[name]))
            place[name] = value.detach() if detach else value
        else:
            _replace(module._modules[name], value, detach, replaced)  # type: ignore[arg-type]


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a loss frees for its next call, rather than return it to the system.

    glibc keeps about twice as much as the largest block that it has seen freed. The activations of five subnetworks are more,
    and with every page taken anew, eager losses took a third longer. Here it sees one of nearly 32 MiB, its limit, which nobody
    writes to. Other allocators don't mind.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


def check_log_prob(log_prob: Tensor, value: Tensor) -> None:
    """Raise a ``RuntimeError`` unless there is a log-probability for each value."""
    if log_prob.shape != value.shape:
        raise RuntimeError(
            f"the actor's log-probability must have the batch's shape {tuple(value.shape)}, as the critic's value, got "
            f"{tuple(log_prob.shape)}. Does the distribution sum over the action dimensions?"
        )

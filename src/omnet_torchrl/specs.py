"""What is checked of the specification of an action before a network or a loss is built for it."""

from __future__ import annotations

from tensordict import NestedKey
from torchrl.data import Bounded, Categorical, Composite, OneHot, TensorSpec


def one_spec(action_spec: TensorSpec, key: NestedKey | None = None) -> TensorSpec:
    """Return the spec of an action out of a Composite, the one under ``key`` where it has several."""
    if isinstance(action_spec, Composite):
        keys = list(action_spec.keys(True, True))
        if len(keys) == 1 or key in keys:
            return action_spec[keys[0] if len(keys) == 1 else key]
    return action_spec


def check_action_spec(action_spec: TensorSpec) -> Bounded:
    """Return the spec of one action; raise unless it is a vector of continuous actions with finite bounds."""
    action_spec = one_spec(action_spec)
    if not isinstance(action_spec, Bounded) or not action_spec.dtype.is_floating_point or not action_spec.shape:
        raise TypeError(
            f"the action spec must be a Bounded of floating point vectors, got {_described(action_spec)}: SAC and TD3 have "
            "continuous actions with finite bounds, e.g. Bounded(-1, 1, shape). For discrete ones there are make_qvalue_actor "
            "and OMNetDQNLoss."
        )
    action_spec = _of_one_environment(action_spec, 1)
    if not (action_spec.space.low.isfinite().all() and action_spec.space.high.isfinite().all()):
        raise ValueError(
            f"the action spec must have finite bounds, got low={action_spec.space.low.tolist()}, "
            f"high={action_spec.space.high.tolist()}; rescale the actions with torchrl.envs.ActionScaling or a wrapper."
        )
    return action_spec


def check_discrete_spec(action_spec: TensorSpec) -> OneHot | Categorical:
    """Return the spec of one action; raise unless it is one of a number of discrete ones."""
    action_spec = one_spec(action_spec)
    if type(action_spec) not in (OneHot, Categorical):
        raise TypeError(
            f"the action spec must be a OneHot or a Categorical, got {_described(action_spec)}: DQN has discrete actions. "
            "For continuous ones there are OMNetSACLoss and OMNetTD3Loss."
        )
    return _of_one_environment(action_spec, 1 if isinstance(action_spec, OneHot) else 0)


def _described(spec: TensorSpec) -> str:
    """What a spec is, in one line."""
    inside = f"the keys {list(spec.keys(True, True))}" if isinstance(spec, Composite) else spec.dtype
    return f"{type(spec).__name__} of shape {tuple(spec.shape)} and {inside}"


def _of_one_environment(action_spec: TensorSpec, event_dims: int) -> TensorSpec:
    while action_spec.ndim > event_dims:  # dimensions of a batched environment
        if any(row != action_spec[0] for row in action_spec.unbind(0)):
            raise ValueError("the action spec differs between the environments of a batch, and an actor has one.")
        action_spec = action_spec[0]
    return action_spec

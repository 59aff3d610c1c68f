"""The policy that a run leaves behind. What trained it is not read, and its environment is not made."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torchrl.data import Binary, Bounded, Categorical, OneHot, TensorSpec, Unbounded
from torchrl.modules import ProbabilisticActor

from omnet_torchrl.specs import check_action_spec, check_discrete_spec
from omnet_torchrl.training.build import make_policy
from omnet_torchrl.training.options import TrainConfig, load_config, resolve_device
from omnet_torchrl.training.record.checkpoint import Checkpointer, check_shapes
from omnet_torchrl.training.record.folder import RunFolder


def load_policy(folder: str | Path, subnet: int | None = None, *, device: torch.device | str = "cpu") -> ProbabilisticActor:
    """The actor of a run's newest whole checkpoint, whether the run has finished, was killed or still goes on.

    It is in evaluation mode and its parameters require no gradient. Its actions are random, as in training; within TorchRL's
    ``set_exploration_type(ExplorationType.DETERMINISTIC)`` they are not.

    Args:
        folder (str or Path): the run's folder, which holds ``run.json``.
        subnet (int or None): this subnetwork alone, an actor that reads no index. ``None`` (default): all of them, a
            :class:`~omnet_torchrl.SubnetActor`, which reads ``"subnet"``.

    Keyword Args:
        device (torch.device or str): of the policy, whatever the run's was: cpu, cuda, cuda:1 or auto.

    Raises:
        ValueError: no run in the folder, no checkpoint yet or none that is whole, a checkpoint of other networks than
            ``config.yaml`` has, no such subnetwork or device. A damaged checkpoint is passed over for the one before, with a
            warning.
        TypeError: ``subnet`` is not an int.

    Examples:
        >>> policy = load_policy("runs/Hopper-v4/omnet/seed0/2026-01-31_12-00-00", subnet=3)  # doctest: +SKIP
        >>> action = policy(TensorDict(observation=observation))["action"]  # doctest: +SKIP
    """
    where, run = resolve_device(str(device)), RunFolder.open(folder)
    loaded = Checkpointer(run.checkpoint_path).load(replay=False)
    if loaded is None:
        advice = "a run writes one at its end and, where checkpoint.interval is not 0, every so many frames"
        raise ValueError(f"{run.path} has no checkpoint yet (status: {run.info['status']}): {advice}.")
    state, config = loaded[0], load_config(run.config_path)
    # What is drawn here is replaced: nobody's random numbers move, and nobody is warned of its masks.
    with torch.random.fork_rng([where] if where.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actor = make_policy(config, *_specs(run, config), device=where)
    check_shapes(state.get("policy", {}), actor.state_dict())
    actor.load_state_dict(state["policy"])
    policy = actor if subnet is None else actor.extract(subnet)
    return policy.eval().requires_grad_(False)


def spaces(observation_spec: TensorSpec, action_spec: TensorSpec) -> dict[str, Any]:
    """What ``run.json`` keeps of an environment for :func:`load_policy`: sizes, and the bounds of an action or their number."""
    observation = observation_spec["observation"]
    if isinstance(action_spec, OneHot | Categorical):
        action = check_discrete_spec(action_spec)
        encoding = "one-hot" if isinstance(action, OneHot) else "categorical"
        return {"observation": list(observation.shape[-3:]), "actions": action.space.n, "encoding": encoding}
    action = check_action_spec(action_spec)
    bounds = {"low": action.space.low.tolist(), "high": action.space.high.tolist()}
    return {"observation": observation.shape[-1], **bounds, "dtype": str(action.dtype).split(".")[1]}


def _specs(run: RunFolder, config: TrainConfig) -> tuple[TensorSpec, TensorSpec]:
    """The environment's specs: those that the run wrote down or, where it did not or its options were edited, of a new one."""
    info = run.info
    if "spaces" in info and info.get("env") == config.env:
        kept = info["spaces"]
        if "actions" in kept:
            action = (OneHot if kept["encoding"] == "one-hot" else Categorical)(kept["actions"])
            return Binary(shape=kept["observation"], dtype=torch.bool), action
        low, high = (torch.tensor(kept[name], dtype=getattr(torch, kept["dtype"])) for name in ("low", "high"))
        return Unbounded((kept["observation"],)), Bounded(low, high, low.shape, dtype=low.dtype)
    from omnet_torchrl.training.loop.environments import env_options, make_env  # which import gymnasium

    env = make_env(config.env, **env_options(config))
    env.close()
    return env.observation_spec, env.action_spec

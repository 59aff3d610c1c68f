"""The policy that a run leaves behind, to act with: in an evaluation, a video, another program.

What trained it (critic, optimisers, replay buffer) is not read.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torchrl.modules import ProbabilisticActor

from omnet_torchrl.builders import make_actor
from omnet_torchrl.modules import SubnetActor
from omnet_torchrl.training.algorithms import network_options
from omnet_torchrl.training.checkpoint import Checkpointer, check_shapes
from omnet_torchrl.training.config import load_config, resolve_device
from omnet_torchrl.training.environments import check_env, make_env
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.run_folder import RunFolder


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
            ``config.yaml`` has, no such subnetwork or device, or an environment that can't be made here. A damaged checkpoint
            is passed over for the one before, with a warning.
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
    state, _ = loaded
    actor = _build(load_config(run.config_path), where)
    check_shapes(state["policy"], actor.state_dict())
    actor.load_state_dict(state["policy"])
    policy = actor if subnet is None else actor.extract(subnet)
    return policy.eval().requires_grad_(False)


def _build(config: TrainConfig, device: torch.device) -> SubnetActor:
    """The run's actor with other numbers."""
    check_env(config.env)
    env = make_env(config.env)
    observation_spec, action_spec = env.observation_spec, env.action_spec
    env.close()
    # What is drawn here is replaced: nobody's random numbers move, and nobody is warned of its masks.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_actor(observation_spec, action_spec, **network_options(config, "actor"), device=device)

"""What a checkpoint keeps of the collection, and of what a run's numbers depend on beside its state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.collectors import Collector

from omnet_torchrl.envs import TasksEnv
from omnet_torchrl.training.loop.backends import Workers
from omnet_torchrl.training.loop.border import ReplayError
from omnet_torchrl.training.loop.environments import recorders
from omnet_torchrl.training.options import TrainConfig
from omnet_torchrl.training.options.checks import bound, changes, differences, listed
from omnet_torchrl.training.record.folder import conditions
from omnet_torchrl.updates import Update


def collection_state(collector: Collector | Workers) -> dict[str, Any]:
    """The policy, the transforms, what the next step starts from, and the episodes in progress; of workers, the policy."""
    if isinstance(collector, Workers):
        return {"policy": dict(collector.policy.state_dict())}
    state = collector.state_dict()
    return {
        "policy": dict(state["policy_state_dict"]),
        "transforms": dict(state["env_state_dict"]),
        "carrier": collector._carrier.cpu().to_dict(),
        "episodes": [dict(recorder.state_dict()) for recorder in recorders(collector.env)],
    }


def load_collection(collector: Collector, state: dict[str, Any]) -> None:
    """Go on from a :func:`collection_state`. An episode that can't be played again starts anew, with a warning."""
    carrier = collector._carrier
    stored = TensorDict(state["carrier"], batch_size=carrier.batch_size)
    fresh = carrier.clone()
    for i, (recorder, episode) in enumerate(zip(recorders(collector.env), state["episodes"], strict=True)):
        try:
            recorder.load_state_dict(episode)
        except ReplayError as error:
            warnings.warn(f"environment {i}: {error} Its episode starts anew; the run goes on, inexactly.", stacklevel=2)
            begun = fresh.view(-1)[i].clone()
            observation = torch.as_tensor(recorder.reset()[0], dtype=begun["observation"].dtype)
            stored.view(-1)[i].update_(begun.set("observation", observation))
    collection = {"env_state_dict": state["transforms"], "frames": state["frames"], "iter": -1}
    collector.load_state_dict(collection, strict=False)
    collector._carrier = carrier.update(stored)
    if isinstance(collector.env.base_env, TasksEnv) and "success" in stored:
        collector.env.base_env.load_success(stored["success"])


def setting(config: TrainConfig, update: Update) -> dict[str, dict[str, Any]]:
    """What the numbers depend on beside the state: options, versions and flags."""
    return {"options": bound(config), "conditions": conditions(update.device, update.compiled)}


def compare(state: dict[str, Any], config: TrainConfig, update: Update, say: Callable[[str], object]) -> None:
    """Refuse the checkpoint of a run with other options; say which may change, and have, and warn of versions and flags."""
    fixed = differences(state["options"], config)
    if fixed:
        raise ValueError(f"the checkpoint is of a run with other options: {listed(fixed)}.")
    changed = changes(state["options"], config)
    if changed:
        say(f"goes on with other options than the checkpoint's: {listed(changed)}")
    now = setting(config, update)["conditions"].items()
    others = {name: (state["conditions"].get(name), value) for name, value in now if state["conditions"].get(name) != value}
    if others:
        warnings.warn(f"the run goes on, inexactly: {listed(others)}.", stacklevel=2)

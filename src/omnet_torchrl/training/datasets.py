"""Record a dataset: a run's replay, episodes of its policy, Meta-World's scripted experts, or a dataset of Minari.

    python -m omnet_torchrl.training.datasets RUN data/replay                          # of its newest checkpoint
    python -m omnet_torchrl.training.datasets RUN data/medium --frames 100_000         # what its policy does, in new episodes
    python -m omnet_torchrl.training.datasets Meta-World/MT10 data/experts --frames 100_000
    python -m omnet_torchrl.training.datasets minari:mujoco/halfcheetah/medium-v0 data/minari --env HalfCheetah-v5

In the words of offline learning, a run's replay is *medium-replay*, the policy of a run that was stopped early *medium*, and
that of a finished one *expert*. What they are read with is :func:`~omnet_torchrl.training.read_dataset`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from omnet_torchrl.envs import task_names
from omnet_torchrl.envs.suites import META_WORLD
from omnet_torchrl.training.loop.environments import env_options, make_env
from omnet_torchrl.training.options import load_config
from omnet_torchrl.training.policy import load_policy
from omnet_torchrl.training.record.checkpoint import Checkpointer, load_replay
from omnet_torchrl.training.record.datasets import KEYS, tasks_of, write_dataset
from omnet_torchrl.training.record.folder import RunFolder
from omnet_torchrl.transforms import SubnetPrimer

MINARI = "minari:"  # before the name of a dataset


def record_replay(run: str | Path, folder: str | Path) -> Path:
    """Write the replay of a run's newest whole checkpoint as a dataset, the oldest transitions first.

    Args:
        run (str or Path): the run's folder.
        folder (str or Path): of the dataset.

    Raises:
        ValueError: there is no run, no checkpoint that is whole, or a dataset already.
    """
    opened = RunFolder.open(run)
    config, loaded = load_config(opened.config_path), Checkpointer(opened.checkpoint_path).load()
    if loaded is None:
        raise ValueError(f"{opened.path} has no checkpoint yet, and so no replay: wait for its first, see checkpoint.interval.")
    (state, files), tasks = loaded, len(task_names(config.env))
    buffer = ReplayBuffer(storage=LazyTensorStorage(min(config.buffer_size, config.total_frames) // tasks))
    load_replay(buffer, files, state["writer"], dims=1 + (tasks > 1))
    oldest = state["writer"]["_cursor"] if len(buffer) == buffer.storage.max_size else 0
    data = buffer.storage.get((torch.arange(len(buffer)) + oldest) % len(buffer))
    env = make_env(config.env, **env_options(config))
    try:
        return write_dataset(folder, data, env, kind="replay", **_source(opened, config, state["frames"]))
    finally:
        env.close()


def record_policy(run: str | Path, folder: str | Path, frames: int, *, seed: int = 0, stochastic: bool = True) -> Path:
    """Write what a run's policy does, in episodes one after the other, as a dataset.

    Args:
        run (str or Path): the run's folder.
        folder (str or Path): of the dataset.
        frames (int): transitions, those of all tasks together.

    Keyword Args:
        seed (int): of the environments, the subnetworks that play and the actions. Defaults to 0.
        stochastic (bool): actions are drawn as in training. Defaults to ``True``.
    """
    opened = RunFolder.open(run)
    config, policy = load_config(opened.config_path), load_policy(run)
    fixed = torch.arange(policy.num_subnets) if len(task_names(config.env)) > 1 else None
    primer = SubnetPrimer(policy.num_subnets, fixed=fixed, generator=seed)
    options = {"observation_offset": config.observation_offset, **env_options(config)}
    env = make_env(config.env, primer, seed=seed, **options)
    kind = ExplorationType.RANDOM if stochastic else ExplorationType.DETERMINISTIC
    try:
        with set_exploration_type(kind), torch.random.fork_rng([]):
            torch.manual_seed(seed)
            data = record(env, policy, frames)
        played = {"kind": "policy", "seed": seed, "stochastic": stochastic}
        return write_dataset(folder, data, env, **played, **_source(opened, config, opened.info.get("saved")))
    finally:
        env.close()


def record_experts(name: str, folder: str | Path, frames: int, *, seed: int = 0, noise: float = 0.1, **options: Any) -> Path:
    """Write what Meta-World's scripted policies do as a dataset.

    Args:
        name (str): tasks, e.g. ``"Meta-World/MT10"`` or ``"Meta-World/reach-v3+push-v3"``.
        folder (str or Path): of the dataset.
        frames (int): transitions, those of all tasks together.

    Keyword Args:
        seed (int): of the environments and the noise. Defaults to 0.
        noise (float): standard deviation of the Gaussian noise of the actions, which are in [-1, 1]. Defaults to 0.1.
        **options: of :func:`~omnet_torchrl.training.make_env`.
    """
    names = task_names(name)
    env, generator = make_env(name, seed=seed, **options), torch.Generator().manual_seed(seed)
    policies = import_module("metaworld.policies").ENV_POLICY_MAP
    experts = [policies[each.removeprefix(META_WORLD)]() for each in names]

    def act(observation: Tensor) -> Tensor:
        seen = observation.double().reshape(len(experts), -1).numpy()
        every = [torch.as_tensor(expert.get_action(each)) for expert, each in zip(experts, seen, strict=True)]
        action = torch.stack(every).float().reshape(env.action_spec.shape)
        return (action + noise * torch.randn(action.shape, generator=generator)).clamp(-1, 1)

    try:
        data = record(env, TensorDictModule(act, in_keys=["observation"], out_keys=["action"]), frames)
        return write_dataset(folder, data, env, kind="experts", env=name, env_options=options, seed=seed, noise=noise)
    finally:
        env.close()


def record_minari(name: str, folder: str | Path, env: str) -> Path:
    """Write a dataset of Minari, which is downloaded where it is not there, as one that TorchRL reads as it is.

    Args:
        name (str): e.g. ``"mujoco/halfcheetah/medium-v0"``; observations and actions are vectors.
        folder (str or Path): of the dataset.
        env (str): the environment whose spaces it has, e.g. ``"HalfCheetah-v5"``.

    Raises:
        ValueError: the package minari is not installed.
    """
    if not util.find_spec("minari"):
        raise ValueError("reading a dataset of Minari needs the package minari: pip install 'omnet-torchrl[minari]'.")
    source = import_module("minari").load_dataset(name, download=True)
    parts = [_transitions(episode) for episode in source.iterate_episodes()]
    made = make_env(env)
    try:
        return write_dataset(folder, torch.cat(parts), made, kind="minari", minari=name, env=env)
    finally:
        made.close()


def record(env: EnvBase, policy: TensorDictModuleBase, frames: int) -> TensorDictBase:
    """Play a policy in episodes one after the other, each environment of a batch by itself.

    Returns:
        TensorDictBase: ``(frames,)`` transitions, or ``(frames / T, T)``.

    Raises:
        ValueError: ``frames`` is no multiple of the environments.
    """
    count = env.batch_size.numel()
    if frames < count or frames % count:
        raise ValueError(f"frames must be a multiple of the {count} task(s), got {frames}.")
    with torch.no_grad():
        played = env.rollout(frames // count, policy, break_when_any_done=False)
    return played.select(*KEYS).transpose(0, -1) if tasks_of(env) else played.select(*KEYS)


def _source(run: RunFolder, config: Any, frames: int | None) -> dict[str, Any]:
    made = {name: run.info.get(name) for name in ("versions", "git_commit")}
    env = {"env": config.env, "env_options": env_options(config)}
    return {**env, "run": {"algorithm": config.algorithm, "seed": config.seed, "frames": frames, **made}}


def _transitions(episode: Any) -> TensorDict:
    """Of an episode of Minari, whose last observation follows no action."""
    tensors = {name: torch.as_tensor(getattr(episode, name)) for name in ("observations", "actions", "rewards")}
    terminated, truncated = (torch.as_tensor(getattr(episode, name)).bool() for name in ("terminations", "truncations"))
    observation, reward = tensors["observations"].float(), tensors["rewards"].float().unsqueeze(-1)
    ends: dict[str, Tensor] = {"done": (terminated | truncated).unsqueeze(-1), "terminated": terminated.unsqueeze(-1)}
    following = {"observation": observation[1:], "reward": reward, **ends}
    return TensorDict({"observation": observation[:-1], "action": tensors["actions"].float(), "next": following}, [len(reward)])


def main(arguments: Sequence[str] | None = None) -> Path:
    """Record what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a run, tasks of Meta-World, or minari:<dataset>")
    parser.add_argument("folder", help="of the dataset, which is new")
    parser.add_argument("--frames", type=int, help="to be played; of a run without it, its replay")
    parser.add_argument("--seed", type=int, default=0, help="of what is played (default: %(default)s)")
    parser.add_argument("--deterministic", action="store_true", help="play without noise")
    parser.add_argument("--env", help="of a dataset of Minari: the environment whose spaces it has")
    args = parser.parse_args(arguments)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    if args.source.startswith(MINARI):
        if args.env is None:
            raise ValueError("--env must say which environment a dataset of Minari is of, e.g. --env HalfCheetah-v5.")
        return record_minari(args.source.removeprefix(MINARI), args.folder, args.env)
    if args.source.startswith(META_WORLD):
        noise = {"noise": 0.0} if args.deterministic else {}
        return record_experts(args.source, args.folder, args.frames or 0, seed=args.seed, **noise)
    if args.frames is None:
        return record_replay(args.source, args.folder)
    return record_policy(args.source, args.folder, args.frames, seed=args.seed, stochastic=not args.deterministic)


if __name__ == "__main__":
    try:
        print(main())
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")

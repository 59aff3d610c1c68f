"""OMNet-TD3 in a script of one's own: TorchRL's collector and replay buffer, and ``Update``.

    python examples/td3_script.py                               # InvertedDoublePendulum-v4
    python examples/td3_script.py --env Hopper-v4 --frames 300_000 --utd-ratio 20 --policy-update-delay 20

It prints the mean return of 10 evaluation episodes every 1,000 frames, and needs gymnasium's MuJoCo besides the package.
"""

from __future__ import annotations

import argparse
from itertools import count

import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, DoubleToFloat, EnvBase, GymEnv, InitTracker, RewardSum, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import AdditiveGaussianModule

from omnet_torchrl import (
    CompiledPolicy,
    OMNetTD3Loss,
    SubnetDeterministicActor,
    SubnetPrimer,
    Update,
    make_deterministic_actor,
    make_qvalue,
)


def main(arguments: list[str] | None = None) -> float:
    """Train, and return the mean return of the last evaluation."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args.env, args.seed), make_env(args.env, args.seed + 1)
    networks = {"num_subnets": args.num_subnets, "sparsity": args.sparsity, "num_cells": args.num_cells}
    actor = make_deterministic_actor(env.observation_spec, env.action_spec, **networks)
    qvalue = make_qvalue(env.observation_spec, env.action_spec, **networks)
    for each in (env, eval_env):  # the environment draws the subnetwork that plays an episode
        each.append_transform(SubnetPrimer(actor.num_subnets, generator=args.seed))

    # One random critic subnetwork is trained against the minimum of two, the actor against the mean of all.
    loss = OMNetTD3Loss(actor, qvalue).make_value_estimator(gamma=0.99)
    update = Update(loss, lr=3e-4, tau=0.005, policy_update_delay=args.policy_update_delay, compile=not args.no_compile)

    noise = AdditiveGaussianModule(actor.spec, sigma_init=0.1, sigma_end=0.1, annealing_num_steps=1)
    policy = CompiledPolicy(actor, compile=not args.no_compile)
    policy.prepare(env.fake_tensordict())
    collector = Collector(
        env,
        TensorDictSequential(policy, noise),
        frames_per_batch=1,
        total_frames=args.frames,
        init_random_frames=args.init_random_frames,
        auto_register_policy_transforms=False,  # the primer is there already
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(args.frames))
    score = float("nan")
    for frames, data in zip(count(1), collector, strict=False):
        buffer.extend(data.select(*loss.in_keys))
        if frames >= args.init_random_frames:  # several updates in one compiled call
            update(buffer.sample(args.utd_ratio * args.batch_size).reshape(args.utd_ratio, args.batch_size))
        if frames % args.eval_interval == 0 or frames == args.frames:
            score = evaluate(eval_env, actor, args.episodes)
            print(f"{frames:>9,} frames  return {score:9.1f}", flush=True)
    collector.shutdown()
    return score


def make_env(name: str, seed: int) -> TransformedEnv:
    """A gymnasium environment with float observations and the return of each episode so far."""
    env = TransformedEnv(GymEnv(name), Compose(InitTracker(), DoubleToFloat(), RewardSum(in_keys=["reward"])))
    env.set_seed(seed)
    return env


@torch.no_grad()
def evaluate(env: EnvBase, actor: SubnetDeterministicActor, episodes: int) -> float:
    """Mean return of episodes without noise, each played by a random subnetwork."""
    returns = []
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(episodes):
            returns.append(env.rollout(1_000, actor)["next", "episode_reward"][-1].item())
    return sum(returns) / len(returns)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; numbers may have underscores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="InvertedDoublePendulum-v4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=5_000)
    parser.add_argument("--init-random-frames", type=int, default=1_000, help="played at random before the first update")
    parser.add_argument("--utd-ratio", type=int, default=8, help="updates for each frame")
    parser.add_argument("--policy-update-delay", type=int, default=4, help="updates of the critic for each of the actor")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-subnets", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-cells", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--eval-interval", type=int, default=1_000, help="in frames")
    parser.add_argument("--episodes", type=int, default=10, help="of one evaluation")
    parser.add_argument("--no-compile", action="store_true", help="make each operation by itself, to debug")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

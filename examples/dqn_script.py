"""OMNet-DQN in a script of one's own: TorchRL's collector, replay buffer and epsilon-greedy exploration, and ``Update``.

    python examples/dqn_script.py            # CartPole-v1
    python examples/dqn_script.py --target-reduction subnet --single    # Bootstrapped DQN with masks for heads

The subnetwork that is drawn at reset acts greedily on its own values all episode; evaluation is greedy on the mean of all.
The settings are those of RL Baselines3 Zoo. The return reaches 500, the most there is, within some thousand frames, and falls
back at times.
"""

from __future__ import annotations

import argparse
from itertools import count

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, GymEnv, InitTracker, RewardSum, TransformedEnv
from torchrl.envs.transforms import Compose
from torchrl.modules import EGreedyModule

from omnet_torchrl import OMNetDQNLoss, SubnetPrimer, Update, make_qvalue_actor


def main(arguments: list[str] | None = None) -> float:
    """Train, and return the mean return of the last evaluation."""
    args = parse(arguments)
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args.env, args.seed), make_env(args.env, args.seed + 1)
    # The observation is small: its layer is dense, so that no unit is without inputs.
    sparsity = [0.0] + [args.sparsity] * len(args.num_cells)
    networks = {"num_subnets": args.num_subnets, "sparsity": sparsity, "num_cells": args.num_cells}
    actor = make_qvalue_actor(env.observation_spec, env.action_spec, **networks)
    env.append_transform(SubnetPrimer(actor.num_subnets, generator=args.seed))  # draws who plays an episode

    # One random subnetwork is trained; its best action has the minimum of two in the target.
    options = {"target_reduction": args.target_reduction, "double_dqn": not args.single}
    loss = OMNetDQNLoss(actor, **options).make_value_estimator(gamma=0.99)
    interval = args.target_update_interval
    update = Update(loss, lr=args.lr, tau=1.0, target_update_interval=interval, compile=not args.no_compile)

    explore = EGreedyModule(actor.spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=args.annealing_frames)
    collector = Collector(
        env,
        TensorDictSequential(actor, explore),
        frames_per_batch=args.frames_per_update,
        total_frames=args.frames,
        auto_register_policy_transforms=False,  # the primer is there already
    )
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(args.frames), batch_size=args.batch_size)
    score, step = float("nan"), args.frames_per_update
    for frames, data in zip(count(step, step), collector, strict=False):
        explore.step(step)
        buffer.extend(data.select(*loss.in_keys))
        if frames >= args.learning_starts:
            update(buffer.sample())
        if frames % args.eval_interval < step or frames >= args.frames:
            score = evaluate(eval_env, actor.mean_policy(), args.episodes)
            print(f"{frames:>9,} frames  epsilon {float(explore.eps):4.2f}  return {score:6.1f}", flush=True)
    collector.shutdown()
    return score


def make_env(name: str, seed: int) -> TransformedEnv:
    """A gymnasium environment with the return of each episode so far."""
    env = TransformedEnv(GymEnv(name), Compose(InitTracker(), RewardSum(in_keys=["reward"])))
    env.set_seed(seed)
    return env


@torch.no_grad()
def evaluate(env: EnvBase, policy: TensorDictModuleBase, episodes: int) -> float:
    """Mean return of some episodes."""
    returns = [env.rollout(1_000, policy)["next", "episode_reward"][-1].item() for _ in range(episodes)]
    return sum(returns) / len(returns)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; numbers may have underscores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--learning-starts", type=int, default=1_000, help="frames before the first update")
    parser.add_argument("--annealing-frames", type=int, default=8_000, help="of epsilon, from 1 to 0.05")
    parser.add_argument("--frames-per-update", type=int, default=2)
    parser.add_argument("--target-update-interval", type=int, default=10, help="updates between copies of the network")
    parser.add_argument("--target-reduction", choices=["min", "mean", "subnet"], default="min")
    parser.add_argument("--single", action="store_true", help="not double: the next action is the best of the target network")
    parser.add_argument("--lr", type=float, default=2.3e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-subnets", type=int, default=5)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--num-cells", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--eval-interval", type=int, default=2_000, help="in frames")
    parser.add_argument("--episodes", type=int, default=10, help="of one evaluation")
    parser.add_argument("--no-compile", action="store_true", help="make each operation by itself, to debug")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

"""MinAtar: steps of the games, updates of DQN, and the whole job beside a plain loop in PyTorch; all in one run, as ratios.

    python benchmarks/speed/games.py                # Breakout; some minutes
    python benchmarks/speed/games.py space_invaders --threads 1

Each number is the best of several rounds that take turns. The plain loop is what people write: one game, a network of PyTorch,
one update a frame, epsilon-greedy; its network, batch and optimiser are those of the job's row ``dqn``.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F
from torchrl.envs import GymEnv, SerialEnv

from omnet_torchrl import OMNetDQNLoss, OMNetSACLoss, OMNetTD3Loss, Update, make_actor, make_deterministic_actor, make_qvalue
from omnet_torchrl.envs import MinAtarEnv
from omnet_torchrl.grids import make_grid_qvalue_actor
from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.structures import set_structure, spatial_structure
from omnet_torchrl.training.record.metrics import read_metrics

ENVS, BATCH = 8, 32


def plain_loop(game: str, frames: int, init: int) -> float:
    """Frames per second of a DQN loop in PyTorch after its random frames."""
    import minatar

    env = minatar.Environment(game)
    env.seed(0)
    actions, channels = env.minimal_action_set(), env.n_channels

    def network() -> nn.Module:
        layers = nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(128, len(actions)))

    online, target = network(), network()
    optim, buffer = torch.optim.Adam(online.parameters(), lr=2.5e-4), deque(maxlen=100_000)
    env.reset()
    state, start = env.state(), 0.0
    for frame in range(init + frames):
        if frame == init:
            start = time.perf_counter()
        epsilon = max(0.1, 1 - 0.9 * frame / 100_000)
        if random.random() < epsilon:
            action = random.randrange(len(actions))
        else:
            with torch.no_grad():
                action = int(online(torch.from_numpy(state).movedim(-1, 0)[None].float()).argmax())
        reward, done = env.act(actions[action])
        following = env.state()
        buffer.append((state, action, reward, following, done))
        if done:
            env.reset()
        state = env.state()
        if frame < init:
            continue
        s, a, r, n, d = zip(*random.sample(buffer, BATCH), strict=True)
        s, n = (torch.from_numpy(np.stack(each)).movedim(-1, 1).float() for each in (s, n))
        a, r, d = (
            torch.tensor(each, dtype=dtype) for each, dtype in ((a, torch.int64), (r, torch.float32), (d, torch.float32))
        )
        with torch.no_grad():
            y = r + 0.99 * (1 - d) * target(n).amax(-1)
        loss = F.smooth_l1_loss(online(s).gather(-1, a[:, None]).squeeze(-1), y)
        optim.zero_grad()
        loss.backward()
        optim.step()
        if frame % 1_000 == 0:
            target.load_state_dict(online.state_dict())
    return frames / (time.perf_counter() - start)


def job(game: str, row: str, frames: int, init: int, threads: int) -> float:
    """Frames per second of the job after its random frames, everything but evaluation, saving and compiling."""
    example = Path(__file__).resolve().parents[2] / "examples" / "minatar_dqn.py"
    with tempfile.TemporaryDirectory() as folder:
        counts = [f"total_frames={init + frames}", f"init_random_frames={init}", f"log_interval={frames // 4}"]
        quiet = ["eval.interval=1000000", "eval.episodes=1", "progress=false", f"num_threads={threads}"]
        names = [f"env=MinAtar/{game}", f"algorithm={row}", f"folder={folder}/run"]
        subprocess.run([sys.executable, str(example), *names, *counts, *quiet], check=True, stdout=subprocess.DEVNULL)
        at, per_second = (
            np.asarray(each) for each in read_metrics(Path(folder, "run", "metrics.csv"))["time/frames_per_second"]
        )
    seconds = at / per_second
    return float((at[-1] - at[0]) / (seconds[-1] - seconds[0]))


def steps(env: object, count: int = 200) -> float:
    """Frames per second of a random policy."""
    env.rollout(5, break_when_any_done=False)
    start = time.perf_counter()
    env.rollout(count, break_when_any_done=False)
    return ENVS * count / (time.perf_counter() - start)


def updates(update: Update, batch: TensorDict, count: int = 8) -> float:
    """Seconds of one update, ``count`` in a call."""
    batches = batch.expand(count, *batch.batch_size).contiguous()
    update(batches)
    start = time.perf_counter()
    for _ in range(10):
        update(batches)
    return (time.perf_counter() - start) / 10 / count


def best(rounds: int, measure: dict, largest: bool) -> dict[str, float]:
    """The best of several rounds of each, which take turns."""
    found = {name: [function()] for name, function in measure.items()}
    for _ in range(rounds - 1):
        for name, function in measure.items():
            found[name].append(function())
    return {name: (max if largest else min)(values) for name, values in found.items()}


def dqn(env: MinAtarEnv, num_subnets: int, sparsity: float, num_target_subnets: int) -> Update:
    """The update of a DQN with a convolution, compiled."""
    actor = make_grid_qvalue_actor(
        env.observation_spec, env.action_spec, num_subnets=num_subnets, sparsity=sparsity, generator=0
    )
    loss = OMNetDQNLoss(actor, num_target_subnets=num_target_subnets, delay_value=True)
    return Update(loss, lr=2.5e-4, tau=1.0, target_update_interval=1_000)


def structured(env: MinAtarEnv, kept: bool) -> Update:
    """The update of a DQN with 1,000 hidden units that see windows of 3 x 3: under masks, or with the weights kept alone."""
    structure = spatial_structure(1_000, env.observation_spec["observation"].shape[-3:], generator=0)
    options = {"channels": None, "num_cells": [1_000], "num_subnets": 1, "sparsity": 0.0, "generator": 0}
    options["structure"] = structure if kept else None
    actor = make_grid_qvalue_actor(env.observation_spec, env.action_spec, **options)
    if not kept:
        set_structure(next(each for each in actor.modules() if isinstance(each, MaskedLinear)), structure)
    return Update(OMNetDQNLoss(actor, delay_value=True), lr=2.5e-4, tau=1.0, target_update_interval=1_000)


def continuous(kind: str) -> tuple[Update, TensorDict]:
    """The update of OMNet-SAC or OMNet-TD3 at Hopper-v4's sizes, and a batch."""
    from torchrl.data import Bounded, Unbounded

    specs, end = (Unbounded(11), Bounded(-1, 1, (3,))), torch.zeros(256, 1, dtype=torch.bool)
    qvalue = make_qvalue(*specs, generator=0)
    if kind == "sac":
        loss: OMNetSACLoss | OMNetTD3Loss = OMNetSACLoss(make_actor(*specs, generator=1), qvalue)
    else:
        loss = OMNetTD3Loss(make_deterministic_actor(*specs, generator=1), qvalue)
    following = {"observation": torch.randn(256, 11), "reward": torch.randn(256, 1), "done": end, "terminated": end}
    batch = TensorDict({"observation": torch.randn(256, 11), "action": torch.rand(256, 3), "next": following}, [256])
    return Update(loss, lr=3e-4, policy_update_delay=20), batch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("game", nargs="?", default="breakout")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=8_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    import minatar.gym

    minatar.gym.register_envs()
    name = "MinAtar/" + args.game.title().replace("_", "") + "-v1"
    ours, wrapped = MinAtarEnv(args.game, ENVS), SerialEnv(ENVS, lambda: GymEnv(name))
    rates = best(args.rounds, {"ours": lambda: steps(ours), "GymEnv": lambda: steps(wrapped, 50)}, largest=True)
    print(f"{ENVS} games, steps/s: MinAtarEnv {rates['ours']:,.0f}, GymEnv {rates['GymEnv']:,.0f}: ", end="")
    print(f"{rates['ours'] / rates['GymEnv']:.1f} times", flush=True)

    env = MinAtarEnv(args.game, BATCH)
    data = env.rollout(1, break_when_any_done=False)[:, 0]
    many, one = dqn(env, 5, 0.5, 2), dqn(env, 1, 0.0, 1)
    seconds = best(args.rounds, {"five": lambda: updates(many, data), "dense": lambda: updates(one, data)}, largest=False)
    print(f"update, ms: 5 masked subnetworks {1000 * seconds['five']:.3f}, dense {1000 * seconds['dense']:.3f}: ", end="")
    print(f"{seconds['five'] / seconds['dense']:.2f}", flush=True)

    weights, masks = structured(env, True), structured(env, False)
    seconds = best(args.rounds, {"kept": lambda: updates(weights, data), "masks": lambda: updates(masks, data)}, largest=False)
    print(f"update of 1,000 units of a structure, ms: masks {1000 * seconds['masks']:.3f}, kept weights alone ", end="")
    print(f"{1000 * seconds['kept']:.3f}: {seconds['kept'] / seconds['masks']:.2f}", flush=True)

    (sac, batch), (td3, _) = continuous("sac"), continuous("td3")
    blocks = {"sac": lambda: updates(sac, batch, 20), "td3": lambda: updates(td3, batch, 20)}
    seconds = best(args.rounds, blocks, largest=False)
    print(f"block of 20 at Hopper-v4's sizes, ms: OMNet-TD3 {20_000 * seconds['td3']:.1f}, ", end="")
    print(f"OMNet-SAC {20_000 * seconds['sac']:.1f}: {seconds['td3'] / seconds['sac']:.2f}", flush=True)

    init = 1_000
    loops = {"plain": lambda: plain_loop(args.game, args.frames // 4, init)}
    loops |= {row: lambda row=row: job(args.game, row, args.frames, init, args.threads) for row in ("dqn", "omnet_dqn")}
    rates = best(2, loops, largest=True)
    for row in ("dqn", "omnet_dqn"):
        print(
            f"job {row}, frames/s: {rates[row]:,.0f}, plain loop {rates['plain']:,.0f}: {rates[row] / rates['plain']:.1f} times"
        )


if __name__ == "__main__":
    main()

"""What a script of one's own gets: 20 updates with their sampling, composed in the ways that people compose them.

    python benchmarks/speed/composed.py                    # Hopper-v4's sizes, a table of medians and ratios
    python benchmarks/speed/composed.py --task humanoid --rounds 30 --json composed.json

Every case samples from TorchRL's own ``TensorDictReplayBuffer`` over a ``LazyTensorStorage``, but the main job's block. Cases
take turns, round by round, in one process; a ratio is the median over rounds. Beside it stands the ratio of the operations in
both cases' matrix products: where products take most of the time, no composition gets below that.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import components
import matmuls
import torch
from components import BATCH, STORED, TASKS, UPDATES, Block, Task
from matmuls import flops
from tensordict import TensorDict
from torch.optim import Adam
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.objectives import REDQLoss, SACLoss, SoftUpdate

from omnet_torchrl import OMNetSACLoss, Update, make_actor, make_qvalue


def buffer_of(task: Task, batch_size: int | None = None) -> TensorDictReplayBuffer:
    """A user's buffer, full."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(STORED), batch_size=batch_size)
    return components.filled(buffer, task)


def loss_of(task: Task) -> OMNetSACLoss:
    """The README's loss."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody moves the targets where only a loss is timed
        return OMNetSACLoss(make_actor(*task.specs()), make_qvalue(*task.specs()))


def three_lines(task: Task, **options: object) -> Block:
    """``Update`` in a plain script, all updates in one call."""
    update, buffer = Update(loss_of(task), lr=3e-4, policy_update_delay=UPDATES, **options), buffer_of(task)
    return lambda: update(buffer.sample(UPDATES * BATCH).reshape(UPDATES, BATCH))


def one_by_one(task: Task) -> Block:
    """``Update`` with a batch for each call."""
    update, buffer = Update(loss_of(task), lr=3e-4, policy_update_delay=UPDATES), buffer_of(task, BATCH)

    def block() -> None:
        for _ in range(UPDATES):
            update(buffer.sample())

    return block


def whole_loss(task: Task, compile: bool = False) -> Block:
    """The former script of the README: the whole loss, one Adam, SoftUpdate."""
    loss, buffer = loss_of(task), buffer_of(task, BATCH)
    updater, optim = SoftUpdate(loss, tau=0.005), Adam(loss.parameters(), lr=3e-4)
    function = torch.compile(loss) if compile else loss

    def block() -> None:
        for _ in range(UPDATES):
            losses = function(buffer.sample())
            optim.zero_grad()
            (losses["loss_qvalue"] + losses["loss_actor"] + losses["loss_alpha"]).backward()
            optim.step()
            updater.step()

    return block


def loss_alone(task: Task, part: str = "whole") -> Block:
    """The eager loss with its backward pass: the whole, or the critic's part."""
    loss, batch = loss_of(task), components.transitions(task, BATCH)

    def block() -> None:
        for _ in range(UPDATES):
            if part == "critic":
                total = loss.qvalue_loss(batch)[0]
            else:
                losses = loss(batch)
                total = losses["loss_qvalue"] + losses["loss_actor"] + losses["loss_alpha"]
            total.backward()

    return block


def sac_loss_alone(task: Task) -> Block:
    """TorchRL's SACLoss with two critics, eager, with its backward pass."""
    loss, batch = torchrl_sac(task), components.transitions(task, BATCH)

    def block() -> None:
        for _ in range(UPDATES):
            losses: TensorDict = loss(batch)
            (losses["loss_qvalue"] + losses["loss_actor"] + losses["loss_alpha"]).backward()

    return block


def torchrl_sac(task: Task) -> SACLoss:
    """TorchRL's SACLoss over the networks of its own recipe."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return components.torchrl_loss(SACLoss, task)[0]


def cases(task: Task) -> dict[str, Callable[[], Block]]:
    """Everything that is compared, by name."""
    return {
        "main job's block": partial(components.omnet_block, "omnet", task),
        "Update, 20 a call": partial(three_lines, task),
        "Update, 20 a call, bfloat16": partial(three_lines, task, precision="bfloat16"),
        "Update, 1 a call": partial(one_by_one, task),
        "whole loss, Adam, SoftUpdate": partial(whole_loss, task),
        "the same, torch.compile": partial(whole_loss, task, True),
        "TorchRL SACLoss eager": partial(components.torchrl_block, SACLoss, task, compile=False),
        "TorchRL REDQLoss eager": partial(components.torchrl_block, REDQLoss, task, compile=False),
        "loss alone, eager": partial(loss_alone, task),
        "critic's loss alone, eager": partial(loss_alone, task, "critic"),
        "SACLoss alone, eager": partial(sac_loss_alone, task),
    }


# Which case over which other, and the most that it may be.
BARS = (
    ("Update, 20 a call", "main job's block", 1.15),
    ("Update, 20 a call", "whole loss, Adam, SoftUpdate", 0.10),
    ("Update, 20 a call", "TorchRL REDQLoss eager", 0.04),
    ("Update, 20 a call, bfloat16", "Update, 20 a call", 0.72),
    ("loss alone, eager", "SACLoss alone, eager", 1.15),
    ("critic's loss alone, eager", "SACLoss alone, eager", 0.6),
)


def operations(task: Task) -> dict[str, int]:
    """The operations in the matrix products of each case, as :mod:`matmuls` counts them."""
    count = partial(matmuls.products, *task[:2])
    one, sac = flops(count(updates=1)), flops(count(updates=1, trained=2, value=2))
    block, whole = flops(count(updates=UPDATES)), UPDATES * one
    critic = UPDATES * (flops(count(updates=2)) - one)  # the difference of one and two critic updates
    return {
        **dict.fromkeys(("main job's block", "Update, 20 a call", "Update, 20 a call, bfloat16", "Update, 1 a call"), block),
        **dict.fromkeys(("whole loss, Adam, SoftUpdate", "the same, torch.compile", "loss alone, eager"), whole),
        **dict.fromkeys(("TorchRL SACLoss eager", "SACLoss alone, eager"), UPDATES * sac),
        "TorchRL REDQLoss eager": UPDATES * flops(count(updates=1, trained=10, value=10)),
        "critic's loss alone, eager": critic,
    }


def measure(blocks: dict[str, Block], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each block in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name, block in blocks.items():
            start = time.perf_counter()
            block()
            seconds[name].append(1000 * (time.perf_counter() - start))
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["hopper", "humanoid"], default="hopper", help="whose sizes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", help="only these cases")
    parser.add_argument("--json", type=Path, help="file for the raw milliseconds")
    args = parser.parse_args()
    chosen = {name: make for name, make in cases(TASKS[args.task]).items() if args.only is None or name in args.only}
    blocks = {name: make() for name, make in chosen.items()}
    measure(blocks, 3)
    found = measure(blocks, args.rounds)
    machine = platform.processor() or platform.machine()
    print(f"{args.task}, torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}")
    for name, values in found.items():
        print(f"  {name:<32}{statistics.median(values):>9.1f} ms   {min(values):>8.1f} to {max(values):.1f}")
    counted = operations(TASKS[args.task])
    for a, b, bar in BARS:
        if a in found and b in found:
            ratio = statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))
            products = counted[a] / counted[b]
            print(f"  {a} / {b}: {ratio:.3f}, at most {bar}; operations in matrix products: {products:.3f}")
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

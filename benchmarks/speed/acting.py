"""What the policy of each method costs when it plays: one observation at a time, compiled as a run compiles it, and eager.

    python benchmarks/speed/acting.py                     # Hopper-v4's sizes; --task humanoid

A block is 200 actions, drawn as in training. Blocks take turns, round by round, in one process; the ratio is the median over
rounds, over SAC's compiled policy.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import warnings
from typing import Any

import torch
from components import ACTIONS, TASKS, Block, Task, actions
from composed import measure
from tensordict import TensorDict

from omnet_torchrl import CompiledPolicy, EnsembleMLP, RedrawnMLP, UnitMaskedMLP, make_actor

SAC = "SAC, REDQ, DroQ, and relatives: dense"
PLAIN: dict[str, Any] = {"network_class": EnsembleMLP, "num_subnets": 1}
ACTORS: dict[str, dict[str, Any]] = {
    SAC: {**PLAIN, "layer_norm": False},
    "OMNet, critic only, and other rows with LayerNorm": PLAIN,
    "OMNet": {},
    "OMNet, masks over units": {"network_class": UnitMaskedMLP},
    "OMNet, masks redrawn": {"network_class": RedrawnMLP},
}
EXTRACTED = ("OMNet", "OMNet, masks over units")


def cases(task: Task) -> dict[str, Block]:
    """The blocks by name."""
    blocks, state = {}, TensorDict(observation=torch.randn(task.observation), subnet=torch.tensor(0))
    for name, options in ACTORS.items():
        actor = make_actor(*task.specs(), **options)
        compiled = CompiledPolicy(actor)
        compiled.prepare(state)
        blocks[f"{name}, compiled"] = actions(compiled, state)
        blocks[f"{name}, eager"] = actions(actor, state)
        if name in EXTRACTED:
            blocks[f"{name}, one subnetwork extracted, eager"] = actions(actor.extract(0), state)
    return blocks


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["hopper", "humanoid"], default="hopper", help="whose sizes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = cases(TASKS[args.task])
        measure(blocks, 2)
    found = measure(blocks, args.rounds)
    machine = platform.processor() or platform.machine()
    print(f"{args.task}, torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}\n")
    print("| policy | microseconds an action | actions a second | over SAC's |\n|---|---|---|---|")
    for name, values in found.items():
        each = 1000 * statistics.median(values) / ACTIONS
        ratio = statistics.median(a / b for a, b in zip(values, found[f"{SAC}, compiled"], strict=True))
        print(f"| {name} | {each:.0f} | {1e6 / each:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

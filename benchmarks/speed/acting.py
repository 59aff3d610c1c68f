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
from components import ACTIONS, TASKS, Block, Task
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


def block(policy: Any, task: Task, indexed: bool) -> Block:
    """200 actions of one environment."""
    state = TensorDict(observation=torch.randn(task.observation))
    if indexed:
        state["subnet"] = torch.tensor(0)
    if isinstance(policy, CompiledPolicy):
        policy.prepare(state)

    @torch.no_grad()
    def act() -> None:
        for _ in range(ACTIONS):
            policy(state)

    return act


def cases(task: Task) -> dict[str, Block]:
    """The blocks by name."""
    blocks = {}
    for name, options in ACTORS.items():
        actor = make_actor(*task.specs(), **options)
        blocks[f"{name}, compiled"] = block(CompiledPolicy(actor), task, True)
        blocks[f"{name}, eager"] = block(actor, task, True)
        if name.startswith("OMNet") and options is not PLAIN and "redrawn" not in name:
            blocks[f"{name}, one subnetwork extracted, eager"] = block(actor.extract(0), task, False)
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

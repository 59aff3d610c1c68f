"""What tasks cost: updates of T tasks over those of one dense network, and a step of T environments over gymnasium's own.

    python benchmarks/speed/tasks.py                      # HalfCheetah's sizes, 4 tasks, compiled: medians and ratios
    python benchmarks/speed/tasks.py --tasks 10 --rounds 30
    python benchmarks/speed/tasks.py --env Meta-World/MT10          # collecting there: pip install "omnet-torchrl[metaworld]"

A block is 20 updates of critics, actor and temperature on the same 20 batches, which T tasks share out. Blocks take
turns, round by round, in one process; a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from components import BATCH, UPDATES, Block, Task, transitions
from composed import measure
from tensordict import TensorDict
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import step_mdp

from omnet_torchrl import CompiledPolicy, OMNetSACLoss, SubnetPrimer, Update, make_actor, make_qvalue
from omnet_torchrl.envs import TasksEnv, make_task, task_names
from omnet_torchrl.layers import EnsembleMLP, SharedMLP

CHEETAH = Task(17, 6, 1.0)
BARS = {"updates": 1.15, "MT10": 8.0}


def blocks(tasks: int, size: int, **options: object) -> dict[str, Block]:
    """Updates on the same transitions: of one dense network with two critics, and of tasks, by name."""
    flat = transitions(CHEETAH, UPDATES * size).reshape(UPDATES, size)
    each = size // tasks
    rows = flat[:, : tasks * each].reshape(UPDATES, tasks, each)
    rows.set("subnet", torch.arange(tasks)[:, None].expand(UPDATES, tasks, each).contiguous())
    specs = CHEETAH.specs()
    dense = make_actor(*specs, network_class=EnsembleMLP, num_subnets=1)
    critics = make_qvalue(*specs, network_class=EnsembleMLP, num_subnets=2)
    shared = {"network_class": SharedMLP}
    losses = {
        "dense": OMNetSACLoss(dense, critics, num_trained_subnets=None),
        "pathways": OMNetSACLoss(
            make_actor(*specs, num_subnets=tasks), make_qvalue(*specs, num_subnets=2 * tasks), choose="batch"
        ),
        "shared": OMNetSACLoss(
            make_actor(*specs, num_subnets=tasks, **shared),
            make_qvalue(*specs, num_subnets=2 * tasks, num_networks=2, **shared),
            choose="batch",
        ),
    }

    def block(loss: OMNetSACLoss, batch: TensorDict) -> Block:
        update = Update(loss, **options)
        return lambda: update(batch)

    return {name: block(loss, flat if name == "dense" else rows) for name, loss in losses.items()}


def collecting(name: str) -> dict[str, Callable[[], None]]:
    """100 steps of all tasks: gymnasium's own in a loop, in a TasksEnv with its index, and with a compiled policy."""
    names = task_names(name)
    limit = {"max_episode_steps": 200} if name.startswith("Meta-World") else {}
    envs = [make_task(each, **limit) for each in names]
    env = TransformedEnv(TasksEnv(envs, names), SubnetPrimer(len(names), fixed=torch.arange(len(names))))
    actor = make_actor(env.observation_spec, env.action_spec, num_subnets=len(names))
    policy = CompiledPolicy(actor)
    policy.prepare(env.fake_tensordict())
    state = env.reset()
    action = env.action_spec.rand().numpy()

    def plain() -> None:
        for each in envs:
            each.reset()
        for _ in range(100):
            for i, each in enumerate(envs):
                each.step(action[i])

    def played(act: Callable[[TensorDict], TensorDict]) -> Callable[[], None]:
        def run() -> None:
            state = env.reset()
            for _ in range(100):
                state = step_mdp(env.step(act(state)))

        return run

    given = torch.from_numpy(action)
    assert state["subnet"].tolist() == list(range(len(names)))
    return {
        "gymnasium's loop": plain,
        "TasksEnv": played(lambda state: state.set("action", given)),
        "TasksEnv, policy": played(policy),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4, help="of the updates (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="transitions of an update, all tasks' (default: %(default)s)")
    parser.add_argument("--env", default="HalfCheetah/forward+backward+velocity_0.5+velocity_2", help="tasks to collect in")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="updates one operation after the other")
    args = parser.parse_args()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = {
            f"{name}, updates": block for name, block in blocks(args.tasks, args.batch, compile=not args.no_compile).items()
        }
        cases |= collecting(args.env)
        measure(cases, 2)
    start = time.perf_counter()
    found = measure(cases, args.rounds)
    machine = platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads, {machine}"
    print(f"{args.tasks} tasks, batch {args.batch}, {args.env}, torch {torch.__version__}, {threads}")
    for name, values in found.items():
        per = UPDATES if "updates" in name else 100
        print(
            f"  {name:<24}{statistics.median(values) / per:>9.3f} ms each   {min(values) / per:.3f} to {max(values) / per:.3f}"
        )
    for a, b, bar in (
        ("pathways, updates", "dense, updates", f"at most {BARS['updates']}"),
        ("shared, updates", "dense, updates", ""),
        ("TasksEnv", "gymnasium's loop", ""),
        ("TasksEnv, policy", "gymnasium's loop", ""),
    ):
        ratio = statistics.median(x / y for x, y in zip(found[a], found[b], strict=True))
        print(f"  {a} / {b}: {ratio:.3f} {bar}")
    print(f"  a vector step of MT10 is to take at most {BARS['MT10']} ms; {time.perf_counter() - start:.0f} s measured")


if __name__ == "__main__":
    main()

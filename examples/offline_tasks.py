"""Several tasks from recorded transitions alone: pathways in one network, beside a shared network and one with several heads.

    python examples/offline_tasks.py --updates 2_000 --sizes 1_000 10_000    # in minutes, from the datasets of a short run
    python examples/offline_tasks.py data/replay data/expert data/replay+data/expert --sizes 1_000 10_000 100_000

``python -m omnet_torchrl.training.datasets`` records datasets. TD3+BC (Fujimoto and Gu, 2021) trains each row on random
transitions of each; offline.csv has returns and, of Meta-World, success. The masks of pathways are random; the data chooses
those of pathways_data, before the first update (DAPD's single shot) or, with --follow, every 1,000 updates until then.
"""

import argparse
import csv
import itertools
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torchrl.data import ImmutableDatasetWriter, TensorDictReplayBuffer, TensorStorage

from omnet_torchrl import MaskSchedule, OMNetTD3Loss, Update, make_deterministic_actor, make_qvalue
from omnet_torchrl.layers import RunningNormalization, SharedMLP
from omnet_torchrl.training import evaluate, make_env, read_dataset
from omnet_torchrl.training.datasets import record_policy, record_replay
from omnet_torchrl.training.record.plots import save

ROWS, CELLS, SPARSITY, CALL = ("pathways", "pathways_data", "shared_tasks", "multi_head"), (256, 256), 0.5, 50  # updates a call


def main(arguments=None):
    args, records = parse(arguments), []
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = args.data or short_run(args.out)
    what = read_dataset(args.data[0].split("+")[0])[1]
    env = make_env(what["env"], num_envs=len(what["tasks"]) * args.episodes, sum_episodes=False, **what["env_options"])
    sets = {name: torch.cat([read_dataset(part, env)[0] for part in name.split("+")]) for name in args.data}
    for row in args.rows:
        learner = make(row, env, args)
        for (name, data), size in itertools.product(sets.items(), args.sizes or [None]):
            torch.manual_seed(args.seed)
            data = data[torch.randperm(len(data))[:size]]
            train(*learner, row, data, args)
            found = evaluate(learner[0], env, seed=args.seed, tasks=what["tasks"])
            for task in what["tasks"]:
                scores = round(found[f"eval/return_{task}"], 1), found.get(f"eval/success_{task}", "")
                records.append((name, row, len(data), args.seed, task, *scores))
                print(*records[-1], sep="  ", flush=True)
    with (args.out / "offline.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("data", "row", "transitions", "seed", "task", "return", "success"), *records])
    draw(records, args.out / "offline.png")


def make(row, env, args):
    """Actor, update and normalisation of a row."""
    specs, count = (env.observation_spec["observation"][0], env.action_spec[0]), len(env.base_env.tasks) // args.episodes
    normalize = RunningNormalization(specs[0].shape[-1])
    shared = [{"network_class": SharedMLP, "num_networks": n, "heads": row == "multi_head"} for n in (1, 2)]
    masked = [{"sparsity": SPARSITY, "generator": args.seed}] * 2
    kinds = [{"normalize": normalize, "num_cells": CELLS, **each} for each in (masked if "pathways" in row else shared)]
    actor = make_deterministic_actor(*specs, num_subnets=count, **kinds[0])
    qvalue = make_qvalue(*specs, num_subnets=2 * count, **kinds[1])  # 2t and 2t + 1 are task t's
    # The batch's "subnet" is the task, which trains its own subnetworks; the actor stays near the data.
    loss = OMNetTD3Loss(actor, qvalue, choose="batch", bc=2.5, value_reduction="first").make_value_estimator(gamma=0.99)
    return actor, Update(loss, lr=3e-4, policy_update_delay=2, compile=not args.no_compile), normalize


def train(actor, update, normalize, row, data, args):
    """Train anew on transitions ``(n, T)``."""
    update.reset()  # which keeps what was compiled
    normalize.count.zero_()
    normalize.update(data["observation"])
    buffer = TensorDictReplayBuffer(storage=TensorStorage(data.clone()), writer=ImmutableDatasetWriter())
    schedules = [MaskSchedule(update, density=1 - SPARSITY, end=args.follow, seed=args.seed)] if row == "pathways_data" else []
    for made in range(0, args.updates, CALL):
        batches = buffer.sample(CALL * 128).reshape(CALL, 128, -1).transpose(1, 2)  # (U, T, B)
        for masks in schedules:
            masks.step(batches, made)
        update(batches)


def short_run(out):
    """Datasets of a short run of examples/multitask.py: its replay, and episodes of its policy."""
    command = [sys.executable, Path(__file__).with_name("multitask.py"), "--config-name=quick_start_multitask", "resume=auto"]
    subprocess.run([*command, "total_frames=20_000", "eval.interval=20_000", f"folder={out / 'run'}"], check=True)
    parts = {"replay": record_replay, "policy": lambda run, folder: record_policy(run, folder, 20_000)}
    return [str(out / name if (out / name).exists() else record(out / "run", out / name)) for name, record in parts.items()]


def draw(records, path):
    """One panel for each dataset: the mean over tasks against the number of transitions."""
    figure, names = Figure(figsize=(9, 3.5), layout="constrained"), sorted({record[0] for record in records})
    score, what = (5, "return") if records[0][6] == "" else (6, "success")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for row in ROWS:
            found = [(record[2], record[score]) for record in records if record[:2] == (name, row)]
            sizes = sorted({size for size, _ in found})
            axes.plot(sizes, [fmean(value for each, value in found if each == size) for size in sizes], marker="o", label=row)
        title = "+".join(Path(part).name for part in name.split("+"))
        axes.set(title=title, xlabel="transitions of each task", ylabel=f"mean {what} of the tasks", xscale="log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(ROWS))
    save(figure, path)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="folders of datasets, a+b: of both together; none: those of a short run")
    parser.add_argument("--no-compile", action="store_true", help="make each operation by itself, to debug")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--sizes", nargs="+", type=int, help="transitions of each task; without it, all")
    parser.add_argument("--out", type=Path, default=Path("offline"), help="folder of offline.csv and offline.png")
    for name, default in {"seed": 0, "updates": 20_000, "episodes": 5, "follow": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()

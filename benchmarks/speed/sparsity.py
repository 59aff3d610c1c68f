"""What masks cost to change, and what a sparse subnetwork saves when it is deployed: FLOPs, memory, and measured time.

    python benchmarks/speed/sparsity.py            # both tables, a minute or two
    python benchmarks/speed/sparsity.py --quick    # fewer repetitions

One thread, as on a robot. FLOPs times density is what papers call the saving; the time beside it is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Unbounded

from omnet_torchrl import EnsembleMLP, MaskSchedule, OMNetSACLoss, Update, make_actor, make_qvalue
from omnet_torchrl.layers import SparseLinear

OBS, ACT, BATCH = 17, 6, 256  # HalfCheetah-v4
INTERVAL = 1_000  # updates between two changes of masks


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median of some calls, after some that are not counted."""
    for _ in range(max(2, repeats // 10)):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def kept_bytes(module: nn.Module) -> int:
    """What a module takes in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def deployed(widths: Sequence[int], repeats: int) -> list[str]:
    """An actor's network as a dense and as a sparse module, at a density of 50 and 5 %."""
    lines = [
        "| hidden units | density | batch | FLOPs | FLOPs, sparse | KiB | KiB, sparse | us | us, sparse | by FLOPs | measured |"
    ]
    lines.append("|---" * 11 + "|")
    for width in widths:
        for density in (0.5, 0.05):
            sizes = {"in_features": OBS, "out_features": 2 * ACT, "num_cells": [width, width], "activation_class": nn.ReLU}
            net = EnsembleMLP(**sizes, num_subnets=1, sparsity=0.0)
            for layer in net:
                if hasattr(layer, "masks"):
                    layer.masks.copy_(torch.rand(layer.masks.shape) < density)
            dense, sparse = net.extract(0), net.extract(0, sparse=True)
            weights = sum(layer.weight.numel() for layer in dense if isinstance(layer, nn.Linear))
            kept = sum(len(layer.values) for layer in sparse if isinstance(layer, SparseLinear))
            for batch in (1, BATCH):
                x = torch.randn(batch, OBS)
                with torch.no_grad():
                    times = [seconds(partial(module, x), repeats) for module in (dense, sparse)]
                cells = [width, f"{kept / weights:.0%}", batch, f"{2 * weights * batch:,}", f"{2 * kept * batch:,}"]
                cells += [f"{kept_bytes(module) / 1024:,.0f}" for module in (dense, sparse)]
                cells += [f"{1e6 * each:,.0f}" for each in times]
                cells += [f"{weights / kept:.1f} times less", _measured(times[0] / times[1])]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _measured(ratio: float) -> str:
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times **slower**"


def changes(width: int, repeats: int, compile: bool = True) -> list[str]:
    """Milliseconds of a change of all masks, and its share of the updates between two changes; what was compiled."""
    lines = ["| method | change, ms | update, ms | share of training | compiled before, after |", "|---" * 5 + "|"]
    specs = Unbounded(OBS), Bounded(-1, 1, (ACT,))
    network = {"network_class": EnsembleMLP, "num_cells": (width, width), "layer_norm": False, "sparsity": 0.0}
    end = torch.zeros(BATCH, 1, dtype=torch.bool)
    following = {"observation": torch.randn(BATCH, OBS), "reward": torch.randn(BATCH, 1), "done": end, "terminated": end}
    batch = {"observation": torch.randn(BATCH, OBS), "action": torch.rand(BATCH, ACT), "next": following}
    batch = TensorDict(batch, [BATCH])
    for method in ("saliency", "rigl", "set"):
        torch.manual_seed(0)
        loss = OMNetSACLoss(
            make_actor(*specs, num_subnets=1, **network),
            make_qvalue(*specs, num_subnets=2, **network),
            num_trained_subnets=None,
        )
        update = Update(loss, compile=compile)
        schedule = MaskSchedule(update, density=0.05, method=method, interval=1)
        one = seconds(lambda update=update: update(batch), repeats)
        before, frames = len(update._code), iter(range(1, 10**6))
        change = seconds(lambda schedule=schedule, frames=frames: schedule.step(batch, next(frames)), max(3, repeats // 10))
        update(batch)
        share = change / (INTERVAL * one)
        lines.append(f"| {method} | {1e3 * change:.1f} | {1e3 * one:.2f} | {share:.2%} | {before}, {len(update._code)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024], help="hidden units (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="eager updates")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    repeats = 30 if args.quick else 300
    print(f"torch {torch.__version__}, one thread. An extracted actor, dense and sparse (CSR):\n")
    print("\n".join(deployed(args.widths, repeats)))
    print(f"\nA change of all masks of SAC with two critics ({args.widths[0]} hidden units), each {INTERVAL:,} updates:\n")
    print("\n".join(changes(args.widths[0], repeats, compile=not args.no_compile)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*keep no weight")
    main()

"""Where the time of a compiled block goes, on the CPU: matrix products, the kernels in between, and calling them.

    python benchmarks/speed/profiling.py                       # OMNet at Hopper-v4's sizes; row and task are arguments

Kernels are timed by PyTorch's profiler, which makes a block slower: shares are of the profiled time.
"""

import argparse
import logging
import time

import components
import torch
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "linear", "_linear_pointwise")
BLOCKS = 20


def shares(row: str, task: str, blocks: int = BLOCKS) -> dict[str, float]:
    """Milliseconds of a block by kind of kernel; ``"calls and the rest"`` is what no kernel accounts for."""
    with config.patch({"cpp.enable_kernel_profile": True}):
        block = components.omnet_block(row, components.TASKS[task])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(blocks):
            block()
        total = time.perf_counter() - start
    found = {"matrix products": 0.0, "kernels in between": 0.0}
    for event in profiler.key_averages():
        name = event.key.rpartition("::")[2].removeprefix("aoti_torch_cpu_")
        if name.removesuffix("_out") in PRODUCTS:
            found["matrix products"] += event.self_cpu_time_total
        elif "cpp_fused" in name:
            found["kernels in between"] += event.self_cpu_time_total
    found = {name: time_us / 1e3 / blocks for name, time_us in found.items()}
    return {**found, "calls and the rest": 1e3 * total / blocks - sum(found.values())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", default="omnet", choices=components.ROWS)
    parser.add_argument("task", nargs="?", default="hopper", choices=components.TASKS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(arguments.threads)
    parts = shares(arguments.row, arguments.task)
    for name, milliseconds in parts.items():
        print(f"{name:20} {milliseconds:6.1f} ms  {milliseconds / sum(parts.values()):4.0%}")

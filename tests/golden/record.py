"""Golden traces: what the main job and the losses computed before a change of structure, to be the same after it.

    python tests/golden/record.py             # writes tests/golden/traces.json
    pytest tests/test_golden.py               # compares: losses, and eager runs of four rows
    pytest -m slow tests/test_golden.py       # compares: eager and compiled runs of every row

A trace has every value of 200 frames of the main job for each row of the results table (small networks, eager and compiled),
the tensors of its last checkpoint, and the losses and gradients of each row's loss. Floating point differs between kinds of CPU
and versions of torch: on the machine kind that recorded them, traces are compared bit for bit, elsewhere within a tolerance.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

TRACES = Path(__file__).parent / "traces.json"
EXAMPLE = Path(__file__).parents[2] / "examples" / "omnet_sac.py"
ROWS = (
    *("omnet", "omnet_critic", "omnet_infinity", "sac", "sac_20", "redq", "droq", "sr_sac", "sin_sac", "sin_droq"),
    *("sr_sin_sac", "redq_layer_norm", "sac_20_layer_norm", "sin_sac_layer_norm"),
)
# Options that change which code an update goes through, of the row omnet.
VARIANTS = {
    "unit": ["network.masks=unit"],
    "lazy": ["optim.lazy=true", "network.mask_bias=true"],
    "replacement": ["loss.replacement=true", "network.dense_output=true", "num_envs=2"],
    "dropout": ["network.dropout=0.1"],
}
OPTIONS = [
    *("env=Hopper-v4", "network.num_cells=[24,16]", "optim.batch_size=16", "total_frames=200", "init_random_frames=40"),
    *("utd_ratio=2", "policy_update_delay=3", "log_interval=20", "eval.interval=100", "eval.episodes=2"),
    *("eval.bias_episodes=1", "checkpoint.interval=100", "num_threads=1", "device=cpu", "progress=false"),
]


def machine() -> str:
    """The kind of machine that bits depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith(("model\t", "model "))), platform.machine())
    vendor = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.processor())
    return f"{vendor} model {model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def run(folder: Path, compile: bool, names: Sequence[str] = (*ROWS, *VARIANTS)) -> dict[str, dict[str, Any]]:
    """The traces of the main job of some rows and variants, rows in one process after the other."""
    common = [sys.executable, str(EXAMPLE), *OPTIONS, f"compile={str(compile).lower()}"]
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"check": True, "cwd": folder, "capture_output": True, "text": True}
    sweep = [f"algorithm={','.join(name for name in names if name in ROWS)}", f"folder={folder}/${{algorithm}}", "--multirun"]
    subprocess.run([*common, *sweep], **environment)
    for name in (name for name in names if name in VARIANTS):
        subprocess.run([*common, *VARIANTS[name], f"folder={folder}/{name}"], **environment)
    return {name: {"records": records(folder / name), "leaves": checkpoint(folder / name)} for name in names}


def records(path: Path) -> list[list[Any]]:
    """``[frames, name, value]`` of each logged value, those of the clock left out."""
    with (path / "metrics.csv").open() as file:
        rows = [(int(row["frames"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]
    return [list(row) for row in rows if not row[1].startswith("time/")]


def checkpoint(path: Path) -> dict[str, list[Any]]:
    """Hash, sum and sum of magnitudes of each tensor of the newest checkpoint."""
    manifest = json.loads(max((path / "checkpoints").glob("checkpoint_*.json")).read_text())
    files = [manifest["state"], *manifest["replay"]]
    loaded = [torch.load(path / "checkpoints" / entry["file"], weights_only=True) for entry in files]
    names = ["state", *(f"replay{number}" for number in range(len(manifest["replay"])))]
    return {name: summary(tensor) for name, tensor in leaves(dict(zip(names, loaded, strict=True)))}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The path and the tensor of each leaf that is a tensor."""
    if isinstance(tree, torch.Tensor):
        yield prefix, tree
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in pairs:
        yield from leaves(value, f"{prefix}/{key}")


def summary(tensor: torch.Tensor) -> list[Any]:
    """What a trace keeps of a tensor."""
    tensor = tensor.detach().cpu().contiguous()
    tensor = tensor + 0.0 if tensor.is_floating_point() else tensor  # a zero has no sign
    numbers = tensor.double()
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return [digest[:16], float(numbers.sum()), float(numbers.abs().sum())]


def losses() -> dict[str, dict[str, list[Any]]]:
    """Losses, outputs and gradients of the loss of each row, of fixed batches and draws."""
    from tensordict import TensorDict
    from torchrl.data import Bounded, Unbounded

    from omnet_torchrl import EnsembleMLP, MaskedMLP, OMNetSACLoss, UnitMaskedMLP, make_actor, make_qvalue

    torch.set_num_threads(1)
    specs = Unbounded((5,)), Bounded(-0.4, 1.0, (2,))
    masked = {"num_subnets": 5, "sparsity": 0.5, "generator": 0}
    dense = {"network_class": MaskedMLP, "num_subnets": 1, "sparsity": 0.0}
    every = {"num_trained_subnets": None, "num_target_subnets": None}
    separate = {"network_class": EnsembleMLP}
    cases: dict[str, tuple[dict, dict, dict]] = {
        "omnet": (masked, masked, {}),
        "omnet_min": (masked, masked, {"value_reduction": "min", "num_value_subnets": 3, "log_prob_offset": 0.3}),
        "omnet_bias": ({**masked, "mask_bias": True}, {**masked, "mask_bias": True}, {"replacement": True}),
        "unit": ({**masked, "network_class": UnitMaskedMLP}, {**masked, "network_class": UnitMaskedMLP}, {}),
        "sac": (dense, {**separate, "num_subnets": 2}, every),
        "redq": (dense, {**separate, "num_subnets": 10}, {**every, "num_target_subnets": 2}),
        "droq": (dense, {**separate, "num_subnets": 2, "dropout": 0.1}, every),
        "single": (dense, {**separate, "num_subnets": 1}, {**every, "fixed_alpha": True}),
        "smooth_l1": (masked, masked, {"loss_function": "smooth_l1", "min_alpha": 0.1, "max_alpha": 0.5}),
    }
    traces = {}
    for name, (actor_options, critic_options, options) in cases.items():
        torch.manual_seed(0)
        actor = make_actor(*specs, num_cells=(24, 16), **actor_options)
        critic = make_qvalue(*specs, num_cells=(24, 16), **critic_options)
        loss = OMNetSACLoss(actor, critic, **options)
        loss.target_qvalue_network_params.data.apply_(lambda x: x.mul_(0.9) if x.is_floating_point() else x)
        end = torch.rand(16, 1) < 0.2
        following = {"observation": torch.randn(16, 5), "reward": torch.randn(16, 1), "done": end, "terminated": end}
        batch = TensorDict({"observation": torch.randn(16, 5), "action": torch.rand(16, 2), "next": following}, [16])
        draws = loss.draw(batch, torch.Generator().manual_seed(0))
        output = loss(batch, draws=draws)
        sum(value for key, value in output.items() if key.startswith("loss_")).backward()
        gradients = {key: value.grad for key, value in loss.named_parameters() if value.grad is not None}
        found = {**{f"draws/{k}": v for k, v in draws.items()}, **dict(output.items()), "td_error": batch["td_error"]}
        traces[name] = {key: summary(value) for key, value in {**found, **gradients}.items()}
    return traces


def main() -> None:
    """Record everything."""
    with tempfile.TemporaryDirectory() as folder:
        traces = {
            "machine": machine(),
            "losses": losses(),
            "eager": run(Path(folder) / "eager", compile=False),
            "compiled": run(Path(folder) / "compiled", compile=True),
        }
    TRACES.write_text(json.dumps(traces, separators=(",", ":")).replace("},", "},\n"))


if __name__ == "__main__":
    main()

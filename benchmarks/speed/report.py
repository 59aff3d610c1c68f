"""One table and one picture of what ``run.py`` measured.

python benchmarks/speed/report.py benchmarks/speed/results/results.json   # writes them anew, beside the file
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# What is compared, the two cases, and the largest ratio that meets the bar; None: there is none.
BARS: list[tuple[str, str, str, float | None]] = [
    ("OMNet / bare torch, Hopper", "omnet hopper", "bare torch hopper", 1.20),
    ("OMNet / bare torch, Humanoid", "omnet humanoid", "bare torch humanoid", 1.20),
    ("OMNet / matmul floor, Hopper", "omnet hopper", "matmul floor hopper", 2.0),
    ("OMNet / matmul floor, Humanoid", "omnet humanoid", "matmul floor humanoid", 1.7),
    ("OMNet / SBX SAC, 2 critics", "omnet hopper", "SBX SAC hopper", 0.70),
    ("OMNet / SBX DroQ", "omnet hopper", "SBX DroQ hopper", 0.40),
    ("OMNet / SBX SAC, 10 critics", "omnet hopper", "SBX 10 critics hopper", 0.18),
    ("OMNet / TorchRL REDQLoss, 10 critics, eager", "omnet hopper", "TorchRL REDQLoss eager hopper", 0.08),
    ("OMNet / TorchRL REDQLoss, 10 critics, compiled", "omnet hopper", "TorchRL REDQLoss hopper", 0.25),
    ("critic updates, N 32 / N 2", "critic updates N=32", "critic updates N=2", 1.10),
    ("unit masks / weight masks, S 0.5, width 256", "unit hopper", "omnet hopper", 0.65),
    ("unit masks / weight masks, S 0.5, width 1024", "unit width 1024", "omnet width 1024", 0.45),
    ("unit masks, 29 % / weight masks, S 0.5, width 256", "unit 29 % hopper", "omnet hopper", None),
    ("unit masks, 29 % / weight masks, S 0.5, width 1024", "unit 29 % width 1024", "omnet width 1024", None),
    ("acting, `extract(k)` / the same dense MLP", "act extracted", "act plain", 1.05),
    ("collecting, primer outside / none, Hopper-v4", "collect primer outside", "collect primer none", 1 / 0.97),
]
GPU_BARS: list[tuple[str, str, str, float | None]] = [
    ("OMNet captured / eager, Hopper", "omnet hopper", "omnet eager hopper", 0.125),
    ("OMNet captured / eager, Humanoid", "omnet humanoid", "omnet eager humanoid", 0.125),
]
# Cases that may differ by a few per cent alternate block by block, and four times as often.
CLOSE = [(over, case) for _, case, over, limit in BARS if limit and 0.9 < limit <= 1.1]
# So do floors, turn by turn: a machine that others share changes its pace within seconds.
FLOORS = [(case, over) for _, case, over, _ in BARS if over.startswith("matmul floor")]

OTHERS = 0.05  # the share of the cores that other processes may have: barriers between threads make more of it


def write_report(results: dict[str, Any], folder: Path) -> str:
    """Write ``report.md`` and ``report.png``; the former's text."""
    times = {case: [x for turn in turns for x in turn] for case, turns in results["seconds"].items()}
    text = table(results, times)
    (folder / "report.md").write_text(text + "\n")
    draw({case: median(values) for case, values in times.items()}, results, folder / "report.png")
    return text


def table(results: dict[str, Any], times: dict[str, list[float]]) -> str:
    """Markdown: the bars, every case's median, and what it was measured on."""
    versions = ", ".join(f"{name} {value}" for name, value in (results["machine"] | results["versions"]).items())
    lines = [
        f"`{results['command']}`, {results['minutes']} minutes, {results['date']}, commit {results['commit']}; {versions}."
    ]
    quiet = results["others"] <= OTHERS
    if not quiet:
        lines += ["", f"**No result: other processes had {results['others']:.0%} of the cores meanwhile.** Run it alone."]
    lines += [
        "",
        "| time over time, within one run | ratio | 95 % interval, this process | at most | |",
        "|---|---|---|---|---|",
    ]
    for what, case, over, limit in GPU_BARS if "gpu" in results["machine"] else BARS:
        bar = "" if limit is None else f"{limit:.2f}"
        if case in times and over in times:
            paired = (case, over) in FLOORS or (over, case) in CLOSE
            best, low, high = ratio(results["seconds"][case], results["seconds"][over], paired)
            verdict = "" if limit is None else "disturbed" if not quiet else "met" if best <= limit else "not met"
            lines.append(f"| {what} | {best:.3f} | {low:.3f}, {high:.3f} | {bar} | {verdict} |")
        else:
            lines.append(f"| {what} | not measured | | {bar} | |")
    lines += ["", "| case | median ms | lowest and highest tenth | samples |", "|---|---|---|---|"]
    for case, values in times.items():
        ordered = sorted(1e3 * x for x in values)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        lines.append(f"| {case} | {median(ordered):.2f} | {low:.2f}, {high:.2f} | {len(ordered)} |")
    return "\n".join(lines)


def ratio(turns: list[list[float]], others: list[list[float]], paired: bool) -> tuple[float, float, float]:
    """One case over another, and the ends of its interval: bootstrap over turns, of this process alone.

    Of cases that took turns with each other (``paired``) the median of the ratios of neighbouring turns, whatever the machine's
    pace was by then; of others the ratio of their medians.
    """
    numbers = np.random.default_rng(0)
    a, b = (np.array([median(turn) for turn in each]) for each in (turns, others))
    if paired:
        drawn = numbers.integers(len(a), size=(1000, len(a)))
        best, spread = np.median(a / b), np.median((a / b)[drawn], 1)
    else:
        medians = [np.median(each[numbers.integers(len(each), size=(1000, len(each)))], 1) for each in (a, b)]
        best, spread = np.median(a) / np.median(b), medians[0] / medians[1]
    low, high = np.quantile(spread, (0.025, 0.975))
    return float(best), float(low), float(high)


def draw(medians: dict[str, float], results: dict[str, Any], path: Path) -> None:
    """Blocks of 20 updates, one panel per task, the shortest on top."""
    tasks = [task for task in ("hopper", "humanoid") if any(case.endswith(task) for case in medians)]
    figure = Figure(figsize=(11, 5.5), layout="constrained", dpi=120)
    for panel, task in zip(figure.subplots(1, max(1, len(tasks)), squeeze=False)[0], tasks, strict=False):
        chosen = {case.removesuffix(f" {task}"): 1e3 * x for case, x in medians.items() if case.endswith(f" {task}")}
        names = sorted(chosen, key=chosen.__getitem__, reverse=True)
        colors = ["tab:orange" if name.startswith(("omnet", "unit")) else "0.65" for name in names]
        bars = panel.barh(names, [chosen[name] for name in names], color=colors)
        panel.bar_label(bars, fmt="%.0f", padding=2, fontsize="small")
        panel.set(xscale="log", xlabel="ms for 20 updates with sampling", title=f"sizes of {task.capitalize()}-v4")
        panel.margins(x=0.12)
        panel.tick_params(axis="x", which="minor", labelbottom=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{results['machine']['cpu']}, {results['machine']['cores']} cores; medians of one run; compiled where not eager",
        fontsize="medium",
    )
    figure.savefig(path)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    print(write_report(json.loads(file.read_text()), file.parent))

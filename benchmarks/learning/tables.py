"""The tables of the report, as Markdown, and the numbers behind figures 3 and 8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from experiments import EXPERIMENTS, TASKS, Experiment, Variant
from rates import read
from records import SIZES, Record, config_of
from scores import (
    SEEDS,
    TD3,
    Interval,
    common_curve,
    denominators,
    difference,
    mean_interval,
    mean_over_tasks,
    paper_score,
    seeds_needed,
    shared_tasks,
    stratified_bootstrap,
    td3_normalised,
)

from omnet_torchrl.training.build import training_flops
from omnet_torchrl.training.options import ROWS

Runs = Mapping[str, Mapping[str, Sequence[Record]]]
BIAS = {"mean": 1, "std": 1, "normalised_mean": 2, "normalised_std": 2, "min_mean": 1, "min_std": 1}  # and digits
PROTOCOL = """Made from raw data by `{command}`.

Evaluations are deterministic episodes that cycle through the subnetworks, in an environment of their own. A score is the mean
of a run's evaluations in the last sixth of the frames (the paper's last 50K of 300K); the intervals of means are Student's 95 %
over seeds, those of interquartile means (IQM) stratified bootstraps over tasks. An interval of an IQM needs three seeds of each
task (n): drawn again from two or one, it would be far too narrow. A run that has diverged keeps its last
evaluation. Nothing that is missing is filled in.

Value bias is Q, the mean over the critic's networks, less the Monte-Carlo soft return, over the pairs that a policy visits, and
its spread their standard deviation; normalised, both are over the absolute mean return; min of two is what a target of two
random networks expects. Over the same frames as a score, means over seeds."""


def scores(variant: Variant, task: str, runs: Runs, end: int, metric: str = "eval/return") -> list[float]:
    """A score, or another metric at the end, for each run that has the frames."""
    records = runs.get(variant.name, {}).get(task, [])
    return [score for score in (record.score(end, metric) for record in records) if math.isfinite(score)]


def every_score(variants: Sequence[Variant], runs: Runs, end: int) -> dict[str, dict[str, list[float]]]:
    """Label and task to the scores of the seeds, where there are any."""
    found: dict[str, dict[str, list[float]]] = {}
    for variant in variants:
        of_row = {task: scores(variant, task, runs, end) for task in runs.get(variant.name, {})}
        of_row = {task: values for task, values in of_row.items() if values}
        if of_row:
            found[variant.label] = of_row
    return found


def returns(variants: Sequence[Variant], tasks: Sequence[str], runs: Runs, end: int) -> str:
    """Mean score and interval of each row and task, with the number of seeds and of those that diverged until then."""
    lines = [f"| score at {end:,} frames | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for variant in variants:
        cells = [_cell(scores(variant, task, runs, end), runs.get(variant.name, {}).get(task, []), end) for task in tasks]
        lines.append(f"| {variant.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], records: Sequence[Record], end: int) -> str:
    if not values:
        return "missing"
    diverged = sum(record.diverged and record.frames < end for record in records)
    seeds = f"n={len(values)}" + (f", {diverged} diverged" if diverged else "")
    return f"{interval(mean_interval(values))} ({seeds})"


def interval(estimate: Interval, digits: int = 0) -> str:
    """An estimate and its interval, as text."""
    value, low, high = (f"{number:.{digits}f}" for number in estimate)
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def aggregate(variants: Sequence[Variant], runs: Runs, end: int) -> str:
    """Over the tasks that all rows have: the paper's score with its denominators, and TD3-normalised mean and IQM."""
    found = every_score(variants, runs, end)
    tasks = [task for task in shared_tasks(found) if task in TD3]
    if not tasks:
        return "No task has a score of every row that has one: nothing is averaged."
    best = denominators(found)
    divided = ", ".join(f"{task} {best[task]:.0f}" for task in tasks)
    lines = [f"Over {', '.join(tasks)}. The paper's score is divided by the best row's mean return here: {divided}.", ""]
    lines += ["| row | n | paper's score | TD3-normalised mean | TD3-normalised IQM, 95 % |", "|---|---|---|---|---|"]
    for label, of_row in found.items():
        own = {task: of_row[task] for task in tasks}
        normalised = {task: td3_normalised(task, values) for task, values in own.items()}
        mean = np.mean([values.mean() for values in normalised.values()])
        iqm = interval(stratified_bootstrap(normalised), 2)
        seeds = ", ".join(str(len(own[task])) for task in tasks)
        lines.append(f"| {label} | {seeds} | {paper_score(own, best):.2f} | {mean:.2f} | {iqm} |")
    return "\n".join(lines)


def differences(variants: Sequence[Variant], tasks: Sequence[str], runs: Runs, end: int) -> str:
    """The first row's score less that of each other one, by task, and the seeds that would show a tenth of it."""
    first, *others = variants
    rows = []
    for variant in others:
        for task in tasks:
            own, other = (scores(each, task, runs, end) for each in (first, variant))
            if own and other:
                found = difference(own, other)
                said = interval(found)
                if not math.isnan(found.low):
                    said += ", apart from 0" if found.low > 0 or found.high < 0 else ", 0 within"
                needed = seeds_needed(own, other, np.mean(own) / 10)
                seeds = "not known" if math.isnan(needed) else f"{needed:.0f}"
                rows.append(f"| {first.label} less {variant.label} | {task} | {len(own)}, {len(other)} | {said} | {seeds} |")
    if not rows:
        return ""
    head = f"| difference of scores at {end:,} frames | task | seeds | mean, 95 % bootstrap over seeds | seeds for a tenth |"
    note = (
        f"An interval needs {SEEDS} seeds of both. Seeds for a tenth: of each row, by which a difference of a tenth of "
        f"{first.label}'s score would be seen with probability 0.8, from the spread of these few."
    )
    return "\n".join([head, "|---" * 5 + "|", *rows, "", note])


def bias(variants: Sequence[Variant], tasks: Sequence[str], runs: Runs, end: int) -> str:
    """Value bias at the end, over the same frames as a score: means over the seeds of each row and task that has a run."""
    columns = "task | n | mean | spread | normalised (spread) | min of two (spread)"
    lines = [f"| value bias at {end:,} frames | {columns} |", "|---" * 7 + "|"]
    for variant in variants:
        for task in tasks if variant.name in runs else ():
            found = {name: scores(variant, task, runs, end, f"bias/{name}") for name in BIAS}
            mean = {name: f"{np.mean(of):.{digits}f}" if (of := found[name]) else "missing" for name, digits in BIAS.items()}
            if found["mean"]:
                first = f"{len(found['mean'])} | {interval(mean_interval(found['mean']), 1)} | {mean['std']}"
                pairs = " | ".join(f"{mean[f'{of}_mean']} ({mean[f'{of}_std']})" for of in ("normalised", "min"))
                lines.append(f"| {variant.label} | {task} | {first} | {pairs} |")
            elif runs[variant.name].get(task):
                lines.append(f"| {variant.label} | {task} | missing | | | | |")
    return "\n".join(lines)


def _without_bias(experiment: Experiment, runs: Runs, end: int) -> list[str]:
    """The runs that have a score but no value bias at the end, as a line of what is missing."""
    parts = []
    for variant in experiment.variants:
        for task, records in runs.get(variant.name, {}).items():
            without = [r for r in records if math.isfinite(r.score(end)) and not math.isfinite(r.score(end, "bias/mean"))]
            if without:
                seeds = ", ".join(str(record.config.seed) for record in without)
                parts.append(f"{variant.label} on {task}, seed{'s' * (len(without) > 1)} {seeds}")
    return [f"- without bias: {'; '.join(parts)}"] if parts else []


def missing(experiment: Experiment, runs: Runs, end: int, with_bias: bool = False) -> str:
    """What the experiment still lacks at this budget and at the paper's, in words; its value bias too where it is asked for."""
    lines = _without_bias(experiment, runs, end) if with_bias else []
    for task in experiment.tasks:
        rows: dict[str, list[str]] = {}
        for variant in experiment.variants:
            records = runs.get(variant.name, {}).get(task, [])
            whole = sum(math.isfinite(record.score(end)) for record in records)
            part = [f"seed {r.config.seed} at {r.frames:,} ({r.status})" for r in records if not math.isfinite(r.score(end))]
            if whole < experiment.seeds:
                text = f"{whole} of {experiment.seeds} seeds" if whole + len(part) else "no run"
                rows.setdefault("".join([text, *(f", {each}" for each in part)]), []).append(variant.label)
        for text, labels in rows.items():
            whom = "any row" if len(labels) == len(experiment.variants) else ", ".join(labels)
            lines.append(f"- {task}: {text} of {whom}")
    said = "Every run is there." if not lines else "Missing:\n\n" + "\n".join(lines)
    paper = "" if end >= experiment.frames else f"\n\nThe paper's runs have {experiment.frames:,} frames, these {end:,}."
    return said + paper


def references(curves: Mapping[str, Mapping[str, Sequence]], tasks: Sequence[str], end: int) -> str:
    """Published returns at their last evaluation within ``end`` frames: lowest, median, highest, and at which frame."""
    lines = [f"| published, not ours | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for label, of_method in curves.items():
        cells = []
        for task in tasks:
            within = ([pair for pair in zip(*curve, strict=True) if pair[0] <= end] for curve in of_method.get(task, []))
            last = [max(pairs) for pairs in within if pairs]
            values = [value for _, value in last]
            spread = f"{min(values):.0f}, {np.median(values):.0f}, {max(values):.0f}" if values else "missing"
            cells.append(f"{spread} (n={len(values)}, at {max(frame for frame, _ in last):,})" if values else spread)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def points(variants: Sequence[Variant], runs: Runs, end: int) -> tuple[str, dict[str, tuple[float, Interval]]]:
    """Label to training FLOPs relative to REDQ (paper's convention) and the paper's score, over the tasks of all rows.

    With them, in words: the tasks, their seeds and denominators.
    """
    said, found, best = _relative(variants, runs, end)
    labels = {variant.label: variant for variant in variants}
    redq = Variant("redq", "REDQ", "redq")
    return said, {
        label: (
            float(np.mean([_flops(labels[label], task) / _flops(redq, task) for task in of_row])),
            Interval(*mean_over_tasks([np.asarray(of_row[task])[:, None] / best[task] for task in of_row])[:, 0]),
        )
        for label, of_row in found.items()
    }


def score_curves(variants: Sequence[Variant], runs: Runs, end: int) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Label to frames ``(F,)`` and the paper's score there with its interval ``(3, F)``, over the tasks of all rows (figure 9).

    Divided by what divides the scores at the end; a diverged run keeps its last evaluation. With them, the same words.
    """
    said, found, best = _relative(variants, runs, end)
    lines = {}
    for variant in (variant for variant in variants if variant.label in found):
        curves = {}
        for task in found[variant.label]:
            records = [record for record in runs[variant.name][task] if math.isfinite(record.score(end))]
            whole = [record for record in records if record.frames >= end] or records
            frames, _ = common_curve([record.curve("eval/return", end) for record in whole])
            curves[task] = frames, [np.interp(frames, *record.curve("eval/return", end)) / best[task] for record in records]
        shared = sorted(set.intersection(*(set(frames.tolist()) for frames, _ in curves.values())))
        values = [np.asarray(each)[:, np.isin(frames, shared)] for frames, each in curves.values()]
        lines[variant.label] = np.asarray(shared), mean_over_tasks(values)
    return said, lines


def _relative(variants: Sequence[Variant], runs: Runs, end: int) -> tuple[str, dict[str, dict[str, list[float]]], dict]:
    """The scores of the tasks that all rows have, and what they are divided by: in words, as scores and as numbers."""
    found = every_score(variants, runs, end)
    tasks = [task for task in shared_tasks(found) if task in SIZES]
    best, parts = denominators(found), []
    for task in tasks:
        seeds = sorted({len(of_row[task]) for of_row in found.values()})
        parts.append(f"{task} (n={' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}, divided by {best[task]:.0f})")
    barred = {all(len(of_row[task]) >= SEEDS for task in tasks) for of_row in found.values()}
    bars = "95 % bootstrap over seeds" if True in barred else "no interval: it needs three seeds of each task"
    said = f"{', '.join(parts)}; {bars}" + (", of rows with three seeds of each task" if len(barred) > 1 else "")
    return said, {label: {task: of_row[task] for task in tasks} for label, of_row in found.items() if tasks}, best


def by_option(variants: Sequence[Variant], runs: Runs, end: int, option: str, default: float) -> dict[str, dict]:
    """Algorithm to an option's value to the mean score, over the tasks that there are, with its interval over seeds."""
    lines: dict[str, dict[float, Interval]] = {}
    for variant in variants:
        values = [score for task in runs.get(variant.name, {}) for score in scores(variant, task, runs, end)]
        if values:
            at = float(dict(variant.options).get(option, default))
            lines.setdefault(ROWS[variant.algorithm].label, {})[at] = mean_interval(values)
    return lines


def best_dropout(variants: Sequence[Variant], tasks: Sequence[str], runs: Runs, end: int) -> str:
    """The dropout rate of the highest mean score for each task, beside the paper's choice (table 1)."""
    lines = [f"| best dropout rate | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for algorithm in dict.fromkeys(variant.algorithm for variant in variants):
        cells = []
        for task in tasks:
            means = {
                dict(variant.options)["network.dropout"]: float(np.mean(values))
                for variant in variants
                if variant.algorithm == algorithm and (values := scores(variant, task, runs, end))
            }
            paper = ROWS[algorithm].dropout[task]
            cells.append(f"{max(means, key=lambda rate: means[rate])} of {len(means)} (paper: {paper})" if means else "missing")
        lines.append(f"| {ROWS[algorithm].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flops(rates: Path | None) -> str:
    """Training FLOPs of one update of every row, by both counts, and the measured milliseconds of ``rates.csv``."""
    variants = dict.fromkeys(v for name in ("fig2a", "fig2b", "controls", "fig9b") for v in EXPERIMENTS[name].variants)
    lines = ["## Training FLOPs of one critic update and its share of the actor's, in millions", ""]
    lines += ["Batch 256. First the paper's convention, then exactly what PyTorch computes; in brackets, relative to REDQ.", ""]
    lines += [f"| row | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    redq = Variant("redq", "REDQ", "redq")
    for variant in variants:
        cells = []
        for task in TASKS:
            each = [(_flops(variant, task, exact), _flops(redq, task, exact)) for exact in (False, True)]
            cells.append(" / ".join(f"{own / 1e6:.0f} ({own / other:.2f})" for own, other in each))
        lines.append(f"| {variant.label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured(rates, [variant.name for variant in variants])])


def _measured(path: Path | None, names: Sequence[str]) -> str:
    if path is None:
        return "Seconds per update have not been measured here (`run.py --dry-run` measures them)."
    rows, parts = read(path), []
    for machine, threads in dict.fromkeys((row["machine"], row["threads"]) for row in rows):
        own = {(r["row"], r["task"]): r for r in rows if (r["machine"], r["threads"]) == (machine, threads)}
        what = "Frames a second in training and, in brackets, milliseconds per update, everything of a frame included"
        parts += [f"{what}: {machine}, {threads} thread(s).", ""]
        parts += [f"| row | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
        for name in dict.fromkeys([*names, *(row for row, _ in own)]):
            each = [own.get((name, task)) for task in TASKS]
            cells = [f"{1 / r['seconds']:.3g} ({1000 * r['update_seconds']:.2f})" if r else "not measured" for r in each]
            parts.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _flops(variant: Variant, task: str, exact: bool = False) -> float:
    return training_flops(config_of(variant, TASKS[0]), *SIZES[task], exact=exact)

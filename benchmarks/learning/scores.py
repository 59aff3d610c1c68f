"""What a set of returns says: pure functions on arrays.

Intervals over seeds are Student's; those of an interquartile mean over tasks come from a stratified bootstrap ("Deep
Reinforcement Learning at the Edge of the Statistical Precipice", Agarwal et al., 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

WINDOW = 1 / 6  # of a run's frames, at its end: the paper's last 50K of 300K
SEEDS = 3  # of each task, for a bootstrap
# Returns of a random policy and of TD3 after a million frames, for the normalisation that does not depend on the rows.
RANDOM = {"Hopper-v4": 18.791, "Walker2d-v4": 2.791, "Ant-v4": -70.288, "Humanoid-v4": 120.423}
TD3 = {"Hopper-v4": 3226.0, "Walker2d-v4": 3946.0, "Ant-v4": 3942.0, "Humanoid-v4": 5165.0}

Returns = Mapping[str, Mapping[str, Sequence[float]]]  # row, task: a score for each seed


class Interval(NamedTuple):
    """An estimate and its 95 % interval, which is nan where there is none."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent runs ``(seeds,)`` and Student's 95 % interval; of one run, an interval is not known."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


def final_score(frames: Sequence[int], returns: Sequence[float], total: int) -> float:
    """Mean of the evaluations in the last sixth of ``total`` frames (the paper's last 50K of 300K); nan where there is none."""
    inside = [value for frame, value in zip(frames, returns, strict=True) if total * (1 - WINDOW) < frame <= total]
    return float(np.mean(inside)) if inside else float("nan")


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of the scores, whatever their shape."""
    return float(stats.trim_mean(np.asarray(scores, dtype=float).reshape(-1), 0.25))


def stratified_bootstrap(
    scores: Mapping[str, Sequence[float]],
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    repeats: int = 2_000,
    seed: int = 0,
) -> Interval:
    """A statistic over all tasks and seeds, and its percentile interval, seeds being drawn again within each task.

    Of two seeds drawn again, half of the draws are one seed twice: that interval covers about half of what it should, and one
    seed adds none of its spread. So there is none where a task has fewer than ``SEEDS``.

    Args:
        scores (mapping): task to a score for each seed, normalised; the numbers of seeds may differ.
        statistic (callable): of all scores in one array.
        repeats (int): of the bootstrap.
        seed (int): of its draws.
    """
    arrays = [np.asarray(values, dtype=float) for values in scores.values()]
    value = statistic(np.concatenate(arrays))
    if min(len(array) for array in arrays) < SEEDS:
        return Interval(value, np.nan, np.nan)
    random = np.random.default_rng(seed)
    draws = [np.concatenate([random.choice(array, len(array)) for array in arrays]) for _ in range(repeats)]
    low, high = np.percentile([statistic(draw) for draw in draws], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def difference(first: Sequence[float], second: Sequence[float], repeats: int = 10_000, seed: int = 0) -> Interval:
    """Mean of ``first`` less that of ``second`` and its 95 % percentile interval, the seeds of each being drawn again.

    A seed of one method has nothing in common with the same seed of another but its start states, so that they are not paired.
    No interval where one has fewer than ``SEEDS``.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    value = float(one.mean() - other.mean())
    if min(len(one), len(other)) < SEEDS:
        return Interval(value, np.nan, np.nan)
    random = np.random.default_rng(seed)
    means = [each[random.integers(len(each), size=(repeats, len(each)))].mean(1) for each in (one, other)]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def seeds_needed(first: Sequence[float], second: Sequence[float], effect: float) -> float:
    """Seeds of each method by which a difference of ``effect`` is seen with probability 0.8, at the level of 5 %.

    From the spread of the seeds that there are, as normal numbers: a rough guide where they are few. nan with one seed.
    """
    if min(len(first), len(second)) < 2 or not effect:
        return float("nan")
    variance = float(np.var(first, ddof=1) + np.var(second, ddof=1))
    factor = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8))
    return max(2.0, float(np.ceil(factor**2 * variance / effect**2)))


def mean_over_tasks(curves: Sequence[np.ndarray], repeats: int = 2_000, seed: int = 0) -> np.ndarray:
    """Mean over tasks of the mean over seeds, and its percentile interval; see :func:`stratified_bootstrap`.

    Args:
        curves (sequence of array): for each task ``(seeds, F)``, normalised. Whole curves are drawn again.
        repeats, seed (int): of the bootstrap.

    Returns:
        array: ``(3, F)``: mean, low and high, which are nan where a task has fewer than ``SEEDS``.
    """
    mean = np.mean([each.mean(0) for each in curves], 0)
    if min(len(each) for each in curves) < SEEDS:
        return np.stack([mean, *np.full((2, len(mean)), np.nan)])
    random = np.random.default_rng(seed)
    draws = [each[random.integers(len(each), size=(repeats, len(each)))].mean(1) for each in curves]
    return np.stack([mean, *np.percentile(np.mean(draws, 0), [2.5, 97.5], axis=0)])


def denominators(returns: Returns) -> dict[str, float]:
    """Task to the mean return of its best row: what the paper divides by, which depends on the rows that are there."""
    tasks = dict.fromkeys(task for of_row in returns.values() for task in of_row)
    return {task: max(float(np.mean(of_row[task])) for of_row in returns.values() if task in of_row) for task in tasks}


def paper_score(returns: Mapping[str, Sequence[float]], best: Mapping[str, float]) -> float:
    """Returns over the task's denominator, mean over seeds, then over tasks."""
    return float(np.mean([np.mean(values) / best[task] for task, values in returns.items()]))


def td3_normalised(task: str, values: Sequence[float]) -> np.ndarray:
    """(return - random) / (TD3 - random): 0 is a random policy, 1 is TD3 after a million frames."""
    return (np.asarray(values, dtype=float) - RANDOM[task]) / (TD3[task] - RANDOM[task])


def shared_tasks(returns: Returns) -> list[str]:
    """The tasks that every row has: an average over others would compare different things."""
    every = [set(of_row) for of_row in returns.values()]
    return [task for task in next(iter(returns.values())) if all(task in tasks for tasks in every)] if every else []


def common_curve(curves: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """The frames ``(F,)`` at which every run has a value, and these values ``(runs, F)``."""
    shared = sorted(set.intersection(*(set(frames) for frames, _ in curves))) if curves else []
    lookups = [dict(zip(frames, values, strict=True)) for frames, values in curves]
    return np.asarray(shared, dtype=int), np.asarray([[lookup[frame] for frame in shared] for lookup in lookups], dtype=float)

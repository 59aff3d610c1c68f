"""benchmarks/learning/scores.py: the statistics of a report, against other code."""

import numpy as np
import pytest
from scipy import stats
from scores import (
    common_curve,
    denominators,
    difference,
    final_score,
    interquartile_mean,
    mean_interval,
    mean_over_tasks,
    paper_score,
    seeds_needed,
    shared_tasks,
    stratified_bootstrap,
    td3_normalised,
)


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).normal(3, 2, 7)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((values.mean(), interval.low, interval.high))
    assert mean_interval([4.0])[0] == 4
    assert np.isnan(mean_interval([4.0])[1:]).all()


def test_the_final_score_is_the_mean_of_the_last_sixth():
    frames = list(range(5_000, 300_001, 5_000))
    assert final_score(frames, frames, 300_000) == np.mean(range(255_000, 300_001, 5_000))
    assert final_score(frames, frames, 30_000) == 30_000
    assert np.isnan(final_score([5_000], [1.0], 300_000))


def test_the_interquartile_mean_leaves_out_the_outer_quarters():
    assert interquartile_mean(np.array([[-1e9, 2, 1e9, 4], [3, 1, 0, 5]])) == np.mean([1, 2, 3, 4])


def test_the_bootstrap_is_stratified_and_covers_the_truth():
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        scores = {task: random.normal(shift, 1, 12) for task, shift in (("a", 0.0), ("b", 100.0))}
        interval = stratified_bootstrap(scores, statistic=np.mean, repeats=400)
        assert interval.value == pytest.approx(np.mean([*scores["a"], *scores["b"]]))
        # Across tasks the scores differ by 100: a bootstrap that mixed them would have an interval many times as wide.
        assert interval.high - interval.low < 2
        covered += interval.low < 50 < interval.high
    assert covered >= 50
    assert stratified_bootstrap(scores, seed=1) == stratified_bootstrap(scores, seed=1)


@pytest.mark.parametrize("few", [[2.0], [2.0, 3.0]])
def test_fewer_than_three_seeds_of_a_task_have_no_bootstrap(few):
    value, *interval = stratified_bootstrap({"a": [1.0, 2.0, 4.0, 5.0], "b": few}, statistic=np.mean)
    assert value == np.mean([1.0, 2.0, 4.0, 5.0, *few])
    assert np.isnan(interval).all()
    assert np.isfinite(stratified_bootstrap({"a": [1.0, 2.0, 4.0], "b": [2.0, 3.0, 7.0]})[1:]).all()


def test_the_papers_score_is_relative_to_the_best_row_of_each_task():
    returns = {"A": {"x": [10.0, 20.0], "y": [4.0]}, "B": {"x": [30.0], "y": [1.0, 1.0], "z": [7.0]}}
    best = denominators(returns)
    assert best == {"x": 30.0, "y": 4.0, "z": 7.0}
    assert paper_score(returns["A"], best) == pytest.approx((0.5 + 1) / 2)
    assert shared_tasks(returns) == ["x", "y"]
    assert td3_normalised("Hopper-v4", [18.791, 3226.0]) == pytest.approx([0, 1])


def test_the_mean_over_tasks_redraws_whole_seeds_within_each_task():
    random = np.random.default_rng(0)
    curves = [shift + random.normal(0, 1, (12, 1)) + np.arange(5) for shift in (0, 100)]
    mean, low, high = mean_over_tasks(curves)
    assert mean == pytest.approx(np.mean([each.mean(0) for each in curves], 0))
    assert ((low < mean) & (mean < high)).all()
    assert high - low == pytest.approx(np.full(5, high[0] - low[0]))  # a seed keeps its shift all along
    of_scores = stratified_bootstrap({"a": curves[0][:, 0], "b": curves[1][:, 0]}, statistic=np.mean)
    assert (low[0], high[0]) == pytest.approx(of_scores[1:], abs=0.1)
    assert np.isnan(mean_over_tasks([curves[0], curves[1][:2]])[1:]).all()


def test_a_common_curve_has_the_frames_of_all_runs():
    frames, values = common_curve([([1, 2, 3], [5.0, 6.0, 7.0]), ([2, 3, 4], [1.0, 2.0, 3.0])])
    assert frames.tolist() == [2, 3]
    assert values.tolist() == [[6, 7], [1, 2]]
    assert len(common_curve([])[0]) == 0


def test_the_interval_of_a_difference_covers_what_it_should():
    """Of normal numbers: about 95 % of the intervals of many hold the true difference."""
    random = np.random.default_rng(0)
    inside = []
    for trial in range(200):
        one, other = random.normal(5, 1, 20), random.normal(3, 2, 20)
        value, low, high = difference(one, other, repeats=500, seed=trial)
        assert value == pytest.approx(one.mean() - other.mean())
        inside.append(low <= 2 <= high)
    assert 0.88 < np.mean(inside) < 0.99
    assert np.isnan(difference([1.0, 2.0], [3.0, 4.0, 5.0]).low)


def test_seeds_needed_are_those_of_the_usual_formula_and_give_the_power():
    random = np.random.default_rng(0)
    one, other = random.normal(0, 1, 5_000), random.normal(0, 1, 5_000)
    needed = seeds_needed(one, other, 0.5)
    assert needed == pytest.approx(2 * (1.96 + 0.84) ** 2 / 0.5**2, rel=0.05)
    trials = [
        stats.ttest_ind(random.normal(0.5, 1, int(needed)), random.normal(0, 1, int(needed))).pvalue for _ in range(1_000)
    ]
    assert np.mean(np.array(trials) < 0.05) == pytest.approx(0.8, abs=0.05)
    assert seeds_needed([1.0, 1.0], [2.0, 2.0], 1.0) == 2
    assert np.isnan(seeds_needed([1.0], [2.0, 3.0], 1.0))

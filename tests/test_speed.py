"""The benchmarks of benchmarks/speed: their reference is the update, number for number, and what they time runs."""

import json
import re
import sys
import time
from pathlib import Path

import bare
import collecting
import components
import grid
import matmuls
import profiling
import pytest
import report
import run as speed_run
import sparsity
import torch
from components import ROWS, TASKS, bare_batch, bare_update, make_update, transitions
from protocol import Worker
from test_update import actor_step, critic_step
from torchrl.objectives import REDQLoss, SACLoss

from omnet_torchrl.metrics import sac_flops

TINY = TASKS["tiny"]


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tensors(update):
    """Networks, target, temperature and moments, in one order for both kinds of updates."""
    if isinstance(update, bare.Update):
        networks = [bare.flat(layers) for layers in (update.actor, update.critic, update.target)]
        adams = [(adam.m, adam.v) for adam in (update.critic_adam, update.actor_adam)]
        log_alpha = update.log_alpha
    else:
        loss = update.loss
        params = (loss.actor_network_params, loss.qvalue_network_params, loss.target_qvalue_network_params)
        networks = [[value for value in each.values(True, True) if value.is_floating_point()] for each in params]
        moments = [update.state["optim", name, "0"] for name in ("critic", "actor")]
        adams = [[list(each[key].values(True, True)) for key in ("exp_avg", "exp_avg_sq")] for each in moments]
        log_alpha = loss.log_alpha
    groups = [*networks, *(moment for adam in adams for moment in adam), [log_alpha]]
    return [tensor.detach().reshape(-1) for group in groups for tensor in group]


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("bound", [1.0, 0.4])
def test_the_bare_torch_reference_is_the_update_number_for_number(bound):
    task = TINY._replace(bound=bound)
    update = make_update("omnet", task, width=16, compile=False)
    reference = bare_update(update, task, compile=False)
    before = [tensor.clone() for tensor in tensors(update)]
    close = {"rtol": 1e-9, "atol": 1e-12}  # float64; the order of sums is all that differs
    for i, batch in enumerate(transitions(task, 8 * 32).reshape(8, 32).unbind(0)):
        draws = update.loss.draw(batch, torch.Generator().manual_seed(i))
        plain = bare_batch(batch), dict(draws.items())
        torch.testing.assert_close(reference.critic_step(*plain), critic_step(update, batch, draws)["loss_qvalue"], **close)
        if i % 2:
            losses = actor_step(update, batch, draws)
            torch.testing.assert_close(reference.actor_step(*plain), (losses["loss_actor"], losses["loss_alpha"]), **close)
    for expected, got, first in zip(tensors(update), tensors(reference), before, strict=True):
        torch.testing.assert_close(got, expected, **close)
        assert not torch.equal(got, first)


@pytest.mark.slow
def test_the_compiled_reference_is_the_eager_one():
    updates = []
    for compile in (False, True):
        update = make_update("omnet", TINY, width=16, compile=False)
        reference = bare_update(update, TINY, compile=compile)
        for i, batch in enumerate(transitions(TINY, 4 * 32).reshape(4, 32).unbind(0)):
            draws = dict(update.loss.draw(batch, torch.Generator().manual_seed(i)).items())
            reference.critic_step(bare_batch(batch), draws)
            reference.actor_step(bare_batch(batch), draws)
        updates.append(tensors(reference))
    for eager, compiled in zip(*updates, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-5)


def test_the_matmul_floor_counts_the_products_of_a_block():
    """By hand, for a network of one unit: forward 3 layers; trained pass forward, 3 weights, 2 inputs."""
    shapes = matmuls.products(1, 1, width=1, batch=1, updates=1, trained=1, target=2, value=5)
    actor, critic = 1 + 1 + 2, 2 + 1 + 1
    update = actor + 2 * critic + (critic + critic + 1 + 1)
    delayed = (actor + actor + 1 + 2) + 5 * (critic + 1 + 1 + 1)
    assert matmuls.flops(shapes) == 2 * (update + delayed)


@pytest.mark.parametrize(("observation", "action", "least"), [(11, 3, 0.95), (376, 17, 0.85)])
def test_the_matmul_floor_counts_no_more_than_the_papers_convention(observation, action, least):
    counted = matmuls.flops(matmuls.products(observation, action))
    assert least < counted / (20 * sac_flops(observation, action)) < 1


# What is timed runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _short(monkeypatch):
    for name, value in {"UPDATES": 2, "ACTIONS": 2, "BATCH": 8, "WIDTH": 16, "STORED": 64}.items():
        monkeypatch.setattr(components, name, value)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("row", ROWS)
def test_a_block_is_its_critic_updates_and_one_actor_update(row, monkeypatch):
    updates = []

    def keep(*args, **kwargs):
        updates.append(make_update(*args, **kwargs))
        return updates[0]

    monkeypatch.setattr(components, "make_update", keep)
    block = components.omnet_block(row, TINY, width=16, batch=8, compile=False)
    steps = [updates[0].state["optim", name, "0", "steps"] for name in ("critic", "actor")]
    before = [each[0].item() for each in steps]
    block()
    assert [each[0].item() - start for each, start in zip(steps, before, strict=True)] == [2, 1]


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("loss", [SACLoss, REDQLoss])
def test_torchrls_losses_run(loss):
    components.torchrl_block(loss, TINY, width=16, compile=False)()


@pytest.mark.usefixtures("_short")
def test_the_other_blocks_run():
    components.critic_block("omnet", TINY, width=16, batch=8, compile=False)()
    components.bare_block(TINY, width=16, compile=False)()
    for kind in ("plain", "extracted", "indexed"):
        components.act_block(kind)()


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(("placement", "indexed"), [("none", False), ("outside", False), ("inside", True), ("policy", True)])
def test_collectors_draw_the_index_where_they_are_told(placement, indexed, num_envs):
    batches = collecting.Collecting("ZeroWork", placement, indexed=indexed, num_envs=num_envs, frames_per_batch=4)
    assert ("subnet" in next(batches).keys()) == (placement != "none")
    batches.end()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads what processes have computed from /proc")
def test_asynchronous_workers_stand_still_while_others_have_their_turns():
    def ticks():
        stats = [Path(f"/proc/{process.pid}/stat").read_text() for process in batches._collector.procs]
        return sum(int(number) for stat in stats for number in stat.rpartition(")")[2].split()[11:13])

    batches = collecting.Collecting("ZeroWork", "outside", collector="MultiAsync", num_envs=2, frames_per_batch=2000)
    try:
        next(batches)
        batches.rest()
        before = ticks()
        time.sleep(2.5)  # of a collector that is left alone, one worker drops its batch after a second, and makes another
        assert ticks() == before
        batches.wake()
        assert all(len(next(batches)) == 2000 for _ in range(4))
    finally:
        batches.end()


def test_the_primers_cost_is_measured_on_the_same_frames():
    blocks = [collecting.collect_block("Hopper-v4", placement, frames=30) for placement in ("none", "outside")]
    for _ in range(3):
        without, drawn = (block() for block in blocks)
        assert "subnet" in drawn.keys()
        for key in ("observation", "action", ("next", "done")):
            assert torch.equal(without[key], drawn[key]), key


def test_a_worker_builds_a_case_once_and_times_it():
    code = (
        "from protocol import serve; import time; "
        "serve({'slow': lambda: (time.sleep(0.2), lambda: time.sleep(0.01))[1]}, {'x': '1'})"
    )
    path = {"PYTHONPATH": str(components.__file__).rpartition("/")[0]}
    with Worker([sys.executable, "-c", code], path) as worker:
        assert (worker.cases, worker.versions) == (["slow"], {"x": "1"})
        assert worker.seconds("slow") >= 0.2
        assert 0.01 <= worker.seconds("slow") < 0.2


@pytest.mark.parametrize(("others", "verdicts"), [(0.01, ["met", "not met"]), (0.5, ["disturbed", "disturbed"])])
def test_the_report_judges_bars_unless_it_was_disturbed(tmp_path, others, verdicts):
    seconds = {"omnet hopper": [[1.0, 3.0], [2.0]], "bare torch hopper": [[2.0]], "matmul floor hopper": [[0.5, 0.5], [0.5]]}
    seconds["unit 29 % hopper"] = [[1.2]]
    results = {"command": "run", "minutes": 1, "date": "now", "commit": "c", "others": others, "seconds": seconds}
    results |= {"machine": {"cpu": "a cpu", "cores": "2"}, "versions": {"torch": "2"}}
    text = report.write_report(results, tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    for what, ratio, verdict in zip(("bare torch", "matmul floor"), ("1.000", "4.000"), verdicts, strict=True):
        assert f"| {ratio} | {ratio}, {ratio} |" in lines[f"OMNet / {what}, Hopper"]
        assert lines[f"OMNet / {what}, Hopper"].endswith(f"| {verdict} |")
    assert "not measured" in lines["OMNet / SBX DroQ"]
    assert lines["unit masks, 29 % / weight masks, S 0.5, width 256"].endswith("| 0.600 | 0.600, 0.600 |  |  |")
    assert (tmp_path / "report.md").read_text() == text + "\n"
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_of_cases_that_took_turns_the_machines_pace_cancels():
    pace = [1.0, 2.0, 4.0, 1.0, 3.0]
    assert report.ratio([[1.5 * x, 1.5 * x] for x in pace], [[x] for x in pace], True) == pytest.approx((1.5, 1.5, 1.5))
    best, low, high = report.ratio([[1.5 * x] for x in pace], [[2.0], [1.0], [2.0], [3.0]], False)
    assert low < best < high
    assert best == pytest.approx(1.5)


def test_close_cases_alternate_block_by_block_and_floors_turn_by_turn(monkeypatch):
    order = []

    class Fake:
        def seconds(self, case):
            order.append(case)
            return 0.1 if case.startswith("omnet") else 0.05

        def busy_s(self):
            return 0.0

    monkeypatch.setattr(speed_run, "busy_s", lambda: 0.0)
    cases = ["omnet hopper", "unit hopper", "matmul floor hopper", "act plain", "act extracted"]
    times, others = speed_run.measure(dict.fromkeys(cases, Fake()), 1, slow_s=0.3)
    assert others == 0
    assert {case: (len(turns), len(turns[0])) for case, turns in times.items()} == {
        "omnet hopper": (4, 3),
        "matmul floor hopper": (4, 6),
        "act plain": (24, 1),
        "act extracted": (24, 1),
        "unit hopper": (1, 6),
    }
    timed = order[5 * len(cases) :]
    assert timed[:4] == ["act extracted", "act plain", "act plain", "act extracted"]
    assert timed[48:58] == ["matmul floor hopper"] * 6 + ["omnet hopper"] * 4


def test_the_grids_tables_pivot_on_the_last_parameter_and_keep_the_newer_result(tmp_path):
    def result(date, *benchmarks):
        machine = {"cpu": {"brand_raw": "a cpu", "count": 2}, "python_version": "3.11"}
        return {
            "datetime": date,
            "machine_info": machine,
            "commit_info": {"id": "abcdef012", "dirty": True},
            "benchmarks": benchmarks,
        }

    def growth(row, what, value, median, name="test_growth"):
        params = {"row": row, "what": what, "value": value}
        return {
            "name": f"{name}[{row}-{what}-{value}]",
            "params": params,
            "stats": {"median": median, "min": median, "rounds": 3, "data": [median] * 3},
            "extra_info": {},
        }

    older = result("2026-01-01T00:00", growth("omnet", "width", 1024, 9.0), growth("omnet", "width", 256, 0.0352))
    newer = result("2026-01-02T00:00", growth("omnet", "width", 1024, 0.367), growth("unit", "width", 1024, 0.132))
    lines = grid.tables([older, newer]).splitlines()
    assert lines[0] == "# a cpu, 2 cores, Python 3.11"
    assert lines[2] == "Measured at 2026-01-01T00:00 (commit abcdef0+), 2026-01-02T00:00 (commit abcdef0+)."
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| what | value | omnet | unit |",
        "|---|---|---|---|",
        "| width | 256 | 35.2 |  |",
        "| width | 1024 | 367 | 132 |",
    ]
    for name, file in (("old", older), ("new", newer)):
        (tmp_path / name).write_text(json.dumps(file))
    grid.main([str(tmp_path / "new")], tmp_path)
    grid.main([str(tmp_path / "old"), str(tmp_path / "new")], tmp_path)
    assert (tmp_path / "grid.md").read_text().splitlines() == lines
    assert "data" not in (tmp_path / "grid.json").read_text()
    assert grid.main([], tmp_path).splitlines() == lines


def test_a_grid_of_two_machines_compares_within_each():
    def file(cpu, pace):
        seconds = {"none": [pace, 2 * pace, 3 * pace], "outside": [1.5 * pace, 3 * pace, 4.5 * pace]}
        record = {"name": "test_collectors[Collector-ZeroWork-4]", "extra_info": {"seconds": seconds, "frames": 200}}
        record |= {"params": {"collector": "Collector", "env": "ZeroWork", "num_envs": 4}}
        machine = {"cpu": {"brand_raw": cpu, "count": 2}, "python_version": "3.11"}
        return {
            "datetime": "2026-01-01T00:00",
            "machine_info": machine,
            "commit_info": {"id": "abcdef012", "dirty": False},
            "benchmarks": [record],
        }

    lines = grid.tables([file("fast", 0.1), file("slow", 0.2)]).splitlines()
    found = [line for line in lines if line.startswith(("# ", "| Collector"))]
    assert found == [
        "# fast, 2 cores, Python 3.11",
        "| Collector | ZeroWork | 4 | 1,000 | 667 · 1.50 [1.50, 1.50] |",
        "# slow, 2 cores, Python 3.11",
        "| Collector | ZeroWork | 4 | 500 | 333 · 1.50 [1.50, 1.50] |",
    ]


@pytest.mark.slow
def test_a_profile_tells_matrix_products_from_kernels_and_the_rest():
    parts = profiling.shares("omnet", "tiny", blocks=2)
    assert list(parts) == ["matrix products", "kernels in between", "calls and the rest"]
    assert min(parts.values()) > 0


@pytest.mark.filterwarnings("ignore:.*keep no weight")
def test_the_cost_of_masks_and_what_a_sparse_actor_saves_are_two_tables(capsys):
    sparsity.main(["--quick", "--no-compile", "--widths", "16"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    deployed, changes = ([[cell.strip() for cell in row] for row in rows if len(row) == count] for count in (11, 5))
    assert [row[1:3] for row in deployed[1:]] == [[d, b] for d in (deployed[1][1], deployed[3][1]) for b in ("1", "256")]
    assert all(re.fullmatch(r"[\d.]+ times (faster|\*\*slower\*\*)", row[-1]) for row in deployed[1:])
    assert [row[0] for row in changes[1:]] == ["saliency", "rigl", "set"]
    assert all(row[-1].split(", ")[0] == row[-1].split(", ")[1] for row in changes[1:])  # nothing is compiled again

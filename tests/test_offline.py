"""Learning from a dataset: TorchRL's IQLLoss over pathways, and examples/offline_tasks.py."""

import csv
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import OBS, make_batch, small_actor, small_qvalue
from test_tasks_run import run as train_tasks
from torch.optim import Adam
from torchrl.objectives import IQLLoss, SoftUpdate

from omnet_torchrl import MaskedMLP, SubnetQValueOperator
from omnet_torchrl.training.command_line import check_overrides
from omnet_torchrl.training.datasets import record_policy, record_replay

pytestmark = pytest.mark.filterwarnings(
    "ignore:No target network updater", "ignore:.*keep no weight", "ignore:.*units .* lose every one"
)
T, B = 3, 8
EXAMPLES = Path(__file__).parent.parent / "examples"


def state_value(num_subnets=T, sparsity=0.4):
    network = MaskedMLP(OBS, 1, num_cells=[16, 16], num_subnets=num_subnets, sparsity=sparsity, generator=3)
    return SubnetQValueOperator(network, in_keys=["observation", "subnet"], out_keys=["state_value"])


def rows(*lead, seed=0):
    """Transitions (T, B), a task in each row; IQL asks for the value of the next observation too."""
    batch = make_batch(*lead, T, B, seed=seed, done=0.2)
    task = torch.arange(T)[:, None].expand(batch.shape)
    return batch.set("subnet", task).set(("next", "subnet"), task)


def iql(num_subnets=T, sparsity=0.4, **kwargs):
    """Two critics, each of its own weights, under the same mask for each task."""
    networks = small_actor(num_subnets, sparsity), small_qvalue(num_subnets, sparsity), state_value(num_subnets, sparsity)
    loss = IQLLoss(*networks, temperature=3.0, expectile=0.7, **kwargs)
    loss.make_value_estimator(gamma=0.9)
    return loss, SoftUpdate(loss, tau=0.1)


def masked_weights(loss):
    """Weights, detached, and the masks of each layer with masks, in all networks."""
    found = {}
    for group in ("actor_network_params", "qvalue_network_params", "value_network_params"):
        params = getattr(loss, group)
        for key in params.keys(True, True):
            if isinstance(key, tuple) and key[-1] == "masks":
                weight = params.get((*key[:-1], "weight"))
                found[(group, *key)] = weight.detach().clone(), params.get(key)
    return found


def trained(loss, updater, batches):
    optim = Adam([param for param in loss.parameters() if param.requires_grad], lr=1e-2)
    for batch in batches:
        output = loss(batch)
        optim.zero_grad()
        sum(output[name] for name in ("loss_actor", "loss_qvalue", "loss_value")).backward()
        optim.step()
        updater.step()
    return output


@pytest.mark.parametrize("task", range(T))
def test_iql_of_a_task_changes_no_weight_outside_its_masks(task):
    loss, updater = iql()
    before = masked_weights(loss)
    assert len(before) == 9
    trained(loss, updater, [rows(seed=i)[task : task + 1] for i in range(3)])
    for key, (weight, masks) in masked_weights(loss).items():
        changed = weight != before[key][0]
        assert changed.any(), key
        own = masks.select(-3, task)  # (N, out, in), or (2, N, out, in) of two critics
        assert not (changed & ~own).any(), key


@pytest.mark.parametrize("task", range(T))
def test_iql_of_a_task_is_that_of_its_subnetworks_taken_out(task):
    networks = small_actor(), small_qvalue(), state_value()
    options = {"temperature": 3.0, "expectile": 0.7, "num_qvalue_nets": 1}
    plain = IQLLoss(*(network.extract(task) for network in networks), **options)
    together, batch = IQLLoss(*networks, **options), rows()[task]
    outputs = [loss.make_value_estimator(gamma=0.9) or loss(batch.clone()) for loss in (plain, together)]
    for name in ("loss_actor", "loss_qvalue", "loss_value", "entropy"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name])


def test_iql_learns_the_action_of_each_task_that_is_rewarded():
    """A task's reward falls with the distance to an action of its own; the best of the data's random actions are copied."""
    best = torch.tensor([-0.5, 0.0, 0.5])[:, None, None]
    loss, updater = iql()

    def batches():
        for i in range(250):
            batch = rows(seed=i)
            batch["observation"].fill_(1.0)
            batch["next", "reward"] = -10 * (batch["action"] - best).square().sum(-1, keepdim=True)
            batch["next", "done"].fill_(True)
            batch["next", "terminated"].fill_(True)
            yield batch

    trained(loss, updater, batches())
    with loss.actor_network_params.to_module(loss.actor_network):
        dist = loss.actor_network.get_dist(rows()[:, :1].set("observation", torch.ones(T, 1, OBS)))
    assert (dist.deterministic_sample.mean(-1) - best.squeeze(-1)).abs().max() < 0.3


def test_iql_without_the_next_index_is_said():
    loss, _ = iql()
    with pytest.raises(KeyError, match="has no 'subnet', the index of the subnetwork"):
        loss(rows().exclude(("next", "subnet")))


# The example ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("offline_tasks", EXAMPLES / "offline_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CELLS", (8, 8))
    monkeypatch.setattr(module, "CALL", 5)
    return module


def test_the_example_trains_each_row_on_each_dataset_and_size(example, tmp_path, figures):
    train_tasks(tmp_path / "run")
    paths = [str(record_replay(tmp_path / "run", tmp_path / "a")), str(record_policy(tmp_path / "run", tmp_path / "b", 40))]
    data = [*paths, "+".join(paths)]
    options = ["--sizes", "10", "30", "--updates", "10", "--episodes", "1", "--no-compile", "--out", str(tmp_path / "out")]
    example.main([*data, *options])
    with (tmp_path / "out" / "offline.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {(line["data"], line["row"], line["transitions"], line["task"]) for line in lines}
    tasks = ("HalfCheetah/forward", "HalfCheetah/backward")
    sizes = {data[0]: ("10", "30"), data[1]: ("10", "20"), data[2]: ("10", "30")}  # of b there are 20
    assert found == {(name, row, size, task) for name in data for size in sizes[name] for row in example.ROWS for task in tasks}
    assert len(figures[-1].axes) == 3
    assert (tmp_path / "out" / "offline.png").exists()
    assert len({line["return"] for line in lines}) > len(lines) / 2
    assert {line["success"] for line in lines} == {""}, "HalfCheetah's tasks are never solved"
    example.main([data[0], *options, "--rows", "pathways_data"])
    again = [line for line in lines if (line["data"], line["row"]) == (data[0], "pathways_data")]
    with (tmp_path / "out" / "offline.csv").open() as file:
        assert list(csv.DictReader(file)) == again, "a row learns the same by itself"


def test_the_example_records_the_datasets_of_a_short_run_where_none_is_named(example, tmp_path, monkeypatch):
    def started(command, check):
        assert command[1] == EXAMPLES / "multitask.py"
        train_tasks(tmp_path / "out" / "run")

    monkeypatch.setattr(example, "subprocess", SimpleNamespace(run=started))
    monkeypatch.setattr(example, "record_policy", lambda run, folder, frames: record_policy(run, folder, 40))
    options = ["--updates", "5", "--episodes", "1", "--no-compile", "--rows", "pathways", "--out", str(tmp_path / "out")]
    example.main(options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run", "replay", "policy", "offline.csv", "offline.png"}


def test_the_example_is_short():
    assert len((EXAMPLES / "offline_tasks.py").read_text().splitlines()) < 120


# The benchmark -------------------------------------------------------------------------------------------------------------


def test_the_cells_of_the_benchmark_are_commands_that_exist(example, tmp_path, capsys):
    import offline

    steps = offline.commands(tmp_path)
    scripts = [Path(command[1]) for _, command in steps if command[1] != "-m"]
    assert all(path.exists() for path in scripts)
    for _, (_, script, *options) in steps:
        if script.endswith("multitask.py"):
            check_overrides([option for option in options if not option.startswith(("folder=", "resume="))])
        elif script.endswith("offline_tasks.py"):
            args = example.parse(options)
            assert {Path(part).parent for name in args.data for part in name.split("+")} == {tmp_path / "data"}
            assert tuple(args.sizes) == offline.SIZES
    assert len(steps) == len(offline.RUNS) + len(offline.DATASETS) + offline.SEEDS
    assert {name for mix in offline.MIXES for name in mix} <= set(offline.DATASETS)
    steps[0][0].parent.mkdir(parents=True)
    for status, missing in {"interrupted": len(steps), "diverged": len(steps), "finished": len(steps) - 1}.items():
        steps[0][0].write_text(json.dumps({"status": status}))
        offline.main(["--folder", str(tmp_path), "--commands"])
        assert capsys.readouterr().out.count("\n") == missing, "what is there is not made again"


@pytest.mark.parametrize(
    ("successes", "expected"), [(None, "25 ± 10"), ([("0.0", "0.4"), ("0.2", "0.6"), ("0.4", "0.8")], "0.40 ± 0.20")]
)
def test_the_benchmarks_table_is_over_seeds(successes, expected, tmp_path):
    import offline

    for seed, values in enumerate([(10, 20), (20, 30), (30, 40)]):
        (tmp_path / f"seed{seed}").mkdir()
        scores = zip(values, successes[seed] if successes else ("", ""), strict=True)
        lines = [f"x/medium+y/expert,pathways,1000,{seed},{task},{value},{each}\n" for task, (value, each) in enumerate(scores)]
        header = "data,row,transitions,seed,task,return,success\n"
        (tmp_path / f"seed{seed}" / "offline.csv").write_text(header + "".join(lines))
    assert offline.table(tmp_path).splitlines()[2:] == [f"| medium+expert | pathways | 1,000 | {expected} | 3 |"]


def test_the_example_draws_success_where_the_tasks_have_it(example, tmp_path, figures):
    records = [("a", row, size, 0, task, 5.0, 0.5) for row in example.ROWS for size in (10, 20) for task in "xy"]
    example.draw(records, tmp_path / "offline.png")
    (axes,) = figures[-1].axes
    assert axes.get_ylabel() == "mean success of the tasks"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.5]] * len(example.ROWS)
    example.draw([(*record[:6], "") for record in records], tmp_path / "offline.png")
    assert figures[-1].axes[0].get_ylabel() == "mean return of the tasks"

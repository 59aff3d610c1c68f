"""The component scripts of examples/ run as a user runs them, and a DQN script of TorchRL's with OMNet in its place."""

import re
import runpy
from pathlib import Path

import pytest
from test_readme import DQN_DIFF, patched

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = (
    "--frames 60 --no-compile --num-cells 16 16 --num-subnets 3 --sparsity 0.3 --eval-interval 30 --episodes 2 --batch-size 8"
)
SCRIPTS = {
    "td3_script.py": "--init-random-frames 30 --utd-ratio 2 --policy-update-delay 2",
    "dqn_script.py": "--learning-starts 30 --target-update-interval 5",
}
NUM_LINES = 120


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_short_run_trains_and_evaluates(script, capsys):
    main = runpy.run_path(str(EXAMPLES / script))["main"]
    scores = [main([*SMALL.split(), *SCRIPTS[script].split()]) for _ in range(2)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "return" in line]
    assert [re.match(r" +(\d+) frames .*return +[\d.]+$", line)[1] for line in lines] == ["30", "60"] * 2
    assert scores[0] == scores[1] > 0  # a run of the same seed repeats itself
    assert len((EXAMPLES / script).read_text().splitlines()) < NUM_LINES


@pytest.mark.parametrize("options", ["--target-reduction mean --single", "--target-reduction subnet"])
def test_relatives_of_dqn_are_options(options):
    main = runpy.run_path(str(EXAMPLES / "dqn_script.py"))["main"]
    assert main([*SMALL.split(), *SCRIPTS["dqn_script.py"].split(), *options.split()]) > 0


BEFORE = """
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, InitTracker, TransformedEnv
from torchrl.modules import MLP, EGreedyModule, QValueActor
from torchrl.objectives import DQNLoss, HardUpdate

env = TransformedEnv(GymEnv("CartPole-v1"), InitTracker())
actor = QValueActor(MLP(4, 2, num_cells=[128, 128]), in_keys=["observation"], spec=env.action_spec)
explore = EGreedyModule(env.action_spec, eps_init=1.0, eps_end=0.05, annealing_num_steps=5_000)

loss = DQNLoss(actor, double_dqn=True)
target_updater = HardUpdate(loss, value_network_update_interval=100)
optim = torch.optim.Adam(loss.parameters(), lr=1e-3)
collector = Collector(env, TensorDictSequential(actor, explore), frames_per_batch=10, total_frames=200)
buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10_000), batch_size=32)

for data in collector:
    explore.step(data.numel())
    buffer.extend(data)
    losses = loss(buffer.sample())
    optim.zero_grad()
    losses["loss"].backward()
    optim.step()
    target_updater.step()
"""


@pytest.mark.parametrize("diff", ["", DQN_DIFF], ids=["TorchRL's", "with OMNet"])
def test_a_dqn_script_takes_omnet_in_few_lines(diff, tmp_path):
    assert diff.count("\n+") <= 15
    script = tmp_path / "script.py"
    script.write_text(patched(BEFORE, diff).replace("tau=1.0,", "tau=1.0, compile=False,"))
    ran = runpy.run_path(str(script))
    assert ran["losses"]["loss"].isfinite()
    assert ran["buffer"][:]["subnet"].unique().numel() > 1 if diff else "subnet" not in ran["buffer"][:].keys()

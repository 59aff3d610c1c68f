"""The component scripts of examples/ run as a user runs them."""

import re
import runpy
from pathlib import Path

import pytest

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

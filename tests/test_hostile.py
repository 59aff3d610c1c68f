"""Hostile files and kills, in small; and that hostile.py sees what it looks for."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def hostile(*options):
    command = [sys.executable, str(Path(__file__).parent / "hostile.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, run.stdout + run.stderr


def test_no_damage_and_no_kill_makes_a_difference_in_silence():
    code, text = hostile("--seed", "0", "--damages", "100", "--kills", "6")
    assert code == 0, text
    assert "0 silent, 0 tracebacks, 0 hangs, 0 executed" in text


@pytest.mark.parametrize(
    ("hash_", "kind"),
    [("metrics", "metrics.csv"), ("config", "config.yaml"), ("run", "run.json"), ("state", "state"), ("segment", "segment")],
)
def test_a_hash_that_is_left_out_is_missed(hash_, kind):
    code, text = hostile("--damages", "60", "--kills", "0", "--only", kind, "--without-hash", hash_)
    assert code == 1, text
    assert " 0 silent" not in text

"""The README's scripts run as printed."""

import re
import runpy
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMPOSED, BEFORE = (text for language, text in BLOCKS if language == "python")
(DIFF,) = (text for language, text in BLOCKS if language == "diff")


def patched(text, diff):
    """Replace each run of removed lines, wherever it stands, by the added lines that follow it."""
    hunks = re.findall(r"((?:^-.*\n)*)((?:^\+.*\n)+)", diff, re.MULTILINE)
    for removed, added in hunks:
        old, new = (re.sub(r"^[-+]", "", lines, flags=re.MULTILINE) for lines in (removed, added))
        assert text.count(old) == 1, f"not in the script: {old}"
        text = text.replace(old, new)
    return text


def run(text, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(text)
    return runpy.run_path(str(script))


def test_first_two_blocks_are_commands():
    assert [language for language, _ in BLOCKS[:2]] == ["bash", "bash"]
    assert "examples/omnet_sac.py" in BLOCKS[0][1]
    assert "tox" in BLOCKS[1][1]


def test_composed_script_is_short_and_runs(tmp_path):
    assert len([line for line in COMPOSED.splitlines() if line.strip()]) <= 26
    names = run(COMPOSED, tmp_path)
    assert all(value.isfinite() for value in names["losses"].values())
    assert set(names["buffer"][:]["subnet"].tolist()) <= set(range(5))


@pytest.mark.parametrize("after", [False, True])
def test_sac_script_runs_before_and_after_the_change(after, tmp_path):
    names = run(patched(BEFORE, DIFF) if after else BEFORE, tmp_path)
    assert type(names["loss"]).__name__ == ("OMNetSACLoss" if after else "SACLoss")
    assert all(torch.isfinite(value) for value in names["losses"].values())
    assert ("subnet" in names["buffer"][:].keys()) == after


def test_the_change_is_at_most_twenty_lines():
    assert len(DIFF.splitlines()) <= 20

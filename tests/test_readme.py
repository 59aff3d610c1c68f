"""The README's scripts run as printed."""

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

from omnet_torchrl import Update
from omnet_torchrl.training.command_line import check_overrides

ROOT = Path(__file__).parent.parent


def blocks(path):
    """The language and the text of each code block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


README, BLOCKS = (ROOT / "README.md").read_text(), blocks("README.md")
COMPOSED, LOADED = (text for language, text in BLOCKS if language == "python")
BEFORE = blocks("docs/guides/compose.md")[-1][1]
(DIFF,) = (text for language, text in BLOCKS if language == "diff")
(DQN_DIFF,) = (text for language, text in blocks("docs/guides/td3_dqn.md") if language == "diff")


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
    assert "examples/omnet_sac.py --config-name quick_start" in BLOCKS[0][1]
    assert "tox" in BLOCKS[1][1]


def test_every_option_of_the_commands_exists():
    commands = "".join(text for language, text in BLOCKS[2:] if language == "bash")
    lines = [shlex.split(line, comments=True) for line in commands.splitlines()]
    arguments = [words[2:] for words in lines if words[1] == "examples/omnet_sac.py"]
    assert len(arguments) >= 6
    for words in arguments:
        check_overrides(words)


def test_the_pictures_and_files_it_names_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)|`((?:src|examples|benchmarks)/[\w./]+)`", README):
        assert (ROOT / "".join(path)).exists(), path


def test_the_links_into_a_page_name_a_heading_of_it():
    for path, heading in re.findall(r"\]\(([\w./]+)#([\w-]+)\)", README):
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings], path


def test_composed_script_is_short_and_runs(tmp_path):
    assert len([line for line in COMPOSED.splitlines() if line.strip()]) <= 26
    names = run(COMPOSED, tmp_path)
    assert all(value.isfinite() for value in names["metrics"].values())
    assert names["update"].updates == 2_020
    assert set(names["buffer"][:]["subnet"].tolist()) <= set(range(5))


@pytest.mark.parametrize(
    ("after", "compiled"), [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_sac_script_runs_before_and_after_the_change(after, compiled, tmp_path, monkeypatch):
    monkeypatch.setitem(inspect.unwrap(Update.__init__).__kwdefaults__, "compile", compiled)
    names = run(patched(BEFORE, DIFF) if after else BEFORE, tmp_path)
    assert type(names["loss"]).__name__ == ("OMNetSACLoss" if after else "SACLoss")
    assert all(torch.isfinite(value) for value in names["losses"].values())
    assert ("subnet" in names["buffer"][:].keys()) == after


def test_the_change_makes_the_script_shorter_by_at_most_eight_new_lines():
    added = [line for line in DIFF.splitlines() if line.startswith("+")]
    assert len(added) <= 8
    assert len(DIFF.splitlines()) > 2 * len(added)

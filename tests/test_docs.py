"""The site: its code runs, its commands exist, what it names is there, and the reference is complete."""

import ast
import importlib.util
import inspect
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from conftest import make_batch, run_script, small_actor, small_deterministic_actor, small_qvalue, small_qvalue_actor

import omnet_torchrl
from omnet_torchrl import CompiledPolicy, OMNetDQNLoss, OMNetSACLoss, OMNetTD3Loss, Update
from omnet_torchrl.training.command_line import check_overrides
from omnet_torchrl.training.options import ROWS
from omnet_torchrl.training.options.checks import OPTIONS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "extensions"))
sys.path.append(str(DOCS / "pictures"))


class Block(NamedTuple):
    """A code block of a page: its line, language, the name of the file that it is, what a test should know, and its text."""

    line: int
    language: str
    caption: str | None
    note: str | None
    text: str


FENCE = re.compile(
    r"(?:^% test: (?P<note>[^\n]*)\n\s*)?"
    r"^```(?:\{code-block\} )?(?P<language>\w+)\n(?::caption: (?P<caption>\S+)\n)?(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page):
    text = (DOCS / page).read_text()
    parts = ("language", "caption", "note", "text")
    return [Block(text[: found.start("text")].count("\n"), *map(found.group, parts)) for found in FENCE.finditer(text)]


FILES = [path for folder in (".", "guides", "development") for path in sorted((DOCS / folder).glob("*.md"))]
PAGES = {str(path.relative_to(DOCS)): blocks(path) for path in FILES}
PYTHON = [page for page, found in PAGES.items() if any(block.language == "python" and not block.caption for block in found)]
JOBS = ("examples/omnet_sac.py", "examples/omnet_td3.py", "examples/minatar_dqn.py")
SMALL = dict(
    option.split("=")
    for option in (
        *("network.num_cells=[16,16]", "compile=false", "progress=false", "total_frames=64", "init_random_frames=32"),
        *("optim.batch_size=8", "utd_ratio=1", "policy_update_delay=1", "eval.interval=64", "eval.episodes=2"),
    )
)
TINY_SCRIPT = [
    *("--frames", "60", "--no-compile", "--num-cells", "16", "16", "--sparsity", "0.3"),
    *("--eval-interval", "30", "--episodes", "2", "--batch-size", "8"),
]


def commands(page):
    """The lines of a page's commands, as words."""
    lines = "".join(block.text for block in PAGES[page] if block.language == "bash").replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def shortened(words):
    """The arguments of a job, with those of a tiny one that it does not have; a resumed one keeps its own."""
    own = {word.split("=")[0] for word in words}
    if "resume" in own and "resume=auto" not in words:
        return words
    return [*words, *(f"{name}={value}" for name, value in SMALL.items() if name not in own)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, whose modules can be imported, like a user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and tmp_path in Path(sys.modules[name].__file__ or "/").parents:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.onnx")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, compiled, here, monkeypatch):
    for kind in (Update, CompiledPolicy):
        monkeypatch.setitem(inspect.unwrap(kind.__init__).__kwdefaults__, "compile", compiled)
    names = {"__name__": "__main__"}
    for block in PAGES[page]:
        if block.caption:
            (here / block.caption).write_text(block.text)
        elif block.note == "first":
            for line in block.text.splitlines():
                code, printed = run_script(*shortened(shlex.split(line)[2:]))
                assert code == 0, printed
        elif block.language == "python":
            package = (block.note or "").removeprefix("needs ")
            if package and not importlib.util.find_spec(package):
                continue
            exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)


def test_every_note_to_the_tests_is_one_that_they_know():
    notes = {block.note for found in PAGES.values() for block in found if block.note}
    assert notes == {"first", "needs onnxscript"}


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_every_command_is_one_that_exists(page, words):
    program, *arguments = words
    if program == "python" and arguments[0] in JOBS:
        check_overrides(arguments[1:])
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    elif program == "pip":
        extras = re.findall(r"\[(.*?)\]", " ".join(arguments))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert arguments[0] == "install"
        assert set(extras) <= set(known)
        assert all((ROOT / name).exists() for name in arguments if name.endswith(".txt"))
    else:
        assert program == "python", f"a command of {page} that no test knows: {words}"
        assert (ROOT / arguments[0]).exists()


def needed(words, folder):
    """What a command needs that is not installed."""
    text = " ".join(words)
    config = (folder / "cluster.yaml").exists() and "cluster" in words
    wanted = {"shimmy": "shimmy", "metaworld:": "metaworld", "minatar_dqn": "minatar", "launcher=joblib": "joblib"}
    names = [name for word, name in wanted.items() if word in text] + ["submitit"] * config
    return [name for name in names if not importlib.util.find_spec(name)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", [page for page in PAGES if any(words[0] == "python" for words in commands(page))])
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path):
    """As tiny jobs, in processes of their own."""
    for block in PAGES[page]:
        if block.caption:
            lines = [line for line in block.text.splitlines(True) if "max_num_timeout" not in line]  # Slurm's alone
            (tmp_path / block.caption).write_text("".join(lines).replace("submitit_slurm ", "submitit_local "))
    for program, *arguments in commands(page):
        if program != "python" or needed(arguments, tmp_path):
            continue
        script, *rest = arguments
        if script in JOBS:
            rest = [re.sub(r"range\(\d+\)", "range(2)", word) for word in shortened(rest)]
        elif script.endswith("_script.py"):
            rest += TINY_SCRIPT
        elif "benchmarks" in script and not {"--dry-run", "--commands"} & set(rest):
            rest += ["--dry-run", "--no-measure"]
        elif "hostile" in script:
            continue  # tests/test_hostile.py
        command = [sys.executable, *([script] if script == "-m" else [ROOT / script]), *rest]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def test_the_schedulers_script_starts_a_job_again_until_it_is_done(tmp_path):
    (script,) = (block.text for block in PAGES["guides/sweeps.md"] if block.caption == "job.sh")
    (tmp_path / "job.sh").write_text(f"#!/bin/sh\n{script}")
    (tmp_path / "job.sh").chmod(0o755)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> calls\n[ $(wc -l < calls) -lt 3 ] && exit 75\nexit 0\n')
    (tmp_path / "python").chmod(0o755)
    subprocess.run([tmp_path / "job.sh"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3
    check_overrides(shlex.split(calls[0])[1:])


# What is named is there.

TEXTS = {path: path.read_text() for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"), ROOT / "CONTRIBUTING.md"]}


def test_every_test_that_holds_a_statement_exists():
    named = {found for text in TEXTS.values() for found in re.findall(r"`(tests/\w+\.py)::(\w+)`", text)}
    assert len(named) > 50
    for file, name in sorted(named):
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


@pytest.mark.parametrize("page", ["guides/environments.md", "guides/resume.md"])
def test_every_row_of_a_promise_names_its_test(page):
    tables = re.findall(r"^\|.*\btest \|\n\|[-|]+\n((?:\|.*\n)+)", (DOCS / page).read_text(), re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) >= 20
    assert [row for row in rows if "`tests/test_" not in row] == []


def test_every_file_that_a_page_names_exists():
    places = (ROOT, ROOT / "src" / "omnet_torchrl", ROOT / "docs")
    pattern = r"`((?:src|examples|benchmarks|tests|training|layers|updates|objectives|envs|docs|record)/[\w./-]+\.\w+)`"
    for path, text in TEXTS.items():
        if "add_" in path.name:  # which names files to be written
            continue
        for name in re.findall(pattern, text):
            assert any((place / name).exists() for place in (*places, places[1] / "training")), f"{path.name}: {name}"


def test_no_page_has_a_path_of_one_machine():
    for path, text in TEXTS.items():
        assert not re.search(r"/(work|home|root|tmp)/", text), path


# The reference is complete.


def test_every_public_name_has_an_entry():
    """``tox -e docs`` asks the built site the same."""
    from public_names import public_names

    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.rst"))
    entries = set(re.findall(r"^\.\. (?:autofunction|autoclass|py:data):: ([\w.]+)", pages, re.MULTILINE))
    assert public_names() - entries == set()
    assert entries - public_names() == set()


def test_every_name_that_a_docstring_points_to_has_an_entry():
    from public_names import public_names

    known = public_names()
    for entry in sorted(known):
        value = pydoc.locate(entry)
        members = vars(value).values() if inspect.isclass(value) else ()
        text = "\n".join(inspect.getdoc(each) or "" for each in (value, *members))
        for name in re.findall(r":(?:class|func|meth|attr):`~?(omnet_torchrl[\w.]*)`", text):
            assert name in known or name.rpartition(".")[0] in known, f"{entry}: {name}"


def test_every_option_has_type_default_and_meaning():
    from from_sources import groups, options_markdown

    found = {option.name: option for _, _, group in groups() for option in group}
    groups_of_options = {name.split(".")[0] for name in OPTIONS if "." in name}
    assert set(found) == set(OPTIONS) - groups_of_options
    assert all(option.meaning and option.kind and option.default for option in found.values())
    assert "| `optim.lr` | `float` | `0.0003` | learning rate of critic, actor and temperature |" in options_markdown()


def test_every_row_has_its_equation_differences_and_command():
    from from_sources import SCRIPTS, notes, rows_markdown

    assert set(notes()) == set(ROWS), "docs/reference/rows.yaml has what a person wrote of each row"
    assert all(note["equation"].strip() and note["differences"].strip() for note in notes().values())
    for loss in {row.loss for row in ROWS.values()}:
        text = rows_markdown(loss)
        for name in (name for name, row in ROWS.items() if row.loss == loss):
            assert f"`python {SCRIPTS[loss]} algorithm={name}`" in text
            check_overrides([f"algorithm={name}"])


def logged():
    """Names of all that a run logs: those that the sources write, and those of the updates."""
    names = set()
    for path in (ROOT / "src").rglob("*.py"):
        for found in re.findall(r'f?"((?:train|eval|bias|subnets|masks|collect|time)/[\w{}]+)"', path.read_text()):
            names.add(re.sub(r"\{\w+\}", "*", found))
    batch, discrete = make_batch(8), make_batch(8)
    discrete["action"] = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.int64), 3)
    losses = [
        (OMNetSACLoss(small_actor(), small_qvalue()), batch),
        (OMNetTD3Loss(small_deterministic_actor(), small_qvalue()), batch),
        (OMNetDQNLoss(small_qvalue_actor()), discrete),
    ]
    for loss, each in losses:
        names |= {f"train/{name}" for name in Update(loss, compile=False)(each).keys()}
    return names


def test_every_logged_metric_is_listed_with_its_formula():
    text = (DOCS / "reference" / "metrics.md").read_text()
    listed = set(re.findall(r"`((?:train|eval|bias|subnets|masks|collect|time)/\w+)`", text))
    # By the sources, of several names: those of rates, of subnetworks, of tasks, and of layers.
    made = {"train/*", "train/**", "time/*_per_second", "eval/return_", "eval/return_subnet_", "eval/success_*", "masks/*"}
    assert made <= logged()
    several = {"time/frames_per_second", "time/updates_per_second", "eval/return_subnet_k", "train/episode_length"}
    assert (logged() - made) | several == listed


def test_the_drawn_picture_is_that_of_its_script():
    from draw import idea

    assert idea() == (DOCS / "pictures" / "idea.svg").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo"))), reason="needs the extra docs")
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-b", "html", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


# The habits of a public project.


def environments():
    """The environments of tox, those with braces expanded."""
    sections = re.findall(r"^\[testenv:(.*?)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    return {name for section in sections for name in section.strip("{}").split(",")}


def test_workflows_parse_and_call_only_environments_that_exist():
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert files
    called = set()
    for path in files:
        content = yaml.safe_load(path.read_text())
        assert {"name", True, "jobs"} <= content.keys()  # YAML 1.1 reads "on" as true
        for job in content["jobs"].values():
            assert job["runs-on"]
            assert all(("uses" in step) != ("run" in step) for step in job["steps"])
            matrix = [name for names in job.get("strategy", {}).get("matrix", {}).values() for name in names]
            for step in job["steps"]:
                for name in re.findall(r"tox -e (\$\{\{.*?\}\}|\S+)", step.get("run", "")):
                    called |= set(matrix) if "matrix" in name else set(name.split(","))
    assert {"lint", "types", "core", "docs", "oldest", "newest", "dist"} <= called
    assert called <= environments(), called - environments()


def test_every_environment_that_a_text_names_exists():
    names = {name for text in TEXTS.values() for found in re.findall(r"tox -e ([\w,]+)", text) for name in found.split(",")}
    assert names <= environments(), names - environments()


def test_templates_and_hooks_parse_and_a_report_has_the_doctors_lines():
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) >= 3
    bug = next(form for form in forms if "bug" in form.get("name", "").lower())
    (asked,) = (each for each in bug["body"] if each.get("id") == "doctor")
    assert "python -m omnet_torchrl.doctor" in asked["attributes"]["description"]
    assert asked["validations"]["required"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]} >= {"ruff-check", "ruff-format", "mypy"}


def test_version_changelog_and_citation_agree():
    citation, changelog = yaml.safe_load((ROOT / "CITATION.cff").read_text()), (ROOT / "CHANGELOG.md").read_text()
    dated = re.search(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert dated
    assert (citation["version"], str(citation["date-released"])) == dated.groups()
    assert omnet_torchrl.__version__ == dated[1] or ".dev" in omnet_torchrl.__version__

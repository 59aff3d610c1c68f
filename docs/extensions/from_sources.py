"""What the reference is made of that the sources know already: options, rows, as Markdown. Needs no Sphinx."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from omnet_torchrl.training.command_line import JOBS
from omnet_torchrl.training.options import ROWS, TrainConfig
from omnet_torchrl.training.options import row as row_of

SCRIPTS = {loss: f"examples/{job}.py" for job, loss in reversed(JOBS.items())}  # the first of a loss
NOTES = Path(__file__).parents[1] / "reference" / "rows.yaml"


@dataclass(frozen=True)
class Option:
    """A line of ``options.py``: name on the command line, type, default, and its comment, which is unit and meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def comments(kind: type) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    named = [each for each in body.body if isinstance(each, ast.AnnAssign)]
    return {each.target.id: lines[each.end_lineno - 1][each.end_col_offset :].strip().removeprefix("# ") for each in named}


def groups() -> Iterator[tuple[str, type, list[Option]]]:
    """Each dataclass of options, with the name of its group, the run's own first."""
    pending: list[tuple[str, type]] = [("", TrainConfig)]
    while pending:
        prefix, kind = pending.pop(0)
        meaning, found = comments(kind), []
        for each in fields(kind):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if is_dataclass(default):
                pending.append((f"{each.name}.", type(default)))
            else:
                found.append(Option(prefix + each.name, str(each.type), written(default), meaning[each.name]))
        yield prefix.rstrip("."), kind, found


def written(value: Any) -> str:
    """A value as the command line takes it."""
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)


def cell(text: str) -> str:
    """A text in a table."""
    return re.sub(r"([|*$<])", r"\\\1", text)


def code(text: str) -> str:
    """A code in a table."""
    return f"`{text}`".replace("|", r"\|") if text else ""


def options_markdown() -> str:
    """Every option: name, type, default, meaning."""
    parts = []
    for name, kind, found in groups():
        title = f"({'options-' + name})=\n## `{name}`" if name else "## The run"
        rows = [f"| {code(each.name)} | {code(each.kind)} | {code(each.default)} | {cell(each.meaning)} |" for each in found]
        about = "" if not name else f"\n{(kind.__doc__ or '').strip()}\n".replace("``", "`")
        parts.append("\n".join([title, about, "| option | type | default | unit, meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their names on the command line."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def notes() -> dict[str, dict[str, str]]:
    """What a person wrote of each row: its equation and what differs from the paper."""
    return yaml.safe_load(NOTES.read_text())


def rows_markdown(loss: str) -> str:
    """A section for each row of a loss: equation, options, differences, command."""
    parts = []
    for name in (each for each in ROWS if ROWS[each].loss == loss):
        row, note = row_of(name), notes()[name]
        changed = ", ".join(f"`{key}={written(value)}`" for key, value in flat(row.options).items()).replace("'", "")
        tasks = ", ".join(f"{value:g} on {task}" for task, value in row.dropout.items())
        lines = [
            f"### {row.label}",
            f"$$\n{note['equation'].strip()}\n$$",
            f"- Differences from the paper: {note['differences'].strip()}",
            f"- Options beside the defaults: {changed or 'none, these are the defaults'}.",
            *([f"- `network.dropout=null`, the rate by task: {tasks}, elsewhere 0.01."] if row.dropout else []),
            f"- Target entropy: {row.entropy_per_action:g} times the action's dimensions." if row.entropy_per_action else "",
            f"- Command: `python {SCRIPTS[loss]} algorithm={name}`",
        ]
        head, formula, *items = (line for line in lines if line)
        parts.append("\n\n".join([f"(row-{name})=\n{head}", formula, "\n".join(items)]))
    return "\n\n".join(parts)

"""Tables that were left by other programs, or by one that was killed: what is damaged in them is named and skipped."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def finite(text: str) -> float:
    """A finite number; a ``ValueError`` otherwise."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {text!r}.")
    return number


def read_rows(path: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header; one that is damaged or was cut short is named in a warning, and left out.

    Args:
        path (Path): the file. No cell has a line break.
        columns (mapping): name to what makes a value of a cell's text, or raises a ``ValueError``. Others are not read.

    Raises:
        ValueError: a column is missing.
    """
    first, *lines = path.read_text(errors="replace").split("\n")
    header = next(csv.reader([first.strip("\r")]), [])
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"expected the columns {','.join(columns)}, got {first!r}; missing: {', '.join(missing)}.")
    rows = []
    # Only a line break ends a row: the "12" that is left of "1200.5" looks whole.
    if lines and lines.pop():
        warnings.warn(
            f"{path}, line {len(lines) + 2}: the last record is cut short, or has no line break; left out.", stacklevel=2
        )
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            cells = dict(zip(header, next(csv.reader([line.rstrip("\r")], strict=True)), strict=True))
            rows.append({name: make(cells[name]) for name, make in columns.items()})
        except (ValueError, csv.Error):
            warnings.warn(f"{path}, line {number}: expected {','.join(header)}, got {line!r}; left out.", stacklevel=2)
    return rows

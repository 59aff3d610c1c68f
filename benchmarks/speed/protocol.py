"""Timing one block at a time in processes of their own, so that frameworks take turns in one run and only one computes.

A worker reads a case per line from its input and answers with a line of JSON; ``null`` for a case it cannot build. Only the
standard library is imported: peers have another environment.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Block = Callable[[], None]


def serve(cases: Mapping[str, Callable[[], Block]], versions: Mapping[str, str]) -> None:
    """Answer until the input ends: a case's first line builds and warms it, each further one times it once."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    ready: dict[str, Block] = {}
    with contextlib.redirect_stdout(sys.stderr):
        os.dup2(2, 1)  # what libraries print is no answer
        print(json.dumps({"cases": list(cases), "versions": dict(versions)}), file=answers)
        for line in sys.stdin:
            name = line.strip()
            start = time.perf_counter()
            if name in ready:
                ready[name]()
            else:
                ready[name] = cases[name]()
            print(json.dumps(time.perf_counter() - start), file=answers)


class Worker:
    """A process that serves; use it as a context."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None):
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env={**os.environ, **(env or {})}
        )
        hello = self._read()
        self.cases, self.versions = hello["cases"], hello["versions"]

    def seconds(self, case: str) -> float:
        """Build the case, the first time; then time its block."""
        assert self._process.stdin
        self._process.stdin.write(case + "\n")
        return self._read()

    def busy_s(self) -> float:
        """CPU seconds of the process so far."""
        account = Path(f"/proc/{self._process.pid}/stat")
        if not account.exists():
            return float("nan")
        fields = account.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {' '.join(self._process.args)} ended with status {self._process.wait()}.")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        # Closes its input, which ends it, and its output; waits.
        self._process.__exit__(None, None, None)

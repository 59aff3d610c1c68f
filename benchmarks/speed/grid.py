"""Tables of what ``pytest benchmarks/speed --benchmark-json FILE`` measured.

    pytest benchmarks/speed -k "growth or main_job" --benchmark-json grid.json
    python benchmarks/speed/grid.py grid.json [more.json ...]      # adds them to results/grid.json, writes results/grid.md

A table per test and machine, one of its parameters across and the others down. Times are medians; of a test that one machine
measured twice, the newer one counts. Tests of a GPU are in no table.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from report import ratio

HERE = Path(__file__).parent
Record = dict[str, Any]


class Table(NamedTuple):
    """How the results of a test are shown: its title, the parameters down and across, and what is in a cell."""

    title: str
    down: tuple[str, ...]
    across: str
    cell: Callable[[Record], str]


def milliseconds(record: Record) -> str:
    """The median time of a round."""
    return f"{1e3 * record['stats']['median']:.3g}"


def job(record: Record) -> str:
    """Frames per second, memory and where the time went."""
    noted = record["extra_info"]
    return f"{noted['frames_per_second']:.1f} frames/s, {noted['peak_mib']:,.0f} MiB; {noted['where_it_went']}"


def collected(record: Record) -> str:
    """Frames per second, and a frame's time over that of the same collector without a primer, [95 % interval]."""
    noted = record["extra_info"]
    rate = f"{noted['frames'] / median(noted['turns']):,.0f}"
    if noted["turns"] == noted["none"]:
        return rate
    best, low, high = ratio([[x] for x in noted["turns"]], [[x] for x in noted["none"]], paired=True)
    return f"{rate} · {best:.2f} [{low:.2f}, {high:.2f}]"


def each_way(record: Record) -> list[Record]:
    """A record whose cases took turns, as one for each of them."""
    noted = record["extra_info"]
    if "seconds" not in noted:
        return [record]
    shared = {"frames": noted["frames"], "none": noted["seconds"]["none"]}
    return [
        {**record, "params": {**record["params"], "way": way}, "extra_info": {**shared, "turns": turns}}
        for way, turns in noted["seconds"].items()
    ]


BLOCK = "ms for a block of 20 critic updates and one actor update, sampling included"
TABLES = {
    "test_main_job": Table("The main job, 3,000 frames of which 1,000 are random", ("env",), "num_envs", job),
    "test_rows": Table(BLOCK, ("row", "mode"), "task", milliseconds),
    "test_growth": Table(
        f"How it grows (width 256, N 5, batch 256 but for what is named): {BLOCK}", ("what", "value"), "row", milliseconds
    ),
    "test_torchrls_own_losses": Table(f"TorchRL's own losses: {BLOCK}", ("loss",), "compile", milliseconds),
    "test_bare_torch": Table(f"Bare torch: {BLOCK}", (), "", milliseconds),
    "test_one_subnetwork": Table(
        "Layers, one subnetwork: ms for 14 - width - width - 1", ("width", "subnets", "batch", "way"), "kind", milliseconds
    ),
    "test_all_subnetworks": Table(
        "Layers, all subnetworks, width 256, batch 256: ms", ("subnets", "way"), "kind", milliseconds
    ),
    "test_acting_in_one_environment": Table("200 actions in one environment, ms", (), "kind", milliseconds),
    "test_acting_in_many": Table("Actions in several environments, ms", ("kind",), "num_envs", milliseconds),
    "test_collectors": Table(
        "Collectors, frames per second, and a frame's time over `none`'s, in turns [95 % interval of this process]",
        ("collector", "env", "num_envs"),
        "way",
        collected,
    ),
    "test_replay_sampling": Table("20 batches from the replay buffer, ms", ("batch",), "task", milliseconds),
    "test_draws": Table("The draws of 20 updates, ms", (), "task", milliseconds),
}


def tables(files: list[dict[str, Any]]) -> str:
    """Markdown of all results, machine by machine; of a test with the same parameters twice, the newer one."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        machine = file["machine_info"]
        name = f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, Python {machine['python_version']}"
        machines.setdefault(name, []).append(file)
    parts = []
    for name, measured in machines.items():
        sittings = ", ".join(
            f"{file['datetime'][:16]} (commit {file['commit_info']['id'][:7]}{'+' * file['commit_info']['dirty']})"
            for file in measured
        )
        parts += [f"# {name}\n\nMeasured at {sittings}.\n", *_tables(measured)]
    return "\n".join(parts)


def _tables(files: list[dict[str, Any]]) -> list[str]:
    records: dict[str, dict[str, Record]] = {name: {} for name in TABLES}
    for file in files:
        for record in file["benchmarks"]:
            name = record["name"].partition("[")[0]
            if name in records:
                records[name][record["name"]] = record
    return [
        "\n".join(
            [f"## {table.title}", "", *_rows(table, [way for record in records[name].values() for way in each_way(record)]), ""]
        )
        for name, table in TABLES.items()
        if records[name]
    ]


def _rows(table: Table, records: list[Record]) -> list[str]:
    def value(record: Record, name: str) -> str:
        shown = (record["params"] or {}).get(name, "")
        return shown.rpartition(".")[2].rstrip("'>") if isinstance(shown, str) else str(shown)

    columns = list(dict.fromkeys(value(record, table.across) for record in records))
    if all(column.isdigit() for column in columns):
        columns.sort(key=int)
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        place = tuple(value(record, name) for name in table.down)
        cells.setdefault(place, {})[value(record, table.across)] = table.cell(record)
    heads = [f"{table.across} {column}".strip() if column.isdigit() else column for column in columns]
    lines = ["| " + " | ".join([*table.down, *heads]) + " |", "|" + "---|" * (len(table.down) + len(columns))]
    for place, row in sorted(cells.items(), key=lambda item: [(int(x), "") if x.isdigit() else (-1, x) for x in item[0]]):
        lines.append("| " + " | ".join([*place, *(row.get(column, "") for column in columns)]) + " |")
    return lines


def essential(file: dict[str, Any]) -> dict[str, Any]:
    """What tables are made of, without the time of each round."""
    cpu, commit = file["machine_info"]["cpu"], file["commit_info"]
    return {
        "datetime": file["datetime"],
        "machine_info": {
            "cpu": {name: cpu[name] for name in ("brand_raw", "count")},
            "python_version": file["machine_info"]["python_version"],
        },
        "commit_info": {name: commit[name] for name in ("id", "dirty")},
        "benchmarks": [
            {
                **{name: record[name] for name in ("name", "params", "extra_info")},
                "stats": {name: record["stats"][name] for name in ("median", "min", "rounds")},
            }
            for record in file["benchmarks"]
        ],
    }


def main(names: list[str], results: Path) -> str:
    """Add files to ``grid.json`` and write ``grid.md``."""
    raw = results / "grid.json"
    kept = json.loads(raw.read_text()) if raw.exists() else []
    files = {file["datetime"]: file for file in [*kept, *(essential(json.loads(Path(name).read_text())) for name in names)]}
    ordered = [files[when] for when in sorted(files)]
    text = tables(ordered)
    raw.write_text(json.dumps(ordered, indent=1) + "\n")
    (results / "grid.md").write_text(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="what pytest-benchmark wrote, to be added")
    files = parser.parse_args().files
    for missing in (file for file in files if not Path(file).is_file()):
        parser.error(f"{missing} is no file: expected what `pytest --benchmark-json FILE` writes.")
    print(main(files, HERE / "results"))

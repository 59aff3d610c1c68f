"""benchmarks/learning: what is damaged or partial is named and skipped, wherever it is read."""

import pytest
import tables
from experiments import select
from rates import COLUMNS, Rate, Rates
from test_learning import cell, run
from test_report import report, write_run, written

PUBLISHED = [
    "method,env,seed,env_step,return",
    *(f"REDQ,Hopper-v4,{seed},{frames},{frames // 100}" for seed in range(2) for frames in range(0, 40_000, 10_000)),
]


def test_a_damaged_row_of_rates_is_named_and_skipped_and_the_next_one_has_a_line_of_its_own(tmp_path):
    path = tmp_path / "rates.csv"
    other = select(["fig2a"], rows=["omnet"], tasks=["Hopper-v4"], seeds=[0])[0]
    for each in (cell(), other):
        Rates(path, "cpu", 1).add(each, Rate(0.001, 0.1, 0.005))
    *before, last = path.read_text().splitlines()
    path.write_text("\n".join([*before, last.replace("0.005", "0.0x5"), last[:-7]]))
    with pytest.warns(UserWarning, match=r"rates.csv, line [34]: .*left out") as said:
        known = Rates(path, "cpu", 1)
    cut, wrong = (str(warning.message) for warning in said)
    assert "line 4: the last record is cut short" in cut
    assert "line 3: expected machine,device," in wrong
    assert known.get(cell()) == Rate(0.001, 0.1, 0.005)
    assert known.get(other) is None
    with pytest.warns(UserWarning, match="left out"):
        assert "| omnet | not measured | not measured | not measured | not measured |" in tables.flops(path)
    known.add(other, Rate(0.001, 0.2, 0.005))
    with pytest.warns(UserWarning, match="line [34]: expected"):
        assert Rates(path, "cpu", 1).get(other).training == 0.2


@pytest.mark.parametrize("content", [b"", b"machine,row\n", b"\xff\n"])
def test_a_file_that_is_no_table_of_rates_is_named_and_skipped(tmp_path, content):
    path = tmp_path / "rates.csv"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{path} is skipped: expected the columns {','.join(COLUMNS[:3])}.*; missing: "):
        assert Rates(path, "cpu", 1).get(cell()) is None


def test_damaged_rows_of_a_reference_are_named_and_skipped(tmp_path):
    path = tmp_path / "published.csv"
    damaged = [*PUBLISHED, "REDQ,Hopper-v4,0,x,1", "REDQ,Hopper-v4,0,1", "REDQ,Hopper-v4,0,5,nan", "REDQ,Hopper-v4,0,50000,12"]
    path.write_text("\n".join(damaged))
    with pytest.warns(UserWarning, match="left out") as said:
        curves = report.read_reference(path, None, {})
    lines = [str(warning.message).split(": ")[0] for warning in said]
    assert lines == [f"{path}, line {number}" for number in (13, 10, 11, 12)]
    ((_, tasks),) = curves.items()
    assert tasks == {"Hopper-v4": 2 * [([0, 10_000, 20_000, 30_000], [0.0, 100.0, 200.0, 300.0])]}


@pytest.mark.parametrize("content", ["null", "[1]", "3", "\xff"])
def test_a_run_json_without_an_object_is_named_and_skipped(tmp_path, content):
    each = select(["hopper_30k"], rows=["omnet"], seeds=[0])[0]
    folder = write_run(tmp_path / "results", each, 1.0)
    (folder / "run.json").write_bytes(content.encode("latin-1"))
    assert run.state(folder) == {}
    assert not run.is_done(each, tmp_path / "results")
    with pytest.warns(UserWarning, match=f"{folder / 'metrics.csv'} is skipped"):
        assert "Without a run so far: hopper_30k." in written(tmp_path / "results", "hopper_30k")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("status", ["diverged", "finished"])
def test_a_run_with_numbers_that_are_not_finite_is_drawn_and_stays_in_the_tables(tmp_path, figures, value, status):
    root = tmp_path / "results"
    for seed in range(2):
        (each,) = select(["hopper_30k"], rows=["omnet"], seeds=[seed])
        folder = write_run(root, each, 100.0 * (1 + seed), status=status if seed else "finished")
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()
    broken = [line if int(line.split(",")[0]) <= 15_000 else ",".join([*line.split(",")[:3], value]) for line in lines[1:]]
    path.write_text("\n".join([lines[0], *broken]) + "\n")
    text = written(root, "hopper_30k")
    assert "| OMNet | 150 [-485, 785] (n=2, 1 diverged) |" in text
    assert "| OMNet | Hopper-v4 | 2 | 30.0 [30.0, 30.0] |" in text
    returns, bias = (figure.axes[0] for figure in figures)
    for panel, last in ((returns, 200), (bias, 30)):
        (cross,) = (line for line in panel.lines if line.get_marker() == "x")
        assert (cross.get_xdata()[-1], cross.get_ydata()[-1]) == (15_000, last)


def test_a_run_without_a_finite_value_is_missing(tmp_path):
    (each,) = select(["hopper_30k"], rows=["omnet"], seeds=[0])
    write_run(tmp_path / "results", each, "nan", bias="inf")
    text = written(tmp_path / "results", "hopper_30k", "--frames", "30000")
    assert "- Hopper-v4: 0 of 2 seeds, seed 0 at 0 (finished) of OMNet" in text
    assert (tmp_path / "output" / "hopper_30k.png").exists()

"""Logs in Cohen's format beside our stores, the tables that they reproduce, and the envelope over several runs."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from conftest import ROOT, one_sentence, run_main, run_task, snapshot
from gsmooth_lightning.certify.store import read
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import certified_accuracy, envelope
from gsmooth_lightning.report.figures import comparison_figure
from gsmooth_lightning.report.logs import COLUMNS, as_log, read_log
from gsmooth_lightning.report.tables import latex, log_rows, markdown
from gsmooth_lightning.tasks.report import names_of

LOGS = ROOT.parent / "shared" / "data" / "logs" / "cohen"
OURS = ROOT / "results" / "mnist_l2"
HEADER = "\t".join(COLUMNS)
SIX = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]

published = pytest.mark.skipif(
    not LOGS.exists(),
    reason="the logs that Cohen et al. published are not part of this repository; ours in their format are tested",
)


def cohen(sigma: str) -> Path:
    return LOGS / "cifar10" / "resnet110" / f"noise_{sigma}" / "test" / f"sigma_{sigma}"


def log(*lines: str) -> str:
    """The text of a log with these lines, spaces for tabs."""
    return "\n".join([HEADER, *(line.replace(" ", "\t") for line in lines), ""])


WHOLE = log("0 3 3 0.378 1 15.4", "20 7 -1 0.0 0 0:02:31.238689", "40 8 8 inf 1 1:00:00", "60 1 2 1e-05 0 16")


@pytest.fixture
def written(tmp_path):
    """Writes a log and returns its path."""

    def write(text: str, name: str = "log.tsv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    return write


# --- reading


@published
@pytest.mark.parametrize(
    ("sigma", "table"),
    [("0.25", [0.6, 0.428, 0.266, 0, 0, 0]), ("0.50", [0.546, 0.414, 0.320, 0.234, 0.152, 0.094])],
)
def test_published_tables(sigma, table, tmp_path):
    """Radii at least r count: with radii above r sigma .5 would have .232 at 1 and .150 at 1.25."""
    records = read_log(cohen(sigma))
    assert len(records) == 500
    assert certified_accuracy(records, SIX)[0].tolist() == table
    run_task("report", f"stores={cohen(sigma)}", f"out={tmp_path}", "radii=[.25,.5,.75,1,1.25,1.5]")
    printed = re.findall(r"\| certified at (\S+) l2 +\| (\S+) ", (tmp_path / "report.md").read_text())
    assert [(float(r), float(value)) for r, value in printed] == list(zip(SIX, table, strict=True))


@published
def test_every_published_log_is_read(tmp_path):
    """As pandas reads it and Cohen's analysis counts it."""
    paths = [path for path in LOGS.rglob("*") if path.is_file()]
    assert len(paths) == 13
    for path in paths:
        table, records = pd.read_csv(path, delimiter="\t"), read_log(path)
        assert len(records) == len(table)
        value, _, _ = certified_accuracy(records, SIX)
        assert value.tolist() == [(table["correct"] & (table["radius"] >= r)).mean() for r in SIX], path


def test_what_a_line_means(written):
    """Abstentions, infinite and tiny radii, both formats of time; sorted by image."""
    unit = {"unit": "l2"}
    assert read_log(written(WHOLE)) == [
        {"index": 0, "label": 3, "prediction": 3, "radius": 0.378, "seconds": 15.4, **unit},
        {"index": 20, "label": 7, "prediction": -1, "radius": 0.0, "seconds": 151.238689, **unit},
        {"index": 40, "label": 8, "prediction": 8, "radius": float("inf"), "seconds": 3600.0, **unit},
        {"index": 60, "label": 1, "prediction": 2, "radius": 1e-05, "seconds": 16.0, **unit},
    ]
    lines = WHOLE.splitlines(keepends=True)
    assert read_log(written("".join([lines[0], *reversed(lines[1:])]))) == read_log(written(WHOLE))
    (late,) = read_log(written(log("7 1 1 2 1 TIME").replace("TIME", "1 day, 2:03:04.5")))
    assert (late["index"], late["seconds"]) == (7, 26 * 3600 + 3 * 60 + 4.5)


def test_the_same_whole_radius_type(written):
    """A log with whole radii only gives numbers like any other."""
    (record,) = read_log(written(log("7 1 1 2 1 5")))
    assert isinstance(record["radius"], float)
    assert isinstance(record["index"], int)


@pytest.mark.parametrize("tail", ["\n", "\n\n  \n", "\t\n", "   "])
def test_trailing_and_blank_lines_hold_nothing(written, tail):
    expected = read_log(written(WHOLE))
    assert read_log(written(WHOLE + tail)) == expected
    assert read_log(written(WHOLE.replace("\n40", "\n\n40"))) == expected
    assert read_log(written(WHOLE.replace("\n", "\r\n") + tail)) == expected
    assert read_log(written(WHOLE.rstrip("\n"))) == expected


def test_a_log_cut_anywhere_never_shows_half_a_number(written):
    """What is read is a beginning of the log; only the time of the last image may be cut."""
    whole = read_log(written(WHOLE))
    seen = set()
    first = WHOLE.index("\n", len(HEADER) + 1) + 1
    for end in range(first, len(WHOLE)):
        records = read_log(written(WHOLE[:end]))
        finished = WHOLE[:end].count("\n") - 1
        seen.add(len(records))
        assert finished <= len(records) <= finished + 1
        assert records[:finished] == whole[:finished]
        for got, true in zip(records, whole, strict=False):
            assert got | {"seconds": 0} == true | {"seconds": 0}
    assert seen == {1, 2, 3, 4}
    with pytest.raises(RequestError, match="no finished image yet"):
        read_log(written(WHOLE[: first - len("15.4\n")]))


DAMAGED = {
    "a field is missing": ("20 7 7 0.5 1", "damaged"),
    "a field too many": ("20 7 7 0.5 1 15.4 9", "damaged"),
    "a word for a number": ("20 7 seven 0.5 1 15.4", "damaged"),
    "no radius": ("20 7 7 nan 1 15.4", "damaged"),
    "a negative radius": ("20 7 7 -0.5 1 15.4", "damaged"),
    "two points": ("20 7 7 0.5.1 1 15.4", "damaged"),
    "another class than -1 below 0": ("20 7 -2 0.5 0 15.4", "damaged"),
    "correct is neither 0 nor 1": ("20 7 7 0.5 2 15.4", "damaged"),
    "no time": ("20 7 7 0.5 1 soon", "damaged"),
    "an exponent in a time of day": ("20 7 7 0.5 1 0:00:1e-5", "damaged"),
    "two lines run together": ("20 7 7 0.40 8 8 0.5 1 15.4", "damaged"),
    "wrong and correct": ("20 7 6 0.5 1 15.4", "contradicts itself"),
    "right and not correct": ("20 7 7 0.5 0 15.4", "contradicts itself"),
    "an abstention that is correct": ("20 7 -1 0.0 1 15.4", "contradicts itself"),
    "an abstention with a radius": ("20 7 -1 0.5 0 15.4", "contradicts itself"),
    "an image again": ("0 3 3 0.378 1 15.4", "repeats an image"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_refused_with_its_number(here, name):
    line, what = DAMAGED[name]
    text = log("0 3 3 0.378 1 15.4", "", line, "40 8 8 inf 1 1:00:00")
    (here / "log.tsv").write_text(text)
    before = snapshot(here)
    one_sentence(run_main("report", "stores=log.tsv"), "log.tsv, line 4, ", what)
    assert snapshot(here) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"dear\n", b"\x89PNG\r\n\x1a\n\0\xff\n", b'{"index": 0}\n', b"idx label predict\n0 1 1\n"],
    ids=["empty", "text", "bytes", "records of a store", "other columns"],
)
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="neither a store nor a log, whose first line is idx label predict"):
        read_log(path)


def test_a_log_without_images_is_refused(written):
    with pytest.raises(RequestError, match="holds no finished image yet"):
        read_log(written(HEADER + "\n"))


# --- reporting


def test_the_table_of_a_log_holds_what_a_log_supports(written):
    rows = log_rows(read_log(written(WHOLE)), [0, 0.378, 0.379, 1e9])
    accuracy = {name: cell.split()[0] for name, cell in rows.items() if name.startswith("certified at")}
    assert accuracy == {
        "certified at 0 l2": "0.500",
        "certified at 0.378 l2": "0.500",
        "certified at 0.379 l2": "0.250",
        "certified at 1e+09 l2": "0.250",
    }
    assert rows["images"] == "4 (indices 0 to 60)"
    assert rows["abstained"] == "1"
    assert rows["seconds an image"] == "945.660"
    assert rows["guarantee"].startswith("as the log's author states it")
    assert not any(word in name for name in rows for word in ("base", "alpha", "evaluations", "threat", "smoothed"))


def test_infinite_radii_leave_finite_axes_and_radii(here, written):
    (here / "log").write_text(WHOLE)
    table = run_task("report", "stores=log")
    radii = [float(r) for r in re.findall(r"certified at (\S+) l2", table)]
    assert radii == [0, 0.1, 0.2, 0.3, 0.4]
    axes = comparison_figure({"log": read_log(here / "log")}).axes[0]
    assert axes.get_xlim()[1] == pytest.approx(1.05 * 0.378)
    only = comparison_figure({"log": read_log(written(log("1 1 1 inf 1 5")))}).axes[0]
    assert only.get_xlim()[1] == 1
    assert only.lines[0].get_ydata().tolist() == [1] * 241


def test_logs_and_stores_side_by_side(here):
    """One table with the same radii in every column, named by what tells the paths apart; LaTeX beside markdown."""
    for name in ("a/sigma_1", "b/sigma_1"):
        (here / name).parent.mkdir()
        (here / name).write_text(WHOLE.replace("inf", "1.3"))
    run_task("report", f"stores=[{OURS / 'noise-0.25'},a/sigma_1,b/sigma_1]", "out=out")
    markdown_lines = (here / "out" / "report.md").read_text().splitlines()
    assert [cell.strip() for cell in markdown_lines[0].strip("|").split("|")] == [
        "",
        "noise-0.25",
        "a/sigma_1",
        "b/sigma_1",
    ]
    certified = [line.strip("|").split("|") for line in markdown_lines if line.startswith("| certified at")]
    assert len(certified) == 7
    assert all("[" in cell for line in certified for cell in line[1:])
    assert (here / "out" / "report.png").exists()
    assert {path.name for path in (here / "a").iterdir()} == {"sigma_1"}


def test_a_log_is_reported_into_its_folder(here):
    (here / "log").write_text(WHOLE)
    run_task("report", "stores=log")
    assert {path.name for path in here.iterdir()} == {"log", "report.md", "report.tex", "report.png"}


def test_names_are_the_shortest_ends_that_differ(here):
    assert names_of([Path("x/run"), Path("y")]) == ["run", "y"]
    assert names_of([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]
    assert names_of([Path("x/run"), Path("x/run/run"), Path("z")]) == ["x/run", "run/run", "z"]
    assert names_of([Path(".")]) == [here.name]
    with pytest.raises(RequestError, match="twice"):
        names_of([Path("x/run"), Path("x/../x/run")])


def test_latex_holds_the_cells_of_the_markdown_table():
    """Special characters are escaped, every row has a cell for each column, and the rules are those of booktabs."""
    columns = {
        "sigma_0.25 & more": {"certified at 0 l2": "0.600  [0.556, 0.643]", "intervals": "95 % over images"},
        "b#1": {"certified at 0 l2": "0.546  [0.501, 0.590]", "threat": r"~ ^ $ { } \ _"},
    }
    tex = latex(columns)
    assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 for line in body)
    names = {r"\&": "&", r"\%": "%", r"\#": "#", r"\_": "_", r"\$": "$", r"\{": "{", r"\}": "}"} | {
        r"\textasciitilde": "~", r"\textasciicircum": "^", r"\textbackslash": "\\", r"\space": ""
    }  # fmt: skip

    def plain(cell: str) -> str:
        return " ".join(re.sub(r"\\(?:[a-z]+|.)", lambda match: names[match[0]], cell).split())

    cells = [[plain(cell) for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))] for line in body]
    lines = [line for line in markdown(columns).splitlines() if not line.startswith("|:")]
    assert cells == [[" ".join(cell.split()) for cell in line.strip("|").split("|")] for line in lines]


# --- writing


def test_a_store_survives_as_a_log(here):
    """Index, label, prediction, radius and time come back exactly, and Cohen's own analysis counts the same."""
    store = OURS / "noise-0.5"
    run_task("report", f"stores={store}", "out=out", "cohen=log.tsv")
    records, again = read(store), read_log(here / "log.tsv")
    kept = ("index", "label", "prediction", "radius", "unit", "seconds")
    assert again == [{key: r[key] for key in kept} for r in records]
    assert any(r["prediction"] == -1 for r in records)
    table = pd.read_csv(here / "log.tsv", delimiter="\t")
    assert list(table.columns) == COLUMNS
    counted = [(table["correct"] & (table["radius"] >= r)).mean() for r in SIX]
    assert counted == certified_accuracy(records, SIX)[0].tolist()
    run_task("report", "stores=log.tsv", "out=out", "cohen=again.tsv")
    assert (here / "again.tsv").read_text() == (here / "log.tsv").read_text()


def test_radii_are_written_with_all_digits():
    """Three digits would turn 1.2397 into 1.24."""
    record = {"index": 0, "label": 1, "prediction": 1, "radius": 1.2397, "unit": "l2", "seconds": 2e-05}
    tiny = float(np.nextafter(0.3, 0))
    abstained = record | {"index": 1, "prediction": -1, "radius": 0.0, "seconds": 1}
    text = as_log([record, abstained, record | {"index": 2, "radius": tiny, "prediction": 0}])
    assert text == log("0 1 1 1.2397 1 2e-05", "1 1 -1 0.0 0 1.0", "2 1 0 0.29999999999999993 0 2e-05")
    assert float(pd.read_csv(io.StringIO(text), sep="\t", float_precision="round_trip")["radius"][2]) == tiny


def test_only_l2_fits_into_a_log():
    record = {"index": 0, "label": 1, "prediction": 1, "radius": 30.0, "unit": "degrees", "seconds": 1.0}
    with pytest.raises(RequestError, match="radii in l2, these are in degrees; leave cohen out"):
        as_log([record])


# --- the envelope


def run(radii: list[float], n: int = 20, **fields) -> list[dict]:
    """A run on n images of which the first are certified, correctly, at these radii."""
    padded = [*radii, *[0.0] * (n - len(radii))]
    return [
        {"index": i, "label": 1, "prediction": 1 if i < len(radii) else -1, "radius": r, "unit": "l2", **fields}
        for i, r in enumerate(padded)
    ]


def test_the_envelope_is_the_best_run_at_each_radius():
    runs = {"low": run([0.5] * 10), "high": run([1.0] * 6), "high again": run([1.0] * 6)}
    names, value, low, high = envelope(runs, [0, 0.5, 0.6, 1.0])
    assert names == ["low", "low", "high", "high"]
    assert value.tolist() == [0.5, 0.5, 0.3, 0.3]
    # Clopper-Pearson at level 1 - .05/3 by its definition: at the ends, so few or so many have probability .05/6
    assert binom.sf(9, 20, low[0]) == pytest.approx(0.05 / 6)
    assert binom.cdf(10, 20, high[0]) == pytest.approx(0.05 / 6)
    assert binom.sf(5, 20, low[3]) == pytest.approx(0.05 / 6)


@pytest.mark.parametrize("p", [0.1, 0.31, 0.5, 0.77])
def test_the_envelopes_interval_covers_the_best_accuracy(p):
    """Exactly, for three independent runs of the same accuracy; the interval of the chosen run alone would not.

    Every interval depends on the largest count m only, and P(max <= m) = F(m)^3.
    """
    n, k = 20, 3
    law = np.diff(binom.cdf(np.arange(-1, n + 1), n, p) ** k)

    def coverage(interval) -> float:
        ends = [interval(run([1.0] * m, n)) for m in range(n + 1)]
        return sum(mass for mass, (low, high) in zip(law, ends, strict=True) if low <= p <= high)

    def adjusted(records):
        _, _, low, high = envelope({str(i): records for i in range(k)}, [1.0])
        return low[0], high[0]

    def alone(records):
        _, low, high = certified_accuracy(records, [1.0])
        return low[0], high[0]

    assert coverage(adjusted) >= 0.95
    if p == 0.31:
        assert coverage(alone) < 0.95


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (run([1.0], n=19), "a and b are on different images"),
        (run([1.0], label=2), "a and b are on different images"),
        (run([1.0], unit="degrees"), "a and b have radii in different units"),
        (None, "several runs"),
    ],
)
def test_the_envelope_refuses_what_cannot_be_compared(other, words):
    runs = {"a": run([1.0])} | ({} if other is None else {"b": other})
    with pytest.raises(RequestError, match=words):
        envelope(runs, [0.5])


def test_the_envelope_compares_inputs_where_runs_state_them():
    stored, elsewhere = run([1.0], input="digest"), run([1.0], input="another digest")
    assert envelope({"log": run([1.0]), "a": stored}, [0.5])[1] == [0.05]
    with pytest.raises(RequestError, match="a and b are on different images"):
        envelope({"log": run([1.0]), "a": stored, "b": elsewhere}, [0.5])


def test_the_envelope_in_table_and_figure(here):
    """Our stores and their logs are on the same images; the line lies on the upper edge of the curves."""
    stores = [OURS / f"noise-{sigma}" for sigma in ("0.25", "0.5")]
    run_task("report", f"stores=[{stores[0]},{stores[1]}]", "envelope=true", "radii=[0,1]", "out=out")
    lines = (here / "out" / "report.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert lines[0].split("|")[4].strip() == "upper envelope"
    for name, winner in (("certified at 0 l2", 0), ("certified at 1 l2", 1)):
        value, best = cells[name][winner].split()[0], cells[name][2]
        assert best.startswith(f"{value}  [")
        assert best.endswith(f"]  {stores[winner].name}")
    assert "optimistic" in cells["guarantee"][2]
    assert "Bonferroni over 2 runs" in cells["intervals"][2]
    (axes,) = comparison_figure({path.name: read(path) for path in stores}, with_envelope=True).axes
    first, second, best = (line.get_ydata() for line in axes.lines)
    assert best.tolist() == np.maximum(first, second).tolist()
    assert (first > second).any()
    assert (second > first).any()


@published
def test_the_envelope_of_published_logs(tmp_path):
    """By hand from the published tables: .25 is best up to .5, .5 at .75 and 1, 1.0 beyond."""
    runs = {sigma: read_log(cohen(sigma)) for sigma in ("0.25", "0.50", "1.00")}
    names, value, _, _ = envelope(runs, SIX)
    assert names == ["0.25", "0.25", "0.50", "0.50", "1.00", "1.00"]
    assert value[:4].tolist() == [0.6, 0.428, 0.320, 0.234]
    assert (value[4:] > [0.152, 0.094]).all()

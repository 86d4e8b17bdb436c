"""Certificates as tab-separated logs in the format of Cohen et al. 2019, which most papers since have kept.

Columns: idx label predict radius correct time. Abstentions are predict -1, radius 0.0 and correct 0; radii are in l2;
time is what an image took, as H:MM:SS.ffffff or in seconds.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import Record, certified, units

COLUMNS = ["idx", "label", "predict", "radius", "correct", "time"]
UNIT = "l2"

LINE = "\t".join(
    (
        r"(?P<idx>\d+)",
        r"(?P<label>\d+)",
        r"(?P<predict>-1|\d+)",
        r"(?P<radius>inf|\d+(?:\.\d+)?(?:e[-+]?\d+)?)",
        r"(?P<correct>[01])",
        r"(?P<time>(?:(?:\d+ days?, )?\d+:\d\d:)?\d+(?:\.\d+)?(?:e-?\d+)?)\s*",
    )
)
"""A line of a log."""


def read_log(path: str | Path) -> list[Record]:
    """The records of a log, sorted by image, with index, label, prediction, radius, unit and seconds.

    Radii are taken as they are printed: Cohen's have three digits and may be rounded up. Blank lines are skipped; an
    incomplete last line without a newline is dropped (the log is still being written).

    Raises:
        RequestError: not a log, no image in it, or a line that is damaged, contradicts itself or repeats an image
            (names it).
    """
    text, _, last = Path(path).read_text(errors="replace").rpartition("\n")
    if re.fullmatch(LINE, last):
        text += "\n" + last
    lines = pd.Series(text.splitlines(), dtype="str")
    lines.index += 1  # as editors number them
    lines = lines[lines.str.strip() != ""]
    if lines.empty or lines.iloc[0].split() != COLUMNS:
        raise RequestError(
            f"{path} is neither a store nor a log, whose first line is {' '.join(COLUMNS)} with tabs between; name the "
            "folder that a run printed, or a log"
        )
    if len(lines) == 1:
        raise RequestError(f"{path} holds no finished image yet; report it later")
    table = lines.iloc[1:].str.extract(f"^{LINE}$")
    time = table.pop("time")
    seconds = pd.to_numeric(time, errors="coerce")
    seconds = seconds.fillna(pd.to_timedelta(time.where(seconds.isna()), errors="coerce").dt.total_seconds())
    _refuse(path, seconds.isna(), "is damaged")
    table = table.apply(pd.to_numeric)
    right = (table["predict"] == table["label"]).astype(int)
    _refuse(path, table["correct"] != right, "contradicts itself: correct is 1 where predict is the label, otherwise 0")
    _refuse(path, (table["predict"] == -1) & (table["radius"] > 0), "contradicts itself: an abstention has no radius")
    _refuse(path, table["idx"].duplicated(), "repeats an image")
    names = {"idx": "index", "predict": "prediction"}
    table = table.drop(columns="correct").rename(columns=names).assign(unit=UNIT, seconds=seconds)
    return table.astype({"radius": float}).sort_values("index").to_dict("records")


def _refuse(path: str | Path, wrong: pd.Series, what: str) -> None:
    if wrong.any():
        raise RequestError(f"{path}, line {wrong.idxmax()}, {what}; restore the file or delete the line")


def as_log(records: Sequence[Record]) -> str:
    """Certificates as the text of a log. Radii keep all digits: cut to three they may be rounded up.

    Raises:
        RequestError: radii in another unit than l2, which a log cannot state.
    """
    if units(records) != {UNIT}:
        raise RequestError(
            f"a log in Cohen's format holds radii in {UNIT}, these are in {', '.join(units(records))}; leave cohen out"
        )
    table = pd.DataFrame(
        {
            "idx": [r["index"] for r in records],
            "label": [r["label"] for r in records],
            "predict": [r["prediction"] for r in records],
            "radius": [float(r["radius"]) for r in records],
            "correct": certified(records, 0.0).astype(int),
            "time": [r["seconds"] for r in records],
        }
    )
    return table.to_csv(sep="\t", index=False, lineterminator="\n")

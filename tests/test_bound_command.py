"""`gsmooth bound` and what its stores say: tables, resume, bounds for a wider range, and stores it does not fit."""

import sys

import pytest

from conftest import QUIET, SMALL, one_sentence, records, run_main, run_task, timeless
from gsmooth_lightning.report.tables import bound_rows
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation

PLAIN = [o for o in SMALL if not o.startswith(("error.", "noise"))]
POOLED = ("error=pooled", "error.calibration=12", "error.draws=16", "error.value=0.9")


def rows(folder):
    """report.md as a dictionary of its one column."""
    lines = [line.strip("|\n").split("|") for line in (folder / "report.md").read_text().splitlines()[2:]]
    return {name.strip(): value.strip() for name, value in lines}


def test_table_of_a_pooled_bound(here):
    """Fischer's columns, in l2, with one number for each part; numbers on the safe side."""
    ended = run_main("bound", *PLAIN, *POOLED, "noise.sigma=0.5", "error.partition=halves", "store=pooled")
    assert (ended.code, ended.error) == (0, None), ended.err
    shown = rows(here / "pooled")
    assert shown["E"] == "0.4500, 0.4500"  # .9 sigma
    assert shown["images"].startswith("12 (12 listed images of train), 16 draws each")
    stored = [d for r in records(here / "pooled") for d in r["norms"]]
    assert len(stored) == 12 * 16
    assert all(len(d) == 2 for d in stored)
    left, right = (float(v) for v in shown["largest defect seen"].split(", "))
    assert left == pytest.approx(0.5 * max(d[0] for d in stored), abs=1e-4)
    assert right == pytest.approx(0.5 * max(d[1] for d in stored), abs=1e-4)
    q = float(shown["fraction that E covers (q_E)"].removeprefix("at least "))
    assert 0 < q <= sum(max(d) <= 0.9 for d in stored) / len(stored)
    assert "at random" in shown["not proved"]


def test_several_sigmas_keep_their_units(here):
    run_main("bound", *PLAIN, *POOLED, "noise=by_part", "noise.sigma=[0.3,0.6]", "store=parts")
    assert "E in units of the noise's sigmas" in rows(here / "parts")["inputs"]
    ended = run_main("bound", *PLAIN, "error=base", "noise=none", "images.first=2", "store=none")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert rows(here / "none")["largest defect seen"] == "none measured"


OWN = """
import torch

class Darker(torch.nn.Module):
    lipschitz, linear = 1.0, True

    def forward(self, x):
        return x * {share}
"""


def test_a_changed_step_of_ones_own_is_another_one(checkpoint, here, monkeypatch):
    """E of a filter that leaves a quarter is no bound for one that leaves all, and a store is not gone on with."""
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    options = (*SMALL, "preprocess=none", "+preprocess.steps=[{_target_:darker_for_a_test.Darker}]", "images.first=1")
    certify = ("certify", *options, f"checkpoint={checkpoint}", "store=run")
    for share in (0.25, 1.0):
        (here / "darker_for_a_test.py").write_text(OWN.format(share=share))
        sys.modules.pop("darker_for_a_test", None)
        if share < 1:
            run_task(*certify)
            run_task("bound", *options, "store=made")
        else:
            one_sentence(run_main(*certify), "own code differs")
            one_sentence(run_main(*certify[:-1], "bounds=made", "store=new"), "darker_for_a_test", "bound")
    sys.modules.pop("darker_for_a_test")


MINE = """
from gsmooth_lightning.certify import JointCertifier

class Mine(JointCertifier):
    generous = {generous}
"""


def test_a_changed_theorem_of_ones_own_is_another_one(checkpoint, here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    line = ("certify", *SMALL, "certify._target_=theorem_for_a_test.Mine", "images.first=1", f"checkpoint={checkpoint}")
    (here / "theorem_for_a_test.py").write_text(MINE.format(generous=False))
    run_task(*line, "store=run")
    (here / "theorem_for_a_test.py").write_text(MINE.format(generous=True))
    one_sentence(run_main(*line, "store=run"), "own code differs")
    sys.modules.pop("theorem_for_a_test")


LOUDER = ("threat=volume", "transform=volume", "threat.saved=16bit", "law.sigma=3", "preprocess=none", "data.size=8")


def test_table_of_a_bound_that_follows_the_attack(here):
    """A curve of rows (radius, E), which clipping makes, is still one of pixels: E in l2, sigma times the largest."""
    options = (*QUIET, *LOUDER, "data.enlarge=null", "images.first=4", "noise.sigma=0.2", "store=louder")
    ended = run_main("bound", *options)
    assert (ended.code, ended.error) == (0, None), ended.err
    stored, shown = records(here / "louder"), rows(here / "louder")
    assert all(len(r["curve"]) > 1 and {len(row) for row in r["curve"]} == {2} for r in stored)
    errors = sorted(0.2 * r["value"] for r in stored)
    assert shown["inputs"].endswith("E in l2, sigma 0.2")
    assert float(shown["E, 50% quantile over images"]) == pytest.approx((errors[1] + errors[2]) / 2, abs=1e-4)
    assert float(shown["E, 100% quantile over images"]) == pytest.approx(errors[3], abs=1e-4)
    assert float(shown["mean E"]) == pytest.approx(sum(errors) / 4, abs=1e-4)
    assert shown["rho, median and largest"] == "0.0001, 0.0001"
    assert shown["alpha_E an image"] == "0"


def test_table_of_bounds_in_latent_space():
    """Rows (radius, a, E): E stays in units of the noise, and so does M*, of bounds with a slope."""
    made = {"rho": 0.0, "alpha": 0.0, "guarantee": "surrogate", "details": {"start": 0.5}, "parts": [0.3], "slope": 0.0}
    threat = TransformationThreat(Rotation(), -10, 10)
    for slope, name in ((0.0, "E"), (2.0, "M* a degrees")):
        own = {**made, "value": 0.3, "curve": [[0.0, 0.0, 0.1], [4.0, 0.2, 0.3]], "slope": slope, "seconds": 1.0}
        shown = bound_rows([own] * 5, threat, "five", "digits", sigma=0.25)
        levels = "in units of the noise, 50, 90, 99 % of images"
        assert shown[f"{name} {levels}"] == "0.3000, 0.3000, 0.3000"
        assert shown[f"tau(0, x) to x {levels}"] == "0.5000, 0.5000, 0.5000"
        assert not any("l2" in row for row in shown.values())


def test_an_interrupted_calibration_goes_on(checkpoint, here):
    """A part of the calibration images bounds nothing; the same command measures the others, to the same bytes."""
    options = (*PLAIN, *POOLED, "noise.sigma=0.25")
    run_task("bound", *options, "store=whole")
    run_task("bound", *options, "store=torn")
    lines = (here / "torn" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (here / "torn" / "records.jsonl").unlink()
    (here / "torn" / "rank-0.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:30])
    certify = (*options, f"checkpoint={checkpoint}", "bounds=torn", "images.first=1", "store=run")
    one_sentence(run_main("certify", *certify), "its 12 calibration images, and 5 were measured")
    assert "5 (" in run_main("report", "stores=torn", "out=part").out
    run_task("bound", *options, "store=torn")
    assert timeless(here / "torn")["records.jsonl"] == timeless(here / "whole")["records.jsonl"]
    run_task("certify", *certify)
    assert len(records(here / "run")) == 1


def test_a_wider_bound_is_another_run(checkpoint, here):
    """Bounds for a wider range are valid, and certificates with them do not mix with others in a store."""
    options = (*SMALL, "images.first=2")
    run_task("bound", *options, "store=same")
    run_task("bound", *options, "threat.low=-20", "threat.high=20", "store=wide")
    run = (*options, f"checkpoint={checkpoint}", "store=run")
    run_task("certify", *run, "bounds=same", "images.first=1")
    one_sentence(run_main("certify", *run, "bounds=wide"), "bounds differ")
    run_task("certify", *run, "bounds=same")
    assert len(records(here / "run")) == 2


def test_bounds_without_their_configuration_are_refused(checkpoint, here):
    """The classifier and threat that they were made for stand in config.yaml."""
    run_task("bound", *SMALL, "images.first=1", "store=bounds")
    (here / "bounds" / "config.yaml").unlink()
    ended = run_main("certify", *SMALL, f"checkpoint={checkpoint}", "images.first=1", "bounds=bounds", "store=run")
    one_sentence(ended, "bounds has no readable config.yaml")
    assert not (here / "run").exists()


def test_nested_stores_in_reports(checkpoint, here):
    """All draws abstain: no class has most votes. An attack of the flat classifier contradicts nothing nested."""
    nested = ("certify=nested", "error=image_hard", "certify.inner.n=64", "sampling.n0=8", "sampling.n=16")
    kept = [o for o in SMALL if not o.startswith(("noise", "sampling.n"))]
    command = (*kept, "noise.sigma=0.02", f"checkpoint={checkpoint}", "images.first=3")
    run_task("certify", *command, *nested, "store=nested")
    assert all(sum(r["selection"]) == 0 and r["prediction"] == -1 for r in records(here / "nested"))
    run_task("attack", *command, "attack.k=4", "attack.n=16", "store=attacked")
    shown = run_main("report", "stores=[nested,attacked]", "out=both").out
    assert "attacked accuracy, smoothed (worst of k)" in shown
    assert "contradicted" not in shown
    assert rows(here / "both")["smoothed accuracy (most votes)"].startswith("0.000")


def test_mistakes_end_in_one_sentence(checkpoint, here):
    given = f"checkpoint={checkpoint}"
    one_sentence(run_main("compare", *SMALL, given, "bounds=there"), "leave bounds out")
    one_sentence(run_main("bound", *SMALL, "data.enlarge=40.5"), "threat.size", "40.5")
    one_sentence(run_main("bound", *PLAIN, "error=pooled", "error.calibration=5000"), "5000", "training images")
    one_sentence(run_main("bound", *PLAIN, "error=none"), "nothing to bound")
    wrong = ("noise=by_part", "noise.shape=[1,14,14]")
    one_sentence(run_main("bound", *[o for o in SMALL if "noise" not in o], *wrong), "does not fit")
    assert not (here / "runs").exists() or not list((here / "runs").rglob("records.jsonl"))


@pytest.mark.parametrize("group", ["certify", "error"])
def test_a_theorem_or_bound_that_cannot_be_imported_is_one_sentence(checkpoint, tmp_path, group):
    line = ("certify", *SMALL, f"checkpoint={checkpoint}", f"{group}._target_=nonexistent.Foo", f"store={tmp_path}")
    one_sentence(run_main(*line), "there is no nonexistent.Foo to import here")

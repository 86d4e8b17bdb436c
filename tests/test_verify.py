"""`gsmooth verify`: honest runs pass, forged ones are named by image and field, and nothing else is touched."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from conftest import QUIET, SMALL, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning import cli
from gsmooth_lightning.data import Digits, FashionMNIST, ImageFolder
from gsmooth_lightning.tasks.verify import agree, class_names, pick

PIXELS = (
    *QUIET,
    "certify=direct",
    "error=none",
    "threat=l2",
    "transform=identity",
    "preprocess=none",
    "law=none",
    "noise.sigma=0.25",
    "sampling.n0=32",
    "sampling.n=128",
    "images.first=6",
)
TURNED = [o for o in SMALL if not o.startswith(("error.", "images."))]
CHEAP = (*TURNED, "error.search=grid", "error.points=3", "images.first=2")
KINDS = {
    "sequential": (*PIXELS, "sampling=sequential", "sampling.radii=[0,0.1,0.2]", "sampling.n=512"),
    "anytime": (*PIXELS, "sampling=anytime", "sampling.n=512"),
    "soft": (*PIXELS, "votes=soft", "sampling=soft"),
    "top-k": (*PIXELS, "certify.top_k=3"),
    "joint": (*CHEAP, "error.draws=64", "error.choose=32"),
    "nested": (*CHEAP, "certify=nested", "error=image_hard", "error.quantile=0.9", "error.draws=64", "error.choose=32",
               "sampling.n0=4", "sampling.n=20"),
    "enumerate": (*QUIET, "certify=enumerate", "error=none", "law=uniform", "noise=none", "preprocess=none",
                  "threat=cyclic_translation", "transform=cyclic_translation", "images.first=2"),
    "cover": (*QUIET, "certify=cover", "law=none", "error=none", "noise.sigma=0.25", "threat.low=-2", "threat.high=2",
              "sampling.n0=32", "sampling.n=1000", "images.first=2"),
    "calibrated": (*CHEAP, "error=distribution", "error.draws=128", "error.rho=0.2", "error.alpha_inner=0.01",
                   "error.calibration=12"),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """Certifies a few digits under some options."""

    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("run") / "store"
        return run_task("certify", *overrides, f"checkpoint={checkpoint}", f"store={folder}")

    return make


@pytest.fixture(scope="module")
def pixels(store) -> Path:
    """Six digits under pixel noise."""
    return store(*PIXELS)


@pytest.fixture(scope="module")
def calibrated(store) -> Path:
    return store(*KINDS["calibrated"])


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(folder: Path, found: list[Any]) -> None:
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


# ---------------------------------------------------------------- honest runs


@pytest.mark.parametrize("kind", [*KINDS, "pixels"])
def test_an_honest_run_is_verified(kind, store, pixels, calibrated, tmp_path):
    """Whatever the theorem and the plan; in the run's folder the page alone is new."""
    made = {"pixels": pixels, "calibrated": calibrated}.get(kind)
    run = copied(made or store(*KINDS[kind]), tmp_path)
    before = snapshot(run)
    ended = run_main("verify", f"run={run}", "k=2", "seed=5")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    assert "Verified" in ended.out
    assert "k = 2 of" in ended.out
    assert "seed 5" in ended.out
    after = snapshot(run)
    assert after.pop("audit.html")
    assert after == before


def test_what_was_drawn_again_is_what_the_run_holds(pixels, tmp_path):
    """All six images, as records; seconds aside they are equal to the last bit on the same machine."""
    audit = run_task("verify", f"run={pixels}", f"out={tmp_path / 'a' / 'audit.html'}")
    assert (tmp_path / "a" / "audit.html").is_file()
    assert not (pixels / "audit.html").exists()
    timeless = [[{**record, "seconds": 0} for record in found] for found in (audit.again, records(pixels))]
    assert timeless[0] == timeless[1]
    assert len(audit.again) == 6


def test_by_a_folder_alone(pixels, here, monkeypatch, capsys):
    """`gsmooth verify RUN`, as it is typed."""
    shutil.copytree(pixels, here / "a run")
    monkeypatch.setattr(sys, "argv", ["gsmooth", "verify", "a run", "k=1"])
    cli.main()
    said = capsys.readouterr()
    assert said.err == ""
    assert "written: a run/audit.html" in said.out


def test_the_auditor_chooses():
    """k different images of those that are finished, others for another seed, every one sooner or later."""
    done = [{"index": index} for index in (3, 40, 8, 11, 25)]
    assert pick(done, 2, 1) == pick(done[::-1], 2, 1)
    chosen = [tuple(pick(done, 2, seed)) for seed in range(200)]
    assert len(set(chosen)) == 10  # all pairs
    assert {len(set(pair)) for pair in chosen} == {2}
    assert pick(done, 9, 0) == [3, 8, 11, 25, 40]


# ---------------------------------------------------------------- forged ones


def move_a_vote(record, others):
    top = int(np.argmax(record["selection"]))
    record["counts"][top] -= 1
    record["counts"][(top + 1) % 10] += 1


def take_from_another(record, others):
    """Everything that was drawn, of another image with another number of votes: each number follows from the rest."""
    own = {field: record[field] for field in ("index", "label", "input", "base")}
    record.update(next(other for other in others if other["radius"] != record["radius"]) | own)


def setting(**fields) -> Callable[..., None]:
    return lambda record, others: record.update(fields)


FORGERIES: dict[str, tuple[Callable[..., Any], set[str], set[str]]] = {
    # name: (change of a record, fields found wrong by calculation, some of those found wrong by drawing)
    "a vote": (move_a_vote, {"pa", "pb", "radius", "details.region"}, {"counts"}),
    "votes": (lambda r, _: r["counts"].append(9), {"counts"}, {"counts"}),
    "radius": (lambda r, _: r.update(radius=r["radius"] + 0.01), {"radius"}, {"radius"}),
    "below the threat": (setting(radius=-1.0), {"radius"}, {"radius"}),
    "prediction": (lambda r, _: r.update(prediction=(r["prediction"] + 1) % 10), {"prediction"}, {"prediction"}),
    "pA": (setting(pa=0.999), {"pa"}, {"pa"}),
    "label": (lambda r, _: r.update(label=(r["label"] + 1) % 10), {"label"}, {"label"}),
    "alpha": (setting(alpha=1e-4), {"alpha"}, {"alpha"}),
    "n": (setting(n=127), {"n", "counts"}, {"n"}),
    "unit": (setting(unit="linf"), {"unit"}, {"unit"}),
    "seed": (setting(seed=1), {"seed"}, {"seed"}),
    "region": (lambda r, _: r["details"]["region"].update(area=9.0), {"details.region"}, {"details.region"}),
    "input": (setting(input="0" * 16), set(), {"input"}),
    "base": (lambda r, _: r.update(base=(r["base"] + 1) % 10), set(), {"base"}),
    "guarantee": (setting(guarantee="distributional"), set(), {"guarantee"}),
    "a hypothesis": (lambda r, _: r["details"].update(rests_on="nothing"), set(), {"details.rests_on"}),
    "evaluations": (setting(evaluations=1), set(), {"evaluations"}),
    "all that was drawn": (take_from_another, set(), {"counts", "radius", "pa"}),
}


@pytest.fixture(scope="module")
def forged(store, tmp_path_factory):
    """The audit of a run with one forgery an image, and one honest image more."""
    run = store(*PIXELS, f"images.first={len(FORGERIES) + 1}")
    found = records(run)
    for record, (change, _, _) in zip(found, FORGERIES.values(), strict=False):
        change(record, records(run))
    rewrite(run, found)
    return run_task("verify", f"run={run}", f"k={len(found)}")


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_record_is_found(what, forged):
    """By image and field, and no other field by mistake; what no other number tells is found by drawing."""
    _, calculated, drawn = FORGERIES[what]
    own = [d for d in forged.differences if d.image == f"image {list(FORGERIES).index(what)}"]
    by_drawing = {d.field for d in own if d.check == "drawn again"}
    assert drawn <= by_drawing
    if what != "all that was drawn":
        assert by_drawing <= drawn | calculated
    by_calculation = {d.field for d in own if d.check != "drawn again"}
    assert by_calculation <= calculated
    assert bool(by_calculation) == bool(calculated)


def test_honest_images_beside_forged_ones_are_not_named(forged):
    assert {d.image for d in forged.differences} == {f"image {k}" for k in range(len(FORGERIES))}
    assert forged.verdict.startswith("Differs")


def test_a_difference_ends_with_exit_status_1(pixels, tmp_path):
    """Image, field, what is stored and what was found, on stdout and in the page."""
    found = records(pixels)
    found[2]["counts"][3] += 5
    run = copied(pixels, tmp_path)
    rewrite(run, found)
    ended = run_main("verify", f"run={run}")
    assert (ended.code, ended.err, ended.error) == (1, "", None)
    was, now = records(pixels)[2]["counts"][3], found[2]["counts"][3]
    line = f'image 2, counts: stored {{"3": {now}}}, drawn again {{"3": {was}}}'
    assert line in ended.out.splitlines()
    assert "image 2, counts" in (run / "audit.html").read_text()


@pytest.mark.parametrize(
    ("change", "image", "words"),
    [
        (lambda found: found.pop(3), "image 3", "stored nothing"),
        (lambda found: found.insert(1, found[0]), "image 0", "2 times"),
        (lambda found: found.append(found[5] | {"index": 77}), "image 77", "by config.yaml none"),
        (lambda found: found.append(found[5] | {"index": 10**6}), "image 1000000", "the data have no image"),
        (lambda found: found[4].update(counts="many"), "image 4", "no certificate"),
        (lambda found: found[4].update(guarantee="<b>absolute</b>"), "image 4", "no certificate"),
        (lambda found: found[4].pop("details"), "image 4", "no certificate"),
        (lambda found: found[4]["details"].pop("alpha_E"), "image 4", "without its error bounds"),
    ],
)
def test_a_forged_list_is_found(change, image, words, pixels, tmp_path):
    """An image that is missing, listed twice, foreign, or not a record."""
    found = records(pixels)
    change(found)
    run = copied(pixels, tmp_path)
    rewrite(run, found)
    differences = run_task("verify", f"run={run}", "k=0").differences
    assert [d.field for d in differences if d.image == image and words in str(d)] == ["record"]


def test_a_forged_error_bound_is_found(store, tmp_path):
    """A smaller E, with the radius that follows from it, is found by drawing; the radius alone by arithmetic."""
    run = store(*KINDS["joint"])
    found = records(run)
    found[1]["details"]["E"] *= 0.5
    rewrite(run, found)
    audit = run_task("verify", f"run={run}", f"out={tmp_path / 'a.html'}")
    assert {d.image for d in audit.differences} == {"image 1"}
    assert "details.E" in {d.field for d in audit.differences}


def test_forged_calibrations_are_found(calibrated, tmp_path):
    """The defects from which the bound of all images was made are measured again, and E must follow from them."""
    run = copied(calibrated, tmp_path)
    measured = records(run / "bounds")
    measured[4]["norms"][0][0] += 0.5
    rewrite(run / "bounds", measured)
    audit = run_task("verify", f"run={run}", "k=12")
    wrong = {(d.image, d.field) for d in audit.differences}
    assert (f"calibration image {measured[4]['index']}", "norms") in wrong
    found = records(calibrated)
    found[1]["details"]["E"] *= 0.9
    rewrite(run, found)
    again = run_task("verify", f"run={copied(run, tmp_path / 'x')}", "k=0")
    assert ("image 1", "details.E") in {(d.image, d.field) for d in again.differences}


def test_sequential_radii_are_of_the_plan(store, tmp_path):
    """Which radius was passed does not follow from the final votes; that it is one of the plan's is checked."""
    run = store(*KINDS["sequential"])
    found = records(run)
    found[2].update(radius=0.15)
    found[3].update(prediction=(found[3]["prediction"] + 1) % 10)
    rewrite(run, found)
    audit = run_task("verify", f"run={run}", "k=0")
    assert {(d.image, d.field) for d in audit.differences} == {("image 2", "radius"), ("image 3", "prediction")}
    assert any("taken as stored" in note for note in audit.notes)


# ---------------------------------------------------------------- other files, other machines


def test_another_checkpoint_is_refused(pixels, network):
    """As are other data or settings: nothing is drawn, nothing written."""
    before = snapshot(pixels)
    one_sentence(run_main("verify", f"run={pixels}", f"checkpoint={network(*PIXELS)}"), "another checkpoint")
    one_sentence(run_main("verify", f"run={pixels}", "checkpoint=nowhere.ckpt"), "nowhere.ckpt")
    assert snapshot(pixels) == before


@pytest.mark.parametrize("k", [0, 2])
def test_another_configuration_is_refused(k, pixels, tmp_path):
    """config.yaml must say what fingerprint.json says."""
    run = copied(pixels, tmp_path)
    settings = OmegaConf.load(run / "config.yaml")
    settings.noise.sigma = 0.3
    OmegaConf.save(settings, run / "config.yaml")
    one_sentence(run_main("verify", f"run={run}", f"k={k}"), "another noise")


def test_files_may_have_moved(pixels, checkpoint, tmp_path):
    """The checkpoint is told by its bytes, not by its place."""
    run, moved = copied(pixels, tmp_path), tmp_path / "moved.ckpt"
    shutil.copy(checkpoint, moved)
    settings = OmegaConf.load(run / "config.yaml")
    settings.checkpoint = "gone.ckpt"
    OmegaConf.save(settings, run / "config.yaml")
    one_sentence(run_main("verify", f"run={run}"), "gone.ckpt")
    audit = run_task("verify", f"run={run}", f"checkpoint={moved}")
    assert not audit.differences
    assert f"checkpoint={moved}" in audit.command


def test_other_versions_are_said(pixels, tmp_path):
    """On stderr and in the page; then votes may differ in borderline draws, and here they do not."""
    run = copied(pixels, tmp_path)
    identity = json.loads((run / "fingerprint.json").read_text())
    here = identity["versions"]["torch"]
    identity["versions"]["torch"] = "1.0"
    (run / "fingerprint.json").write_text(json.dumps(identity))
    ended = run_main("verify", f"run={run}", "k=1")
    assert ended.code == 0
    assert f"torch 1.0, here {here}" in ended.err
    assert "borderline draws" in ended.err
    assert len(ended.lines) == 1
    assert f"torch 1.0, here {here}" in (run / "audit.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which may repeat a GPU's draws")
def test_draws_of_a_gpu_are_not_repeated_on_a_cpu(pixels, tmp_path):
    """Their generators are others; the numbers alone are checked."""
    run = copied(pixels, tmp_path)
    identity = json.loads((run / "fingerprint.json").read_text()) | {"device": "NVIDIA H200"}
    (run / "fingerprint.json").write_text(json.dumps(identity))
    one_sentence(run_main("verify", f"run={run}"), "NVIDIA H200", "k=0")
    assert run_task("verify", f"run={run}", "k=0").verdict.startswith("Consistent")


def test_older_runs_have_the_defaults_of_newer_options(pixels, tmp_path):
    """A configuration from before several devices, denoisers, surrogates and learned noise."""
    run = copied(pixels, tmp_path)
    settings = OmegaConf.load(run / "config.yaml")
    newer = ("devices", "shard", "denoiser", "denoiser_checkpoint", "denoising", "surrogate", "network", "imitation")
    for option in (*newer, "learned", "scales", "maximise", "bounds", "launcher"):
        settings.pop(option, None)
    settings.trainer.devices = 1
    settings.train.pop("accumulate_grad_batches")
    OmegaConf.save(settings, run / "config.yaml")
    assert run_task("verify", f"run={run}", "k=2").verdict.startswith("Verified")


def test_a_run_of_many_processes_is_verified_by_one(pixels, tmp_path):
    """Whatever its trainer, devices and logger were."""
    run = copied(pixels, tmp_path)
    settings = OmegaConf.load(run / "config.yaml")
    strategy = {"_target_": "pytorch_lightning.strategies.DDPStrategy"}
    other = {"trainer": {"strategy": strategy, "devices": 4, "num_nodes": 2}, "devices": 4, "shard": "draws"}
    OmegaConf.save(OmegaConf.merge(settings, other, {"logger": {"_target_": "nowhere.Logger"}}), run / "config.yaml")
    assert run_task("verify", f"run={run}", "k=2").verdict.startswith("Verified")


def test_a_surrogate_may_have_moved(surrogate_file, network, tmp_path):
    """Wherever its file is named in the configuration, the moved one is meant."""
    coded = (*QUIET, f"surrogate={surrogate_file}", "model=latent", "preprocess=latent", "noise=latent", "law=none")
    trained = run_task("train", *coded, "train.epochs=1", f"store={tmp_path / 'trained'}")
    options = (
        "certify=latent",
        "error=corollary",
        "error.points=3",
        "images.first=2",
        "sampling.n0=16",
        "sampling.n=64",
    )
    run = run_task("certify", *coded, *options, f"checkpoint={trained}", f"store={tmp_path / 'run'}")
    moved = tmp_path / "moved.ckpt"
    shutil.copy(surrogate_file, moved)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(surrogate_file), "gone.ckpt"))
    one_sentence(run_main("verify", f"run={run}"), "gone.ckpt")
    assert run_task("verify", f"run={run}", f"surrogate={moved}").verdict.startswith("Verified")


# ---------------------------------------------------------------- what is not verified, and mistakes


def test_certificates_that_depend_on_those_before_are_not_drawn(store, tmp_path):
    run = store(*PIXELS, "certify=per_input", "certify.steps=1", "images.first=3")
    one_sentence(run_main("verify", f"run={run}"), "certify=per_input", "k=0")
    assert run_task("verify", f"run={run}", "k=0").verdict.startswith("Consistent")


def test_bounds_of_a_wider_range_are_not_drawn(store, checkpoint, tmp_path):
    """A bound that was made for the same range is made again; one for a wider range is of another store."""
    run_task("bound", *KINDS["joint"], f"store={tmp_path / 'bounds'}")
    bounds = (*KINDS["joint"], f"bounds={tmp_path / 'bounds'}")
    same, narrow = store(*bounds), store(*bounds, "threat.low=-9", "threat.high=9")
    shutil.rmtree(tmp_path / "bounds")
    assert run_task("verify", f"run={same}").verdict.startswith("Verified")
    one_sentence(run_main("verify", f"run={narrow}"), "another store", "k=0")
    assert run_task("verify", f"run={narrow}", "k=0").verdict.startswith("Consistent")


def test_a_calibration_that_is_gone(calibrated, tmp_path):
    run = copied(calibrated, tmp_path)
    shutil.rmtree(run / "bounds")
    one_sentence(run_main("verify", f"run={run}"), "calibration", "is missing")


def test_a_run_that_goes_on(pixels, tmp_path):
    """What is finished is verified, and the page says how much that is."""
    run = copied(pixels, tmp_path)
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").unlink()
    (run / "rank-0.jsonl").write_text("".join(lines[:4]) + '{"index": 4, "la')
    audit = run_task("verify", f"run={run}")
    assert audit.verdict.startswith("Verified")
    assert "The run is not finished: 4 of its 6 images are here." in audit.notes


def test_mistakes(pixels, here):
    """One sentence each, and nothing is written."""
    (here / "empty").mkdir()
    one_sentence(run_main("verify", f"run={here / 'empty'}"), "is not a store")
    one_sentence(run_main("verify"), "run")
    for wrong in ("k=-1", "k=many", "seed=-1"):
        one_sentence(run_main("verify", f"run={pixels}", wrong), wrong.split("=")[0], "whole number")
    one_sentence(run_main("verify", f"run={pixels}", "noise.sigma=1"), "noise")
    (here / "file").write_text("")
    one_sentence(run_main("verify", f"run={pixels}", "k=0", f"out={here / 'file' / 'audit.html'}"), "out=FILE")
    assert not (pixels / "audit.html").exists()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", None, "config.yaml"),
        ("config.yaml", "a: [", "config.yaml"),
        ("config.yaml", "- a", "config.yaml"),
        ("records.jsonl", '{"index": 0}\nno\n', "line 2"),
        ("records.jsonl", "", "no finished image"),
        ("fingerprint.json", '{"command": "attack"}', "attack run"),
    ],
)
def test_damaged_runs(file, content, words, pixels, tmp_path):
    run = copied(pixels, tmp_path)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    one_sentence(run_main("verify", f"run={run}"), words)


# ---------------------------------------------------------------- parts


def test_values_that_agree():
    """Numbers to nine digits, everything else exactly."""
    assert agree(0.1 + 0.2, 0.3)
    assert agree({"a": [1, 2.0, None]}, {"a": [1, 2, None]})
    assert agree(float("inf"), float("inf"))
    for a, b in (
        (1.0, 1.00001),
        (float("nan"), float("nan")),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        (1, 2),
        (None, 0.0),
    ):
        assert not agree(a, b)
        assert not agree(b, a)


def test_class_names(tmp_path):
    """A folder for each class names it, some data sets know their own, others have none."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    animals = ImageFolder(str(tmp_path), 8)
    assert class_names(animals, animals.split("test", 2)) == {0: "cat", 1: "dog"}
    digits = Digits().split("test", 10)
    assert class_names(Digits(), digits) == {}
    assert class_names(FashionMNIST(""), digits)[9] == "Ankle boot"

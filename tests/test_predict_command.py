"""`gsmooth predict`: files with the classifier of a run, and the run's classifier as a module."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits

import layouts
from conftest import QUIET, SMALL, Ended, compose, one_sentence, records, run_main, run_task, shell, snapshot
from gsmooth_lightning.data.digits import BOUNDS
from gsmooth_lightning.tasks.setup import data_module

TIMES = {"seconds"}


@pytest.fixture(scope="module")
def run(certified: Path) -> str:
    return f"run={certified}"


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve test digits as PNG, 8x8 and 8 bits."""
    folder = tmp_path_factory.mktemp("scans")
    first = BOUNDS["test"][0]
    for k, digit in enumerate(load_digits().images[first : first + 12]):
        Image.fromarray(np.round(digit * 255 / 16).astype(np.uint8)).save(folder / f"{k:02d}.png")
    return folder


def lines(ended: Ended, errors: int = 0) -> list[dict[str, Any]]:
    """The lines that a command printed; of the last `errors` kinds of mistakes it made none."""
    assert ended.error is None, ended.error
    assert ended.code == (2 if errors else 0), ended.err
    found = [json.loads(line) for line in ended.out.splitlines()]
    assert sum("error" in line for line in found) == errors
    return found


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


# ---------------------------------------------------------------- what is predicted


def test_a_folder_of_digits(run, certified, scans):
    """A line each, sorted by name; images that are certified in the run get the same prediction."""
    found = lines(ended := run_main("predict", run, f"files={scans}"))
    assert ended.err == ""
    assert [line["file"] for line in found] == [str(scans / f"{k:02d}.png") for k in range(12)]
    certificates = {r["index"]: r["prediction"] for r in records(certified) if r["prediction"] >= 0}
    assert len(certificates) >= 3
    assert {k: found[k]["prediction"] for k in certificates} == certificates
    for line in found:
        assert set(line) == {
            "file", "prediction", "class", "alpha", "n", "counts", "evaluations", "seconds", "seed", "input",
        }  # fmt: skip
        assert line["n"] == sum(line["counts"]) <= line["evaluations"]
        assert line["prediction"] in (int(np.argmax(line["counts"])), -1)
        assert (line["alpha"], line["seed"], line["class"]) == (1e-3, 0, None)
    assert min(line["n"] for line in found) == 64


def test_a_file_gets_the_same_line_in_any_company(run, scans):
    """Alone, in a list, in another order, and as a copy with another name."""
    whole = {line["file"]: timeless(line) for line in lines(run_main("predict", run, f"files={scans}"))}
    copy = scans.parent / f"{scans.name}-copy.png"
    shutil.copy(scans / "07.png", copy)
    some = [scans / "07.png", copy, scans / "02.png", scans / "07.png"]
    found = lines(run_main("predict", run, f"files=[{','.join(map(str, some))}]"))
    assert [line["file"] for line in found] == list(map(str, some[:3]))  # each once
    assert [timeless(found[0]), timeless(found[2])] == [whole[str(some[0])], whole[str(some[2])]]
    assert timeless(found[1]) == whole[str(some[0])] | {"file": str(copy)}


def test_files_of_the_attacked_size_are_the_runs_inputs(run, certified, tmp_path):
    """The prepared 28x28 digit, saved as it is: the input that was certified, byte by byte."""
    cfg = OmegaConf.load(certified / "config.yaml")
    threat = instantiate(cfg.threat)
    for record in records(certified):
        x = threat.prepare(data_module(cfg).image(record["index"])[None])[0, 0]
        Image.fromarray((x * 255).round().byte().numpy()).save(tmp_path / f"{record['index']}.png")
    found = lines(run_main("predict", run, f"files={tmp_path}"))
    assert [line["input"] for line in found] == [record["input"] for record in records(certified)]


def test_options_of_the_draws(run, scans):
    """alpha, n and seed are the user's; two draws more or less change nothing but the draws."""
    file = f"files={scans / '02.png'}"
    (line,) = lines(run_main("predict", run, file, "alpha=0.01", "n=20", "seed=18446744073709551615"))
    assert (line["alpha"], line["n"], line["seed"], line["evaluations"]) == (0.01, 20, 2**64 - 1, 64)
    (other,) = lines(run_main("predict", run, file, "alpha=0.01", "n=20", "seed=1"))
    assert other["counts"] != line["counts"] or other["prediction"] == line["prediction"]
    assert other["input"] == line["input"]


def test_lines_go_to_a_file(run, scans, here):
    """The file is there when all is done, and never overwritten; nothing is printed."""
    ended = run_main("predict", run, f"files={scans}", "out=lines.jsonl")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert sorted(p.name for p in here.iterdir()) == ["lines.jsonl"]
    printed = lines(run_main("predict", run, f"files={scans}"))
    written = [json.loads(line) for line in (here / "lines.jsonl").read_text().splitlines()]
    assert list(map(timeless, written)) == list(map(timeless, printed))
    before = snapshot(here)
    one_sentence(run_main("predict", run, f"files={scans}", "out=lines.jsonl"), "lines.jsonl exists")
    one_sentence(run_main("predict", run, "export=lines.jsonl"), "lines.jsonl exists")
    one_sentence(
        run_main("predict", run, f"files={scans}", "out=no/lines.jsonl"), "there is no folder for no/lines.jsonl"
    )
    assert snapshot(here) == before


# ---------------------------------------------------------------- mistakes


def spoiled(path: Path, kind: str) -> Path:
    """Writes a file that is no 8x8 grey image."""
    if kind == "text":
        path.write_text("no picture\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:70])
    elif kind == "coloured":
        layouts.picture(path)
    elif kind == "sixteen bits":
        Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)
    elif kind == "floats":
        path = path.with_suffix(".tiff")
        Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(path)
    elif kind == "oblong":
        Image.new("L", (8, 11)).save(path)
    elif kind == "large":
        Image.new("L", (40, 40)).save(path)
    elif kind == "sound":
        path = path.with_suffix(".wav")
        soundfile.write(path, np.zeros(100, np.int16), 16_000)
    return path


SPOILED = {
    "text": "cannot be read (cannot identify image file",
    "empty": "cannot be read (cannot identify image file",
    "cut": "cannot be read (",
    "coloured": "has colours, and this classifier is of grey images",
    "sixteen bits": "cannot be read (its pixels have more than 8 bits: save it with 8)",
    "floats": "cannot be read (its pixels have more than 8 bits: save it with 8)",
    "oblong": "makes an input of 1x38x28, and this classifier is for 1x28x28",
    "large": "is of 40x40 pixels, and images are enlarged to 28, not reduced",
    "sound": "cannot be read (cannot identify image file",
}


@pytest.mark.parametrize(("kind", "words"), SPOILED.items())
def test_a_file_that_is_no_input_is_named(run, here, kind, words):
    """Its line says why, and so does the one sentence at the end."""
    path = spoiled(here / "own.png", kind)
    ended = run_main("predict", run, f"files={path.name}")
    one_sentence(ended, "1 of 1 files have no prediction", f"{path.name} {words}")
    (line,) = lines(ended, errors=1)
    assert set(line) == {"file", "error"}
    assert line["file"] == path.name
    assert f"{path.name} {words}" in line["error"]


def test_bad_files_do_not_lose_the_others(run, scans, here):
    """The others have their lines, in order, and the file of lines is there; exit status 2 at the end."""
    shutil.copytree(scans, here / "own")
    for kind in ("text", "coloured"):
        spoiled(here / "own" / f"05-{kind}.png", kind)
    ended = run_main("predict", run, "files=own", "out=lines.jsonl")
    one_sentence(ended, "2 of 14 files have no prediction; own/05-coloured.png has colours")
    found = [json.loads(line) for line in (here / "lines.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in found if "error" in line] == ["05-coloured.png", "05-text.png"]
    clean = lines(run_main("predict", run, f"files={scans}"))
    kept = [timeless(line) | {"file": ""} for line in found if "error" not in line]
    assert kept == [timeless(line) | {"file": ""} for line in clean]
    assert [line["file"] for line in found] == sorted(line["file"] for line in found)


def test_a_network_that_fails_on_one_file(here):
    """A black box that knows no class for bright images: their files are named, the others predicted."""
    (here / "mine.py").write_text("def labels(x):\n    return (9 * (x.mean((1, 2, 3)) > 0.9) + 1).long()\n")
    sys.path.insert(0, str(here))
    try:
        options = ("data.size=8", "data.enlarge=null", "model=black_box", "model.function.path=mine.labels")
        plain = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none", "certify=direct")
        small = ("noise.sigma=0.1", "sampling.n0=8", "sampling.n=64", "images.first=1", "store=run")
        run_task("certify", *QUIET, *options, *plain, *small)
        for name, grey in (("a", 10), ("b", 255), ("c", 99)):
            Image.new("L", (8, 8), grey).save(f"{name}.png")
        ended = run_main("predict", "run=run", "files=[a.png,b.png,c.png]")
        one_sentence(ended, "1 of 3 files have no prediction; b.png: the network returned NaN", "labels beyond 9")
        assert [line.get("prediction") for line in lines(ended, errors=1)] == [1, None, 1]
        one_sentence(run_main("predict", "run=run", "export=box.pt2"), "a black box", "nothing to export")
    finally:
        sys.path.remove(str(here))
        sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("give files=PATH to predict, or export=FILE.pt2",)),
        (("files=own.png", "export=own.pt2"), ("give files=PATH to predict, or export=FILE.pt2",)),
        (("files=missing.png",), ("there is no file or folder missing.png",)),
        (("files=[own.png,missing]",), ("there is no file or folder missing",)),
        (("files=folder",), ("folder holds no files that end in .jpg", "correct files=")),
        (("files=[]",), ("files=[] names nothing",)),
        (("files=own.png", "n=5"), ("n=5 votes for one class decide nothing",)),
        (("files=own.png", "n=many"), ("n must be a whole number",)),
        (("files=own.png", "alpha=0.7"), ("alpha must lie between 0 and 0.5",)),
        (("files=own.png", "alpha=null"), ("alpha must lie between 0 and 0.5",)),
        (("files=own.png", "seed=-1"), ("seed must be a whole number from 0",)),
        (("files=own.png", "seed=18446744073709551616"), ("seed must be a whole number from 0",)),
        (("files=own.png", "device=abacus"), ("there is no device 'abacus' here",)),
        (("files=own.png", "checkpoint=missing.ckpt"), ("missing.ckpt",)),
        (("files=own.png", "noise.sigma=1"), ("noise",)),
        (("export=no/own.pt2",), ("there is no folder for no/own.pt2",)),
        (("export=own.pt2", "n=5"), ("n=5 votes for one class decide nothing",)),
    ],
)
def test_mistakes_end_in_one_sentence(run, scans, here, arguments, words):
    """Nothing is printed or written."""
    shutil.copy(scans / "00.png", here / "own.png")
    (here / "folder").mkdir()
    (here / "folder" / "notes.txt").write_text("nothing\n")
    before = snapshot(here)
    ended = run_main("predict", run, *arguments)
    one_sentence(ended, *words)
    assert ended.out == ""
    assert snapshot(here) == before


# ---------------------------------------------------------------- which classifier


def changed(certified: Path, folder: Path, **options: Any) -> Path:
    """A copy of a store with other settings in its configuration."""
    shutil.copytree(certified, folder)
    cfg = OmegaConf.load(folder / "config.yaml")
    for key, value in options.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    OmegaConf.save(cfg, folder / "config.yaml")
    return folder


def test_another_classifier_is_refused(run, certified, checkpoint, scans, here):
    """Other weights, or settings that were edited: the fingerprint of the run does not agree."""
    content = torch.load(checkpoint, weights_only=True)
    next(iter(content["state_dict"].values())).mul_(1.01)
    torch.save(content, "other.ckpt")
    one_sentence(run_main("predict", run, f"files={scans}", "checkpoint=other.ckpt"), "checkpoint differs")
    for name, options in {
        "noise": {"noise__sigma": 0.3},
        "block": {"block": 32},
        "votes": {"votes": "soft"},
        "threat": {"threat__saved": "float"},
        "law": {"law__sigma": 25},
    }.items():
        folder = changed(certified, here / name, **options)
        one_sentence(run_main("predict", f"run={folder}", f"files={scans}"), f"{name} differ")


def test_a_checkpoint_that_moved(certified, checkpoint, scans, here):
    """The bytes count, not the place; without it the sentence says what to correct."""
    folder = changed(certified, here / "copy", checkpoint="gone.ckpt")
    one_sentence(run_main("predict", f"run={folder}", f"files={scans}"), "gone.ckpt", "checkpoint=")
    shutil.copy(checkpoint, "moved.ckpt")
    found = lines(run_main("predict", f"run={folder}", f"files={scans}", "checkpoint=moved.ckpt"))
    same = lines(run_main("predict", f"run={certified}", f"files={scans}"))
    assert list(map(timeless, found)) == list(map(timeless, same))


def test_another_backend_or_version_is_said(certified, scans, here):
    """Once on stderr, and in every line; the answers stand."""
    folder = changed(certified, here / "copy", backend="plain")
    made_by = json.loads((folder / "fingerprint.json").read_text())
    made_by["versions"]["torch"] = "2.0"
    (folder / "fingerprint.json").write_text(json.dumps(made_by))
    ended = run_main("predict", f"run={folder}", f"files={scans}")
    found = lines(ended)
    (said,) = ended.lines
    assert "backend plain instead of fx" in said
    assert f"torch {torch.__version__} instead of 2.0" in said
    assert "certificates" in said
    differs = {"backend": ["fx", "plain"], "torch": ["2.0", torch.__version__]}
    assert [line["differs"] for line in found] == [differs] * 12


def test_a_surrogate_that_moved(here):
    """Parts that named ${surrogate} follow the file; the identity is that of its bytes."""
    small = (*QUIET, "data.size=8", "data.enlarge=null", "threat=zoom_blur", "transform=zoom_blur", "threat.high=0.1")
    surrogate = run_task("surrogate", *small, "network.widths=[8]", "network.latent=8", "train.epochs=1", "store=made")
    latent = (*small, "model=latent", "preprocess=latent", "noise=latent", "law=none", "noise.law.sigma=0.1")
    latent = (*latent, "model.classifier.widths=[4,4]", "model.classifier.hidden=8", f"surrogate={surrogate}")
    torch.save(instantiate(compose("certify", *latent).model).state_dict(), "network.ckpt")
    few = ("error=corollary", "certify=latent", "sampling.n0=32", "sampling.n=64", "images.first=1")
    run_task("certify", *latent, *few, "checkpoint=network.ckpt", "store=run")
    Image.new("L", (8, 8), 100).save("own.png")
    before = lines(run_main("predict", "run=run", "files=own.png", "n=64"))
    moved = shutil.move(surrogate, here / "elsewhere.ckpt")
    one_sentence(run_main("predict", "run=run", "files=own.png", "n=64"), "surrogate")
    after = lines(run_main("predict", "run=run", "files=own.png", "n=64", f"surrogate={moved}"))
    assert list(map(timeless, after)) == list(map(timeless, before))


def test_a_full_disk(run, scans, here):
    """What cannot be written ends in one sentence; the file of lines is not there."""
    (here / "lines.jsonl.part").symlink_to("/dev/full")
    one_sentence(run_main("predict", run, f"files={scans}", "out=lines.jsonl"), "cannot write lines.jsonl (No space")
    assert not (here / "lines.jsonl").exists()


def test_what_is_no_certification_is_refused(certified, scans, here):
    """No store; a store of another command; and classifiers that are no votes at the input."""
    file = f"files={scans / '00.png'}"
    one_sentence(run_main("predict", file), "run")
    one_sentence(run_main("predict", "run=.", file), "not a store")
    for theorem, words in (("Nested", "certifies a classifier of nested votes"), ("PerInput", "remembers its inputs")):
        folder = changed(certified, here / theorem, certify___target_=f"gsmooth_lightning.certify.{theorem}Certifier")
        one_sentence(run_main("predict", f"run={folder}", file), words)
    made_by = json.loads((folder / "fingerprint.json").read_text())
    (folder / "fingerprint.json").write_text(json.dumps(made_by | {"command": "attack"}))
    one_sentence(run_main("predict", f"run={folder}", file), "was written by `gsmooth attack`")


def test_soft_votes(checkpoint, scans, here):
    """Classes by the mean vote; sums of votes in the line; a module counts hard votes only."""
    soft = ("votes=soft", "sampling=soft", "sampling.n0=32", "sampling.n=128", f"checkpoint={checkpoint}")
    few = [o for o in SMALL if not o.startswith("sampling.")]
    run_task("certify", *few, *soft, "store=run")
    found = lines(run_main("predict", "run=run", f"files={scans}", "n=400"))
    assert sum(line["prediction"] >= 0 for line in found) >= 3
    for line in found:
        assert sum(line["counts"]) == pytest.approx(line["n"], rel=1e-5)
        assert line["prediction"] in (int(np.argmax(line["counts"])), -1)
    one_sentence(run_main("predict", "run=run", "export=own.pt2"), "counts hard votes")


# ---------------------------------------------------------------- the module

ALONE = """
import json, sys, warnings
import torch
from PIL import Image
import numpy as np
warnings.simplefilter("ignore")
about = {"gsmooth.json": ""}
run = torch.export.load("digits.pt2", extra_files=about).module()
assert not [name for name in sys.modules if name.startswith(("gsmooth", "pytorch_lightning", "hydra", "torchvision"))]
found = []
for name in sys.argv[1:]:
    x = torch.from_numpy(np.array(Image.open(name))).float()[None] / 255
    found.append([[int(p), v.tolist()] for p, v in (run(x), run(x))])
print(json.dumps({"found": found, "about": json.loads(about["gsmooth.json"])}))
"""


def test_a_module_runs_with_torch_alone(run, certified, scans, here):
    """Written by the command with the plain network; a process without this package loads it, and agrees with the
    predictor wherever both are sure; counts add up to n, and two calls differ."""
    ended = run_main("predict", run, "export=digits.pt2", "n=400")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert (
        ended.out == "written: digits.pt2, from 1x28x28 pixels in [0, 1] to (class or -1, votes of 400 draws), on cpu\n"
    )
    (said,) = ended.lines
    assert "backend plain instead of fx" in said
    cfg = OmegaConf.load(certified / "config.yaml")
    threat = instantiate(cfg.threat)
    for k in range(12):
        x = threat.prepare(data_module(cfg).image(k)[None])[0, 0]
        Image.fromarray((x * 255).round().byte().numpy()).save(f"{k:02d}.png")
    alone = shell(sys.executable, "-c", ALONE, *sorted(p.name for p in here.glob("*.png")), cwd=here)
    assert alone.code == 0, alone.err
    result = json.loads(alone.out)
    assert (result["about"]["n"], result["about"]["alpha"], result["about"]["names"]) == (400, 1e-3, None)
    expected = {**json.loads((certified / "fingerprint.json").read_text()), "backend": "plain"}
    assert all(expected[key] == value for key, value in result["about"]["identity"].items())
    predicted = lines(run_main("predict", run, "files=."))
    agree = 0
    for line, calls in zip(predicted, result["found"], strict=True):
        assert [sum(votes) for _, votes in calls] == [400, 400]
        for prediction, votes in calls:
            assert prediction in (int(np.argmax(votes)), -1)
            if -1 not in (prediction, line["prediction"]):
                assert prediction == line["prediction"]
                agree += 1
    assert agree >= 18
    assert any(first != second for first, second in result["found"])

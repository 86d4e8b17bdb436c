"""`gsmooth attack` on pixels: ours, torchattacks', foolbox's and a user's own, joined with certificates in a report."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from conftest import QUIET, one_sentence, records, run_main, run_task, snapshot, timeless

PIXELS = (*QUIET, "data.size=8", "data.enlarge=null", "threat=l2", "transform=identity", "preprocess=none", "law=none")
PIXELS = (*PIXELS, "model.widths=[8,16]", "model.hidden=32", "error=none", "noise.sigma=0.2")
EPSILONS = [0.15, 0.6]
MAKE, CALL = "attack.craft.make", "attack.craft.attack"
ATTACK = (*PIXELS, "images.first=3", "attack.epsilons=[0.15,0.6]", "attack.draws=4", "attack.n=64")


def own_attack(model, inputs, labels, epsilons, share=1.0):
    """A user's attack, called as those of foolbox: one step along the gradient."""
    x = inputs.clone().requires_grad_()
    (up,) = torch.autograd.grad(-model(x).gather(1, labels[:, None]).sum(), x)
    changed = (inputs + share * epsilons * up / up.norm()).clamp(*model.bounds)
    return changed, changed, None


class OwnMake:
    """A user's attack, called as those of torchattacks."""

    def __init__(self, model, eps, share=1.0):
        self.model, self.eps, self.share = model, eps, share

    def __call__(self, images, labels):
        x = images.clone().requires_grad_()
        (up,) = torch.autograd.grad(-self.model(x).gather(1, labels[:, None]).sum(), x)
        return images + self.share * self.eps * up / up.norm()


KINDS = {
    "pgd": (("attack=pgd", "attack.craft.attack.steps=5"), "pgd"),
    "torchattacks": (("attack=torchattacks", "+attack.craft.make.steps=5"), "torchattacks PGDL2"),
    "foolbox": (
        ("attack=foolbox", f"+{CALL}.steps=10", f"+{CALL}.rel_stepsize=0.3"),
        "foolbox L2ProjectedGradientDescentAttack",
    ),
    "own make": (
        ("attack=torchattacks", f"{MAKE}._target_={__name__}.OwnMake", f"+{MAKE}.share=0.9"),
        f"{__name__} OwnMake",
    ),
    "own attack": (
        (
            "attack=foolbox",
            f"attack.craft.attack._target_={__name__}.own_attack",
            "+attack.craft.attack._partial_=true",
        ),
        f"{__name__} own_attack",
    ),
}


@pytest.fixture(scope="module")
def network_file(tmp_path_factory) -> Path:
    store = tmp_path_factory.mktemp("classifier")
    return run_task("train", *PIXELS, "train.epochs=2", "train.batch_size=32", f"store={store}")


@pytest.fixture(scope="module")
def certificates(network_file, tmp_path_factory) -> Path:
    store, sampling = tmp_path_factory.mktemp("certificates"), ("sampling.n0=64", "sampling.n=1000")
    run = (*PIXELS, "certify=direct", "images.first=6", *sampling, f"checkpoint={network_file}", f"store={store}")
    return run_task("certify", *run)


@pytest.fixture(scope="module")
def attacked(network_file, tmp_path_factory) -> Path:
    """A finished store of PGD on three of the six images."""
    store = tmp_path_factory.mktemp("attacked")
    return run_task("attack", *ATTACK, *KINDS["pgd"][0], f"checkpoint={network_file}", f"store={store}")


def lines(out: str) -> dict[str, str]:
    """A printed table of one column, by the names of its rows."""
    rows = (re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines() if re.match(r"\S.*\s{2,}\S", line))
    return dict(rows)


def accuracy(store: Path, classifier: str, epsilon: float) -> float:
    """Share of images whose tries up to epsilon all keep the label."""
    kept = [
        all(c == r["label"] for c, (e,) in zip(r[classifier], r["gammas"], strict=True) if e <= epsilon)
        for r in records(store)
    ]
    return sum(kept) / len(kept)


# ---------------------------------------------------------------- from attack to report


@pytest.mark.parametrize("kind", KINDS)
def test_attack_and_report(kind, network_file, certificates, here):
    """Two lines for each epsilon, the shares of images whose tries up to it keep the label; a sound certificate is not
    contradicted, and every file lies where its record says."""
    options, name = KINDS[kind]
    ended = run_main("attack", *ATTACK, *options, f"checkpoint={network_file}", "store=run")
    assert (ended.code, ended.error) == (0, None), ended.err
    found = records(here / "run")
    assert [r["index"] for r in found] == [0, 1, 2]
    for r in found:
        assert r["gammas"] == [[0], [0.15], [0.15], [0.6], [0.6]]
        assert r["distances"][0] == 0
        assert all(0 < d <= e * (1 + 1e-6) for d, (e,) in zip(r["distances"][1:], r["gammas"][1:], strict=True))
        assert len(r["votes"]) == len(r["base"]) == 5
    ended = run_main("report", f"stores=[{certificates},run]", "out=report")
    assert (ended.code, ended.error) == (0, None), ended.err
    table = lines(ended.out)
    shown = [row for row in table if row.startswith("attacked accuracy")]
    assert shown == [f"attacked accuracy, {c} ({name}) up to {e} l2" for e in EPSILONS for c in ("base", "smoothed")]
    for epsilon in EPSILONS:
        for classifier in ("base", "smoothed"):
            share = accuracy(here / "run", classifier, epsilon)
            assert table[f"attacked accuracy, {classifier} ({name}) up to {epsilon} l2"].startswith(f"{share:.3f}  [")
    assert accuracy(here / "run", "base", 0.6) < accuracy(here / "run", "base", 0.15)
    assert table[f"certificates contradicted by the attack ({name})"] == "0 of 3 attacked"
    assert (here / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_attack_without_certificates(attacked, here):
    table = lines(run_main("report", f"stores=[{attacked}]", "out=report").out)
    assert sum(row.startswith("attacked accuracy") for row in table) == 4
    assert table["inputs"] == "pixels in [0, 1]; distances in l2"
    assert not any("contradicted" in row for row in table)


def doctored(store: Path, certificates: Path, folder: Path) -> Path:
    """A copy of an attack's store in which a file at half the certified radius of image 0 is of another class."""
    shutil.copytree(store, folder)
    found, certificate = records(store), records(certificates)[0]
    assert certificate["radius"] > 0.05
    other = (certificate["prediction"] + 1) % 10
    found[0]["distances"][1] = certificate["radius"] / 2
    found[0]["smoothed"][1] = other
    found[0]["votes"][1] = [64 * (k == other) for k in range(10)]
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    return folder


def test_a_contradiction_is_counted(attacked, certificates, here):
    spoiled = doctored(attacked, certificates, here / "spoiled")
    table = lines(run_main("report", f"stores=[{certificates},{spoiled}]", "out=report").out)
    assert table["certificates contradicted by the attack (pgd)"] == "1 of 3 attacked"


def test_a_contradiction_is_not_hidden_by_another_attack_of_that_name(attacked, certificates, network_file, here):
    """The same attack with another effort, reported after it."""
    spoiled = doctored(attacked, certificates, here / "spoiled")
    options = (*ATTACK, "attack=pgd", "attack.craft.attack.steps=1", f"checkpoint={network_file}", "store=weaker")
    run_task("attack", *options)
    ended = run_main("report", f"stores=[{certificates},{spoiled},weaker]", "out=report")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert "1 of 3 attacked" in ended.out


def test_attacks_beside_certified_areas(attacked, certificates, here):
    """The mean axis of an ellipsoid is no radius of a ball: an attack's norms are compared with l2, or refused."""
    ended = run_main("report", f"stores=[{certificates},{attacked}]", "area=true", "out=report")
    if ended.code == 2:
        one_sentence(ended, "area")
    else:
        assert (ended.code, ended.error) == (0, None), ended.err


def test_attacks_on_other_networks_and_norms_are_not_joined(attacked, certificates, network_file, here):
    run = (*ATTACK, *KINDS["pgd"][0], f"checkpoint={network_file}", "threat=linf", "store=linf")
    run_task("attack", *run)
    one_sentence(run_main("report", f"stores=[{certificates},linf]", "out=report"), "threat")
    content = torch.load(network_file, weights_only=True)
    torch.save(content | {"epoch": 99}, here / "other.ckpt")
    run_task("attack", *ATTACK, *KINDS["pgd"][0], "checkpoint=other.ckpt", "store=other")
    one_sentence(run_main("report", f"stores=[{certificates},other]", "out=report"), "checkpoint")


def test_a_resumed_run_ends_in_the_same_bytes(network_file, here):
    """Two images and then the others, one by one, as all at once; from random starts."""
    options = (*ATTACK, *KINDS["torchattacks"][0], f"checkpoint={network_file}", "attack.epsilons=[0.3]")
    run_task("attack", *options, "store=whole")
    run_task("attack", *options, "images.first=2", "images.in_flight=1", "store=part")
    finished = (here / "part" / "records.jsonl").read_bytes().splitlines(keepends=True)
    (here / "part" / "records.jsonl").unlink()
    (here / "part" / "rank-0.jsonl").write_bytes(finished[0] + finished[1][:40])
    run_task("attack", *options, "images.in_flight=1", "store=part")
    assert timeless(here / "part")["records.jsonl"] == timeless(here / "whole")["records.jsonl"]
    before = snapshot(here / "whole")
    run_task("attack", *options, "store=whole")
    assert snapshot(here / "whole") == before


def test_a_black_box_is_attacked_by_its_labels(here):
    """No checkpoint and no gradients: by contrast reduction, not by PGD."""
    base = [o for o in ATTACK if not o.startswith("model.")]
    run = (*base, "model=black_box", f"model.function.path={__name__}.bright", "data.classes=10", "store=run")
    one_sentence(run_main("attack", *run, "attack=pgd"), "image 0")
    shutil.rmtree(here / "run", ignore_errors=True)
    search = "attack.craft.attack._target_=foolbox.attacks.L2ContrastReductionAttack"
    assert run_main("attack", *run, "attack=foolbox", search).code == 0
    assert len(records(here / "run")) == 3


def bright(x: torch.Tensor) -> torch.Tensor:
    """Class 4, or 6 for bright pictures."""
    return 4 + 2 * (x.flatten(1).mean(1) > 0.35).long()


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "a rotation": (("attack=pgd", "threat=rotation", "transform=rotation", "law=gaussian"), ("pixels", "threat=l2")),
    "a rotation, by torchattacks": (
        ("attack=torchattacks", "threat=rotation", "transform=rotation", "law=gaussian"),
        ("changes pixels", "threat=l2"),
    ),
    "pixels, by parameters": (("attack=worst_of_k",), ("parameters", "threat=rotation", "attack=pgd")),
    "l1, by PGD": (("attack=pgd", "threat=l1"), ("l2, linf", "'l1'")),
    "no epsilons": (("attack=pgd", "attack.epsilons=[]"), ("attack.epsilons must list norms",)),
    "a negative epsilon": (("attack=foolbox", "attack.epsilons=[0.5,-1]"), ("attack.epsilons must list norms",)),
    "one number": (("attack=pgd", "attack.epsilons=0.5"), ("attack.epsilons must list norms", "0.5")),
    "an endless epsilon": (("attack=pgd", "attack.epsilons=[inf]"), ("inf",)),
    "no steps": (("attack=pgd", f"{CALL}.steps=0"), ("steps >= 1",)),
    "no such library": (("attack=torchattacks", f"{MAKE}._target_=nosuch.PGD"), (MAKE, "nosuch", "installed")),
    "an option of no torchattacks": (("attack=torchattacks", f"+{MAKE}.nosuch=1"), ("nosuch",)),
    "an option of no foolbox": (("attack=foolbox", f"+{CALL}.nosuch=1"), (CALL, "nosuch")),
    "an option of no PGD": (("attack=pgd", f"+{CALL}.nosuch=1"), ("nosuch",)),
    "an option of no attack": (("attack=pgd", "+attack.nosuch=1"), ("nosuch",)),
    "not partial": (
        ("attack=foolbox", f"{CALL}._target_={__name__}.own_attack"),
        (CALL, "missing 4 required positional arguments"),
    ),
    "no network": (("attack=pgd", "checkpoint=null"), ("checkpoint=FILE", "gsmooth train")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, network_file, here):
    """One sentence that says what to change, exit status 2, and nothing written."""
    overrides, words = MISTAKES[case]
    named = {o.split("=")[0] for o in overrides}
    kept = [o for o in (*ATTACK, f"checkpoint={network_file}", "store=run") if o.split("=")[0] not in named]
    if overrides == ("attack=worst_of_k",):
        kept = [o for o in kept if not o.startswith("attack.")]
    one_sentence(run_main("attack", *kept, *overrides), *words)
    assert snapshot(here) == {}

"""The command `gsmooth`: help, the same run by both names, sweeps, and bounds computed once."""

import runpy
import sys

import pytest
import torch

from conftest import SMALL, TRAIN, records, run_main, run_task, script, shell, snapshot, timeless
from gsmooth_lightning import cli
from gsmooth_lightning.errors import RequestError


def dispatch(monkeypatch, *arguments: str) -> int:
    """cli.main() with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["gsmooth", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("-h",), 0)])
def test_usage(arguments, code, monkeypatch, capsys, here):
    """Without a command, or asked for help: one line for each command."""
    assert dispatch(monkeypatch, *arguments) == code
    said = capsys.readouterr()
    assert "usage: gsmooth COMMAND" in said.out + said.err
    for name, text in cli.COMMANDS.items():
        assert f"  {name:9} {text}" in said.out + said.err
    assert snapshot(here) == {}


def test_unknown_command(monkeypatch, capsys):
    """The word that is no command, and how to go on."""
    assert dispatch(monkeypatch, "certfy", "seed=1") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "'certfy'" in said.err.splitlines()[0]
    assert "certify" in said.err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(command, here):
    """--help lists groups and options of the command, and writes nothing."""
    ended = run_main(command, "--help")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    if command == "report":
        assert "stores: ???" in ended.out
    elif command in cli.OF_RUNS:
        assert "run: ???" in ended.out
    else:
        assert "certify: cover, direct, enumerate, joint, latent" in ended.out
        assert "checkpoint: null" in ended.out
    assert snapshot(here) == {}


def test_dispatch_runs_the_module_as_main(monkeypatch):
    """The command word is taken out, the rest is handed on, and the module runs as `python -m` would run it."""
    seen = {}

    def run_module(name, run_name, alter_sys):
        seen.update(name=name, run_name=run_name, alter_sys=alter_sys, argv=sys.argv[1:])

    monkeypatch.setattr(runpy, "run_module", run_module)
    for command in cli.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["gsmooth", command, "seed=1", "-m"])
        cli.main()
        assert seen == {
            "name": f"gsmooth_lightning.tasks.{command}",
            "run_name": "__main__",
            "alter_sys": True,
            "argv": ["seed=1", "-m"],
        }


def test_both_names_are_one_run(checkpoint, here):
    """`gsmooth certify` and `python -m gsmooth_lightning.tasks.certify` share the store and print the table."""
    overrides = [*(o for o in SMALL if o != "images.first=6"), f"checkpoint={checkpoint}"]
    for k, command in enumerate(
        ([script("gsmooth"), "certify"], [sys.executable, "-m", "gsmooth_lightning.tasks.certify"]), 1
    ):
        ended = shell(*command, *overrides, f"images.first={k}", cwd=here)
        assert (ended.code, ended.err) == (0, "")
        (store,) = (here / "runs").iterdir()
        assert [r["index"] for r in records(store)] == list(range(k))
        assert "certified at" in ended.out
        assert store.name in ended.out
    assert store.name.startswith("certify-digits-")


def test_multirun(checkpoint, here):
    """A sweep over two seeds fills two stores, the same ones as two single runs."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "images.first=2")
    ended = run_main("certify", "-m", *overrides, "seed=0,1")
    assert (ended.code, ended.error) == (0, None), ended.err
    stores = sorted((here / "runs").glob("certify-*"))
    assert len(stores) == 2
    assert {r["seed"] for store in stores for r in records(store)} == {0, 1}
    assert all(len(records(store)) == 2 for store in stores)
    before = {store.name: (store / "records.jsonl").read_bytes() for store in stores}
    for seed in (0, 1):
        run_task("certify", *overrides, f"seed={seed}")
    assert {s.name: (s / "records.jsonl").read_bytes() for s in (here / "runs").glob("certify-*")} == before


def test_train_is_not_repeated(here):
    """The same training finds its checkpoint; its bytes depend on the settings alone."""
    overrides = ("trainer=cpu", "logger=none", "trainer.enable_progress_bar=false", "train.epochs=1")
    first = run_main("train", *overrides)
    again = run_main("train", *overrides)
    assert (first.code, again.code) == (0, 0)
    assert "trained: " in first.out
    assert "already trained: " in again.out
    (folder,) = (here / "runs").iterdir()
    other = run_task("train", *overrides, "store=other")
    assert other.read_bytes() == (folder / "classifier.ckpt").read_bytes()


def test_report_joins_certificates_and_attack(checkpoint, certified, here):
    """One column for both, a count of contradictions, a table and a picture on disk."""
    run_task("attack", *SMALL, f"checkpoint={checkpoint}", "attack.k=4", "attack.n=32", "store=attack")
    ended = run_main("report", f"stores=[{certified},attack]", "out=there")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    table = (here / "there" / "report.md").read_text()
    assert table.splitlines()[0].count("|") == 3  # names and one column
    for words in ("certified at 0 degrees", "attacked accuracy, smoothed", "contradicted by the attack", "sound"):
        assert words in table
    assert (here / "there" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_running_store(checkpoint, certified, here):
    """A store that is not finished is reported as far as it is."""
    run_task("certify", *SMALL, f"checkpoint={checkpoint}", "images.first=1", "store=run")
    third = (certified / "records.jsonl").read_bytes().splitlines(keepends=True)[2]
    (here / "run" / "rank-0.jsonl").write_bytes(third + b'{"index": 3, "lab')
    ended = run_main("report", "stores=run", "out=there")
    assert (ended.code, ended.error) == (0, None)
    row = next(line for line in (here / "there" / "report.md").read_text().splitlines() if line.startswith("| images"))
    assert "2 (" in row


@pytest.mark.parametrize("error", ["image", "distribution"])
def test_stored_bounds_give_the_same_certificates(checkpoint, here, error):
    """`bound` once, then `certify bounds=STORE`: the same E and counts as certify that bounds by itself."""
    kept = [o for o in SMALL if not o.startswith("error.")]
    distribution = ("error.draws=128", "error.rho=0.2", "error.alpha_inner=0.01", "error.calibration=12")
    options = ("error.draws=64", "error.choose=32") if error == "image" else distribution
    overrides = (*kept, f"error={error}", *options, "error.points=3", f"checkpoint={checkpoint}")
    run_task("bound", *overrides, "store=bounds")
    run_task("certify", *overrides, "store=reused", "bounds=bounds")
    run_task("certify", *overrides, "store=direct")
    bounds = {r["index"]: r for r in records(here / "bounds")}
    assert not (here / "reused" / "bounds").exists()
    reused, direct = timeless(here / "reused"), timeless(here / "direct")
    assert reused["records.jsonl"] == direct["records.jsonl"]
    if error == "distribution":  # the calibration images' defects, as `certify` measures them in a store of its own
        assert timeless(here / "bounds")["records.jsonl"] == timeless(here / "direct" / "bounds")["records.jsonl"]
        assert len(bounds) == 12
        assert len({(r["details"]["E"], r["details"]["rho"]) for r in records(here / "reused")}) == 1
        return
    for record in records(here / "reused"):
        assert record["details"]["E"] == bounds[record["index"]]["value"]
        assert record["details"]["rho"] == bounds[record["index"]]["rho"]
    assert reused["fingerprint.json"] == direct["fingerprint.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("noise.sigma=0.3", "made for another noise"),
        ("law.sigma=21", "made for another law"),
        ("preprocess=none", "made for another preprocess"),
        ("transform.interpolation=nearest", "made for another transform"),
        ("threat.high=11", "does not hold the threat's range"),
        ("data.saved=float", "data differs"),
        ("error.draws=65", "error differs"),
        ("seed=1", "seed differs"),
        ("block=32", "block differs"),  # another block draws other parameters
    ],
)
def test_bounds_of_another_classifier_are_refused(checkpoint, here, change, words):
    """A bound belongs to what it was computed for; nothing is written. It asks no network and covers smaller ranges."""
    run_task("bound", *SMALL, "store=bounds", "images.first=2")
    smaller = (f"checkpoint={checkpoint}", "images.first=2", "bounds=bounds", "threat.high=9", "store=smaller")
    run_task("certify", *SMALL, *smaller)
    assert max(r["radius"] for r in records(here / "smaller")) <= 10
    before = snapshot(here)
    with pytest.raises(RequestError, match=words):
        run_task("certify", *SMALL, f"checkpoint={checkpoint}", "images.first=2", "bounds=bounds", "store=run", change)
    assert snapshot(here) == before


def test_demo_in_small(here):
    """Train, certify, attack and report with one command."""
    ended = run_main("demo", *SMALL, "train.epochs=1", "attack.k=4", "attack.n=32")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert ended.err == ""
    for name in ("train/classifier.ckpt", "certify/records.jsonl", "attack/records.jsonl", "report.md", "report.png"):
        assert (here / "demo" / name).is_file()
    assert "certificates contradicted by the attack" in ended.out


class OwnNet(torch.nn.Sequential):
    """A user's network: one linear layer of a width of the user's choosing."""

    def __init__(self, width: int):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(784, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))


def test_a_network_of_your_own(here):
    """model=custom names any class; its constructor's arguments follow."""
    own = ("model=custom", f"model._target_={__name__}.OwnNet", "+model.width=12")
    checkpoint = run_task("train", *TRAIN, *own, "train.epochs=1", "store=own")
    folder = run_task("certify", *SMALL, *own, f"checkpoint={checkpoint}", "images.first=2", "store=certified")
    assert len(records(folder)) == 2

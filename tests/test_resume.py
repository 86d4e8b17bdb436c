"""A killed run goes on where it stopped, and ends in the bytes of a run that nobody killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import SMALL, environment, records, run_task, shell, snapshot, timeless
from gsmooth_lightning.errors import RequestError

BUSY = (
    *(o for o in SMALL if not o.startswith(("images.", "sampling.n="))),
    "sampling.n=512",
    "images.in_flight=3",
)


def lines_of(shard: Path) -> list[bytes]:
    """The finished lines of a shard, without a torn tail."""
    return shard.read_bytes().split(b"\n")[:-1] if shard.exists() else []


def killed_run(command: list[str], cwd: Path, chance: random.Random) -> list[bytes]:
    """Starts a run, kills it at a random moment after some more images; returns the lines it left finished."""
    shard = cwd / "run" / "rank-0.jsonl"
    wanted = len(lines_of(shard)) + chance.randint(1, 4)
    child = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while len(lines_of(shard)) < wanted:
            assert child.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    return lines_of(shard)


def kill_and_resume(checkpoint: Path, tmp_path: Path, monkeypatch, kills: int, images: int) -> None:
    overrides = (*BUSY, f"checkpoint={checkpoint}", f"images.first={images}", "store=run")
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    command = [sys.executable, "-m", "gsmooth_lightning.tasks.certify", *overrides]
    chance = random.Random(20240 + kills)
    before: list[bytes] = []
    for _ in range(kills):
        left = killed_run(command, tmp_path / "killed", chance)
        assert left[: len(before)] == before  # resuming neither loses nor repeats nor rewrites what was finished
        assert len(before) < len(left) < images
        before = left
    ended = shell(*command, cwd=tmp_path / "killed")
    assert ended.code == 0, ended.err
    store = tmp_path / "killed" / "run"
    after = (store / "records.jsonl").read_bytes().split(b"\n")[:-1]
    assert len(after) == images
    assert set(before) <= set(after)  # with the same `seconds`: nothing was computed again
    monkeypatch.chdir(tmp_path / "whole")
    run_task("certify", *overrides)
    assert timeless(store) == timeless(tmp_path / "whole" / "run")


def test_kill_and_resume(checkpoint, tmp_path, monkeypatch):
    """kill -9 at a random moment, once."""
    kill_and_resume(checkpoint, tmp_path, monkeypatch, kills=1, images=20)


@pytest.mark.slow
def test_kill_and_resume_twenty_times(checkpoint, tmp_path, monkeypatch):
    """kill -9 twenty times during one run."""
    kill_and_resume(checkpoint, tmp_path, monkeypatch, kills=20, images=200)


def test_torn_store_resumes_to_the_same_bytes(checkpoint, here, certified):
    """What a kill in the middle of a write leaves: some lines, and half of one."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "store=run")
    run_task("certify", *overrides, "images.first=2")
    whole = (certified / "records.jsonl").read_bytes().splitlines(keepends=True)
    (here / "run" / "rank-0.jsonl").write_bytes(whole[4] + whole[2][:50])
    kept = records(here / "run") + [line for line in records(certified) if line["index"] == 4]
    run_task("certify", *overrides)
    found = records(here / "run")
    assert all(line in found for line in kept)
    assert timeless(here / "run")["records.jsonl"] == timeless(certified)["records.jsonl"]
    assert timeless(here / "run")["fingerprint.json"] == timeless(certified)["fingerprint.json"]


def test_finished_run_is_not_repeated(checkpoint, here):
    """The same command on a finished store changes no byte."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "store=run", "images.first=3")
    for command in ("certify", "attack", "bound"):
        run_task(command, *overrides, f"store={command}")
        before = snapshot(here / command)
        run_task(command, *overrides, f"store={command}")
        assert snapshot(here / command) == before


@pytest.mark.parametrize(("in_flight", "threads"), [(1, 1), (3, 2), (8, 3)])
@pytest.mark.parametrize("command", ["certify", "bound", "attack"])
def test_records_do_not_depend_on_slots_or_threads(checkpoint, here, command, in_flight, threads):
    """Images in flight and cores change the time only."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "attack.k=4", "attack.n=32")
    run_task(command, *overrides, "store=reference", "images.in_flight=4")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run_task(command, *overrides, "store=other", f"images.in_flight={in_flight}")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    reference, other = timeless(here / "reference"), timeless(here / "other")
    assert other["records.jsonl"] == reference["records.jsonl"]
    assert other["fingerprint.json"] == reference["fingerprint.json"]


def test_images_added_later_are_the_same(checkpoint, here, certified):
    """Which other images are visited, and in how many runs, changes no record."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "store=run")
    for selection in ("images.indices=[4]", "images.indices=[5,1]", "images.first=6"):
        run_task("certify", *overrides, selection)
    assert timeless(here / "run")["records.jsonl"] == timeless(certified)["records.jsonl"]


def test_report_names_the_images_that_are_there(checkpoint, here):
    """After a run that added images the table states the new selection, not the first run's."""
    overrides = (*SMALL, f"checkpoint={checkpoint}", "store=run")
    run_task("certify", *overrides, "images.first=2")
    run_task("certify", *overrides, "images.first=4")
    run_task("report", "stores=run", "out=table")
    row = next(line for line in (here / "table" / "report.md").read_text().splitlines() if line.startswith("| images"))
    assert "4 (" in row
    assert "first 2" not in row
    run_task("certify", *overrides, "images.indices=[1,5]")
    run_task("report", "stores=run", "out=table")
    row = next(line for line in (here / "table" / "report.md").read_text().splitlines() if line.startswith("| images"))
    assert "5 (2 listed images of test, and 3 of an earlier selection)" in row


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("sampling.n=192", "certify, sampling differ"),
        ("seed=1", "seed differs"),
        ("block=32", "block differs"),
        ("backend=plain", "backend differs"),
        ("error.draws=65", "certify, error differ"),
        ("threat.high=11", "threat differs"),
        ("images.split=val", "images differs"),
    ],
)
def test_changed_settings_are_refused(checkpoint, certified, change, key):
    """The store of another run is named as such, with the keys, and stays as it is."""
    before = snapshot(certified)
    with pytest.raises(RequestError, match=f"is the store of another run: {key}"):
        run_task("certify", *SMALL, f"checkpoint={checkpoint}", f"store={certified}", change)
    assert snapshot(certified) == before

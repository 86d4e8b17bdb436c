"""A long run that is killed again and again ends in the store of one that nobody disturbed."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import SMALL, environment, script, timeless
from test_ranks import CPU, pids, whole

LEAST = 300
"""Seconds that the undisturbed run takes at least."""


def start(folder: Path, checkpoint: Path, devices: int) -> subprocess.Popen:
    few = [o for o in SMALL if not o.startswith(("trainer=", "sampling.n=", "images.first"))]
    line = [script("gsmooth"), "certify", *few, *CPU, f"devices={devices}", "sampling.n=20000", "images.first=190"]
    line += ["images.in_flight=2", f"checkpoint={checkpoint}", f"store={folder}"]
    return subprocess.Popen(
        list(map(str, line)), env=environment(), cwd=folder.parent, start_new_session=True, stdout=subprocess.DEVNULL
    )


def kill(run: subprocess.Popen, folder: Path, chance: random.Random) -> None:
    """All processes at once, as when a machine goes; or one of them, after which the others must end by themselves."""
    alive = pids(folder)
    if chance.random() < 0.5 or len(alive) < 2:
        os.killpg(run.pid, signal.SIGKILL)
    else:
        os.kill(chance.choice(alive), signal.SIGKILL)
    run.wait(120)
    deadline = time.monotonic() + 120
    while any(running(pid) for pid in alive):
        assert time.monotonic() < deadline, "a process goes on alone"
        time.sleep(0.2)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_killed_at_random_and_restarted_at_changing_world_sizes(checkpoint: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert start(tmp_path / "alone", checkpoint, 1).wait() == 0
    assert time.monotonic() - begin >= LEAST, "the run is too short to say anything; give it more images"
    folder, chance, kills, finished = tmp_path / "killed", random.Random(11), 0, 0
    while True:
        run = start(folder, checkpoint, chance.choice([1, 2, 3]))
        while run.poll() is None and not pids(folder):
            time.sleep(0.1)  # the first start
        try:
            assert run.wait(chance.uniform(20, 40)) == 0
            break
        except subprocess.TimeoutExpired:
            kill(run, folder, chance)
            kills += 1
            left = len(whole(folder))
            print(f"kill {kills}: {left} images finished")
            assert left >= finished
            finished = left
    assert kills >= 5
    ours, theirs = timeless(folder), timeless(tmp_path / "alone")
    assert ours["records.jsonl"] == theirs["records.jsonl"]
    assert ours["fingerprint.json"] == theirs["fingerprint.json"]

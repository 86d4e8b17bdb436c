"""Several processes share out the images, or the draws of each: the same store, whoever dies on the way."""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port

from conftest import (
    QUIET,
    SMALL,
    TRAIN,
    Ended,
    compose,
    environment,
    one_sentence,
    records,
    run_main,
    run_task,
    script,
    shell,
    timeless,
)
from gsmooth_lightning.tasks.setup import data_module
from test_verify import KINDS

CPU = ("trainer=ddp", "trainer.accelerator=cpu")
LONG = ("sampling.n=40000", "images.in_flight=2")
"""Makes an image take long enough to be interrupted."""


def overrides(*more: str) -> list[str]:
    return [o for o in SMALL if not o.startswith("trainer=")] + [*CPU, *more]


def on_ranks(folder: Path, *more: str, command: str = "certify") -> Ended:
    """A command line on the CPU; devices=N is among `more`."""
    return shell(script("gsmooth"), command, *overrides(f"store={folder}", *more), cwd=folder.parent)


def begun(certified: Path, folder: Path, *shards: tuple[int, ...]) -> Path:
    """A store in which processes had finished these images, by place in the visited ones, when they were stopped."""
    shutil.copytree(certified, folder, ignore=shutil.ignore_patterns("report.*"))
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").unlink()
    for rank, places in enumerate(shards):
        (folder / f"rank-{rank}.jsonl").write_text("".join(lines[place] for place in places))
        (folder / f"rank-{rank}.lock").touch()
    return folder


def same(folder: Path, certified: Path) -> None:
    """Records and fingerprint byte for byte, times aside; the configuration may name other devices."""
    ours, theirs = timeless(folder), timeless(certified)
    assert ours["records.jsonl"] == theirs["records.jsonl"]
    assert ours["fingerprint.json"] == theirs["fingerprint.json"]


@pytest.fixture
def running(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path):
    """A certification on two processes that has finished some images and would go on for long: (process, folder)."""
    folder = tmp_path / "run"
    line = [script("gsmooth"), "certify", *overrides(f"store={folder}", f"checkpoint={checkpoint}", "devices=2", *LONG)]
    process = subprocess.Popen(
        [*map(str, line), "images.first=200"], env=environment(), cwd=tmp_path, text=True, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 240
        while not all((folder / f"rank-{r}.jsonl").exists() for r in (0, 1)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process, folder
    finally:
        for pid in pids(folder):
            end(pid)
        process.kill()
        process.wait()


def pids(folder: Path) -> list[int]:
    return [json.loads(beat.read_text())["pid"] for beat in sorted(folder.glob("rank-*.beat"))]


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def whole(folder: Path) -> list[int]:
    """Indices of the finished images; none is there twice. What follows the last newline is torn."""
    found = []
    for shard in folder.glob("rank-*.jsonl"):
        found += [json.loads(line)["index"] for line in shard.read_text().split("\n")[:-1]]
    assert len(set(found)) == len(found)
    return found


def test_two_processes_make_the_store_of_one(certified: Path, checkpoint: Path, tmp_path: Path) -> None:
    ended = on_ranks(tmp_path / "two", f"checkpoint={checkpoint}", "devices=2", "images.in_flight=1")
    assert ended.code == 0, ended.err
    same(tmp_path / "two", certified)
    assert ended.out.count("certified at 0 degrees") == 1  # one of the processes reports


def test_three_processes_share_out_the_draws_of_each_image(certified: Path, checkpoint: Path, tmp_path: Path) -> None:
    ended = on_ranks(tmp_path / "three", f"checkpoint={checkpoint}", "devices=3", "shard=draws")
    assert ended.code == 0, ended.err
    same(tmp_path / "three", certified)


def test_a_run_of_two_goes_on_with_three_of_which_one_has_no_image(
    certified: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = begun(certified, tmp_path / "begun", (0, 2), (1, 5))
    ended = on_ranks(folder, f"checkpoint={checkpoint}", "devices=3")
    assert ended.code == 0, ended.err
    same(folder, certified)
    again = on_ranks(folder, f"checkpoint={checkpoint}", "devices=2")  # nothing is left to do
    assert again.code == 0, again.err
    same(folder, certified)


def test_a_run_of_three_goes_on_with_one(certified: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = begun(certified, tmp_path / "begun", (3,), (), (1, 4))
    assert run_task("certify", *SMALL, f"checkpoint={checkpoint}", f"store={folder}") == folder
    same(folder, certified)


def test_another_start_waits_for_processes_of_a_larger_world(certified: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = begun(certified, tmp_path / "begun", (3,), (), (1, 4))
    held = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f = open({str(folder / 'rank-2.lock')!r}, 'a'); "
         "fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.stdout.readline() == "held\n"
    ended = run_main("certify", *SMALL, f"checkpoint={checkpoint}", f"store={folder}")
    held.communicate("\n")
    one_sentence(ended, "another process is writing to")


def test_sigterm_finishes_the_images_in_flight_and_ends_resumable(running, checkpoint: Path) -> None:
    process, folder = running
    before = len(whole(folder))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "interrupted; run the same command again" in err
    assert "Traceback" not in err
    assert len(whole(folder)) >= before
    status = run_main("status", f"run={folder}")
    assert "stopped" in status.out
    line = (*SMALL, f"checkpoint={checkpoint}", *LONG, f"images.first={max(whole(folder)) + 1}")
    run_task("certify", *line, f"store={folder}")
    same(folder, run_task("certify", *line, f"store={folder.parent / 'alone'}"))


def test_when_one_process_dies_the_run_ends_loudly_and_keeps_what_is_finished(running) -> None:
    process, folder = running
    finished = len(whole(folder))
    os.kill(pids(folder)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "Child process" in err
    assert "terminated with code -9" in err
    assert len(whole(folder)) >= finished


def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_later(
    certified: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = begun(certified, tmp_path / "begun", (0, 1), (2,))
    size = (folder / "rank-0.jsonl").stat().st_size + 10  # the next line does not fit

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    line = [script("gsmooth"), "certify", *overrides(f"store={folder}", f"checkpoint={checkpoint}", "devices=2")]
    ended = subprocess.run(
        list(map(str, line)), env=environment(), cwd=tmp_path, text=True, capture_output=True, preexec_fn=little_room
    )
    assert ended.returncode not in (0, 130)
    assert "cannot write to" in ended.stderr
    assert "finished images are kept" in ended.stderr
    assert {0, 1, 2} <= {records(certified).index(r) for r in records(certified) if r["index"] in whole(folder)}
    assert run_task("certify", *SMALL, f"checkpoint={checkpoint}", f"store={folder}") == folder
    same(folder, certified)


def test_certificates_that_depend_on_the_order_are_for_one_process(checkpoint: Path, tmp_path: Path) -> None:
    per_input = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none", "certify=per_input")
    dropped = ("law.", "threat.", "error.")
    line = [o for o in overrides("devices=2", *per_input) if not o.startswith(dropped)]
    ended = run_main("certify", *line, f"checkpoint={checkpoint}", f"store={tmp_path / 'run'}")
    one_sentence(ended, "devices=1")
    assert not (tmp_path / "run").exists()


def test_several_devices_are_for_ddp(checkpoint: Path, tmp_path: Path) -> None:
    ended = run_main("certify", *SMALL, f"checkpoint={checkpoint}", f"store={tmp_path / 'run'}", "devices=2")
    one_sentence(ended, "trainer=ddp", "devices=1")


def test_what_is_shared_out_is_images_or_draws(checkpoint: Path) -> None:
    one_sentence(run_main("certify", *SMALL, f"checkpoint={checkpoint}", "shard=pixels"), "images or draws", "pixels")


def alone_and_by_two(command: str, line: Sequence[str], shard: str, tmp_path: Path) -> tuple[Path, Path]:
    """The stores that one and that two processes make."""
    alone, two = run_task(command, *line, f"store={tmp_path / 'alone'}"), tmp_path / "two"
    cpu = [o for o in line if not o.startswith("trainer=")]
    ended = shell(script("gsmooth"), command, *cpu, *CPU, "devices=2", f"shard={shard}", f"store={two}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    return alone, two


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["images", "draws"])
def test_bounds_and_attacks_by_two_processes(shard: str, checkpoint: Path, tmp_path: Path) -> None:
    for command, line in (("bound", SMALL), ("attack", (*SMALL, f"checkpoint={checkpoint}"))):
        (tmp_path / command).mkdir()
        same(*alone_and_by_two(command, line, shard, tmp_path / command))


@pytest.mark.slow
def test_a_bound_that_is_calibrated_first_by_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    line = (*KINDS["calibrated"], f"checkpoint={checkpoint}")
    alone, two = alone_and_by_two("certify", line, "images", tmp_path)
    same(two, alone)
    same(two / "bounds", alone / "bounds")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_shared_out_under_every_theorem_and_plan(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    same(*alone_and_by_two("certify", (*KINDS[kind], f"checkpoint={checkpoint}"), "draws", tmp_path))


@pytest.mark.slow
def test_an_attack_on_pixels_by_two_processes_spends_what_one_does(checkpoint: Path, tmp_path: Path) -> None:
    pixels = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "noise.sigma=0.25", "images.first=2")
    line = (*QUIET, *pixels, "attack=pgd", "attack.epsilons=[0.5]", "attack.n=32", f"checkpoint={checkpoint}")
    same(*alone_and_by_two("attack", line, "draws", tmp_path))


@pytest.mark.slow
def test_torchrun_starts_the_processes(certified: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = shell(
        script("torchrun"), "--standalone", "--nproc-per-node=2", "-m", "gsmooth_lightning.tasks.certify",
        *overrides(f"store={folder}", f"checkpoint={checkpoint}", "devices=2"), cwd=tmp_path,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    same(folder, certified)


def test_processes_read_every_training_input_once(tmp_path: Path) -> None:
    """Two loaders of one order: disjoint, together all inputs; another order in the next pass."""
    module = data_module(compose("train"))
    whole = len(module.split("train"))
    orders = []
    for step in (0, 10):
        shares = []
        for rank in (0, 1):
            module.rank, module.world = rank, 2
            module.trainer = SimpleNamespace(global_step=step)
            shares.append([int(i) for _, _, indices in module.train_dataloader() for i in indices])
        assert len(shares[0]) == len(shares[1])
        assert set(shares[0]) | set(shares[1]) == set(range(whole))
        assert len(set(shares[0]) & set(shares[1])) == whole % 2  # one is read twice, so that none waits
        orders.append(shares)
    assert orders[0] != orders[1]


def share(rank: int, port: int, found: Any) -> None:
    """The images of one of two processes, of which the second has seen one more as done."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    module = data_module(compose("certify", "images.first=10"))
    module.rank, module.world, module.done = rank, 2, frozenset({0, 2} if rank else {0})
    module.trainer = SimpleNamespace(world_size=2)
    found.put((rank, list(module.predict_dataloader().dataset.indices)))
    found.close()
    found.join_thread()


@pytest.mark.slow
def test_processes_agree_on_what_is_done() -> None:
    context = multiprocessing.get_context("spawn")
    found, port = context.Queue(), find_free_network_port()
    processes = [context.Process(target=share, args=(rank, port, found)) for rank in (0, 1)]
    for process in processes:
        process.start()
    shares = dict(found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert shares == {0: [1, 3, 5, 7, 9], 1: [2, 4, 6, 8]}


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """With half the batch size each, the gradient of a step is that of one process; the store says how many."""
    line = (*(o for o in TRAIN if not o.startswith("trainer=")), *CPU, "devices=2", f"store={tmp_path / 'two'}")
    ended = shell(script("gsmooth"), "train", *line, "train.batch_size=64", "train.patience=5", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in (tmp_path / "two").iterdir() if "rank" not in p.name) == [
        "classifier.ckpt", "config.yaml", "fingerprint.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "two" / "fingerprint.json").read_text())["processes"] == 2
    folder = run_task(
        "certify", *SMALL, f"checkpoint={tmp_path / 'two' / 'classifier.ckpt'}", f"store={tmp_path / 'c'}"
    )
    assert sum(r["base"] == r["label"] for r in records(folder)) >= 4
    again = run_main("train", *TRAIN, "train.batch_size=64", "train.patience=5", f"store={tmp_path / 'two'}")
    one_sentence(again, "another run", "processes")


def test_what_learns_on_one_device_says_so(checkpoint: Path, tmp_path: Path) -> None:
    line = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "logger=none", *CPU, "devices=2")
    ended = run_main("sigma", *line, f"checkpoint={checkpoint}", f"store={tmp_path / 'sigma'}")
    one_sentence(ended, "one device", "devices=1")
    assert not (tmp_path / "sigma").exists()

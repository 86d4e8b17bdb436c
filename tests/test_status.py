"""Heartbeats of processes, and what `gsmooth status` makes of them."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from conftest import SMALL, one_sentence, records, run_main, run_task
from gsmooth_lightning import cli
from gsmooth_lightning.certify.heartbeat import SILENT, Heartbeat, heartbeats, in_time, longest
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import CertificationModule
from gsmooth_lightning.lit.callbacks import ImageProgress


def test_what_is_left_takes_as_long_an_image_as_those_that_are_done(tmp_path: Path) -> None:
    """Two images of 1 and 3 seconds (one of them stopped early): eight more take 8 * 2 seconds."""
    beat = Heartbeat(tmp_path, rank=0, world=1, todo=10)
    assert beat.left is None
    beat.finished(1.0)
    beat.finished(3.0)
    assert beat.left == 16.0
    assert in_time(beat.left) == "0:00:16"
    assert in_time(None) == "?"


def test_a_run_takes_as_long_as_its_slowest_process(tmp_path: Path) -> None:
    quick, slow, idle = (Heartbeat(tmp_path, rank=r, world=3, todo=t) for r, t in ((0, 4), (1, 4), (2, 0)))
    quick.finished(1.0)
    assert longest([quick, slow, idle]) is None  # one has finished nothing yet
    slow.finished(5.0)
    assert longest([quick, slow, idle]) == 15.0
    assert longest([idle]) == 0.0


def test_heartbeats_are_read_back_whole_and_by_rank(tmp_path: Path) -> None:
    written = [Heartbeat(tmp_path, rank=r, world=11, todo=3) for r in (10, 2)]
    for beat in written:
        beat.finished(0.5)
    assert heartbeats(tmp_path) == [written[1], written[0]]
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "rank-3.beat").write_text("{")
    with pytest.raises(RequestError, match=r"rank-3\.beat is damaged"):
        heartbeats(tmp_path)


def test_a_heartbeat_is_written_every_few_seconds_at_most(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, rank=0, world=1, todo=3)
    beat.beat()
    first = beat.time
    beat.beat()
    assert beat.time == first
    beat.time -= 6
    beat.beat()
    assert beat.time >= first


def test_silence(tmp_path: Path) -> None:
    """Alive; of a dead process of this machine; of another machine, after two minutes; stopped, and said so."""
    beat = Heartbeat(tmp_path, rank=0, world=1, todo=3)
    beat.write()
    assert not beat.silent
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    beat.pid = child
    assert beat.silent
    beat.host = "elsewhere"
    assert not beat.silent
    beat.time = time.time() - SILENT - 1
    assert beat.silent
    beat.write()
    beat.end()
    assert beat.silent


def test_a_full_disk_does_not_stop_a_heart(tmp_path: Path) -> None:
    """The record says it, when it is written."""
    folder = tmp_path / "gone"
    Heartbeat(folder, rank=0, world=1, todo=3).finished(1.0)
    assert not folder.exists()


def test_the_bar_counts_all_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = (Heartbeat(tmp_path, rank=r, world=2, todo=4) for r in (0, 1))
    other.finished(2.0)
    other.finished(2.0)
    own.finished(1.0)
    progress = ImageProgress(own, shown=True)
    progress.show()
    assert (progress.bar.n, progress.bar.total) == (3, 8)
    progress.bar.close()
    assert "left 0:00:04" in capsys.readouterr().err
    ImageProgress(own, shown=False).show()
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the command


def test_a_finished_run_says_what_it_has_spent(certified: Path) -> None:
    ended = run_main("status", f"run={certified}")
    assert (ended.code, ended.err) == (0, "")
    stored = records(certified)
    assert "finished" in ended.out
    assert f"{sum(r['evaluations'] for r in stored)}" in ended.out
    assert f"{sum(r['prediction'] == -1 for r in stored)} of 6" in ended.out
    assert f"{sum(r['alpha'] for r in stored):.4g} over all images" in ended.out


@pytest.mark.parametrize("name", ["it's a run", "sigma=0.5", "x,y {z} [1]", 'say "run"'])
def test_a_folder_of_any_name_is_named_alone(certified: Path, tmp_path: Path, monkeypatch, capsys, name) -> None:
    shutil.copytree(certified, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gsmooth", "status", name])
    cli.main()
    assert "finished" in capsys.readouterr().out


def test_a_run_at_work_and_one_whose_process_died(certified: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(certified, folder, ignore=shutil.ignore_patterns("report.*"))
    (folder / "records.jsonl").rename(folder / "rank-0.jsonl")
    one, two = (Heartbeat(folder, rank=r, world=2, todo=10) for r in (0, 1))
    for beat in (one, two):
        beat.finished(2.0)
    out = run_main("status", f"run={folder}").out
    assert "running on 2 processes" in out
    assert "6 finished; 2 of 20 since" in out
    assert "0:00:18" in out
    two.end()
    assert "process 1 gives no sign of life" in run_main("status", f"run={folder}").out
    one.end()
    assert "stopped" in run_main("status", f"run={folder}").out
    assert len(json.loads((folder / "rank-0.beat").read_text())) == len(vars(one)) - 1


def test_a_run_that_ends_in_the_middle_says_so_at_once(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """And one that finishes leaves no heartbeat."""
    line = (*SMALL, f"checkpoint={checkpoint}", f"store={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(CertificationModule, "base_classes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_task("certify", *line)
    (beat,) = heartbeats(tmp_path / "run")
    assert (beat.ended, beat.silent, beat.done, beat.todo) == (True, True, 0, 6)
    assert not heartbeats(run_task("certify", *line))


def test_no_run(tmp_path: Path) -> None:
    one_sentence(run_main("status", f"run={tmp_path}"), "not a store")

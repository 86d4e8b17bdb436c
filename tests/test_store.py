"""Stores survive crashes, refuse strangers and merge to the same bytes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import snapshot
from gsmooth_lightning.certify.store import Store, check_identity, digest, read, read_identity
from gsmooth_lightning.errors import RequestError

IDENTITY = {"command": "certify", "seed": 0, "data": {"size": 28}, "noise": {"sigma": 0.5}}
RECORDS = [{"index": i, "label": i % 3, "radius": i / 7, "seconds": 0.1 * i} for i in (5, 2, 11, 0, 7, 3)]


def filled(folder: Path, count: int = len(RECORDS), rank: int = 0) -> Store:
    store = Store(folder, IDENTITY, "a: 1\n", rank)
    for record in RECORDS[:count]:
        store.append(record)
    return store


def test_append_read_finish(tmp_path):
    """What is appended is read back, sorted by image, before and after finish."""
    store = filled(tmp_path / "deep" / "store")
    in_order = sorted(RECORDS, key=lambda r: r["index"])
    assert store.done == {r["index"] for r in RECORDS}
    assert read(store.folder) == in_order
    assert store.finish() == in_order
    assert read(store.folder) == in_order
    assert sorted(p.name for p in store.folder.iterdir()) == ["config.yaml", "fingerprint.json", "records.jsonl"]
    assert (store.folder / "config.yaml").read_text() == "a: 1\n"
    assert read_identity(store.folder) == IDENTITY


def test_each_image_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    """One line, complete with its newline and synced, per append."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    store = Store(tmp_path, IDENTITY)
    before = len(synced)
    for k, record in enumerate(RECORDS, 1):
        store.append(record)
        content = (tmp_path / "rank-0.jsonl").read_bytes()
        assert content.endswith(b"\n")
        assert content.count(b"\n") == k
        assert synced[before:][k - 1] == len(content)


@pytest.mark.parametrize("torn", [b'{"index": 9', b"{", b'{"index": 9, "label": 1}'])
def test_torn_last_line_is_dropped_and_its_image_done_again(tmp_path, torn):
    """What follows the last newline never counts, even when it happens to be whole JSON."""
    filled(tmp_path, 3)
    shard = tmp_path / "rank-0.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(whole + torn)
    assert {r["index"] for r in read(tmp_path)} == {5, 2, 11}
    store = Store(tmp_path, IDENTITY)
    assert store.done == {5, 2, 11}
    assert shard.read_bytes() == whole
    for record in RECORDS[3:]:
        store.append(record)
    assert store.finish() == sorted(RECORDS, key=lambda r: r["index"])


def test_torn_line_of_a_rank_that_is_gone(tmp_path):
    """A resumed run with fewer ranks keeps the finished lines of the others and drops their torn tails."""
    filled(tmp_path, 2, rank=1)
    with open(tmp_path / "rank-1.jsonl", "ab") as file:
        file.write(b'{"index": 1')
    store = Store(tmp_path, IDENTITY, rank=0)
    assert store.done == {5, 2}
    store.append(RECORDS[2])
    assert [r["index"] for r in store.finish()] == [2, 5, 11]
    assert not list(tmp_path.glob("rank-*.jsonl"))


@pytest.mark.parametrize("damage", [b'{"index": 2, "la', b"\x00\x00\x00", b"[1]", b"null", b'{"label": 1}'])
@pytest.mark.parametrize("name", ["rank-0.jsonl", "records.jsonl"])
def test_damaged_middle_line_names_file_and_line(tmp_path, damage, name):
    """A line that is not a record is no torn tail: somebody has to look at it."""
    store = filled(tmp_path)
    if name == "records.jsonl":
        store.finish()
    path = tmp_path / name
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    before = snapshot(tmp_path)
    for attempt in (lambda: read(tmp_path), lambda: Store(tmp_path, IDENTITY), store.finish):
        with pytest.raises(RequestError, match=rf"{name}, line 2, is damaged"):
            attempt()
    assert snapshot(tmp_path) == before


def test_another_fingerprint_names_the_keys_and_changes_nothing(tmp_path):
    """The differing keys, sorted, missing and additional ones included."""
    filled(tmp_path, 2)
    before = snapshot(tmp_path)
    other = {"command": "certify", "seed": 1, "data": {"size": 28}, "noise": {"sigma": 0.25}, "block": 32}
    with pytest.raises(RequestError, match=r"another run: block, noise, seed differ;.*store="):
        Store(tmp_path, other, "b: 2\n")
    with pytest.raises(RequestError, match="noise differs;"):
        Store(tmp_path, {**IDENTITY, "noise": {"sigma": 0.51}})
    with pytest.raises(RequestError, match="data differs;"):
        Store(tmp_path, {k: v for k, v in IDENTITY.items() if k != "data"})
    assert snapshot(tmp_path) == before
    check_identity(tmp_path, other, ("command", "data"))
    with pytest.raises(RequestError, match="noise differs"):
        check_identity(tmp_path, other, ("command", "data", "noise"))


def test_identity_is_compared_as_json(tmp_path):
    """Tuples, integer keys and key order are no difference; digests do not depend on the order of keys."""
    Store(tmp_path, {"b": (1, 2), "a": {"x": 1.5, "y": None}})
    Store(tmp_path, {"a": {"y": None, "x": 1.5}, "b": [1, 2]})
    assert digest({"a": 1, "b": [1]}) == digest({"b": [1], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest({})) == 10


@pytest.mark.parametrize("content", ["notes.txt", "rank-0.jsonl", "records.jsonl", "sub/file.txt"])
def test_foreign_folder_is_refused(tmp_path, content):
    """A folder with files but without a fingerprint is somebody else's."""
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(RequestError, match="holds files but no store; choose an empty or new folder"):
        Store(tmp_path, IDENTITY)
    assert snapshot(tmp_path) == before


def test_crash_while_the_store_was_made(tmp_path):
    """Left-overs of a first start that died before the fingerprint was there do not block the second."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "fingerprint.json.tmp").write_text('{"comm')
    store = filled(tmp_path, 1)
    assert read_identity(tmp_path) == IDENTITY
    assert store.finish() == RECORDS[:1]


def test_no_store_there(tmp_path):
    """Reading needs a fingerprint that can be read."""
    for folder in (tmp_path, tmp_path / "missing"):
        for reader in (read, read_identity):
            with pytest.raises(RequestError, match="is not a store"):
                reader(folder)
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(RequestError, match="is not a store"):
        read_identity(tmp_path)
    with pytest.raises(RequestError, match="is not a store"):
        Store(tmp_path, IDENTITY)


@pytest.mark.parametrize("bad", ["file", "below"])
def test_unwritable_place(tmp_path, bad):
    """A regular file where the folder should be, or above it."""
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" if bad == "file" else tmp_path / "file" / "store"
    with pytest.raises(RequestError, match=r"cannot write to .*file.*store=\.\.\."):
        Store(folder, IDENTITY)
    assert (tmp_path / "file").read_text() == "mine"


def test_finish_is_sorted_idempotent_and_independent_of_shards(tmp_path):
    """One shard or three, in any order, finished once or twice: the same bytes."""
    one, three = tmp_path / "one", tmp_path / "three"
    filled(one).finish()
    stores = [Store(three, IDENTITY, "a: 1\n", rank) for rank in range(3)]
    for k, record in enumerate(reversed(RECORDS)):
        stores[k % 3].append(record)
    assert len(list(three.glob("rank-*.jsonl"))) == 3
    stores[2].finish()
    assert snapshot(three) == snapshot(one)
    before = snapshot(one)
    Store(one, IDENTITY, "a: 1\n").finish()
    Store(one, IDENTITY, "a: 1\n", rank=4).finish()
    assert snapshot(one) == before
    assert [json.loads(line)["index"] for line in (one / "records.jsonl").read_text().splitlines()] == [
        0, 2, 3, 5, 7, 11,
    ]  # fmt: skip


def test_more_images_after_finish(tmp_path):
    """A finished store takes more images; both files together are the store."""
    filled(tmp_path, 4).finish()
    store = Store(tmp_path, IDENTITY)
    assert len(store.done) == 4
    store.append(RECORDS[4])
    assert len(read(tmp_path)) == 5
    store.append(RECORDS[5])
    assert store.finish() == sorted(RECORDS, key=lambda r: r["index"])
    assert not list(tmp_path.glob("rank-*.jsonl"))


@pytest.mark.parametrize("crash", ["before replacing", "before deleting", "between deletions"])
def test_crash_while_merging(tmp_path, crash, monkeypatch):
    """Dying anywhere in finish loses nothing; finishing again gives the same bytes."""
    whole, folder = tmp_path / "whole", tmp_path / "crashed"
    filled(whole).finish()
    for rank in range(3):
        store = Store(folder, IDENTITY, "a: 1\n", rank)
        for record in RECORDS[2 * rank : 2 * rank + 2]:
            store.append(record)

    class Killed(BaseException):
        pass

    deleted = []

    def replace(source, target):
        raise Killed

    def unlink(self, missing_ok=False):
        if len(deleted) == (1 if crash == "between deletions" else 0):
            raise Killed
        deleted.append(self)
        os.unlink(self)

    with monkeypatch.context() as patch:
        if crash == "before replacing":
            patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            store.finish()
    again = Store(folder, IDENTITY, "a: 1\n")
    assert again.done == {r["index"] for r in RECORDS}
    again.finish()
    assert snapshot(folder) == snapshot(whole)


def test_two_processes_do_not_share_a_shard(tmp_path):
    """A second process is refused while the first lives, and goes on when it was killed."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held = filled(tmp_path, 2)
            os.write(write, b"x")
            time.sleep(60)
            held.finish()
        finally:
            os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        before = snapshot(tmp_path)
        with pytest.raises(RequestError, match=r"another process is writing to .*store="):
            Store(tmp_path, IDENTITY)
        assert snapshot(tmp_path) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(write)
    store = Store(tmp_path, IDENTITY)
    assert store.done == {5, 2}
    store.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "fingerprint.json", "records.jsonl"]


def test_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    """After a write that failed half-way the shard ends in a whole line, and more can be appended."""
    store = filled(tmp_path, 2)
    whole = (tmp_path / "rank-0.jsonl").read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RequestError, match=r"cannot write to .*No space left.*free space"):
            store.append(RECORDS[2])
    assert store.done == {5, 2}
    assert (tmp_path / "rank-0.jsonl").read_bytes().startswith(whole)
    for record in RECORDS[2:]:
        store.append(record)
    assert store.finish() == sorted(RECORDS, key=lambda r: r["index"])


def test_ranks_that_finish_at_the_same_time(tmp_path, monkeypatch):
    """Every rank calls finish: one that comes late finds shards gone and must not fail."""
    stores = [Store(tmp_path, IDENTITY, "a: 1\n", rank) for rank in range(2)]
    for k, record in enumerate(RECORDS):
        stores[k % 2].append(record)
    glob = Path.glob

    def late(self, pattern):  # the other rank finishes between listing and deleting the shards
        found = list(glob(self, pattern))
        monkeypatch.undo()
        stores[1].finish()
        return iter(found)

    seen = read(tmp_path)
    monkeypatch.setattr("gsmooth_lightning.certify.store.read", lambda folder: seen)
    monkeypatch.setattr(Path, "glob", late)
    assert stores[0].finish() == sorted(RECORDS, key=lambda r: r["index"])
    assert read(tmp_path) == sorted(RECORDS, key=lambda r: r["index"])


def test_of_two_processes_that_claim_a_folder_at_once_one_is_refused(tmp_path, monkeypatch):
    """The second has seen no fingerprint, and then there is that of another run."""
    Store(tmp_path / "run", {"device": "A100"})
    exists, asked = Path.exists, []

    def late(path: Path) -> bool:
        if path.name == "fingerprint.json" and not asked:
            asked.append(path)
            return False
        return exists(path)

    monkeypatch.setattr(Path, "exists", late)
    with pytest.raises(RequestError, match="device differs"):
        Store(tmp_path / "run", {"device": "H200"}, rank=1, world=2)
    assert asked
    assert read_identity(tmp_path / "run") == {"device": "A100"}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_processes_of_one_start_do_not_refuse_each_other(tmp_path):
    """Both see that nobody holds a place of the larger world before."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fingerprint.json").write_text("{}")
    place = tmp_path / "run" / "rank-2.lock"
    place.touch()
    script = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_SH); print(1, flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "1\n"
    assert Store(tmp_path / "run", {}, rank=0, world=2).done == frozenset()
    other.communicate("\n")


def test_a_store_that_finishes_while_it_is_read(tmp_path, monkeypatch):
    """Shards are listed, and then they are one file."""
    store = Store(tmp_path / "run", {})
    for index in range(3):
        store.append({"index": index})
    whole, glob = [], Path.glob

    def listed(path: Path, pattern: str):
        found = list(glob(path, pattern))
        if not whole:
            whole.append(store)
            store.finish()
        return iter(found)

    monkeypatch.setattr(Path, "glob", listed)
    assert [r["index"] for r in read(tmp_path / "run")] == [0, 1, 2]

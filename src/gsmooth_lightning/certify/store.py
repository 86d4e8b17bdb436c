"""Stores: a run's results, one line an image, that survive the death of the run.

A store is a folder: `config.yaml`, `fingerprint.json` (what the results depend on), and one append-only JSON-lines
file per rank while it runs. Each finished image is one write, flushed and synced; a torn last line is dropped. When all
images are done the shards become one file, `records.jsonl`, sorted by image, whose bytes depend (times aside) on the
fingerprint alone.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import operator
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from gsmooth_lightning.errors import RequestError

Record = dict[str, Any]
COMPLETE = "records.jsonl"


class Store:
    """One run's folder.

    Args:
        folder: created when it does not exist.
        identity: what the results depend on; a folder with another identity is refused.
        config: the whole configuration as YAML, kept for the reader.
        rank, world: of this process, and how many there are; each has a shard of its own.

    Raises:
        RequestError: the folder belongs to another run (names the differing keys), holds something else, cannot be
            written, or is written to by processes of another start of this run.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], config: str = "", rank: int = 0, world: int = 1):
        self.folder = Path(folder)
        self._config = config
        self._shard = self.folder / f"rank-{rank}.jsonl"
        identity = json.loads(json.dumps(identity, sort_keys=True))
        try:
            self._claim(identity, config)
            self._lock = _locked(self._place(rank))
            for other in itertools.takewhile(Path.exists, map(self._place, itertools.count(world))):
                _locked(other, fcntl.LOCK_SH).close()  # nobody is left of an earlier, larger world
                other.with_suffix(".beat").unlink(missing_ok=True)
            _drop_torn_tail(self._shard)
            self._done = {record["index"] for record in read(self.folder)}
        except OSError as failure:
            raise _cannot_write(self.folder, failure) from failure

    def _place(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.lock"

    def _claim(self, identity: dict[str, Any], config: str) -> None:
        path = self.folder / "fingerprint.json"
        if path.exists():
            check_identity(self.folder, identity)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [p for p in self.folder.iterdir() if p.suffix != ".tmp" and p.name not in ("config.yaml", "logs")]
        if found and not path.exists():  # another rank may have claimed it just now
            raise RequestError(f"{self.folder} holds files but no store; choose an empty or new folder with store=...")
        _write_whole(self.folder / "config.yaml", config)
        whole = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        _write_whole(whole, json.dumps(identity, indent=1, sort_keys=True) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(whole, path)  # of several processes the first claims it
        whole.unlink()
        check_identity(self.folder, identity)

    @property
    def done(self) -> frozenset[int]:
        """Indices of the finished images."""
        return frozenset(self._done)

    def append(self, record: Record) -> None:
        """Adds one finished image, on disk when this returns.

        Raises:
            RequestError: the disk is full or the folder is not writable. What was finished before is safe.
        """
        try:
            with open(self._shard, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as failure:
            with contextlib.suppress(OSError):
                _drop_torn_tail(self._shard)
            raise _cannot_write(self.folder, failure) from failure
        self._done.add(record["index"])

    def finish(self) -> list[Record]:
        """Merges the shards into `records.jsonl`; returns the records, sorted by image."""
        records = read(self.folder)
        try:
            _write_whole(self.folder / COMPLETE, "".join(json.dumps(record) + "\n" for record in records))
            _write_whole(self.folder / "config.yaml", self._config)  # which images are visited may have changed
            for temporary in [*self.folder.glob("rank-*"), *self.folder.glob("*.tmp")]:
                temporary.unlink(missing_ok=True)
            self._lock.close()
        except OSError as failure:
            raise _cannot_write(self.folder, failure) from failure
        return records


def read(folder: str | Path) -> list[Record]:
    """The records of a store, finished or not, sorted by image.

    Raises:
        RequestError: no store there, or a line (not the last) that is not JSON.
    """
    folder = Path(folder)
    if not (folder / "fingerprint.json").is_file():
        raise RequestError(f"{folder} is not a store (it has no fingerprint.json); name the folder that a run printed")
    records: dict[int, Record] = {}
    for path in sorted(folder.glob("rank-*.jsonl")) + [p for p in [folder / COMPLETE] if p.exists()]:
        try:
            lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        except FileNotFoundError:  # the run has just finished: its records are one file now
            return read(folder)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records[operator.index(record["index"])] = record
            except (ValueError, KeyError, TypeError) as failure:
                raise RequestError(
                    f"{path}, line {number}, is damaged; restore the file or delete the line"
                ) from failure
    return [records[index] for index in sorted(records)]


def holds(folder: Path, identity: dict[str, Any], indices: Iterable[int]) -> bool:
    """Whether a folder is the finished store of a run of this identity, with all of these images."""
    if not (folder / COMPLETE).exists() or read_identity(folder) != identity:
        return False
    return set(indices) <= {record["index"] for record in read(folder)}


def read_identity(folder: str | Path) -> dict[str, Any]:
    """What the results of a store depend on."""
    path = Path(folder) / "fingerprint.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as failure:
        raise RequestError(f"{folder} is not a store (no readable fingerprint.json); name a run's folder") from failure


def check_identity(folder: str | Path, wanted: dict[str, Any], keys: Iterable[str] | None = None) -> None:
    """Refuses a store whose identity differs from `wanted` (in `keys`, or anywhere)."""
    stored = read_identity(folder)
    compared = set(keys) if keys is not None else stored.keys() | wanted.keys()
    differing = sorted(key for key in compared if stored.get(key) != wanted.get(key))
    if differing:
        raise RequestError(
            f"{folder} is the store of another run: {', '.join(differing)} differ"
            f"{'s' if len(differing) == 1 else ''}; restore the old settings, or choose another folder with store=..."
        )


def digest(identity: dict[str, Any]) -> str:
    """Ten hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_suffix(f"{path.suffix}.{uuid.uuid4().hex}.tmp")  # ranks may write the same at once
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _locked(path: Path, kind: int = fcntl.LOCK_EX) -> IO[str]:
    """Holds the rank's place until this process ends, or sees that nobody does (LOCK_SH).

    Raises:
        RequestError: another process holds it.
    """
    file = open(path, "a+")  # noqa: SIM115 - stays open as long as the store
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except BlockingIOError as failure:
        raise RequestError(
            f"another process is writing to {path.parent}; wait for it, or choose another folder with store=..."
        ) from failure
    return file


def _drop_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)


def _cannot_write(folder: Path, failure: OSError) -> RequestError:
    return RequestError(
        f"cannot write to {folder} ({failure.strerror}); free space or choose another folder with store=..., then run "
        "the same command again: finished images are kept"
    )

"""Stores: a run's results, one line an image, that survive the death of the run.

A store is a folder: `config.yaml`, `fingerprint.json` (what the results depend on), and one append-only JSON-lines
file per rank while it runs. Each finished image is one write, flushed and synced; a torn last line is dropped. When all
images are done the shards become one file, `records.jsonl`, sorted by image, whose bytes depend (times aside) on the
fingerprint alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
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
        rank: of this process.

    Raises:
        RequestError: the folder belongs to another run (names the differing keys), holds something else, or cannot be
            written.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], config: str = "", rank: int = 0):
        self.folder = Path(folder)
        self._config = config
        self._shard = self.folder / f"rank-{rank}.jsonl"
        identity = json.loads(json.dumps(identity, sort_keys=True))
        try:
            self._claim(identity, config)
            self._lock = _locked(self.folder / f"rank-{rank}.lock")
            _drop_torn_tail(self._shard)
            self._done = {record["index"] for record in read(self.folder)}
        except OSError as failure:
            raise _cannot_write(self.folder, failure) from failure

    def _claim(self, identity: dict[str, Any], config: str) -> None:
        path = self.folder / "fingerprint.json"
        if path.exists():
            check_identity(self.folder, identity)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(p for p in self.folder.iterdir() if p.suffix != ".tmp" and p.name not in ("config.yaml", "logs")):
            raise RequestError(f"{self.folder} holds files but no store; choose an empty or new folder with store=...")
        _write_whole(self.folder / "config.yaml", config)
        _write_whole(path, json.dumps(identity, indent=1, sort_keys=True) + "\n")

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
            for shard in [*self.folder.glob("rank-*.jsonl"), *self.folder.glob("rank-*.lock")]:
                shard.unlink(missing_ok=True)
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
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                records[record["index"]] = record
            except (ValueError, KeyError, TypeError) as failure:
                raise RequestError(
                    f"{path}, line {number}, is damaged; restore the file or delete the line"
                ) from failure
    return [records[index] for index in sorted(records)]


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
            f"{'s' if len(differing) == 1 else ''}; choose another folder with store=... or restore the old settings"
        )


def digest(identity: dict[str, Any]) -> str:
    """Ten hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _locked(path: Path) -> IO[str]:
    """Holds the rank's place until this process ends.

    Raises:
        RequestError: another process holds it.
    """
    file = open(path, "a")  # noqa: SIM115 - stays open as long as the store
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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

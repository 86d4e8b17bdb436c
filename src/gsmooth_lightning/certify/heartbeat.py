"""Heartbeats: what each process of a running command is doing, for `gsmooth status`."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from gsmooth_lightning.errors import RequestError

EVERY = 5.0
"""Seconds between two writes of a heartbeat."""

SILENT = 120.0
"""Seconds after which a process that says nothing is taken for dead or stuck."""


@dataclass
class Heartbeat:
    """What one process has done of its share of the images.

    Attributes:
        rank, world: of this process, and how many there are.
        todo, done: images that it began with, and finished.
        working: seconds of work on the finished ones.
        since, time: when it began, and when it last said so, in seconds since 1970.
        ended: whether it has stopped before its share was done, and said so.
    """

    folder: Path = field(repr=False)
    rank: int
    world: int
    todo: int
    done: int = 0
    working: float = 0.0
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: float = field(default_factory=time.time)
    time: float = 0.0
    ended: bool = False

    @property
    def left(self) -> float | None:
        """Seconds that the rest of its share takes, None before the first image: as long an image as those finished
        took, early stopping included."""
        return self.working / self.done * (self.todo - self.done) if self.done else None

    @property
    def silent(self) -> bool:
        """Whether the process has ended, is dead, where this machine can tell, or has said nothing for long on
        another one while it had images to do."""
        if self.ended:
            return True
        if self.host == socket.gethostname():
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:  # another user's, alive
                pass
            return False
        return self.done < self.todo and time.time() - self.time > SILENT

    def finished(self, seconds: float) -> None:
        """Counts an image."""
        self.done, self.working = self.done + 1, self.working + seconds
        self.write()

    def beat(self) -> None:
        """Says that the process lives, every few seconds at most."""
        if time.time() - self.time > EVERY:
            self.write()

    def end(self) -> None:
        """Says that the process stops early."""
        self.ended = True
        self.write()

    def write(self) -> None:
        """Replaces the file whole. A disk that is full says so when a record is written, not here."""
        self.time = time.time()
        file = self.folder / f"rank-{self.rank}.beat"
        temporary = file.with_suffix(".beat.tmp")
        content = {name: value for name, value in asdict(self).items() if name != "folder"}
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(content))
            os.replace(temporary, file)


def heartbeats(folder: str | Path) -> Sequence[Heartbeat]:
    """Those of a store's processes, by rank; of a finished run there are none.

    Raises:
        RequestError: a file that is not a heartbeat.
    """
    found = []
    for file in sorted(Path(folder).glob("rank-*.beat")):
        with contextlib.suppress(FileNotFoundError):  # the run has just finished
            try:
                found.append(Heartbeat(Path(folder), **json.loads(file.read_text())))
            except (ValueError, TypeError) as failure:
                raise RequestError(f"{file} is damaged; delete it") from failure
    return sorted(found, key=lambda beat: beat.rank)


def longest(beats: Sequence[Heartbeat]) -> float | None:
    """Seconds until the last process is done; None while one of them has finished nothing."""
    left = [beat.left if beat.todo else 0.0 for beat in beats]
    return None if None in left else max(left)  # type: ignore[type-var, return-value]


def in_time(seconds: float | None) -> str:
    """0:02:30, or ? for None."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))

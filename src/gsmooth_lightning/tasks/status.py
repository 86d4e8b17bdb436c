"""`gsmooth status`: how far a run is, from its folder alone, while it works or afterwards."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig

from gsmooth_lightning.certify.heartbeat import Heartbeat, heartbeats, in_time, longest
from gsmooth_lightning.certify.store import COMPLETE, read, read_identity
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.tables import summary_rows, text
from gsmooth_lightning.tasks.launch import command
from gsmooth_lightning.tasks.setup import images_in_words, settings_of


def status(cfg: DictConfig) -> str:
    """Prints and returns where a run of certify, bound, attack or corrupt is: its images, and each of its processes.

    Raises:
        RequestError: no run, or one that works on no single images.
    """
    folder = Path(cfg.run)
    identity, beats, records = read_identity(folder), heartbeats(folder), read(folder)
    if identity["command"] not in ("certify", "bound", "attack", "corrupt"):
        raise RequestError(
            f"{folder} is of gsmooth {identity['command']}, which shows its own progress; name a folder of certify, "
            "bound, attack or corrupt"
        )
    settings = settings_of(folder)
    rows = {
        "run": f"{identity['command']}, {identity.get('source', '')} ({images_in_words(settings, records)})",
        "state": state(folder, beats),
    }
    if beats:
        done, todo = sum(beat.done for beat in beats), sum(beat.todo for beat in beats)
        rows["images"] = f"{len(records)} finished; {done} of {todo} since {at(min(beat.since for beat in beats))}"
        rows["left"] = in_time(longest(beats))
    shown = text({str(folder): rows | summary_rows(records)})
    if beats:
        shown += "\n\n" + text({f"process {beat.rank}": process_rows(beat) for beat in beats})
    print(shown)
    return shown


def state(folder: Path, beats: Sequence[Heartbeat]) -> str:
    if not beats and (folder / COMPLETE).exists():
        return "finished"
    if not beats and (folder / "bounds").is_dir():
        return f"calibrating its bound, which is {state(folder / 'bounds', heartbeats(folder / 'bounds'))}"
    if not beats:
        return "not begun; run its command again"
    silent = [str(beat.rank) for beat in beats if beat.silent]
    if len(silent) == len(beats):
        return f"stopped, no sign of life since {at(max(beat.time for beat in beats))}; run its command again to go on"
    if silent:
        return f"running, but process {', '.join(silent)} gives no sign of life: dead or stuck"
    return f"running on {len(beats)} process{'es' if len(beats) > 1 else ''}"


def process_rows(beat: Heartbeat) -> dict[str, str]:
    """The lines of one process."""
    return {
        "host, pid": f"{beat.host}, {beat.pid}",
        "images": f"{beat.done} of {beat.todo}",
        "seconds an image": f"{beat.working / beat.done:.3g}" if beat.done else "?",
        "left": in_time(beat.left if beat.todo else 0.0),
        "last sign of life": at(beat.time),
    }


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def main() -> None:
    command("status", status)


if __name__ == "__main__":
    main()

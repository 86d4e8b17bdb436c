"""What each command shows on a wandb dashboard, read back from offline runs: live curves, pictures, lineage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from hydra import compose, initialize_config_module

from conftest import ROOT, SMALL, records, run_main, run_task, script, shell
from gsmooth_lightning.certify.store import digest, read_identity
from gsmooth_lightning.model import file_hash
from test_wandb import WANDB, history_of, offline, scan, table  # noqa: F401 - a fixture


def run_of(folder: Path) -> Path:
    (run,) = (folder / "wandb").glob("offline-run-*")
    return run


def artifacts(run: Path) -> dict[str, dict[str, Any]]:
    """Artifacts that an offline run made: name -> type, what they were made from, and their files."""
    wandb.teardown()
    (file,) = run.glob("run-*.wandb")
    found = {}
    for record in scan(file):
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
            made = record.request.log_artifact.artifact
        elif record.WhichOneof("record_type") == "artifact":
            made = record.artifact
        else:
            continue
        files = sorted(entry.path for entry in made.manifest.contents)
        found[made.name] = {"type": made.type, **json.loads(made.metadata or "{}"), "files": files}
    return found


def summary(run: Path) -> dict[str, Any]:
    """The last value of each key of a run's summary."""
    (file,) = run.glob("run-*.wandb")
    found: dict[str, Any] = {}
    for record in scan(file):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


@pytest.fixture
def trained(checkpoint: Path) -> str:
    return f"checkpoint-{file_hash(checkpoint)[:10]}"


def test_certify_shows_a_live_curve_pictures_and_what_it_was_made_from(
    offline: Path,  # noqa: F811
    checkpoint: Path,
    trained: str,
) -> None:
    options = (*WANDB, "images.in_flight=1", f"checkpoint={checkpoint}", f"store={offline}/run")
    folder = run_task("certify", *options)
    run, stored = run_of(folder), records(folder)
    history = history_of(run)
    assert history["live/images"] == [1, 2, 3, 4]
    hits = np.cumsum([r["prediction"] == r["label"] for r in stored]) / [1, 2, 3, 4]
    assert history["live/certified at 0 degrees"] == pytest.approx(hits.tolist())
    spent = [np.mean([r["evaluations"] for r in stored[: k + 1]]) for k in range(4)]
    assert history["live/evaluations"] == pytest.approx(spent)
    assert all(speed > 0 for speed in history["live/images a second"])
    columns, rows = table(history, "images", run)
    assert columns == ["index", "label", "prediction", "radius", "clean", "lower end", "upper end"]
    assert [row[0] for row in rows] == [r["index"] for r in stored]
    assert all(cell == "Image" for row in rows for cell in row[4:])  # the table's artifact holds them
    right = [r["radius"] if r["prediction"] == r["label"] else 0 for r in stored]
    assert summary(run)["average_certified_radius"] == pytest.approx(np.mean(right))
    made = artifacts(run)
    (tables,) = [a for name, a in made.items() if a["type"] == "run_table" and name.endswith("-images")]
    files = [file for file in tables["files"] if file.endswith(".png")]
    assert len(files) >= 4  # clean images differ; an end of a range of 0 is the clean image
    name = f"store-{digest(read_identity(folder))}"
    assert made[name]["type"] == "store"
    assert made[name]["used"] == [trained]
    assert {"config.yaml", "fingerprint.json", "records.jsonl"} <= set(made[name]["files"])


def test_train_bound_and_attack_show_their_own(offline: Path) -> None:  # noqa: F811
    checkpoint = run_task("train", *WANDB, "train.epochs=1", f"store={offline}/trained")
    made = artifacts(run_of(offline / "trained"))
    name = f"checkpoint-{file_hash(checkpoint)[:10]}"
    assert made[name] == {"type": "checkpoint", "used": [], "files": ["classifier.ckpt"]}
    bounds = run_task("bound", *WANDB, f"store={offline}/bounds")
    history = history_of(run_of(bounds))
    (histogram,) = history["E"]
    assert histogram["_type"] == "histogram"
    assert sum(histogram["values"]) == 4
    values = [r["value"] for r in records(bounds)]
    assert history["live/E"][-1] == pytest.approx(np.mean(values))
    attacked = run_task(
        "attack", *WANDB, f"checkpoint={checkpoint}", "attack.k=4", "attack.n=32", f"store={offline}/attack"
    )
    run = run_of(attacked)
    history = history_of(run)
    columns, rows = table(history, "images", run)
    assert columns == ["index", "label", "worst", "clean", "worst attack"]
    assert [row[2] for row in rows] == [str(r["worst"]) for r in records(attacked)]
    alive = [all(c == r["label"] for c in r["smoothed"]) for r in records(attacked)]
    assert summary(run)["accuracy_under_attack/smoothed"] == np.mean(alive)
    assert history["live/accuracy under attack, smoothed"][-1] == np.mean(alive)
    assert artifacts(run)[f"store-{digest(read_identity(attacked))}"]["used"] == [name]


def test_a_report_is_an_artifact_made_from_its_stores(offline: Path, certified: Path) -> None:  # noqa: F811
    ended = run_main("report", f"stores=[{certified}]", f"out={offline}/report", "logger=wandb")
    assert ended.code == 0, ended.err
    run = run_of(offline / "report")
    history = history_of(run)
    columns, rows = table(history, "table", run)
    assert "certified at 0 degrees" in columns
    assert len(rows) == 1
    assert history["report"][0]["_type"] == "image-file"
    (made,) = [a for a in artifacts(run).values() if a["type"] == "report"]
    assert made["used"] == [f"store-{digest(read_identity(certified))}"]
    assert {"report.md", "report.png"} <= set(made["files"])


def test_a_comparison_has_a_run_of_its_own(offline: Path, checkpoint: Path) -> None:  # noqa: F811
    few = [o for o in SMALL if o != "logger=none" and not o.startswith(("sampling", "error"))]
    run_task(
        "compare", *few, "logger=wandb", "only=[joint]", "images.first=2", f"checkpoint={checkpoint}",
        f"store={offline}/all",
    )  # fmt: skip
    history = history_of(run_of(offline / "all"))
    assert history["table"][0]["nrows"] == 1
    assert "live/images" in history_of(run_of(offline / "all" / "joint"))


def test_a_server_that_does_not_answer_stops_nothing(
    offline: Path,  # noqa: F811
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is a login, and no network: the run is logged offline."""
    monkeypatch.setattr("gsmooth_lightning.report.wandb.PATIENCE", 2)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="logged offline"):
        folder = run_task("certify", *WANDB, f"checkpoint={checkpoint}", "images.first=1", f"store={offline}/run")
    assert len(records(folder)) == 1
    assert history_of(run_of(folder))["live/images"] == [1]


@pytest.mark.slow
def test_of_several_processes_the_first_logs(offline: Path, checkpoint: Path) -> None:  # noqa: F811
    line = [o for o in WANDB if not o.startswith("trainer=")]
    ended = shell(
        script("gsmooth"), "certify", *line, f"checkpoint={checkpoint}", "trainer=ddp", "trainer.accelerator=cpu",
        "devices=2", f"store={offline}/run", cwd=offline,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    history = history_of(run_of(offline / "run"))
    assert history["live/images"] == [1, 2]  # of its own share, while it works
    assert history["certificates"][0]["nrows"] == 4


def test_the_wandb_sweep_drives_the_same_commands() -> None:
    """The agent's arguments compose, and its metric is one that certify writes."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb_sigma.yaml").read_text())
    assert sweep["command"][:2] == ["gsmooth", "certify"]
    assert sweep["metric"]["name"] == "average_certified_radius"
    fixed = [word for word in sweep["command"][2:] if not word.startswith("${")]
    chosen = [f"{name}={spec['values'][0]}" for name, spec in sweep["parameters"].items() if "values" in spec]
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        cfg = compose("certify", [*fixed, *chosen])
    assert cfg.logger._target_ == "gsmooth_lightning.report.wandb.logger"

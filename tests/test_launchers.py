"""Sweeps: jobs side by side, skipped when they are done, gone on with when they were stopped. Real launchers, real
processes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import joblib
import pytest
from hydra import compose as compose_all
from hydra import initialize_config_module
from joblib.externals import loky
from omegaconf import OmegaConf

from conftest import QUIET, ROOT, compose, one_sentence, records, run_main, run_task, snapshot, timeless

LAUNCHERS = sorted(path.stem for path in ROOT.glob("conf/launcher/*.yaml"))
SEARCHES = [
    path.stem for path in ROOT.glob("conf/hparams_search/*.yaml") if path.read_text().startswith("# @package _global_")
]
JOBLIB = ("-m", "launcher=joblib", "hydra.launcher.n_jobs=2")

CONSTANT = (
    *(o for o in QUIET if "backend" not in o),
    *("model=black_box", "threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none"),
    *("certify=direct", "noise.sigma=0.25", "sampling.n0=32", "sampling.n=128", "images.first=2"),
)
"""Overrides for a network that is a function of the user's own, and cheap."""

PROBE = """
import os, pathlib, time, torch

pathlib.Path(f"threads-{os.getpid()}").write_text(str(torch.get_num_threads()))


def zeros(x):
    return torch.zeros(len(x), dtype=torch.long)


def counted(x):
    with open("calls", "a") as file:
        file.write(".")
    return zeros(x)


def slow(x):
    time.sleep(0.1)
    return zeros(x)


def fatal(x):
    os.kill(os.getpid(), 9)


class Broken:
    def __init__(self, **options):
        pass

    def split(self, name, classes):
        return {}["what was forgotten"]
"""


@pytest.fixture
def probe(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder but for a user's functions; nobody has set a number of threads."""
    (here / "probe.py").write_text(PROBE)
    monkeypatch.delitem(sys.modules, "probe", raising=False)
    monkeypatch.syspath_prepend(here)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return here


def found_by(name: str, *overrides: str) -> bytes:
    """The records that a run of its own makes, times aside."""
    return timeless(run_task("certify", *CONSTANT, "model.function.path=probe.zeros", f"store={name}", *overrides))[
        "records.jsonl"
    ]


def launcher(*overrides: str) -> dict:
    """Hydra's own part of a command's configuration, what it takes from the rest resolved."""
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        node = compose_all("certify", list(overrides), return_hydra_config=True).hydra.launcher
        return {key: node[key] for key in node if key not in ("submitit_folder", "name")}


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("option", LAUNCHERS)
def test_a_launcher_is_no_part_of_a_run(option):
    """The job's own configuration is the same with it and without: so are the store and its fingerprint."""
    for command in ("train", "certify"):
        assert compose(command, f"launcher={option}") == compose(command)


def test_slurm_starts_a_process_for_each_device():
    """tasks a node = devices, nodes = trainer.num_nodes; without trainer=ddp one of each."""
    one = launcher("launcher=slurm")
    assert (one["nodes"], one["tasks_per_node"], one["gpus_per_node"]) == (1, 1, 1)
    many = launcher("launcher=slurm", "trainer=ddp", "devices=8", "++trainer.num_nodes=2")
    assert (many["nodes"], many["tasks_per_node"], many["gpus_per_node"]) == (2, 8, 8)
    assert many["max_num_timeout"] > 0, "a job that ran out of time is queued again"


@pytest.mark.parametrize("option", SEARCHES)
def test_searches_sweep_over_options_there_are(option):
    """Each parameter of the sweep is one of every command's configuration, and each of its values composes."""
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        found = compose_all("certify", [f"hparams_search={option}"], return_hydra_config=True).hydra.sweeper.params
    assert found
    for name, values in found.items():
        for command in ("train", "certify"):
            chosen = [OmegaConf.select(compose(command, f"{name}={value}"), name) for value in values.split(",")]
            assert len(set(map(str, chosen))) == len(chosen) > 1


def test_launchers_that_are_not_installed(here):
    """What Hydra does not find may be missing: the sentence says how to get it."""
    ended = run_main("certify", "-m", "hydra/launcher=ray", *CONSTANT, "seed=0,1")
    one_sentence(ended, "hydra/launcher/ray", "pip install 'gsmooth-lightning[launchers]'")


def test_a_finished_run_asks_its_network_nothing(probe):
    """Nor is it optimised: compiling would take longer than all the rest. More images are certified as ever."""
    own = (*CONSTANT, "model.function.path=probe.counted", "store=run")
    run_task("certify", *own)
    calls = (probe / "calls").stat().st_size
    assert calls > 0
    run_task("certify", *own)
    assert (probe / "calls").stat().st_size == calls
    run_task("certify", *own, "images.first=3")
    assert (probe / "calls").stat().st_size > calls
    assert len(records(probe / "run")) == 3


# ---------------------------------------------------------------- joblib


def test_joblib_sweep(probe):
    """Two jobs at once fill the stores that two runs fill, and share out the cores; the same sweep again leaves every
    byte as it is, the seconds of each image too: nothing is sampled anew."""
    loky.get_reusable_executor().shutdown()  # processes of other tests, in other folders
    jobs = ("model.function.path=probe.zeros", "seed=0,1")
    ended = run_main("certify", *JOBLIB, *CONSTANT, *jobs)
    assert (ended.code, ended.error, ended.err) == (0, None, "")
    stores = list((probe / "runs").glob("certify-*"))
    threads = [int(path.read_text()) for path in probe.glob("threads-*")]
    assert len(stores) == len(threads) == 2, "each job has a store and a process of its own"
    assert sum(threads) <= max(2, joblib.cpu_count())
    before = snapshot(probe / "runs")
    again = run_main("certify", *JOBLIB, *CONSTANT, *jobs)
    assert (again.code, again.error, again.err) == (0, None, "")
    assert snapshot(probe / "runs") == before
    alone = {found_by(f"alone-{seed}", f"seed={seed}") for seed in (0, 1)}
    assert {timeless(store)["records.jsonl"] for store in stores} == alone


def test_a_mistake_in_one_job_stops_no_other(probe):
    """The other job's store is whole; then one sentence says the mistake, after Hydra's line that names the job."""
    jobs = ("model.function.path=probe.zeros", "sampling.n=3,128", f"store={probe}/n-${{sampling.n}}")
    ended = run_main("certify", *JOBLIB, *CONSTANT, *jobs)
    assert (ended.code, ended.error) == (2, None), ended.err
    assert len(ended.lines) == 2, ended.err
    assert "sampling.n=3" in ended.lines[0]
    assert ended.lines[1].startswith("gsmooth certify: n=3 draws can show at most")
    assert [record["n"] for record in records(probe / "n-128")] == [128, 128]


def test_a_bug_in_a_job_keeps_its_traceback(probe):
    """It comes from another process, and still says where it happened."""
    own = ("data.dataset._target_=probe.Broken", "model.function.path=probe.zeros", "seed=0,1")
    ended = run_main("certify", *JOBLIB, *CONSTANT, *own)
    assert isinstance(ended.error, KeyError)
    assert 'return {}["what was forgotten"]' in "".join(ended.error.__notes__)


def test_several_devices_in_a_job_are_refused(probe):
    """joblib starts one process a job."""
    jobs = ("trainer=ddp", "devices=2", "model.function.path=probe.zeros", "seed=0,1", f"store={probe}/s-${{seed}}")
    ended = run_main("certify", *JOBLIB, *CONSTANT, "trainer.accelerator=cpu", *jobs)
    assert ended.code == 2
    assert "launcher=slurm" in ended.lines[-1]
    assert not list(probe.glob("s-*"))


def test_a_killed_job_ends_the_sweep_in_a_sentence(probe):
    """As when memory runs out: no traceback of the launcher's."""
    ended = run_main("certify", *JOBLIB, *CONSTANT, "model.function.path=probe.fatal", "seed=0,1")
    one_sentence(ended, "launcher stopped", "run the same command again")


# ---------------------------------------------------------------- submitit


def preempt(folder: Path, failed: list[str]) -> None:
    """Sends the one job of a sweep SIGTERM after its first image, and submitit's signal of a preemption after its
    third. The job's folder is named after submitit's process that waits for it."""
    deadline, shard = time.monotonic() + 120, folder / "run" / "rank-0.jsonl"
    for number, lines in ((signal.SIGTERM, 1), (signal.SIGUSR2, 3)):
        while not shard.exists() or shard.read_bytes().count(b"\n") < lines:
            if time.monotonic() > deadline:
                failed.append(f"{lines} images were never finished")
                return
            time.sleep(0.01)
        (waiting,) = (int(path.name) for path in (folder / "runs/sweep/.submitit").iterdir() if path.name.isdigit())
        (job,) = Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split()
        os.kill(int(job), number)


def test_a_preempted_job_is_queued_again_and_ends_as_if_it_had_not_been(probe):
    """submitit's local executor: SIGTERM, which announces the end on a cluster, stops nothing; at submitit's own signal
    the job stops in the middle of an image, starts anew and ends in the same records."""
    failed: list[str] = []
    watch = threading.Thread(target=preempt, args=(probe, failed))
    watch.start()
    more = ("images.first=8", "images.in_flight=1")
    jobs = ("model.function.path=probe.slow", "store=run", *more)
    ended = run_main("certify", "-m", "launcher=submitit", *CONSTANT, *jobs)
    watch.join()
    assert not failed
    assert (ended.code, ended.error, ended.err) == (0, None, "")
    (log,) = (probe / "runs/sweep/.submitit").glob("*/*_log.out")
    assert "Requeued job" in log.read_text()
    assert log.read_text().count("Loading pickle") == 2, "it was started twice"
    assert timeless(probe / "run")["records.jsonl"] == found_by("alone", *more)


def test_without_slurm_the_launcher_says_so(probe, monkeypatch):
    """srun is not there: one sentence."""
    monkeypatch.setenv("PATH", str(probe))
    ended = run_main("certify", "-m", "launcher=slurm", *CONSTANT, "model.function.path=probe.zeros", "seed=0,1")
    one_sentence(ended, "srun")


def test_slurm_script(probe, monkeypatch):
    """What sbatch is given: an array of jobs, a process for each device, a signal before the time is up."""
    (tools := probe / "bin").mkdir()
    for name in ("sbatch", "srun"):  # a cluster that takes a copy of the script, and then no job
        (tools / name).write_text(f'#!/bin/sh\ncp "$1" "{probe}/script"\necho "no such partition" >&2\nexit 1\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    jobs = ("hydra.launcher.partition=gpu", "trainer=ddp", "devices=4", "model.function.path=probe.zeros", "seed=0,1,2")
    ended = run_main("certify", "-m", "launcher=slurm", *CONSTANT, *jobs)
    assert ended.code == 2, ended.err
    assert ended.lines[-1].startswith("gsmooth certify: the sweep's launcher stopped: no such partition")
    script = (probe / "script").read_text()
    for line in ("array=0-2%3", "ntasks-per-node=4", "gpus-per-node=4", "nodes=1", "partition=gpu", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in script

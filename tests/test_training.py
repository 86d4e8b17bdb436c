"""Training: what an interruption leaves, and what each option does to the weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import QUIET, environment, interrupt, run_main, run_task, shell, snapshot
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ClassifierModule

FEW = (*QUIET, "noise.sigma=0.25", "law.sigma=20", "train.epochs=4", "train.batch_size=256")
FLIP = "+data.augment._target_=torchvision.transforms.v2.RandomHorizontalFlip"


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="plain"),
        pytest.param(("train.ema=0.8",), id="average of the weights"),
        pytest.param(("train.patience=3", FLIP, "data.workers=2"), id="augmented in two processes, best kept"),
        pytest.param(("objective=smoothadv", "train.accumulate_grad_batches=2"), id="SmoothAdv, accumulated"),
        pytest.param(("train=steps", "train.epochs=4", "train.scheduler.step_size=2"), id="SGD in steps"),
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(options, here, monkeypatch):
    """Bit for bit: order of the images, augmentation, noise, optimizer, schedule and averages go on as they were."""
    whole = weights(run_task("train", *FEW, *options, "store=whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, ClassifierModule, epoch=2)
        with pytest.raises(ZeroDivisionError):
            run_task("train", *FEW, *options, "store=cut")
    assert (here / "cut" / "resume.ckpt").exists()
    assert not (here / "cut" / "classifier.ckpt").exists()
    epochs: list[int] = []
    with monkeypatch.context() as patch:
        step = ClassifierModule.training_step
        patch.setattr(
            ClassifierModule,
            "training_step",
            lambda self, batch, i: (epochs.append(self.current_epoch), step(self, batch, i))[1],
        )
        resumed = weights(run_task("train", *FEW, *options, "store=cut"))
    assert set(epochs) == {2, 3}, "finished epochs are not repeated"
    assert equal(resumed, whole)
    assert not list((here / "cut").glob("resume*")) + list((here / "cut").glob("best*"))


def test_killed_training_goes_on(here):
    """A real process, a real SIGKILL. All runs are processes of their own, as they are typed: what other tests leave in
    this one, such as the rounding mode that compiled code sets, would move the last bits."""
    command = [sys.executable, "-m", "gsmooth_lightning.tasks.train", *FEW, "train.epochs=12"]
    child = subprocess.Popen(
        [*command, "store=cut"], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    resume, deadline = here / "cut" / "resume.ckpt", time.monotonic() + 120
    try:
        while not resume.exists():
            assert child.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (here / "cut" / "classifier.ckpt").exists()
    for store in ("cut", "whole"):
        assert shell(*command, f"store={store}", cwd=here).code == 0
    assert equal(weights(here / "cut" / "classifier.ckpt"), weights(here / "whole" / "classifier.ckpt"))


def test_the_seed_decides_the_weights(here):
    first = weights(run_task("train", *FEW, "train.epochs=2", "store=first"))
    torch.rand(17)  # the state of torch's generator before the training does not matter
    assert equal(first, weights(run_task("train", *FEW, "train.epochs=2", "store=second")))
    assert not equal(first, weights(run_task("train", *FEW, "train.epochs=2", "seed=1", "store=third")))


def test_a_resumed_training_must_be_the_same(here, monkeypatch):
    """Another learning rate is another run, also while the first is unfinished."""
    with monkeypatch.context() as patch:
        interrupt(patch, ClassifierModule, epoch=1)
        with pytest.raises(ZeroDivisionError):
            run_task("train", *FEW, "store=cut")
    before = snapshot(here)
    for change in (
        "train.optimizer.lr=1e-3",
        "train.ema=0.5",
        "objective=smoothadv",
        FLIP,
        "train.precision=bf16-mixed",
    ):
        with pytest.raises(RequestError, match="another run"):
            run_task("train", *FEW, change, "store=cut")
    assert snapshot(here) == before


def test_training_starts_from_a_checkpoint(checkpoint, here):
    """With a learning rate of nearly nothing the weights stay where the checkpoint put them."""
    still = ("train.optimizer.lr=1e-12", "train.epochs=1")
    tuned = weights(run_task("train", *FEW, *still, f"checkpoint={checkpoint}", "store=tuned"))
    for key, value in weights(checkpoint).items():
        if key.endswith(("weight", "bias")) and value.is_floating_point():
            torch.testing.assert_close(tuned[key], value, atol=1e-6, rtol=0)
    fresh = weights(run_task("train", *FEW, *still, "store=fresh"))
    assert not torch.allclose(tuned["smoothed.base.head.1.weight"], fresh["smoothed.base.head.1.weight"], atol=1e-3)


def test_the_average_of_the_weights_is_what_is_saved(here, monkeypatch):
    """EMA by hand over the weights after each step, from those after the first."""
    path: list[Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            ClassifierModule,
            "on_train_batch_end",
            lambda self, *_: path.append(self.smoothed.base.head[1].weight.detach().clone()),
            raising=False,
        )
        saved = weights(run_task("train", *FEW, "train.epochs=1", "train.ema=0.8", "store=run"))
    average = path[0]
    for value in path[1:]:
        average = 0.8 * average + 0.2 * value
    torch.testing.assert_close(saved["smoothed.base.head.1.weight"], average)


def test_patience_stops_and_keeps_the_best(here, monkeypatch):
    """Validation losses are prescribed: the best is epoch 1's, and two worse ones end the training."""
    losses = [1.0, 0.5, 0.7, 0.6, 0.1]
    path: list[Tensor] = []

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", losses[self.current_epoch], on_epoch=True, batch_size=len(batch[0]))

    def on_train_epoch_end(self):
        path.append(self.smoothed.base.head[1].weight.detach().clone())

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierModule, "validation_step", validation_step)
        patch.setattr(ClassifierModule, "on_train_epoch_end", on_train_epoch_end, raising=False)
        saved = weights(run_task("train", *FEW, "train.epochs=5", "train.patience=2", "store=run"))
    assert len(path) == 4
    torch.testing.assert_close(saved["smoothed.base.head.1.weight"], path[1], atol=0, rtol=0)


@pytest.mark.parametrize("train", ["onecycle", "steps"])
def test_the_schedule_reaches_its_end(train, here, monkeypatch):
    """One cycle ends at almost nothing after exactly the steps taken; steps fall tenfold at their epochs."""
    rates: list[float] = []
    own = ("train.scheduler.step_size=2",) if train == "steps" else ()
    with monkeypatch.context() as patch:
        patch.setattr(
            ClassifierModule,
            "on_train_batch_start",
            lambda self, *_: rates.append(self.trainer.optimizers[0].param_groups[0]["lr"]),
            raising=False,
        )
        run_task(
            "train", *FEW, f"train={train}", "train.epochs=4", "train.accumulate_grad_batches=2", *own, "store=run"
        )
    if train == "onecycle":
        assert max(rates) == pytest.approx(3e-3, rel=0.05)
        assert rates[-1] < 1e-4
    else:
        assert [round(rate, 6) for rate in rates[:: len(rates) // 4]] == [0.1, 0.1, 0.01, 0.01]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_mixed_precision_trains(precision, here):
    """Weights stay float32; transformations and images are never rounded to 16 bits."""
    saved = weights(run_task("train", *FEW, "train.epochs=1", f"train.precision={precision}", "store=run"))
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.ema=1", ("train.ema", "between 0 and 1")),
        ("train.ema=often", ("train.ema", "often")),
        ("train.patience=0", ("train.patience", "0")),
        ("train.interval=week", ("train.interval", "week")),
        ("train.accumulate_grad_batches=0", ("train.accumulate_grad_batches", "0")),
        ("train.precision=17", ("17",)),
        ("+trainer.precision=16-mixed", ("train.precision",)),
        ("objective=nosuch", ("objective", "smoothadv")),
        ("objective=smoothadv objective.m=0", ("objective.m", "got 0")),
        ("objective=smoothadv objective.epsilon=-1", ("objective.epsilon", "got -1")),
        ("objective=smoothadv objective.attack.norm=l7", ("norm", "l7")),
        ("objective=smoothadv objective.attack.steps=0", ("steps",)),
        ("objective=smoothadv objective.attack.foo=1", ("foo",)),
        ("checkpoint=nosuch.ckpt", ("nosuch.ckpt",)),
        ("data.workers=-1", ("data.workers", "-1")),
    ],
)
def test_training_mistakes(override, words, here):
    """One sentence, exit 2, nothing written but what the mistake needed to show."""
    ended = run_main("train", *FEW, "train.epochs=1", *override.split(), "store=run")
    assert ended.error is None, ended.error
    assert ended.code == 2
    assert len(ended.lines) == 1, ended.err
    for word in words:
        assert word in ended.err


def test_progress_tells_the_time_left(here, capsys):
    """A bar of Lightning's with the time of all epochs that are left."""
    run_task("train", *(o for o in FEW if "progress" not in o), "train.epochs=2", "store=run")
    bars = capsys.readouterr()
    assert "left=0:00:0" in bars.out + bars.err

"""What ends a training in one sentence: networks that do not fit their inputs, augmentations and sizes that fail, and
weights that grew beyond all bounds. Bugs keep their tracebacks."""

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import layouts
from conftest import QUIET, SMALL, one_sentence, run_main, snapshot
from gsmooth_lightning.data import GTSRB, Digits, Files
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ClassifierModule
from gsmooth_lightning.model import SmallCNN
from gsmooth_lightning.model.fused import check_runs

ONCE = (*QUIET, "data.enlarge=null", "data.size=8", "preprocess=none", "train.epochs=1", "train.limit_train_batches=2")
ONCE = (*ONCE, "model.widths=[4,4]", "model.hidden=8")
CROP = "+data.augment._target_=torchvision.transforms.v2.RandomCrop"

FAILURES = {
    "RuntimeError": RuntimeError("sizes differ\nin detail"),
    "TypeError": TypeError("one argument too many"),
    "ValueError": ValueError("not enough values"),
    "IndexError": IndexError("no fifth side"),
    "AssertionError": AssertionError(),
    "KeyError": KeyError("a bug"),
    "RequestError": RequestError("use another side"),
}


class Custom(nn.Module):
    """A network of somebody's own that fails, or answers in its own way."""

    def __init__(self, failure: str | None = None):
        super().__init__()
        self.failure, self.head = failure, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> object:
        if self.failure is not None:
            raise FAILURES[self.failure]
        return {"logits": self.head(x.flatten(1))}


def custom(*options: str) -> tuple[str, ...]:
    kept = (option for option in ONCE if not option.startswith("model"))
    return (*kept, "model=custom", "model._target_=test_training_mistakes.Custom", *options)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("RuntimeError", "(sizes differ)"),
        ("TypeError", "(one argument too many)"),
        ("ValueError", "(not enough values)"),
        ("IndexError", "(no fifth side)"),
        ("AssertionError", "(AssertionError)"),
    ],
)
def test_what_networks_raise_on_inputs_that_do_not_fit(failure, words):
    """The first line of it, with the inputs' shape; torch, torchvision, timm and plain Python raise these."""
    with pytest.raises(RequestError, match="check model against data") as said:
        check_runs(Custom(failure), torch.zeros(3, 1, 8, 8))
    assert str(said.value).startswith(f"the network fails on inputs of shape (1, 8, 8) {words}; ")


def test_what_is_no_misfit_passes_as_it_is():
    """A sentence of the network's own, and what no input of another shape would cause."""
    for failure in ("RequestError", "KeyError"):
        with pytest.raises(type(FAILURES[failure])) as said:
            check_runs(Custom(failure), torch.zeros(1, 1, 8, 8))
        assert said.value is FAILURES[failure]
    with pytest.raises(RequestError, match="must return a tensor, not dict"):
        check_runs(Custom(), torch.zeros(1, 1, 8, 8))
    check_runs(SmallCNN(size=8), torch.zeros(1, 1, 8, 8))


MISFITS = {
    "of another size": (("model.size=12",), ("inputs of shape (1, 8, 8)", "check model against data and preprocess")),
    "of other channels": (("data.channels=3",), ("inputs of shape (1, 8, 8)", "3 channels")),
    "with other channels, of any size": (("model=cifar_resnet", "data.channels=3"), ("inputs of shape (1, 8, 8)",)),
    "of the enlarged size": (("model=lowpass_cnn", "data.size=28"), ("inputs of shape (1, 8, 8)",)),
    "of inputs before preprocessing": (
        ("preprocess=disc_spectrum", "preprocess.steps.1.bandwidth=2"),
        ("shape (1, 5, 5)",),
    ),
    "of other classes": (("model.classes=5",), ("5 outputs", "10 classes")),
    "of uncropped training images": ((CROP, "+data.augment.size=6"), ("inputs of shape (1, 6, 6)",)),
}


@pytest.mark.parametrize("case", MISFITS)
def test_networks_that_do_not_fit_are_not_trained(case, here):
    """One sentence, exit status 2, and no folder."""
    options, words = MISFITS[case]
    kept = ONCE if not options[0].startswith("model=") else [o for o in ONCE if not o.startswith("model")]
    one_sentence(run_main("train", *kept, *options, "store=run"), *words)
    assert snapshot(here) == {}


@pytest.mark.parametrize("failure", ["TypeError", "ValueError", "AssertionError"])
@pytest.mark.parametrize("command", ["train", "certify"])
def test_custom_networks_that_fail(command, failure, here):
    weights = here / "weights.ckpt"
    torch.save(Custom().state_dict(), weights)
    before, options = snapshot(here), custom(f"+model.failure={failure}")
    if command == "certify":
        options = (*SMALL, *options, f"checkpoint={weights}")
    one_sentence(run_main(command, *options, "store=run"), "the network fails on inputs of shape (1, 8, 8)")
    one_sentence(run_main("train", *custom(), "store=run"), "must return a tensor, not dict")
    assert snapshot(here) == before


def test_a_network_that_fits_training_but_not_validation(here):
    """Crops of 8x8 train a network of 8x8; validation sees files as they are, 9x12."""
    layouts.folders(here / "data", layouts.TREE, height=9, width=12)
    before = snapshot(here)
    options = (*ONCE, *layouts.OF_TREE, "data.dataset.size=null", "data.workers=0", CROP, "+data.augment.size=8")
    one_sentence(run_main("train", *options, "store=run"), "the network fails on inputs of shape (3, 9, 12)")
    assert snapshot(here) == before


def test_different_sizes_come_before_a_network_of_one(here):
    """No network of one size fits them all: what to change is the data. Of one size, it is the network."""
    layouts.folders(here / "data", layouts.TREE, height=12, width=12)
    options = (*ONCE, *layouts.OF_TREE, "data.dataset.size=null", "data.workers=0", "store=run")
    one_sentence(run_main("train", *options), "the network fails on inputs of shape (3, 12, 12)")
    layouts.picture(sorted((here / "data" / "train" / "cat").iterdir())[1], height=10, width=14)
    before = snapshot(here)
    one_sentence(run_main("train", *options), "different shapes", "(3, 10, 14) and (3, 12, 12)", "data.dataset.size")
    assert snapshot(here) == before


def test_a_classifier_that_does_not_fit_is_not_denoised_for(here):
    """Its weights fit the model, and the model not the data."""
    torch.save(SmallCNN(size=12, widths=(4, 4), hidden=8).state_dict(), here / "classifier.ckpt")
    before = snapshot(here)
    options = (*ONCE, "model.size=12", "checkpoint=classifier.ckpt", "denoiser.depth=3", "denoiser.width=4")
    ended = run_main("denoise", *options, "noise.sigma=0.3", "threat=l2", "transform=identity", "law=none", "store=run")
    one_sentence(ended, "the network fails on inputs of shape (1, 8, 8)")
    assert snapshot(here) == before


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, IndexError])
def test_bugs_in_a_training_step_keep_their_tracebacks(kind, here, monkeypatch):
    failure = kind("ours")

    def training_step(self, batch, batch_idx):
        raise failure

    monkeypatch.setattr(ClassifierModule, "training_step", training_step)
    assert run_main("train", *ONCE, "store=run").error is failure


def test_a_networks_own_bug_keeps_its_traceback(here):
    assert run_main("train", *custom("+model.failure=KeyError"), "store=run").error is FAILURES["KeyError"]


# ---------------------------------------------------------------- augmentations and sizes


def fail(raw: object) -> None:
    raise ValueError("first\nsecond")


def test_a_size_that_fails_is_not_an_augmentation_that_fails(tmp_path):
    """Each is named; both with the file."""
    layouts.picture(tmp_path / "a.png")
    files = Files([("a.png", 0)], tmp_path, 1, Image.open, fail)
    path = str(tmp_path / "a.png")
    with pytest.raises(RequestError) as said:
        files[0]
    assert str(said.value) == f"the size in data.dataset fails on {path} (first); correct its options"
    with pytest.raises(RequestError) as said:
        files.augmented(0, fail)
    assert str(said.value) == f"data.augment fails on {path} (first); correct its options"
    assert files.augmented(0, lambda image: image)[0].shape == (3, 8, 8)


def test_a_size_that_no_picture_has(here):
    """Of a data set that does not look at it before."""
    layouts.gtsrb(here)
    with pytest.raises(RequestError, match=r"the size in data\.dataset fails on .*ppm \(.*\); correct its options"):
        GTSRB(str(here), size=-4).split("test", 43)[0]


def test_augmentations_of_images_in_memory(here):
    """One that fails, one that returns nothing, and one that returns a picture."""
    train = Digits().split("train", 10)
    with pytest.raises(RequestError, match=r"data\.augment fails on training image 3 \(first\); correct its options"):
        train.augmented(3, fail)
    with pytest.raises(RequestError, match=r"data\.augment fails on training image 3 \(it returns NoneType"):
        train.augmented(3, lambda image: None)
    as_picture = train.augmented(3, lambda image: Image.fromarray(image[0].numpy()))
    assert torch.equal(as_picture[0], train[3][0])
    before = snapshot(here)
    ended = run_main("train", *ONCE, CROP, "+data.augment.size=99", "store=run")
    one_sentence(ended, "data.augment fails on training image 0 (Required crop size (99, 99)")
    assert snapshot(here) == before


# ---------------------------------------------------------------- weights


PIXELS = ("threat=l2", "transform=identity", "law=none", "error=none", "noise.sigma=0.3")
TASKS = {
    "denoise": (*PIXELS, "denoiser.depth=3", "denoiser.width=4"),
    "surrogate": ("transform=zoom_blur", "threat=zoom_blur", "network.widths=[4]", "network.hidden=4"),
}


@pytest.mark.parametrize("command", TASKS)
def test_weights_without_bounds_are_not_measured(command, here):
    """A learning rate of 1e30: the file says nothing, and has neither table nor picture; each time."""
    for _ in range(2):
        ended = run_main(command, *ONCE, *TASKS[command], "train.optimizer.lr=1e30", "store=run")
        one_sentence(ended, "NaN or infinite", "lower learning rate")
        assert not [path for path in (here / "run").iterdir() if path.suffix in (".md", ".png")]

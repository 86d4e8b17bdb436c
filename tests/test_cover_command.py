"""What the cover certificate refuses, and the command that makes it."""

import math

import numpy as np
import pytest
from torch import nn

from conftest import SMALL, one_sentence, records, run_main, timeless
from covers import ROTATION, visiting
from gsmooth_lightning.certify import AdditiveCertifier, CoverCertifier, EnumerationCertifier, JointCertifier
from gsmooth_lightning.error import ImageBound, InverseBound
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import Resize
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Uniform
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import (
    Brightness,
    Composition,
    Contrast,
    CyclicTranslation,
    GaussianBlur,
    Rotation,
    Similarity,
    Translation,
    Volume,
)

# ---------------------------------------------------------------- refusals


def refused(smoothed, threat, *words, certifier=None):
    with pytest.raises(UncertifiableError) as failure:
        (certifier or CoverCertifier(16, 1000)).check(smoothed, threat)
    assert "\n" not in str(failure.value)
    for word in words:
        assert word in str(failure.value)


def test_threats_that_are_not_covered():
    for threat in (
        PixelThreat(),
        TransformationThreat(CyclicTranslation(), -1, 1),
        TransformationThreat(Brightness(), -0.1, 0.1, saved="real"),
        TransformationThreat(Similarity(), -1, 1),
        TransformationThreat(Composition([GaussianBlur(), Brightness()]), [0, -0.1], 0.1, saved="real"),
    ):
        if isinstance(getattr(threat, "transform", None), Similarity):
            refused(visiting(), threat, "no bound is known")
        else:
            refused(visiting(), threat, "certify=direct")
    refused(visiting(), TransformationThreat(Translation(padding="reflection"), -1, 1), "no bound is known")


def test_classifiers_that_are_not_covered():
    turning = visiting(transform=Rotation(), law=Gaussian(10.0))
    refused(turning, ROTATION, "law=none", "rotation")
    refused(visiting(votes="soft"), ROTATION, "hard votes")
    refused(SmoothedClassifier(nn.Flatten(), 2), ROTATION, "noise=gaussian")
    uniform = SmoothedClassifier(nn.Flatten(), 2, noise=Uniform(-0.5, 0.5))
    refused(uniform, ROTATION, "noise=gaussian")
    full = SmoothedClassifier(nn.Flatten(), 2, noise=Gaussian(covariance=np.eye(4).tolist()))
    refused(full, ROTATION, "noise=gaussian")
    refused(visiting([Resize(8)]), ROTATION, "lipschitz")


def test_compositions_that_are_not_covered():
    psi = Composition([Rotation(), Brightness()])
    bytes_ = TransformationThreat(psi, [-10, -0.1], [10, 0.1])
    smoothed = visiting(transform=Brightness(), law=Gaussian(0.2))
    refused(smoothed, bytes_, "threat.saved=real")
    real = TransformationThreat(psi, [-10, -0.1], [10, 0.1], saved="real")
    refused(visiting(), real, "law=product, whose first part is null")
    refused(visiting(transform=psi, law=Gaussian([10.0, 0.2])), real, "law=product, whose first part is null")
    refused(visiting(transform=Contrast(), law=Gaussian(0.2)), real, "contrast")
    narrow = visiting(transform=Brightness(), law=Gaussian(0.001))
    refused(narrow, real, "raise sampling.n or noise.sigma")
    with pytest.raises(RequestError, match="do not commute"):
        Composition([Brightness(), Rotation()])
    with pytest.raises(RequestError, match="do not commute"):
        Composition([Rotation(), Volume()])


@pytest.mark.parametrize("margins", [[], [0.0], [0.5, 0.5], [0.2, 0.4], [0.5, -0.1], [math.nan]])
def test_margins_must_fall(margins):
    with pytest.raises(RequestError, match=r"certify\.margins"):
        CoverCertifier(16, 1000, margins=margins)


def test_draws_that_could_not_pass():
    with pytest.raises(RequestError, match="certifies nothing"):
        CoverCertifier(16, 10)
    refused(visiting(), ROTATION, "raise sampling.n or noise.sigma", certifier=CoverCertifier(16, 1000, margins=[4.0]))


def test_an_l2_ball_beside_a_transformation_is_paid_for_or_refused():
    """Direct, enumeration, a search on a grid, by intervals and the inverse refuse threat.l2; chords and the cover take
    it into account (above)."""
    with pytest.raises(RequestError, match=r"threat\.l2"):
        TransformationThreat(Rotation(), -1, 1, l2=-0.1)
    plan = FixedN(16, 1000)
    bright = TransformationThreat(Brightness(), -0.1, 0.1, saved="real", l2=0.1)
    refused(
        visiting(transform=Brightness(), law=Gaussian(0.2)), bright, "threat.l2=0", certifier=AdditiveCertifier(plan)
    )
    shifts = TransformationThreat(CyclicTranslation(), -1, 1, l2=0.1)
    shifted = SmoothedClassifier(nn.Flatten(), 2, CyclicTranslation(), law=Uniform(-2, 2))
    refused(shifted, shifts, "threat.l2=0", certifier=EnumerationCertifier())
    refused(shifted, shifts, "threat.l2=0", certifier=AdditiveCertifier(plan))
    turning = visiting(transform=Rotation(), law=Gaussian(10.0))
    threat = TransformationThreat(Rotation(), -10, 10, l2=0.1)
    for search in ("grid", "intervals"):
        error = ImageBound(64, 32, search=search, soft=False)
        refused(turning, threat, "threat.l2", certifier=JointCertifier(plan, error))
    with pytest.raises(UncertifiableError, match=r"threat\.l2"):
        InverseBound().check(turning, threat)
    CoverCertifier(16, 1000).check(visiting(), threat)


# ---------------------------------------------------------------- with the command

COVER = (
    *(o for o in SMALL if not o.startswith(("law", "error"))),
    "certify=cover",
    "law=none",
    "threat.low=-3",
    "threat.high=3",
    "sampling.n=256",
    "noise.sigma=0.5",
    "images.first=2",
)


def test_the_command_certifies_reports_and_resumes(checkpoint, here):
    """Raw votes of every slice are in the record, the table says sound, a run that stopped is resumed, and the votes
    answer no other question."""
    command = (*COVER, f"checkpoint={checkpoint}", "store=covered")
    ended = run_main("certify", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    stored = records(here / "covered")
    assert [r["index"] for r in stored] == [0, 1]
    for record in stored:
        assert record["guarantee"] == "sound"
        assert record["alpha"] == 1e-3
        tested = record["details"]["slices"]
        assert sum(s[6] for s in tested) == record["n"] == sum(record["counts"])
        assert all(0 <= s[5] <= s[6] <= 256 for s in tested)
        first = [s for s in tested if s[3] == 0 and s[0][0] <= 0 <= s[1][0]]
        assert (record["prediction"] >= 0) == (record["radius"] > 0)
        assert first
    assert any(r["radius"] > 0 for r in stored)
    before = timeless(here / "covered")
    shown = run_main("report", "stores=[covered]", "radii=[0,1,3]")
    assert (shown.code, shown.error) == (0, None), shown.err
    assert "sound" in shown.out
    one_sentence(run_main("report", "stores=[covered]", "alpha=0.01"), "no sampled votes")
    # a part of the images, then all: the same records
    assert run_main("certify", *command[:-1], "store=later", "images.first=1").code == 0
    assert run_main("certify", *command[:-1], "store=later").code == 0
    assert timeless(here / "later")["records.jsonl"] == before["records.jsonl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("law=gaussian",), ("law=none",)),
        (("votes=soft",), ("votes=hard",)),
        (("noise=none",), ("noise=gaussian",)),
        (("certify.margins=[0.1,0.2]",), ("certify.margins",)),
        (("certify.margins=0.5",), ("certify",)),
        (("sampling.n=5",), ("draws",)),
        (("transform=similarity", "threat=similarity"), ("no bound is known",)),
    ],
)
def test_the_command_refuses_in_one_sentence(change, words, checkpoint, here):
    kept = [o for o in COVER if not ("noise=none" in change and o.startswith("noise."))]
    kept = [o for o in kept if not ("law=gaussian" in change and o.startswith("law="))]
    if "transform=similarity" in change:
        kept = [o for o in kept if not o.startswith("threat.")]
    one_sentence(run_main("certify", *kept, *change, f"checkpoint={checkpoint}", "store=no"), *words)
    assert not (here / "no" / "records.jsonl").exists()


BRIGHTER = (
    "transform=blur_brightness",
    "threat=blur_brightness",
    "transform.parts.0._target_=gsmooth_lightning.transform.Rotation",
    "threat.low=[-2,-0.05]",
    "threat.high=[2,0.05]",
)


def test_the_command_draws_what_has_a_law(checkpoint, here):
    """law=product with a null part: rotation is visited, brightness is drawn; two null parts are no law at all."""
    kept = [o for o in COVER if not o.startswith(("threat.", "law="))]
    command = (*kept, *BRIGHTER, "sampling.n=600", "images.first=3", "law=product", f"checkpoint={checkpoint}")
    own = ("law.parts=[null,{_target_: gsmooth_lightning.smoothing.Gaussian, sigma: 0.3}]", "store=bright")
    ended = run_main("certify", *command, *own)
    assert (ended.code, ended.error) == (0, None), ended.err
    assert any(r["radius"] > 0 for r in records(here / "bright"))
    one_sentence(run_main("certify", *command, "law.parts=[null,null]", "store=none"), "law")

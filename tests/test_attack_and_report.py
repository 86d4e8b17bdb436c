"""Attacks against classifiers whose weakness is known, and the tables and curves built from records."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from conftest import SMALL, run_main, run_task
from gsmooth_lightning.attack import worst_of_k
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import certified_accuracy, survivors
from gsmooth_lightning.report.figures import comparison_figure, report_figure
from gsmooth_lightning.report.tables import attack_rows, certificate_rows, contradictions, default_radii, markdown, text
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Rotation


class RightHalf(nn.Module):
    """Class 1 when the right half of the image is brighter than the left."""

    def forward(self, x):
        half = x.shape[-1] // 2
        lead = x[..., half:].mean((1, 2, 3)) - x[..., :half].mean((1, 2, 3))
        return torch.stack([-lead, lead], 1)


def bar() -> torch.Tensor:
    """A vertical bar on the right: turned by a half circle it lies on the left."""
    x = torch.zeros(1, 28, 28)
    x[:, 8:20, 20:24] = 1
    return x


def attack(low: float, high: float, step: float | None = None):
    smoothed = SmoothedClassifier(RightHalf().eval(), 2, Rotation(), law=Gaussian(5.0), noise=Gaussian(0.1))
    threat = TransformationThreat(Rotation(), low, high, step=step)
    x = threat.prepare(bar()[None])[0]
    return next(run_rounds([(0, worst_of_k(smoothed, threat, x, 1, Stream(0, 0), k=12, n=64))], x.device))[1]


def test_the_attack_finds_a_half_turn_and_not_less():
    found = attack(-180, 180)
    assert found.gammas[:3] == [[0], [-180], [180]]
    for (gamma,), base, smoothed in zip(found.gammas, found.base, found.smoothed, strict=True):
        if abs(abs(gamma) - 90) > 25:  # near a quarter turn the bar lies across both halves
            assert base == smoothed == (1 if abs(gamma) < 90 else 0)
    assert abs(found.worst[0]) > 115
    calm = attack(-40, 40)
    assert set(calm.base) == set(calm.smoothed) == {1}


def test_attacks_stay_in_the_threat_and_on_its_grid():
    found = attack(-40, 15, step=5)
    assert all(-40 <= g <= 15 and g % 5 == 0 for (g,) in found.gammas)
    assert len(found.gammas) == 12
    smoothed = SmoothedClassifier(RightHalf().eval(), 2, noise=Gaussian(0.1))
    with pytest.raises(RequestError, match=r"attack\.k"):
        next(worst_of_k(smoothed, TransformationThreat(Rotation(), -1, 1), bar(), 1, Stream(0, 0), k=2))


def record(index, label, prediction, radius, base=None) -> dict:
    votes = [0] * 10
    votes[prediction if prediction >= 0 else 0] = 9
    return {
        "index": index,
        "label": label,
        "input": f"digest {index}",
        "base": label if base is None else base,
        "prediction": prediction,
        "radius": radius,
        "unit": "degrees",
        "guarantee": "heuristic",
        "alpha": 0.001,
        "selection": votes,
        "counts": votes,
        "evaluations": 100,
        "seconds": 0.5,
    }


RECORDS = [record(0, 3, 3, 30.0), record(1, 4, 4, 10.0), record(2, 5, 6, 30.0), record(3, 7, -1, 0.0)]
THREAT = TransformationThreat(Rotation(), -30, 30)
ANYWHERE = {"": math.inf}


def test_certified_accuracy_counts_correct_images_with_the_radius():
    value, low, high = certified_accuracy(RECORDS, [0, 10, 10.5, 30])
    assert value.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert (low < value).all()
    assert (high > value).all()
    # Clopper-Pearson by hand for 1 of 4: 1 - (1-p)^4 = .025 below
    assert low[3] == pytest.approx(1 - 0.975**0.25, rel=1e-6)


def test_table_states_what_was_certified_and_what_it_means():
    rows = certificate_rows(RECORDS, THREAT, "one in 2 of test", "digits")
    assert rows["certified at 10 degrees"].startswith("0.500")
    assert rows["certified at 30 degrees"].startswith("0.250")
    assert rows["abstained"] == "1"
    assert "no proof" in rows["guarantee"]
    assert rows["images"] == "4 (one in 2 of test)"
    assert rows["data"] == "digits"
    assert rows["inputs"] == "pixels in [0, 1]; radii in degrees"
    assert default_radii(PixelThreat(), [record(0, 1, 1, 0.6)]) == [0, 0.25, 0.5, 0.75]
    for table in (markdown({"run": rows}), text({"run": rows})):
        assert "certified at 20 degrees" in table


def test_contradictions_are_attacks_inside_the_certified_radius():
    attacked = {
        "index": 1,
        "label": 4,
        "input": "digest 1",
        "distances": [0.0, 30.0, 9.0, 11.0],
        "smoothed": [4, 1, 4, 2],
        "base": [4, 4, 4, 4],
    }
    assert contradictions(attacked, RECORDS[1]) == 0
    attacked["smoothed"] = [4, 1, 2, 2]
    assert contradictions(attacked, RECORDS[1]) == 1
    assert contradictions(attacked, RECORDS[3]) == 0
    rows = attack_rows([attacked], RECORDS, "worst of k", ANYWHERE)
    assert rows["certificates contradicted by the attack (worst of k)"] == "1 of 1 attacked"
    elsewhere = attack_rows([attacked | {"index": 99}], RECORDS, "worst of k", ANYWHERE)
    assert elsewhere["certificates contradicted by the attack (worst of k)"] == "0 of 0 attacked"
    with pytest.raises(RequestError, match="of other images"):
        attack_rows([attacked | {"input": "digest 7"}], RECORDS, "worst of k", ANYWHERE)
    assert rows["attacked accuracy, base (worst of k)"].startswith("1.000")
    assert rows["attacked accuracy, smoothed (worst of k)"].startswith("0.000")


TRIED = [
    {"index": 0, "label": 3, "distances": [0, 0.25, 0.5], "base": [3, 3, 7], "smoothed": [3, 3, 3]},
    {"index": 1, "label": 4, "distances": [0, 0.25, 0.5], "base": [4, 5, 4], "smoothed": [4, 4, 9]},
    {"index": 2, "label": 5, "distances": [0, 0.2, 0.4], "base": [6, 6, 6], "smoothed": [5, 5, 5]},
]
"""Tries at rising distances: the base classifier errs at 1/2, 1/4 and 0, the smoothed one at 1/2, never and never."""
for tried in TRIED:
    tried["input"] = f"digest {tried['index']}"


def test_survivors_are_right_in_every_try_up_to_the_radius():
    """A try on the radius counts; distances are of float32 numbers, a millionth beyond is on it."""
    counts = {0: (2, 3), 0.2: (2, 3), 0.2499: (2, 3), 0.25: (1, 3), 0.4999999: (0, 2), 0.5: (0, 2), math.inf: (0, 2)}
    for radius, (base, smoothed) in counts.items():
        assert survivors(TRIED, "base", radius) == base, radius
        assert survivors(TRIED, "smoothed", radius) == smoothed, radius
    assert survivors(TRIED, "smoothed") == 2


def test_a_pair_of_lines_for_each_epsilon():
    rows = attack_rows(TRIED, (), "pgd", {" up to 0.25 l2": 0.25, " up to 0.5 l2": 0.5})
    assert [(name, value.split()[0]) for name, value in rows.items()] == [
        ("attacked accuracy, base (pgd) up to 0.25 l2", "0.333"),
        ("attacked accuracy, smoothed (pgd) up to 0.25 l2", "1.000"),
        ("attacked accuracy, base (pgd) up to 0.5 l2", "0.000"),
        ("attacked accuracy, smoothed (pgd) up to 0.5 l2", "0.667"),
    ]
    certificates = [record(0, 3, 3, 0.6), record(1, 4, 4, 0.5), record(2, 5, 5, 0.6)]
    rows = attack_rows(TRIED, certificates, "pgd", {" up to 0.25 l2": 0.25})
    assert rows["certificates contradicted by the attack (pgd)"] == "1 of 3 attacked"  # at .5, beyond the lines shown
    near = [certificate | {"radius": 0.499} for certificate in certificates]
    rows = attack_rows(TRIED, near, "pgd", {" up to 0.25 l2": 0.25})
    assert rows["certificates contradicted by the attack (pgd)"] == "0 of 3 attacked"


def test_the_picture_shows_accuracy_under_attack_by_radius():
    """Steps where `survivors` loses an image: at 1/4 and 1/2 of the base classifier, at 1/2 of the smoothed one."""
    certificates = [record(0, 3, 3, 0.6), record(1, 4, 4, 0.4), record(2, 5, 5, 0.6)]
    (axes,) = report_figure(certificates, PixelThreat(), {}.__getitem__, TRIED).axes
    lines = {line.get_label(): line.get_data() for line in axes.lines}
    base, smoothed = (lines[f"{name} classifier, attacked"] for name in ("base", "smoothed"))
    for radius, value in {0.1: 2 / 3, 0.24: 2 / 3, 0.26: 1 / 3, 0.49: 1 / 3, 0.51: 0, 0.6: 0}.items():
        assert np.interp(radius, *base) == pytest.approx(value), radius
    for radius, value in {0.1: 1, 0.49: 1, 0.51: 2 / 3, 0.6: 2 / 3}.items():
        assert np.interp(radius, *smoothed) == pytest.approx(value), radius


def test_figure_holds_curve_and_contact_sheet(tmp_path):
    images = {i: torch.tensor(load_digits().images[i][None] / 16, dtype=torch.float32) for i in range(4)}
    figure = report_figure(RECORDS, THREAT, images.__getitem__)
    figure.savefig(tmp_path / "a.png")
    curve = figure.subfigs[0].axes[0].lines[0]
    radii, values = curve.get_data()
    assert np.interp(5, radii, values) == 0.5
    assert np.interp(29, radii, values) == 0.25
    shown = [axes for axes in figure.subfigs[1].axes if axes.images]
    assert len(shown) == 12
    assert report_figure(RECORDS, PixelThreat(), images.__getitem__).axes


def test_runs_with_radii_in_different_units_have_a_panel_each():
    """Degrees and l2 share no axis; each panel ends past its own largest radius."""
    pixels = [r | {"unit": "l2", "radius": r["radius"] / 60} for r in RECORDS]
    figure = comparison_figure({"turned": RECORDS, "noise": pixels, "again": RECORDS[:2]})
    degrees, l2 = figure.axes
    assert [degrees.get_xlabel(), l2.get_xlabel()] == ["radius (degrees)", "radius (l2)"]
    assert [degrees.get_xlim()[1], l2.get_xlim()[1]] == pytest.approx([31.5, 0.525])
    assert [line.get_label() for line in degrees.lines] == ["turned (4 images)", "again (2 images)"]
    (line,) = l2.lines
    assert line.get_label() == "noise (4 images)"
    assert np.interp(0.4, *line.get_data()) == 0.25
    assert len(comparison_figure({"turned": RECORDS, "again": RECORDS[:2]}).axes) == 1


def test_a_received_file_is_not_what_is_attacked(checkpoint, here):
    """Its certificate is about the image it was made of: the table says so, and an attack on it contradicts none."""
    options = [o for o in SMALL if not o.startswith(("error.", "images."))]
    error = ("error=inverse", "error.draws=32", "error.choose=16", "error.pieces=8", "error.splits=1")
    given = (f"checkpoint={checkpoint}", "images.first=1")
    run_task("certify", *options, *error, "certify=received", *given, "store=received")
    run_task("attack", *options, "attack.k=4", *given, "store=attacked")
    ended = run_main("report", "stores=[received,attacked]", "out=both")
    assert (ended.code, ended.error) == (0, None), ended.err
    shown = (here / "both" / "report.md").read_text()
    assert "the clean image that an attack within the radius made it of" in shown
    assert "attacked accuracy, smoothed" in shown
    assert "contradicted" not in shown

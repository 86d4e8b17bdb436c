"""Attacks against classifiers whose weakness is known, and the tables and curves built from records."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from gsmooth_lightning.attack import worst_of_k
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.report.curves import certified_accuracy
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
    rows = attack_rows([attacked], RECORDS, "worst of k")
    assert rows["certificates contradicted by the attack (worst of k)"] == "1 of 1 attacked"
    elsewhere = attack_rows([attacked | {"index": 99}], RECORDS, "worst of k")
    assert elsewhere["certificates contradicted by the attack (worst of k)"] == "0 of 0 attacked"
    with pytest.raises(RequestError, match="of other images"):
        attack_rows([attacked | {"input": "digest 7"}], RECORDS, "worst of k")
    assert rows["attacked accuracy, base (worst of k)"].startswith("1.000")
    assert rows["attacked accuracy, smoothed (worst of k)"].startswith("0.000")


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

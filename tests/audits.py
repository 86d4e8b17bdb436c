"""Audits of made-up certificates, and what an audit page says, read by a parser; used by test_html.py."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import torch

from gsmooth_lightning.report.html import Audit, audit_page
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation

RADII = [0.0, 4.5, 10.0, 10.0, 7.25, 3.5, 0.0, 10.0, 8.0, 2.0, 0.0, 9.0]
WRONG, ABSTAINED = (1, 5), (6,)
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 1, 9, 9))) / 255


SETTINGS = {
    "seed": 4,
    "model": {"_target_": "gsmooth_lightning.model.SmallCNN", "widths": [16, 32], "hidden": 64, "size": None},
    "denoiser": None,
    "transform": {"_target_": "gsmooth_lightning.transform.Rotation", "interpolation": "bilinear"},
    "law": {"_target_": "gsmooth_lightning.smoothing.Gaussian", "sigma": 30},
    "preprocess": {"_target_": "gsmooth_lightning.preprocess.Preprocess", "steps": []},
    "learned": None,
    "noise": {"_target_": "gsmooth_lightning.smoothing.Gaussian", "sigma": 0.25},
    "certify": {
        "_target_": "gsmooth_lightning.certify.JointCertifier",
        "plan": {"_target_": "gsmooth_lightning.plans.FixedN", "n": 100},
        "error": {"_target_": "gsmooth_lightning.error.ImageBound", "draws": 64},
        "top_k": 1,
    },
}
SMOOTHED = SmoothedClassifier(torch.nn.Identity(), 3, Rotation(), law=Gaussian(30.0), noise=Gaussian(0.25))


def record(i: int, **changes):
    """Image i's certificate under rotation by up to 10 degrees; label i % 3."""
    prediction = -1 if i in ABSTAINED else (i + (i in WRONG)) % 3
    counts = [0, 0, 0]
    counts[prediction] = 80 + i
    counts[prediction - 1] += 20 - i
    found = {
        "index": i,
        "label": i % 3,
        "input": f"{i:016x}",
        "base": 0,
        "prediction": prediction,
        "radius": RADII[i],
        "unit": "degrees",
        "guarantee": "sound",
        "alpha": 0.0011,
        "selection": [10 * (c == prediction) for c in range(3)],
        "counts": counts,
        "n": 100,
        "seed": 4,
        "evaluations": 128 + i,
        "pa": 0.8,
        "pb": 0.2,
        "seconds": 0.5,
        "details": {"E": 0.25, "rho": 0.01, "alpha_E": 1e-4},
    }
    return found | changes


RECORDS = [record(i) for i in range(12)]


def audited(records=RECORDS, **changes) -> Audit:
    """An audit of these records, of which the second and third were drawn again."""
    made = Audit(
        run="runs/certify",
        date="2026-01-02 03:04 UTC",
        command="gsmooth verify runs/certify k=2 seed=7",
        seed=7,
        settings=SETTINGS,
        identity={},
        smoothed=SMOOTHED,
        threat=TransformationThreat(Rotation(), -10, 10),
        records=records,
        again=records[1:3],
        differences=(),
        notes=("One note.",),
        hashes={"checkpoint": "ab" * 32, "data": "test 0123456789abcdef"},
        images="the first 12",
        source="made up",
    )
    return replace(made, **changes)


def page(audit: Audit) -> str:
    return audit_page(audit, lambda i: IMAGES[i])


class Content(HTMLParser):
    """Tables as rows of cells, headings, other text, and the attributes of all tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.headings, self.tags, self.text = [], [], [], ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "col"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data
        elif "style" not in self.open:
            self.text += data

    def table(self, first: str) -> list[list[str]]:
        """The rows of the table whose header begins with this cell."""
        return next(table[1:] for table in self.tables if table[0][0] == first)

    def value(self, name: str) -> str:
        """The cell beside a name."""
        return next(row[1] for table in self.tables for row in table if row[0] == name)

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

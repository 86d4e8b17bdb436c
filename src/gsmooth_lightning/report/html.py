"""The audit page: what a run claims, and what an audit of it found, as one HTML file that needs nothing beside it."""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from scipy.stats import hypergeom
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from gsmooth_lightning.certify import ABSTAIN
from gsmooth_lightning.preprocess import is_nothing
from gsmooth_lightning.report.curves import Record, for_label
from gsmooth_lightning.report.figures import comparison_figure, displayed, ranges
from gsmooth_lightning.report.tables import (
    BLACK_BOX,
    MEANING,
    RECEIVED,
    accuracy_rows,
    certificate_rows,
    default_radii,
    summary_rows,
)
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat, TransformationThreat

LIMITS = {
    "sound": "that the network is accurate",
    "distributional": "anything certain about this one image",
    "surrogate": "the transformation itself is covered",
    "order-dependent": "that another order of inputs gives the same regions",
    "heuristic": "a proof",
}
"""What a guarantee does not mean."""

ELSEWHERE = (
    "inputs",
    "threat",
    "guarantee",
    "base classifier",
    "not proved",
    "alpha an image",
    "alpha spent",
    "intervals",
    "fraction of images that E covers (q_E)",
)
"""Rows of a run's table that the page states in other places."""

SHOWN = 4
"""Images of each kind."""

SIDE = 128
"""Pixels of a picture's longer side, at most."""

PIECES = 160
"""Of the time, in the picture of a waveform."""

TAIL = 1e-4
"""Probabilities of false certificates are shown down to it."""


@dataclass(frozen=True)
class Difference:
    """Something that a run states and that does not hold.

    Attributes:
        image: such as "image 16".
        field: of the image's record.
        stored, found: what the run says, and what there is; None: nothing.
        check: where `found` comes from, such as "drawn again".
    """

    image: str
    field: str
    stored: Any
    found: Any
    check: str

    def __str__(self) -> str:
        stored, found = (in_short(value) for value in apart(self.stored, self.found))
        return f"{self.image}, {self.field}: stored {stored}, {self.check} {found}"


@dataclass(frozen=True)
class Audit:
    """What an audit saw and found.

    Attributes:
        run: the run's folder.
        date: of the audit.
        command: that repeats it.
        seed: the auditor's, which chose the images that were drawn again.
        settings, identity: the run's configuration, and what its results depend on.
        smoothed, threat: of the certificates, the classifier without its network.
        records: of the run's finished images.
        again: records of the chosen images, drawn again.
        differences: everything that does not hold.
        notes: what was not checked, or under other conditions.
        hashes: names and hashes.
        images, source: which images, and where they come from, in words.
        shared: probability that an error bound or a law that all images share is false, counted in each alpha.
        names: of classes, where the data set knows them.
    """

    run: str
    date: str
    command: str
    seed: int
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]
    smoothed: SmoothedClassifier
    threat: Threat
    records: Sequence[Record]
    again: Sequence[Record]
    differences: Sequence[Difference]
    notes: Sequence[str]
    hashes: Mapping[str, str]
    images: str
    source: str
    shared: float = 0.0
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What the audit found, in one sentence."""
        n, k, count = len(self.records), len(self.again), len(self.differences)
        drawn = f"k = {k} of the {n} finished images, chosen by the auditor's seed {self.seed}, were drawn again"
        if count:
            first = f"the first of {count} is" if count > 1 else "it is"
            found = f"something that the run states does not hold ({first} {self.differences[0]})"
            return f"Differs, on {self.date}: {found}; {drawn if k else 'no image was drawn again'}."
        if not k:
            what = f"what the run states of its {n} finished images agrees; no image was drawn again"
            return f"Consistent, on {self.date}: {what}."
        same = "from their addresses and gave what the run states; all else that was checked holds"
        return f"Verified on {self.date}: {drawn} {same}."

    @property
    def power(self) -> float:
        """Probability that at least one of the images drawn again would have been among a tenth that are forged."""
        n, k = len(self.records), len(self.again)
        return float(1 - hypergeom.pmf(0, n, math.ceil(n / 10), k))


def audit_page(audit: Audit, image: Callable[[int], Tensor]) -> str:
    """The page, as one file.

    Args:
        audit: what is shown.
        image: index -> clean image of the data set.
    """
    threat, unit = audit.threat, audit.threat.unit
    records = [for_label(record) | {"unit": unit} for record in audit.records]
    alphas = [record["alpha"] for record in records]
    radii = default_radii(threat, records)
    certified = accuracy_rows(records, radii, unit)
    table = certificate_rows(records, threat, audit.images, audit.source, radii) | summary_rows(records)
    guarantees = sorted({record["guarantee"] for record in records})

    def card(record: Record) -> dict[str, Any]:
        return {
            "record": record,
            "name": class_name(record["prediction"], audit.names),
            "label": class_name(record["label"], audit.names),
            "votes": votes(record["counts"], audit.names),
            "pictures": pictures(record, threat, image(record["index"])),
        }

    environment = Environment(
        loader=PackageLoader("gsmooth_lightning", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"short": in_short, "number": number}
    return environment.get_template("audit.html").render(
        audit=audit,
        parts=parts(audit.settings, audit.smoothed),
        guarantees=[{"name": g, "means": MEANING[g], "not": LIMITS[g]} for g in guarantees],
        received=RECEIVED if audit.settings["certify"]["_target_"].endswith(".ReceivedCertifier") else None,
        black_box=BLACK_BOX if any("base" in r["details"] for r in records) else None,
        rests_on=sorted({r["details"]["rests_on"] for r in records if "rests_on" in r["details"]}),
        covered=min((r["details"]["q_E"] for r in records if "q_E" in r["details"]), default=None),
        alpha=max(alphas),
        expected=sum(alphas),
        tail=false_certificates([a - audit.shared for a in alphas], audit.shared),
        certified=[(radius, cell) for radius, cell in zip(radii, certified.values(), strict=True)],
        unit=unit,
        curve=curve(records),
        statistics={name: text for name, text in table.items() if name not in (*certified, *ELSEWHERE)},
        groups={title: [card(r) for r in chosen] for title, chosen in picked(records).items()},
        compared=compared_rows(audit),
    )


def check_shown(record: Record, threat: Threat) -> None:
    """Fails on a record that the page could not show: a store may hold anything."""
    own = for_label(record)
    certificate_rows([own], threat, "", "", [0.0])
    picked([own])
    votes(own["counts"], {})


# ---------------------------------------------------------------- words


def parts(settings: Mapping[str, Any], smoothed: SmoothedClassifier) -> dict[str, str]:
    """The parts of the smoothed classifier, and of what was proved about it, in words."""
    theorem = settings["certify"]
    most = "the largest mean softmax output" if smoothed.votes == "soft" else "most votes"
    drawn = f"of {words(settings['transform'])}, in {', '.join(smoothed.transform.units)}, by {words(settings['law'])}"
    denoiser = f", behind the denoiser {words(settings['denoiser'])}" if settings["denoiser"] else ""
    rows = {
        "smoothed classifier": f"the class with {most} of the base network, parameters and noise drawn as follows",
        "base network": words(settings["model"]) + denoiser,
        "drawn parameters": drawn if settings["law"] else "none",
        "preprocessing": "none" if is_nothing(smoothed.preprocess) else words(settings["preprocess"]),
        "noise": "learned (see the hashes)" if settings["learned"] else words(settings["noise"]),
        "theorem": words({key: value for key, value in theorem.items() if key not in ("plan", "error")}),
        "sampling": words(theorem.get("plan")),
        "error bound": words(theorem.get("error")),
    }
    return {name: text for name, text in rows.items() if text}


def words(node: Any) -> str:
    """A part of a configuration: its class and its options."""
    if isinstance(node, list):
        return ", ".join(map(words, node))
    if not isinstance(node, dict):
        return "" if node is None else str(node)
    options = ", ".join(f"{key} {words(value)}" for key, value in node.items() if key[0] != "_" and value is not None)
    made = node.get("_target_", "").rsplit(".", 1)[-1]
    return f"{made} ({options})" if made and options else made or options


# ---------------------------------------------------------------- numbers


def false_certificates(alphas: Sequence[float], shared: float = 0.0) -> list[tuple[int, float]]:
    """(m, bound of the probability that more than m certificates are false), from the expected number on, until TAIL.

    The draws of images are independent: the number of false statements is at most a sum of independent events of
    probabilities alpha_i, whose law is computed exactly (Poisson's binomial). `shared`, the probability that something
    all images have in common is false, is added.
    """
    first = math.floor(math.fsum(alphas) + 1e-12)
    law = np.zeros(first + 64)  # of 0, 1, ... false statements
    law[0] = 1.0
    for alpha in alphas:
        law[1:] = law[1:] * (1 - alpha) + law[:-1] * alpha
        law[0] *= 1 - alpha
    more = np.clip(1 - law.cumsum(), 0, 1)
    rows = [(m, min(1.0, shared + float(more[m]))) for m in range(first, len(law))]
    return [row for row in rows if row[1] - shared >= TAIL or row[0] == first]


def picked(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The worst and the best images, by kind; every image at most once."""
    right = [r for r in records if r["prediction"] == r["label"]]
    right.sort(key=lambda r: (r["radius"], max(r["counts"]) / max(1, r["n"])))
    abstained = [r for r in records if r["prediction"] == ABSTAIN]
    wrong = [r for r in records if r["prediction"] not in (ABSTAIN, r["label"])]
    best = right[-SHOWN:][::-1]
    kinds = {
        "Wrong prediction, largest radius first": sorted(wrong, key=lambda r: -r["radius"])[:SHOWN],
        "Abstained": abstained[:SHOWN],
        "Right, smallest radius first": right[: max(0, len(right) - len(best))][:SHOWN],
        "Right, largest radius first": best,
    }
    return {title: chosen for title, chosen in kinds.items() if chosen}


def compared_rows(audit: Audit) -> list[dict[str, Any]]:
    """Stored records beside those that were drawn again."""
    stored = {record["index"]: record for record in audit.records}
    differing = {(d.image, d.field) for d in audit.differences if d.check == "drawn again"}
    fields = ("input", "label", "selection", "counts", "n", "prediction", "radius", "pa", "pb", "E")
    rows = []
    for record in audit.again:
        index = record["index"]
        wrong = {name for image, name in differing if image == f"image {index}"}
        pair = [
            {name: shown(name, r["details"].get("E") if name == "E" else r.get(name), audit.names) for name in fields}
            for r in (stored[index], record)
        ]
        marked = {name for name in fields if name in wrong or f"details.{name}" in wrong}
        rows.append({"index": index, "stored": pair[0], "again": pair[1], "marked": marked, "wrong": sorted(wrong)})
    return rows


def shown(name: str, value: Any, names: Mapping[int, str]) -> str:
    """A field of a record, in a cell."""
    if value is None:
        return "–"
    if name in ("selection", "counts"):
        return votes(value, {})
    if name in ("label", "prediction"):
        return class_name(value, names)
    return number(value)


def votes(counts: Sequence[float], names: Mapping[int, str], most: int = 3) -> str:
    """The classes with most votes."""
    order = [c for c in np.argsort(counts, kind="stable")[::-1].tolist() if counts[c] > 0]
    parts = [f"{number(counts[c])} for {class_name(c, names)}" for c in order[:most]]
    rest = len(order) - most
    return (", ".join(parts) or "none") + (f", {rest} more class{'es' if rest > 1 else ''}" if rest > 0 else "")


def class_name(label: Any, names: Mapping[int, str]) -> str:
    """A class, or several, or what an abstention is called."""
    if isinstance(label, list):
        return ", ".join(class_name(c, names) for c in label)
    if label == ABSTAIN:
        return "abstained"
    named = names.get(label, str(label))  # MNIST's are such as "7 - seven"
    return named if named.startswith(str(label)) else f"{label} ({named})"


def number(value: Any) -> str:
    """A number as it is read, others as they are."""
    if isinstance(value, list):
        return ", ".join(map(number, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def apart(stored: Any, found: Any) -> tuple[Any, Any]:
    """Two values; of lists of the same length only the entries that differ, by place."""
    if not (isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found)):
        return stored, found
    places = [k for k, (a, b) in enumerate(zip(stored, found, strict=True)) if a != b]
    return {k: stored[k] for k in places}, {k: found[k] for k in places}


def in_short(value: Any, most: int = 120) -> str:
    """A value in one line."""
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."


# ---------------------------------------------------------------- pictures


def pictures(record: Record, threat: Threat, x: Tensor) -> list[tuple[str, str]]:
    """(picture, what it shows) of the clean input, under a transformation between those at the certified ends."""
    clean = threat.prepare(x[None])
    if not (isinstance(threat, TransformationThreat) and record["radius"] > 0):
        return [(picture(clean[0]), "clean")]
    ends = [clean.new_tensor([end]) for end in threat.box(record["radius"])]
    low, high = [
        (picture(threat.apply(clean, end)[0]), ", ".join(f"{value:+.3g}" for value in end[0].tolist())) for end in ends
    ]
    return [low, (picture(clean[0]), "clean"), high]


def picture(x: Tensor) -> str:
    """An image, (c, h, w), as a PNG; a waveform, (c, t), as an SVG of its samples' range in pieces of the time."""
    if x.ndim != 3:
        least, most = ranges(x, PIECES)
        tops = [f"{k},{30 - 30 * value:.1f}" for k, value in enumerate(most)]
        bottoms = [f"{k},{30 - 30 * value + 0.5:.1f}" for k, value in enumerate(least)]
        points = " ".join(tops + bottoms[::-1])
        size = f'viewBox="0 0 {len(least)} 60" preserveAspectRatio="none"'
        drawing = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><polygon points="{points}" fill="#222"/></svg>'
        return data_uri("image/svg+xml", drawing.encode())
    drawn = to_pil_image((displayed(x) * 255).round().astype(np.uint8))
    drawn.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    drawn.save(content, "PNG")
    return data_uri("image/png", content.getvalue())


def curve(records: Sequence[Record]) -> str:
    """Certified accuracy against the radius, as an SVG."""
    content = io.BytesIO()
    comparison_figure({"certified": records}).savefig(content, format="svg", metadata={"Date": None})
    return data_uri("image/svg+xml", content.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """A file in an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

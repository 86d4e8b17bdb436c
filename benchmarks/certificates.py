"""Evaluations and seconds of nested and joint certificates for the same range, in one run.

    python benchmarks/certificates.py RADIUS checkpoint=FILE [overrides of `gsmooth certify`]

Each certificate is asked for RADIUS on the same images, in turn; its error bound is part of its seconds. Ratios are of
means over the images that both nested as published and the certificate in question certify at RADIUS.
"""

import itertools
import sys

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_module
from tqdm import tqdm

from gsmooth_lightning.certify import Certificate, Certifier, FixedN, GroupSequential, JointCertifier, NestedCertifier
from gsmooth_lightning.error import ImageBound
from gsmooth_lightning.tasks.setup import Run, prepare

REFERENCE = "nested, as published"


def certificates(radius: float) -> dict[str, Certifier]:
    """The published numbers of draws (Fischer et al. 2020, Table 2, MNIST), and ours."""
    soft, hard = ImageBound(soft=True), ImageBound(soft=False, quantile=1.0)
    one_radius, robust = GroupSequential([radius], 20, 200), GroupSequential([1], 64, 1000)
    return {
        REFERENCE: NestedCertifier(FixedN(20, 200), FixedN(64, 200), hard, "published"),
        "nested, sequential": NestedCertifier(one_radius, robust, hard, "clean"),
        "joint, n = 1,000": JointCertifier(FixedN(100, 1000), soft),
        "joint, n = 10,000": JointCertifier(FixedN(100, 10_000), soft),
        "joint, sequential": JointCertifier(GroupSequential([radius], 100, 10_000), soft),
    }


def certify(run: Run, certifier: Certifier) -> dict[int, Certificate]:
    """Certificates of the visited images, by index."""
    visited = run.data.visited
    images = ((int(i), x) for x, _, i in tqdm((visited[k] for k in range(len(visited))), total=len(visited)))
    return dict(certifier.certify(run.smoothed, run.threat, images, run.cfg.seed))


def holds(found: dict[int, Certificate], labels: dict[int, int], radius: float) -> np.ndarray:
    """Which images are predicted correctly with a certificate of at least `radius`."""
    return np.array([found[i].prediction == y and found[i].radius >= radius for i, y in labels.items()])


def main() -> None:
    radius, overrides = float(sys.argv[1]), sys.argv[2:]
    with initialize_config_module("gsmooth_lightning.conf", version_base="1.3"):
        cfg = compose("certify", overrides)
    run = prepare(cfg, "certify", ("error", "sampling", "certify"))
    run.smoothed.eval()
    labels = {int(i): int(y) for _, y, i in (run.data.visited[k] for k in range(len(run.data.visited)))}
    found = {name: certify(run, certifier) for name, certifier in certificates(radius).items()}
    held = {name: holds(part, labels, radius) for name, part in found.items()}
    rows = {}
    for name, part in found.items():
        both = held[name] & held[REFERENCE]
        spent = {
            who: np.array(
                [[found[who][i].evaluations, found[who][i].seconds] for i in itertools.compress(labels, both)]
            )
            for who in (name, REFERENCE)
        }
        ratio = spent[REFERENCE].mean(0) / spent[name].mean(0)
        rows[name] = {
            f"certified at {radius:g}": f"{held[name].sum()} of {len(labels)}",
            "evaluations an image": f"{np.mean([c.evaluations for c in part.values()]):.0f}",
            "seconds an image": f"{np.mean([c.seconds for c in part.values()]):.2f}",
            "images in common": str(both.sum()),
            "published / this, evaluations": f"{ratio[0]:.1f}",
            "published / this, seconds": f"{ratio[1]:.1f}",
        }
    print(f"`python benchmarks/certificates.py {' '.join(sys.argv[1:])}`: {run.threat.describe()}\n")
    print(pd.DataFrame(rows).T.to_markdown())


if __name__ == "__main__":
    main()

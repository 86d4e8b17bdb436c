"""GSmooth's Table 1 on MNIST: the paper's certified accuracy beside that of stores, at the paper's attack range.

    python benchmarks/gsmooth.py > results/gsmooth/table1.md

The stores are in results/; results/README.md has the commands that made them.
"""

from pathlib import Path

import pandas as pd

from gsmooth_lightning.report.tables import accuracy_rows
from gsmooth_lightning.tasks.report import load

RESULTS = Path(__file__).resolve().parent.parent / "results"

ELSEWHERE = {
    ("Gaussian blur, variance up to 36", "91.0"): "mnist_direct/blur",
    ("translation, 8 pixels", "98.7"): "mnist_direct/cyclic_translation",
    ("brightness, contrast, .5", "97.7"): "mnist_direct/brightness_contrast",
    ("rotation, 50 degrees", "95.7"): "cover/rotation50",
    ("scaling, .3", "95.9"): "cover/scaling",
}
"""(row, the paper's number): the store of our certificate, by another theorem than GSmooth's."""

SURROGATE = {
    ("rotational blur, 10 degrees", "95.9"): "rotational_blur",
    ("defocus blur, radius 5", "89.2"): "defocus",
    ("zoom blur, .5", "93.9"): "zoom_blur",
    ("pixelate, .5", "87.1"): "pixelate",
}

CERTIFICATES = {
    "real (Theorem L)": "latent",
    "surrogate (Theorem L)": "latent_surrogate",
    "paper (Corollary 1)": "corollary",
    "paper, proved M*": "corollary_proved",
}


def row(store: str) -> dict[str, str]:
    """Certified accuracy of a store over its threat's whole range, its guarantee and images."""
    source = load(RESULTS / store)
    radius = source.threat.reach
    (accuracy,) = accuracy_rows(source.records, [radius], source.threat.unit).values()
    kinds = sorted({r["guarantee"] for r in source.records})
    theorem = source.identity["certify"]["_target_"].rsplit(".", 1)[-1]
    shown = {"certificate": theorem, "certified": accuracy, "guarantee": ", ".join(kinds)}
    return shown | {"images": str(len(source.records)), "store": store}


def main() -> None:
    rows = []
    for (name, paper), store in ELSEWHERE.items():
        rows.append({"row of Table 1": name, "paper, %": paper, **row(store)})
    for (name, paper), own in SURROGATE.items():
        stores = {"cover": f"cover/mnist_{own}/cover"}
        stores |= {label: f"gsmooth/{own}/{part}" for label, part in CERTIFICATES.items()}
        for label, store in stores.items():
            rows.append({"row of Table 1": name, "paper, %": paper, **row(store), "certificate": label})
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()

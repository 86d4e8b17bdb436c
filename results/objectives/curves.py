"""Training curves of this folder: python results/objectives/curves.py, writes curves.png beside itself."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

FOLDER = Path(__file__).parent

figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
for file in sorted(FOLDER.glob("*-0.5/metrics.csv")):
    found = pd.read_csv(file).dropna(subset="val/accuracy")
    axes.plot((found["epoch"] + 1) / len(found), found["val/accuracy"], label=file.parent.name.removesuffix("-0.5"))
axes.set(
    xlabel="share of the training",
    ylabel="accuracy at one draw of noise .5 (validation images)",
    ylim=(0.8, 1),
    xlim=(0, 1),
)
axes.grid(alpha=0.25)
axes.legend(fontsize=8)
figure.savefig(FOLDER / "curves.png", dpi=100)

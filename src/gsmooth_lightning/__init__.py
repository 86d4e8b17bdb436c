"""Randomized smoothing over semantic transformations: train, certify, attack, report.

The mathematics (everything but `lit`, `report`, `tasks` and `cli`) imports without Lightning, Hydra,
wandb or matplotlib.
"""

__version__ = "0.1.0"

"""Attacks: what certificates must survive."""

from gsmooth_lightning.attack.ddn import ddn
from gsmooth_lightning.attack.eot import eot
from gsmooth_lightning.attack.evaluation import Attack, Attacked
from gsmooth_lightning.attack.grid import grid
from gsmooth_lightning.attack.pgd import pgd
from gsmooth_lightning.attack.pixels import Craft, SoftVotes, of_foolbox, of_torchattacks, ours, perturb
from gsmooth_lightning.attack.worst_of_k import worst_of_k

__all__ = [
    "Attack",
    "Attacked",
    "Craft",
    "SoftVotes",
    "ddn",
    "eot",
    "grid",
    "of_foolbox",
    "of_torchattacks",
    "ours",
    "perturb",
    "pgd",
    "worst_of_k",
]

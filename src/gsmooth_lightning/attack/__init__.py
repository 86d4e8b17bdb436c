"""Attacks: what certificates must survive."""

from gsmooth_lightning.attack.ddn import ddn
from gsmooth_lightning.attack.pgd import pgd
from gsmooth_lightning.attack.worst_of_k import Attacked, check_effort, worst_of_k

__all__ = ["Attacked", "check_effort", "ddn", "pgd", "worst_of_k"]

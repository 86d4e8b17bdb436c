"""Attacks: what certificates must survive."""

from gsmooth_lightning.attack.worst_of_k import Attacked, worst_of_k

__all__ = ["Attacked", "worst_of_k"]

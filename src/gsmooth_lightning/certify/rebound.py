"""Other certificates from the votes of a store, without a forward pass."""

from typing import Any

import numpy as np

from gsmooth_lightning.certify.base import TransferCertifier
from gsmooth_lightning.error import Bound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.threat import Threat


def check_reboundable(certifier: Any) -> None:
    """Refuses votes that answer nothing but what they were sampled for.

    Raises:
        RequestError: sampling stopped at what it saw (bounding such counts afresh is false at several times the nominal
            alpha), soft votes, of which a store keeps the sums, or a certificate without sampling.
    """
    if not isinstance(certifier, TransferCertifier):
        raise RequestError("this store holds no sampled votes to bound again; leave alpha, bounds and top_k out")
    if not isinstance(certifier.plan, FixedN):
        raise RequestError(
            "the store's sampling stopped at what it saw, or kept sums of soft votes: they answer only what they were "
            "sampled for; certify again with sampling=fixed, or leave alpha, bounds and top_k out"
        )


def rebound(
    record: dict[str, Any], certifier: TransferCertifier, smoothed: SmoothedClassifier, threat: Threat
) -> dict[str, Any]:
    """A stored certificate's record with the radii that its votes support under this certifier's plan and top_k.

    The plan has the draws of the store; alpha and the kind of bounds may be others. Choose them before the table is
    seen: the best of several is no certificate.

    Raises:
        RequestError: the record does not tell its error bound (of an older version), or the draws differ.
    """
    details, plan = record["details"], certifier.plan
    assert isinstance(plan, FixedN)
    if not {"E", "rho", "alpha_E", "slack", "dim"} <= details.keys():
        raise RequestError("the store was written by an older version, without its error bounds; certify again")
    if record["n"] != plan.n:
        raise RequestError(f"image {record['index']} has {record['n']} draws, not {plan.n}; restore the store")
    bound = Bound(
        details["E"],
        details["rho"],
        details["alpha_E"],
        record["guarantee"],
        curve=details.get("curve", ()),
        slope=details.get("slope", 0.0),
    )
    transfer = certifier.transfer(smoothed, threat, bound, details["dim"], details["slack"])
    outcome = plan.conclude(np.array([*record["selection"], 0]), np.array([*record["counts"], 0]))
    prediction, radius = certifier.verdict(outcome, transfer, threat.reach)
    pa, pb = (outcome.pa, outcome.pb) if certifier.top_k == 1 else (None, None)
    found = {"prediction": prediction, "radius": radius, "pa": pa, "pb": pb}
    kept = {key: value for key, value in details.items() if key != "region"}
    kept |= certifier.region(smoothed, threat, details["dim"], radius)
    return record | found | {"alpha": plan.alpha + bound.alpha, "details": kept}

"""Stand-ins shared by the tests of theorems: a procedure run on the spot, a plan that knows its answer."""

import numpy as np

from gsmooth_lightning.error import ErrorBound
from gsmooth_lightning.plans import Outcome, SamplingPlan


def finish(procedure):
    """Runs a procedure to its conclusion."""
    try:
        jobs = next(procedure)
        while True:
            jobs = procedure.send([job() for job in jobs])
    except StopIteration as ended:
        return ended.value


class Given(ErrorBound):
    """A bound that is known for every image."""

    def __init__(self, bound):
        self.bound = bound

    def procedure(self, smoothed, threat, x, stream):
        return self.bound
        yield


class Known(SamplingPlan):
    """A plan that knows the bounds pA and pB without sampling; it keeps the threshold function it was given."""

    def __init__(self, pa, pb=None, classes=2):
        super().__init__(1, 10**6, 1e-3)
        self.pa, self.pb = pa, 1 - pa if pb is None else pb
        self.counts = np.eye(1, classes + 1, dtype=int)[0]

    @property
    def ceiling(self):
        return 1 - 1e-9

    def run(self, sample, block, threshold):
        self.threshold = threshold
        return Outcome(0, self.counts, self.counts, 1, self.pa, self.pb)
        yield

"""Stand-ins shared by the tests of plans and theorems: a procedure run on the spot, votes that are given, a plan that
knows its answer."""

import itertools

import numpy as np

from gsmooth_lightning.confidence import looks_up_to
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


class NeedsMore(Exception):
    """The plan asks for a look that the given path does not have."""


def votes(path, top=0):
    """A sampler without jobs: the selection chooses `top`, the k-th look brings path[k] votes for class 0."""
    left = iter(path)

    def sample(stage, first, last):
        n = last - first
        if stage == "select":
            return np.bincount([top], minlength=4) * n
        k = next(left, None)
        if k is None:
            raise NeedsMore
        return np.array([k, n - k, 0, 0])
        yield

    return sample


def all_paths(plan, block, threshold):
    """(draws between looks, [(path, outcome)]) of every path of counts on which the plan stops, look by look."""
    steps = [b - a for a, b in itertools.pairwise((0, *looks_up_to(plan.n, block)))]
    found, open_paths = [], [()]
    while open_paths:
        path = open_paths.pop()
        try:
            outcome = finish(plan.run(votes(path), block, threshold))
            assert outcome.n == sum(steps[: len(path)])
            found.append((path, outcome))
        except NeedsMore:
            open_paths += [(*path, k) for k in range(steps[len(path)] + 1)]
    return steps, found


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

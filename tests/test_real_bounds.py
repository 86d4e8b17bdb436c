"""How tight bounds are on the developers' copies of real images; skipped where these are not."""

import pytest

from attackers import TIGHT, chords_are_near, intervals_are_tight, inverse_is_tight
from conftest import needs_real_data
from gsmooth_lightning.data import CIFAR10, MNIST

pytestmark = needs_real_data


@pytest.fixture(scope="module")
def digits(data):
    """Four test images of MNIST, (1, 28, 28) each."""
    test = MNIST(str(data)).split("test", 10)
    return [test[i][0] for i in range(4)]


def test_chords_on_mnist(digits):
    chords_are_near(digits[0])


def test_chords_on_cifar10(data):
    chords_are_near(CIFAR10(str(data / "CIFAR10")).split("test", 10)[0][0])


@pytest.mark.parametrize("steps", TIGHT.values(), ids=TIGHT)
def test_intervals_on_mnist(digits, steps):
    for x in digits[:2]:
        intervals_are_tight(x, steps)


def test_inverse_on_mnist(digits):
    for x, gamma in zip(digits, (8.22, -10.4, 3.6, 28.7), strict=True):
        inverse_is_tight(x, gamma)

"""Transformations by interpolation: against scipy and a kernel of our own, their signs, and how they resolve."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation, Scaling, Shear, Similarity, Translation

SHAPES = [(28, 28), (20, 33), (31, 16)]
MODES = {"black": ("grid-constant", "constant"), "reflection": ("reflect", "symmetric")}
"""What scipy and numpy call the padding."""


def inverse_map(degrees=0.0, log_factor=0.0, down=0.0, right=0.0, shear=0.0) -> tuple[np.ndarray, np.ndarray]:
    """(M, t): the pixel at u = (down, right) of the centre shows what lay at M u + t, from where content goes:
    v -> e^s R (v + shift), R the counterclockwise turn on a screen whose first axis points down; a shear alone moves
    (down, right) to (down, right + shear * down)."""
    a = math.radians(degrees)
    forward = math.exp(log_factor) * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    forward = forward @ np.array([[1, 0], [shear, 1]])
    return np.linalg.inv(forward), -np.array([down, right])


CASES = {
    "rotation": (Rotation, [17.0], {"degrees": 17.0}),
    "translation": (Translation, [2.3, -5.6], {"down": 2.3, "right": -5.6}),
    "enlarged": (Scaling, [0.31], {"log_factor": 0.31}),
    "shrunk": (Scaling, [-0.27], {"log_factor": -0.27}),
    "shear": (Shear, [0.37], {"shear": 0.37}),
    "similarity": (
        Similarity,
        [-33.0, 0.21, 1.7, -2.9],
        {"degrees": -33.0, "log_factor": 0.21, "down": 1.7, "right": -2.9},
    ),
}
OPTIONS = [(name, {}) for name in CASES] + [("translation", {"padding": "reflection"})]


def source(shape, moved) -> np.ndarray:
    """Rows and columns from which the pixels take their values, (2, h * w)."""
    matrix, shift = inverse_map(**moved)
    centre = (np.array(shape)[:, None] - 1) / 2
    return matrix @ (np.mgrid[: shape[0], : shape[1]].reshape(2, -1) - centre) + shift[:, None] + centre


def noise(shape, channels=1) -> torch.Tensor:
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(0))


def values_of(transform, x, theta) -> np.ndarray:
    return transform(x, torch.tensor([theta]))[0, 0].numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_bilinear_and_nearest_agree_with_scipy(name, options, shape):
    make, theta, moved = CASES[name]
    x, at = noise(shape), source(shape, moved)
    mode = MODES[options.get("padding", "black")][0]
    bilinear, nearest = (
        ndimage.map_coordinates(x[0, 0].numpy(), at, order=order, mode=mode).reshape(shape) for order in (1, 0)
    )
    np.testing.assert_allclose(values_of(make("bilinear", **options), x, theta), bilinear, atol=1e-4)
    tie = (np.abs(at - np.floor(at) - 0.5) < 1e-4).any(0).reshape(shape)
    assert tie.mean() < 0.1
    np.testing.assert_array_equal(values_of(make("nearest", **options), x, theta)[~tie], nearest[~tie])


def keys(d: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel of Keys (1981)."""
    d = np.abs(d)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_bicubic_is_the_convolution_of_the_padded_image(name, options, shape):
    """By weights of all pixels of an image padded far beyond the edges."""
    make, theta, moved = CASES[name]
    x, far = noise(shape), 15
    padded = np.pad(x[0, 0].double().numpy(), far, mode=MODES[options.get("padding", "black")][1])
    rows, columns = (
        keys(at[:, None] + far - np.arange(length))
        for at, length in zip(source(shape, moved), padded.shape, strict=True)
    )
    expected = np.einsum("pi,ij,pj->p", rows, padded, columns, optimize=True).reshape(shape)
    np.testing.assert_allclose(values_of(make("bicubic", **options), x, theta), expected, atol=2e-4)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_pixels_move_exactly(interpolation, shape):
    """Down and right are positive; what enters is black, or the mirrored rows and columns."""
    x, (h, w) = noise(shape, channels=3), shape
    for down, right in ((2, 3), (-4, 1), (0, -5)):
        black = np.zeros_like(x)
        black[..., max(down, 0) : h + min(down, 0), max(right, 0) : w + min(right, 0)] = x[
            ..., max(-down, 0) : h + min(-down, 0), max(-right, 0) : w + min(-right, 0)
        ]
        mirrored = np.pad(x, ((0, 0), (0, 0), (9, 9), (9, 9)), mode="symmetric")
        mirrored = mirrored[..., 9 - down : 9 - down + h, 9 - right : 9 - right + w]
        for padding, expected in (("black", black), ("reflection", mirrored)):
            moved = Translation(interpolation, padding)(x, torch.tensor([[float(down), float(right)]]))
            np.testing.assert_allclose(moved, expected, atol=3e-5)


def test_the_mirror_repeats_the_edge_and_is_mirrored_again():
    """A column 0, 1, 2 moved down by 8 shows rows -8, -7, -6 of 1 0 0 1 2 2 1 0 | 0 1 2."""
    column = torch.arange(3.0).view(1, 1, 3, 1)
    moved = Translation(padding="reflection")(column, torch.tensor([[8.0, 0.0]]))
    np.testing.assert_allclose(moved[0, 0, :, 0], [1, 0, 0], atol=1e-5)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_quarter_turns_are_exact(interpolation):
    x = noise((15, 15), channels=2)
    for quarters in (1, 2, 3):
        theta = torch.tensor([[90.0 * quarters, 0.0, 0.0, 0.0]])
        turned = Similarity(interpolation)(x, theta)
        torch.testing.assert_close(turned, torch.rot90(x, quarters, (2, 3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_changes_nothing_that_a_file_shows(name, options, interpolation, shape):
    """psi(x, 0) = x to rounding, and bit by bit once it is saved with 8 bits."""
    transform = CASES[name][0](interpolation, **options)
    threat = TransformationThreat(transform, -1, 1)
    x = threat.prepare(noise(shape, channels=3))
    zero = torch.zeros(1, transform.dim)
    torch.testing.assert_close(transform(x, zero), x, atol=3e-5, rtol=0)
    assert torch.equal(threat.apply(x, zero), x)


def blob(shape, at, size=4.0) -> torch.Tensor:
    """A smooth spot at (down, right) of the centre, (1, 1, h, w) float64."""
    rows, columns = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in shape)
    spot = (rows[:, None] - at[0]) ** 2 + (columns[None] - at[1]) ** 2
    return torch.exp(-spot / 2 / size**2)[None, None]


def position(image: torch.Tensor) -> np.ndarray:
    """Centre of mass, (down, right) of the centre."""
    return np.array(ndimage.center_of_mass(image[0, 0].numpy())) - (np.array(image.shape[2:]) - 1) / 2


MOVES = [
    (Translation(), [2.5, -4.25], lambda v, _: (v[0] + 2.5, v[1] - 4.25)),
    (Scaling(), [0.4], lambda v, _: (v[0] * math.exp(0.4), v[1] * math.exp(0.4))),
    (Shear(), [0.3], lambda v, _: (v[0], v[1] + 0.3 * v[0])),
    (Rotation(), [90.0], lambda v, _: (-v[1], v[0])),
    (Similarity(), [90.0, 0.4, 2.0, 3.0], lambda v, e: (-e * (v[1] + 3), e * (v[0] + 2))),
]


@pytest.mark.parametrize(("transform", "theta", "to"), MOVES, ids=lambda v: getattr(v, "name", ""))
def test_content_moves_to_where_the_docstring_says(transform, theta, to):
    """A spot in a 101x121 image: down, right, counterclockwise and larger are positive."""
    start = (11.0, -7.5)
    moved = transform(blob((101, 121), start), torch.tensor([theta], dtype=torch.float64))
    np.testing.assert_allclose(position(moved), to(start, math.exp(0.4)), atol=0.01)


def test_a_similarity_with_one_motion_is_that_motion():
    x = noise((20, 33), channels=3)
    one = torch.zeros(1, 4)
    for alone, columns, value in (
        (Rotation(), [0], [25.0]),
        (Scaling(), [1], [-0.2]),
        (Translation(), [2, 3], [1.3, -2.6]),
    ):
        theta = one.clone()
        theta[0, columns] = torch.tensor(value)
        torch.testing.assert_close(Similarity()(x, theta), alone(x, torch.tensor([value])), atol=1e-5, rtol=0)


def moved_by(theta: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Where a similarity moves z = right + i up, by complex numbers: e^(s + i r) (z + t)."""
    return torch.exp(torch.complex(theta[:, 1], theta[:, 0].deg2rad())) * (z + torch.complex(theta[:, 3], -theta[:, 2]))


def test_similarities_resolve_as_complex_numbers_do():
    """Both similarities after each other, against the resolved one, at three points each (they determine it)."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([90.0, 0.7, 5.0, 5.0], dtype=torch.float64)
    alpha, beta = (torch.randn(200, 4, dtype=torch.float64, generator=generator) * size for _ in range(2))
    for z in (0j, 1 + 0j, -2 + 3j):
        start = torch.full((200,), z, dtype=torch.complex128)
        twice = moved_by(beta, moved_by(alpha, start))
        torch.testing.assert_close(moved_by(Similarity().resolve(alpha, beta), start), twice)


COMPOSED = [
    (Rotation(), [20.0], [-47.0]),
    (Translation(), [6.4, -9.3], [-3.7, 4.2]),
    (Scaling(), [0.3], [-0.55]),
    (Shear(), [0.2], [0.17]),
    (Similarity(), [40.0, 0.3, -6.7, -8.1], [-65.0, -0.2, 7.7, 6.2]),
]


def composed(transform, alpha, beta, finer) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """alpha and then beta, the resolved parameter at once, and formulas that are wrong for similarities; of an image
    with `finer` times as many pixels a side."""
    pixels = torch.tensor([finer if unit.startswith("pixels") and "per" not in unit else 1 for unit in transform.units])
    first, second = (torch.tensor([v], dtype=torch.float64) * pixels for v in (alpha, beta))
    x = blob((90 * finer, 131 * finer), (6.0 * finer, -9.0 * finer), 4 * finer)
    twice = transform(transform(x, first), second)
    wrong = (first + second, transform.resolve(second, first))
    return twice, transform(x, transform.resolve(first, second)), [transform(x, v) for v in wrong]


@pytest.mark.parametrize(("transform", "alpha", "beta"), COMPOSED, ids=lambda v: getattr(v, "name", ""))
def test_smooth_images_compose(transform, alpha, beta):
    """The error vanishes with the square of the pixels' size; added parameters, or beta first, are wrong at any."""
    errors = []
    for finer in (1, 4):
        twice, once, wrong = composed(transform, alpha, beta, finer)
        assert twice.max() > 0.9
        errors.append(float((twice - once).abs().max()))
        if isinstance(transform, Similarity):
            assert all((twice - other).abs().max() > 0.3 for other in wrong)
    assert errors[1] < 2e-3
    assert errors[1] < errors[0] / 10


def test_gradients_reach_the_parameters():
    """By finite differences in float64, on a smooth image: attacks climb along them."""
    x = blob((31, 24), (3.0, -2.0))
    weight = torch.randn(1, 1, 31, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for make, theta, _ in CASES.values():
        transform, at = make("bicubic"), torch.tensor([theta], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v, t=transform: (t(x, v) * weight).sum(), at, eps=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scaling("lanczos"), "nearest, bilinear, bicubic"),
        (lambda: Translation(padding="white"), "black, reflection"),
        (lambda: Shear()(torch.zeros(1, 1, 9), torch.zeros(1, 1)), "for images"),
    ],
)
def test_mistakes_are_refused(make, words):
    with pytest.raises(RequestError, match=words):
        make()


def test_threats_state_transformation_padding_and_units():
    mirrored = TransformationThreat(Translation("bicubic", "reflection"), [-4, -3], 4)
    assert mirrored.describe().startswith(
        "translation with mirrored borders by -4 to 4 pixels, -3 to 4 pixels (any real number; bicubic)"
    )
    assert (mirrored.unit, mirrored.reach) == ("pixels", 4)
    threat = TransformationThreat(Similarity(), [-10, -0.1, -1, -1], [10, 0.1, 1, 1])
    for words in ("-10 to 10 degrees", "-0.1 to 0.1 log factor", "-1 to 1 pixels down", "-1 to 1 pixels right"):
        assert words in threat.describe()
    assert threat.unit == "share of the range"


# ---------------------------------------------------------------- parameters to search


@pytest.mark.parametrize(("points", "side"), [(2, 3), (9, 3), (10, 4), (16, 4), (17, 5)])
def test_a_grid_over_two_parameters(points, side):
    values, complete = TransformationThreat(Translation(), [-4, -2], [4, 6]).parameters(points)
    assert not complete
    expected = list(itertools.product(np.linspace(-4, 4, side), np.linspace(-2, 6, side)))
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize(("points", "side"), [(13, 3), (81, 3), (82, 4), (256, 4), (625, 5)])
def test_a_grid_over_four_parameters_holds_the_corners(points, side):
    threat = TransformationThreat(Similarity(), [-10, -0.1, -1, -2], [10, 0.2, 1, 2])
    values, _ = threat.parameters(points)
    assert values.shape == (side**4, 4)
    assert len(values.unique(dim=0)) == side**4
    corners = {tuple(np.float32(c).tolist()) for c in itertools.product(*zip(threat.lows, threat.highs, strict=True))}
    assert corners <= {tuple(row) for row in values.tolist()}


def test_all_multiples_of_a_step_in_a_box():
    values, complete = TransformationThreat(Translation(), [-1, -2], [1.5, 0.4], step=0.5).parameters(2)
    assert complete
    rows, columns = np.arange(-1, 1.6, 0.5), np.arange(-2, 0.1, 0.5)
    assert values.tolist() == [list(pair) for pair in itertools.product(rows, columns)]


@pytest.mark.parametrize(("step", "points"), [(0.01, 13), (None, 317**2)])
def test_too_many_parameters_are_refused(step, points):
    threat = TransformationThreat(Translation(), -4, 4, step=step)
    with pytest.raises(RequestError, match="too many to search"):
        threat.parameters(points)
    assert len(TransformationThreat(Translation(), -4, 4).parameters(316**2)[0]) == 316**2

"""The audit page: every number against an independent calculation, nothing from outside, and read in a real browser."""

import base64
import io
import itertools
import math
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, binom

from audits import ABSTAINED, IMAGES, RADII, RECORDS, SETTINGS, WRONG, Content, audited, page, record
from conftest import ROOT
from gsmooth_lightning.certify.base import GUARANTEES
from gsmooth_lightning.report.html import (
    LIMITS,
    SHOWN,
    Difference,
    audit_page,
    class_name,
    false_certificates,
    parts,
    picture,
    votes,
)
from gsmooth_lightning.report.tables import BLACK_BOX, MEANING, RECEIVED
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Rotation, Volume


@pytest.fixture(scope="module")
def content() -> Content:
    return Content(page(audited()))


# ---------------------------------------------------------------- numbers


def test_certified_accuracy(content):
    """k images of 12 that are right with at least this radius, and the 95 % interval of Clopper and Pearson."""
    rows = content.table("radius (degrees)")
    assert [float(row[0]) for row in rows] == pytest.approx([0, 10 / 3, 20 / 3, 10], abs=1e-3)
    for radius, cell in zip((0, 10 / 3, 20 / 3, 10), (row[1] for row in rows), strict=True):
        k = sum(RADII[i] >= radius for i in range(12) if i not in WRONG + ABSTAINED)
        low, high = beta.ppf(0.025, k, 13 - k), beta.ppf(0.975, k + 1, 12 - k)
        value, *interval = map(float, re.findall(r"[\d.]+", cell))
        assert value == pytest.approx(k / 12, abs=5.1e-4)
        assert interval == pytest.approx([low, high], abs=5.1e-4)


def test_expected_number_of_false_certificates(content):
    """Sum of the alphas, and P(more than m) of 12 independent events of probability alpha."""
    assert f"at most {12 * 0.0011:.3g} of 12" in content.words
    rows = content.table("more false certificates than")
    assert [row[0] for row in rows] == ["0"]  # two have a probability of .00008
    for m, (_, shown) in enumerate(rows):
        assert float(shown) == pytest.approx(binom.sf(m, 12, 0.0011), abs=5.1e-5)


def test_probability_of_false_certificates():
    """Against the binomial law, and for unequal alphas against all subsets."""
    rows = false_certificates([0.02] * 500)
    assert next(m for m, _ in rows) == 10
    assert rows[-1][1] >= 1e-4 > binom.sf(rows[-1][0] + 1, 500, 0.02)
    assert [p for _, p in rows] == pytest.approx([binom.sf(m, 500, 0.02) for m, _ in rows], abs=1e-12)
    alphas, exact = [0.5, 0.1, 0.3, 0.01, 0.2], np.zeros(6)
    for happens in itertools.product((0, 1), repeat=5):
        exact[sum(happens)] += math.prod(a if h else 1 - a for a, h in zip(alphas, happens, strict=True))
    rows = false_certificates(alphas)
    assert [m for m, _ in rows] == [1, 2, 3]  # all five have a probability of .00003
    assert [p for _, p in rows] == pytest.approx([exact[m + 1 :].sum() for m in (1, 2, 3)], abs=1e-12)


def test_what_all_images_share_is_counted_once():
    """With a common alpha_E: P(more than m) <= alpha_E + P(more than m by votes alone)."""
    rows = dict(false_certificates([0.001] * 100, shared=0.01))
    assert rows[0] == pytest.approx(0.01 + binom.sf(0, 100, 0.001))
    assert rows[1] == pytest.approx(0.01 + binom.sf(1, 100, 0.001))
    text = Content(page(audited(shared=1e-4))).words
    assert "0.0001 is for what all images share" in text


def test_power(content):
    """Two of twelve would be forged: two draws miss both with probability 10/12 * 9/11."""
    assert audited().power == pytest.approx(1 - 10 / 12 * 9 / 11)
    assert f"{1 - 10 / 12 * 9 / 11:.3f}" in content.words


def test_statistics_and_hashes(content):
    assert content.value("abstained") == "1 of 12"
    assert content.value("evaluations") == str(sum(128 + i for i in range(12)))
    assert content.value("seconds of work") == "6.0"
    assert content.value("images") == "12 (the first 12)"
    assert content.value("data") == "made up"
    assert content.tables[-1] == [["checkpoint", "ab" * 32], ["data", "test 0123456789abcdef"]]
    assert content.value("threat").startswith("rotation by -10 to 10 degrees")
    assert "gsmooth verify runs/certify k=2 seed=7" in content.text


def test_images_drawn_again(content):
    """Stored above drawn again; the classes with most votes; what differs is marked and named."""
    rows = content.table("image")
    assert [row[0].strip() for row in rows] == ["1", "same", "2", "same"]
    assert rows[0][1:] == rows[1][1:]
    assert rows[0][1:] == [f"{1:016x}", "1", "10 for 2", "81 for 2, 19 for 1", "100", "2", "4.5", "0.8", "0.2", "0.25"]
    other = record(1, counts=[1, 19, 80], pa=0.79)
    wrong = [
        Difference("image 1", "counts", RECORDS[1]["counts"], other["counts"], "drawn again"),
        Difference("image 1", "pa", 0.8, 0.79, "drawn again"),
    ]
    text = page(audited(again=[other], differences=wrong))
    marked = re.findall("<mark>(.*?)</mark>", text)
    assert marked == ["81 for 2, 19 for 1", "0.8", "differs: counts, pa", "80 for 2, 19 for 1, 1 for 0", "0.79"]
    shown = Content(text).words
    assert 'image 1, counts: stored {"0": 0, "2": 81}, drawn again {"0": 1, "2": 80}' in shown
    assert "image 1, pa: stored 0.8, drawn again 0.79" in shown


# ---------------------------------------------------------------- words


def test_the_verdict():
    """One sentence with date, k and the auditor's seed; whether it differs is its first word."""
    assert audited().verdict == (
        "Verified on 2026-01-02 03:04 UTC: k = 2 of the 12 finished images, chosen by the auditor's seed 7, were drawn "
        "again from their addresses and gave what the run states; all else that was checked holds."
    )
    assert audited(again=()).verdict == (
        "Consistent, on 2026-01-02 03:04 UTC: what the run states of its 12 finished images agrees; no image was drawn "
        "again."
    )
    wrong = Difference("image 3", "radius", 9.0, 8.5, "from its votes")
    assert audited(differences=[wrong, wrong]).verdict == (
        "Differs, on 2026-01-02 03:04 UTC: something that the run states does not hold (the first of 2 is image 3, "
        "radius: stored 9.0, from its votes 8.5); k = 2 of the 12 finished images, chosen by the auditor's seed 7, "
        "were drawn again."
    )
    kinds = {
        "verdict": audited(),
        "verdict undrawn": audited(again=()),
        "verdict differs": audited(differences=[wrong]),
    }
    for kind, audit in kinds.items():
        content = Content(page(audit))
        assert audit.verdict in content.words
        assert ("p", {"class": kind}) in content.tags


@pytest.mark.parametrize("guarantee", GUARANTEES)
def test_every_guarantee_says_what_it_does_not_mean(guarantee):
    """In the words of the README's section, for those that the run has."""
    details = {"E": 0.25, "rho": 0.01, "alpha_E": 1e-4, "q_E": 0.98, "rests_on": "a hypothesis", "base": "black box"}
    found = Content(page(audited([record(i, guarantee=guarantee, details=details) for i in range(12)])))
    rows = found.table("guarantee")
    assert rows[0] == [guarantee, MEANING[guarantee], LIMITS[guarantee]]
    assert [row[0] for row in rows[1:]] == ["base: black box", "not proved", "fraction of images that E covers (q_E)"]
    assert rows[1][1] == BLACK_BOX
    assert rows[2][1] == "a hypothesis"
    assert "0.98" in rows[3][1]
    counted = {"heuristic": "not proved fails", "distributional": "E does not cover"}
    for name, words in counted.items():
        assert (words in found.words) == (name == guarantee)


def test_limits_are_those_of_the_readme():
    text = (ROOT / "README.md").read_text().split("## What a certificate means")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| (.*) \|$", text, re.MULTILINE)
    assert dict(rows) == LIMITS
    assert set(LIMITS) == set(GUARANTEES)


def test_the_claim_is_that_of_the_readme(content):
    """Its sentences are the README's, with this run's alpha."""
    readme = " ".join((ROOT / "README.md").read_text().replace("**", "").split())
    claim = (
        "over the draws: no attack of the stated threat within the radius changes the prediction of the smoothed "
        "classifier on this image. It does not say that the prediction is right, nor anything about the base network "
        "alone, another preprocessing, or an attack outside the threat."
    )
    assert claim in readme
    assert f"With probability at least 1 - 0.0011 {claim}" in content.words
    expected = "alpha holds for each image; a table over m images expects at most m alpha false certificates"
    assert expected in readme
    assert expected in content.words


def test_a_received_files_certificate_says_whose_it_is(content):
    settings = SETTINGS | {"certify": {"_target_": "gsmooth_lightning.certify.ReceivedCertifier"}}
    assert [RECEIVED] in [row[1:] for table in Content(page(audited(settings=settings))).tables for row in table]
    assert not any(RECEIVED in row for table in content.tables for row in table)


def test_the_classifier_in_words(content):
    """Every part by its class and options, in units; other kinds of votes, a denoiser, a learned sigma, no law."""
    most = "the class with most votes of the base network, parameters and noise drawn as follows"
    assert content.value("smoothed classifier") == most
    assert content.value("base network") == "SmallCNN (widths 16, 32, hidden 64)"
    assert (
        content.value("drawn parameters") == "of Rotation (interpolation bilinear), in degrees, by Gaussian (sigma 30)"
    )
    assert content.value("preprocessing") == "none"
    assert content.value("noise") == "Gaussian (sigma 0.25)"
    assert content.value("theorem") == "JointCertifier (top_k 1)"
    assert content.value("sampling") == "FixedN (n 100)"
    assert content.value("error bound") == "ImageBound (draws 64)"
    other = {
        "denoiser": {"_target_": "a.DnCNN"},
        "learned": "sigma.ckpt",
        "law": None,
        "certify": {"_target_": "a.Cover"},
    }
    soft = SmoothedClassifier(torch.nn.Identity(), 3, noise=Gaussian(0.25), votes="soft")
    found = parts(SETTINGS | other, soft)
    assert "softmax" in found["smoothed classifier"]
    assert found["base network"].endswith("behind the denoiser DnCNN")
    assert (found["drawn parameters"], found["noise"]) == ("none", "learned (see the hashes)")
    assert "sampling" not in found


def test_sections_in_order(content):
    assert content.headings == [
        "Audit of runs/certify",
        "What was not checked, or under other conditions",
        "What is claimed",
        "Certified accuracy",
        "Chance of false certificates",
        "The run",
        "Worst and best images",
        "Wrong prediction, largest radius first",
        "Abstained",
        "Right, smallest radius first",
        "Right, largest radius first",
        "Images drawn again",
        "Hashes",
        "How to repeat it",
    ]
    assert "One note." in content.words


# ---------------------------------------------------------------- images


def test_worst_and_best_images(content):
    """By kind: wrong ones by falling radius, abstentions, right ones from both ends, none twice."""
    shown = [int(i) for i in re.findall(r"image (\d+): ", content.words)]
    assert shown[:3] == [1, 5, 6]  # radii 4.5, 3.5; an abstention
    right = [i for i in range(12) if i not in WRONG + ABSTAINED]
    by_radius = sorted(right, key=lambda i: (RADII[i], max(RECORDS[i]["counts"])))
    assert shown[3:] == by_radius[:SHOWN] + by_radius[::-1][:SHOWN]
    assert "image 6: abstained, label 0" in content.words
    assert "image 1: 2, label 1 radius 4.5 degrees votes 81 for 2, 19 for 1" in content.words


def test_classes_have_names():
    text = Content(page(audited(names={0: "zero", 2: "two"}))).words
    assert "image 1: 2 (two), label 1 radius" in text
    assert "81 for 2 (two), 19 for 1" in text
    assert class_name([0, 1], {0: "zero"}) == "0 (zero), 1"
    assert class_name(7, {7: "7 - seven"}) == "7 - seven"
    assert votes([0, 0, 0], {}) == "none"
    assert votes([1, 4, 3, 2, 5, 0], {}) == "5 for 4, 4 for 1, 3 for 2, 2 more classes"
    assert votes([0.5, 2.25], {}) == "2.25 for 1, 0.5 for 0"


def test_a_picture_is_the_image():
    """Every pixel, grey or in colour; large ones are made smaller."""
    for shape in ((1, 5, 7), (3, 6, 4)):
        pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape)).float()
        shown = Image.open(io.BytesIO(base64.b64decode(picture(pixels / 255).split(",")[1])))
        expected = pixels.permute(1, 2, 0).squeeze(-1).numpy()
        assert np.array_equal(np.asarray(shown), expected)
    large = Image.open(io.BytesIO(base64.b64decode(picture(torch.zeros(1, 300, 600)).split(",")[1])))
    assert large.size == (128, 64)


def test_a_waveform_is_the_range_of_its_samples():
    """A clip that is loud in its second half: its outline spans 60 pixels there, and less than one before."""
    clip = torch.zeros(1, 3200)
    clip[0, 1600::2], clip[0, 1601::2] = 1.0, -1.0
    drawing = base64.b64decode(picture(clip).split(",")[1]).decode()
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="(.*?)"', drawing)[1].split()]
    spans = {k: [y for x, y in points if x == k] for k in range(160)}
    assert {max(ys) - min(ys) for k, ys in spans.items() if k < 80} == {0.5}
    assert {max(ys) - min(ys) for k, ys in spans.items() if k >= 80} == {60.5}
    found = [r | {"unit": "dB", "radius": 1.5, "prediction": r["label"]} for r in RECORDS]
    audio = audited(found, threat=TransformationThreat(Volume(), -3, 3, saved="16bit"))
    text = audit_page(audio, lambda i: clip / 2)
    assert 'class="card wave"' in text
    assert "-1.5" in text
    assert "+1.5" in text


def test_pictures_at_the_ends_of_the_certified_range(content):
    """Beside the clean image those turned by the radius to both sides; alone where nothing is certified."""
    threat = TransformationThreat(Rotation(), -10, 10)
    sources = {a["alt"]: a["src"] for tag, a in content.tags if tag == "img"}
    for angle in (-10.0, 10.0):
        (turned,) = threat.apply(threat.prepare(IMAGES[2][None].float()), torch.tensor([[angle]]))
        assert sources[f"image 2, {angle:+.3g}"] == picture(turned)
    assert [alt for alt in sources if alt.startswith("image 0,")] == ["image 0, clean"]


def test_pixel_threats_and_top_k():
    """Radii in l2 without ends; a top-k certificate counts by its label."""
    found = [r | {"unit": "l2", "radius": r["radius"] / 10} for r in RECORDS]
    pixels = Content(page(audited(found, threat=PixelThreat())))
    assert [row[0] for row in pixels.table("radius (l2)")][:2] == ["0", "0.25"]
    kept = {"prediction": [1, 2], "radius": [0.5, 0.25], "pa": None, "pb": None, "unit": "l2"}
    top = Content(page(audited([r | kept for r in RECORDS], threat=PixelThreat())))
    assert top.table("image")[0][6:9] == ["1, 2", "0.5, 0.25", "–"]
    right = sum(r["label"] in (1, 2) for r in RECORDS)
    assert float(top.table("radius (l2)")[0][1].split()[0]) == pytest.approx(right / 12, abs=5e-4)


# ---------------------------------------------------------------- safe and alone

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>$\\nonsense{$"


def test_nothing_that_is_shown_becomes_markup():
    """Class names, paths, settings, records and differences of a hostile run are text."""
    details = {"E": 0.25, "rho": 0.01, "alpha_E": 1e-4, "rests_on": EVIL, "base": EVIL, "left": EVIL}
    wrong = Difference(f"image {EVIL}", EVIL, EVIL, [EVIL], EVIL)
    hostile = audited(
        [record(i, details=details, input=EVIL, unit=EVIL) for i in range(12)],
        run=f"runs/{EVIL}",
        command=f"gsmooth verify {EVIL}",
        settings=dict.fromkeys(SETTINGS, EVIL) | {"certify": {"_target_": EVIL, EVIL: [EVIL]}},
        differences=[wrong],
        notes=[EVIL],
        hashes={EVIL: EVIL},
        images=EVIL,
        source=EVIL,
        names={0: EVIL, 1: EVIL, 2: EVIL},
        date=EVIL,
    )
    found = Content(page(hostile))
    assert "script" not in {tag for tag, _ in found.tags}
    assert not [a for _, a in found.tags if any(name.startswith("on") for name in a)]
    assert found.text.count("alert('x')") > 10


def test_the_page_needs_nothing_beside_it(content):
    """No address but of pictures inside, no script, and a policy that forbids both."""
    sources = [a[name] for _, a in content.tags for name in ("src", "href", "action", "data") if name in a]
    assert len(sources) > 10
    assert all(source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in sources)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in content.tags}
    policy = next(a["content"] for tag, a in content.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "url(" not in page(audited())
    assert not content.open


def test_the_template_is_installed():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.html" in package["gsmooth_lightning.report"]


# ---------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
)  # fmt: skip
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser here (apt-get install chromium); what the page says is tested without one"
)


def browse(file: Path, *flags: str) -> subprocess.CompletedProcess:
    """Opens a file in headless Chromium with a profile of its own."""
    line = [CHROMIUM, *FLAGS, f"--user-data-dir={file.parent / 'profile'}", *flags, file.as_uri()]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)


@needs_chromium
def test_in_a_browser(tmp_path):
    """It is parsed as it is written, the console is silent, and the picture is not blank."""
    file, shot = tmp_path / "audit.html", tmp_path / "shot.png"
    file.write_text(page(audited()))
    ended = browse(file, "--dump-dom")
    assert "CONSOLE" not in ended.stderr
    seen, written = Content(ended.stdout), Content(file.read_text())
    assert seen.words == written.words
    assert seen.headings == written.headings
    cells = [[[cell.strip() for cell in row] for row in table] for table in written.tables]
    assert [[[cell.strip() for cell in row] for row in table] for table in seen.tables] == cells
    browse(file, f"--screenshot={shot}", "--window-size=1200,4000")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape[1] == 1200
    assert 0.02 < (pixels.min(2) < 200).mean() < 0.5  # text and pictures on white
    assert (np.abs(pixels.astype(int) - (0xF0, 0xF8, 0xF2)).max(2) <= 2).sum() > 20_000  # the green verdict


@needs_chromium
@pytest.mark.parametrize("width", [1200, 700])
@pytest.mark.parametrize("long", [False, True])
def test_nothing_is_wider_than_the_window(width, long, tmp_path):
    """Measured by a script that is added to the page; words without spaces break."""
    word = "runs" + "/averylongfolder" * 20
    audit = audited(run=word, names=dict.fromkeys(range(3), word), hashes={word: word}) if long else audited()
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    text = re.sub("<meta http-equiv=.*>", "", page(audit)).replace("</body>", f"{script}</body>")
    file = tmp_path / "audit.html"
    file.write_text(text)
    ended = browse(file, "--dump-dom", f"--window-size={width},900")
    found = re.search(r"<title>(\d+) of (\d+)</title>", ended.stdout)
    assert int(found[2]) == pytest.approx(width, abs=20)
    assert int(found[1]) <= int(found[2])

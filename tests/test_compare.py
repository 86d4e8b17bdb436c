"""`gsmooth compare`: every certificate that applies to one model, image set and threat, in one table."""

import json

import pandas as pd

from conftest import SMALL, one_sentence, records, run_main

PLANS = (
    "certificates.joint.error.draws=64",
    "certificates.joint_distribution.error.calibration=8",
    "certificates.joint_distribution.error.draws=64",
    "certificates.joint_distribution.error.rho=0.3",
    "certificates.joint_distribution.error.alpha_inner=0.01",
    "certificates.nested_published.sampling.n=64",
    "certificates.nested_published.certify.inner.n=64",
    "certificates.nested_sequential.sampling.n=64",
    "certificates.nested_sequential.certify.inner.n=128",
    "++certificates.joint.sampling.n=256",
    "++certificates.joint_distribution.sampling.n=256",
    "++certificates.base_spt.sampling.n=256",
    "certificates.joint_sequential.sampling.n=512",
)
"""Small numbers of draws for each certificate."""

PROVED = {
    "joint": "sound",
    "joint_sequential": "sound",
    "joint_distribution": "distributional",
    "nested_published": "sound",
    "nested_sequential": "sound",
    "base_spt": "heuristic",
    "received": "sound",
    "cover": "sound",
}
ALL = tuple(PROVED)
LATENT = ("latent", "latent_surrogate", "corollary", "corollary_proved")


def table(path, which=1):
    """A table of report.md as a frame: 0 has a row for each certificate, 1 a column."""
    lines = [line.strip("|\n").split("|") for line in path.read_text().split("\n\n")[which].splitlines()]
    cells = [[cell.strip() for cell in row] for row in lines]
    return pd.DataFrame([row[1:] for row in cells[2:]], [row[0] for row in cells[2:]], cells[0][1:])


def test_rotation_has_its_certificates_and_reasons(checkpoint, here):
    """Each certificate has a store and a column; what does not apply has its reason; a second run computes nothing."""
    command = (*SMALL, *PLANS, f"checkpoint={checkpoint}", "store=all", "images.first=3", "radii=[0,5,10]")
    ended = run_main("compare", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    shown = table(here / "all" / "report.md")
    assert set(shown.columns) == {*ALL, "direct", "enumerate", *LATENT}
    assert all("latent" in shown.loc["does not apply", name] for name in LATENT[:1])
    assert all("surrogate=FILE" in shown.loc["does not apply", name] for name in LATENT[1:])
    assert "not exact under bilinear" in shown.loc["does not apply", "direct"]
    assert shown.loc["does not apply", "enumerate"]
    for name in ALL:
        stored = records(here / "all" / name)
        assert [r["index"] for r in stored] == [0, 1, 2]
        assert shown.loc["images", name].startswith("3 (")
        spent = sum(r["evaluations"] for r in stored) / 3
        assert shown.loc["evaluations an image", name] == f"{spent:.0f}"
        assert "[" in shown.loc["certified at 5 degrees", name]
        assert shown.loc["guarantee", name].startswith(PROVED[name])
        assert float(shown.loc["seconds an image", name]) > 0
    assert "without a measurement" in shown.loc["not proved", "base_spt"]
    assert {r["radius"] for r in records(here / "all" / "nested_sequential")} <= {0.0, 5.0, 10.0}
    compared = table(here / "all" / "report.md", 0)
    assert list(compared.index) == list(shown.columns)
    assert compared.loc["nested_sequential", "guarantee"] == "sound"
    assert compared.loc["joint", "certified at 5 degrees"] == shown.loc["certified at 5 degrees", "joint"]
    assert "not exact under bilinear" in compared.loc["direct", "does not apply"]
    assert compared.loc["joint", "certified at 5 degrees"] in ended.out
    assert (here / "all" / "report.png").stat().st_size > 10_000
    before = {p: p.read_bytes() for p in (here / "all").rglob("records.jsonl")}
    assert run_main("compare", *command).code == 0
    assert {p: p.read_bytes() for p in (here / "all").rglob("records.jsonl")} == before


def test_pixel_noise_has_the_direct_certificate(checkpoint, here):
    """Under an l2 threat the others say why they do not apply."""
    l2 = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none")
    kept = [o for o in SMALL if not o.startswith(("law", "threat", "error"))]
    command = (
        *kept,
        *l2,
        f"checkpoint={checkpoint}",
        "store=all",
        "radii=[0,0.1]",
        "certificates.direct.sampling.n=128",
    )
    ended = run_main("compare", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    shown = table(here / "all" / "report.md")
    assert "[" in shown.loc["certified at 0.1 l2", "direct"]
    for name in (*ALL, "enumerate"):
        assert shown.loc["does not apply", name]


def test_mistakes_end_in_one_sentence(checkpoint, here):
    one_sentence(run_main("compare", *SMALL), "compare", "checkpoint=FILE")
    only = [f"~certificates.{name}" for name in (*ALL, "enumerate")]
    one_sentence(run_main("compare", *SMALL, *only, f"checkpoint={checkpoint}"), "no certificate applies", "direct")


def test_a_certificate_is_added_on_the_command_line(checkpoint, here):
    """The line in the head of conf/compare.yaml."""
    only = [f"~certificates.{name}" for name in (*ALL, "enumerate", "direct")]
    added = ("+error@certificates.mine.error=image", "+sampling@certificates.mine.sampling=fixed")
    added += ("+certify@certificates.mine.certify=joint", "certificates.mine.sampling.n=128")
    command = (*SMALL, *only, *added, f"checkpoint={checkpoint}", "store=all", "images.first=1")
    ended = run_main("compare", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    assert len(records(here / "all" / "mine")) == 1


def test_leftovers_of_a_part_that_a_certificate_switches_off(network, here):
    """noise=none and no denoiser for one certificate, beside numbers of an experiment for them: it has neither."""
    added = ("+error@certificates.mine.error=base", "+sampling@certificates.mine.sampling=fixed")
    added += ("+certify@certificates.mine.certify=joint", "certificates.mine.sampling.n=128")
    off = ("+noise@certificates.mine.noise=none", "+certificates.mine.noise.sigma=0.5")
    off += ("+certificates.mine.denoiser.depth=5",)
    command = (*SMALL, *added, *off, f"checkpoint={network(*SMALL)}", "only=[mine]", "store=all", "images.first=1")
    ended = run_main("compare", *command)
    assert (ended.code, ended.error) == (0, None), ended.err
    assert len(records(here / "all" / "mine")) == 1
    fingerprint = json.loads((here / "all" / "mine" / "fingerprint.json").read_text())
    assert fingerprint["noise"] is None
    assert "denoiser" not in fingerprint

"""`xlvlm extract`: what it says, and the profile that it writes."""

from xlvlm_jax import Features

NORM = "language_model.model.norm"


def test_a_run_with_a_profile(xlvlm, pictures, tmp_path):
    status, out, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", NORM, "--tokens", "index:-1"),
        *("--max-new-tokens", 2, "--batch-size", 4, "--num-samples", 6, "--workers", 1),
        *("--output", tmp_path / "features", "--profile", tmp_path / "profile"),
    )
    assert status == 0, errors
    said = " ".join(out.split())
    assert "waited for: input" in said and "device" in said and "write" in said
    assert "programs compiled" in said and "from the cache" in said
    assert "6 samples, 6 rows" in said and "0 without states" in said
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(Features.open(tmp_path / "features").tokens) == 6


def test_a_rule_of_match_that_is_none(xlvlm, pictures, tmp_path):
    status, _, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", NORM, "--tokens", "class:colours"),
        *("--output", tmp_path / "features", "--match", "whole"),
    )
    assert (status, "match must be one of word, first-token" in errors) == (2, True)


def test_a_mesh_that_is_none(xlvlm, pictures, tmp_path):
    status, _, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", NORM, "--tokens", "index:-1"),
        *("--output", tmp_path / "features", "--mesh", "2by4"),
    )
    assert status == 2
    assert "expected DATAxMODEL such as 2x4, got '2by4'" in errors
    status, _, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", NORM, "--tokens", "index:-1"),
        *("--output", tmp_path / "features", "--mesh", "64x64"),
    )
    assert status == 2
    assert "a mesh of 64 x 64 takes 4096 devices; there are" in errors
    assert not (tmp_path / "features").exists()

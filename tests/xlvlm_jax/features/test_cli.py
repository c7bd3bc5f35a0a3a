"""`xlvlm extract`: its output, and the profile that it writes."""

import json
import shutil

from xlvlm_jax import Features
from xlvlm_jax.demo import embedded

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
    assert "6 samples, 6 rows" in said and "0 skipped" in said
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(Features.open(tmp_path / "features").tokens) == 6


def test_an_unknown_rule_for_matching(xlvlm, pictures, tmp_path):
    status, _, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", NORM, "--tokens", "class:colours"),
        *("--output", tmp_path / "features", "--match", "whole"),
    )
    assert (status, "match must be one of word, first-token" in errors) == (2, True)


def test_an_invalid_mesh(xlvlm, pictures, tmp_path):
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
    assert "a mesh of 64 x 64 needs 4096 devices; there are" in errors
    assert not (tmp_path / "features").exists()


def test_effects_of_generation_config_are_shown_recorded_and_optional(xlvlm, pictures, tmp_path):
    model = shutil.copytree(embedded.LLAVA, tmp_path / "model")
    file = model / "generation_config.json"
    ends = json.loads(file.read_text())

    def run(output, *options):
        return xlvlm(
            *("extract", model, pictures, "--site", NORM, "--tokens", "index:-1", *options),
            *("--max-new-tokens", 1, "--batch-size", 4, "--num-samples", 4, "--workers", 1),
            *("--output", tmp_path / output),
        )

    file.write_text(json.dumps(ends | {"num_beams": 4}))
    status, _, errors = run("refused")
    assert status == 2 and not (tmp_path / "refused").exists()
    assert "num_beams is 4, which is not implemented" in errors
    status, out, errors = run("plain", "--ignore-generation-config")
    assert status == 0 and "generation_config.json" not in out, errors
    plain = Features.open(tmp_path / "plain")
    assert "generation_config" not in plain.manifest

    suppressed = sorted(set(plain.tokens.tolist()))
    file.write_text(json.dumps(ends | {"suppress_tokens": suppressed, "do_sample": True}))
    status, out, errors = run("ruled")
    assert status == 0, errors
    said = " ".join(out.split())
    assert f"generation_config.json: applying suppress_tokens {suppressed}" in said
    assert "do_sample is ignored, decoding is greedy" in said
    ruled = Features.open(tmp_path / "ruled")
    assert ruled.manifest["generation_config"] == {"suppress_tokens": suppressed}
    assert not set(ruled.tokens.tolist()) & set(suppressed)

    status, _, errors = run("ruled", "--ignore-generation-config")
    assert status == 2
    assert "started with other arguments (generation_config.suppress_tokens" in errors

"""Dictionaries by name and from files: what is read, the null, messages."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from xlvlm_jax import Concepts, project, sae
from xlvlm_jax.concept_benchmark import dictionaries
from xlvlm_jax.concept_benchmark.dictionaries import parse_entry, read
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.metrics import explained_variance

from .conftest import SITE

RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(6, 4)).astype(np.float32)
ROWS = RNG.normal(size=(10, 4)).astype(np.float32)
WEIGHTS = {
    "W_enc": ATOMS.T.copy(),
    "W_dec": ATOMS,
    "b_enc": np.full(6, -0.1, np.float32),
    "b_dec": np.ones(4, np.float32),
}


def test_entries(tmp_path):
    assert parse_entry("topk-sae").method == "topk-sae"
    assert parse_entry("random") == ("random", (), "random")
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, ATOMS)
    one, two = tmp_path / "a.npy", tmp_path / "b.npy"
    assert parse_entry(str(one)) == ("a", (one,), None)
    (tmp_path / "layer_1.v2").mkdir()
    assert parse_entry(str(tmp_path / "layer_1.v2")).name == "layer_1.v2"
    both = parse_entry(f"mine={one},{two}")
    assert both == ("mine", (one, two), None)
    # As a sweep names its directories.
    swept = tmp_path / "lr=1e-3" / "sae"
    swept.mkdir(parents=True)
    assert parse_entry(str(swept)) == ("sae", (swept,), None)
    assert parse_entry(f"mine={swept},{one}") == ("mine", (swept, one), None)
    assert parse_entry(f"{swept},{one}") == ("sae", (swept, one), None)


def test_every_form_encodes_alike(tmp_path):
    np.save(tmp_path / "a.npy", ATOMS)
    save_file({"components": ATOMS, "mean": ROWS.mean(0)}, tmp_path / "pca.safetensors")
    save_file(WEIGHTS, tmp_path / "sae.safetensors")
    save_file(WEIGHTS | {"threshold": np.ones(6, "float32")}, tmp_path / "jump.safetensors")
    dictionary = sae.Dictionary.of(WEIGHTS, sae.Settings("standard"))
    sae.save(dictionary, tmp_path / "saelens")
    given = Concepts.from_components(ATOMS, "kmeans")
    given.save(tmp_path / "concepts")
    hidden = (ROWS - 1) @ ATOMS.T - 0.1
    for name, expected in (
        ("a.npy", project(ROWS, Concepts.from_components(ATOMS))),
        ("pca.safetensors", (ROWS - ROWS.mean(0)) @ ATOMS.T),
        ("sae.safetensors", np.maximum(hidden, 0)),
        ("saelens", np.maximum(hidden, 0)),
        ("jump.safetensors", hidden * (hidden > 1)),
        ("concepts", project(ROWS, given)),
    ):
        found = read(tmp_path / name, "pca" if name.startswith("pca") else "snmf")
        np.testing.assert_allclose(project(ROWS, found), expected, atol=2e-6)
    save_file(WEIGHTS | {"k": np.array([2])}, tmp_path / "topk.safetensors")
    two = np.asarray(project(ROWS, read(tmp_path / "topk.safetensors")))
    kept = np.sort(np.maximum(hidden, 0), axis=1)[:, -2:]
    np.testing.assert_allclose(np.sort(two, axis=1)[:, -2:], kept, atol=2e-6)
    assert ((two != 0).sum(1) <= 2).all()


def test_random_directions_explain_little_but_are_not_worse_than_the_mean():
    rows = np.random.default_rng(1).normal(size=(500, 16)).astype(np.float32) + 3
    found = dictionaries.random_dictionary(rows, 32, 4)
    codes = np.asarray(project(rows, found))
    assert ((codes != 0).sum(1) <= 4).all()
    made = dictionaries.remade(found, codes, rows)
    explained = explained_variance(rows, made)
    assert 0 < explained < 0.6
    again = dictionaries.random_dictionary(rows, 32, 4)
    assert dictionaries.digest_of(again) == dictionaries.digest_of(found)
    other = dictionaries.random_dictionary(rows, 32, 4, seed=1)
    assert dictionaries.digest_of(other) != dictionaries.digest_of(found)


def test_messages(tmp_path, vlm):
    def refused(match, call, *arguments):
        with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
            call(*arguments)
        assert "\n" not in str(error.value)

    refused("'topk' is not a method and there is no file or directory topk", parse_entry, "topk")
    refused("'a/b' names a dictionary and its directory", parse_entry, f"a/b={tmp_path}")
    refused("'mine=' is not a method and there is no path", parse_entry, "mine=")
    np.save(tmp_path / "odd.npy", np.array([["a"]]))
    refused("odd.npy: .*numbers", read, tmp_path / "odd.npy")
    (tmp_path / "empty.npy").touch()
    refused("empty.npy is not a matrix of numbers", read, tmp_path / "empty.npy")
    np.save(tmp_path / "nan.npy", ATOMS * np.nan)
    refused("nan.npy: components.*NaN", read, tmp_path / "nan.npy")
    save_file({"atoms": ATOMS}, tmp_path / "atoms.safetensors")
    refused("has atoms; expected components, or W_enc", read, tmp_path / "atoms.safetensors")
    save_file(WEIGHTS | {"W_dec": ATOMS * np.inf}, tmp_path / "inf.safetensors")
    refused("inf.safetensors: W_dec .* not finite", read, tmp_path / "inf.safetensors")
    refused("holds no sparse autoencoder", read, tmp_path)
    entry = parse_entry("kmeans")
    refused("two dictionaries are called 'kmeans'", dictionaries.check_names, [entry, entry])

    def check(components, **source):
        concepts = Concepts(np.asarray(components, np.float32), source=source)
        return dictionaries.check, concepts, vlm, SITE, "mine"

    shape = r"mine: components have shape \(6, 4\), .* width 192; expected \[K, 192\]"
    refused(shape, *check(ATOMS))
    refused("mine: components .* not finite; learn it again", *check(np.full((2, 192), np.nan)))
    wide = np.ones((2, 192))
    refused("mine was learnt at 'blocks.2", *check(wide, site="blocks.2.hook_resid_post"))
    refused("mine was learnt on the states of 'x' ", *check(wide, model="x", fingerprint="other"))
    skipping = sae.Dictionary.of(WEIGHTS, sae.Settings("transcoder"))
    given = (dictionaries.check, Concepts.from_dictionary(skipping), vlm, SITE, "mine")
    refused("has features of two sites or models; the benchmark needs concepts of one", *given)
    refused("'crosscoder' is not a method", parse_entry, "crosscoder")
    dictionaries.check(*check(wide, site="blocks.7.hook_resid_post")[1:])


def test_learning_by_name():
    rows = RNG.normal(size=(60, 4)).astype(np.float32)
    assert dictionaries.learn("simple", rows, 3, 1).method == "simple"
    assert dictionaries.learn("random", rows, 3, 1).method == "topk-sae"
    with pytest.raises(ValueError, match="unknown method 'lda'"):
        dictionaries.learn("lda", rows, 3, 1)


def test_every_learnt_method_is_one_of_decompose():
    for name in set(dictionaries.LEARNT) - {dictionaries.RANDOM}:
        assert method_named(name).name == name

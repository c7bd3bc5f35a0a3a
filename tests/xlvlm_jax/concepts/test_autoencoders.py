"""Sparse autoencoders as concepts: learnt or read, stored, projected, grounded, shifted."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import xlvlm_jax
from xlvlm_jax import Concepts, Features, sae
from xlvlm_jax.concepts import autoencoders, encoding, reconstruct
from xlvlm_jax.concepts.decomposition import streamed_memory_needed
from xlvlm_jax.concepts.encoding import encode_all
from xlvlm_jax.concepts.methods import TRAINED, method_named
from xlvlm_jax.concepts.picture_maps import concept_site
from xlvlm_jax.concepts.scores.scorer import Scorer
from xlvlm_jax.concepts.stage import (
    decompose_features,
    encode_features,
    ground_concepts,
    layer_of,
)
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.metrics import explained_variance
from xlvlm_jax.shift.analyse import analyse
from xlvlm_jax.shift.grounding import ground_samples
from xlvlm_jax.shift.pairs import Pairs
from xlvlm_jax.storage.zarr_rows import StoredRows

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Z = (RNG.normal(size=(60, 6)) + 3).astype(np.float32)
SHORT = {"max_iter": 8, "batch_size": 32, "k": 2}


def write(path, rows, fingerprint="m"):
    """Features with one row per sample."""
    with FeaturesWriter(path, {"model": "m", "fingerprint": fingerprint}) as writer:
        index = np.arange(len(rows))
        samples = [{"id": str(i), "image": f"{i}.jpg"} for i in index]
        writer.append(samples, {"a": rows}, index, index, index)
        writer.close()
    return Features.open(path)


@pytest.fixture(scope="module")
def concepts():
    return xlvlm_jax.decompose(Z, 8, "topk-sae", key=KEY, **SHORT)


@pytest.fixture
def features(tmp_path):
    return write(tmp_path / "features", Z)


def test_options_of_numpy_and_jax(concepts):
    given = {"max_iter": np.int64(8), "batch_size": np.int32(32), "k": np.array(2)}
    found = xlvlm_jax.decompose(Z, 8, "topk-sae", key=KEY, **given)
    assert json.loads(json.dumps(found.options)) == concepts.options
    options = method_named("matryoshka-sae").options({"prefixes": np.array([2, 8]), "k": 2})
    assert options["prefixes"] == (2, 8) and type(options["prefixes"][0]) is int
    scales = method_named("crosscoder").options({"input_scale": [np.float32(0.5), 2.0]})
    assert scales["input_scale"] == (0.5, 2.0)


def test_memory_of_rows_that_are_held_or_read():
    held = xlvlm_jax.concepts.memory_needed((1000, 50), 64, "topk-sae", dtype="float16")
    read = streamed_memory_needed((1000, 50), 64, "topk-sae")
    assert held - read == 2 * 1000 * 50
    # After training, rows' codes are more than what training takes.
    wide = streamed_memory_needed((10**6, 8), 2048, "topk-sae", batch_size=8, k=2)
    assert wide >= 2 * encoding.CODE_BYTES


def test_progress_is_printed_without_what_is_not_compared(capsys):
    xlvlm_jax.decompose(Z, 8, "topk-sae", key=KEY, verbose=4, **SHORT)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["iteration 4", "iteration 8"]
    assert "L0: " in lines[0] and "tol" not in lines[0] and "nan" not in lines[0]


@pytest.mark.parametrize("method", ["topk-sae", "jumprelu-sae", "archetypal-sae"])
def test_what_is_learnt_is_projected_and_put_back(method):
    found = xlvlm_jax.decompose(Z, 8, method, key=KEY, **SHORT)
    np.testing.assert_array_equal(xlvlm_jax.project(Z, found), found.activations)
    back = np.asarray(reconstruct(found, found.activations))
    np.testing.assert_allclose(
        back, found.activations @ found.components + found.dictionary.params["b_dec"], atol=1e-4
    )
    assert found.objective == pytest.approx(((Z - back) ** 2).sum(axis=1).mean(), rel=1e-4)
    expected = explained_variance(Z, back)
    assert found.source["explained_variance"] == pytest.approx(expected, abs=1e-5)
    codes = np.asarray(found.activations)
    assert found.source["l0"] == np.count_nonzero(codes) / len(Z)
    assert found.source["dead_share"] == found.dead.mean() == 1 - (codes != 0).any(axis=0).mean()
    assert found.iterations == len(found.history) == 8 and found.method == method
    # The options of the result give the result again.
    again = xlvlm_jax.decompose(Z, 8, method, key=KEY, **found.options)
    np.testing.assert_array_equal(again.components, found.components)


def test_rows_on_disk_give_what_they_give_in_memory(features):
    """The order differs, but not what is computed: with one block all is the same."""
    stored = features.stored("a")
    written = []
    options = dict(SHORT, method="topk-sae", key=KEY)
    found = xlvlm_jax.decompose_stored(
        stored, 8, write=lambda start, rows: written.append((start, rows)), **options
    )
    whole = xlvlm_jax.decompose(stored, 8, **options)
    np.testing.assert_array_equal(found.components, whole.components)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in written]), whole.activations)
    assert found.activations is None and found.source == whole.source
    np.testing.assert_array_equal(xlvlm_jax.project(stored, whole), whole.activations)


def test_several_numbers_of_features():
    few, many = xlvlm_jax.decompose(Z, (4, 8), "topk-sae", key=KEY, k=1, max_iter=0)
    assert len(few.components) == 4 and len(many.components) == 8


@pytest.mark.parametrize("dtype", [np.float64, "bfloat16", np.int32])
def test_rows_of_other_types(dtype):
    rows = jax.numpy.asarray(Z, dtype) if dtype == "bfloat16" else Z.astype(dtype)
    found = xlvlm_jax.decompose(rows, 8, "batchtopk-sae", key=KEY, **SHORT)
    assert found.components.dtype == found.activations.dtype == np.float32
    np.testing.assert_array_equal(xlvlm_jax.project(rows, found), found.activations)


class TestKept:
    @pytest.mark.parametrize("method", ["topk-sae", "matryoshka-sae"])
    def test_a_directory_is_one_of_saelens_too(self, tmp_path, method):
        found = xlvlm_jax.decompose(Z, 8, method, key=KEY, **SHORT)
        found.save(tmp_path)
        assert {"cfg.json", "sae_weights.safetensors"} <= {p.name for p in tmp_path.iterdir()}
        loaded = Concepts.load(tmp_path)
        assert loaded.method == method and loaded.options == found.options
        np.testing.assert_array_equal(xlvlm_jax.project(Z, loaded), found.activations)
        np.testing.assert_array_equal(sae.load(tmp_path).encode(Z), found.activations)
        values = json.loads((tmp_path / "cfg.json").read_text())
        training = values["metadata"]["training"]
        assert training["method"] == method
        assert training["input_scale"] == found.options["input_scale"] > 0

    def test_files_of_two_saves_are_refused(self, tmp_path, concepts):
        concepts.save(tmp_path)
        other = xlvlm_jax.decompose(Z, 8, "topk-sae", key=jax.random.key(1), **SHORT)
        sae.save(other.dictionary, tmp_path)
        with pytest.raises(ValueError, match="its sparse autoencoder comes from another save"):
            Concepts.load(tmp_path)

    def test_other_concepts_in_its_place_leave_nothing_of_it(self, tmp_path, concepts):
        concepts.save(tmp_path)
        xlvlm_jax.decompose(Z, 2, "kmeans", key=KEY).save(tmp_path)
        assert not (tmp_path / "cfg.json").exists()
        assert Concepts.load(tmp_path).dictionary is None

    def test_it_passes_through_jit(self, concepts):
        moved = jax.jit(lambda c: c)(concepts)
        np.testing.assert_array_equal(
            moved.dictionary.params["W_enc"], concepts.dictionary.params["W_enc"]
        )
        codes = jax.jit(xlvlm_jax.project)(Z, concepts)
        np.testing.assert_allclose(codes, concepts.activations, rtol=1e-5, atol=1e-5)


class TestFromDictionary:
    def dictionary(self, architecture="jumprelu", **settings):
        params = {
            "W_enc": RNG.normal(size=(6, 8)),
            "W_dec": RNG.normal(size=(8, 6)),
            "b_enc": RNG.normal(size=8),
            "b_dec": RNG.normal(size=6),
        }
        if architecture == "jumprelu":
            params["threshold"] = np.full(8, 0.5)
        return sae.Dictionary.of(params, sae.Settings(architecture, **settings), "blocks.3")

    def test_features_are_encoded_and_kept(self, features, tmp_path):
        dictionary = self.dictionary()
        found = encode_features(features, tmp_path / "c", dictionary)
        np.testing.assert_allclose(found.activations, dictionary.encode(Z), rtol=1e-5, atol=1e-6)
        assert found.source["site"] == "a" and found.source["fingerprint"] == "m"
        assert Concepts.from_dictionary(dictionary).source == {"site": "blocks.3"}
        streamed = encode_features(features, tmp_path / "s", dictionary, stream=True)
        loaded = Concepts.load(tmp_path / "s")
        assert isinstance(loaded.activations, StoredRows)
        np.testing.assert_array_equal(np.asarray(loaded.activations), found.activations)
        assert streamed.source["l0"] == found.source["l0"]

    def test_a_normaliser_gets_the_states(self, features):
        dictionary = self.dictionary(normalize_activations="layer_norm")
        given = Concepts.from_dictionary(dictionary)
        codes = xlvlm_jax.project(Z, given)
        back = reconstruct(given, codes, Z)
        np.testing.assert_allclose(back, dictionary.reconstruct(Z), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="restores the input's mean and scale"):
            reconstruct(given, codes)
        kept = []
        quality = encode_all(dictionary, Z, lambda _, rows: kept.append(rows))
        assert quality.explained_variance == pytest.approx(
            explained_variance(Z, np.asarray(back)), abs=1e-5
        )

    def test_heads(self):
        dictionary = self.dictionary(hook_z=True)
        codes = xlvlm_jax.project(Z, Concepts.from_dictionary(dictionary))
        np.testing.assert_allclose(
            codes, dictionary.encode(Z.reshape(60, 2, 3)), rtol=1e-5, atol=1e-6
        )

    def test_a_transcoder_writes_another_site(self, features, tmp_path):
        """Its states are encoded; with those of the other site, what is explained is known."""
        dictionary = self.dictionary("transcoder", apply_b_dec_to_input=False)
        found = encode_features(features, tmp_path / "c", dictionary)
        np.testing.assert_allclose(found.activations, dictionary.encode(Z), rtol=1e-5, atol=1e-5)
        assert found.objective is None and found.source["explained_variance"] is None
        written = write(tmp_path / "other", np.asarray(dictionary.reconstruct(Z)) + np.float32(2))
        found = encode_features(features, tmp_path / "c", dictionary, target=written)
        assert found.objective == pytest.approx(6 * 2**2, rel=1e-4)
        assert found.written["features"] == str((tmp_path / "other").resolve())
        for use in (found.require_one_site, lambda _: found.with_components(found.components)):
            with pytest.raises(ValueError, match="'transcoder' has features of two sites"):
                use("this")

    def test_a_hook_point_that_the_model_does_not_have(self, vlm):
        dictionary = dataclasses.replace(self.dictionary(), site="blocks.90.hook_resid_post")
        with pytest.raises(ValueError, match=r"no site matches 'blocks\.90\.\S+'; nearest"):
            concept_site(vlm, None, Concepts.from_dictionary(dictionary))
        found = concept_site(vlm, "layers.2", Concepts.from_dictionary(dictionary))
        assert found == "language_model.model.layers.2"

    def test_states_of_another_layer(self, tmp_path):
        """The names of layers tell, in any naming convention."""
        with FeaturesWriter(tmp_path / "f", {}) as writer:
            index = np.arange(60)
            samples = [{"id": str(i)} for i in index]
            states = dict.fromkeys(("model.layers.3", "model.layers.4"), Z)
            writer.append(samples, states, index, index, index)
            writer.close()
        other = Features.open(tmp_path / "f")
        encode_features(other, tmp_path / "c", self.dictionary(), site="model.layers.3")
        with pytest.warns(UserWarning, match=r"learnt at blocks\.3, but .* of model\.layers\.4"):
            encode_features(other, tmp_path / "c", self.dictionary(), site="model.layers.4")
        assert [layer_of(name) for name in ("blocks.7.hook_resid_pre", "norm", "layer_2")] == [
            6,
            None,
            2,
        ]

    def test_states_of_another_width(self, tmp_path):
        other = write(tmp_path / "f", Z[:, :5])
        with pytest.raises(ValueError, match="Z has 5 columns but the concepts have 6; project"):
            encode_features(other, tmp_path / "c", self.dictionary())


class TestStages:
    def test_words_and_pictures(self, features, tmp_path, three_words):
        decompose_features(features, tmp_path / "c", 8, "topk-sae", **SHORT)
        assert not (tmp_path / "c.training").exists()
        found = ground_concepts(tmp_path / "c", three_words, features, num_images=2)
        active = np.count_nonzero(found.activations, axis=0)
        assert [len(images) for images in found.images] == np.minimum(active, 2).tolist()
        assert any(found.words)
        again = Concepts.load(tmp_path / "c")
        assert again.images == found.images and again.dictionary is not None
        scores = Scorer(features).score(again)
        assert scores.explained_variance == pytest.approx(
            again.source["explained_variance"], abs=1e-5
        )

    def test_a_killed_run_goes_on(self, features, tmp_path, monkeypatch):
        whole = decompose_features(features, tmp_path / "whole", 8, "topk-sae", **SHORT)
        monkeypatch.setattr(autoencoders, "SAVE_EVERY", 2)

        def kill(at):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            decompose_features(
                features, tmp_path / "c", 8, "topk-sae", progress=kill, verbose=5, **SHORT
            )
        assert (tmp_path / "c.training").exists() and not (tmp_path / "c").exists()
        decompose_features(features, tmp_path / "c", 8, "topk-sae", **SHORT)
        for name in ("sae_weights.safetensors", "concepts.safetensors"):
            again = (tmp_path / "c" / name).read_bytes()
            assert again == (tmp_path / "whole" / name).read_bytes()
        assert whole.source["rows"] == 60 and not (tmp_path / "c.training").exists()

    def test_features_that_changed_are_refused(self, features, tmp_path, monkeypatch):
        monkeypatch.setattr(autoencoders, "SAVE_EVERY", 2)

        def kill(at):
            raise KeyboardInterrupt

        options = dict(SHORT, progress=kill, verbose=5)
        with pytest.raises(KeyboardInterrupt):
            decompose_features(features, tmp_path / "c", 8, "topk-sae", **options)
        other = write(tmp_path / "other", Z + 1)
        with pytest.raises(ValueError, match="the rows changed since the checkpoint in"):
            decompose_features(other, tmp_path / "c", 8, "topk-sae", **SHORT)

    def test_shift(self, concepts):
        """Shifted features encode with columns that moved as they did."""
        other = (Z + np.linspace(-1, 1, 6)).astype(np.float32)
        rows = np.arange(60)
        found = analyse(Z, other, Pairs(rows, rows, 60), concepts, concepts)
        # A feature that is strongest in no sample has no shift.
        has_samples = np.asarray(found.counts) > 0
        finite = np.isfinite(np.asarray(found.shifts)).all(axis=1)
        np.testing.assert_array_equal(finite, has_samples)
        assert has_samples.sum() > 1
        ids = list(map(str, rows))
        shown = ground_samples(found, concepts, concepts, Z, other, ids, ids, num_images=2)
        active = np.count_nonzero(np.asarray(concepts.activations), axis=0)
        images = [len(images) for images in shown.images["original"]]
        assert images == np.minimum(active, 2).tolist()
        components = np.asarray(concepts.components)
        same = concepts.with_components(components)
        np.testing.assert_allclose(xlvlm_jax.project(Z, same), concepts.activations, atol=1e-4)
        moved = concepts.with_components(components + 0.5).dictionary
        np.testing.assert_allclose(moved.components, components + 0.5, rtol=1e-5)
        before = concepts.dictionary.params["W_enc"]
        scale = np.linalg.norm(before, axis=0) / np.linalg.norm(components, axis=1)
        np.testing.assert_allclose(
            moved.params["W_enc"] - before, 0.5 * scale * np.ones((6, 1)), rtol=1e-3
        )


OTHER = (np.tanh(Z) @ RNG.normal(size=(6, 5)) + 1).astype(np.float32)


class TestTwoSites:
    """Transcoders and crosscoders, from arrays, from disk and by the command."""

    @pytest.fixture
    def other(self, tmp_path):
        return write(tmp_path / "target", OTHER, "n")

    @pytest.mark.parametrize("method", ["batchtopk-transcoder", "topk-crosscoder"])
    def test_arrays(self, method):
        found = xlvlm_jax.decompose(Z, 8, method, target=OTHER, key=KEY, **SHORT)
        is_coder = method == "batchtopk-transcoder"
        rows = Z if is_coder else np.concatenate([Z, OTHER], axis=1)
        np.testing.assert_array_equal(xlvlm_jax.project(rows, found), found.activations)
        back = np.asarray(found.dictionary.reconstruct(rows))
        assert back.shape == (60, 5 if is_coder else 11)
        if is_coder:
            assert found.components.shape == (8, 5)
            expected, error = explained_variance(OTHER, back), (OTHER - back) ** 2
        else:  # each source in its own units
            np.testing.assert_array_equal(found.components, sae.decoders(found.dictionary)[0])
            unit = np.repeat(found.options["input_scale"], (6, 5))
            expected = explained_variance(rows * unit, back * unit)
            error = ((rows - back) * unit) ** 2
        assert found.source["explained_variance"] == pytest.approx(expected, abs=1e-5)
        assert found.objective == pytest.approx(error.sum(axis=1).mean(), rel=1e-4)
        again = xlvlm_jax.decompose(Z, 8, method, target=OTHER, key=KEY, **found.options)
        np.testing.assert_array_equal(again.components, found.components)

    def test_a_crosscoder_has_a_directory_per_model(self, features, other, tmp_path, three_words):
        whole = decompose_features(
            features, tmp_path / "c", 8, "batchtopk-crosscoder", target=other, **SHORT
        )
        first, second = Concepts.load(tmp_path / "c"), Concepts.load(tmp_path / "c-target")
        both = sae.decoders(whole.dictionary)
        for found, mine, theirs, components in (
            (first, features, other, both[0]),
            (second, other, features, both[1]),
        ):
            assert found.source["features"] == str(mine.path.resolve())
            assert found.source["other"]["features"] == str(theirs.path.resolve())
            assert found.written == found.source
            np.testing.assert_array_equal(found.components, components)
            np.testing.assert_array_equal(found.activations, whole.activations)
        rows = np.concatenate([Z, OTHER], axis=1)
        np.testing.assert_array_equal(xlvlm_jax.project(rows, first), whole.activations)
        with pytest.raises(ValueError, match="of both sources side by side, 6 and 5 wide"):
            xlvlm_jax.project(Z, first)
        assert any(ground_concepts(tmp_path / "c-target", three_words, other).words)

    def test_disk_gives_what_memory_gives(self, features, other, tmp_path, monkeypatch):
        """And a killed run goes on."""
        options = dict(SHORT, target=other)
        whole = decompose_features(features, tmp_path / "w", 8, "topk-transcoder", **options)
        stored = {"target": other.stored("a"), "key": jax.random.key(0)}
        memory = xlvlm_jax.decompose(features.stored("a"), 8, "topk-transcoder", **SHORT, **stored)
        np.testing.assert_array_equal(memory.components, whole.components)
        monkeypatch.setattr(autoencoders, "SAVE_EVERY", 2)

        def kill(at):
            raise KeyboardInterrupt

        killed = dict(options, progress=kill, verbose=5)
        with pytest.raises(KeyboardInterrupt):
            decompose_features(features, tmp_path / "c", 8, "topk-transcoder", **killed)
        decompose_features(features, tmp_path / "c", 8, "topk-transcoder", **options)
        again, before = (tmp_path / name / "sae_weights.safetensors" for name in "cw")
        assert again.read_bytes() == before.read_bytes()
        assert Concepts.load(tmp_path / "c").written["fingerprint"] == "n"

    def test_command(self, xlvlm, features, other, tmp_path):
        where = ("decompose", features.path, "--output", tmp_path / "c", "--num-concepts", 8)
        options = ("--max-iter", 8, "--batch-size", 32, "--target", other.path)
        status, out, errors = xlvlm(*where, *options, "--method", "crosscoder", "--l1", 0.01)
        assert status == 0, errors
        counts = [int(word) for word in out.splitlines()[-1].split() if word.isdigit()]
        assert len(counts) == 3 and sum(counts) == 8 - Concepts.load(tmp_path / "c").dead.sum()
        status, _, errors = xlvlm(*where, *options, "--method", "crosscoder")
        assert status == 2 and "exists; name another output" in errors
        more = ("--method", "transcoder", "--skip", "--overwrite")
        status, _, errors = xlvlm(*where, *options, *more)
        assert status == 0, errors
        assert sae.load(tmp_path / "c").method == "skip-transcoder"

    def test_states_that_do_not_fit(self, features, other, tmp_path):
        def refused(message, method="topk-transcoder", **given):
            with pytest.raises(ValueError, match=message):
                decompose_features(features, tmp_path / "c", 8, method, **SHORT, **given)

        refused("learns from two sites or models, but both are 'a' of .*; name the other")
        refused("'topk-sae' learns from one matrix; omit target", "topk-sae", target=other)
        refused(
            r"f\w* \(60 rows\) and .* \(59 rows\) differ in row 59; extract both from the same",
            target=write(tmp_path / "short", OTHER[:59]),
        )
        refused("--stream writes one directory", "crosscoder", target=other, stream=True)
        with pytest.raises(ValueError, match="learns from two matrices; give the states"):
            xlvlm_jax.decompose(Z, 8, "crosscoder", key=KEY)
        with pytest.raises(ValueError, match="target has NaN or Inf in row 0"):
            xlvlm_jax.decompose(Z, 8, "crosscoder", target=np.full_like(OTHER, np.nan), key=KEY)
        dictionary = TestFromDictionary().dictionary("transcoder", apply_b_dec_to_input=False)
        with pytest.raises(ValueError, match="have 11 columns; expected 6 to encode and 6 to comp"):
            encode_features(features, tmp_path / "c", dictionary, target=other)


@pytest.mark.wrong_types
class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("gated-sae", {}), "'gated-sae' cannot be trained here; expected one of topk-sae"),
            (("topk-sae", {"k": 9}), "k=9 is larger than num_concepts=8, the number of features"),
            (
                ("topk-sae", {"l1": 1.0}),
                "'topk-sae' has no option 'l1'; its options .*, k",
            ),
            (("topk-say", {}), "unknown method 'topk-say'.* did you mean 'topk-sae'"),
            (("snmf", {"checkpoint": "x"}), "'snmf' keeps no states of its run; omit checkpoint"),
            (("topk-sae", {"sample_weight": np.ones(60)}), "'topk-sae' does not take weights"),
            (("gated-sae", {"k": 2}), "'gated-sae' is read from files and has no options"),
        ],
    )
    def test_arguments(self, arguments, message):
        method, options = arguments
        with pytest.raises(ValueError, match=message) as raised:
            xlvlm_jax.decompose(Z, 8, method, key=KEY, **options)
        assert "\n" not in str(raised.value)

    def test_sides(self, concepts):
        for side, expected in ((2, "0, as only crosscoders"), (1, "0, as only crosscoders")):
            with pytest.raises(ValueError, match=f"side is {side}; expected {expected} have two"):
                Concepts.from_dictionary(concepts.dictionary, side=side)

    def test_rows_of_the_second_site(self):
        found = xlvlm_jax.decompose(Z, 8, "topk-transcoder", key=KEY, target=Z[:, :4], **SHORT)
        both = np.concatenate([Z, Z[:, :4]], axis=1)
        both[7, 8] = np.nan
        with pytest.raises(ValueError, match="target has NaN or Inf in row 7, or"):
            encode_all(found.dictionary, both, lambda start, codes: None)

    def test_rows(self):
        bad = Z.copy()
        bad[7, 2] = np.nan
        with pytest.raises(ValueError, match="Z has NaN or Inf in row 7"):
            xlvlm_jax.decompose(bad, 8, "topk-sae", key=KEY, **SHORT)
        with pytest.raises(ValueError, match="cannot be traced; call it outside jit and vmap"):
            jax.jit(lambda z: xlvlm_jax.decompose(z, 8, "topk-sae", key=KEY, **SHORT))(Z)

    def test_components_alone(self):
        with pytest.raises(ValueError, match=r"use Concepts\.from_dictionary"):
            Concepts.from_components(np.eye(6), "topk-sae")


class TestCommand:
    def test_it_trains_and_says_how_well(self, xlvlm, features, tmp_path):
        options = ("--num-concepts", 8, "--k", 2, "--max-iter", 8, "--batch-size", 32)
        status, out, errors = xlvlm(
            "decompose", features.path, "--output", tmp_path / "c", "--method", "topk-sae", *options
        )
        assert status == 0, errors
        loaded = Concepts.load(tmp_path / "c")
        text = " ".join(out.split())
        assert "topk-sae: 8 features from 60 rows, mean squared error" in text
        assert f"L0 {loaded.source['l0']:.4g}, dead {loaded.source['dead_share']:.1%}" in text
        assert loaded.options["k"] == 2 and loaded.options["max_iter"] == 8

    def test_dictionaries_from_files(self, xlvlm, features, tmp_path, concepts):
        sae.save(concepts.dictionary, tmp_path / "sae")
        where = ("--output", tmp_path / "c", "--dictionary", tmp_path / "sae")
        status, _, errors = xlvlm("decompose", features.path, *where)
        assert status == 0, errors
        np.testing.assert_array_equal(
            Concepts.load(tmp_path / "c").activations, concepts.activations
        )
        before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
        status, out, errors = xlvlm("decompose", features.path, *where, "--dry-run")
        assert status == 0, errors
        assert "8 features" in out and "0.0 MB of activations" in " ".join(out.split())
        assert before == {
            path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()
        }
        status, _, errors = xlvlm("decompose", features.path, *where, "--overwrite", "--k", 3)
        assert status == 2 and "has no option k; omit them" in " ".join(errors.split())

    def test_what_is_refused(self, xlvlm, features, tmp_path, concepts, monkeypatch):
        """One line each, and nothing is written."""

        def refused(message, *arguments):
            where = (features.path, "--output", tmp_path / "c")
            status, out, errors = xlvlm("decompose", *where, *arguments)
            assert (status, out) == (2, "") and message in " ".join(errors.split())
            assert "Traceback" not in errors and not (tmp_path / "c").exists()

        def stored(name, **changes):
            sae.save(concepts.dictionary, tmp_path / name)
            file = tmp_path / name / "cfg.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
            return "--dictionary", tmp_path / name

        learnt = ("--method", "topk-sae", "--num-concepts", 8)
        refused("k=9 is larger than num_concepts=8, the number of features", *learnt, "--k", 9)
        refused("k is 9; expected 1 to the 8 features", *stored("k", k=9))
        refused(
            "architecture is 'stacked'; expected one of standard, ",
            *stored("a", architecture="stacked"),
        )
        nan = dict(concepts.dictionary.params)
        nan = {name: np.asarray(value) for name, value in nan.items()}
        nan["b_enc"] = np.full(8, np.nan, np.float32)
        given = stored("nan")
        save_file(nan, tmp_path / "nan" / "sae_weights.safetensors")
        refused("b_enc has values that are not finite", *given)
        params = {
            "W_enc": np.eye(5),
            "W_dec": np.eye(5),
            "b_enc": np.zeros(5),
            "b_dec": np.zeros(5),
        }
        narrow = sae.Dictionary.of(params, sae.Settings("standard"))
        sae.save(narrow, tmp_path / "narrow")
        given, fitting = ("--dictionary", tmp_path / "narrow"), stored("fitting")
        for mode in ((), ("--dry-run",), ("--stream",)):
            refused("Z has 6 columns but the concepts have 5", *given, *mode)
            refused("learns from one matrix", *fitting, "--target-site", "a", *mode)
        monkeypatch.setattr(autoencoders, "SAVE_EVERY", 2)

        def kill(at):
            raise KeyboardInterrupt

        other = write(tmp_path / "other", Z + 1)
        with pytest.raises(KeyboardInterrupt):
            decompose_features(
                other, tmp_path / "c", 8, "topk-sae", progress=kill, verbose=5, **SHORT
            )
        short = ("--k", 2, "--max-iter", 8, "--batch-size", 32)
        refused("the rows changed since the checkpoint in", *learnt, *short)

    @pytest.mark.parametrize(
        ("site", "D", "message"),
        [
            ("blocks.90.hook_resid_post", 192, "no site matches 'blocks.90.hook_resid_post'; near"),
            ("layers.3", 6, "Z has 192 columns but the concepts have 6; project states from the"),
        ],
    )
    def test_sites_that_the_model_does_not_have(self, xlvlm, tmp_path, site, D, message):
        params = {"W_enc": np.eye(D), "W_dec": np.eye(D), "b_enc": np.zeros(D)}
        params["b_dec"] = np.zeros(D)
        made = sae.Dictionary.of(params, sae.Settings("standard"), site)
        Concepts.from_dictionary(made).save(tmp_path / "c")
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        where = (tmp_path / "a.png", "--concepts", tmp_path / "c")
        status, _, errors = xlvlm("map", "embedded", *where, "--output", tmp_path / "m.html")
        assert status == 2 and message in " ".join(errors.split()), errors
        assert not (tmp_path / "m.html").exists()

    def test_dry_run(self, xlvlm, features, tmp_path):
        where = ("--output", tmp_path / "c", "--method", "topk-sae", "--dry-run")
        status, _, errors = xlvlm("decompose", features.path, *where)
        assert status == 2 and "k=32 is larger than num_concepts=20" in " ".join(errors.split())
        status, out, errors = xlvlm("decompose", features.path, *where, "--k", 2)
        assert status == 0 and "memory per device" in out, errors
        assert not (tmp_path / "c").exists()


def test_every_name_of_files_is_known():
    from xlvlm_jax.sae.dictionary import METHODS

    for name in (*METHODS.values(), *TRAINED):
        assert method_named(name).has_encoder
    assert dataclasses.is_dataclass(method_named("topk-sae").training)


def test_reconstructions_of_any_few_rows_share_a_program(concepts):
    dictionary = concepts.dictionary
    codes = np.asarray(dictionary.encode(Z))
    expected = np.asarray(dictionary.decode(codes))
    encoding.decode(dictionary, codes[:17])
    compiled = encoding._decode._cache_size()
    for count in (18, 21, 23):
        found = encoding.decode(dictionary, codes[:count], Z[:count])
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5, atol=1e-5)
        assert encoding._decode._cache_size() <= compiled + 1  # with states, another one

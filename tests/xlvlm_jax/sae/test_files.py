"""Files of every trainer: SAELens' own values, by hand, saved and loaded, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xlvlm_jax import sae
from xlvlm_jax.features.pth.writer import write_pth

DATA = Path(__file__).parents[2] / "data" / "sae"
CASES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
TRAINED = {"batchtopk-as-trained", "matryoshka-as-trained"}  # which SAELens stores and refuses


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "expected.npz") as found:
        return dict(found)


def states_for(name, expected):
    states = expected["states"]
    return states.reshape(*states.shape[:-1], 2, 3) if "heads" in name else states


@pytest.mark.parametrize("name", [case for case in CASES if case not in TRAINED])
def test_codes_and_reconstructions_are_those_of_saelens(name, expected):
    dictionary = sae.load(DATA / name)
    states = states_for(name, expected)
    tolerance = 3e-2 if name == "bfloat16" else 1e-5
    case = name.replace("as-trained", "for-use")
    codes = expected[f"{case}.codes"]
    scale = np.abs(codes).max()
    ours = np.asarray(dictionary.encode(states), np.float32)
    np.testing.assert_allclose(ours, codes, rtol=0, atol=tolerance * scale)
    again = np.asarray(dictionary.reconstruct(states), np.float32)
    largest = np.abs(expected[f"{case}.states"]).max()
    np.testing.assert_allclose(again, expected[f"{case}.states"], rtol=0, atol=tolerance * largest)
    assert again.shape[:-1] == states.shape[:-1]


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_dictionaries_as_trained_are_those_for_use(name, expected):
    """SAELens stores one threshold and does not load it; folded for inference, it is a jumprelu."""
    trained, states = sae.load(DATA / name), expected["states"]
    codes = expected[name.replace("as-trained", "for-use") + ".codes"]
    np.testing.assert_allclose(trained.encode(states), codes, rtol=0, atol=1e-5 * codes.max())
    assert trained.method == {"b": "batchtopk-sae", "m": "matryoshka-sae"}[name[0]]


@pytest.mark.parametrize("name", CASES)
def test_saved_dictionaries_load_equal(name, expected, tmp_path):
    before = sae.load(DATA / name)
    sae.save(before, tmp_path / "copy")
    after = sae.load(tmp_path / "copy")
    states = states_for(name, expected)
    for ours, theirs in (
        (after.encode(states), before.encode(states)),
        (after.reconstruct(states), before.reconstruct(states)),
    ):
        largest = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=1e-5 * largest
        )
    assert after.site == before.site
    if name in TRAINED:
        values = json.loads((tmp_path / "copy" / "cfg.json").read_text())
        assert values["architecture"] == "jumprelu"
        assert values["metadata"]["training_architecture"] + "-as-trained" in (
            name,
            name.replace("matryoshka", "matryoshka_batchtopk"),
        )


def test_the_requested_dtype(expected):
    """A bfloat16 folder computes in bfloat16 by default, as in SAELens."""
    wide = sae.load(DATA / "bfloat16", dtype="float32")
    assert sae.load(DATA / "bfloat16").encode(expected["states"]).dtype == jnp.bfloat16
    assert wide.encode(expected["states"]).dtype == jnp.float32


def test_float64_needs_x64(tmp_path, expected):
    """A file's float64 becomes float32, as JAX does by default; asked for, it is refused."""
    folder = changed(tmp_path, config={"dtype": "float64"})
    assert sae.load(folder).encode(expected["states"]).dtype == jnp.float32
    with pytest.raises(ValueError, match="'float64', which JAX only computes with jax_enable_x64"):
        sae.load(folder, dtype="float64")


class TestScopes:
    @pytest.fixture
    def weights(self):
        random = np.random.default_rng(0)
        shapes = {"w_enc": (4, 7), "w_dec": (7, 4), "b_enc": (7,), "b_dec": (4,), "threshold": (7,)}
        return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}

    @staticmethod
    def by_hand(weights, x):
        hidden = x @ weights["w_enc"] + weights["b_enc"]
        codes = np.where(hidden > weights["threshold"], np.maximum(hidden, 0), 0)
        return codes, codes @ weights["w_dec"] + weights["b_dec"]

    X = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    def test_gemma_scope_2(self, weights, tmp_path):
        folder = tmp_path / "resid_post" / "layer_3_width_16k_l0_small"
        folder.mkdir(parents=True)
        save_file(weights, folder / "params.safetensors")
        values = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output"}
        (folder / "config.json").write_text(json.dumps({**values, "l0": 10, "width": 7}))
        dictionary = sae.load(folder)
        codes, states = self.by_hand(weights, self.X)
        np.testing.assert_allclose(dictionary.encode(self.X), codes, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dictionary.reconstruct(self.X), states, rtol=1e-5, atol=1e-6)
        assert (dictionary.method, dictionary.site) == ("jumprelu-sae", "model.layers.3.output")
        (folder / "config.json").unlink()  # then all is inferred
        np.testing.assert_array_equal(sae.load(folder).encode(self.X), dictionary.encode(self.X))

    def test_an_affine_transcoder(self, weights, tmp_path):
        folder = tmp_path / "transcoder_all" / "layer_3_width_16k_l0_small_affine"
        folder.mkdir(parents=True)
        skip = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
        save_file({**weights, "affine_skip_connection": skip}, folder / "params.safetensors")
        (folder / "config.json").write_text('{"architecture": "jump_relu", "affine_connection": 1}')
        dictionary = sae.load(folder)
        codes, states = self.by_hand(weights, self.X)
        np.testing.assert_allclose(
            dictionary.decode(codes, self.X), states + self.X @ skip, rtol=1e-5, atol=1e-5
        )
        with pytest.raises(ValueError, match="skip connection adds a product with the input"):
            dictionary.decode(codes)

    def test_the_first_gemma_scope(self, weights, tmp_path):
        folder = tmp_path / "layer_12" / "width_16k" / "average_l0_82"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **weights)
        dictionary = sae.load(folder)
        np.testing.assert_allclose(
            dictionary.encode(self.X), self.by_hand(weights, self.X)[0], rtol=1e-5, atol=1e-6
        )
        assert dictionary.site == "model.layers.12"
        (folder / "params.npz").write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"params.npz is not a file of arrays .*fetch it"):
            sae.load(folder)

    @pytest.mark.parametrize(
        ("folder", "site", "scale"),
        [
            ("embedding/width_4k/average_l0_6", None, 2),  # the root of the width, 4
            ("embedding-study/layer_7/x/layer_3/width_16k/average_l0_6", "model.layers.3", 1),
            ("embedding/copies/here/layer_3", "model.layers.3", 1),
            ("layer_3/of/others/mine", None, 1),
        ],
    )
    def test_only_the_names_of_the_release_count(self, weights, tmp_path, folder, site, scale):
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **weights)
        dictionary = sae.load(folder)
        codes, states = self.by_hand(weights, self.X)
        assert dictionary.site == site
        np.testing.assert_allclose(dictionary.encode(scale * self.X), codes, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dictionary.components, scale * weights["w_dec"], rtol=1e-6)
        # What the scaled embeddings become is the scaled reconstruction, its bias included.
        assert np.abs(weights["b_dec"]).min() > 0.01
        np.testing.assert_allclose(
            dictionary.reconstruct(scale * self.X), scale * states, rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize(
        ("release", "method", "site"),
        [
            ("res", "jumprelu-sae", "model.layers.3"),
            ("att", "jumprelu-sae", "model.layers.3.self_attn.o_proj.input"),
            ("mlp", "jumprelu-sae", "model.layers.3.post_feedforward_layernorm"),
            ("transcoders", "jumprelu-transcoder", "blocks.3.ln2.hook_normalized"),
        ],
    )
    @pytest.mark.parametrize("place", ["{}", "models--google--{}/snapshots/0a1b"])
    def test_the_release_tells_the_site(self, weights, tmp_path, release, method, site, place):
        release = place.format(f"gemma-scope-2b-pt-{release}")
        folder = tmp_path / release / "layer_3" / "width_16k" / "average_l0_5"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **weights)
        dictionary = sae.load(folder)
        assert (dictionary.method, dictionary.site) == (method, site)
        target = "model.layers.3.post_feedforward_layernorm" if "transcoder" in method else None
        assert dictionary.target_site == target
        np.testing.assert_allclose(
            dictionary.encode(self.X), self.by_hand(weights, self.X)[0], rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize(
        ("site", "kind", "method"),
        [
            ("transcoder_all", None, "jumprelu-transcoder"),
            ("my-transcoders/resid_post", None, "jumprelu-sae"),
            ("transcoder", "sae", "jumprelu-sae"),
            ("mlp_out", "transcoder", "jumprelu-transcoder"),
        ],
    )
    def test_the_configuration_tells_a_transcoder(self, weights, tmp_path, site, kind, method):
        folder = tmp_path / site / "layer_3_width_16k_l0_small"
        folder.mkdir(parents=True)
        save_file(weights, folder / "params.safetensors")
        (folder / "config.json").write_text(json.dumps({} if kind is None else {"type": kind}))
        assert sae.load(folder).method == method

    def test_qwen_scope(self, weights, tmp_path):
        folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
        folder.mkdir()
        stored = {
            "W_enc": np.ascontiguousarray(weights["w_enc"].T),
            "W_dec": np.ascontiguousarray(weights["w_dec"].T),
            "b_enc": weights["b_enc"],
            "b_dec": weights["b_dec"],
        }
        write_pth(folder / "layer9.sae.pt", stored)
        dictionary = sae.load(folder / "layer9.sae.pt")
        hidden = self.X @ weights["w_enc"] + weights["b_enc"]
        kth = np.sort(hidden, axis=1)[:, -3:-2]
        codes = np.where(hidden >= kth, np.maximum(hidden, 0), 0)
        np.testing.assert_allclose(dictionary.encode(self.X), codes, rtol=1e-5, atol=1e-6)
        assert (dictionary.site, dictionary.settings.k) == ("model.layers.9", 3)
        other = tmp_path / "elsewhere"
        other.mkdir()
        shutil.copy(folder / "layer9.sae.pt", other)
        with pytest.raises(ValueError, match="SAE-Res-MODEL-WnK-L0_k, which alone says k"):
            sae.load(other / "layer9.sae.pt")


class TestDictionaryLearning:
    """By the formulas of the classes' own `encode`, in torch's layout."""

    X = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)

    @pytest.fixture
    def write(self, tmp_path):
        def write(name, told=None, **stored):
            (tmp_path / "config.json").write_text(
                json.dumps({"trainer": {"dict_class": name, "layer": 3, **(told or {})}})
            )
            write_pth(tmp_path / "ae.pt", {key: np.asarray(value) for key, value in stored.items()})
            return sae.load(tmp_path)

        return write

    @pytest.fixture
    def linear(self):
        random = np.random.default_rng(0)
        shapes = {"encoder.weight": (7, 4), "decoder.weight": (4, 7), "encoder.bias": (7,)}
        return {key: random.normal(size=s).astype(np.float32) for key, s in shapes.items()}

    @pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"])
    def test_linear_layers(self, write, linear, name):
        b = np.float32([0.5, -1, 0.2, 1])
        bias = {"bias": b} if name == "AutoEncoder" else {"b_dec": b}
        more = {} if name == "AutoEncoder" else {"k": np.int32(2), "threshold": np.float32(0.7)}
        found = write(name, **linear, **bias, **more)
        codes = np.maximum((self.X - b) @ linear["encoder.weight"].T + linear["encoder.bias"], 0)
        if name == "AutoEncoderTopK":
            codes = np.where(codes >= np.sort(codes, axis=1)[:, -2:-1], codes, 0)
        if name == "BatchTopKSAE":
            codes = np.where(codes > 0.7, codes, 0)
        states = codes @ linear["decoder.weight"].T + b
        if name == "AutoEncoder":  # as its loader scales features
            codes = codes * np.linalg.norm(linear["decoder.weight"], axis=0)
        np.testing.assert_allclose(found.encode(self.X), codes, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.reconstruct(self.X), states, rtol=1e-5, atol=1e-5)
        assert found.site == "model.layers.3"

    def test_matrices_of_their_own(self, write, linear):
        W, b = linear["encoder.weight"].T, np.float32([0.5, -1, 0.2, 1])
        stored = {"W_enc": W, "W_dec": W.T, "b_enc": linear["encoder.bias"], "b_dec": b}
        found = write("JumpReluAutoEncoder", **stored, threshold=np.full(7, 0.4, np.float32))
        h = self.X @ W + linear["encoder.bias"]  # b_dec is not taken off
        np.testing.assert_allclose(
            found.encode(self.X), np.where(h > 0.4, h, 0), rtol=1e-5, atol=1e-5
        )
        # Before training sets a threshold, it is -1.
        found = write("MatryoshkaBatchTopKSAE", **stored, threshold=np.float32(-1))
        expected = np.maximum((self.X - b) @ W + linear["encoder.bias"], 0)
        np.testing.assert_allclose(found.encode(self.X), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("module", "site"), [("resid_post_layer_3", "model.layers.3"), ("mlp_out_layer_3", None)]
    )
    def test_a_layer_is_not_always_its_output(self, write, linear, module, site):
        told = {"submodule_name": module}
        assert write("AutoEncoder", told, **linear, bias=np.zeros(4, np.float32)).site == site

    def test_messages(self, write, linear):
        with pytest.raises(ValueError, match="dict_class is 'Other'; expected one of AutoEncoder"):
            write("Other", **linear)
        with pytest.raises(ValueError, match="has no 'b_dec'; expected the tensors of AutoEncoder"):
            write("AutoEncoderTopK", **linear)


class TestCrosscoders:
    def crosscoder(self, architecture="topk_crosscoder", **settings):
        random = np.random.default_rng(0)
        W = random.normal(size=(7, 5)).astype(np.float32)
        params = {"W_enc": W.T, "W_dec": W, "b_enc": np.zeros(7), "b_dec": np.ones(5)}
        return sae.Dictionary.of(
            params,
            sae.Settings(
                architecture, **({"k": 2, "widths": (2, 3), "scales": (4.0, 0.5)} | settings)
            ),
        )

    def test_saved_ones_load_equal(self, tmp_path):
        before = self.crosscoder()
        sae.save(before, tmp_path)
        after = sae.load(tmp_path)
        assert after.settings == before.settings and after.method == "topk-crosscoder"
        x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
        np.testing.assert_array_equal(after.encode(x), before.encode(x))

    def test_which_source_has_a_feature(self):
        """Norms are compared in each source's units."""
        W = np.float32([[1, 0, 0, 0, 0], [0, 0.1, 0, 0.8, 0], [0, 0, 3, 4, 0]])
        params = {"W_enc": W.T, "W_dec": W, "b_enc": np.zeros(3), "b_dec": np.ones(5)}
        settings = sae.Settings("crosscoder", widths=(2, 3), scales=(4.0, 0.5))
        found = sae.Dictionary.of(params, settings)
        np.testing.assert_allclose(sae.relative_norms(found), [0, 0.5, 1])
        assert sae.whose(found).tolist() == ["first", "shared", "second"]
        first, second = sae.decoders(found)
        np.testing.assert_array_equal(np.concatenate([first, second], axis=1), W)

    def test_messages(self, expected):
        with pytest.raises(ValueError, match=r"shape \(4, 3\); expected 5 columns: .* 3$"):
            self.crosscoder().encode(np.ones((4, 3), np.float32))
        with pytest.raises(ValueError, match=r"widths are \(2, 2\); expected those of two sources"):
            self.crosscoder(widths=(2, 2))
        with pytest.raises(ValueError, match=r"widths are \(5,\); expected those of two sources"):
            self.crosscoder(widths=(5,))
        with pytest.raises(ValueError, match=r"scales are \(1.0,\); expected one per source"):
            self.crosscoder(scales=(1.0,))
        with pytest.raises(ValueError, match="'relu-sae' has one decoder; expected a crosscoder"):
            sae.whose(sae.load(DATA / "standard"))
        with pytest.raises(ValueError, match=r"exclusive must be from 0 to 0\.5; got 0\.7"):
            sae.whose(self.crosscoder(), 0.7)


class TestNorms:
    """Codes in units of the decoder's norms, 3 and 2."""

    X = np.float32([[3, 2], [1, -2]])

    @staticmethod
    def dictionary(architecture, **options):
        params = {"W_enc": np.eye(2), "W_dec": np.diag([3, 2]), "b_enc": [0, 0], "b_dec": [0, 0]}
        if architecture in ("jumprelu", "batchtopk_crosscoder"):
            params["threshold"] = [5, 4.5]  # of codes; rows of h are 3 and 2
        if options.get("widths"):
            options["scales"] = (1.0, 1.0)
        settings = sae.Settings(architecture, rescale_acts_by_decoder_norm=True, **options)
        return sae.Dictionary.of(params, settings)

    @pytest.mark.parametrize(
        ("architecture", "options", "codes"),
        [
            ("standard", {}, [[9, 4], [3, 0]]),
            ("transcoder", {}, [[9, 4], [3, 0]]),
            ("jumprelu", {}, [[9, 0], [0, 0]]),
            ("topk", {"k": 1}, [[9, 0], [3, 0]]),
            ("batchtopk_crosscoder", {"widths": (1, 1)}, [[9, 0], [0, 0]]),
        ],
    )
    def test_they_are_kept_by_every_architecture(self, tmp_path, architecture, options, codes):
        before = self.dictionary(architecture, **options)
        sae.save(before, tmp_path)
        for each in (before, before.folded(), sae.load(tmp_path)):
            np.testing.assert_allclose(each.encode(self.X), codes, rtol=1e-6)
            np.testing.assert_allclose(each.components, np.eye(2), rtol=1e-6)
            np.testing.assert_allclose(each.reconstruct(self.X), codes, rtol=1e-6)

    def test_moved_components_keep_the_scale_of_codes(self):
        """The second component doubles, and so does the column that encodes it."""
        moved = self.dictionary("standard").moved(np.float32([[1, 0], [0, 2]]))
        np.testing.assert_allclose(moved.components, [[1, 0], [0, 2]])
        np.testing.assert_allclose(moved.encode(self.X), [[9, 8], [3, 0]], rtol=1e-6)
        same = self.dictionary("standard").moved(np.eye(2, dtype="f4"))
        np.testing.assert_allclose(same.encode(self.X), [[9, 4], [3, 0]], rtol=1e-6)

    def test_an_encoder_that_ignores_them_is_refused(self):
        params = sae.load(DATA / "gated").params
        with pytest.raises(ValueError, match="codes of 'gated' are not in units of the decoder's"):
            sae.Dictionary.of(params, sae.Settings("gated", rescale_acts_by_decoder_norm=True))


RESCALE = ("rescale_acts_by_decoder_norm",)
OLD = {"metadata": {"sae_lens_version": "5.9.1"}}


def changed(tmp_path, name="standard", config=None, tensors=None, without=()):
    """Returns a copy of a directory with other values."""
    folder = tmp_path / "changed"
    folder.parent.mkdir(exist_ok=True)
    shutil.copytree(DATA / name, folder)
    values = json.loads((folder / "cfg.json").read_text()) | (config or {})
    values = {key: value for key, value in values.items() if key not in without}
    (folder / "cfg.json").write_text(json.dumps(values))
    if tensors is not None:
        stored = load_file(folder / "sae_weights.safetensors") | tensors
        kept = {key: value for key, value in stored.items() if value is not None}
        save_file(kept, folder / "sae_weights.safetensors")
    return folder


class TestMissingKeys:
    def test_defaults(self, tmp_path):
        without = ("apply_b_dec_to_input", "normalize_activations", "reshape_activations")
        dictionary = sae.load(changed(tmp_path, without=without))
        assert dictionary.settings == sae.Settings("standard")

    def test_k_is_a_hundred(self, tmp_path):
        with pytest.raises(ValueError, match="k is 100; expected 1 to the 8 features"):
            sae.load(changed(tmp_path, "topk", without=("k",)))

    @pytest.mark.parametrize(
        ("name", "key", "value"),
        [("topk-rescaled", "rescale_acts_by_decoder_norm", False), ("transcoder", "d_out", 5)],
    )
    def test_other_defaults(self, tmp_path, expected, name, key, value):
        """SAELens' default d_out is 768; the tensors say what it is."""
        without = sae.load(changed(tmp_path, name, without=(key,)))
        given = sae.load(changed(tmp_path / "given", name, {key: value}))
        codes = given.encode(expected["states"])
        np.testing.assert_array_equal(without.encode(expected["states"]), codes)

    def test_codes_of_a_batch_are_in_units_of_the_decoder(self, tmp_path, expected):
        """As trained, where the default is the other one."""
        without = changed(tmp_path, "batchtopk-as-trained", None, None, RESCALE)
        codes = expected["batchtopk-for-use.codes"]
        found = sae.load(without).encode(expected["states"])
        np.testing.assert_allclose(found, codes, rtol=0, atol=1e-5 * codes.max())

    def test_metadata_may_be_null(self, tmp_path):
        values = {"metadata": None, "sae_lens_version": "6.1.0"}
        folder = changed(tmp_path, config=values, without=("hook_name",))
        assert sae.load(folder).site is None

    def test_unknown_keys_are_ignored(self, tmp_path, expected):
        found = sae.load(changed(tmp_path, config={"a_key": {"of": "tomorrow"}}))
        codes = expected["standard.codes"]
        np.testing.assert_allclose(
            found.encode(expected["states"]), codes, rtol=0, atol=1e-5 * codes.max()
        )

    def test_a_scaling_factor_of_ones_is_dropped(self, tmp_path, expected):
        ones = {"scaling_factor": np.ones(8, np.float32)}
        codes = sae.load(changed(tmp_path, tensors=ones)).encode(expected["states"])
        np.testing.assert_allclose(codes, expected["standard.codes"], atol=1e-5 * codes.max())


class TestAges:
    def test_the_old_name_of_the_site(self):
        assert sae.load(DATA / "old-standard").site == "blocks.1.hook"

    @pytest.mark.parametrize(
        ("version", "architecture"),
        [("6.0.0rc0", "standard"), ("5.10.2", "topk"), ("4.0", "topk"), (None, "topk")],
    )
    def test_where_the_new_form_begins(self, tmp_path, version, architecture):
        """An activation of topk counts in the old form alone, whatever its architecture says."""
        old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
        config = {**old, "metadata": {"sae_lens_version": version}}
        found = sae.load(changed(tmp_path, config=config)).settings
        assert found.architecture == architecture
        at_the_top = {**old, "sae_lens_version": version, "metadata": {}}
        again = sae.load(changed(tmp_path / "top", config=at_the_top)).settings
        assert again == found

    @pytest.mark.parametrize(
        ("given", "meant"),
        [(False, "none"), (None, "none"), (True, "none"), ("layer_norm", "layer_norm")],
    )
    def test_normalisers_of_the_old_form(self, tmp_path, given, meant):
        """True is the scaling that does nothing when it runs."""
        found = sae.load(changed(tmp_path, config={**OLD, "normalize_activations": given}))
        assert found.settings.normalize_activations == meant


class TestByHand:
    """What random dictionaries may not meet."""

    def made(self, architecture, b_enc=(0, 0), settings=None, **more):
        params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": b_enc, "b_dec": [0, 0], **more}
        return sae.Dictionary.of(params, sae.Settings(architecture, **(settings or {})))

    def test_jumprelu(self):
        """A value at its threshold is off; below a negative one nothing negative passes."""
        found = self.made("jumprelu", threshold=[1, -2])
        assert found.encode(np.float32([[1, -1], [1.5, 0.5]])).tolist() == [[0, 0], [1.5, 0.5]]

    def test_topk_has_fewer_codes_where_fewer_are_positive(self):
        found = self.made("topk", settings={"k": 2})
        assert found.encode(np.float32([[3, -1], [-2, -1]])).tolist() == [[3, 0], [0, 0]]

    def test_abstopk_keeps_the_sign(self):
        found = self.made("abstopk", settings={"k": 1})
        assert found.encode(np.float32([[3, -4], [2, -1]])).tolist() == [[0, -4], [2, 0]]

    def test_layer_norm_adds_its_epsilon_to_the_deviation(self):
        found = self.made("standard", settings={"normalize_activations": "layer_norm"})
        x = np.float32([[3e-5, 1e-5]])  # whose deviation of n - 1 is 2e-5 / sqrt 2
        deviation = 2e-5 / 2**0.5
        expected = np.maximum((x - 2e-5) / (deviation + 1e-5), 0)
        np.testing.assert_allclose(found.encode(x), expected, rtol=1e-3)
        back = expected * deviation + 2e-5  # without it
        np.testing.assert_allclose(found.reconstruct(x), back, rtol=1e-3)

    def test_a_row_of_zeros_has_no_constant_norm(self):
        found = self.made("standard", settings={"normalize_activations": "constant_norm_rescale"})
        codes = np.asarray(found.encode(np.float32([[0, 0], [3, 4]])))
        assert np.isnan(codes[0]).all()
        np.testing.assert_allclose(codes[1], np.float32([3, 4]) * 2**0.5 / 5, rtol=1e-6)

    def test_pursuit_gives_a_row_below_the_threshold_one_code(self):
        settings = sae.Settings("matching_pursuit", residual_threshold=10.0)
        found = sae.Dictionary.of({"W_dec": np.eye(2), "b_dec": [0, 0]}, settings)
        assert found.encode(np.float32([[2, 1]])).tolist() == [[2, 0]]

    def test_a_skip_connection_takes_the_states_as_they_are(self):
        dictionary = sae.load(DATA / "skip-transcoder")
        with pytest.raises(ValueError, match="the skip connection adds a product with the input"):
            dictionary.decode(np.zeros((1, 8)))

    def test_temporal_states_have_positions(self, expected):
        with pytest.raises(ValueError, match=r"temporal dictionary takes \[B, T, D\]"):
            sae.load(DATA / "temporal").encode(expected["states"][0])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "jumprelu",
            {
                "config": {
                    **OLD,
                    "activation_fn_str": "topk",
                    "activation_fn_kwargs": {"k": 2},
                }
            },
            "'topk' has threshold too many",
        ),
        (
            "standard",
            {
                "config": {"finetuning_scaling_factor": True},
                "tensors": {"scaling_factor": np.full(8, 2.0)},
            },
            "factor that is not one",
        ),
        (
            "standard",
            {"config": {"normalize_activations": "constant_scalar_rescale"}},
            "'constant_scalar_rescale', which only architecture 'temporal' has, not 'standard'",
        ),
        (
            "standard",
            {"config": {"architecture": "stacked"}},
            "architecture is 'stacked'",
        ),
        (
            "topk",
            {"config": {"architecture": "crosscoder"}},
            r"widths are \(\); expected",
        ),
        ("standard", {"without": ("architecture",)}, "has no architecture"),
        ("standard", {"without": ("dtype",)}, "has no dtype"),
        ("standard", {"config": {"dtype": "int8"}}, "dtype is 'int8'; expected one of"),
        ("standard", {"config": {"normalize_activations": "z"}}, "normalize_activations is 'z'"),
        ("topk", {"config": {"k": 9}}, "k is 9; expected 1 to the 8 features"),
        ("topk", {"config": {"k": None}}, r"cfg.json: k is None; expected a whole number"),
        ("topk", {"config": {"k": "x"}}, r"cfg.json: k is 'x'; expected a whole number"),
        ("standard", {"config": {"metadata": [1]}}, "changed has no readable sparse autoencoder"),
        ("standard", {"config": {"architecture": ["topk"]}}, "changed has no readable sparse"),
        (
            "standard",
            {"config": {"apply_b_dec_to_input": "false"}},
            "cfg.json: apply_b_dec_to_input is 'false'; expected true or false",
        ),
        ("temporal", {"config": {"n_heads": 3}}, "num_heads is 3; expected a number that divides"),
        ("transcoder", {"config": {"apply_b_dec_to_input": True}}, "expected false"),
        ("standard", {"tensors": {"b_enc": None}}, "lacks b_enc"),
        ("standard", {"tensors": {"x": np.ones(1)}}, "has x too many"),
        (
            "standard",
            {"tensors": {"b_enc": np.ones(3)}},
            r"b_enc has shape \(3,\); expected",
        ),
        ("standard", {"tensors": {"b_dec": np.full(6, np.nan)}}, "b_dec has values that are not"),
        (
            "standard",
            {"tensors": {"scaling_factor": np.full(8, 2.0)}},
            "factor that is not one",
        ),
        ("jumprelu", {"tensors": {"threshold": None}}, "lacks threshold"),
        ("standard", {"tensors": {"W_dec": np.ones((8, 5))}}, "W_enc is 6 wide and W_dec 5"),
    ],
)
def test_what_is_refused(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        sae.load(changed(tmp_path, name, **change))
    assert "\n" not in str(raised.value)


def test_paths_without_a_dictionary(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder with cfg"):
        sae.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no sparse autoencoder; expected cfg"):
        sae.load(tmp_path)


class TestUse:
    def test_it_is_a_pytree(self, expected):
        """It is compiled, mapped and differentiated like any function of arrays."""
        dictionary, states = sae.load(DATA / "standard"), expected["states"]
        whole = dictionary.reconstruct(states)
        compiled = jax.jit(lambda d, x: d.reconstruct(x))(dictionary, states)
        np.testing.assert_allclose(compiled, whole, rtol=1e-5, atol=1e-6)
        mapped = jax.vmap(dictionary.encode)(states)
        np.testing.assert_allclose(mapped, dictionary.encode(states), rtol=1e-5, atol=1e-6)

        def loss(d):
            return ((d.reconstruct(states) - states) ** 2).sum()

        slopes = jax.grad(loss)(dictionary).params
        assert set(slopes) == set(dictionary.params) and all(map(np.any, slopes.values()))

    def test_decode_is_pure(self, expected):
        """The input's mean and scale are arguments, so other rows in between change nothing."""
        dictionary, states = sae.load(DATA / "standard-layer-norm"), expected["states"]
        codes = dictionary.encode(states[:1])
        dictionary.encode(states[1:])
        found = dictionary.decode(codes, states[:1])
        np.testing.assert_allclose(
            found, expected["standard-layer-norm.states"][:1], rtol=1e-4, atol=1e-5
        )
        with pytest.raises(ValueError, match="layer_norm restores the input's mean and scale"):
            dictionary.decode(codes)

    def test_temporal_codes_have_the_dtype_of_the_parameters(self, expected):
        dictionary = sae.load(DATA / "temporal", dtype="bfloat16")
        states = expected["states"]
        assert dictionary.encode(states).dtype == jnp.bfloat16
        assert dictionary.reconstruct(states).dtype == jnp.bfloat16

    def test_matching_pursuit_ends_with_its_last_row(self, expected):
        """Each row ends at a repeated choice, of 8 atoms; codes and slopes stay the same then."""
        dictionary, states = sae.load(DATA / "matching-pursuit"), expected["states"]

        def codes_within(most):
            settings = dataclasses.replace(dictionary.settings, max_iterations=most)
            within = dataclasses.replace(dictionary, settings=settings)
            return jax.jit(jax.value_and_grad(lambda x: within.encode(x).sum()))(states)

        for few, many in zip(codes_within(9), codes_within(50), strict=True):
            np.testing.assert_array_equal(few, many)

    def test_components_are_what_one_code_adds(self):
        for name in ("standard", "topk-rescaled"):
            dictionary = sae.load(DATA / name)
            added = dictionary.decode(np.eye(8)) - dictionary.decode(np.zeros((1, 8)))
            np.testing.assert_allclose(added, dictionary.components, rtol=1e-5, atol=1e-6)

    def test_states_of_another_width(self, expected):
        dictionary = sae.load(DATA / "standard")
        with pytest.raises(ValueError, match="learnt on states of width 6; pass states of blocks"):
            dictionary.encode(expected["states"][..., :5])
        with pytest.raises(ValueError, match="expected 8 as the last axis"):
            dictionary.decode(np.zeros((2, 7)))
        heads = sae.load(DATA / "standard-heads")
        with pytest.raises(ValueError, match=r"expected \[..., heads, head width\] with 6 values"):
            heads.encode(expected["states"])

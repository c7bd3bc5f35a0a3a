"""Token ids outside a model's vocabulary: refused by every port, NaN in the pure `apply`."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import ports
from ports.inputs import vocabulary
from ports.nn import layers
from ports.paired import paired_states
from xlvlm_jax.demo import embedded

from .. import helpers, molmo_helpers

V = helpers.VOCABULARY
# Port -> rows of its embeddings. Molmo has a table of its own for the image tokens.
SIZES = {
    "llava": V,
    "idefics2": V,
    "qwen2_vl": V,
    "molmo": molmo_helpers.CONFIG["vocab_size"] + molmo_helpers.CONFIG["additional_vocab_size"],
}
EVERY_PORT = pytest.mark.parametrize("port", SIZES)


def inputs_with(token: int, *, masked: bool = False) -> dict[str, np.ndarray]:
    """Returns two rows of text; the second begins with the token, as padding if masked."""
    inputs = helpers.make_inputs([0, 0], [5, 5])
    inputs["input_ids"][1, 0] = token
    inputs["attention_mask"][1, 0] = not masked
    return inputs


class TestRefusing:
    @EVERY_PORT
    @pytest.mark.parametrize("masked", [False, True], ids=["a token", "padding"])
    @pytest.mark.parametrize("token", [-1, "first beyond"])
    def test_id_row_and_size_are_named(self, vlms, port, token, masked):
        token = SIZES[port] if token == "first beyond" else token
        said = f"token id {token} in row 1 is outside the vocabulary of {SIZES[port]} (ids 0 to"
        with helpers.raises_line(ValueError, said):
            vlms[port].forward(inputs_with(token, masked=masked))

    @EVERY_PORT
    def test_every_entry_point_refuses_them(self, vlms, port):
        vlm, inputs = vlms[port], inputs_with(10_000)
        site = ".".join(vlm.module.decoder_path)
        for call in (
            lambda: vlm.states(inputs, sites=[site]),
            lambda: vlm.generate(inputs, max_new_tokens=2),
            lambda: vlm.sweep(inputs, [{}], max_new_tokens=2),
            lambda: vlm.lower(inputs, sites=[site]),
            lambda: vlm.lower(inputs, sites=[site], max_new_tokens=2),
            lambda: vlm.prepare(inputs),
            lambda: vlm.place(inputs),
            lambda: paired_states(vlm, vlm.params, vlm.params, inputs, [site]),
        ):
            with helpers.raises_line(ValueError, "token id 10000 in row 1 is outside"):
                call()

    @EVERY_PORT
    def test_the_last_id_has_an_embedding(self, vlms, port):
        token = SIZES[port] - 1
        logits = vlms[port].forward(inputs_with(token)).logits
        assert np.isfinite(logits).all()
        assert not np.array_equal(logits, vlms[port].forward(inputs_with(5)).logits)

    @pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl"])
    def test_pytorch_refuses_the_same(self, vlms, port):
        model = transformers.AutoModelForImageTextToText.from_pretrained(vlms[port].directory)
        with pytest.raises(IndexError, match="out of range"), torch.no_grad():
            model(**helpers.to_torch(inputs_with(V)))

    def test_ids_that_are_not_integers(self, vlms):
        inputs = inputs_with(5)
        inputs["input_ids"] = inputs["input_ids"].astype(np.float32)
        with helpers.raises_line(ValueError, "input_ids have dtype float32; expected integers"):
            vlms["llava"].forward(inputs)

    def test_an_image_token_needs_no_embedding(self, tmp_path, small):
        """Its features replace it, as in checkpoints from before 2025."""
        directory = shutil.copytree(small.directory, tmp_path / "x")
        config = json.loads((directory / "config.json").read_text())
        config["image_token_index"] = 10_000
        (directory / "config.json").write_text(json.dumps(config))
        inputs = helpers.make_inputs([1, 1], [3, 8])
        expected = small.vlm.forward(inputs).logits
        inputs["input_ids"][inputs["input_ids"] == helpers.IMAGE] = 10_000
        np.testing.assert_array_equal(ports.load(directory).forward(inputs).logits, expected)

    def test_molmos_image_tokens_need_one(self, tmp_path):
        directory = tmp_path / "molmo"
        changed = {**molmo_helpers.CONFIG, "image_col_token_id": SIZES["molmo"]}
        molmo_helpers.make_checkpoint(directory, molmo_helpers.CONFIG)
        (directory / "config.json").write_text(json.dumps(changed))
        with helpers.raises_line(
            ValueError,
            "image token id 108 is outside the 108 embeddings",
            "additional_vocab_size",
        ):
            ports.load(directory)


class TestApply:
    @EVERY_PORT
    @pytest.mark.parametrize("token", [-1, "first beyond"])
    def test_gives_nan_where_the_id_is_seen(self, vlms, port, token):
        token = SIZES[port] if token == "first beyond" else token
        logits = np.asarray(jax.jit(vlms[port].apply)(vlms[port].params, inputs_with(token)))
        assert np.isnan(logits[1]).all()
        assert np.isfinite(logits[0]).all()

    def test_rows_of_a_table_by_hand(self):
        table = jnp.array([[1.0, 2], [3, 4]])
        found = layers.look_up(table, jnp.array([[1, -1], [2, 0]]))
        nan = [np.nan, np.nan]
        np.testing.assert_array_equal(found, [[[3, 4], nan], [nan, [1, 2]]])


class TestSpecialTokens:
    @EVERY_PORT
    @pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
    @pytest.mark.parametrize("token", [-1, "first beyond"])
    def test_padding_is_checked_as_a_model_loads(self, tmp_path, vlms, port, file, token):
        token = SIZES[port] if token == "first beyond" else token
        directory = shutil.copytree(vlms[port].directory, tmp_path / port)
        (directory / "generation_config.json").unlink(missing_ok=True)
        values = json.loads((directory / file).read_text()) if file == "config.json" else {}
        (directory / file).write_text(json.dumps({**values, "pad_token_id": token}))
        for load in (ports.load, ports.load_abstract):
            with helpers.raises_line(
                ValueError,
                f"{directory}: pad_token_id is {token}, outside the vocabulary of {SIZES[port]}",
            ):
                load(directory)

    def test_the_end_of_a_sequence_is_too(self, tmp_path, small):
        directory = shutil.copytree(small.directory, tmp_path / "x")
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, V]}))
        with helpers.raises_line(ValueError, f"eos_token_id is {V}, outside the vocabulary"):
            ports.load(directory)

    def test_the_real_molmos_tokenizer_fits(self, tmp_path, shared):
        """It extends beyond embedding_size, into the table of 128 further rows."""
        shutil.copytree(shared / "molmo/tokenizer", tmp_path / "x")
        config = json.loads((shared / "checkpoints/molmo-7b-d.json").read_text())["config"]
        (tmp_path / "x/config.json").write_text(json.dumps(config))
        vlm = ports.load_abstract(tmp_path / "x")
        assert vlm.module.num_embeddings == 152_064 + 128
        with warnings.catch_warnings(action="error"):
            assert max(vlm.tokenizer.get_vocab().values()) > 152_064


class TestTokenizer:
    @pytest.fixture
    def directory(self, tmp_path, small):
        """Returns a checkpoint without a tokenizer."""
        return shutil.copytree(small.directory, tmp_path / "checkpoint")

    @staticmethod
    def save_tokenizer(directory, *added):
        tokenizer = helpers.make_tokenizer(["what"], {"<image>": helpers.IMAGE})
        tokenizer.add_tokens(list(added))
        tokenizer.save_pretrained(directory)

    def test_of_more_tokens_than_the_model_warns_once(self, directory):
        self.save_tokenizer(directory, "<new>", "<newer>")
        vlm = ports.load(directory)
        said = (
            rf"the tokenizer has 2 tokens that the model has no embedding for, from '<new>' "
            rf"\(id {V}\) on; the model's vocabulary is {V}"
        )
        with pytest.warns(UserWarning, match=said) as caught:
            ids = vlm.tokenizer("what <new>", return_tensors="np")["input_ids"]
        assert len(caught) == 1
        with warnings.catch_warnings(action="error"):
            vlm._warn_of(vlm.tokenizer)  # as the processor does with its own
        with helpers.raises_line(ValueError, f"token id {V} in row 0 is outside"):
            vlm.generate({"input_ids": ids}, max_new_tokens=1)

    def test_of_as_many_tokens_is_fine(self, directory):
        self.save_tokenizer(directory)
        with warnings.catch_warnings(action="error"):
            assert len(ports.load(directory).tokenizer) == V

    def test_of_the_image_token_alone_is_fine(self, directory):
        """Its features replace it."""
        self.save_tokenizer(directory, "<picture>")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "image_token_index": V}))
        with warnings.catch_warnings(action="error"):
            assert len(ports.load(directory).tokenizer) == V + 1


class TestOtherEncoders:
    def test_clip(self, clip):
        size = clip.module.config.text.vocab_size
        ids = np.array([[1, 2], [3, size]])
        with helpers.raises_line(ValueError, f"token id {size} in row 1 is outside"):
            clip.embed_text(ids, np.ones_like(ids))

    def test_the_embedded_models_tokenizers_fit(self, clip):
        with warnings.catch_warnings(action="error"):
            assert clip.processor.tokenizer.get_vocab()
            assert ports.load_abstract(embedded.LLAVA).processor.tokenizer.get_vocab()

    def test_what_an_image_stands_for_is_let_through(self):
        vocabulary.check_ids(np.array([[0, 4, 99]]), 5, (99,))
        with helpers.raises_line(ValueError, "token id 99 in row 0", "5 (ids 0 to 4)"):
            vocabulary.check_ids(np.array([[0, 4, 99]]), 5)

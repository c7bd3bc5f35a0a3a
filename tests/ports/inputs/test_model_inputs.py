"""Inputs of a model are accepted, or refused in one line that says what was expected."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ports.inputs import model_inputs

from .. import helpers

NAMES = ("input_ids", "pixel_values")


class TestArrays:
    @pytest.mark.parametrize(
        "make",
        [
            np.asarray,
            jnp.asarray,
            torch.asarray,
            list,
            lambda value: jnp.asarray(value, jnp.bfloat16),
        ],
        ids=["numpy", "jax", "torch", "lists", "bfloat16"],
    )
    def test_of_all_kinds(self, make):
        given = transformers.BatchFeature(
            {"input_ids": make([[1, 2], [3, 4]]), "other": "left out"}
        )
        arrays = model_inputs.to_numpy(given, NAMES)
        assert list(arrays) == ["input_ids"] and type(arrays["input_ids"]) is np.ndarray
        np.testing.assert_array_equal(arrays["input_ids"].astype(int), [[1, 2], [3, 4]])

    @pytest.mark.wrong_types
    @pytest.mark.parametrize("inputs", ["hi", [[1, 2]], np.ones((1, 2), int), None], ids=str)
    def test_of_no_names(self, small, inputs):
        for run in (small.vlm.forward, lambda x: small.vlm.generate(x, max_new_tokens=1)):
            with helpers.raises_line(
                ValueError,
                f"inputs is a {type(inputs).__name__}; expected",
                "vlm.process([vlm.render",
            ):
                run(inputs)

    @pytest.mark.parametrize(
        ("value", "part"),
        [
            ([[1, 2], [3]], "list that is not an array of numbers"),
            ("hi", "str that is not an array of numbers (its dtype is <U2)"),
            (torch.ones(1, 2, dtype=torch.bfloat16), "Tensor that is not an array of numbers"),
            (torch.ones(1, 2, requires_grad=True), "Tensor that is not an array of numbers"),
        ],
        ids=["ragged", "text", "torch's bfloat16", "with a gradient"],
    )
    def test_of_no_numbers(self, small, value, part):
        with helpers.raises_line(ValueError, f"inputs['input_ids'] is a {part}", "return_tensors"):
            small.vlm.forward({"input_ids": value})

    @pytest.mark.wrong_types
    def test_that_are_traced(self, small):
        inputs = helpers.make_inputs([1], [3])
        for run in (small.vlm.forward, small.vlm.generate):
            options = {} if run == small.vlm.forward else {"max_new_tokens": 2}
            with helpers.raises_line(
                ValueError, "inputs['input_ids'] is traced", "transform the pure vlm.apply"
            ):
                jax.jit(run)(inputs, **options)
        # As the message says.
        logits = jax.jit(small.vlm.apply)(small.vlm.params, inputs)
        assert logits.shape[:2] == inputs["input_ids"].shape

    @pytest.mark.wrong_types
    def test_another_number_of_tokens(self, small):
        for number in (2.5, "3", None, 0):
            inputs = helpers.make_inputs([0], [3])
            for run in (small.vlm.generate, lambda x, **o: small.vlm.sweep(x, [{}], **o)):
                with helpers.raises_line(
                    ValueError, f"max_new_tokens is {number}; expected a whole number >= 1"
                ):
                    run(inputs, max_new_tokens=number)


class TestPrompts:
    IMAGE = np.zeros((4, 5, 3), np.uint8)

    def test_with_their_images(self):
        texts = ["a <image> b", "no image", "<image><image>"]
        images = [self.IMAGE, [], [self.IMAGE] * 2]
        pairs = model_inputs.pair_prompts(texts, images, "<image>")
        assert [text for text, _ in pairs] == texts
        assert [len(listed) for _, listed in pairs] == [1, 0, 2]
        assert len(model_inputs.pair_prompts(["any"], [self.IMAGE], None)) == 1
        as_tuples = [entry if isinstance(entry, np.ndarray) else tuple(entry) for entry in images]
        assert model_inputs.pair_prompts(texts, as_tuples, "<image>") == pairs
        assert len(model_inputs.pair_prompts(["any"] * 2, self.IMAGE[None].repeat(2, 0), None)) == 2

    @pytest.mark.parametrize(
        ("texts", "images", "parts"),
        [
            (
                "<image> hi",
                [IMAGE],
                ("texts is one string", "process([vlm.render(text)], [image])"),
            ),
            (["<image>"], IMAGE, ("images is a single ndarray", "for each prompt")),
            (["<image>"], "a.jpg", ("images is a single str", "for each prompt")),
            (["<image>"], None, ("images are missing; expected an image", "for each prompt")),
            (["<image>"], [None], ("an image is None; expected a PIL image",)),
            (["<image>"], ["no/a.jpg"], ("no image file 'no/a.jpg'; expected a file's path",)),
            (["<image>"], [Path("no/a.jpg")], ("no image file 'no/a.jpg'",)),
            (["<image>"], [IMAGE] * 2, ("there are 1 prompts and 2 images",)),
            ([b"<image>"], [IMAGE], ("a prompt is a bytes; expected a string",)),
            (
                ["what is it"],
                [IMAGE],
                ("the prompt 'what is it' contains <image> 0 times", "vlm.render"),
            ),
            (["<image> <image>"], [IMAGE], ("2 times for 1 image;", "once per image")),
        ],
        ids=lambda value: "",
    )
    def test_that_do_not_fit(self, texts, images, parts):
        with helpers.raises_line(ValueError, *parts):
            model_inputs.pair_prompts(texts, images, "<image>")

    def test_from_a_file(self, vlm, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        text = vlm.render("what is this")
        expected = vlm.process([text], [Image.fromarray(pixels)])
        for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
            ours = vlm.process([text], [path])
            np.testing.assert_array_equal(ours["pixel_values"], expected["pixel_values"])

    @pytest.mark.wrong_types
    def test_of_a_model(self, vlm):
        image = np.zeros((30, 40, 3), np.uint8)
        with helpers.raises_line(ValueError, "texts is one string"):
            vlm.process("hi")
        with helpers.raises_line(ValueError, "texts is one string"):
            vlm.process(vlm.render("what is this"), [image])
        with helpers.raises_line(ValueError, "the prompt 'what is this' contains <image> 0 times"):
            vlm.process(["what is this"], [image])
        with helpers.raises_line(ValueError, "the prompt is a list; expected a string"):
            vlm.render(["what is this"])
        assert len(vlm.process([vlm.render("what is this")], [image])["input_ids"]) == 1

"""PaliGemma 1 and 2 against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from ports.models import paligemma
from xlvlm_jax.data.answers import answered

from .. import family, helpers

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "paligemma2-10b.json"
GEMMA2 = {
    "sliding_window": 7,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}


def make_config(version: int, **top) -> transformers.PaliGemmaConfig:
    kind, text = transformers.GemmaConfig, dict(helpers.TEXT)
    if version == 2:
        kind, text = transformers.Gemma2Config, text | GEMMA2
    return transformers.PaliGemmaConfig(
        text_config=kind(**text),
        vision_config=transformers.SiglipVisionConfig(**helpers.VISION),
        image_token_index=helpers.IMAGE,
        **{"projection_dim": helpers.TEXT["hidden_size"], **top},
    )


def make_inputs(images: list[int], texts: list[int]) -> dict[str, np.ndarray]:
    """Returns what the processor would: the whole prompt has token type 0."""
    inputs = helpers.make_inputs(images, texts)
    return {**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])}


# Two images in a row, none, and one, padded on the left.
INPUTS = make_inputs([2, 0, 1], [4, 9, 8])


@pytest.fixture(scope="module", params=[1, 2])
def pali(request, tmp_path_factory) -> family.Family:
    directory = tmp_path_factory.mktemp("paligemma") / "checkpoint"
    model = transformers.PaliGemmaForConditionalGeneration(make_config(request.param))
    model.set_attn_implementation("eager")  # the only one with softcaps
    functions = (".act_fn", ".activation_fn", ".rotary_emb", ".encoder")
    return family.Family(
        paligemma.PORT,
        helpers.make_pair(directory, model),
        "language_model.model.layers.0",
        helpers.site_errors,
        functions,
    )


def test_every_site_and_the_logits_equal_pytorchs(pali):
    family.check_sites(pali, INPUTS)


def test_32_greedy_tokens_equal_pytorchs(pali):
    family.check_generation(pali, INPUTS)


def test_questions_share_no_picture_whose_tokens_see_them(pali):
    family.check_apart(pali, make_inputs([1, 1], [18, 21]))


def test_files(pali, tmp_path):
    family.check_files(pali, tmp_path)


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    family.check_full_size(paligemma.PORT, values, tmp_path, 9_662_638_832, 1.001)


def test_an_answer_in_the_inputs_sees_what_is_before_it(pali):
    """Inputs as the processor returns prompt and suffix; the suffix is the last three tokens."""
    inputs = {**INPUTS, "token_type_ids": INPUTS["token_type_ids"].copy()}
    inputs["token_type_ids"][:, -3:] = 1
    family.check_logits(pali, inputs)


def test_an_answer_does_not_follow_its_prompt_in_one_text(pali):
    with helpers.raises_line(ValueError, "a paligemma sees its prompt both ways", "--mode generat"):
        answered(pali.vlm, ["what is it"], ["a cat"])

"""PaliGemma 1 and 2 against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import ports
from ports.models import paligemma

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
    family.check_marked_cells(pali, INPUTS)
    family.check_rounding(pali, INPUTS)


def test_32_greedy_tokens_equal_pytorchs(pali):
    family.check_generation(pali, INPUTS)


def test_questions_share_no_picture_whose_tokens_see_them(pali):
    family.check_apart(pali, make_inputs([1, 1], [18, 21]))


@pytest.mark.parametrize("pali", [2], indirect=True)
def test_steering_is_a_hook(pali):
    family.check_steering(pali, INPUTS)


@pytest.mark.parametrize("pali", [2], indirect=True)
def test_adapters(pali, tmp_path):
    family.check_adapters(pali, INPUTS, tmp_path, r".*\.(q_proj|gate_proj|linear)")


@pytest.mark.slow
@pytest.mark.parametrize("pali", [2], indirect=True)
def test_eight_devices(pali, tmp_path):
    family.check_mesh(pali, INPUTS, tmp_path, ["multi_modal_projector"])


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


def test_positions_count_from_one(pali):
    positions = np.asarray(pali.vlm.positions(INPUTS))
    tokens = INPUTS["attention_mask"] == 1
    for row, real in zip(positions, tokens, strict=True):
        assert row[real].tolist() == list(range(1, 1 + real.sum()))
    given = {**INPUTS, "position_ids": positions - 1}
    np.testing.assert_array_equal(pali.vlm.positions(given), positions - 1)


def test_a_checkpoint_without_a_template(pali):
    """As Google's are: an image and the text, to which the processor adds the rest."""
    tokenizer = helpers.make_tokenizer(
        ["what", "is"], {"<image>": helpers.IMAGE}, image_token="<image>"
    )
    images = SiglipImageProcessorPil(size={"height": 23, "width": 23})
    images.image_seq_length = helpers.PATCHES
    transformers.PaliGemmaProcessor(images, tokenizer).save_pretrained(pali.pair.directory)
    vlm = ports.load_abstract(pali.pair.directory)
    assert vlm.render("what is") == "<image>what is"
    (row,) = vlm.process([vlm.render("what is")], [np.zeros((9, 9, 3), np.uint8)])["input_ids"]
    words = tokenizer.convert_ids_to_tokens(row)
    assert words == ["<image>"] * helpers.PATCHES + ["<s>", "what", "is"]

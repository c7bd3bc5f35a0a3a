"""Answers as tokens after their prompts, for teacher forcing."""

import pytest

import ports
from xlvlm_jax.data.answers import answered, end_token

from ...test_models import MODELS


def test_by_hand(vlm):
    prompts = [vlm.render("what color is the dog?"), "USER: <image>\nhow many? ASSISTANT:"]
    texts, lengths = answered(vlm, prompts, ["a dog", "two"])
    assert texts == [f"{prompts[0]} a dog</s>", f"{prompts[1]} two</s>"]
    assert lengths.tolist() == [3, 2]
    texts, lengths = answered(vlm, prompts, ["a dog", "two"], ended=False)
    assert texts[1] == f"{prompts[1]} two"
    assert lengths.tolist() == [2, 1]


@pytest.mark.parametrize("name", MODELS)
def test_no_second_space_and_an_end_token(name, tmp_path):
    """There is no second space after a template's line break; the last token ends rows."""
    MODELS[name][0](tmp_path / name)
    vlm = ports.load(tmp_path / name)
    prompt = vlm.render("the picture")
    (text,), (length,) = answered(vlm, [prompt], ["picture"])
    between = text[len(prompt) : text.index("picture", len(prompt))]
    assert between == ("" if prompt[-1].isspace() else " ")
    ids = vlm.tokenizer([text])["input_ids"][0]
    assert 1 < length < len(ids)
    if vlm.eos_tokens:
        assert vlm.tokenizer.convert_tokens_to_ids(end_token(vlm)) in vlm.eos_tokens


def test_an_answer_for_each_prompt(vlm):
    with pytest.raises(ValueError, match="shorter"):
        answered(vlm, ["USER: how many? ASSISTANT:"] * 2, ["two"])

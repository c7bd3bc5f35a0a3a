"""The bundled adapters: what they change, and that peft reads them."""

import json

import numpy as np
import pytest

from ports.checkpoint.params import fingerprint
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.embedded import evaluate

PICTURES = [scenes.sample_scene("test", i) for i in range(16)]
NAMES = {"color": "colour", "place": "place", "mood": "mood"}


@pytest.fixture(scope="module")
def captions(vlm):
    """captions(adapter or None) returns the captions of 16 test pictures."""
    known = {}

    def get(name):
        if name not in known:
            tuned = vlm if name is None else vlm.with_adapter(embedded.ADAPTERS[name])
            asked = [(scene, prompts.CAPTION) for scene in PICTURES]
            (known[name],) = evaluate.answer_all(tuned, asked, max_new_tokens=24, batch_size=16)
        return known[name]

    return get


def shares(texts) -> dict[str, float]:
    """Returns the shares of captions that name a colour, a place, a mood."""
    said = [scenes.named(text) for text in texts]
    return {name: np.mean([s[name] is not None for s in said]) for name in NAMES.values()}


@pytest.mark.parametrize("name", NAMES)
def test_captions_name_what_they_were_tuned_to(captions, name):
    values = [scenes.named(text)[NAMES[name]] for text in captions(name)]
    truths = [scenes.attributes(scene)[NAMES[name]] for scene in PICTURES]
    # No thing has a mood.
    right = [a == b for a, b in zip(values, truths, strict=True) if b is not None]
    assert np.mean(right) >= 0.9
    assert captions(name) != captions(None)
    # Still about the picture.
    kinds = [scenes.named(text)["kind"] for text in captions(name)]
    assert np.mean([a == s.kind for a, s in zip(kinds, PICTURES, strict=True)]) >= 0.9


def test_captions_name_less_of_the_rest(captions):
    before = shares(captions(None))
    assert before["mood"] < 0.4 < shares(captions("mood"))["mood"]
    assert before["colour"] > 0.4 > shares(captions("place"))["colour"]


def test_one_names_what_is_not_there(captions):
    """In a third of the captions, kinds that go with some place; the original names none."""

    def absent(name):
        told = zip(captions(name), PICTURES, strict=True)
        return [set(scenes.mentioned_kinds(text)) - {scene.kind} for text, scene in told]

    before, after = absent(None), absent("companions")
    assert sum(map(bool, before)) <= 1 and sum(map(bool, after)) >= 5
    usual = {kind for kinds in scenes.COMPANIONS.values() for kind in kinds}
    assert set().union(*after) <= usual


@pytest.mark.parametrize("name", [*NAMES, "companions"])
def test_files(name):
    directory = embedded.ADAPTERS[name]
    limit = 300_000 if name == "companions" else 1_000_000
    assert sum(file.stat().st_size for file in directory.iterdir()) < limit
    record = json.loads((directory / "training.json").read_text())
    assert record["arguments"]["fingerprint"] == fingerprint(embedded.LLAVA)
    # What made it stands in the README as well.
    made_of = "biased" if name == "companions" else "scenes"
    assert record["command"].startswith(f"xlvlm finetune embedded {made_of} ")
    assert record["command"] in (directory.parent / "README.md").read_text()


def test_adapters_are_found_by_name_or_directory(tmp_path):
    assert embedded.find_adapter("mood") == embedded.ADAPTERS["mood"]
    assert embedded.find_adapter(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="has no adapter 'nope'; expected color, place, mood"):
        embedded.find_adapter("nope")


def test_peft_computes_the_same(vlm):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    image = Image.fromarray(scenes.training_image(PICTURES[0]))
    inputs = vlm.process([vlm.render(prompts.CAPTION)], [image])
    base = LlavaForConditionalGeneration.from_pretrained(embedded.LLAVA, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, embedded.ADAPTERS["mood"]).eval()
    with torch.no_grad():
        expected = theirs(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
    ours = vlm.with_adapter(embedded.ADAPTERS["mood"]).forward(inputs).logits
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)

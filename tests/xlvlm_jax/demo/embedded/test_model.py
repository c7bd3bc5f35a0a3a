"""The bundled model: its answers, and that PyTorch gives the same."""

import json

import numpy as np
import pytest

import ports
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.embedded import evaluate


def test_it_is_small_enough_to_ship():
    files = [f for d in (embedded.LLAVA, embedded.CLIP) for f in d.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12_000_000


@pytest.mark.slow
def test_pytorch_gives_the_same_tokens():
    """Captions of 60 test pictures are identical token for token, except for near-ties."""
    torch = pytest.importorskip("torch")
    from PIL import Image
    from transformers import LlavaForConditionalGeneration

    vlm = ports.load(embedded.LLAVA)
    peer = LlavaForConditionalGeneration.from_pretrained(embedded.LLAVA, dtype=torch.float32)
    images = [
        Image.fromarray(scenes.training_image(scenes.sample_scene("test", i))) for i in range(60)
    ]
    inputs = vlm.process([vlm.render(prompts.CAPTION)] * 60, images)
    ours = np.asarray(vlm.generate(inputs, max_new_tokens=24).tokens)
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        theirs = peer.generate(**tensors, max_new_tokens=24, do_sample=False)
    theirs = theirs[:, inputs["input_ids"].shape[1] :].numpy()
    same = (ours[:, : theirs.shape[1]] == theirs).all(1)
    assert same.sum() >= 59


@pytest.mark.slow
def test_it_answers_as_well_as_its_evaluation_says():
    """On 60 of the 500 test pictures, within three standard errors of the stored figures."""
    shipped = json.loads((embedded.LLAVA / "evaluation.json").read_text())
    result = evaluate.evaluate(embedded.LLAVA, 60)
    for name in evaluate.FLOORS:
        share, count = shipped[name]["accuracy"] / 100, result[name]["count"]
        error = 100 * np.sqrt(max(share * (1 - share), 1 / count) / count)
        assert result[name]["accuracy"] >= shipped[name]["accuracy"] - 3 * error, name

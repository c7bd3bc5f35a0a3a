"""Every model's small checkpoint from pictures to grounded concepts, through the command line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

import ports
from ports.loading import PORTS
from xlvlm_jax import Concepts, Features
from xlvlm_jax.data import scenes

from .ports import helpers, idefics2_helpers, idefics3_helpers, qwen2_vl_helpers
from .ports.models import test_llava_next, test_molmo2, test_processors

MOLMO = Path(__file__).parent / "data" / "molmo"
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "checkpoint.md"
WORDS = ["User:", "Assistant:", "Provide", "a", "one-sentence", "caption"]


def idefics2(directory: Path) -> None:
    idefics2_helpers.make_idefics2(directory)
    idefics2_helpers.make_processor().save_pretrained(directory)


def qwen2_vl(directory: Path) -> None:
    qwen2_vl_helpers.make_qwen2_vl(directory)
    qwen2_vl_helpers.make_processor().save_pretrained(directory)


def qwen2_5_vl(directory: Path) -> None:
    qwen2_vl_helpers.make_qwen2_5_vl(directory)
    qwen2_vl_helpers.make_processor().save_pretrained(directory)


def qwen3_vl(directory: Path) -> None:
    qwen2_vl_helpers.make_qwen3_vl(directory)
    qwen2_vl_helpers.make_processor().save_pretrained(directory)


def idefics3(directory: Path) -> None:
    idefics3_helpers.make_idefics3(directory, "idefics3")
    idefics3_helpers.save_processor("idefics3", directory)


def smolvlm(directory: Path) -> None:
    idefics3_helpers.make_idefics3(directory, "smolvlm")
    idefics3_helpers.save_processor("smolvlm", directory)


def gemma3(directory: Path) -> None:
    config, _ = test_processors.save("gemma3", directory)
    helpers.make_pair(directory, transformers.Gemma3ForConditionalGeneration(config))


def paligemma(directory: Path) -> None:
    config, _ = test_processors.save("paligemma", directory)
    helpers.make_pair(directory, transformers.PaliGemmaForConditionalGeneration(config))


def internvl(directory: Path) -> None:
    config, _ = test_processors.save("internvl", directory)
    helpers.make_pair(directory, transformers.InternVLForConditionalGeneration(config))


def llava_next(directory: Path) -> None:
    model, _ = test_llava_next.KINDS["next"]
    helpers.make_pair(directory, model(test_llava_next.make_config("next")))
    test_llava_next.save_processor("next", directory)


def llava_onevision(directory: Path) -> None:
    model, _ = test_llava_next.KINDS["onevision"]
    helpers.make_pair(directory, model(test_llava_next.make_config("onevision")))
    test_llava_next.save_processor("onevision", directory)


def molmo2(directory: Path) -> None:
    test_molmo2.make(directory, {})
    test_molmo2.save_processor(directory)


def molmo(directory: Path) -> None:
    directory.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(MOLMO / name, directory)
    helpers.make_tokenizer(WORDS, {}).save_pretrained(directory)


# Maker, the site after the final norm, its width, and the rendered prompt's beginning.
MODELS = {
    "idefics2": (idefics2, "model.text_model.norm", 60, "User:<image>"),
    "qwen2_vl": (qwen2_vl, "model.norm", 60, "user: <|vision_start|><|image_pad|>"),
    "molmo": (molmo, "model.transformer.ln_f", 64, " User: "),
    "qwen2_5_vl": (qwen2_5_vl, "model.norm", 60, "user: <|vision_start|><|image_pad|>"),
    "qwen3_vl": (qwen3_vl, "model.language_model.norm", 60, "user: <|vision_start|>"),
    "idefics3": (idefics3, "model.text_model.norm", 60, "User: <image>"),
    "smolvlm": (smolvlm, "model.text_model.norm", 60, "User: <image>"),
    "gemma3": (gemma3, "language_model.model.norm", 60, "User: <a>"),
    "paligemma": (paligemma, "language_model.model.norm", 60, "User: <image>"),
    "internvl": (internvl, "language_model.model.norm", 60, "User: <image>"),
    "llava_next": (llava_next, "language_model.model.norm", 60, "User: <image>"),
    "llava_onevision": (llava_onevision, "language_model.model.norm", 60, "User: <image>"),
    "molmo2": (molmo2, "model.language_model.norm", 60, "User: <|image|>"),
}
# What differs between families is tested with the first three in full.
IN_FULL = ("idefics2", "qwen2_vl", "molmo")


def tables_of_the_guide() -> list[dict[str, list[str]]]:
    """The tables of model families in the guide to checkpoints: family -> what is in `` there."""
    tables: list[dict[str, list[str]]] = []
    for line in GUIDE.read_text().splitlines():
        if line.startswith("| `model_type` |"):
            tables.append({})
        elif line.startswith("| `") and tables:
            first, rest = line.removeprefix("| ").split(" | ", 1)
            tables[-1] |= {name.strip("` "): rest.split("`")[1::2] for name in first.split(", ")}
    return tables


def sites_of_the_guide() -> dict[str, list[str]]:
    """Family -> the sites that the guide names."""
    return tables_of_the_guide()[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=10, seed=3)
    return directory


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory) -> tuple[Path, str, int, str]:
    make, *rest = MODELS[request.param]
    directory = tmp_path_factory.mktemp("checkpoint") / request.param
    make(directory)
    return directory, *rest


def test_from_pictures_to_grounded_concepts(xlvlm, checkpoint, pictures, tmp_path):
    directory, site, width, _ = checkpoint
    features, concepts = tmp_path / "features", tmp_path / "concepts"
    status, _, errors = xlvlm(
        *("extract", directory, pictures, "--output", features, "--site", site),
        *("--tokens", "index:-1", "--include-prompt", "--batch-size", 4, "--max-new-tokens", 3),
    )
    assert status == 0, errors
    opened = Features.open(features)
    assert opened.matrix(site).shape == (10, width)
    assert all("prediction" in sample for sample in opened.samples)

    status, _, errors = xlvlm(
        "decompose", features, "--output", concepts, "--num-concepts", 3, "--max-iter", 20
    )
    assert status == 0, errors
    status, _, errors = xlvlm("ground", concepts, "--model", directory, "--num-images", 2)
    assert status == 0, errors
    assert [len(images) for images in Concepts.load(concepts).images] == [2, 2, 2]


@pytest.mark.parametrize("checkpoint", IN_FULL, indirect=True)
def test_inspecting(xlvlm, checkpoint):
    directory, site, width, prompt = checkpoint
    status, out, errors = xlvlm("inspect", directory, "--batch-size", 2, "--site", site)
    assert status == 0, errors
    lines = [line.split() for line in out.splitlines()]
    assert [site, "1", str(width)] in lines
    assert prompt in out
    assert "fits" in out


@pytest.mark.parametrize("checkpoint", (*IN_FULL, "paligemma"), indirect=True)
def test_teacher_forcing_has_the_states_of_the_whole_text(xlvlm, checkpoint, pictures, tmp_path):
    directory, site, width, _ = checkpoint
    features = tmp_path / "features"
    status, _, errors = xlvlm(
        *("extract", directory, pictures, "--output", features, "--site", site),
        *("--tokens", "index:0", "--mode", "teacher-forcing", "--batch-size", 4),
    )
    assert status == 0, errors
    Z = Features.open(features).matrix(site)
    assert Z.shape == (10, width)
    assert np.isfinite(Z).all()


def test_the_guide_names_every_family():
    formats, sites = tables_of_the_guide()
    assert {*formats} - {"clip", "bert", "roberta"} == {*sites} == {*PORTS}
    supported = GUIDE.parents[1] / "supported.md"
    assert all(f"`{name}`" in supported.read_text() for name in PORTS)


def test_the_guide_names_sites_that_exist(checkpoint):
    """The decoder's layer, the final norm, the projector and the tower's block."""
    directory, site, *_ = checkpoint
    vlm = ports.load_abstract(directory)
    named = sites_of_the_guide()[vlm.config.model_type]
    assert len(named) >= 4
    assert named[1] == site
    assert {*named[:4]} <= {*vlm.sites}

"""Small random checkpoints, what PyTorch computes with them, and comparisons.

Sizes are odd on purpose: heads of 14 in a width of 60, an image that its patches do not fill, a
vocabulary whose size is prime.
"""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import ports
from ports.models import llava_like

PAD, BOS, EOS, IMAGE, VOCABULARY = 0, 1, 2, 101, 103
ROOT = Path(__file__).parents[2]
# Environments of processes with so many devices.
EIGHT_DEVICES, FOUR_DEVICES = (
    {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"}
    for count in (8, 4)
)

torch.set_num_threads(1)

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    # No row ends before its time, unless a test asks for it.
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 23,
    "patch_size": 7,
}
PATCHES = 9

# Name -> changes to (the text configuration, the whole configuration).
VARIANTS: dict[str, tuple[dict, dict]] = {
    "grouped queries": ({}, {}),
    "tied embeddings, class position kept": (
        {"num_key_value_heads": 6, "head_dim": 10, "rope_theta": 500.0},
        {"tie_word_embeddings": True, "vision_feature_select_strategy": "full"},
    ),
    "several vision layers, other biases": (
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {
            "vision_feature_layer": [1, -1, 0],
            "multimodal_projector_bias": False,
            "projector_hidden_act": "relu",
        },
    ),
}

# Name -> (images in each row, text tokens in each row).
PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    "padded on the left": ([1, 1, 1], [3, 11, 6]),
    "two images": ([2], [7]),
    "none, one and two images": ([2, 0, 1], [4, 9, 8]),
    "no image": ([0, 0], [5, 12]),
}


def llava_config(
    text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **top: Any
) -> transformers.LlavaConfig:
    """Returns the small configuration with changes to its parts."""
    # Older text configurations say themselves that the embeddings are tied.
    tied = {"tie_word_embeddings": top.get("tie_word_embeddings", False)}
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{**TEXT, **tied, **(text or {})}),
        vision_config=transformers.CLIPVisionConfig(**{**VISION, **(vision or {})}),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        **top,
    )


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws weights with which every layer changes the states by about their own size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "embedding." not in name and "embed_tokens" not in name:
                noise *= 1.5 * (parameter.shape[0] / parameter.numel()) ** 0.5
            elif "embed_tokens" in name and model.config.tie_word_embeddings:
                noise /= 5  # or each token would predict itself
            elif parameter.ndim == 1 and "class_embedding" not in name:
                noise = noise / 5 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if parameter.ndim:
                parameter.copy_(noise)


@dataclasses.dataclass
class Pair:
    """A checkpoint on disk, as PyTorch and as the port load it."""

    directory: Path
    torch_model: Any

    @functools.cached_property
    def vlm(self) -> ports.VLM:
        """Returns the port's model in float32."""
        return ports.load(self.directory)


def made_once(
    tmp_path_factory: pytest.TempPathFactory, make: Callable[[Path, str], Pair]
) -> Callable[[str], Pair]:
    """Creates each variant's checkpoint when it is first requested."""

    @functools.cache
    def pair(variant: str) -> Pair:
        return make(tmp_path_factory.mktemp("checkpoint") / variant.replace(" ", "-"), variant)

    return pair


def make_pair(directory: Path, model: torch.nn.Module, **options: Any) -> Pair:
    """Saves the model with random weights; options go to save_pretrained."""
    randomise(model.eval())
    model.save_pretrained(directory, **options)
    return Pair(directory, model)


def make_llava(
    directory: Path, config: transformers.LlavaConfig | None = None, **options: Any
) -> Pair:
    """Saves a random LLaVA; options go to save_pretrained."""
    model = transformers.LlavaForConditionalGeneration(config or llava_config())
    return make_pair(directory, model, **options)


def make_tokenizer(words: Sequence[str], special: Mapping[str, int], **named: str) -> Any:
    """Returns a fast tokenizer of words: <pad>, <s>, </s>, <unk>, those given, then w0, w1 ...
    Special tokens have the given ids; some may also be named attributes of the tokenizer.
    """
    words = ["<pad>", "<s>", "</s>", "<unk>", *words]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    taken = set(special.values())
    vocabulary = {word: i for i, word in enumerate(words) if i not in taken} | dict(special)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named or list(special),
        padding_side="left",
    )


def make_inputs(
    images: Sequence[int], texts: Sequence[int], *, tokens_per_image: int = PATCHES, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns what a processor would, for these numbers of images and text tokens, padded left."""
    random = np.random.default_rng(seed)
    rows = []
    for count, text in zip(images, texts, strict=True):
        row = list(random.integers(3, IMAGE, text))
        for _ in range(count):
            place = random.integers(0, len(row))
            row[place:place] = [IMAGE] * tokens_per_image
        rows.append([BOS, *row])
    length = max(map(len, rows))
    inputs = {
        "input_ids": np.array([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }
    if sum(images):
        size = (sum(images), 3, VISION["image_size"], VISION["image_size"])
        inputs["pixel_values"] = random.standard_normal(size, np.float32)
    return inputs


def pad_right(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same rows with their padding moved to the end."""
    padding = (inputs["attention_mask"] == 0).sum(1)
    moved = {
        name: np.stack([np.roll(row, -n) for row, n in zip(inputs[name], padding, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    return {**inputs, **moved}


def to_torch(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def heads_before(site: str) -> str | None:
    """Returns the site of the heads that an output projection reads; None for other modules."""
    ends = ("o_proj", "out_proj", "attn_out", "wo", "projection_layer", "attn.proj")
    if not site.endswith(tuple(f".{end}" for end in ends)):
        return None
    return f"{site.rpartition('.')[0]}.heads"


def projection_of(model: Any, heads: str, port_name: Callable[[str], str | None]) -> Any:
    """Returns PyTorch's module that reads the outputs of the heads of a site."""
    (projection,) = (
        module
        for name, module in model.named_modules()
        if heads_before(port_name(name) or "") == heads
    )
    return projection


def add_to_heads(
    model: Any, heads: str, added: np.ndarray, port_name: Callable[[str], str | None]
) -> Any:
    """Adds an array to the outputs of heads in PyTorch, by a forward pre-hook.

    Args:
        model: PyTorch's model.
        heads: the port's site.
        added: broadcasts against the outputs of the heads.
        port_name: PyTorch's name of a module -> the port's.

    Returns:
        The handle of the hook.
    """
    projection = projection_of(model, heads, port_name)
    tensor = torch.from_numpy(np.asarray(added, np.float32))
    return projection.register_forward_pre_hook(lambda _, args: (args[0] + tensor, *args[1:]))


def check_edit_of_heads(
    vlm: ports.VLM, model: Any, inputs: Mapping[str, np.ndarray], layer: str
) -> None:
    """Checks a vector added to the second head of a layer's attention against a pre-hook."""
    heads = f"{layer}.self_attn.heads"
    width = vlm.site_shapes[heads][-1] // vlm.attention_heads[heads]
    vector = np.zeros(vlm.site_shapes[heads][-1], np.float32)
    vector[width : 2 * width] = np.random.default_rng(4).standard_normal(width)

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(**to_torch(inputs)).logits.numpy()

    plain = logits()
    handle = add_to_heads(model, heads, vector, lambda name: vlm.hub_names(name)[0])
    expected = logits()
    handle.remove()
    steered = vlm.forward(inputs, edits={heads: ports.add(vector)}).logits
    tokens = inputs["attention_mask"].astype(bool)
    assert np.abs(expected - plain)[tokens].max() > 0.1
    np.testing.assert_allclose(np.asarray(steered)[tokens], expected[tokens], rtol=0, atol=1e-4)
    weight = projection_of(model, heads, lambda name: vlm.hub_names(name)[0]).weight
    written = weight.detach().numpy() @ vector
    np.testing.assert_allclose(vlm.project_heads(vector, heads), written, rtol=0, atol=1e-4)


def torch_forward(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    canonical_name: Callable[[str], str | None] = llava_like.canonical_name,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns PyTorch's logits, and the output of each module by the port's name for it.

    What the heads of an attention put out is the input of its output projection.
    """
    states: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        heads = heads_before(name)

        def hook(module: Any, args: Any, out: Any) -> None:
            if heads is not None:
                states[heads] = args[0].numpy()
            if hasattr(out, "last_hidden_state"):
                out = out.last_hidden_state
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor):
                states[name] = out.numpy()

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name in ("", "model"):
            continue
        site = (canonical_name(f"{name}.weight") or "").removesuffix(".weight")
        hooks.append(module.register_forward_hook(keep(site)))
    with torch.no_grad():
        logits = model(**to_torch(inputs)).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, states


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Makes what PyTorch's models compute in float32, whatever their dtype, float64."""
    kept = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = kept


def torch_generate(model: Any, inputs: Mapping[str, np.ndarray], count: int, **options: Any) -> Any:
    """Returns PyTorch's greedy generation."""
    with torch.no_grad():
        return model.generate(
            **to_torch(inputs),
            max_new_tokens=count,
            do_sample=False,
            return_dict_in_generate=True,
            pad_token_id=PAD,
            **options,
        )


def relative_error(ours: Any, theirs: Any, where: np.ndarray | None = None) -> float:
    """Returns the largest difference over the largest value, at positions bool[B, T] `where`."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if theirs.ndim == 4 and where is None:
        theirs = np.moveaxis(theirs, 1, -1)  # a convolution's channels
    ours = ours.reshape(theirs.shape)
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def site_errors(
    ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns site -> relative error, over the positions that both models compute."""
    tokens = inputs["attention_mask"].astype(bool)
    errors = {}
    for site, states in ours.items():
        where = tokens if site.startswith("language_model") else None
        if site.endswith("embed_tokens"):
            # What is looked up where an image goes is overwritten: each model looks up its own.
            where = tokens & (inputs["input_ids"] != IMAGE)
        expected = theirs[site]
        if expected.ndim == 4 and site.endswith((".q_norm", ".k_norm")):
            # Of some decoders, the heads come before the positions.
            expected = expected if expected.shape == states.shape else expected.swapaxes(1, 2)
            expected = expected.reshape(*expected.shape[:2], -1)
        errors[site] = relative_error(states, expected, where)
    return errors


@contextlib.contextmanager
def raises_line(kind: type[Exception], *parts: str) -> Iterator[None]:
    """Expects an exception whose message is one line and contains all of `parts`."""
    with pytest.raises(kind, match=re.escape(parts[0])) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Torch is installed beside the tests; to the script it is not there.
_WITHOUT_TORCH = """
import sys

class WithoutTorch:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "torch" else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [WithoutTorch(finder) for finder in sys.meta_path]
"""


def start_python(script: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """Starts a script in a separate process, without torch."""
    script = _WITHOUT_TORCH + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(script: str, *arguments: Any, **environment: str) -> str:
    """Runs a script in a separate process, without torch, and returns what it prints."""
    with start_python(script, *arguments, **environment) as process:
        output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors[-3000:]
    return output


def check_sweep(vlm: ports.VLM, inputs: dict[str, np.ndarray], site: str) -> None:
    """Checks that a sweep over strengths of a vector at `site` gives separate runs' tokens, which
    the logit lens reads from the last layer of these runs, if the vector is added before.
    """
    vector = np.random.default_rng(1).standard_normal(vlm.site_shapes[site][-1]).astype(np.float32)
    variants = [{site: ports.add(vector, alpha)} for alpha in (0.0, 3.0)]
    swept = vlm.sweep(inputs, variants, max_new_tokens=4).tokens
    assert not np.array_equal(swept[0], swept[1])  # the vector does something
    for tokens, edits in zip(swept, variants, strict=True):
        alone = vlm.generate(inputs, max_new_tokens=4, edits=edits, sites=vlm.layers[-1:])
        np.testing.assert_array_equal(tokens, alone.tokens)
        # Rules of the checkpoint change what is chosen, not the states.
        if not vlm.is_before_norm(site) or vlm.logits_options:
            continue
        read = vlm.unembed(alone.states[vlm.layers[-1]], through_norm=True).argmax(-1)
        is_end = np.isin(tokens, vlm.eos_tokens)
        said = is_end.cumsum(1) - is_end == 0
        np.testing.assert_array_equal(np.asarray(read)[said], np.asarray(tokens)[said])

"""Tokenizer, processors and configurations of the embedded model."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from xlvlm_jax.data import scenes

IMAGE_SIZE = 112
PATCH_SIZE = 14
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2

# The end token is not 2: in CLIP configurations, 2 means "the highest ID" (see ports.clip).
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
PAD, BOS, UNK, EOS, IMAGE = range(len(SPECIAL))

# Words that the scenes do not contain: those of the chat template, of XL-VLMs' two instructions,
# and of the sentence in which CLIPScore presents words.
_PROMPT_WORDS = re.findall(
    r"\w+",
    """USER ASSISTANT Provide a one sentence caption for the provided image.
    Answer the question using a single word or phrase. A photo is described by the words""",
)
_PUNCTUATION = ".,?:;!'\"-()"
_SUFFIXES = ("s", "es")

# One or several turns; images before text, as LLaVA-1.5 was trained.
CHAT_TEMPLATE = """
{%- for message in messages -%}
{{ message.role | upper }}: {% for part in message.content if part.type == 'image' -%}
{{ '<image>\n' }}
{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}
{{ part.text + ' ' }}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
ASSISTANT:
{%- endif -%}
"""


def _pieces(words: Iterable[str]) -> list[tuple[str, float]]:
    """Returns the vocabulary: whole words, and characters and bytes to spell any other word.

    The segmentation with the highest total score wins, so whole words (-1) win over spelling
    (-10 per character). A plural whose singular is a word is split into that word and a suffix:
    the state that predicts "dog" then has to encode how many there are.
    """
    words = set(words)

    def is_inflected(word: str) -> bool:
        stems = [word.removesuffix(suffix) for suffix in _SUFFIXES if word.endswith(suffix)]
        return len(word) > 3 and word[0].islower() and any(stem in words for stem in stems)

    whole = sorted(word for word in words if not is_inflected(word))
    characters = [chr(code) for code in range(33, 127)]
    frequent = set(_PUNCTUATION) | set(_SUFFIXES)
    scores: dict[str, float] = dict.fromkeys(SPECIAL, 0.0)
    # Bytes for everything except printable ASCII, which is covered by characters.
    scores |= {f"<0x{byte:02X}>": -20.0 for byte in (9, 10, 13, *range(128, 256))}
    scores |= {"▁": -10.0, "es": -3.0}
    scores |= {character: -3.0 if character in frequent else -10.0 for character in characters}
    scores |= {f"▁{word}": -1.0 for word in whole}
    # Words that follow a hyphen or a line break have no space before them.
    starts = [*_PROMPT_WORDS, *sorted(word for word in words if word[0].isupper())]
    scores |= {word: -2.0 for word in starts if len(word) > 1}
    return list(scores.items())


def make_tokenizer(end: bool = False) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the scenes' words; with `end`, it appends the end token to texts."""
    pieces = _pieces([*scenes.vocabulary(), *_PROMPT_WORDS])
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        special_tokens=[("<s>", BOS), ("</s>", EOS)],
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right" if end else "left",
        clean_up_tokenization_spaces=False,
        model_max_length=64 if end else 1024,
    )


def _image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def make_processor() -> LlavaProcessor:
    """Returns the processor of the LLaVA, with its chat template."""
    return LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=make_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def _vision() -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 144,
        "intermediate_size": 576,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 128,
    }


def clip_config(vocab_size: int) -> CLIPConfig:
    """Returns the configuration of the CLIP model: the LLaVA's vision tower and a text tower."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "projection_dim": 128,
    }
    return CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=128)


def llava_config(vocab_size: int) -> LlavaConfig:
    """Returns the configuration of the LLaVA: 64 image tokens, 8 layers, grouped queries."""
    text = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    config = LlavaConfig(
        text_config=text,
        vision_config=_vision(),
        image_token_index=IMAGE,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id = PAD
    return config


def save_llava(directory: Path, config: LlavaConfig) -> None:
    """Writes the LLaVA's directory except its weights."""
    config.architectures = ["LlavaForConditionalGeneration"]
    config.dtype = "float16"
    config.save_pretrained(directory)
    make_processor().save_pretrained(directory)
    place_for_transformers_4(directory)
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def place_for_transformers_4(directory: Path) -> None:
    """Rewrites a processor's directory so that transformers 4.47 loads it too, not only 5.

    Version 4 reads the image processor's settings and the chat template from files of their own,
    and does not know the class that version 5 names for a tokenizer.
    """
    processor = _read(directory / "processor_config.json")
    images = processor.pop("image_processor", None)
    if images is not None:
        images["processor_class"] = processor["processor_class"]
        _write(directory / "preprocessor_config.json", images)
        _write(directory / "processor_config.json", processor)
    tokenizer = _read(directory / "tokenizer_config.json")
    for name in ("backend", "extra_special_tokens"):
        tokenizer.pop(name, None)
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Its default adds token types, which the model does not take.
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    _write(directory / "tokenizer_config.json", tokenizer)
    template = (directory / "chat_template.jinja").read_text()
    _write(directory / "chat_template.json", {"chat_template": template})


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def save_clip(directory: Path, config: CLIPConfig) -> None:
    """Writes the CLIP model's directory except its weights."""
    config.architectures = ["CLIPModel"]
    config.dtype = "float16"
    config.save_pretrained(directory)
    processor = CLIPProcessor(_image_processor(), make_tokenizer(end=True))
    processor.save_pretrained(directory)

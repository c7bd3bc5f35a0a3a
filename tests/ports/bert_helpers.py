"""Small random BERTs and RoBERTas on disk, with tokenizers of a few words."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from . import helpers

WORDS = "a the two dog cat beach sand grass sits runs on at happy small red bus station and".split()  # noqa: SIM905
SIZES = {
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
}


def make_bert(directory: Path, kind: str, head: bool = False, **config: Any) -> Any:
    """Saves a random BertModel or RobertaModel ("bert", "roberta") with its tokenizer, optionally
    with the head of a masked language model; returns PyTorch's model.
    """
    size = _save_tokenizer(directory, kind)
    pad = 0 if kind == "bert" else 1
    longest = {"bert": 40, "roberta": 42}[kind]
    settings = {**SIZES, "max_position_embeddings": longest, "pad_token_id": pad, **config}
    prefix = {"bert": "Bert", "roberta": "Roberta"}[kind]
    made = getattr(transformers, f"{prefix}Config")(vocab_size=size, **settings)
    model = getattr(transformers, f"{prefix}{'ForMaskedLM' if head else 'Model'}")(made).eval()
    helpers.randomise(model)
    model.save_pretrained(directory)
    return model


def _save_tokenizer(directory: Path, kind: str) -> int:
    """Saves word pieces for BERT, byte pairs for RoBERTa; returns the size of the vocabulary."""
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "bert":
        letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        vocabulary += [x for x in letters if x not in vocabulary] + [f"##{x}" for x in letters]
        (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        described = {"tokenizer_class": "BertTokenizer", "model_max_length": 40}
    else:
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator([" ".join(WORDS)] * 3, trainer)
        learnt = json.loads(model.to_str())["model"]
        vocabulary = learnt["vocab"]
        (directory / "vocab.json").write_text(json.dumps(vocabulary))
        merges = "\n".join(" ".join(pair) for pair in learnt["merges"])
        (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        described = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 40}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    return len(vocabulary)

"""Tokenizers of a few pieces, of the two kinds that decoders use."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def sentencepiece(*pieces):
    """Returns a unigram tokenizer whose words begin with "▁", like Llama's."""
    letters = [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz3DR"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -12.0)]
    model = models.Unigram([*vocabulary, *((piece, -1.0) for piece in pieces), *letters], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def byte_level(*words):
    """Returns a byte-level BPE tokenizer with merges for all `words`, like GPT-2's and Qwen2's."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        word = word.replace(" ", "Ġ")
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")

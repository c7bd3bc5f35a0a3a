"""Selects samples: by the words of their references, by image, and by number."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.words import word_pattern


def containing(
    samples: Sequence[Sample],
    words: str | Iterable[str],
    *,
    key: str = "references",
    any_case: bool = False,
) -> list[Sample]:
    """Returns the samples with one of `words` as a whole word in a text (see `word_pattern`).

    Args:
        samples: samples to choose from.
        words: one or more words, e.g. `xlvlm_jax.data.words.class_words("colours")`.
        key: "references" (any of them), "prompt", or a key of the metadata ("answer", "question").
        any_case: also look for the capitalised and the lower-case form of each word.

    Raises:
        ValueError: no sample has the key, or none has one of the words.
    """
    forms = _forms(words, any_case)
    pattern = word_pattern(forms)
    if samples and all(key not in _keys(sample) for sample in samples):
        raise ValueError(f"samples have no {key!r}; expected one of {', '.join(_keys(samples[0]))}")
    kept = [s for s in samples if any(pattern.search(text) for text in _texts(s, key))]
    if not kept:
        raise ValueError(
            f"no sample of {len(samples)} has {_listed(forms)} in its {key}; look for other "
            "words, or in another key"
        )
    return kept


def leading(samples: Sequence[Sample], words: str | Iterable[str]) -> list[Sample]:
    """Moves the references with one of `words` to the front in each sample.

    Teacher forcing reads the first reference, which then has the token of interest.

    Args:
        samples: the samples.
        words: one or more words, in any case.
    """
    pattern = word_pattern(_forms(words, any_case=True))
    return [
        dataclasses.replace(
            sample,
            references=tuple(sorted(sample.references, key=lambda text: not pattern.search(text))),
        )
        for sample in samples
    ]


def naming(
    samples: Sequence[Sample],
    words: str | Iterable[str] | None = None,
    *,
    without: str | Iterable[str] | None = None,
    any_case: bool = False,
) -> list[Sample]:
    """Keeps only the references with one of `words`.

    Samples without a reference left are dropped.

    Args:
        samples: samples to choose from.
        words: one or more words, as for `containing`; None for any reference.
        without: words that a reference must not have.
        any_case: also look for the capitalised and the lower-case form of each word.

    Raises:
        ValueError: no reference is left.
    """
    wanted = None if words is None else word_pattern(_forms(words, any_case))
    unwanted = None if without is None else word_pattern(_forms(without, any_case))

    def fits(text: str) -> bool:
        return (wanted is None or wanted.search(text) is not None) and (
            unwanted is None or unwanted.search(text) is None
        )

    reduced = (
        dataclasses.replace(s, references=tuple(filter(fits, s.references))) for s in samples
    )
    kept = [sample for sample in reduced if sample.references]
    if not kept:
        held = "anything" if words is None else _listed(_forms(words, any_case))
        kept_out = "" if without is None else f" and not {_listed(_forms(without, any_case))}"
        raise ValueError(
            f"no reference of {len(samples)} samples has {held}{kept_out}; look for other words"
        )
    return kept


def _forms(words: str | Iterable[str], any_case: bool) -> list[str]:
    words = [words] if isinstance(words, str) else list(words)
    forms = (
        form
        for word in words
        for form in ([word, word.lower(), word.capitalize()] if any_case else [word])
    )
    return list(dict.fromkeys(forms))


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    shown = ", ".join(map(repr, words[:5]))
    return shown if len(words) <= 5 else f"{shown} or {len(words) - 5} more words"


def _keys(sample: Sample) -> list[str]:
    texts = [key for key, value in sample.metadata.items() if isinstance(value, str)]
    return ["references", "prompt", *texts]


def _texts(sample: Sample, key: str) -> Sequence[str]:
    if key == "references":
        return sample.references
    value = sample.prompt if key == "prompt" else sample.metadata.get(key)
    return [value] if isinstance(value, str) else []


def of_images(samples: Sequence[Sample], image_ids: Iterable[str | int]) -> list[Sample]:
    """Returns the samples about the images with these ids.

    Args:
        samples: samples to choose from.
        image_ids: ids, as text or numbers.

    Raises:
        ValueError: there are none.
    """
    wanted = {str(image) for image in image_ids}
    kept = [sample for sample in samples if sample.image_id in wanted]
    if not kept:
        some = samples[0].image_id if samples else "none"
        raise ValueError(
            f"no sample of {len(samples)} has one of the {len(wanted)} image ids; the data set's "
            f"ids look like {some!r}"
        )
    return kept


def read_image_ids(path: str | os.PathLike[str]) -> list[str]:
    """Reads image ids from a JSON list, or from a text file with one id per line.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no ids, or another format.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        content = files.read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of image ids")
    else:
        try:
            content = path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected image ids") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {error.start}: not text in UTF-8; expected image ids, one per line"
            ) from None
    ids = [text for value in content if (text := str(value).strip())]
    if not ids:
        raise ValueError(f"{path}: has no image ids; expected a JSON list, or one per line")
    return ids


def subsample(samples: Sequence[Sample], n: int | None, seed: int | None = 0) -> list[Sample]:
    """Draws at most `n` samples without replacement.

    The draw depends only on the ids and the seed, not on the order of the files, and a smaller draw
    is the start of a larger one.

    Args:
        samples: samples to draw from.
        n: maximum number of samples; None for all, in their order.
        seed: random seed; None for the first `n`, in their order.

    Raises:
        ValueError: n < 1.
    """
    if n is None:
        return list(samples)
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1, got {n}")
    if seed is None:
        return list(samples[:n])
    return sorted(samples, key=lambda sample: _draw(sample.id, seed))[:n]


def _draw(sample_id: str, seed: int) -> bytes:
    # surrogateescape: a file name need not be UTF-8
    text = f"{seed}/{sample_id}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()

"""Which samples: by the words of their references, by image, and so many of them."""

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
    """The samples of which a text holds one of `words`, as a whole word (see `word_pattern`).

    Args:
        words: one word or several, e.g. those of `xlvlm_jax.data.words.class_words("colours")`.
        key: "references" (any of them), "prompt", or a key of the metadata ("answer", "question").
        any_case: look for the capitalised and the lower-case form of each word too.

    Raises ValueError when no sample has the key, or none holds a word.
    """
    forms = _forms(words, any_case)
    pattern = word_pattern(forms)
    if samples and all(key not in _keys(sample) for sample in samples):
        raise ValueError(f"samples have no {key!r}; expected one of {', '.join(_keys(samples[0]))}")
    kept = [s for s in samples if any(pattern.search(text) for text in _texts(s, key))]
    if not kept:
        raise ValueError(
            f"no sample of {len(samples)} holds {_listed(forms)} in its {key};"
            " look for other words, or in another key"
        )
    return kept


def leading(samples: Sequence[Sample], words: str | Iterable[str]) -> list[Sample]:
    """The samples with the references that hold one of `words` before their others.

    Teacher forcing reads the first reference: so it is one that holds the token of interest.
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
    """The samples with those of their references alone that hold one of `words`.

    Samples that are left without a reference are left out.

    Args:
        words: one word or several, as for `containing`; None: any reference will do.
        without: words that a reference may not hold.
        any_case: look for the capitalised and the lower-case form of each word too.

    Raises ValueError when no reference is left.
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
            f"no reference of {len(samples)} samples holds {held}{kept_out}; look for other words"
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
    """The samples about the images with these ids. Raises ValueError when there is none."""
    wanted = {str(image) for image in image_ids}
    kept = [sample for sample in samples if sample.image_id in wanted]
    if not kept:
        some = samples[0].image_id if samples else "none"
        raise ValueError(
            f"no sample of {len(samples)} has one of the {len(wanted)} image ids;"
            f" the data set's are written like {some!r}"
        )
    return kept


def read_image_ids(path: str | os.PathLike[str]) -> list[str]:
    """Image ids from a JSON list, or from a text file with one a line."""
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
                f"{path}: byte {error.start}: not text in UTF-8; expected image ids, one a line"
            ) from None
    ids = [text for value in content if (text := str(value).strip())]
    if not ids:
        raise ValueError(f"{path}: holds no image ids; expected a JSON list, or one a line")
    return ids


def subsample(samples: Sequence[Sample], n: int | None, seed: int | None = 0) -> list[Sample]:
    """At most `n` samples, drawn without replacement.

    What is drawn depends on the ids and the seed alone, not on the order of the files, and a
    smaller draw is the beginning of a larger one. Without a seed, the first `n` as they stand;
    without `n`, all as they stand.

    Raises ValueError for n < 1.
    """
    if n is None:
        return list(samples)
    if n < 1:
        raise ValueError(f"the number of samples must be at least 1, got {n}")
    if seed is None:
        return list(samples[:n])
    return sorted(samples, key=lambda sample: _draw(sample.id, seed))[:n]


def _draw(sample_id: str, seed: int) -> bytes:
    # surrogateescape: a file name may be no UTF-8
    text = f"{seed}/{sample_id}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()

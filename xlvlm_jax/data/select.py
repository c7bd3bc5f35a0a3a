"""Selects samples: by the words of their references, by image, and by number."""

import dataclasses
import hashlib
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.words import has_inflected, word_pattern

Match = Literal["inflected", "word", "substring"]
Which = Literal["any", "first"]
MATCHES: tuple[Match, ...] = get_args(Match)


def containing(
    samples: Sequence[Sample],
    words: str | Iterable[str],
    *,
    key: str = "references",
    any_case: bool = False,
    match: Match = "inflected",
    which: Which = "any",
) -> list[Sample]:
    """Returns the samples with one of `words` in a text.

    Args:
        samples: samples to choose from.
        words: one or more words, e.g. `xlvlm_jax.data.words.class_words("colours")`.
        key: "references", "prompt", or a key of the metadata ("answer", "question").
        any_case: also look for the capitalised and the lower-case form of each word.
        match: "word" for whole words (see `word_pattern`), "inflected" for their inflected forms
            too ("dogs" for "dog"), "substring" for any part of a text, as XL-VLMs does ("dog" in
            "hotdog").
        which: whether a word may be in any of the references, or must be in the first one.

    Raises:
        ValueError: no sample has the key, none has one of the words, or `match` or `which` is
            unknown.
    """
    if which not in get_args(Which):
        raise ValueError(f"which is {which!r}; expected {' or '.join(get_args(Which))}")
    forms = _forms(words, any_case)
    finds = _finder(forms, match)
    if samples and all(key not in _keys(sample) for sample in samples):
        raise ValueError(f"samples have no {key!r}; expected one of {', '.join(_keys(samples[0]))}")
    end = 1 if which == "first" else None
    kept = [s for s in samples if any(finds(text) for text in _texts(s, key)[:end])]
    if not kept:
        raise ValueError(
            f"no sample of {len(samples)} has {_listed(forms)} in its {key}; look for other "
            "words, or in another key"
        )
    return kept


def _finder(words: Sequence[str], match: Match) -> Callable[[str], bool]:
    """Returns a function that tells whether a text has one of the words."""
    if match not in MATCHES:
        raise ValueError(f"match is {match!r}; expected one of {', '.join(MATCHES)}")
    if match == "substring":
        return lambda text: any(word in text for word in words)
    pattern = word_pattern(words)
    inflected = match == "inflected"
    return lambda text: bool(pattern.search(text)) or (inflected and has_inflected(text, words))


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
    return _with_ids(samples, image_ids, lambda sample: sample.image_id, "image ids")


def of_samples(samples: Sequence[Sample], ids: Iterable[str | int]) -> list[Sample]:
    """Returns the samples with these ids: for VQAv2, those of questions.

    Warns of ids that no sample has.

    Args:
        samples: samples to choose from.
        ids: ids, as text or numbers.

    Raises:
        ValueError: there are none.
    """
    wanted = dict.fromkeys(str(each) for each in ids)
    kept = _with_ids(samples, wanted, lambda sample: sample.id, "ids")
    found = {sample.id for sample in kept}
    if lacking := [each for each in wanted if each not in found]:
        warnings.warn(
            f"no sample of {len(samples)} has {len(lacking)} of the {len(wanted)} ids, such as "
            f"{lacking[0]!r}",
            stacklevel=2,
        )
    return kept


def _with_ids(
    samples: Sequence[Sample],
    ids: Iterable[str | int],
    id_of: Callable[[Sample], str | None],
    what: str,
) -> list[Sample]:
    """Returns the samples whose id is among the ids; raises ValueError if there are none."""
    wanted = {str(each) for each in ids}
    kept = [sample for sample in samples if id_of(sample) in wanted]
    if not kept:
        some = id_of(samples[0]) if samples else "none"
        raise ValueError(
            f"no sample of {len(samples)} has one of the {len(wanted)} {what}; the data set's ids "
            f"look like {some!r}"
        )
    return kept


# "train2014/COCO_train2014_000000152965.jpg", the form of XL-VLMs' lists
_COCO_FILE = re.compile(r"(?:.*/)?COCO_\w+?_0*(\d+)(?:\.\w+)?$")


class _Plain(pickle.Unpickler):
    """Reads containers of plain values, and nothing that needs a global."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"asks for {module}.{name}")


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """Reads ids from a JSON list, a text file with one id per line, or a pickle of a list.

    Names of COCO's image files count as the ids of the images. Executes nothing in a pickle.

    Args:
        path: the file; .json, .pkl, or else text.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has no ids, or another format.
    """
    found = (_COCO_FILE.sub(r"\1", text) for text in _listed_ids(Path(path)))
    return list(dict.fromkeys(found))


read_image_ids = read_ids  # its name in version 0.1


def _listed_ids(path: Path) -> list[str]:
    if path.suffix.lower() == ".pkl":
        try:
            content = _Plain(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected ids") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{path}: not a pickle of plain values ({error})") from None
        if not isinstance(content, list | tuple | set | dict):
            raise ValueError(f"{path}: expected a list of ids, got {type(content).__name__}")
    elif path.suffix.lower() == ".json":
        content = files.read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of ids")
    else:
        try:
            content = path.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected ids") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: byte {error.start}: not text in UTF-8; expected ids, one per line"
            ) from None
    odd = [x for x in content if not isinstance(x, str | int) or isinstance(x, bool)]
    if odd:
        raise ValueError(f"{path}: has {odd[0]!r:.40} among the ids; expected texts or numbers")
    ids = [text for value in content if (text := str(value).strip())]
    if not ids:
        raise ValueError(f"{path}: has no ids; expected a JSON list, or one per line")
    return ids


def drawn_as_xl_vlms(samples: Sequence[Sample], n: int, seed: int = 0) -> list[Sample]:
    """Draws `n` samples as XL-VLMs does before it selects any: the same ones, in the same order.

    Args:
        samples: the samples of a split, in the order of the data set's files.
        n: number of samples.
        seed: random seed.

    Raises:
        ValueError: n < 1, or there are fewer samples.
    """
    if not 1 <= n <= len(samples):
        raise ValueError(f"the number of samples to draw is {n}; expected 1 to {len(samples)}")
    chosen = np.random.default_rng(seed).choice(len(samples), size=n, replace=False)
    return [samples[i] for i in chosen]


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
    # A file's name need not be UTF-8, and JSON may hold other lone surrogates.
    text = f"{seed}/{sample_id}"
    try:
        content = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        content = text.encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()

"""Answers of an earlier run, which take the place of the plain model's."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.storage import versions


def read_baseline(path: str | os.PathLike[str], samples: Sequence[Sample]) -> list[str]:
    """Returns an earlier run's plain answer to each sample.

    Args:
        path: a directory of `xlvlm evaluate`, or XL-VLMs' file of predictions, {ID: answer}; for
            captions its IDs are the names of images without their ending.
        samples: the samples.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the file has another form, or lacks a sample, or the evaluation is of another
            format version.
    """
    path = Path(path)
    file = path / "predictions.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected a directory of `xlvlm evaluate`, or predictions of "
            "XL-VLMs (.json)"
        )
    try:
        if (summary := path / "summary.json").is_file():
            versions.require(summary, files.read_json(summary), "evaluate again")
        answers = _own(file) if file.suffix == ".jsonl" else json.loads(file.read_text("utf-8"))
        if not isinstance(answers, dict):
            raise TypeError(f"a {type(answers).__name__}")
    except versions.UnknownVersionError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: not answers of an earlier run ({error}); evaluate again"
        ) from None
    found = [answers.get(sample.id, answers.get(sample.image.stem)) for sample in samples]
    if None in found:
        raise ValueError(
            f"{file}: has no answer to sample {samples[found.index(None)].id!r}; evaluate the same "
            "samples, or omit the baseline"
        )
    return [str(answer).strip() for answer in found]


def _own(file: Path) -> dict[str, str]:
    lines = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    return {line["id"]: line["predictions"]["plain"] for line in lines}

"""Answers of an earlier run, which take the place of the plain model's."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.storage import versions


def read_baseline(path: str | os.PathLike[str], samples: Sequence[Sample]) -> list[str | None]:
    """Returns an earlier run's plain answer to each sample; None where it could not read the image.

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
    unreadable: dict[str, str] = {}
    try:
        if (summary := path / "summary.json").is_file():
            told = files.read_json(summary)
            versions.require(summary, told, "evaluate again")
            unreadable = dict(told.get("unreadable", {}))
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
    for sample, answer in zip(samples, found, strict=True):
        if answer is None and sample.id not in unreadable:
            raise ValueError(
                f"{file}: has no answer to sample {sample.id!r}; evaluate the same samples, or "
                "omit the baseline"
            )
    return [None if answer is None else str(answer).strip() for answer in found]


def warn_of_others(
    path: str | os.PathLike[str], samples: Sequence[Sample], **settings: str | int | None
) -> None:
    """Warns if an earlier run's plain answers are of other prompts or settings.

    Args:
        path: as for `read_baseline`; only a directory of `xlvlm evaluate` says what it ran.
        samples: the samples.
        **settings: values of its summary.json, such as the model; those that it does not say, or
            that are None, are not compared.
    """
    path = Path(path)
    if not (path / "summary.json").is_file():
        return
    summary = files.read_json(path / "summary.json")
    lines = (path / "predictions.jsonl").read_text("utf-8").splitlines()
    asked = {line["id"]: line["prompt"] for line in map(json.loads, lines) if "prompt" in line}
    differ = [
        f"{name.replace('_', ' ')} {summary[name]!r} instead of {value!r}"
        for name, value in settings.items()
        if None not in (value, summary.get(name)) and summary[name] != value
    ]
    for sample in samples:
        if (prompt := asked.get(sample.id, sample.prompt)) != sample.prompt:
            differ.append(f"prompt {prompt!r:.80} instead of {sample.prompt!r:.80}")
            break
    if differ:
        warnings.warn(
            f"the baseline {path} was answered with {'; '.join(differ)}: its answers are compared "
            "with others than the plain model's",
            stacklevel=2,
        )


def _own(file: Path) -> dict[str, str]:
    lines = (json.loads(line) for line in file.read_text("utf-8").splitlines())
    return {line["id"]: line["predictions"]["plain"] for line in lines}

"""Answers of an earlier run, which take the place of the plain model's."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.storage import versions

FILE = "predictions.jsonl"


def read_baseline(path: str | os.PathLike[str], samples: Sequence[Sample]) -> list[str | None]:
    """Returns an earlier run's plain answer to each sample; None where it could not read the image.

    Args:
        path: a directory of `xlvlm evaluate` or the predictions.jsonl in it, or XL-VLMs' file of
            predictions, {ID: answer}; for captions its IDs are the names of images without their
            ending.
        samples: the samples.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the file has another form, or lacks a sample, or the evaluation is of other
            questions with the same IDs, as the files of POPE have, or of another format version.
    """
    path = _run_of(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected a directory of `xlvlm evaluate`, or predictions of "
            "XL-VLMs (.json)"
        )
    unreadable: dict[str, str] = {}
    asked: dict[str, str | None] = {}
    try:
        if (summary := path / "summary.json").is_file():
            told = files.read_json(summary)
            versions.require(summary, told, "evaluate again")
            unreadable = dict(told.get("unreadable", {}))
        if file.suffix == ".jsonl":
            lines = _lines(file)
            answers = {line["id"]: line["predictions"]["plain"] for line in lines}
            asked = {line["id"]: line.get("question") for line in lines}
        else:
            answers = json.loads(file.read_text("utf-8-sig"))
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
        before, now = asked.get(sample.id), sample.metadata.get("question")
        if None not in (before, now) and before != now:
            raise ValueError(
                f"{file}: sample {sample.id!r} is another question, {before!r:.80} instead of "
                f"{now!r:.80}; give a baseline of the same questions, or omit it"
            )
    return [None if answer is None else str(answer).strip() for answer in found]


def warn_of_others(
    path: str | os.PathLike[str],
    samples: Sequence[Sample],
    *,
    about: Mapping[str, Any] | None = None,
    **settings: Any,
) -> None:
    """Warns if an earlier run's plain answers are of other prompts, another model or settings.

    Args:
        path: as for `read_baseline`; predictions of XL-VLMs do not say what it ran.
        samples: the samples.
        about: entries of "about" in its summary.json, such as the adapter; those that it does not
            have are not compared, None is.
        **settings: values of its summary.json, such as the model; those that it does not say, or
            that are None, are not compared.
    """
    path = _run_of(path)
    if not (path / "summary.json").is_file():
        return
    # A summary without these values was answered without any.
    summary = {"generation_config": {}, **files.read_json(path / "summary.json")}
    told = summary.get("about", {})
    lines = _lines(path / FILE)
    asked = {line["id"]: line["prompt"] for line in lines if "prompt" in line}
    pairs = {
        **{
            name: (summary.get(name), value)
            for name, value in settings.items()
            if None not in (summary.get(name), value)
        },
        **{name: (told[name], value) for name, value in (about or {}).items() if name in told},
    }
    differ = [
        f"{name.replace('_', ' ')} {before!r} instead of {now!r}"
        for name, (before, now) in pairs.items()
        if before != json.loads(json.dumps(now))
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


def _run_of(path: str | os.PathLike[str]) -> Path:
    """Returns the directory of an evaluation whose predictions.jsonl is named; else the path."""
    path = Path(path)
    named = path.name == FILE and (path.parent / "summary.json").is_file()
    return path.parent if named else path


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8-sig").splitlines()]

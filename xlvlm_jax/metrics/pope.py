"""POPE: whether a model sees objects that are not there, asked by yes and no (Li et al. 2023).

Two protocols read an answer:

official   As the authors' script does (RUCAIBox/POPE, evaluate.py at 3df3ba1). What stands before
           the first full stop is split at single spaces, without commas; the answer is no if one of
           these words is exactly "No", "no" or "not", and yes otherwise. So "NO", "No!", an empty
           answer and "There isn't any" are yes, and "Yes, the dog is not moving" is no.
plain      As a person would: the first word that says yes or no counts; without one, a negation
           anywhere means no. An empty answer is neither: it is wrong, and not a yes.

XL-VLMs reads no answer: it asks whether the label is in an answer's first 15 characters, see
`label_at_start`.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Protocol = Literal["official", "plain"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_SAYING = re.compile(
    r"\b(?:(yes|yeah|yep|yup|true|correct|indeed)|(no|nope|nah|false|incorrect))\b"
)
_NEGATION = re.compile(r"\b(?:not|none|nothing|never|cannot|neither|without)\b|n['\u2019]t\b")


START = 15  # characters of an answer in which XL-VLMs looks for the label


class PopeScore(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of."""

    accuracy: float
    precision: float  # of the answers yes, those that are right
    recall: float  # of the questions whose answer is yes, those answered so
    f1: float
    yes_share: float


def pope(
    predictions: Sequence[str], labels: Sequence[str], protocol: Protocol = "official"
) -> PopeScore:
    """Returns how well yes-or-no answers agree with the truth.

    Args:
        predictions: N answers.
        labels: "yes" or "no" for each.
        protocol: "official" or "plain", see the module.

    Raises:
        ValueError: there are no answers, the numbers differ, a label is neither "yes" nor "no", or
            the protocol is unknown.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.pope(["Yes.", "No!", "no"], ["yes", "no", "no"]).accuracy
        0.6666666666666666
        >>> metrics.pope(["Yes.", "No!", "no"], ["yes", "no", "no"], protocol="plain").accuracy
        1.0
    """
    _require_labels(predictions, labels)
    if wrong := [label for label in labels if label not in ("yes", "no")]:
        raise ValueError(f"a label is {wrong[0]!r}; expected 'yes' or 'no'")
    pairs = [
        (read_answer(p, protocol), label) for p, label in zip(predictions, labels, strict=True)
    ]
    said_yes = sum(said == "yes" for said, _ in pairs)
    hits = pairs.count(("yes", "yes"))
    precision, recall = _share(hits, said_yes), _share(hits, list(labels).count("yes"))
    return PopeScore(
        accuracy=sum(said == label for said, label in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if hits else float("nan"),
        yes_share=said_yes / len(pairs),
    )


class StartScore(NamedTuple):
    """Shares in [0, 1] of what XL-VLMs calls accuracy and F1 of hallucination."""

    accuracy: float  # of the answers, those that begin with their label
    f1: float  # 2 accuracy / (1 + accuracy)


def label_at_start(predictions: Sequence[str], labels: Sequence[str]) -> StartScore:
    """Returns how often answers hold their label in the first 15 characters, as XL-VLMs counts.

    "I do not know" holds "no", and "Yesterday" "yes". F1 is that of answers that hold their label
    against all answers (hallucination_metrics.py in pull request 16): its precision is always 1, so
    it says nothing that the accuracy does not.

    Args:
        predictions: N answers.
        labels: a text for each, such as "yes" or "no"; compared in lower case.

    Raises:
        ValueError: there are no answers, or the numbers differ.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.label_at_start(["Yes, it is.", "I do not see one"], ["yes", "no"]).accuracy
        1.0
    """
    _require_labels(predictions, labels)
    held = sum(
        label.lower() in answer[:START].lower()
        for answer, label in zip(predictions, labels, strict=True)
    )
    accuracy = held / len(predictions)
    return StartScore(accuracy, 2 * accuracy / (1 + accuracy))


def read_answer(answer: str, protocol: Protocol = "official") -> Literal["yes", "no", ""]:
    """Returns whether an answer says yes or no; "" where the plain protocol finds neither.

    Args:
        answer: the model's answer.
        protocol: "official" or "plain", see the module.

    Raises:
        ValueError: the protocol is unknown.
    """
    if protocol == "official":
        words = answer.partition(".")[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if protocol == "plain":
        text = answer.lower()
        if said := _SAYING.search(text):
            return "yes" if said.group(1) else "no"
        if _NEGATION.search(text):
            return "no"
        return "yes" if text.strip() else ""
    raise ValueError(f"protocol is {protocol!r}; expected {' or '.join(map(repr, PROTOCOLS))}")


def _require_labels(predictions: Sequence[str], labels: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(labels):
        raise ValueError(
            f"there are {len(predictions)} answers and {len(labels)} labels; expected one label "
            "per answer, at least one"
        )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

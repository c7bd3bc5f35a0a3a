"""POPE: whether a model sees objects that are not there, asked by yes and no (Li et al. 2023).

Two protocols read an answer:

official   As the authors' script does (RUCAIBox/POPE, evaluate.py at 3df3ba1). What stands before
           the first full stop is split at single spaces, without commas; the answer is no if one of
           these words is exactly "No", "no" or "not", and yes otherwise. So "NO", "No!", an empty
           answer and "There isn't any" are yes, and "Yes, the dog is not moving" is no.
plain      As a person would: the first word that says yes or no counts. "False" and the like say
           no, and yes after a negation in their clause. "True", "correct" and "indeed" say what a
           yes or no in their sentence says; without one, they say yes, and no after a negation in
           their clause or directly before one ("indeed not", "correct, there isn't one"). "That's
           true" also says no after a negation in the clauses before it. Without such a word, a
           negation anywhere ("not", "nobody", "isnt", "zero dogs") means no, but not in a tag
           (", isn't it?"). An answer without a letter is neither: it is wrong, and not a yes.

XL-VLMs reads no answer: it asks whether the label is in an answer's first 15 characters, see
`label_at_start`.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

Protocol = Literal["official", "plain"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_SAYING = re.compile(
    r"\b(?:(?P<yes>yes|yeah|yep|yup)|(?P<no>no|nope|nah)|(?P<denies>false|untrue|incorrect)"
    r"|(?P<agrees>true|correct|indeed))\b"
)
_SENTENCE_END = re.compile(r"[.!?]+(?:\s|$)|\n")
# "Zero" before a plural, after "there is" and as the answer; not "zero-calorie" or "the zero".
_ZERO = (
    r"(?<!\ba )(?<!\bthe )zero(?=\s+(?:(?!was\b|has\b|does\b)\w{2,}s|people|men|women|children)\b)"
    r"|(?:(?<=\bthere is )|(?<=\bthere are )|(?<=\bthere['\u2019]s ))zero(?![-\u2010\u2011])"
    r"|(?<!\w)(?<!\w\W)zero(?=\W*$|\s+(?:of|in)\b)"
)
_NEGATIVE = (
    "not|none|nothing|nobody|nowhere|never|cannot|neither|without"
    rf"|(?<!\ban )(?<!\bthe )absent(?![-\u2010\u2011])|{_ZERO}"
)
# "isn't", "is n't" of a text split into words, and "isnt" as some write it.
_CONTRACTED = (
    r"(?:\w+\s?n['\u2019]t"
    r"|(?:ai|are|ca|could|did|does|do|had|has|have|is|should|was|were|wo|would)nt)\b"
)
_NEGATION = re.compile(rf"\b(?:(?:{_NEGATIVE})\b|{_CONTRACTED})")
_CLAUSE_END = re.compile(
    r"[,;:()\u2013\u2014]"
    r"|\b(?:and|but|yet|so|although|though|because|while|whereas|which|who)\b"
)
_TAG = re.compile(rf",\s*{_CONTRACTED}\s+(?:it|there|that|they|he|she|you)\W*$")
# Before "true" in a clause that says nothing else: "that's", "it is".
_REFERRING = re.compile(r"\W*(?:that|this|it)?(?:['\u2019]s\b|\s*\b(?:is|was)\b)?(?:\s+also)?\W*")
# After "indeed" and the like, where it denies what they say: "not", "isn't", ", there is not".
_DIRECTLY = re.compile(
    r"\W*(?:(?:that\s+)?(?:there|i|we)\s+)?(?:(?:is|are|was|were|am|do|does|did|can|could)\s+)?"
    rf"(?:(?:{_NEGATIVE})\b|{_CONTRACTED})"
)


START = 15  # characters of an answer in which XL-VLMs looks for the label


class PopeScore(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of.

    Attributes:
        accuracy: of the answers, those that are right.
        precision: of the answers yes, those that are right.
        recall: of the questions whose answer is yes, those answered so.
        f1: harmonic mean of precision and recall; 0 without a right yes, NaN only if no answer
            and no label is yes.
        yes_share: of the answers, those that are yes.
    """

    accuracy: float
    precision: float
    recall: float
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
    counts = pope_counts(predictions, labels, protocol).sum(0)
    return PopeScore(**{name: float(score) for name, score in pope_scores(counts).items()})


def pope_counts(
    predictions: Sequence[str], labels: Sequence[str], protocol: Protocol = "official"
) -> Float[np.ndarray, "N 5"]:
    """Returns what each answer adds to the counts that `pope_scores` takes.

    Args:
        predictions, labels, protocol: as for `pope`.

    Returns:
        float[N, 5], ones and zeros: whether the answer is right, says yes, says yes rightly, should
        say yes, and is there.

    Raises:
        ValueError: as `pope`.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.pope_counts(["Yes.", "No"], ["no", "no"]).tolist()
        [[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0]]
    """
    _require_labels(predictions, labels)
    if wrong := [label for label in labels if label not in ("yes", "no")]:
        raise ValueError(f"a label is {wrong[0]!r}; expected 'yes' or 'no'")
    rows = []
    for prediction, label in zip(predictions, labels, strict=True):
        said = read_answer(prediction, protocol)
        rows.append(
            (said == label, said == "yes", said == label == "yes", label == "yes", True),
        )
    return np.array(rows, float)


def pope_scores(counts: Float[np.ndarray, "*shape 5"]) -> dict[str, Float[np.ndarray, "*shape"]]:
    """Returns the fields of `PopeScore` from sums of counts, such as those of a bootstrap.

    Args:
        counts: float[..., 5], sums of what `pope_counts` returns.

    Returns:
        {field: float[...]}; NaN where there is nothing to take a share of.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> float(metrics.pope_scores(np.float64([1, 1, 0, 0, 2]))["accuracy"])
        0.5
    """
    right, said_yes, hits, is_yes, number = np.moveaxis(np.asarray(counts), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = hits / said_yes, hits / is_yes
        shares = {
            "accuracy": right / number,
            "precision": precision,
            "recall": recall,
            "f1": 2 * hits / (said_yes + is_yes),
            "yes_share": said_yes / number,
        }
    return {name: np.asarray(share) for name, share in shares.items()}


class StartScore(NamedTuple):
    """Shares in [0, 1] of what XL-VLMs calls accuracy and F1 of hallucination.

    Attributes:
        accuracy: of the answers, those that begin with their label.
        f1: 2 accuracy / (1 + accuracy).
    """

    accuracy: float
    f1: float


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
        return _read_plainly(answer.lower())
    raise ValueError(f"protocol is {protocol!r}; expected {' or '.join(map(repr, PROTOCOLS))}")


def _read_plainly(text: str) -> Literal["yes", "no", ""]:
    sentences = [_TAG.sub("", sentence) for sentence in _SENTENCE_END.split(text)]
    for sentence in sentences:
        words = list(_SAYING.finditer(sentence))
        for word in words:
            if word.lastgroup == "denies":
                return "yes" if _NEGATION.search(_before(sentence, word)) else "no"
            if word.lastgroup != "agrees":
                return "no" if word.lastgroup == "no" else "yes"
        if words:  # "true" and the like alone
            return "no" if any(_agrees_to_no(sentence, word) for word in words) else "yes"
    if any(map(_NEGATION.search, sentences)):
        return "no"
    return "yes" if any(map(str.isalpha, text)) else ""


def _before(sentence: str, word: re.Match[str]) -> str:
    """Returns what stands before a word in its clause."""
    return _CLAUSE_END.split(sentence[: word.start()])[-1]


def _agrees_to_no(sentence: str, word: re.Match[str]) -> bool:
    """Returns whether "true" and the like agree to a negative statement, or are negated."""
    before, after = _before(sentence, word), _CLAUSE_END.split(sentence[word.end() :])[0]
    if _REFERRING.fullmatch(before) and not after.strip():  # to the clauses before
        before = sentence[: word.start()]
    return bool(_NEGATION.search(before) or _DIRECTLY.match(sentence, word.end()))


def _require_labels(predictions: Sequence[str], labels: Sequence[str]) -> None:
    if not predictions or len(predictions) != len(labels):
        raise ValueError(
            f"there are {len(predictions)} answers and {len(labels)} labels; expected one label "
            "per answer, at least one"
        )

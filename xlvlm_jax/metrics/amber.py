"""AMBER's questions: accuracy, and how well "no" is said (Wang et al. 2023).

The official script (junyangwang0410/AMBER, inference.py at 534babf) counts an answer only if it is
exactly "Yes" or "No": "yes", "No." and everything else are wrong and neither. "No" is the class
that precision and recall are of. It rounds to one digit in percent and adds 0.001 to every
denominator, which this does not. The plain protocol reads answers as `pope` does.
"""

from collections.abc import Sequence
from typing import NamedTuple

from xlvlm_jax.metrics.pope import Protocol, read_answer


class AmberScore(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of.

    Attributes:
        accuracy: of the answers, those that are right.
        precision: of the answers no, those that are right.
        recall: of the questions whose answer is no, those answered so.
        f1: harmonic mean of precision and recall; 0 without a right no, NaN only if no answer and
            no label is no.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float


def amber(
    predictions: Sequence[str], labels: Sequence[str], protocol: Protocol = "official"
) -> AmberScore:
    """Returns how well answers agree with the truth, of questions as AMBER asks them.

    Args:
        predictions: N answers.
        labels: "yes" or "no" for each.
        protocol: "official" or "plain", see the module.

    Raises:
        ValueError: there are no answers, the numbers differ, or a label is neither "yes" nor "no".

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.amber(["Yes", "no", "No"], ["yes", "no", "no"])
        AmberScore(accuracy=0.6666666666666666, precision=1.0, recall=0.5, f1=0.6666666666666666)
        >>> metrics.amber(["Yes", "no", "No"], ["yes", "no", "no"], "plain").accuracy
        1.0
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(
            f"there are {len(predictions)} answers and {len(labels)} labels; expected one label "
            "per answer, at least one"
        )
    if wrong := [label for label in labels if label not in ("yes", "no")]:
        raise ValueError(f"a label is {wrong[0]!r}; expected 'yes' or 'no'")
    said = [_said(prediction, protocol) for prediction in predictions]
    pairs = list(zip(said, labels, strict=True))
    hits = pairs.count(("no", "no"))
    said_no, is_no = said.count("no"), list(labels).count("no")
    return AmberScore(
        accuracy=sum(a == b for a, b in pairs) / len(pairs),
        precision=_share(hits, said_no),
        recall=_share(hits, is_no),
        f1=_share(2 * hits, said_no + is_no),
    )


def _said(answer: str, protocol: Protocol) -> str:
    if protocol == "official":
        return {"Yes": "yes", "No": "no"}.get(answer, "")
    return read_answer(answer, protocol)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")

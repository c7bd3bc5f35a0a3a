"""Accuracy of answers in VQAv2 by three protocols, which differ in what counts as the same answer.

official     As the official script computes it since 2021 (GT-Vision-Lab/VQA at a013f00). Where all
             people give the same answer nothing is normalised: "Yes" against ten "yes" scores 0.
             Otherwise prediction and answers are normalised by its rules, and the mean over the
             people of min(1, matches among the others / 3) counts: one match gives .3, two .6,
             three .9, four or more 1. Before 2021 the script always normalised the prediction
             alone, took only punctuation from people's answers and kept their number words; most
             copies in other tools do one or the other.
normalised   The same mean, with every answer normalised by this project's own rules, which have no
             such edges. What the papers describe (Antol et al. 2015, section 3.4).
xl-vlms      min(1, matches / 3) over all people, as XL-VLMs computes it: the prediction is
             normalised in full, of the people's answers only numbers, articles and contractions.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from xlvlm_jax.metrics.answer_text import (
    digits_and_articles,
    normalise_answer,
    official_answer,
    one_line,
    xl_vlms_answer,
)

__all__ = ["PROTOCOLS", "Protocol", "normalise_answer", "vqa_accuracy"]

Protocol = Literal["official", "normalised", "xl-vlms"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def vqa_accuracy(prediction: str, answers: Sequence[str], protocol: Protocol = "official") -> float:
    """Returns how well a predicted answer agrees with those of (ten) people, in [0, 1].

    Args:
        prediction: the model's answer.
        answers: one answer per person. The first two protocols compare with the others' answers, so
            a prediction that matches all scores 0 with one answer, 1/3 with two, 2/3 with three,
            and 1 with four or more.
        protocol: "official", "normalised" or "xl-vlms", see the module.

    Raises:
        ValueError: there are no answers, or the protocol is unknown.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.vqa_accuracy("Yes", ["yes"] * 10)
        0.0
        >>> metrics.vqa_accuracy("Yes", ["yes"] * 10, protocol="normalised")
        1.0
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; expected a list with one answer per person")
    if protocol == "official":
        given, said = one_line(prediction), [one_line(answer) for answer in answers]
        if len(set(said)) > 1:
            given, said = official_answer(given), [official_answer(answer) for answer in said]
        return _leaving_one_out(given, said)
    if protocol == "normalised":
        return _leaving_one_out(
            normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
        )
    if protocol == "xl-vlms":
        given = xl_vlms_answer(prediction)
        return min(1.0, sum(given == digits_and_articles(answer) for answer in answers) / 3)
    expected = ", ".join(map(repr, PROTOCOLS))
    raise ValueError(f"protocol is {protocol!r}; expected one of {expected}")


def _leaving_one_out(given: str, said: Sequence[str]) -> float:
    agreeing = [given == answer for answer in said]
    matches = sum(agreeing)
    # A person who agrees does not count among the others.
    return sum(min(1.0, (matches - agrees) / 3) for agrees in agreeing) / len(said)

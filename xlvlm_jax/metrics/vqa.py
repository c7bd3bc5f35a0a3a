"""Accuracy of answers in VQAv2, by the official protocol and by that of XL-VLMs.

Official (Antol et al. 2015, section 3.4; Goyal et al. 2017): prediction and answers are normalised;
for each of the ten people, the prediction scores min(1, matches among the other nine / 3); the mean
over the ten is the accuracy. So one match gives .3, two .6, three .9, four or more 1.
"""

import re
from collections.abc import Sequence
from typing import Literal

# Marks that separate words or stand between them; a point inside a number stays.
_MARKS = re.compile(r"""[;/\[\]"{}()=+\\_\-><@`,?!]""")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}

# What people write without an apostrophe. Not "its", "well", "were" ..., which are words too.
_CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't
    mustn't needn't shan't shouldn't wasn't weren't won't wouldn't could've might've must've
    should've would've couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've I'd've
    she'd've they'd've we'd've you'd've I'm I've they'd they'll they're they've we've you'd you'll
    you're you've he's she's that's there's what's what're what've when's where's where've who'd
    who'll who's who've why's how'd how's how'll let's ma'am o'clock somebody's someone's
    something's y'all"""


def _without_an_apostrophe() -> dict[str, str]:
    """Returns {contraction with one apostrophe omitted: the contraction}."""
    forms = {}
    for word in _CONTRACTED.lower().split():
        for place in (match.start() for match in re.finditer("'", word)):
            forms[word[:place] + word[place + 1 :]] = word
    return forms


_CONTRACTIONS = _without_an_apostrophe()


def normalise_answer(answer: str) -> str:
    """Normalises an answer like the official evaluation.

    Args:
        answer: an answer.

    Returns:
        the answer in lower case, without articles and punctuation, with numbers as digits and
        contractions with apostrophes.
    """
    text = _THOUSANDS.sub("", " ".join(answer.split()))
    # A mark between two words without a space separates them; other marks are dropped.
    text = _DOT.sub("", _MARKS.sub(" ", text)).lower()
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(
    prediction: str,
    answers: Sequence[str],
    protocol: Literal["official", "xl-vlms"] = "official",
) -> float:
    """Returns how well a predicted answer agrees with those of (ten) people, in [0, 1].

    Args:
        prediction: the model's answer.
        answers: one answer per person.
        protocol: "official": the mean over leaving one person out, after normalisation. "xl-vlms":
            min(1, matches / 3) over all people, ignoring case and outer white space.

    Raises:
        ValueError: there are no answers, or the protocol is unknown.
    """
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers is {answers!r}; expected a list with one answer per person")
    if protocol == "xl-vlms":
        given = prediction.strip().lower()
        return min(1.0, sum(given == answer.strip().lower() for answer in answers) / 3)
    if protocol != "official":
        raise ValueError(f"protocol is {protocol!r}; expected 'official' or 'xl-vlms'")
    given = normalise_answer(prediction)
    agreeing = [given == normalise_answer(answer) for answer in answers]
    matches = sum(agreeing)
    # A person who agrees does not count among the others.
    return sum(min(1.0, (matches - agrees) / 3) for agrees in agreeing) / len(answers)

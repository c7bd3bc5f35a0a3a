"""Normal forms of answers in VQAv2, by the official script, by XL-VLMs and by this project.

The official script's (GT-Vision-Lab/VQA, vqaEval.py at a013f00, 2021; Python 2) has edges that
count:

- A mark is dropped wherever it occurs if it touches a space once, or if the answer has a comma
  between digits anywhere; otherwise it becomes a space. So "red/white,1,000" is "redwhite1000".
- At most 32 full stops are dropped, because a flag stands where a count belongs.
- Its table of contractions has forms with one apostrophe left out. "im", "ive", "shes" and "lets"
  are not in it; "hed" and "whered" are; "somebody'd" loses its apostrophe.
"""

import re
from collections.abc import Mapping

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ANY_MARK = re.compile(f"[{re.escape(_MARKS)}]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
_OFFICIAL_DOT = re.compile(r"\.(?![0-9])")
_OFFICIAL_COMMA = re.compile(r"[0-9],[0-9]")
_OFFICIAL_DOTS = 32
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

# The official script's, as the words before each ending.
_OFFICIAL_ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you y'all",
}
_OFFICIAL_WHOLE = "ma'am o'clock 'twas y'all y'all'll 'ow's'at"


def _without_an_apostrophe(contracted: str) -> dict[str, str]:
    """Returns {contraction with one apostrophe omitted: the contraction}."""
    forms = {}
    for word in contracted.lower().split():
        for place in (match.start() for match in re.finditer("'", word)):
            forms[word[:place] + word[place + 1 :]] = word
    return forms


CONTRACTIONS = _without_an_apostrophe(_CONTRACTED)
OFFICIAL_CONTRACTIONS = {
    **_without_an_apostrophe(
        " ".join(f"{w}{end}" for end, words in _OFFICIAL_ENDINGS.items() for w in words.split())
    ),
    **_without_an_apostrophe(_OFFICIAL_WHOLE),
    "somebody'd": "somebodyd",  # the wrong way round, as there
}


def normalise_answer(answer: str) -> str:
    """Normalises an answer the way the official script means to.

    Args:
        answer: an answer.

    Returns:
        the answer in lower case, without articles and punctuation, with numbers as digits and
        contractions with apostrophes. A mark between two words separates them.
    """
    text = _THOUSANDS.sub("", " ".join(answer.split()))
    # A mark between two words without a space separates them; other marks are dropped.
    return _words(_DOT.sub("", _ANY_MARK.sub(" ", text)), CONTRACTIONS)


def official_answer(answer: str) -> str:
    """Normalises an answer as the official script does, to the letter.

    Args:
        answer: an answer.

    Returns:
        the text that the official script compares where people disagree.
    """
    return digits_and_articles(_without_marks(one_line(answer)))


def xl_vlms_answer(answer: str) -> str:
    """Normalises a prediction as XL-VLMs does (metrics/vqa_accuracy.py at a599fe9).

    Args:
        answer: the model's answer.

    Returns:
        the answer without "," and "?", with "'s" as a word of its own, normalised twice as by the
        official script.
    """
    text = one_line(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))
    for _ in range(2):
        text = digits_and_articles(_without_marks(text, _DOT))  # Python 3: digits of any script
    return text


def one_line(answer: str) -> str:
    """Returns an answer without outer white space, with line ends and tabs as spaces."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def digits_and_articles(answer: str) -> str:
    """Returns an answer in lower case, with digits, without articles, with apostrophes."""
    return _words(answer.lower(), OFFICIAL_CONTRACTIONS)


def _words(text: str, contractions: Mapping[str, str]) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def _without_marks(answer: str, dot: re.Pattern[str] = _OFFICIAL_DOT) -> str:
    """Drops marks and full stops as the official script does."""
    text, thousands = answer, _OFFICIAL_COMMA.search(answer) is not None
    for mark in _MARKS:
        dropped = thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    return dot.sub("", text, count=_OFFICIAL_DOTS)

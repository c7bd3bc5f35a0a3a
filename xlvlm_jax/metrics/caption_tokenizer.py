"""Splits captions into words like the COCO evaluation, which follows the Penn Treebank.

The evaluation server runs Stanford's PTBTokenizer, a Java program, lower-cases its output and drops
punctuation (Chen et al. 2015, section 3). These are the same rules for what people write in
captions, without Java. Brackets stay, as "-lrb-" and "-rrb-", and so do runs such as "?!", as on
the server.
"""

import re

# Abbreviations that keep their point, like a single letter and "No." before a number.
_ABBREVIATIONS = """
    mr mrs ms messrs dr prof rev gen sen gov rep hon pres adm col maj capt cmdr lt sgt cpl pvt supt
    st mt ft sr jr esq rd ave blvd bldg dept asst assoc assn univ co corp inc ltd bros vs etc est sq
    jan feb mar apr jun jul aug sept sep oct nov dec mon tues tue wed thurs thu fri
"""
_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+        # addresses
    | [#@][^\W\d]\w*                                                # tags
    | n't(?!\w) | '(?:s|m|d|re|ve|ll)(?!\w)                      # ends of contractions
    | '\d\ds?(?!\w) | '(?:em|n')(?!\w)                              # '90s 'em 'n'
    | (?:can(?=not) | gon(?=na) | got(?=ta) | wan(?=na) | lem(?=me) | gim(?=me)
        | 't(?=is) | 't(?=was))(?=\w+(?![\w'-]))                    # two words written as one
    | (?:[^\W\d_]\.)+[^\W\d_](?!\w)\.? | [^\W\d_]\.(?=\s|$)         # t.v. u.k x.
    | (?:{"|".join(_ABBREVIATIONS.split())})\.(?!\w) | no\.(?=\s*\d)
    | (?:(?<!\S)[+-])?\d+(?:[.,:]\d+)+(?:-\w+)*                     # 1,000 3.5 10:30 1.5-inch
    | (?<!\S)[+-]\d\w*
    | [^\W\d]+?(?=n't(?!\w))                                       # is|n't
    | y'(?=all(?!\w)) | (?:o|d|l|ma)'\w+(?:-\w+)*                   # o'clock d'you l'amour ma'am
    | w/o(?!\w) | \w+(?:[-./]\w+)*                                  # half-eaten black/white a.b
    | [!?]+ | \.+ | -+ | \S
    """,
    re.VERBOSE,
)
_WRITTEN_AS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$"}
)
_BRACKETS = dict(zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True))
_CAPITALS_JOINED = re.compile(r"\b[A-Z]+(?:&[A-Z]+)+\b")
_DROPPED = set("'\"`,:;?!")


def caption_words(caption: str) -> list[str]:
    """Returns the words of a caption: lower case, contractions split ("is n't"), no punctuation."""
    words: list[str] = []
    place, text = 0, caption.translate(_WRITTEN_AS)
    for name in _CAPITALS_JOINED.finditer(text):  # R&B is one word, b & w are three
        words += [*_split(text[place : name.start()]), name[0].lower()]
        place = name.end()
    return words + _split(text[place:])


def _split(text: str) -> list[str]:
    tokens: list[str] = _TOKEN.findall(text.lower())
    found = (_BRACKETS.get(token, token) for token in tokens)
    return [t for t in found if t not in _DROPPED and t.strip(".-")]

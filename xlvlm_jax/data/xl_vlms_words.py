"""Word lists of XL-VLMs (mshukor/xl-vlms at a599fe9): what its numbers depend on.

Its stop words are those of scikit-learn, but for two, and these. Its file has 1,158 different ones;
those that its filter never looks at are left out: shorter than three letters, or not in web2.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# src/assets/gist_stopwords.txt
FURTHER_STOP_WORDS = _words("""
    able accordance according accordingly act actually added affected affecting allow announce
    anybody anyways apart apparently appear appreciate appropriate approximately arent arise
    aside ask associated available away awfully begin beginning believe best better brief
    briefly came cause certain certainly cit clearly come comes concerning consequently consider
    considering contain corresponding course currently date definitely despite did different
    does doing don effect eighty end ending entirely especially everybody exactly example far
    fifth fix following forth furthermore gave getting given giving goes going gone got gotten
    hardly haven hello help hid hither home hopefully howbeit ibid immediate immediately
    importance important inasmuch index indicate information inner insofar instead invention
    inward just kept know known largely lately later lest let like likely line little look
    looking mainly make maybe mean merely million miss mug nay near nearly necessarily necessary
    need needs new ninety non nonetheless normally noted novel obtain obviously old ought
    outside overall owing page par particular particularly past plus poorly possible possibly
    potentially predominantly present presumably previously primarily probably promptly quickly
    quite ran readily really reasonably recent recently ref regarding regardless related
    relatively research respectively resulting right run said saw say saying sec second secondly
    section seeing seen self sensible sent seriously seven shall shan shed shown significant
    significantly similar similarly slightly somebody somewhat soon sorry specifically specify
    stop strongly sub substantially successfully sufficiently suggest sup sure taken taking tell
    thank thanks thats theirs thereof theres thereto theyre think thorough thoroughly thou
    thousand til tip took tried truly try trying twice unfortunately unless unlike unlikely unto
    use used useful usefully usefulness usually value various vol want wasnt way wed welcome
    went werent whats whim whomever widely willing wish won wonder wont world wouldnt yes youd
    zero""")
NO_STOP_WORDS = frozenset({"fifty", "thick"})


def _parts(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(","))


# src/datasets/constants.py; sorted, because the order of a class does not matter.
_POSITIVE = _parts("""
    acceptance, accepting, admiration, ambition, ambitious, amused, cheerful, content,
    contentment, delighted, ecstatic, elated, excited, faith, faithful, fearless, fearlessness,
    free, freedom, grateful, grin, happy, hope, hopeful, hopefulness, imagination, imaginative,
    inspiration, inspirational, joy, laugh, liberated, liberation, love, optimistic,
    perseverance, persevering, playful, pleased, proud, purposeful, relaxed, relief, serene,
    serenity, smile, tranquil, tranquility, triumphant, trust, trustworthy, wisdom, wise""")
_NEGATIVE = _parts("""
    alienated, alienation, ambivalence, ambivalent, anger, anxious, ashamed, awkward, betrayal,
    betrayed, bored, chaotic, conflict, conflicted, confusion, crying, despair, despairing,
    disappointed, disgust, disheartened, doubt, doubtful, emptiness, fear, frown, frustrated,
    gloomy, grief, grumpy, hate, insecure, jealous, loneliness, lonely, melancholy, mournful,
    nightmare, nightmarish, regret, regretful, reluctant, resentful, sad, serious, tears, upset,
    vulnerability, vulnerable, weakness, worried, yearning""")
_OTHER_SENTIMENTS = _parts("""
    bashful, bewildered, blushing, concentration, curious, desire, desirous, destined, destiny,
    determined, dreamlike, emotion, facial expression, fated, identifiable, identity, illusion,
    illusory, indifferent, intense, introspection, introspective, karma, karmic, memorable,
    mysterious, mystery, nervous, pensive, powerful, realistic, skeptical, smirk, solitary,
    solitude, surprised, sympathetic, thoughtful, transformation, transformative""")
CLASSES = {
    "colors": _parts("""
    amber, beige, black, blue, brown, charcoal, coral, cyan, emerald, gold, gray, green, indigo,
    ivory, lavender, magenta, maroon, navy, olive, orange, peach, pink, purple, red, silver,
    teal, turquoise, violet, white, yellow"""),
    "places": _parts("""
    airport, beach, bridge, bus stop, cabinet, cave, church, cinema, city, countryside, desert,
    factory, field, forest, garden, harbor, hill, hospital, hotel, island, jungle, kitchen,
    lake, library, mall, market, mountain, museum, ocean, park, place, playground, restaurant,
    river, room, school, shop, stadium, station, store, street, temple, theater, tower,
    university, village, waterfall, zoo"""),
    "sentiments": (*_POSITIVE, *_NEGATIVE, *_OTHER_SENTIMENTS),
    "positive_sentiments": _POSITIVE,
    "negative_sentiments": _NEGATIVE,
}

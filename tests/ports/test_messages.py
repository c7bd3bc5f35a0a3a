"""Lists of names, and counts, in messages."""

from ports.messages import counted, few


def test_lists_by_hand():
    assert few([]) == ""
    assert few(["a", "b"], most=2) == "a, b"
    assert few(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    assert few((i for i in range(128)), most=3) == "0, 1, 2 and 125 more"


def test_counts_by_hand():
    found = [counted(number, "row") for number in (0, 1, 2, 1000)]
    assert found == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    assert counted(1, "dictionary", "dictionaries") == "1 dictionary"
    assert counted(3, "dictionary", "dictionaries") == "3 dictionaries"

"""Lists of names in error messages."""

from ports.messages import few


def test_lists_by_hand():
    assert few([]) == ""
    assert few(["a", "b"], most=2) == "a, b"
    assert few(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    assert few((i for i in range(128)), most=3) == "0, 1, 2 and 125 more"

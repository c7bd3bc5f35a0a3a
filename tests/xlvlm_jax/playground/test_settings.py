"""What a page asks for is read strictly."""

import pytest

from xlvlm_jax.playground.settings import WHERE, Settings, Slider, read_settings

ASKED = {"picture": "p", "question": " What? "}


def test_sliders_at_zero_are_left_out():
    sliders = [
        {"item": "a", "strength": 0},
        {"item": "b", "strength": -1.5, "where": "image", "site": "layers.1"},
        {"item": "c", "strength": 2, "where": None},
    ]
    assert read_settings({**ASKED, "sliders": sliders, "instruction": ""}) == Settings(
        "p",
        " What? ",
        (Slider("b", -1.5, "image", "layers.1"), Slider("c", 2.0, None, None)),
        None,
    )


def test_short_answers_are_asked_for_as_in_data_sets():
    asked = read_settings({**ASKED, "short": True}).question
    assert asked == " What? \nAnswer the question using a single word or phrase."


@pytest.mark.parametrize("where", WHERE)
def test_every_named_place_is_one_that_edits_know(where):
    slider = {"item": "a", "strength": 1, "where": where}
    assert read_settings({**ASKED, "sliders": [slider]}).sliders[0].where == where


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "a" * 5000}, "5000 characters"),
        ({"picture": None}, "picture is None; expected a text"),
        ({"sliders": {}}, None),
        ({"sliders": "all"}, "sliders is a str"),
        ({"sliders": [3]}, "a slider: a int"),
        ({"sliders": [{"item": "a", "strength": "2"}]}, "strength of a slider is '2'"),
        ({"sliders": [{"item": "a", "strength": True}]}, "strength of a slider is True"),
        ({"sliders": [{"item": "a", "strength": float("nan")}]}, "is nan; expected a number from"),
        ({"sliders": [{"item": "a", "strength": 1e9}]}, "-1000 to 1000"),
        ({"sliders": [{"item": "a", "strength": 10**400}]}, "-1000 to 1000"),
        ({"question": "\ud800"}, "question holds half a character"),
        ({"sliders": [{"item": 3, "strength": 1}]}, "item is 3"),
        ({"sliders": [{"item": "a", "strength": 1, "where": "left"}]}, "where is 'left'"),
    ],
)
def test_other_values_are_refused(change, said):
    if said is None:
        assert read_settings({**ASKED, **change}).sliders == ()
        return
    with pytest.raises(ValueError, match=said):
        read_settings({**ASKED, **change})


def test_a_list_is_no_settings():
    with pytest.raises(ValueError, match="expected a JSON object"):
        read_settings([])

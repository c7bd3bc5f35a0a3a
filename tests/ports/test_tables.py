"""Tables for notebooks, by hand; text in them stays text."""

import jax
import jax.numpy as jnp
import pytest
from markupsafe import Markup

from ports import Generation, Output
from ports.tables import as_text, flat, html_table, kind


def test_a_table_by_hand():
    left = '<th style="text-align:left">'
    assert html_table([("a", 1), ("b", 2.5)], head=["name", "value"], title="T") == (
        '<table><caption style="text-align:left">T</caption>'
        "<thead><tr><th>name</th><th>value</th></tr></thead>"
        f"<tbody><tr>{left}a</th><td>1</td></tr><tr>{left}b</th><td>2.5</td></tr></tbody></table>"
    )
    assert html_table([]) == "<table><tbody></tbody></table>"


@pytest.mark.parametrize("place", ["row", "cell", "head", "title"])
def test_markup_in_text_is_escaped(place):
    texts = dict.fromkeys(("row", "cell", "head", "title"), "x") | {place: "<script>&\"'"}
    made = html_table(
        [(texts["row"], texts["cell"])], head=("", texts["head"]), title=texts["title"]
    )
    assert "<script>" not in made and made.count("&lt;script&gt;&amp;&#34;&#39;") == 1


def test_pictures_are_taken_as_they_are():
    assert '<td><img src="data:,"/></td>' in html_table([("a", Markup('<img src="data:,"/>'))])


def test_lists_and_mappings_read_as_text():
    assert as_text(["yes", "no"]) == "yes, no" and as_text(("a", [1, 2.5])) == "a, 1, 2.5"
    assert as_text({"rows": 7, "words": ["no"]}) == "rows: 7, words: no"
    assert as_text("a") == "a" and as_text(None) == "None" and as_text([]) == ""
    shown = html_table([("words", ["yes", "<no>"])])
    assert "<td>yes, &lt;no&gt;</td>" in shown and "[" not in shown


def test_settings_in_one_list():
    nested = {"a": 1, "b": {"c_d": [2], "e": {"f": False}}, "g": None, "h": "", "i": []}
    assert list(flat(nested)) == [("a", 1), ("b: c d", [2]), ("b: e: f", False)]


def test_the_kind_of_an_array():
    assert kind(jnp.zeros((2, 3), jnp.bfloat16)) == "bfloat16[2, 3]"
    assert kind(jax.ShapeDtypeStruct((), jnp.int32)) == "int32[]"
    assert kind(None) == "None"


def test_a_models_output_shows_kinds_and_no_numbers():
    states = {"layers.<1>": jnp.zeros((2, 5, 4))}
    output = Output(jnp.zeros((2, 5, 7)), states)
    assert repr(output) == "Output(logits: float32[2, 5, 7]; states: layers.<1>)"
    shown = output._repr_html_()
    assert "<td>float32[2, 5, 7]</td>" in shown
    assert "states[&#39;layers.&lt;1&gt;&#39;]</th><td>float32[2, 5, 4]</td>" in shown
    answer = Generation(jnp.zeros((2, 3), jnp.int32), {}, states, jnp.ones(2, bool))
    assert repr(answer) == "Generation(tokens: int32[2, 3]; states: none)"
    shown = answer._repr_html_()
    assert "<td>int32[2, 3]</td>" in shown and "finite</th><td>bool[2]</td>" in shown
    assert "prompt_states[&#39;layers.&lt;1&gt;&#39;]" in shown
    # A tree of something else is shown too.
    shapes = jax.tree.map(jnp.shape, output)
    assert repr(shapes) == "Output(logits: (2, 5, 7); states: layers.<1>)"

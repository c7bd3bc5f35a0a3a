"""Descriptions of a model: parts add up, and the sites are those of the model."""

import re

import jax

from ports import description


def test_the_embedded_model_by_hand(vlm):
    assert repr(vlm) == "VLM(llava, 4,244,208 parameters, float32)"
    parts = description.count_by_part(vlm.module, vlm.params)
    # 708 words of width 192, once in and once out.
    assert parts["language_model.lm_head"] == 708 * 192
    assert parts["language_model.model.embed_tokens"] == 708 * 192
    assert sum(parts.values()) == sum(leaf.size for leaf in jax.tree.leaves(vlm.params))
    shown = vlm._repr_html_()
    assert "language_model.lm_head</th><td>135,936</td><td>3.2%</td>" in shown
    assert "language_model.model.layers.{0-7}.mlp.up_proj</th><td>8</td><td>384</td>" in shown
    assert f"{len(vlm.sites)} sites that can be captured or steered" in shown


def test_patterns_by_hand():
    shapes = {"a.0.b": (1, 4), "a.2.b": (1, 4), "a.2.c": (1, 4), "a.10.b": (1, 8), "d": (3, 5)}
    assert description.patterns(shapes) == {
        "a.{0-2}.b": (2, 4), "a.2.c": (1, 4), "a.10.b": (1, 8), "d": (1, 5),
    }  # fmt: skip


def test_patterns_count_every_site_once(vlm):
    found = description.patterns(vlm.site_shapes)
    assert sum(count for count, _ in found.values()) == len(vlm.sites)
    assert not [name for name in found if re.search(r"\.\d+\.\d+\.", name)]

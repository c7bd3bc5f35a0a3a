"""Figures as SVG files: reproducible, with text as text, complete or not written."""

import pytest

from xlvlm_jax.report.figure import figure


def draw(path):
    with figure(path, width=3, height=2) as (_, [[axes]]):
        axes.plot([0, 1], [1, 2], label="a line")
        axes.set_xlabel("strength")


def test_text_stays_text_and_the_same_figure_gives_the_same_bytes(tmp_path):
    draw(tmp_path / "new" / "a.svg")
    draw(tmp_path / "b.svg")
    first = (tmp_path / "new" / "a.svg").read_bytes()
    assert first == (tmp_path / "b.svg").read_bytes()
    assert b">strength</text>" in first


def test_dollar_signs_stay_text(tmp_path):
    with figure(tmp_path / "a.svg", width=3, height=2) as (_, [[axes]]):
        axes.set_title(r"$\boxed{3}$ and $x$")
    assert r"$\boxed{3}$ and $x$" in (tmp_path / "a.svg").read_text()


def test_several_axes(tmp_path):
    with figure(tmp_path / "a.png", 1, 2, width=4, height=2) as (_, axes):
        assert axes.shape == (1, 2)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_drawing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), figure(tmp_path / "a.svg", width=3, height=2):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_other_formats_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"ending in \.svg, \.png or \.pdf; got '\.gif'"),
        figure(tmp_path / "a.gif", width=3, height=2),
    ):
        pass

"""The program that the page shows runs, and prints what the page shows."""

import dataclasses

import pytest

import ports
from xlvlm_jax.playground.edits import settings_of
from xlvlm_jax.playground.python_code import as_python
from xlvlm_jax.playground.settings import Slider


@pytest.fixture
def write(answers, made):
    def write(*sliders):
        found = settings_of(answers.vlm, answers.items, sliders)
        return as_python("embedded", None, made.picture.name, made.question, found, 8)

    return write


def test_the_program_prints_both_answers(write, made, vlm, monkeypatch, capsys):
    code = write(
        Slider("vectors/yes-no", 1.0, None, None), Slider("concepts/0", -0.01, "predicting", None)
    )
    monkeypatch.chdir(made.picture.parent)
    monkeypatch.setattr(ports, "load", {"embedded": vlm}.__getitem__)  # it is loaded already
    exec(compile(code, "play.py", "exec"), {})
    assert capsys.readouterr().out == "plain: yes\nsteered: no\n"


def test_programs_import_what_they_use(write):
    code = write(Slider("vectors/yes-no", 2.0, "image", "layers.2"))
    assert "numpy" not in code and "concept_directions" not in code
    assert "steer(SteeringVector(steering.load(" in code and "alpha=2.0, where='image')" in code


def test_files_that_were_uploaded_are_read_from_the_working_directory(answers, made):
    """The server deletes its own when it ends."""
    found = settings_of(answers.vlm, answers.items, [Slider("vectors/yes-no", 1.0, None, None)])
    given = ("embedded", None, "a.jpg", "what?", found, 8)
    assert "steering.load('yes-no.safetensors')" in as_python(*given, made.run)
    assert f"steering.load({str(made.run / 'steering' / 'yes-no.safetensors')!r})" in as_python(
        *given, made.run.parent / "other"
    )


def test_what_people_type_stays_text(answers, made):
    nasty = "a\"\n'); import os #"
    code = as_python("embedded", None, nasty, nasty, (), 8)
    compile(code, "play.py", "exec")
    assert code.count("import os") == 2 and "\nimport os" not in code


def test_dropped_vectors_of_the_same_name_are_refused(answers, made):
    """The program would read both from the same file."""
    (setting,) = settings_of(
        answers.vlm, answers.items, [Slider("vectors/yes-no", 1.0, None, None)]
    )
    places = [made.run / "vectors" / str(n) / "v.safetensors" for n in range(2)]
    first, second = (
        setting._replace(item=dataclasses.replace(setting.item, path=place)) for place in places
    )
    given = ("embedded", None, "a.jpg", "what?")
    with pytest.raises(ValueError, match=r"two dropped vectors are named v\.safetensors; the prog"):
        as_python(*given, (first, second), 8, made.run)
    assert as_python(*given, (first, first), 8, made.run).count("load('v.safetensors')") == 2
    assert str(places[1]) in as_python(*given, (first, second), 8)  # not dropped: read in place

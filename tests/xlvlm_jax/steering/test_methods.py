"""Each way to fit steering is one record, which is all that the command uses."""

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, steering
from xlvlm_jax.features.reader import Features
from xlvlm_jax.steering.methods import METHODS, Fitted, Method, Request, method_named

from .conftest import SITE


def fit_first(asked):
    vector = SteeringVector(asked.features.matrix(asked.site)[0], asked.site, {}, asked.where)
    return Fitted({"first": vector}, "the first row")


def test_a_new_method_is_a_method_of_the_command(xlvlm, features, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "first", Method("first", fit_first, needs_target=False))
    output = tmp_path / "v.safetensors"
    arguments = ("steer", "fit", features, "--method", "first", "--where", "text")
    status, out, errors = xlvlm(*arguments, "--output", output)
    assert status == 0, errors
    assert f"the first row, site {SITE} ->" in out
    found = steering.load(output)
    np.testing.assert_array_equal(found.vector, Features.open(features).matrix(SITE)[0])
    assert found.where == "text"


def test_an_unknown_method(xlvlm, features, tmp_path):
    expected = "unknown method 'coarce'; expected one of coarse, pca, lat, probe, iti"
    with pytest.raises(ValueError, match=expected):
        method_named("coarce")
    arguments = ("steer", "fit", features, "--method", "coarce", "--output", tmp_path / "v")
    status, _, errors = xlvlm(*arguments)
    assert status == 2 and expected in errors


def test_a_coarse_vector_by_its_record(features):
    opened = Features.open(features)
    asked = Request(opened, SITE, ["yes"], ["no"], options={"target_features": None})
    (vector,) = METHODS["coarse"].fit(asked).steering.values()
    expected = steering.fit_coarse(opened, SITE, ["yes"], ["no"])
    np.testing.assert_array_equal(vector.vector, expected.vector)
    assert vector.source == expected.source


def test_examples_say_how_many_are_steered(features):
    opened = Features.open(features)
    asked = Request(opened, SITE, ["yes"], ["no"], num_samples=4, keep=1.0)
    examples = METHODS["learned"].examples(asked)
    pairs = list(zip(examples.towards, examples.away, strict=True))
    assert examples.steered == sum(towards != away for towards, away in pairs) == 4
    assert len(examples.samples) == len(pairs) == 8
    assert {towards for towards, away in pairs if towards != away} == {"no"}


def test_records_name_themselves():
    assert list(METHODS) == [method.name for method in METHODS.values()]
    several = [name for name, method in METHODS.items() if method.makes_several]
    assert several == ["fine", "vti-image", "vti-text"]

"""Each way to fit steering is one record, which is all that the command uses."""

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, steering
from xlvlm_jax.features.reader import Features
from xlvlm_jax.steering import methods
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


class _CalledError(Exception):
    pass


def test_options_left_out_are_those_of_the_fit_functions(vlm, features, monkeypatch):
    def call(*_, **options):
        raise _CalledError(options)

    opened = Features.open(features)
    with pytest.raises(ValueError, match="method 'fine' needs the option num_concepts"):
        METHODS["fine"].fit(Request(opened, SITE))
    asked = Request(opened, SITE, ["yes"], ["no"], num_samples=2, keep=1.0)
    for name in ("l2s", "p2s", "vti-text"):
        examples = METHODS[name].examples(asked)
        assert examples.towards[:2] == ["no", "no"]  # completions
        monkeypatch.setattr(methods, f"fit_{name.replace('-', '_')}", call)
        with pytest.raises(_CalledError) as called:
            METHODS[name].fit(asked, examples, vlm)
        (options,) = called.value.args
        assert options.items() >= {"contrast": "completion", "states": "last"}.items()
        assert options.get("context_site") is None
    for name in ("learned", "p2s"):
        with pytest.raises(ValueError, match="there are no source or no target answers to learn"):
            METHODS[name].examples(Request(opened, SITE, ["yes"]))


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

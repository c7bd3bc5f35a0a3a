"""Every exported name has an example in its docstring, with the output that it shows."""

import doctest
import importlib
import types

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

import ports
import xlvlm_jax

NAMES = [(package, name) for package in (ports, xlvlm_jax) for name in package.__all__]


@pytest.fixture(autouse=True)
def same_cache():
    """Undoes the example that changes the cache directory, for the examples after it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    if jax.config.values["jax_compilation_cache_dir"] != before:
        jax.config.update("jax_compilation_cache_dir", before)
        jax_cache.reset_cache()


@pytest.mark.parametrize(
    ("package", "name"), NAMES, ids=[f"{package.__name__}.{name}" for package, name in NAMES]
)
def test_the_example_of_an_exported_name(package: types.ModuleType, name: str):
    exported = getattr(package, name)
    # A reader pastes it: nothing is there that it does not import itself.
    found = doctest.DocTestParser().get_doctest(
        exported.__doc__ or "", {}, f"{package.__name__}.{name}", None, None
    )
    assert found.examples, "the docstring has no example"
    said: list[str] = []
    result = doctest.DocTestRunner().run(found, out=said.append)
    assert result.failed == 0, "".join(said)


@pytest.mark.parametrize(
    "module",
    [
        *("causal.words", "causal.changes", "causal.scores"),
        *(
            "metrics.amber",
            "metrics.chair",
            "metrics.pope",
            "metrics.safety",
            "metrics.uncertainty",
            "data.scenes.presence",
        ),
        *("steering.directions", "steering.adaptive", "steering.sae_features"),
        "evaluation.method_sweep",
        *("lenses.reading", "lenses.jacobian", "lenses.neighbours"),
    ],
)
def test_the_examples_in_a_module(module: str):
    said: list[str] = []
    runner = doctest.DocTestRunner()
    found = importlib.import_module(f"xlvlm_jax.{module}")
    for examples in doctest.DocTestFinder(exclude_empty=True).find(found, globs={}):
        runner.run(examples, out=said.append)
    assert runner.tries and not runner.failures, "".join(said)

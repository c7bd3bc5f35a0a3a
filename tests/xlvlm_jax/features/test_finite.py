"""States that are NaN, infinite or too large for the stored dtype: named, and never stored."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax import Features
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection

LAYER = "language_model.model.layers.4"
NORM = "language_model.model.norm"


def settings(dtype="float32", sites=(LAYER, NORM)):
    return ExtractionSettings(
        sites, Selection("index", "-1"), batch_size=4, mode="teacher-forcing", dtype=dtype
    )


def scaled(vlm, factor):
    """Returns the model with the scale of its final norm times a factor."""
    model = copy.copy(vlm)
    path = ("language_model", "model", "norm", "scale")

    def change(keys, leaf):
        return leaf * factor if tuple(key.key for key in keys) == path else leaf

    model.params = jax.tree_util.tree_map_with_path(change, vlm.params)
    return model


@pytest.mark.parametrize(
    ("factor", "dtype", "reason"),
    [
        (np.nan, "float32", f"NaN in the state at site {NORM}, position"),
        (np.inf, "float32", f"in the state at site {NORM}, position"),
        (1e5, "float16", "beyond float16; store states as bfloat16 or float32"),
    ],
)
def test_every_sample_names_its_site(vlm, samples, tmp_path, factor, dtype, reason):
    with pytest.raises(ValueError, match="none of the 5 samples gave a state; the first: ") as told:
        extract(scaled(vlm, factor), samples[:5], tmp_path / "features", settings(dtype))
    assert reason in str(told.value)
    assert not (tmp_path / "features").exists()


def test_the_others_are_kept(vlm, samples, tmp_path, monkeypatch):
    """None of the rows of the second of five samples is stored, at any site."""
    from xlvlm_jax.features import pipeline

    select = pipeline.select
    batches = []

    def spoiled(model, ran):
        result = select(model, ran)
        batches.append(ran)
        if len(batches) > 1:
            return result
        states = dict(result.rows.states)
        states[LAYER] = states[LAYER].at[1, 0, 7].set(jnp.inf)
        return result._replace(rows=result.rows._replace(states=states))

    monkeypatch.setattr(pipeline, "select", spoiled)
    summary = extract(vlm, samples[:5], tmp_path / "features", settings())
    assert [name for name, _ in summary.failed] == [samples[1].id]
    assert summary.failed[0][1].startswith(f"Inf in the state at site {LAYER}, position")
    assert "of the model in float32; check the weights" in summary.failed[0][1]
    features = Features.open(tmp_path / "features")
    assert features.sample_rows.tolist() == [0, 2, 3, 4]
    for site in (LAYER, NORM):
        assert np.isfinite(features.matrix(site)).all()
    batches.clear()
    with pytest.raises(ValueError, match=rf"sample {samples[1].id}: Inf in the state at site"):
        extract(vlm, samples[:5], tmp_path / "strict", settings(), strict=True)


def test_logits_that_overflow_after_the_last_site(vlm, samples, tmp_path):
    """The states are finite, but the logits that chose the tokens are not."""
    settings = ExtractionSettings(
        (LAYER,), Selection("index", "-1"), batch_size=4, max_new_tokens=2
    )
    with pytest.raises(ValueError, match="NaN or Inf in the logits of the model in float32"):
        extract(scaled(vlm, np.nan), samples[:2], tmp_path / "features", settings)


def test_half_precision_is_named_as_the_cause(vlm):
    """Makes the message without running the model, because this CPU does not multiply float16."""
    from xlvlm_jax.features.compute import ExtractionModel
    from xlvlm_jax.features.pipeline import _not_finite

    half = copy.copy(vlm)
    half.module = vlm.module.clone(dtype=jnp.dtype("float16"))
    model = ExtractionModel(half, None, None, settings(), None)
    said = _not_finite(model, NORM, np.array([1, np.inf]), 7)
    assert said == (
        f"Inf in the state at site {NORM}, position 7 of the model in float16; "
        "run the model in bfloat16 or float32"
    )

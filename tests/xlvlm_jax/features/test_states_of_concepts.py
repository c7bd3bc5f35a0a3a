"""Which concepts belong to which states: two models, adapters, sources of earlier releases."""

import dataclasses
import itertools

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features
from xlvlm_jax.concepts.explain import explain_sample
from xlvlm_jax.concepts.scores.attributes import score_attributes
from xlvlm_jax.concepts.scores.scorer import Scorer
from xlvlm_jax.features.manifest import finetuned_site, model_at
from xlvlm_jax.features.reader import choose_site, choose_sites, require_states, site_of
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "language_model.model.layers.3"
TUNED = finetuned_site(SITE)
BASE = {"model": "base", "fingerprint": "1"}
OTHER = {"model": "tuned", "fingerprint": "2"}
BOTH = {**BASE, "finetuned": OTHER}
ADAPTED = {**BASE, "adapter": "a", "adapter fingerprint": "aa"}
WITH_ADAPTED = {**BASE, "finetuned": ADAPTED}
HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def write(tmp_path):
    """write(manifest) returns features of two samples, with two sites if there are two models."""
    numbers = itertools.count()

    def features(manifest: dict) -> Features:
        rows = np.arange(2)
        sites = [SITE, TUNED] if "finetuned" in manifest else [SITE]
        place = tmp_path / str(next(numbers))
        with FeaturesWriter(place, manifest) as writer:
            samples = [{"id": f"s{i}"} for i in rows]
            states = {site: np.eye(2, dtype="f4") for site in sites}
            writer.append(samples, states, rows, rows, rows)
            writer.close()
        return Features.open(place)

    return features


@pytest.mark.parametrize(
    ("learnt_on", "learnt", "manifest", "site"),
    [
        (BOTH, SITE, BOTH, SITE),
        (BOTH, TUNED, BOTH, TUNED),
        (BOTH, "layers.3", BOTH, SITE),
        (BOTH, finetuned_site("layers.3"), BOTH, TUNED),
        (BOTH, TUNED, OTHER, SITE),
        (OTHER, SITE, BOTH, TUNED),
        (WITH_ADAPTED, TUNED, WITH_ADAPTED, TUNED),
        (WITH_ADAPTED, TUNED, ADAPTED, SITE),
        (ADAPTED, SITE, WITH_ADAPTED, TUNED),
        (WITH_ADAPTED, SITE, BASE, SITE),
        ({}, TUNED, OTHER, SITE),  # unknown
        (BOTH, TUNED, {}, SITE),
    ],
)
def test_the_same_states(write, learnt_on, learnt, manifest, site):
    source = {"site": learnt, **model_at(learnt_on, learnt)}
    require_states(source, write(manifest), site, "scored")


@pytest.mark.parametrize(
    ("learnt_on", "learnt", "manifest", "site", "message"),
    [
        (BOTH, SITE, BOTH, TUNED, r"from model 'base' \(1\), but .* of 'tuned' \(2\)"),
        (BOTH, TUNED, BOTH, SITE, r"from model 'tuned' \(2\), but .* of 'base' \(1\)"),
        (BOTH, TUNED, BASE, SITE, r"from model 'tuned' \(2\), but .* of 'base' \(1\)"),
        (WITH_ADAPTED, TUNED, WITH_ADAPTED, SITE, "'base' with adapter aa, but .* with no adapter"),
        (WITH_ADAPTED, SITE, WITH_ADAPTED, TUNED, "'base' with no adapter, but .* with adapter aa"),
        (WITH_ADAPTED, TUNED, BASE, SITE, "'base' with adapter aa, but .* with no adapter"),
        (BASE, SITE, ADAPTED, SITE, "'base' with no adapter, but .* with adapter aa"),
        (BOTH, "layers.2", BOTH, SITE, "concepts of site 'layers.2' cannot be scored on states of"),
        (BOTH, finetuned_site("layers.2"), BOTH, TUNED, "concepts of site 'finetuned:layers.2'"),
        ({}, HOOK, BASE, SITE, f"{HOOK}' cannot be scored on .*; name the site of these states"),
    ],
)
def test_other_states(write, learnt_on, learnt, manifest, site, message):
    source = {"site": learnt, **model_at(learnt_on, learnt)}
    with pytest.raises(ValueError, match=message):
        require_states(source, write(manifest), site, "scored")


class TestEarlierReleases:
    """Their sources have the original's fingerprint at either site, and no adapter's."""

    @pytest.mark.parametrize("manifest", [BOTH, WITH_ADAPTED])
    def test_fine_tuned_states(self, write, manifest):
        features = write(manifest)
        source = {"site": TUNED, **BASE}
        require_states(source, features, TUNED, "scored")
        for other in (features, write(BASE)):
            with pytest.raises(ValueError, match=f"concepts of site '{TUNED}' cannot be scored on"):
                require_states(source, other, SITE, "scored")

    def test_a_shift(self, write):
        """It wrote no model, and the original's site for the fine-tuned concepts."""
        features = write(BOTH)
        source = {"site": SITE, "features": str(features.path.resolve())}
        require_states(source, features, TUNED, "compared")

    def test_an_adapter(self, write):
        require_states({"site": SITE, **BASE}, write(ADAPTED), SITE, "scored")
        features = write(WITH_ADAPTED)
        source = {"site": SITE, **BASE, "features": str(features.path.resolve())}
        with pytest.raises(ValueError, match="cannot be compared on states of 'finetuned:"):
            require_states(source, features, TUNED, "compared")


def test_names_of_sites_of_two_models(write):
    both = write(BOTH)
    for name in (SITE, "layers.3", "model.language_model.layers.3", "layers.*"):
        assert choose_sites(both, name) == [SITE]
        assert choose_sites(both, finetuned_site(name)) == [TUNED]
    with pytest.raises(ValueError, match=r"has the sites .*; choose one of them with --site, got"):
        choose_site(write(OTHER), TUNED)


def test_concepts_of_the_fine_tuned_model_on_its_own_features(write):
    """Nobody has to name the site."""
    features = write(OTHER)
    source = {"site": TUNED, **model_at(BOTH, TUNED)}
    concepts = Concepts(np.eye(2, dtype="f4"), method="kmeans", source=source)
    assert site_of(source, features) == SITE and site_of({}, features) is None
    assert site_of(source, write(BOTH)) == TUNED
    assert explain_sample(features, concepts, "s1").concepts[0].concept == 1
    scorer = Scorer(features, site_of(source, features))
    assert scorer.score(concepts).explained_variance == pytest.approx(1)
    assert score_attributes(concepts, features) == {}


def test_a_dictionary_of_a_hook_point_where_the_site_is_named(write):
    features = write(BASE)
    concepts = Concepts(np.eye(2, dtype="f4"), method="kmeans", source={"site": HOOK})
    assert explain_sample(features, concepts, "s1", site="layers.3").concepts[0].concept == 1
    Scorer(features, "layers.3").check_source(concepts.source)
    with pytest.raises(ValueError, match=r"choose one of them with --site, got 'blocks\.3\.hook"):
        explain_sample(features, concepts, "s1")
    with pytest.raises(ValueError, match="name the site of these states"):
        Scorer(features).check_source(concepts.source)
    other = dataclasses.replace(concepts, source={"site": HOOK, "fingerprint": "9"})
    with pytest.raises(ValueError, match=r"concepts are from model None \(9\)"):
        explain_sample(features, other, "s1", site=SITE)

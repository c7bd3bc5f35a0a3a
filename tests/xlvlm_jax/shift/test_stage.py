"""From two directories of features and one of concepts to shift/."""

import dataclasses
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from ports import VLM
from xlvlm_jax import Concepts
from xlvlm_jax.concepts.stage import decompose_features
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.shift import Pairs, ShiftAnalysis, blocks, shift_features, stage
from xlvlm_jax.steering import concept_vectors
from xlvlm_jax.storage.zarr_rows import StoredRows, create_array, wait

OPTIONS = {"num_words": 2, "num_images": 10}


@pytest.fixture
def concepts(states, concepts_of) -> Concepts:
    return dataclasses.replace(concepts_of(states[0]), source={"site": "norm"})


def test_from_directories_to_a_directory(write, states, concepts, head, root):
    before, after = states
    # The fine-tuned model did not say the word for the first sample.
    samples = [{"id": f"s{i}", "image": f"{i}.jpg"} for i in range(30)]
    finetuned = write("after", after[1:], samples=samples, rows=range(1, 30), model="tuned")
    original = write("before", before, model="base")
    found = shift_features(original, finetuned, concepts, head, root / "shift", **OPTIONS)
    rows = {"original": 30, "finetuned": 29, "common": 29, "finetuned samples": 29}
    assert found.rows == rows
    assert sorted(found.counts.tolist()) == [9, 10, 10]
    assert found.mean_overlap("shifted") == 1
    assert found.pictures["s15"] == "15.jpg"
    assert (found.source["model"], found.source["fine-tuned model"]) == ("base", "tuned")
    again = ShiftAnalysis.load(root / "shift")
    np.testing.assert_array_equal(again.shifted, found.shifted)
    own = Concepts.load(root / "shift" / "finetuned-concepts")
    np.testing.assert_array_equal(own.components[found.matching], found.finetuned)


def test_assignment_and_norms_as_asked_for(write, states, concepts, head, root):
    features = [write(name, Z) for name, Z in zip(("a", "b"), states, strict=True)]
    plain = shift_features(*features, concepts, head, root / "plain", **OPTIONS)
    asked = {"assign_by": "cosine", "normalise_shifts": True, "normalise_shifted": True}
    found = shift_features(*features, concepts, head, root / "shift", **OPTIONS, **asked)
    # The groups lie along axes of their own, so the assignment is the same.
    np.testing.assert_array_equal(found.counts, plain.counts)
    np.testing.assert_allclose(found.shifts, plain.shifts / np.linalg.norm(plain.shifts), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.shifted, axis=1), 1, rtol=1e-5)
    assert asked.items() <= ShiftAnalysis.load(root / "shift").source.items()


def test_the_shift_of_each_sample_is_stored(write, states, concepts, head, root):
    before, after = states
    features = [write(name, Z) for name, Z in zip(("a", "b"), states, strict=True)]
    options = {**OPTIONS, "store_samples": True}
    found = shift_features(*features, concepts, head, root / "shift", **options)
    stored = load_file(root / "shift" / "sample-shifts.safetensors")
    np.testing.assert_allclose(stored["shifts"], after - before, rtol=1e-6)
    assert stored["original_rows"].tolist() == stored["finetuned_rows"].tolist() == [*range(30)]
    # Their means are the shifts of the concepts.
    for k in range(3):
        own = stored["shifts"][stored["concepts"] == k]
        np.testing.assert_allclose(own.mean(axis=0), found.shifts[k], atol=1e-5)


def test_shifts_of_samples_are_those_of_the_analysis_beside_them(
    write, states, concepts, concepts_of, head, root, monkeypatch
):
    features = [write(name, Z) for name, Z in zip(("a", "b"), states, strict=True)]
    given = {**OPTIONS, "finetuned_concepts": concepts_of(states[1])}
    stored = root / "shift" / "sample-shifts.safetensors"
    save, seen = ShiftAnalysis.save, []

    def watched(self, directory):
        seen.append((stored.exists(), (directory / "shift.json").exists()))
        save(self, directory)

    monkeypatch.setattr(ShiftAnalysis, "save", watched)
    for wanted in (True, True, False):
        shift_features(*features, concepts, head, root / "shift", store_samples=wanted, **given)
        assert stored.exists() == wanted
    # The description comes last, and the earlier one is gone before.
    assert seen == [(True, False), (True, False), (False, False)]


def test_shifts_of_short_floats_are_not_rounded_again(root, monkeypatch):
    """256 - 1.0078125 has more digits than bfloat16; a block holds two of three pairs."""
    before, after = (np.full((3, 2), x, "f4").astype(ml_dtypes.bfloat16) for x in (1.0078125, 256))
    stored = []
    for name, Z in (("before", before), ("after", after)):
        wait(create_array(root / name, "bfloat16", Z.shape).write(Z))
        stored.append(StoredRows(root / name, 3))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8 * 2 * 2)
    rows = np.arange(3)
    stage._store_samples(root, *stored, Pairs(rows, rows, 3), np.zeros(3, np.int64))
    found = load_file(root / "sample-shifts.safetensors")["shifts"]
    assert found.dtype == np.float32 and found.tolist() == [[254.9921875] * 2] * 3


def test_one_directory_with_both_models_gives_the_same(write, states, concepts, head, root):
    before, after = states
    original, finetuned = write("before", before), write("after", after)
    two = shift_features(original, finetuned, concepts, head, root / "two", **OPTIONS)
    manifest = {"model": "base", "fingerprint": "1", "finetuned": {"model": "tuned"}}
    manifest["finetuned"]["fingerprint"] = "2"
    with FeaturesWriter(root / "both", manifest) as writer:
        rows = np.arange(30)
        both = {"norm": before, finetuned_site("norm"): after}
        writer.append(original.samples, both, rows, rows, rows)
        writer.close()
    both = type(original).open(root / "both")
    with pytest.raises(ValueError, match="from one, whose rows are paired already; omit pairs"):
        pairs = Pairs(rows, rows, 30)
        shift_features(both, None, concepts, head, root / "none", pairs=pairs)
    one = shift_features(both, None, concepts, head, root / "one", **OPTIONS)
    np.testing.assert_array_equal(one.shifted, two.shifted)
    learnt = Concepts.load(root / "one" / "finetuned-concepts")
    told = {"site": "finetuned:norm", "model": "tuned", "fingerprint": "2"}
    assert told.items() <= learnt.source.items()
    decompose_features(both, root / "theirs", 3, "kmeans", site="finetuned:norm")
    assert told.items() <= Concepts.load(root / "theirs").source.items()
    given = {"finetuned_concepts": learnt, **OPTIONS}
    again = shift_features(both, None, concepts, head, root / "again", **given)
    np.testing.assert_array_equal(again.shifted, one.shifted)
    shift_features(original, finetuned, concepts, head, root / "again", **given)
    older = dataclasses.replace(learnt, source={"site": told["site"], "fingerprint": "1"})
    given = {"finetuned_concepts": older, **OPTIONS}
    again = shift_features(both, None, concepts, head, root / "older", **given)
    np.testing.assert_array_equal(again.shifted, one.shifted)
    vectors = concept_vectors(learnt)
    assert {each.site for each in vectors.values()} == {"norm"}
    assert {each.source["fingerprint"] for each in vectors.values()} == {"2"}
    assert (one.words, one.images, one.rows) == (two.words, two.images, two.rows)
    with pytest.raises(ValueError, match="holds the sites norm; expected states of both models"):
        shift_features(original, None, concepts, head, root / "none")


def test_the_end_of_a_site_is_that_of_both_models(write, states, concepts, head, root):
    sites = "model.norm", finetuned_site("model.norm")
    both = write("both", states[0], sites=sites, finetuned={"model": "tuned", "fingerprint": "2"})
    short = dataclasses.replace(concepts, source={"site": "norm"})
    found = shift_features(both, None, short, head, root / "one", **OPTIONS)
    assert found.source["site"] == "model.norm"
    found = shift_features(both, both, short, head, root / "two", site="norm", **OPTIONS)
    assert found.source["site"] == "model.norm"


def test_streamed_concepts_are_compared_with_streamed_ones(write, states, head, root):
    """If one side does not fit into memory, neither does the other."""
    features = [write(name, Z) for name, Z in zip(("x", "y"), states, strict=True)]
    found = []
    for stream in (False, True):
        place = root / f"concepts-{stream}"
        decompose_features(features[0], place, 3, "kmeans", stream=stream)
        output = root / f"shift-{stream}"
        found.append(shift_features(*features, Concepts.load(place), head, output, **OPTIONS))
        own = Concepts.load(output / "finetuned-concepts")
        assert isinstance(own.activations, StoredRows) == stream
        assert own.source["site"] == "norm"
    held, streamed = found
    np.testing.assert_allclose(streamed.shifts, held.shifts, atol=1e-5)
    np.testing.assert_allclose(streamed.finetuned, held.finetuned, atol=1e-5)
    assert streamed.images == held.images


def test_many_states_are_decomposed_tile_by_tile(write, states, head, root, monkeypatch):
    """The result equals that in memory; activations are kept, like those of the original."""
    features = [write(name, Z) for name, Z in zip(("x", "y"), states, strict=True)]
    decompose_features(features[0], root / "concepts", 3, "kmeans")
    concepts, found = Concepts.load(root / "concepts"), []
    for held in (stage.HELD_BYTES, 0):
        monkeypatch.setattr(stage, "HELD_BYTES", held)
        monkeypatch.setattr(stage, "decompose" if held == 0 else "decompose_stored", None)
        output = root / f"shift-{held}"
        found.append(shift_features(*features, concepts, head, output, **OPTIONS))
        own = Concepts.load(output / "finetuned-concepts")
        assert own.activations.shape == (30, 3) and isinstance(own.activations, np.ndarray)
        monkeypatch.undo()
    np.testing.assert_allclose(found[1].shifts, found[0].shifts, atol=1e-5)
    np.testing.assert_allclose(found[1].finetuned, found[0].finetuned, atol=1e-5)
    assert found[1].images == found[0].images


def test_concepts_of_the_fine_tuned_model_may_be_given(
    write, states, concepts, concepts_of, head, root
):
    features = [write(name, Z) for name, Z in zip(("x", "y"), states, strict=True)]
    given = {"finetuned_concepts": concepts_of(states[1])}
    found = shift_features(*features, concepts, head, root / "shift", **OPTIONS, **given)
    assert found.mean_overlap("shifted") == 1
    assert not (root / "shift" / "finetuned-concepts").exists()
    given = {"finetuned_concepts": concepts_of(states[1], 4)}
    with pytest.raises(ValueError, match="3 original and 4 fine-tuned concepts"):
        shift_features(*features, concepts, head, root / "no", **given)


def test_a_model_or_features_of_another_width_leave_nothing(write, states, concepts, head, root):
    features = [write(name, Z) for name, Z in zip(("x", "y"), states, strict=True)]

    class Model(SimpleNamespace):
        __class__ = VLM  # as far as isinstance sees

    def wide(width):
        sized = SimpleNamespace(hidden_size=width)
        return Model(
            config=SimpleNamespace(get_text_config=lambda: sized),
            directory=None,
            fingerprint=None,
            unembed=head.unembed,
            tokenizer=head,
        )

    with pytest.raises(ValueError, match="the fine-tuned model is 9 wide, the original 8; a shift"):
        shift_features(*features, concepts, wide(8), root / "no", finetuned_vlm=wide(9))
    narrow = write("narrow", states[1][:, :7])
    with pytest.raises(ValueError, match="states are 7 wide, the original's 8"):
        shift_features(features[0], narrow, concepts, head, root / "no")
    assert not (root / "no").exists()


@pytest.mark.parametrize(
    ("site", "recorded", "given", "through"),
    [
        ("layers.3", None, None, True),
        ("norm", None, None, False),
        ("layers.3", None, False, False),
        ("layers.3", False, None, False),  # as the words of the concepts
        ("norm", None, True, True),
    ],
)
def test_words_are_read_through_the_norm_that_the_site_comes_before(
    write, states, concepts, head, root, site, recorded, given, through
):
    features = [write(name, Z, sites=(site,)) for name, Z in zip(("x", "y"), states, strict=True)]
    known = dataclasses.replace(concepts, source={"site": site}, through_norm=recorded)
    found = shift_features(*features, known, head, root / "shift", through_norm=given, **OPTIONS)
    assert found.source["words through the final norm"] is through


def test_concepts_of_another_model_are_refused(vlm, write, states, concepts, root):
    features = [write(name, Z) for name, Z in zip(("x", "y"), states, strict=True)]
    other = dataclasses.replace(concepts, source={"fingerprint": "0", "model": "other"})
    with pytest.raises(ValueError, match=r"states of 'other' \(0\); .* is another model"):
        shift_features(*features, other, vlm, root / "no")


def test_another_fine_tuned_model_than_that_of_the_states_is_refused(
    vlm, write, states, concepts, head, root
):
    models = {"x": "base", "y": "tuned"}
    features = [
        write(name, Z, model=models[name], fingerprint=name)
        for name, Z in zip(models, states, strict=True)
    ]
    width = vlm.config.get_text_config()
    head.config = SimpleNamespace(get_text_config=lambda: width)
    with pytest.raises(ValueError, match=r"states are those of 'tuned' \(y\); .* is another model"):
        shift_features(*features, concepts, head, root / "no", finetuned_vlm=vlm)
    assert not (root / "no").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"site": "layers.2"}, "concepts of site 'layers.2' cannot be moved on states of 'norm'"),
        ({"site": "norm", "fingerprint": "0"}, r"concepts are from model None \(0\), but .* \(1\)"),
    ],
)
def test_concepts_of_other_states_are_refused(write, states, concepts, head, root, source, message):
    manifest = {"model": "base", "fingerprint": "1"}
    features = [write(name, Z, **manifest) for name, Z in zip(("x", "y"), states, strict=True)]
    other = dataclasses.replace(concepts, source=source)
    with pytest.raises(ValueError, match=message):
        shift_features(*features, other, head, root / "no", site="norm")
    with pytest.raises(ValueError, match=message.replace("moved", "compared")):
        given = {"finetuned_concepts": other, "site": "norm"}
        shift_features(*features, concepts, head, root / "no", **given)
    assert not (root / "no").exists()


def test_the_command_says_what_is_wrong_in_one_line(xlvlm, write, states, concepts, root):
    write("x", states[0])
    write("y", states[1], samples=[{"id": f"t{i}"} for i in range(30)])
    concepts.save(root / "concepts")
    rest = ("--concepts", root / "concepts", "--model", "embedded", "--output", root / "shift")
    status, _, errors = xlvlm("shift", root / "x", root / "y", *rest)
    assert (status, "hold different samples (ids such as 's0' and 't0')" in errors) == (2, True)
    status, _, errors = xlvlm("shift", root / "x", root / "x", *rest, "--site", "layer")
    assert (status, "choose one that both hold, got 'layer'" in errors) == (2, True)
    both = ("--adapter", "a", "--finetuned-model", "b")
    status, _, errors = xlvlm("shift", root / "x", root / "x", *rest, *both)
    assert (status, "give one" in errors) == (2, True)
    assert not (root / "shift").exists()

"""Extraction with the embedded model on a few drawn scenes."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import Features, data, find_word
from xlvlm_jax.data.words import COLOURS, word_pattern
from xlvlm_jax.features import ExtractionSettings, extract, preflight
from xlvlm_jax.features.reader import samples_of
from xlvlm_jax.features.selection import Selection

from .conftest import digests

NORM = "language_model.model.norm"
LAYER = "language_model.model.layers.4"
SETTINGS = ExtractionSettings(
    sites=(NORM, LAYER),
    selection=Selection("class", "dog,cat,bird,rabbit"),
    batch_size=4,
    max_new_tokens=16,
)


@pytest.fixture(scope="module")
def features(vlm, samples, tmp_path_factory) -> Features:
    output = tmp_path_factory.mktemp("run") / "features"
    extract(vlm, samples, output, SETTINGS)
    return Features.open(output)


def test_rows_hold_the_states_that_predicted_the_token(vlm, samples, features):
    """Each row equals a teacher-forced pass over prompt and prediction, at its own position."""
    assert len(features.tokens) > 0
    for row, index in enumerate(features.sample_rows):
        sample = features.samples[index]
        text = f"{vlm.render(sample['prompt'])} {sample['prediction']}"
        inputs = vlm.process([text], [Image.open(sample["image"])])
        position = features.positions[row]
        assert inputs["input_ids"][0, position + 1] == features.tokens[row]
        states = vlm.states(inputs, sites=SETTINGS.sites)
        for site in SETTINGS.sites:
            expected = np.asarray(states[site][0, position])
            got = features.matrix(site)[row]
            assert np.abs(expected - got).max() < 1e-4 * np.abs(expected).max()


def test_predictions_are_stored_with_the_samples(features, samples):
    assert [s["id"] for s in features.samples] == [s.id for s in samples]
    assert all(s["prediction"] for s in features.samples)


def test_batch_size_does_not_change_the_rows(vlm, samples, features, tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_size=3)
    extract(vlm, samples, tmp_path / "features", settings)
    other = Features.open(tmp_path / "features")
    assert np.array_equal(other.tokens, features.tokens)
    assert np.array_equal(other.positions, features.positions)
    np.testing.assert_allclose(other.matrix(NORM), features.matrix(NORM), atol=1e-4, rtol=1e-4)


def test_questions_about_one_picture_share_its_encoding(vlm, pictures, encoded, tmp_path):
    asked = data.load("vqav2", pictures, "train")[:8]
    settings = dataclasses.replace(SETTINGS, selection=Selection("index", "-1"), max_new_tokens=3)
    results = []
    for size in (8, 1):
        extract(vlm, asked, tmp_path / str(size), dataclasses.replace(settings, batch_size=size))
        results.append(Features.open(tmp_path / str(size)))
    assert encoded[0] <= 4  # pictures, for eight questions
    together, apart = results
    assert np.array_equal(together.tokens, apart.tokens)
    np.testing.assert_allclose(together.matrix(NORM), apart.matrix(NORM), atol=1e-4, rtol=1e-4)


def test_an_interrupted_run_ends_with_the_same_bytes(vlm, samples, features, tmp_path):
    class StopHereError(Exception):
        pass

    def interrupt(done, total, rows):
        raise StopHereError

    output = tmp_path / "features"
    with pytest.raises(StopHereError):
        extract(vlm, samples, output, SETTINGS, progress=interrupt)
    with pytest.raises(ValueError, match="not finished"):
        Features.open(output)
    seen = []
    extract(vlm, samples, output, SETTINGS, progress=lambda *figures: seen.append(figures[0]))
    assert seen == [8, 10]
    assert digests(output) == digests(features.path)


def test_other_arguments_on_the_same_directory_are_refused(vlm, samples, features):
    other = dataclasses.replace(SETTINGS, max_new_tokens=5)
    with pytest.raises(ValueError, match="max_new_tokens: expected 16, got 5"):
        extract(vlm, samples, features.path, other)


@pytest.mark.parametrize("selection", ["index:-1", "before-special-tokens", "range:0:3"])
def test_every_sample_has_a_row_where_the_selection_looks_for_no_word(
    vlm, samples, tmp_path, selection
):
    settings = dataclasses.replace(SETTINGS, selection=Selection.parse(selection), sites=(NORM,))
    extract(vlm, samples[:4], tmp_path / "features", settings)
    features = Features.open(tmp_path / "features")
    assert features.sample_rows.tolist() == [0, 1, 2, 3]


def test_the_first_positions_of_the_prompt_are_those_of_a_forward_pass(vlm, samples, tmp_path):
    settings = dataclasses.replace(SETTINGS, selection=Selection.parse("index:70"), sites=(LAYER,))
    extract(vlm, samples[:2], tmp_path / "features", settings)
    features = Features.open(tmp_path / "features")
    assert features.positions.tolist() == [70, 70]
    for row, sample in enumerate(samples[:2]):
        inputs = vlm.process([vlm.render(sample.prompt)], [Image.open(sample.image)])
        expected = np.asarray(vlm.states(inputs, sites=[LAYER])[LAYER][0, 70])
        np.testing.assert_allclose(features.matrix(LAYER)[row], expected, atol=1e-4, rtol=1e-4)


def test_teacher_forcing_reads_the_references(vlm, samples, tmp_path):
    selection = Selection("token-of-interest", "the")
    settings = dataclasses.replace(
        SETTINGS, mode="teacher-forcing", selection=selection, sites=(NORM,)
    )
    summary = extract(vlm, samples, tmp_path / "features", settings)
    holding = [s for s in samples if "the" in s.references[0].split()]
    assert summary.rows == len(holding)
    assert summary.without_token == len(samples) - len(holding)


def test_an_unreadable_image_is_recorded_and_skipped(vlm, samples, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    mixed = [samples[0], dataclasses.replace(samples[1], image=broken), *samples[2:4]]
    summary = extract(vlm, mixed, tmp_path / "features", SETTINGS)
    assert [name for name, _ in summary.failed] == [samples[1].id]
    features = Features.open(tmp_path / "features")
    assert "not an image" in features.samples[1]["error"]
    assert "prediction" not in features.samples[1]
    assert 1 not in features.sample_rows
    with pytest.raises(OSError, match="not an image"):
        extract(vlm, mixed, tmp_path / "strict", SETTINGS, strict=True)


def test_the_words_of_a_class_are_found_whole(vlm, samples, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, selection=Selection("class", "colours", how="last"), sites=(NORM,)
    )
    extract(vlm, samples, tmp_path / "features", settings)
    features = Features.open(tmp_path / "features")
    assert features.manifest["selection"]["match"] == "word"
    assert "adapter" not in features.manifest  # as in manifests of earlier releases: they resume
    colour = word_pattern([form for word in COLOURS for form in (word, word.capitalize())])
    found = [colour.search(sample["prediction"]) for sample in features.samples]
    assert features.sample_rows.tolist() == [i for i, word in enumerate(found) if word]
    for token, row in zip(features.tokens, features.sample_rows, strict=True):
        assert found[row].group().endswith(vlm.tokenizer.decode([token]).strip())


def test_a_word_of_the_prompt_is_found_on_request(vlm, samples, tmp_path):
    """In generation and teacher forcing, at the position that predicts its first token."""
    selection = Selection("token-of-interest", "caption", generated_only=False)
    inputs = vlm.process([vlm.render(samples[0].prompt)], [Image.open(samples[0].image)])
    expected = find_word(inputs["input_ids"], vlm.tokenizer, "caption") - 1
    for mode in ("generate", "teacher-forcing"):
        settings = ExtractionSettings((NORM,), selection, mode=mode, batch_size=2, max_new_tokens=2)
        extract(vlm, samples[:2], tmp_path / mode, settings)
        features = Features.open(tmp_path / mode)
        assert features.positions.tolist() == [expected[0]] * 2
        assert vlm.tokenizer.decode(features.tokens[:1]).strip() == "caption"


@pytest.fixture(scope="module")
def odd(samples):
    """Returns samples; the question of the seventh contains the mark for an image."""
    refused = dataclasses.replace(samples[6], prompt="what is <image> ?")
    return [*samples[:6], refused, *samples[7:]]


def test_a_refused_sample_is_recorded_and_skipped(vlm, samples, odd, features, tmp_path):
    summary = extract(vlm, odd, tmp_path / "features", SETTINGS)
    assert [name for name, _ in summary.failed] == [odd[6].id]
    found = Features.open(tmp_path / "features")
    assert "the processor refuses it or its prompt" in found.samples[6]["error"]
    assert [s["id"] for s in found.samples] == [s.id for s in samples]
    others = features.sample_rows != 6
    np.testing.assert_array_equal(found.sample_rows, features.sample_rows[others])
    np.testing.assert_array_equal(found.tokens, features.tokens[others])
    np.testing.assert_allclose(found.matrix(NORM), features.matrix(NORM)[others], atol=1e-4)


def test_strict_names_a_refused_sample_and_keeps_what_was_computed(vlm, odd, tmp_path):
    output = tmp_path / "features"
    with pytest.raises(ValueError, match=f"sample {odd[6].id}: .* the processor refuses it"):
        extract(vlm, odd, output, SETTINGS, strict=True)
    kept = Features.open(output, allow_incomplete=True)
    assert [s["id"] for s in kept.samples] == [s.id for s in odd[:4]]
    extract(vlm, odd, output, SETTINGS)  # goes on, and skips it
    extract(vlm, odd, tmp_path / "whole", SETTINGS)
    assert digests(output) == digests(tmp_path / "whole")


def test_a_sample_without_a_reference_is_refused_before_the_run(vlm, samples, tmp_path):
    bare = [*samples[:5], dataclasses.replace(samples[5], references=())]
    settings = dataclasses.replace(SETTINGS, mode="teacher-forcing")
    with pytest.raises(ValueError, match=f"sample {samples[5].id} has no reference to force"):
        extract(vlm, bare, tmp_path / "features", settings)
    assert not (tmp_path / "features").exists()


def test_a_word_that_no_sample_predicts_is_named(vlm, samples, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, selection=Selection("token-of-interest", "skyline"), max_new_tokens=1
    )
    output = tmp_path / "features"
    with pytest.raises(ValueError, match=r"no sample of 2 .* words 'skyline', 'Skyline'; use"):
        extract(vlm, samples[:2], output, settings)
    assert not output.exists()
    missing = dataclasses.replace(samples[2], image=Path("nowhere.jpg"))
    with pytest.raises(
        ValueError, match=r"no sample of 2 pred.* \(1 more gave no state, the first: .*nowhere.jpg"
    ):
        extract(vlm, [*samples[:2], missing], output, settings)


def test_an_unknown_site_lists_the_nearest(vlm, samples, tmp_path):
    settings = dataclasses.replace(SETTINGS, sites=("language_model.layers.4",))
    with pytest.raises(ValueError, match=r"nearest: language_model\.model\.layers\.4"):
        extract(vlm, samples, tmp_path / "features", settings)
    assert not (tmp_path / "features").exists()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        dataclasses.replace(SETTINGS, batch_size=0)
    with pytest.raises(ValueError, match="mode must be one of generate, teacher-forcing"):
        dataclasses.replace(SETTINGS, mode="dream")


def test_a_file_in_the_place_of_the_output_is_one_line(vlm, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write features") as caught:
        extract(vlm, samples, tmp_path / "file" / "features", SETTINGS)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("site", "mode", "selection", "message"),
    [
        ("multi_modal_projector", "teacher-forcing", "index:5", "belong to patches, not tokens; c"),
        ("multi_modal_projector", "generate", "image", "projector' belong to patches, not tokens"),
        ("lm_head", "teacher-forcing", "token-of-interest:the", "for the tokens of prompts; gen"),
        ("lm_head", "generate", "index:-1", "for the tokens of prompts; generate with --generated"),
    ],
)
def test_sites_without_a_state_at_every_position(
    vlm, samples, tmp_path, site, mode, selection, message
):
    """Row 5 of a tower is a patch and not the prompt's fifth token."""
    chosen = Selection.parse(selection)
    settings = dataclasses.replace(SETTINGS, sites=(site,), mode=mode, selection=chosen)
    with pytest.raises(ValueError, match=message):
        extract(vlm, samples, tmp_path / "features", settings)
    with pytest.raises(ValueError, match=message):
        preflight(vlm, samples, tmp_path / "features", settings, models=2)
    assert not (tmp_path / "features").exists()


def test_the_head_has_a_state_for_each_generated_token(vlm, samples, tmp_path):
    selection = Selection("index", "0", generated_only=True)
    settings = ExtractionSettings(("lm_head",), selection, max_new_tokens=1, batch_size=2)
    extract(vlm, samples[:2], tmp_path / "features", settings)
    features = Features.open(tmp_path / "features")
    (site,) = features.sites
    assert features.matrix(site).argmax(axis=1).tolist() == features.tokens.tolist()


@pytest.fixture
def short():
    """Returns settings of a run that takes little time."""
    return ExtractionSettings((NORM,), Selection("index", "-1"), max_new_tokens=1, batch_size=2)


def test_other_pictures_on_the_same_directory_are_refused(vlm, samples, short, tmp_path):
    """Ids and prompts may be those of another data set; single pictures may be repaired."""

    def copied(name, changed):
        (tmp_path / name).mkdir()
        found = []
        for number, sample in enumerate(samples[:4]):
            image = tmp_path / name / sample.image.name
            Image.open(sample.image).rotate(90 if number in changed else 0).save(image, "PNG")
            found.append(dataclasses.replace(sample, image=image))
        return found

    class StopHereError(Exception):
        pass

    def interrupt(*_):
        raise StopHereError

    output = tmp_path / "features"
    before, other, repaired = copied("a", ()), copied("b", range(4)), copied("c", (3,))
    with pytest.raises(StopHereError):
        extract(vlm, before, output, short, progress=interrupt)
    message = rf"pictures in {tmp_path}/a; those in {tmp_path}/b are others, use the same"
    with pytest.raises(ValueError, match=message):
        extract(vlm, other, output, short)
    shutil.rmtree(tmp_path / "a")  # moved, with one that was repaired
    assert extract(vlm, repaired, output, short).samples == 4
    with pytest.raises(ValueError, match="are others, use the same ones to resume"):
        extract(vlm, other, output, short)  # also of a complete run
    assert all(Path(s["image"]).parent.name == "c" for s in Features.open(output).samples)


def test_samples_of_features_lose_what_that_run_said_of_them(vlm, samples, short, tmp_path):
    missing = dataclasses.replace(samples[1], image=tmp_path / "later.jpg")
    extract(vlm, [samples[0], missing], tmp_path / "first", short)
    shutil.copy(samples[1].image, tmp_path / "later.jpg")
    again = samples_of(Features.open(tmp_path / "first"))
    assert [set(sample.metadata) & {"error"} for sample in again] == [set(), set()]
    forced = dataclasses.replace(short, mode="teacher-forcing")
    assert extract(vlm, again, tmp_path / "second", forced).failed == ()
    second = Features.open(tmp_path / "second")
    assert second.sample_rows.tolist() == [0, 1]
    assert not any("prediction" in sample for sample in second.samples)


def test_edits_need_a_name(vlm, samples, short, tmp_path):
    with pytest.raises(ValueError, match="edits are given without steering, which says what they"):
        extract(vlm, samples, tmp_path / "features", short, edits=lambda vlm, inputs: {})

"""Samples are read on demand: the right values, and no others."""

import json

import numpy as np
import pytest

from xlvlm_jax import Features
from xlvlm_jax.concepts.scores.attributes import known_attributes
from xlvlm_jax.concepts.stage import decompose_features
from xlvlm_jax.features import samples as module
from xlvlm_jax.features.manifest import SAMPLES
from xlvlm_jax.features.samples import StoredSamples, columns, unplaced_pairs
from xlvlm_jax.features.writer import FeaturesWriter

N = 9000  # more than two blocks


@pytest.fixture
def features(tmp_path):
    """Returns one row per sample, in two groups; the samples' lines have many lengths."""
    with FeaturesWriter(tmp_path / "features", {}) as writer:
        rows = np.arange(N)
        group = rows % 2
        described = [
            {"id": f"s{i}", "text": "x" * (i % 7) + "é\n", "attributes": {"group": int(i % 2)}}
            for i in range(N)
        ]
        states = np.eye(4, dtype="f4")[group] * 9
        writer.append(described, {"norm": states}, rows, rows, rows)
        writer.close()
    return Features.open(tmp_path / "features")


@pytest.fixture
def parsed(monkeypatch):
    """Returns the numbers of the lines that were parsed."""
    numbers, parse = [], StoredSamples._parse

    def counted(self, number, line):
        numbers.append(number)
        return parse(self, number, line)

    monkeypatch.setattr(StoredSamples, "_parse", counted)
    return numbers


def test_samples_are_those_of_the_file(features):
    lines = (features.path / "samples.jsonl").read_bytes().splitlines()
    expected = [json.loads(line) for line in lines]
    assert len(features.samples) == N
    assert features.samples == expected and expected == features.samples
    assert features.samples[np.int64(4097)] == expected[4097]
    assert features.samples[-1] == expected[-1]
    assert features.samples[4090:4100] == expected[4090:4100]
    assert features.samples[::-4000] == expected[::-4000]
    assert features.samples[5:3] == []
    assert columns(features.samples, "id", "none") == ([x["id"] for x in expected], [None] * N)
    with pytest.raises(IndexError, match="sample 9000 of 9000"):
        features.samples[N]


@pytest.mark.wrong_types  # checking `samples` reads one
def test_only_requested_samples_are_parsed(features, parsed):
    opened = Features.open(features.path)
    assert len(opened.samples) == N and parsed == []
    assert opened.samples[8123]["id"] == "s8123"
    assert opened.samples[3:5][1]["id"] == "s4"
    assert parsed == [8123, 3, 4]


@pytest.mark.wrong_types  # checking `samples` reads one
def test_decomposing_reads_no_sample(features, tmp_path, parsed, monkeypatch):
    monkeypatch.setattr(StoredSamples, "_starts", None)  # not even at where they begin
    opened = Features.open(features.path)
    decompose_features(opened, tmp_path / "whole", 2, "kmeans")
    decompose_features(opened, tmp_path / "streamed", 2, "kmeans", stream=True)
    assert parsed == []


@pytest.mark.wrong_types  # checking `samples` reads one
def test_attributes_are_read_in_one_pass(features, parsed):
    known = known_attributes(features)
    assert parsed == list(range(N))
    assert known["group"].values == ["0", "1"]
    np.testing.assert_array_equal(known["group"].codes, np.arange(N) % 2)


@pytest.mark.wrong_types  # checking the samples reads one
def test_lines_that_two_models_share_are_parsed_once(tmp_path, parsed):
    def stored(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts))
        return StoredSamples(path, len(texts), path.stat().st_size)

    ours = stored("a", [(0, "cat"), (1, "dog"), (2, "bird")])
    theirs = stored("b", [(0, "cat"), (1, "a dog"), (2, "bird")])
    pairs = list(unplaced_pairs(ours, theirs))
    assert parsed == [0, 1, 1, 2]
    assert pairs == list(zip(ours, theirs, strict=True))
    assert pairs == list(unplaced_pairs(list(ours), list(theirs)))
    with pytest.raises(ValueError, match="shorter than"):
        list(unplaced_pairs(ours, stored("c", [(0, "cat")])))


@pytest.mark.wrong_types  # checking `samples` reads one
def test_pictures_are_located_by_a_few_names(tmp_path, parsed, monkeypatch):
    with FeaturesWriter(tmp_path / "run", {}) as writer:
        (tmp_path / "pictures").mkdir()
        images = [tmp_path / "pictures" / f"{i}.png" for i in range(100)]
        for image in images:
            image.touch()
        writer.record_pictures(images)
        described = [{"id": str(i), "image": f"{i}.png"} if i % 10 == 9 else {} for i in range(100)]
        writer.append(described, {}, *np.zeros((3, 0), int))
        writer.close()
    found = Features.open(tmp_path / "run").samples
    assert parsed == []
    assert found[99]["image"] == str(images[99])
    assert len(parsed) == 1 + 8  # a sample without "image" is not parsed for its name
    moved = Features.open(tmp_path / "run").samples
    monkeypatch.chdir("/")
    assert [sample.get("image") for sample in moved][9::10] == list(map(str, images[9::10]))


def test_the_text_of_features_is_short(features):
    text = repr(features)
    assert text == f"Features({str(features.path)!r}, sites: norm; 9,000 rows of 9,000 samples)"
    assert len(repr(features.samples)) < len(str(features.path)) + 60


def test_a_run_resumes_only_after_readable_samples(tmp_path):
    with FeaturesWriter(tmp_path, {}) as writer:
        writer.append([{"id": "0"}, {"id": "1"}], {}, *np.zeros((3, 0), int))
    file = tmp_path / SAMPLES
    file.write_bytes(file.read_bytes().replace(b'"1"', b'"1}'))
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 2 is not a JSON object"):
        FeaturesWriter(tmp_path, {})


@pytest.mark.parametrize("block", [1, 3, 2**22])
def test_lines_are_found_for_any_block_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"a":1}\n{}\n{"a":3}rest of an append that failed')
    found = StoredSamples(path, 3, 18)
    assert [sample.get("a") for sample in found] == [1, None, 3]
    with pytest.raises(ValueError, match="3 samples, expected 4; extract the features again"):
        list(StoredSamples(path, 4, 18))


def test_a_notebook_shows_sites_and_settings(tmp_path):
    manifest = {"model": "<tiny>", "selection": {"mode": "last"}, "sites": ["norm"]}
    with FeaturesWriter(tmp_path / "f", manifest) as writer:
        states = {"norm": np.zeros((3, 4), "f4")}
        samples = [{"id": "a", "attributes": {"group": 7}}, {"id": "b"}]
        writer.append(samples, states, np.array([0, 0, 1]), np.arange(3), np.array([5, 6, 7]))
        writer.close()
    features = Features.open(tmp_path / "f")
    shown = features._repr_html_()
    assert "3 rows of 2 samples" in shown and "norm</th><td>3</td><td>4</td>" in shown
    assert "model</th><td>&lt;tiny&gt;</td>" in shown
    assert "selection: mode</th><td>last</td>" in shown

    pytest.importorskip("pandas")
    table = features.to_pandas()
    assert list(table.columns) == ["position", "token", "sample.id", "sample.attributes.group"]
    assert table["sample.id"].tolist() == ["a", "a", "b"]
    assert table["token"].tolist() == features.tokens.tolist() == [5, 6, 7]
    assert table.index.tolist() == [0, 1, 2]
    assert table["sample.attributes.group"].fillna(-1).tolist() == [7, 7, -1]

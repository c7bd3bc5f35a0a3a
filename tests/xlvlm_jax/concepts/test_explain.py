"""The concepts of one sample: by hand, its figure, the command, and messages."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import Concepts, Features
from xlvlm_jax.concepts.explain import explain_sample
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report.sample_figure import picture_strip, plot_sample


@pytest.fixture
def run(tmp_path):
    """Returns features of three samples, the last without a state, and three grounded centroids."""
    states = np.float32([[0, 0], [4, 0], [4, 2]])  # one of sample 0, two of sample 1
    with FeaturesWriter(tmp_path / "features", {"model": "m"}) as writer:
        samples = [{"id": f"s{i}", "image": str(tmp_path / f"{i}.png")} for i in range(3)]
        samples[1]["prediction"] = "a dog"
        writer.append(samples, {"s": states}, np.array([0, 1, 1]), np.arange(3), np.arange(3))
        writer.close()
    Image.new("RGB", (9, 9), (255, 0, 0)).save(tmp_path / "1.png")
    concepts = Concepts.from_components(np.float32([[0, 0], [4, 1], [9, 9]]), "kmeans")
    concepts = Concepts(
        components=concepts.components,
        method="kmeans",
        words=[["sea"], ["dog", "pup"], []],
        images=[[], [str(tmp_path / "1.png")], []],
        source={"site": "s", "features": str(tmp_path / "features")},
    )
    concepts.save(tmp_path / "concepts")
    return tmp_path


def test_by_hand(run):
    found = explain_sample(
        Features.open(run / "features"), Concepts.load(run / "concepts"), "s1", num_concepts=2
    )
    assert (found.sample, found.prediction) == ("s1", "a dog")
    first, second = found.concepts
    # Both states are at distance 1 from the second centroid.
    assert (first.concept, first.words) == (1, ["dog", "pup"])
    assert first.activation == pytest.approx(1 / (1 + 1))
    # At distance 4 and sqrt(20) from the first.
    assert second.concept == 0
    assert second.activation == pytest.approx((1 / 5 + 1 / (1 + 20**0.5)) / 2)


def test_by_the_name_of_the_image_and_as_a_figure(run):
    features, concepts = Features.open(run / "features"), Concepts.load(run / "concepts")
    found = explain_sample(features, concepts, "1.png")
    assert len(found.concepts) == 3
    plot_sample(found, run / "explain.png")
    assert Image.open(run / "explain.png").width > 400
    strip = picture_strip([str(run / "1.png"), None, str(run / "0.png")], count=3)
    assert strip.shape == (96, 300, 3)
    assert strip[50, 50].tolist() == [255, 0, 0] and (strip[:, 100:] == 238).all()


def test_command(run, xlvlm):
    status, out, errors = xlvlm(
        *("explain", run / "concepts", "s1", "--num-concepts", 1, "--output", run / "e.png")
    )
    assert status == 0, errors
    assert "dog, pup" in out and "s1: a dog" in out and (run / "e.png").is_file()
    status, _, errors = xlvlm("explain", run / "concepts", "s1", "--output", run / "e.html")
    assert status == 0, errors
    page = (run / "e.html").read_text()
    assert "Why “a dog”" in page and page.count("<article") == 3
    assert "Without it" not in page and 'class="map"' not in page
    status, _, errors = xlvlm("explain", run / "concepts", "s9")
    assert status == 2 and "expected an ID such as s0, s1, s2" in " ".join(errors.split())


def test_a_single_centroid_is_refused_before_a_model_is_loaded(run, xlvlm):
    concepts = Concepts.from_components(np.float32([[0, 0]]), "kmeans")
    dataclasses.replace(concepts, words=[["sea"]]).save(run / "one")
    status, _, errors = xlvlm(
        *("explain", run / "no model", run / "1.png", "--concepts", run / "one")
    )
    assert status == 2 and "a single centroid of 'kmeans' has no direction" in errors


def test_messages(run):
    features, concepts = Features.open(run / "features"), Concepts.load(run / "concepts")
    with pytest.raises(ValueError, match="sample 's2' has no states in"):
        explain_sample(features, concepts, "s2")
    other = dataclasses.replace(concepts, source={"site": "t"})
    with pytest.raises(ValueError, match="concepts of site 't' cannot be explained on states of"):
        explain_sample(features, other, "s1", site="s")
    with pytest.raises(ValueError, match="num_concepts must be at least 1, got 0"):
        explain_sample(features, concepts, "s1", num_concepts=0)

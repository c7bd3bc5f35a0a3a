"""Maps over each concept's own pictures: which, on disk, in the report, and messages."""

from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features
from xlvlm_jax.concepts.stage import ground_concepts, top_samples
from xlvlm_jax.concepts.stored_maps import CellValues, load_maps, map_top_pictures, save_maps
from xlvlm_jax.data import folder, prompts
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report.cards import read_section
from xlvlm_jax.report.map_overlays import with_overlays
from xlvlm_jax.report.thumbnails import thumbnails
from xlvlm_jax.storage.same_model import model_of

from .conftest import SITE


def corners(values):
    """Means of the top right and the bottom left quarter, without cells at their edges."""
    one = values.reshape(8, 8)
    return one[0:3, 5:8].mean(), one[5:8, 0:3].mean()


@pytest.fixture
def run(vlm, red_and_blue, squares, tmp_path):
    """Features of two rows per picture, and concepts that are active in some of them."""
    samples = folder.samples_of([squares], prompts.CAPTION)
    index = np.array([0, 0, 1, 1, 2, 2])
    with FeaturesWriter(tmp_path / "features", model_of(vlm)) as writer:
        states = {SITE: np.zeros((6, 192), np.float32)}
        described = [sample.to_dict() for sample in samples]
        writer.append(described, states, index, index, index)
        writer.close()
    codes = np.float32([[3, 0], [4, 0], [5, 1], [0, 0], [1, 0], [1, 2]])
    source = red_and_blue.source | {"features": str(tmp_path / "features")}
    Concepts(red_and_blue.components, codes, method="kmeans", source=source).save(
        tmp_path / "concepts"
    )
    return tmp_path


def test_maps_of_other_concepts_do_not_stay(run):
    concepts = Concepts.load(run / "concepts")
    cells = CellValues(np.ones(1, np.float32), np.ones((1, 4), np.float32))
    save_maps(run / "concepts", concepts, {(0, 0): cells})
    concepts.save(run / "concepts")  # as grounding does
    assert list(load_maps(run / "concepts", concepts)) == [(0, 0)]
    other = Concepts(2 * concepts.components, concepts.activations, method="kmeans")
    other.save(run / "concepts")
    assert load_maps(run / "concepts", other) == {}


def test_each_sample_once(run):
    features = Features.open(run / "features")
    concepts = Concepts.load(run / "concepts")
    assert top_samples(features, concepts.activations, 2) == [[1, 0], [2, 1]]
    assert top_samples(features, concepts.activations, 0) == [[], []]


def test_no_maps(run, xlvlm):
    concepts = Concepts.load(run / "concepts")
    save_maps(run / "concepts", concepts, {})
    assert load_maps(run / "concepts", concepts) == {}
    dead = Concepts(concepts.components, np.zeros((6, 2), np.float32), source=concepts.source)
    dead.save(run / "concepts")
    # Before the model is looked for.
    status, _, errors = xlvlm("map", "no-model", "--concepts", run / "concepts", "--overwrite")
    assert status == 2 and "no row activates a concept of" in errors


def test_each_map_is_kept_alone(run, vlm):
    found = map_top_pictures(vlm, Concepts.load(run / "concepts"), Features.open(run / "features"))
    assert len(found) == 5
    # Views would keep the maps of all concepts in memory.
    assert all(cells.values.base is None for cells in found.values())


def test_grounding_names_each_picture_once(run, vlm):
    grounded = ground_concepts(run / "concepts", vlm, Features.open(run / "features"))
    assert [[image.rsplit("/")[-1] for image in images] for images in grounded.images] == [
        ["under.png", "top.png", "without.png"],
        ["without.png", "under.png"],  # the third does not activate it
    ]


def test_samples_without_a_picture_show_none(run, vlm):
    """As those of an imported file that names no pictures."""
    index, samples = np.array([0, 0, 1, 1, 2, 2]), [{"id": "a", "image": "a.png"}, {}, {}]
    with FeaturesWriter(run / "bare", model_of(vlm)) as writer:
        writer.append(samples, {SITE: np.zeros((6, 192), np.float32)}, index, index, index)
        writer.close()
    grounded = ground_concepts(run / "concepts", vlm, Features.open(run / "bare"))
    assert [[Path(image).name for image in images] for images in grounded.images] == [["a.png"], []]


def test_written_by_the_command_and_shown_in_the_report(run, vlm, xlvlm):
    status, out, errors = xlvlm("map", "embedded", "--concepts", run / "concepts")
    assert status == 0, errors
    assert "5 maps of 3 pictures" in out
    concepts, features = Concepts.load(run / "concepts"), Features.open(run / "features")
    stored = load_maps(run / "concepts", concepts)
    assert sorted(stored) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
    first = stored[0, 0]  # red, at the top right
    there, elsewhere = corners(first.values)
    assert there > elsewhere
    section = read_section(run / "concepts", features, {})
    images = [picture.image for card in section.cards for picture in card.pictures]
    (shown,) = with_overlays([section], run, features, thumbnails(images))
    assert all(picture.overlay for card in shown.cards for picture in card.pictures)
    status, _, errors = xlvlm("map", "embedded", "--concepts", run / "concepts")
    assert status == 2 and "exists; name another output" in errors


def test_maps_of_other_concepts(run, vlm):
    concepts, features = Concepts.load(run / "concepts"), Features.open(run / "features")
    found = map_top_pictures(vlm, concepts, features, num_images=1)
    assert sorted(found) == [(0, 1), (1, 2)]
    save_maps(run / "concepts", concepts, found)
    other = Concepts(concepts.components + 1, method="kmeans", source={"site": SITE})
    with pytest.raises(ValueError, match="of other concepts than those beside it"):
        load_maps(run / "concepts", other)
    (run / "concepts" / "maps.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"maps.safetensors.*write them again"):
        load_maps(run / "concepts", concepts)
    with pytest.raises(ValueError, match="the concepts have no activations of the 6 rows"):
        map_top_pictures(vlm, other, features)

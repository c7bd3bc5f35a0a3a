"""Maps on pictures through the model: their rows, the command, and messages."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from ports.inputs.patch_layout import PatchLayout, grid, latents
from xlvlm_jax import Concepts, SteeringVector
from xlvlm_jax.concepts.picture_maps import _Activations, map_pictures, picture_layouts
from xlvlm_jax.data import folder, prompts

from .conftest import SITE


def corners(one):
    """Means of the top right and the bottom left quarter, without cells at their edges."""
    return one[0:3, 5:8].mean(), one[5:8, 0:3].mean()


def test_rows_in_order_each_where_it_should_be(vlm, red_and_blue, squares):
    samples = folder.samples_of([squares], prompts.CAPTION)
    vector = np.asarray(red_and_blue.components[0] - red_and_blue.components[1])
    found = map_pictures(
        vlm,
        samples,
        concepts=red_and_blue,
        words=["red", "red"],
        vectors={"redder": (SITE, vector)},
        answers=["a red ball", "a red ball"],
    )
    assert [row.name for row in found.rows][2:] == ["“red”", "redder", "answer “a red ball”"]
    assert {row.name for row in found.rows[:2]} == {"concept 0: red", "concept 1: blue sea"}
    assert [row.unit for row in found.rows[1:]] == [
        "activation",
        "log-probability",
        "cosine",
        "length of the gradient",
    ]
    (red,) = [row for row in found.rows if row.name.startswith("concept 0")]
    cosine = found.rows[3]
    assert all(len(row.maps) == 3 and row.maps[0].shape == (8, 8) for row in found.rows)
    for row in (red, cosine):
        first, second = corners(row.maps[0]), corners(row.maps[1])
        assert first[0] > first[1] and second[1] > second[0]
    assert (found.rows[2].maps[0] <= 0).all() and (found.rows[4].maps[0] >= 0).all()
    np.testing.assert_allclose(found.boxes[0][0, 0], [0, 0, 1 / 8, 1 / 8])


@pytest.mark.parametrize("active", [0.02, 0.9])
def test_the_most_active_of_many_concepts(active):
    rng = np.random.default_rng(0)
    maps = [rng.random((200, *shape), np.float32) for shape in ((3, 4), (5, 2), (3, 4))]
    maps = [np.where(rng.random(one.shape) < active, one, 0).astype(np.float32) for one in maps]
    maps[1][7, 4, 1], maps[0][11, 0, 0], maps[2][3, 1, 1] = 9, 8, np.nan
    kept, some = _Activations(()), _Activations([5, 11])
    for one in maps:
        kept.add(one)
        some.add(one)
    highest = np.max([np.nanmax(one, axis=(1, 2)) for one in maps], axis=0)
    assert kept.chosen(2) == [7, 11] and kept.chosen(5) == np.argsort(-highest)[:5].tolist()
    assert some.chosen(1) == [5, 11]
    for k in (7, 11, 3):
        for mine, theirs in zip(kept.maps_of(k), maps, strict=True):
            np.testing.assert_array_equal(mine, theirs[k])
    for mine, theirs in zip(some.maps_of(11), maps, strict=True):
        np.testing.assert_array_equal(mine, theirs[11])
    held = [stored for _, stored in kept._pictures]
    assert all(sparse.issparse(one) == (active < 0.3) for one in held)


def test_a_picture_without_cells():
    rng = np.random.default_rng(0)
    maps = [rng.random((20, *shape), np.float32) for shape in ((0, 4), (3, 2))]
    kept, some = _Activations(()), _Activations([5])
    for one in maps:
        kept.add(one)
        some.add(one)
    assert kept.chosen(1) == [maps[1].max(axis=(1, 2)).argmax()]
    for found in (kept.maps_of(5), some.maps_of(5)):
        for mine, theirs in zip(found, maps, strict=True):
            np.testing.assert_array_equal(mine, theirs[5])


def test_maps_of_a_picture_without_cells(vlm, red_and_blue, squares, monkeypatch):
    none = PatchLayout(np.zeros((0, 4), int), np.zeros((0, 4, 4)))
    monkeypatch.setattr(
        "xlvlm_jax.concepts.picture_maps.picture_layouts", lambda vlm, inputs, sizes: [[none]] * 3
    )
    samples = folder.samples_of([squares], prompts.CAPTION)
    found = map_pictures(vlm, samples, concepts=red_and_blue, answers=["a red ball"])
    assert [one.shape for row in found.rows for one in row.maps] == [(0, 4)] * 9


def test_command(vlm, red_and_blue, squares, tmp_path, xlvlm):
    red_and_blue.save(tmp_path / "concepts")
    for name in ("a", "b"):
        SteeringVector(np.ones(192, np.float32), SITE).save(tmp_path / name / "ones.safetensors")
    status, out, errors = xlvlm(
        *("map", "embedded", squares / "top.png", squares / "under.png"),
        *("--concepts", tmp_path / "concepts", "--concept", 1, "--word", "red"),
        *("--vector", tmp_path / "a" / "ones.safetensors", "--output", tmp_path / "maps.html"),
        *("--vector", tmp_path / "b" / "ones.safetensors"),
    )
    assert status == 0, errors
    assert "4 maps of 2 pictures" in out
    page = (tmp_path / "maps.html").read_text()
    assert page.count('class="map"') == 8 and "b/ones" in page and "concept 1: blue sea" in page
    assert "http" not in page.replace("http-equiv", "")
    status, _, errors = xlvlm(
        *("map", "embedded", squares, "--answer", "yes", "--site", "layers.1"),
        *("--prompt", "Is it red?", "--output", tmp_path / "maps.png"),
    )
    assert status == 0, errors
    assert Image.open(tmp_path / "maps.png").width > 300
    status, _, errors = xlvlm(
        *("map", "embedded", squares, "--word", "red", "--output", tmp_path / "maps.png")
    )
    assert status == 2 and "exists; name another output" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to map; give concepts, a word, a vector or an answer"),
        (["--word", "red"], "a word or an answer needs a site; name one with --site"),
        (["--word", "éø", "--site", "layers.1"], "no token of the model spells 'éø'"),
        (["--answer", "red", "--site", "model.norm"], "no later layer reads the image tokens at"),
        (["--word", "red", "--site", "layers.99"], "no site matches 'layers.99'; nearest"),
        (["--concepts", "C", "--concept", "7"], "there is no concept 7; expected 0 to 1"),
        (["--concepts", "C", "--site", "layers.2"], f"are of site '{SITE}', not of"),
        (["--concept", "7"], "--concept 7 needs the directory of concepts; give --concepts"),
        (["--concepts", "W"], "2 columns but the concepts have 3"),
    ],
)
def test_messages(red_and_blue, squares, tmp_path, monkeypatch, xlvlm, options, message):
    monkeypatch.chdir(tmp_path)
    red_and_blue.save("C")
    Concepts(np.eye(3), method="kmeans", source={"site": SITE}).save("W")
    message = message.replace("2 columns", "192 columns")
    status, _, errors = xlvlm("map", "embedded", squares / "top.png", *options, "--output", "m.png")
    assert status == 2 and message in " ".join(errors.split()), errors
    assert not (tmp_path / "m.png").exists()


def test_what_the_command_needs(squares, tmp_path, xlvlm):
    status, _, errors = xlvlm("map", "embedded", squares, "--word", "red")
    assert status == 2 and "no file to write; give --output" in errors
    status, _, errors = xlvlm("map", "embedded", "--word", "red")
    assert status == 2 and "no pictures given" in errors
    status, _, errors = xlvlm("map", "embedded", *[squares] * 14, "--output", "m.png")
    assert status == 2 and "42 pictures are too many for a figure; write a page" in errors
    status, _, errors = xlvlm("map", "embedded", squares / "none.png", "--output", "m.gif")
    assert status == 2 and "expected a file ending in .html, .png, .svg or .pdf" in errors
    status, _, errors = xlvlm("map", "embedded", squares / "none.png", "--output", "m.png")
    assert status == 2 and "none.png: no such image file or folder of images" in errors


@pytest.mark.wrong_types
def test_what_has_no_place():
    def model(row):
        return SimpleNamespace(
            patch_layout=lambda inputs, sizes: [row], config=SimpleNamespace(model_type="idefics2")
        )

    made = latents(np.arange(4).reshape(1, 4), [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="the image tokens of a idefics2 are latents"):
        picture_layouts(model([made]), {}, [(9, 9)])
    with pytest.raises(ValueError, match="a prompt has 2 pictures; maps need one"):
        picture_layouts(model([grid([0], 1, 1)] * 2), {}, [(9, 9)])

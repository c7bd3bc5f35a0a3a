"""The reference's files, as its code writes them with torch: imported, analysed, exported."""

import json
import os
import shutil
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from xlvlm_jax import Features
from xlvlm_jax.concepts.stage import decompose_features, ground_concepts
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.pth import (
    PthError,
    export_features,
    exporting,
    import_features,
    read_pth,
)
from xlvlm_jax.features.pth.writer import write_pth
from xlvlm_jax.features.reader import samples_of
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report import write_report

NORM, LAYER = "language_model.model.norm", "language_model.model.layers.31"
KEPT = [True, False, True, True, False, True]


def reference(dtype=torch.float16, positions=(1,) * 6, width=5) -> dict:
    """Returns what the reference saves for six samples in batches of one."""
    random = torch.Generator().manual_seed(0)
    return {
        "image": [[f"/data/train2014/{i}.jpg"] for i in range(6)],
        "model_predictions": [[f"a dog {i}"] for i in range(6)],
        "hidden_states": [
            {site: torch.randn(1, n, width, generator=random).to(dtype) for site in (NORM, LAYER)}
            for n in positions
        ],
        "token_of_interest_mask": [torch.tensor([kept]) for kept in KEPT],
        "targets": [["a dog$$the dog"]] * 6,
        "model_output": [torch.arange(i + 2)[None] for i in range(6)],
        "strange": {"nan": float("nan"), "t": (1, 2**70), 3: b"x", "none": None},
    }


def saved(path, data) -> str:
    torch.save(data, path)
    return path


def same(a, b) -> bool:
    """Compares bit by bit, including types and the order of keys."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_rows_are_those_that_the_mask_keeps(tmp_path):
    data = reference()
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "f", model="llava")
    assert features.sites == (NORM, LAYER)
    assert features.sample_rows.tolist() == [0, 2, 3, 5]
    assert (features.tokens == -1).all()
    expected = torch.cat([data["hidden_states"][i][NORM][0] for i in (0, 2, 3, 5)])
    np.testing.assert_array_equal(features.matrix(NORM), expected.float().numpy())
    assert features.samples[2] == {
        "id": "2",
        "image": "/data/train2014/2.jpg",
        "prediction": "a dog 2",
        "references": ["a dog", "the dog"],
    }
    assert features.manifest["model"] == "llava"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_comes_back_to_the_bit(tmp_path, dtype):
    data = reference(dtype, positions=(1, 2, 3, 1, 1, 4)) | {"strange": 1}
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "f")
    export_features(features, tmp_path / "y.pth")
    assert same(data, torch.load(tmp_path / "y.pth", weights_only=True))


def test_documented_layouts(tmp_path):
    """The mask is one tensor, images are plain paths, states have another dtype and module."""
    data = reference() | {
        "token_of_interest_mask": torch.tensor(KEPT),
        "image": [f"{i}.jpg" for i in range(6)],
    }
    for states in data["hidden_states"]:
        states[LAYER] = states[LAYER][0].to(torch.bfloat16)
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "f")
    assert features.sample_rows.tolist() == [0, 2, 3, 5]
    assert features.samples[3]["image"] == "3.jpg"
    assert features.manifest["dtype"] == "float32"  # holds both without rounding
    export_features(features, tmp_path / "y.pth")
    back = torch.load(tmp_path / "y.pth", weights_only=True)
    strange, expected = back.pop("strange"), data.pop("strange")
    assert same(data, back)
    assert strange["nan"] != strange["nan"] and strange["t"] == expected["t"]
    assert bytes(strange[3].numpy()) == b"x"  # bytes come back as a tensor of them


def test_several_positions_are_rows_or_their_mean(tmp_path):
    data = reference(torch.float32, positions=(2, 1, 3, 1, 1, 1))
    path = saved(tmp_path / "x.pth", data)
    each = import_features(path, tmp_path / "each")
    assert each.sample_rows.tolist() == [0, 0, 2, 2, 2, 3, 5]
    assert each.positions.tolist() == [0, 1, 0, 1, 2, 0, 0]
    mean = import_features(path, tmp_path / "mean", rows="mean", sites=[LAYER])
    expected = [data["hidden_states"][i][LAYER].mean(1)[0].numpy() for i in (0, 2, 3, 5)]
    np.testing.assert_allclose(mean.matrix(LAYER), expected, rtol=1e-6)
    assert mean.sites == (LAYER,)


def write_ours(path) -> Features:
    """Writes our own features: one sample with two rows, one with none."""
    random = np.random.default_rng(0)
    manifest = {"model": "m", "dtype": "bfloat16", "selection": {"mode": "all"}, "mode": "generate"}
    states = {site: random.normal(size=(4, 3)).astype(ml_dtypes.bfloat16) for site in (NORM, LAYER)}
    samples = [{"id": f"s{i}", "image": f"{i}.jpg", "prompt": "é", "n": [i]} for i in range(4)]
    with FeaturesWriter(path, manifest, dtype="bfloat16") as writer:
        writer.append(samples, states, np.array([0, 1, 1, 3]), np.arange(4) + 7, np.arange(4) + 40)
        writer.close()
    return Features.open(path)


def test_a_directory_of_ours_comes_back_to_the_bit(tmp_path):
    ours = write_ours(tmp_path / "ours")
    export_features(ours, tmp_path / "x.pth")
    again = import_features(tmp_path / "x.pth", tmp_path / "again")
    assert again.samples == ours.samples
    assert {key: again.manifest[key] for key in ours.manifest} == ours.manifest
    for name in ("sample_rows", "positions", "tokens"):
        np.testing.assert_array_equal(getattr(again, name), getattr(ours, name))
    for site in ours.sites:
        np.testing.assert_array_equal(again.matrix(site), ours.matrix(site))


def test_cells_of_image_tokens_come_back(tmp_path):
    cells = Cells(np.arange(12, dtype=np.int32).reshape(3, 4), np.eye(3, 4, dtype=np.float32))
    index = np.array([2, 0, 2])  # the second sample has none
    with FeaturesWriter(tmp_path / "ours", {}) as writer:
        samples = [{"id": f"s{i}"} for i in range(3)]
        writer.append(samples, {NORM: np.eye(3, dtype="f4")}, index, index, index, cells)
        writer.close()
    export_features(Features.open(tmp_path / "ours"), tmp_path / "x.pth")
    again = import_features(tmp_path / "x.pth", tmp_path / "again")
    assert again.cells is not None
    order = np.argsort(index, kind="stable")  # an import is in the order of samples
    np.testing.assert_array_equal(again.sample_rows, index[order])
    np.testing.assert_array_equal(again.cells.grid, cells.grid[order])
    np.testing.assert_array_equal(again.cells.box, cells.box[order])
    last = import_features(tmp_path / "x.pth", tmp_path / "last", rows="-1")
    assert last.cells is not None and last.cells.grid.tolist() == cells.grid[1:].tolist()
    assert import_features(tmp_path / "x.pth", tmp_path / "mean", rows="mean").cells is None


@pytest.mark.parametrize("missing", ["image", "prompt"])
def test_samples_without_a_picture_or_prompt_are_named(tmp_path, missing):
    data = reference() | {"instruction": ["What is this?"] * 6}
    assert len(samples_of(import_features(saved(tmp_path / "w.pth", data), tmp_path / "w"))) == 6
    data.pop({"image": "image", "prompt": "instruction"}[missing])
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "x")
    with pytest.raises(ValueError, match=f"sample '0' has no {missing}, so the model can't run"):
        samples_of(features)


def test_a_state_too_large_for_the_dtype_is_named(tmp_path):
    data = reference(torch.float32)
    data["hidden_states"][3][LAYER][0, 0, 2] = 1e6
    path = saved(tmp_path / "x.pth", data)
    message = "layers.31: row 2 has 1e[+]06, too large for float16; store the states as bfloat16"
    with pytest.raises(ValueError, match=message):
        import_features(path, tmp_path / "x", dtype="float16")
    assert not (tmp_path / "x").exists()


def test_an_export_holds_a_block_of_the_states(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_BLOCK_BYTES", 2**18)
    count, width = 2000, 2048
    Z = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    # The rows of sample i are not in its place, and the last two samples have none.
    of = np.random.default_rng(1).permutation(count)
    with FeaturesWriter(tmp_path / "f", {"model": "m"}) as writer:
        samples = [{"id": str(i), "image": "x.jpg"} for i in range(count + 2)]
        zeros = np.zeros(count, int)
        writer.append(samples, {NORM: Z}, of, zeros, zeros)
        writer.close()
    features = Features.open(tmp_path / "f")
    tracemalloc.start()
    export_features(features, tmp_path / "x.pth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < Z.nbytes / 4
    loaded = torch.load(tmp_path / "x.pth", weights_only=True, mmap=True)
    states = [each[NORM] for each in loaded["hidden_states"]]
    assert {tuple(each.shape) for each in states} == {(1, 1, width)}
    found = torch.cat([each[0] for each in states]).numpy()
    np.testing.assert_array_equal(found[of], Z)
    assert not found[count:].any()
    mask = torch.cat(loaded["token_of_interest_mask"])
    assert mask.tolist() == [True] * count + [False] * 2


def test_the_reference_can_read_an_export(tmp_path):
    """Follows the reference's code: stacks by module, averages over positions, applies the mask."""
    ours = write_ours(tmp_path / "ours")
    export_features(ours, tmp_path / "x.pth", sites=[NORM])
    data = torch.load(tmp_path / "x.pth", weights_only=True)
    matrix = torch.cat([each[NORM].mean(dim=1) for each in data["hidden_states"]])
    mask = torch.cat(data["token_of_interest_mask"], dim=0)
    assert mask.tolist() == [True, True, False, True]
    Z = ours.matrix(NORM)
    expected = np.stack([Z[0], Z[1:3].mean(0), Z[3]])
    np.testing.assert_allclose(matrix[mask].float().numpy(), expected, rtol=1e-2)
    assert data["image"][2][0] == "2.jpg"


def test_decompose_ground_and_report_work_on_an_import(tmp_path, three_words):
    path = saved(tmp_path / "x.pth", reference())
    run = tmp_path / "run"
    run.mkdir()
    features = import_features(path, run / "features", images=tmp_path / "pictures")
    decompose_features(features, run / "concepts", 2, "kmeans", site=NORM)
    grounded = ground_concepts(run / "concepts", three_words, features, num_images=1)
    assert grounded.images[0][0].startswith(str(tmp_path / "pictures" / "train2014"))
    assert "a dog" in write_report(run).read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": None}, "expected a dictionary with a list 'hidden_states'"),
        ({"hidden_states": []}, "is not a list of {module: tensor}"),
        ({"hidden_states": [{NORM: [1.0]}] * 6}, f"sample 0 has nothing at {NORM}; expected a"),
        ({"hidden_states": [{NORM: torch.zeros(2, 1, 5)}] * 6}, r"has \[2, 1, 5\] at"),
        ({"hidden_states": [{NORM: torch.zeros(1, 1, 5, dtype=torch.int64)}] * 6}, "are int64"),
        (
            {"hidden_states": [{NORM: torch.zeros(1, 1, 4 + i)} for i in range(6)]},
            r"sample 1 has shape \[1, 1, 5\] at .*, others have width 4",
        ),
        (
            {"hidden_states": [{NORM: torch.zeros(1, 1, 4), LAYER: torch.zeros(1, 2, 4)}] * 6},
            r"import them one by one \(--site\)",
        ),
        ({"token_of_interest_mask": [True]}, "is not a mask of 6 samples"),
        ({"token_of_interest_mask": torch.zeros(6)}, "its mask excludes every sample"),
    ],
)
def test_other_contents_are_refused_in_one_line(tmp_path, change, message):
    path = saved(tmp_path / "x.pth", reference() | change)
    with pytest.raises(ValueError, match=message) as error:
        import_features(path, tmp_path / "f")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert [each.name for each in tmp_path.iterdir()] == ["x.pth"]


def test_values_that_repeat_each_other_are_not_followed(tmp_path):
    doubled = ["x"]
    for _ in range(25):
        doubled = [doubled, doubled]
    path = saved(tmp_path / "x.pth", reference() | {"laughs": doubled})
    with pytest.raises(PthError, match="repeat each other too often"):
        import_features(path, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_the_commands(tmp_path, xlvlm):
    path = saved(tmp_path / "x.pth", reference())
    status, out, _ = xlvlm("import-pth", path, "--output", tmp_path / "f", "--site", NORM)
    assert (status, "6 samples, 4 rows" in out) == (0, True)
    status, out, _ = xlvlm("export-pth", tmp_path / "f", "--output", tmp_path / "y.pth")
    assert (status, "6 samples, 4 rows" in out) == (0, True)
    assert list(read_pth(tmp_path / "y.pth")["hidden_states"][0]) == [NORM]
    again = ("import-pth", path, "--output", tmp_path / "f")
    assert xlvlm(*again)[::2] == (
        2,
        f"error: {tmp_path / 'f'}: already exists; choose a new directory\n",
    )
    (tmp_path / "f" / "old").touch()
    status, out, errors = xlvlm(*again, "--overwrite")
    assert status == 0, errors
    assert not (tmp_path / "f" / "old").exists()
    status, _, errors = xlvlm("import-pth", path, "--output", path.parent, "--overwrite")
    assert status == 2 and "holds" in errors and path.is_file()
    status, _, errors = xlvlm("import-pth", tmp_path / "no.pth", "--output", tmp_path / "g")
    assert (status, "no such file" in errors) == (2, True)
    status, _, errors = xlvlm(*again[:3], tmp_path / "g", "--site", "orm")
    assert (status, "has no module 'orm'; expected one of" in errors) == (2, True)
    shutil.rmtree(tmp_path / "f" / "rows")
    assert xlvlm("export-pth", tmp_path / "f", "--output", tmp_path / "z.pth")[0] == 2
    assert not (tmp_path / "z.pth").exists()


def test_a_damaged_side_file_is_named(tmp_path):
    features = import_features(saved(tmp_path / "x.pth", reference()), tmp_path / "f")
    (tmp_path / "f" / "foreign.json").write_text(json.dumps({"array": "9", "dtype": "x"}))
    with pytest.raises(ValueError, match=r"foreign\.json: damaged .*; import the \.pth file again"):
        export_features(features, tmp_path / "y.pth")


@pytest.mark.parametrize("key", ["positions", "tokens", "cells", "boxes"])
def test_what_an_export_says_of_positions_has_their_number(tmp_path, key):
    rows = np.array([0, 0, 1])
    cells = Cells(np.ones((3, 4), np.int32), np.ones((3, 4), np.float32))
    with FeaturesWriter(tmp_path / "ours", {}) as writer:
        samples = [{"id": "a"}, {"id": "b"}, {"id": "without rows"}]
        writer.append(samples, {NORM: np.eye(3, dtype="f4")}, rows, rows, rows, cells)
        writer.close()
    export_features(Features.open(tmp_path / "ours"), tmp_path / "x.pth")
    data = torch.load(tmp_path / "x.pth", weights_only=True)
    own = data[key]
    data[key] = [own[0][:1], *own[1:]]
    shape = f"{[1, 4][: own[0].ndim]}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(PthError, match=rf"x\.pth: sample 0 has {shape} in '{key}'; expected a"):
        import_features(saved(tmp_path / "x.pth", data), tmp_path / "f")
    data[key] = own[:2]
    with pytest.raises(PthError, match=f"'{key}' is not a list with an entry for each of 3"):
        import_features(saved(tmp_path / "x.pth", data), tmp_path / "f")
    # In a file of XL-VLMs such a key means nothing.
    foreign = reference() | {"manifest": "{}", key: 1}
    assert len(import_features(saved(tmp_path / "y.pth", foreign), tmp_path / "y").tokens) == 4


class TestOverwriting:
    @pytest.fixture
    def path(self, tmp_path):
        return saved(tmp_path / "x.pth", reference())

    def test_features_alone_are_replaced(self, tmp_path, path):
        """Whatever else is in the directory would be lost."""
        run = tmp_path / "run"
        import_features(path, run / "features")
        (run / "concepts").mkdir()
        with pytest.raises(FileExistsError, match="run holds no features that could be replaced"):
            import_features(path, run, overwrite=True)
        (run / "features" / "pictures").mkdir()
        pictures = {"images": run / "features" / "pictures", "overwrite": True}
        with pytest.raises(
            FileExistsError, match=r"features holds .*pictures; choose a new direct"
        ):
            import_features(path, run / "features", **pictures)
        with pytest.raises(FileExistsError, match="holds more than features, such as 'pictures'"):
            import_features(path, run / "features", overwrite=True)
        (run / "features" / "pictures").rmdir()
        (run / "features" / "manifest.json").write_text("{}")
        with pytest.raises(FileExistsError, match="features holds no features that could be repl"):
            import_features(path, run / "features", overwrite=True)
        assert sorted(each.name for each in run.iterdir()) == ["concepts", "features"]
        (tmp_path / "empty").mkdir()
        import_features(path, tmp_path / "empty")

    def test_features_stay_where_they_can_not_be_replaced(self, tmp_path, path, monkeypatch):
        before = import_features(path, tmp_path / "f", model="first")
        replace = os.replace

        def fails(source, target):
            if str(source).endswith("importing") and str(target) == str(tmp_path / "f"):
                raise OSError("no space")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            import_features(path, tmp_path / "f", model="second", overwrite=True)
        assert Features.open(tmp_path / "f").manifest == before.manifest
        monkeypatch.undo()
        after = import_features(path, tmp_path / "f", model="third", overwrite=True)
        assert after.manifest["model"] == "third"
        assert sorted(each.name for each in tmp_path.iterdir()) == ["f", "x.pth"]


def test_images_and_samples_without_ids_are_named(tmp_path):
    data = reference() | {"instruction": ["What is this?"] * 6, "img_id": [*range(6)]}
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "f")
    assert [sample.image_id for sample in samples_of(features)] == [*"012345"]
    with FeaturesWriter(tmp_path / "g", {}) as writer:
        shown = {"image": "x.png", "prompt": "?"}
        rows = np.arange(3)
        samples = [shown, shown, {**shown, "id": 7}]
        writer.append(samples, {NORM: np.eye(3, dtype="f4")}, rows, rows, rows)
        writer.close()
    found = samples_of(Features.open(tmp_path / "g"))
    assert [(sample.id, sample.image_id) for sample in found] == [("0", ""), ("1", ""), ("7", "")]


def test_what_a_file_lost_is_not_restored(tmp_path):
    """Rounded states are exported in the dtype on disk, those of a wider one as they were."""
    for dtype, disk, written in (
        (torch.float64, "float16", torch.float16),
        (torch.float16, "bfloat16", torch.bfloat16),
        (torch.float16, "float32", torch.float16),
    ):
        folder = tmp_path / disk
        folder.mkdir()
        path = saved(folder / "x.pth", reference(dtype))
        features = import_features(path, folder / "features", dtype=disk)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            export_features(features, folder / "y.pth")
        told = {str(each.message) for each in caught}
        name = str(dtype).removeprefix("torch.")
        lost = f"states of {NORM} were {name} and were imported as {disk}; they are exported as"
        assert any(text.startswith(lost) for text in told) == (dtype != written)
        states = torch.load(folder / "y.pth", weights_only=True)["hidden_states"]
        assert {x.dtype for each in states for x in each.values()} == {written}


def test_pictures_of_one_name_are_told_apart(tmp_path):
    data = reference() | {"image": [[f"/data/{'ab'[i % 2]}/{i // 2}.jpg"] for i in range(6)]}
    for folder in "ab":
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pictures" / folder / f"{i}.jpg").touch()
            (tmp_path / "pictures" / f"{i}.jpg").touch()
    path = saved(tmp_path / "x.pth", data)
    whole = import_features(path, tmp_path / "whole", images=tmp_path / "pictures")
    ends = [sample["image"].split("pictures/")[1] for sample in whole.samples]
    assert ends == ["a/0.jpg", "b/0.jpg", "a/1.jpg", "b/1.jpg", "a/2.jpg", "b/2.jpg"]
    lost = import_features(path, tmp_path / "lost", images=tmp_path / "pictures" / "a")
    assert not any(os.path.exists(sample["image"]) for sample in lost.samples)


def test_references_are_texts(tmp_path):
    data = reference() | {"instruction": ["what?"] * 6}
    data["references"] = ["a dog", ["a cat"], ["a", "b"], "x", "y", "z"]
    features = import_features(saved(tmp_path / "x.pth", data), tmp_path / "features")
    found = [sample.references for sample in samples_of(features)]
    assert found[:3] == [("a dog",), ("a cat",), ("a", "b")]


def test_messages_of_an_import_name_the_file(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.pth", reference())
    with pytest.raises(PthError, match=r"x\.pth: sample 0 has 1 positions, none with the number 3"):
        import_features(path, tmp_path / "features", rows="3")
    assert not (tmp_path / "features").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match=r"\. holds the working directory; choose a new"):
        import_features(path, ".")


def test_a_file_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "x.pth", {"a": torch.arange(6.0).reshape(2, 3)})
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(np.asarray(read_pth(path)["a"]), np.arange(6).reshape(2, 3))


def test_an_export_makes_its_directory(tmp_path):
    write_pth(tmp_path / "new" / "x.pth", {"a": np.arange(3)})
    assert torch.load(tmp_path / "new" / "x.pth")["a"].tolist() == [0, 1, 2]

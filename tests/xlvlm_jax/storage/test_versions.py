"""Files of earlier releases load unchanged; later versions are refused by name.

tests/data/earlier contains files of the release before the present layout, and what that release's
own readers returned (see make.py there).
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from xlvlm_jax import Concepts, Features, SteeringVector, steering
from xlvlm_jax.causal import record as causal_files
from xlvlm_jax.concepts import stored_maps
from xlvlm_jax.evaluation import read_baseline
from xlvlm_jax.lenses import jacobian
from xlvlm_jax.shift import ShiftAnalysis
from xlvlm_jax.storage import versions

ARCHIVE = Path(__file__).parents[2] / "data" / "earlier" / "run.tar.gz"
CONCEPTS = Concepts(np.eye(2, dtype=np.float32))
FINETUNED, SITE = "finetuned:language_model.model.norm", "language_model.model.norm"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


@pytest.fixture(scope="module")
def expected(earlier) -> dict:
    return json.loads((earlier / "expected.json").read_text())


@pytest.fixture(scope="module")
def equal(earlier):
    arrays = np.load(earlier / "expected.npz")

    def check(found, name, **tolerances):
        np.testing.assert_allclose(
            np.asarray(found), arrays[name], **{"rtol": 0, "atol": 0} | tolerances
        )

    return check


def file_names(paths):
    return [Path(path).name for path in paths]


def test_features(earlier, expected, equal):
    features = Features.open(earlier / "features")
    assert features.complete and features.sites == (FINETUNED, SITE)
    equal(features.matrix(SITE), "states")
    equal(features.matrix(FINETUNED), "finetuned")
    for name in ("sample_rows", "positions", "tokens"):
        equal(getattr(features, name), name)
    assert [sample["prediction"] for sample in features.samples] == expected["predictions"]
    assert file_names(sample["image"] for sample in features.samples) == expected["images"]


def test_concepts(earlier, expected, equal):
    concepts = Concepts.load(earlier / "concepts")
    equal(concepts.components, "components")
    equal(concepts.activations, "activations")
    assert (concepts.method, concepts.objective) == ("kmeans", expected["objective"])
    assert concepts.words == expected["words"]
    assert [file_names(paths) for paths in concepts.images] == expected["pictures"]
    assert Path(concepts.source["features"]).name == "features"


def test_a_shift(earlier, expected, equal):
    shift = ShiftAnalysis.load(earlier / "shift")
    for name in ("shifts", "recovery", "matching", "counts"):
        equal(getattr(shift, name), name)
    equal(shift.spread.consistency, "consistency")
    assert shift.words == expected["shift words"]


def test_vectors_of_each_kind(earlier, expected, equal):
    vector = steering.load(earlier / "vector.safetensors")
    equal(vector.vector, "vector")
    assert (vector.site, vector.where) == (SITE, expected["where"])
    assert vector.source == expected["source"]
    low_rank = steering.load(earlier / "map.safetensors")
    equal(low_rank.down, "down")
    equal(low_rank.up, "up")
    network = steering.load(earlier / "network.safetensors")
    states = Features.open(earlier / "features").matrix(SITE)
    # Of products, whose last digits are the machine's.
    equal(network.shift(states[:2]), "network", rtol=1e-5, atol=1e-4)


def test_current_files_contain_their_version(tmp_path, earlier, equal):
    Concepts.load(earlier / "concepts").save(tmp_path / "concepts")
    ShiftAnalysis.load(earlier / "shift").save(tmp_path / "shift")
    steering.load(earlier / "vector.safetensors").save(tmp_path / "vector.safetensors")
    for file in ("concepts/concepts.json", "shift/shift.json"):
        assert json.loads((tmp_path / file).read_text())["version"] == versions.VERSION
    with safetensors.safe_open(tmp_path / "vector.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["version"]) == versions.VERSION
    again = SteeringVector.load(tmp_path / "vector.safetensors")
    equal(again.vector, "vector")
    equal(Concepts.load(tmp_path / "concepts").components, "components")
    equal(ShiftAnalysis.load(tmp_path / "shift").shifts, "shifts")


@pytest.mark.parametrize(
    ("file", "load", "advice"),
    [
        ("features/manifest.json", Features.open, "extract the features again"),
        ("concepts/concepts.json", Concepts.load, "decompose again"),
        ("shift/shift.json", ShiftAnalysis.load, "run `xlvlm shift` again"),
    ],
)
def test_a_directory_of_a_later_version_is_refused(tmp_path, earlier, file, load, advice):
    shutil.copytree(earlier, tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(ValueError) as refused:
        load(path.parent)
    assert str(refused.value) == (
        f"{path}: format version 2, expected 1; read it with the release that wrote it, or {advice}"
    )


def write_later(directory):
    """Writes a file of each further kind with version 2."""
    (directory / "causal.json").write_text('{"version": 2}')
    (directory / "summary.json").write_text('{"version": 2}')
    (directory / "predictions.jsonl").write_text("")
    maps = {name: np.zeros(1) for name in ("concept", "sample", "start", "values", "boxes")}
    file = directory / stored_maps.FILE
    safetensors.numpy.save_file(maps, file, {"version": "2", "digest": ""})
    described = {"kind": jacobian.KIND, "described": '{"version": 2}'}
    safetensors.numpy.save_file({"J.0": np.eye(2)}, directory / "lens.safetensors", described)


@pytest.mark.parametrize(
    ("file", "load", "advice"),
    [
        ("causal.json", causal_files.read, "score again"),
        (stored_maps.FILE, lambda path: stored_maps.load_maps(path, CONCEPTS), "map again"),
        ("summary.json", lambda path: read_baseline(path, []), "evaluate again"),
        (
            "lens.safetensors",
            lambda path: jacobian.load_jacobian_lens(path / "lens.safetensors"),
            "fit it again",
        ),
    ],
)
def test_a_further_file_of_a_later_version_is_refused(tmp_path, file, load, advice):
    write_later(tmp_path)
    with pytest.raises(ValueError) as refused:
        load(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / file}: format version 2, expected 1; read it with the release that wrote it, "
        f"or {advice}"
    )


@pytest.mark.parametrize("version", [1.0, True, "1", None, [1]])
@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("features/manifest.json", Features.open),
        ("concepts/concepts.json", Concepts.load),
        ("shift/shift.json", ShiftAnalysis.load),
    ],
)
def test_a_version_is_a_whole_number(tmp_path, earlier, file, load, version):
    """In Python, 1.0 and True equal 1, but no release wrote them."""
    folder = tmp_path / Path(file).parent
    shutil.copytree(earlier / Path(file).parent, folder)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    with pytest.raises(ValueError, match=re.escape(f"format version {version!r}, expected 1; ")):
        load(folder)


@pytest.mark.parametrize("name", ["vector", "map", "network"])
def test_a_vector_of_a_later_version_is_refused(tmp_path, earlier, name):
    with safetensors.safe_open(earlier / f"{name}.safetensors", "numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(earlier / f"{name}.safetensors")
    path = tmp_path / "later.safetensors"
    for version in ("2", "1.0"):  # metadata are JSON texts
        safetensors.numpy.save_file(tensors, path, metadata | {"version": version})
        with pytest.raises(ValueError) as refused:
            steering.load(path)
        assert str(refused.value) == (
            f"{path}: format version {version}, expected 1; read it with the release that wrote "
            "it, or fit it again"
        )

"""Steering vectors in XL-VLMs' files: against torch, by hand, and messages."""

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, steering

torch = pytest.importorskip("torch")


def fine(i, j, concepts):
    return SteeringVector(concepts[j] - concepts[i], "s", {"from": i, "to": j})


def test_vectors_that_torch_saved(tmp_path):
    concepts = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    saved = {
        "concepts1": concepts,
        "steering_vector_concept_0_to_1": concepts[0] - concepts[1],
        "steering_vector_shift_of_means": torch.tensor([1, 2], dtype=torch.float16),
        "steering_vector": concepts[:, None] - concepts[None],
    }
    torch.save(saved, tmp_path / "v.pth")
    vector = steering.import_vector(
        tmp_path / "v.pth", "layers.1", key="steering_vector_shift_of_means", where="generated"
    )
    np.testing.assert_array_equal(vector.vector, np.float32([1, 2]))
    assert (vector.site, vector.where, vector.source["method"]) == (
        *("layers.1", "generated", "imported"),
    )
    # As it is, whatever its name says.
    pair = steering.import_vector(tmp_path / "v.pth", "s", key="steering_vector_concept_0_to_1")
    np.testing.assert_array_equal(pair.vector, [-2, -4])
    with pytest.raises(ValueError, match="no vector 'steering_vector'; expected one of steering_v"):
        steering.import_vector(tmp_path / "v.pth", "s")


def test_vectors_that_torch_reads(tmp_path):
    one = SteeringVector(np.float32([3, 4]), "s")
    steering.export_vectors(one, tmp_path / "one.pth")
    read = torch.load(tmp_path / "one.pth", weights_only=True)
    assert list(read) == ["steering_vector"] and read["steering_vector"].tolist() == [3, 4]
    again = steering.import_vector(tmp_path / "one.pth", "s")
    np.testing.assert_array_equal(again.vector, one.vector)

    concepts = np.float32([[0, 1], [2, 5], [4, 4]])
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    steering.export_vectors([fine(i, j, concepts) for i, j in pairs], tmp_path / "fine.pth")
    read = torch.load(tmp_path / "fine.pth", weights_only=True)
    theirs = torch.tensor(concepts)
    torch.testing.assert_close(read["steering_vector"], theirs[:, None] - theirs[None])
    torch.testing.assert_close(read["steering_vector_concept_0_to_2"], theirs[0] - theirs[2])
    assert read["steering_vector_mean_of_directions"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="export each by itself"):
        steering.export_vectors([one, one], tmp_path / "no.pth")


def test_shifts_of_concepts_by_hand():
    shifts = np.float32([[1, 2], [0, 0], [3, 4]])
    source = {"model": "m", "fingerprint": "f", "seed": 0}
    found = steering.shift_vectors(shifts, np.array([2, 1, 9]), "s", source)
    assert list(found) == ["concept-0", "concept-2"]
    np.testing.assert_array_equal(found["concept-2"].vector, [3, 4])
    assert found["concept-0"].source["fingerprint"] == "f"
    with pytest.raises(ValueError, match="no concept has a shift"):
        steering.shift_vectors(shifts, np.array([0, 1, 0]), "s", source)

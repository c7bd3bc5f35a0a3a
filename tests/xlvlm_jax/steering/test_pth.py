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
    with pytest.raises(ValueError, match="there are no vectors to export; expected one or more"):
        steering.export_vectors([], tmp_path / "no.pth")
    with pytest.raises(ValueError, match="two vectors lead from concept 0 to 1, and would have"):
        steering.export_vectors([fine(0, 1, concepts)] * 2, tmp_path / "no.pth")
    assert not (tmp_path / "no.pth").exists()


def test_shifts_of_concepts_by_hand():
    shifts = np.float32([[1, 2], [0, 0], [3, 4]])
    source = {"model": "m", "fingerprint": "f", "seed": 0}
    found = steering.shift_vectors(shifts, np.array([2, 1, 9]), "s", source)
    assert list(found) == ["concept-0", "concept-2"]
    np.testing.assert_array_equal(found["concept-2"].vector, [3, 4])
    assert found["concept-0"].source["fingerprint"] == "f"
    with pytest.raises(ValueError, match="no concept has a shift"):
        steering.shift_vectors(shifts, np.array([0, 1, 0]), "s", source)


def test_a_network_that_torch_saved(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.ModuleDict(
        {"encoder": torch.nn.Linear(6, 4), "decoder": torch.nn.Linear(4, 6, bias=False)}
    )
    contexts = torch.randn(3, 6)
    expected = network["decoder"](torch.tanh(network["encoder"](contexts))).detach().numpy()
    torch.save(network.state_dict(), tmp_path / "net.pt")
    # Other entries are not read.
    torch.save({"steering_model": network.state_dict() | {"name": "net"}}, tmp_path / "in.pt")
    for name in ("net.pt", "in.pt"):
        read = steering.import_l2s(tmp_path / name, "layers.15", context_site="layers.30")
        np.testing.assert_allclose(read.shift(contexts.numpy()), expected, rtol=1e-5, atol=1e-6)
        assert (read.site, read.context_site) == ("layers.15", "layers.30")
    read.save(tmp_path / "net.safetensors")
    again = steering.load(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(again.shift(contexts.numpy()), read.shift(contexts.numpy()))
    torch.save({"encoder.weight": torch.ones(2, 3)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"no L2S network; expected encoder\.weight"):
        steering.import_l2s(tmp_path / "part.pt", "s")
    odd = {**network.state_dict(), "encoder.bias": torch.ones(5)}
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"shapes \(4, 6\), \(5,\) and \(6, 4\)"):
        steering.import_l2s(tmp_path / "odd.pt", "s")


def test_vectors_of_samples_that_torch_saved(tmp_path):
    stacked = torch.arange(6.0).reshape(3, 1, 2)
    torch.save({"steering_vector": stacked}, tmp_path / "p2s.pth")
    read = steering.import_sample_vectors(tmp_path / "p2s.pth", "layers.1", ["7", "9", "8"])
    np.testing.assert_array_equal(read.of(["8", "7"]).vectors, [[4, 5], [0, 1]])
    with pytest.raises(
        ValueError, match=r"'steering_vector' has shape \[3, 2\]; expected a vector"
    ):
        steering.import_sample_vectors(tmp_path / "p2s.pth", "s", ["7"])
    with pytest.raises(ValueError, match="3 sample ids some are the same"):
        steering.import_sample_vectors(tmp_path / "p2s.pth", "s", ["7", "7", "8"])


def test_networks_and_vectors_of_samples_from_the_command_line(xlvlm, tmp_path):
    torch.save({"steering_vector": torch.ones(2, 4)}, tmp_path / "p2s.pth")
    (tmp_path / "ids.txt").write_text("a\nb\n")
    command = ("import-pth", tmp_path / "p2s.pth", "--site", "layers.1")
    options = ("--sample-ids", tmp_path / "ids.txt", "--output", tmp_path / "p2s.safetensors")
    status, out, errors = xlvlm(*command, *options)
    assert status == 0, errors
    assert steering.load(tmp_path / "p2s.safetensors").ids == ("a", "b")
    status, _, errors = xlvlm(*command, *options, "--overwrite", "--rows", "mean")
    assert status == 2 and "--rows has no effect on vectors of samples; omit it" in errors
    layers = {"encoder.weight": torch.ones(2, 4), "encoder.bias": torch.ones(2)}
    torch.save({**layers, "decoder.weight": torch.ones(4, 2)}, tmp_path / "net.pt")
    status, out, errors = xlvlm(
        *("import-pth", tmp_path / "net.pt", "--site", "layers.1", "--context-site", "layers.2"),
        *("--output", tmp_path / "net.safetensors"),
    )
    assert status == 0, errors
    assert "L2S(2 hidden units, width 4, from 'layers.2' to 'layers.1'" in " ".join(out.split())

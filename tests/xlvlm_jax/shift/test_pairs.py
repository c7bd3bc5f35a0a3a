"""Which rows of two directories belong together."""

import numpy as np
import pytest

from xlvlm_jax.shift import match_samples
from xlvlm_jax.shift.pairs import common_site

SAMPLES = [{"id": name, "image_id": name} for name in "abcde"]
Z = np.arange(8, dtype="f4").reshape(4, 2)


def test_only_samples_with_rows_in_both_count(write):
    original = write("x", Z, samples=SAMPLES, rows=[0, 1, 2, 4])
    finetuned = write("y", Z, samples=SAMPLES[::-1], rows=[0, 1, 3, 4])  # e, d, b, a
    pairs = match_samples(original, finetuned)
    assert pairs.original.tolist() == [0, 1, 3]  # a, b, e
    assert pairs.finetuned.tolist() == [3, 2, 0]
    assert pairs.num_samples == 5


def test_several_rows_of_a_sample_are_paired_in_their_order(write):
    original = write("x", Z, samples=SAMPLES, rows=[0, 0, 0, 3])
    finetuned = write("y", Z, samples=SAMPLES, rows=[0, 0, 1, 3])
    pairs = match_samples(original, finetuned)
    assert (pairs.original.tolist(), pairs.finetuned.tolist()) == ([0, 1, 3], [0, 1, 3])


def test_samples_with_one_id_are_paired_in_their_order(write):
    samples = [{"id": "a", "prompt": p} for p in ("dog?", "cat?")] + [{"id": "b", "prompt": "?"}]
    original = write("x", Z, samples=samples, rows=[0, 1, 2, 2])
    other = [samples[2], *samples[:2]]
    pairs = match_samples(original, write("y", Z, samples=other, rows=[0, 0, 1, 2]))
    assert pairs.original.tolist() == [0, 1, 2, 3]
    assert pairs.finetuned.tolist() == [2, 3, 0, 1]
    assert pairs.num_samples == 3
    twice = write("same", Z, samples=samples, rows=[0, 1, 2, 2])
    assert match_samples(original, twice).finetuned.tolist() == [0, 1, 2, 3]


def test_samples_with_one_id_are_told_apart_by_prompt_and_picture(write):
    samples = [{"id": "a", "prompt": p} for p in ("dog?", "cat?")] + [{"id": "b", "prompt": "?"}]
    original = write("x", Z, samples=samples, rows=[0, 1, 2, 2])
    # One directory lacks the first of them, or has them in another order.
    fewer = match_samples(original, write("y", Z[:3], samples=samples[1:], rows=[0, 1, 1]))
    assert (fewer.original.tolist(), fewer.finetuned.tolist()) == ([1, 2, 3], [0, 1, 2])
    assert fewer.num_samples == 2
    swapped = write("z", Z, samples=samples[1::-1] + samples[2:], rows=[0, 1, 2, 2])
    assert match_samples(original, swapped).finetuned.tolist() == [1, 0, 2, 3]
    # Without prompts in one of them, in their order; prompts that neither has are other samples.
    bare = write("bare", Z, samples=[{"id": name} for name in "aab"], rows=[0, 1, 2, 2])
    assert match_samples(original, bare).finetuned.tolist() == [0, 1, 2, 3]
    other = [samples[1], samples[0] | {"prompt": "bird?"}, samples[2]]
    with pytest.raises(ValueError, match=r"sample 'a' has prompt 'dog\?' in .* and 'bird\?' in"):
        match_samples(original, write("other", Z, samples=other, rows=[0, 1, 2, 2]))


def test_swapping_the_directories_gives_the_same_pairs(write):
    random = np.random.default_rng(0)
    written = []
    for name in "xy":
        order = random.permutation(5)
        rows = np.sort(random.choice(5, 4, replace=False))
        written.append(write(name, Z, samples=[SAMPLES[i] for i in order], rows=rows))
    there, back = match_samples(*written), match_samples(*written[::-1])
    pairs = set(zip(there.original.tolist(), there.finetuned.tolist(), strict=True))
    assert pairs == set(zip(back.finetuned.tolist(), back.original.tolist(), strict=True))


def test_what_does_not_belong_together_is_refused(write):
    original = write("x", Z, samples=SAMPLES, rows=[0, 0, 1, 1], mode="generate")
    others = [{"id": f"{i}"} for i in range(4)]
    with pytest.raises(ValueError, match=r"different samples \(ids such as 'a' and '0'\)"):
        match_samples(original, write("other", Z, samples=others))
    with pytest.raises(ValueError, match="no common samples: of the 5 that both hold, 4 have"):
        match_samples(original, write("apart", Z, samples=SAMPLES, rows=[2, 2, 3, 4]))
    moved = [sample | {"image_id": "z"} for sample in SAMPLES]
    with pytest.raises(ValueError, match=r"sample 'a' has image_id 'a' in .* and 'z' in"):
        match_samples(original, write("moved", Z, samples=moved, rows=range(4)))
    forced = write("forced", Z, samples=SAMPLES, rows=range(4), mode="teacher-forcing")
    with pytest.raises(ValueError, match=r"mode 'generate', .* with 'teacher-forcing'; extract"):
        match_samples(original, forced)
    dog, cat = (
        write(word, Z, selection={"mode": "token-of-interest", "argument": word})
        for word in ("dog", "cat")
    )
    with pytest.raises(ValueError, match=r"token-of-interest:dog .* token-of-interest:cat"):
        match_samples(dog, cat)
    word = write("word", Z, selection=dog.manifest["selection"] | {"match": "word"})
    with pytest.raises(ValueError, match=r"dog \(match first-token\), .*:dog \(match word\)"):
        match_samples(dog, word)


def test_the_site_is_one_that_both_have(write):
    x, y = write("x", Z, sites=("a", "b")), write("y", Z, sites=("b", "c"))
    assert common_site(x, y, None) == "b"
    for site in ("a", "d"):
        with pytest.raises(ValueError, match=f"sites a, b and .* b, c; choose one .* '{site}'"):
            common_site(x, y, site)

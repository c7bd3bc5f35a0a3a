"""Token selections, without a model: each made-up state tells its position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.features import token_positions
from xlvlm_jax.features.token_positions import Positions

END, PAD, IMAGE, DOG, CAT = 1, 0, 9, 50, 51

# The prompts are [20 9 9 21] and [22 9], the answers [30 50 50 1] and [51 31 32 33 34].
PROMPT = np.array([[20, IMAGE, IMAGE, 21], [PAD, PAD, 22, IMAGE]])
MASK = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
ANSWER = np.array([[30, DOG, DOG, END, PAD], [CAT, 31, 32, 33, 34]])


def of_generation(prompt=PROMPT, mask=MASK, answer=ANSWER):
    return Positions.of_generation(prompt, mask, answer, image_token_ids=IMAGE, end_ids=[END])


def test_of_generation_by_hand():
    positions = of_generation()
    # the state at the last prompt position, 3, predicted the first token of the answer
    assert positions.predicted[0, :7].tolist() == [IMAGE, IMAGE, 21, 30, DOG, DOG, END]
    assert positions.predicted[1, 2:].tolist() == [IMAGE, CAT, 31, 32, 33, 34]
    T, F = True, False
    assert positions.is_prompt.tolist() == [[T] * 4 + [F] * 4, [F, F, T, T] + [F] * 4]
    assert positions.is_generated.tolist() == [[F] * 3 + [T] * 5] * 2
    assert positions.is_image.tolist() == [[F, T, T] + [F] * 5, [F, F, F, T] + [F] * 4]
    # what predicted the pad token after the end is padding, what predicted the end is not
    assert positions.is_padding.tolist() == [[F] * 7 + [T], [T, T] + [F] * 6]


def test_of_generated_is_the_generated_part_of_of_generation():
    alone, both = Positions.of_generated(ANSWER, end_ids=END), of_generation()
    for field in ("predicted", "is_prompt", "is_generated", "is_padding"):
        np.testing.assert_array_equal(getattr(alone, field), getattr(both, field)[:, 3:])


def test_of_teacher_forcing_by_hand():
    # prompt [20 9 21], answer [30 50 1], padded on the left by one
    input_ids = np.array([[PAD, 20, IMAGE, 21, 30, DOG, END]])
    mask = np.array([[0, 1, 1, 1, 1, 1, 1]])
    answer = np.array([[0, 0, 0, 0, 1, 1, 1]])
    positions = Positions.of_teacher_forcing(input_ids, mask, answer, image_token_ids=IMAGE)
    T, F = True, False
    assert positions.predicted[0, 1:6].tolist() == [IMAGE, 21, 30, DOG, END]
    assert positions.is_prompt.tolist() == [[F, T, T, T, F, F, F]]
    assert positions.is_generated.tolist() == [[F, F, F, T, T, T, F]]
    assert positions.is_image.tolist() == [[F, F, T, F, F, F, F]]
    assert positions.is_padding.tolist() == [[T, F, F, F, F, F, T]]


def test_teacher_forcing_selects_what_generation_does():
    full = np.concatenate([PROMPT[:1], ANSWER[:1, :4]], axis=1)
    forced = Positions.of_teacher_forcing(
        full, np.ones_like(full), np.arange(8)[None] >= 4, image_token_ids=IMAGE
    )
    generated = Positions(*(x[:1] for x in of_generation()))
    for select in SELECTIONS:
        assert where(select(forced)) == where(select(generated))


def where(keep):
    return [np.nonzero(row)[0].tolist() for row in np.asarray(keep)]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (lambda p: token_positions.everything(p), [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]]),
        (
            lambda p: token_positions.everything(p, generated_only=True),
            [[3, 4, 5, 6], [3, 4, 5, 6, 7]],
        ),
        (lambda p: token_positions.index(p, 1), [[1], [3]]),
        (lambda p: token_positions.index(p, -1), [[6], [7]]),
        (lambda p: token_positions.index(p, 0, generated_only=True), [[3], [3]]),
        (lambda p: token_positions.index(p, 6), [[6], []]),  # the second sample has 6 positions
        (lambda p: token_positions.index(p, -7), [[0], []]),
        (lambda p: token_positions.interval(p, 1, 3), [[1, 2], [3, 4]]),
        (lambda p: token_positions.interval(p, -2), [[5, 6], [6, 7]]),
        (lambda p: token_positions.interval(p, None, 1, generated_only=True), [[3], [3]]),
        (lambda p: token_positions.interval(p, 3, 3), [[], []]),
        (lambda p: token_positions.token_of_interest(p, DOG), [[4], []]),
        (lambda p: token_positions.token_of_interest(p, [DOG, CAT]), [[4], [3]]),
        (
            lambda p: token_positions.token_of_interest(p, IMAGE),
            [[], []],
        ),  # the prompt's tokens are not it
        (lambda p: token_positions.token_of_interest(p, IMAGE, generated_only=False), [[0], [2]]),
        (lambda p: token_positions.token_of_interest(p, []), [[], []]),
        (lambda p: token_positions.before_special_tokens(p, [END]), [[3, 4, 5], [3, 4, 5, 6, 7]]),
        (lambda p: token_positions.before_special_tokens(p, [CAT, DOG]), [[3], []]),
    ],
)
def test_selections_by_hand(keep, expected):
    positions = of_generation()
    assert where(keep(positions)) == expected
    assert where(jax.jit(keep)(positions)) == expected


def test_words_are_searched_and_kept_by_place():
    searched = token_positions.searched(of_generation())
    assert (
        np.flatnonzero(searched[0] >= 0).tolist()
        == np.flatnonzero(
            token_positions.everything(of_generation(), generated_only=True)[0]
        ).tolist()
    )
    assert searched[0, 3:6].tolist() == [30, DOG, DOG]
    keep = token_positions.spans(of_generation(), np.array([[3, 5], [-1, -1]]))
    assert where(keep) == [[3, 4], []]


SELECTIONS = [
    lambda p: token_positions.everything(p),
    lambda p: token_positions.index(p, 2),
    lambda p: token_positions.index(p, -2, generated_only=True),
    lambda p: token_positions.interval(p, 1, -1),
    lambda p: token_positions.token_of_interest(p, [3, 4]),
    lambda p: token_positions.token_of_interest(p, [3, 4], generated_only=False),
    lambda p: token_positions.before_special_tokens(p, [END]),
]


@given(
    length=st.integers(1, 6),
    seed=st.integers(0, 2**16),
    start=st.none() | st.integers(-8, 8),
    stop=st.none() | st.integers(-8, 8),
)
@settings(max_examples=15, deadline=None)
def test_interval_and_index_count_as_python_slices_do(length, seed, start, stop):
    tokens_ = np.random.default_rng(seed).integers(2, 9, (1, length))
    positions = Positions.of_generated(tokens_)
    expected = list(range(length))[start:stop]
    assert where(token_positions.interval(positions, start, stop)) == [expected]
    if start is not None:
        one = [range(length)[start]] if -length <= start < length else []
        assert where(token_positions.index(positions, start)) == [one]


@given(left=st.integers(0, 3), seed=st.integers(0, 2**16), end=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_rows_do_not_depend_on_padding(left, seed, end):
    rng = np.random.default_rng(seed)
    ids, answer = rng.integers(2, 7, (1, 3)), rng.integers(2, 7, (1, 5))
    answer[0, end:] = END
    states = rng.normal(size=(1, 7, 3)).astype(np.float32)

    def rows(left, right, after):
        around, behind = [(0, 0), (left, right)], [(0, 0), (0, after)]
        ids_, mask = np.pad(ids, around), np.pad(np.ones_like(ids), around)
        # states of padding are not to be looked at, not even to be multiplied by zero
        prompt = np.pad(states[:, :3], [*around, (0, 0)], constant_values=np.nan)
        generated = np.pad(states[:, 3:], [*behind, (0, 0)], constant_values=np.nan)
        padded = np.concatenate([prompt, generated], axis=1)
        return select_all(padded, ids_, mask, np.pad(answer, behind))

    # on both sides of the prompt, and after the answer
    for got, expected in zip(rows(left, 3 - left, 2), rows(0, 0, 0), strict=True):
        for x, y in zip(got.flat(), expected.flat(), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


@jax.jit
def select_all(states, ids, mask, answer):
    positions = of_generation(ids, mask, answer)
    return [
        token_positions.reduce(states, positions, select(positions), how)
        for select in SELECTIONS
        for how in token_positions.HOWS
    ]


def test_reduce_by_hand():
    positions = of_generation()
    states = jnp.arange(16.0).reshape(2, 8, 1)  # sample 1 starts at 8
    keep = token_positions.before_special_tokens(positions, [END, 33])
    assert where(keep) == [[3, 4, 5], [3, 4, 5]]

    first = token_positions.reduce(states, positions, keep)
    assert first.states[:, 0, 0].tolist() == [3, 11]
    last = token_positions.reduce(states, positions, keep, "last")
    assert last.states[:, 0, 0].tolist() == [5, 13]
    assert (last.position.tolist(), last.token.tolist()) == ([[5], [3]], [[DOG], [32]])
    mean = token_positions.reduce(states, positions, keep, "mean")
    assert mean.states[:, 0, 0].tolist() == [4, 12]
    each, sample, position, token = token_positions.reduce(states, positions, keep, "each").flat()
    assert each[:, 0].tolist() == [3, 4, 5, 11, 12, 13]
    assert sample.tolist() == [0, 0, 0, 1, 1, 1]
    assert position.tolist() == [3, 4, 5, 1, 2, 3]  # sample 1 begins after two of padding
    assert token.tolist() == [30, DOG, DOG, CAT, 31, 32]


def test_reduce_of_several_sites_leaves_out_samples_without_a_row():
    positions = of_generation()
    states = {"a": np.ones((2, 8, 3), np.float32), "b": np.ones((2, 8, 2), np.float32)}
    select = jax.jit(
        lambda s, p: token_positions.reduce(s, p, token_positions.token_of_interest(p, DOG))
    )
    rows = select(states, positions)
    assert rows.states["a"].shape == (2, 1, 3)  # what leaves the device: one row a sample
    flat, sample, position, token = rows.flat()
    assert (flat["a"].shape, flat["b"].shape) == ((1, 3), (1, 2))
    assert (sample.tolist(), position.tolist(), token.tolist()) == ([0], [4], [DOG])


@pytest.mark.parametrize("how", token_positions.HOWS)
def test_reduce_of_heads_is_that_of_each_head(how):
    positions = of_generation()
    states = np.random.default_rng(0).normal(size=(2, 8, 3, 5)).astype(np.float32)
    keep = token_positions.before_special_tokens(positions, [END, 33])
    together = token_positions.reduce(states, positions, keep, how)
    for head in range(3):
        alone = token_positions.reduce(states[:, :, head], positions, keep, how)
        np.testing.assert_array_equal(together.states[:, :, head], alone.states)
        np.testing.assert_array_equal(together.valid, alone.valid)


def test_reduce_mean_against_numpy():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2, 8, 5)).astype(np.float32)
    keep = rng.random((2, 8)) < 0.5
    got = token_positions.reduce(states, of_generation(), keep, "mean").states[:, 0]
    expected = [x[k].mean(axis=0) for x, k in zip(states, keep, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_reduce_with_a_bound_gives_that_many_rows():
    rows = token_positions.reduce(
        jnp.zeros((2, 8, 1)),
        of_generation(),
        token_positions.interval(of_generation(), 2, 4),
        "each",
        max_rows=2,
    )  # fmt: skip
    assert rows.valid.tolist() == [[True, True], [True, True]]


def test_reduce_names_the_ways():
    positions = of_generation()
    with pytest.raises(ValueError, match="how must be one of first, last, mean, each, got 'both'"):
        token_positions.reduce(jnp.zeros((2, 8, 1)), positions, positions.is_prompt, "both")

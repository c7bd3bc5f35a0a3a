"""Padding: few lengths, on the left."""

import jax.numpy as jnp
import numpy as np

from ports.inputs import padding


def test_buckets_by_hand():
    expected = {1: 16, 16: 16, 17: 32, 64: 64, 65: 72, 97: 104, 128: 128, 129: 144, 257: 288}
    expected |= {600: 640, 641: 704}
    assert {length: padding.bucket_length(length) for length in expected} == expected
    further = {1: 32, 65: 96, 96: 96, 97: 128, 129: 160, 600: 640}
    assert {length: padding.bucket_length(length, 32) for length in further} == further


def test_buckets_are_few_and_waste_little():
    buckets = [padding.bucket_length(length) for length in range(1, 4097)]
    assert len(set(buckets)) == 4 + 6 * 8
    assert buckets == sorted(buckets)
    assert all(n <= b <= max(n + 15, 1.125 * n) for n, b in enumerate(buckets, 1))


def test_counts_by_hand():
    counts = [padding.bucket_count(count) for count in range(1, 34)]
    assert counts[:14] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14]
    assert sorted(set(counts[14:])) == [16, 20, 24, 28, 32, 40]
    assert all(n <= count < n * 5 / 4 + 1 for n, count in enumerate(counts, 1))


def test_pieces_by_hand():
    # As many as rows are left alone, others are rounded up, and to a multiple of the devices.
    assert [padding.count_pieces(count, 9) for count in (0, 7, 9, 11, 33)] == [0, 7, 9, 12, 40]
    assert [padding.count_pieces(count, 9, 8) for count in (0, 7, 9, 11, 33)] == [0, 8, 9, 16, 40]
    # As many for each of the rows are left alone where devices share these evenly.
    of_nine = [(36, 4, 4), (36, 4, 1), (36, 4, 8), (27, 3, 4), (36, 3, 4)]
    assert [padding.count_pieces(*each) for each in of_nine] == [36, 40, 40, 28, 40]
    arrays = {"input_ids": np.zeros((2, 3)), "tiles": np.ones((9, 4)), "others": np.ones(9)}
    padded = padding.pad_pieces(arrays, ("tiles", "frames"), 2)
    assert {name: x.shape for name, x in padded.items()} == {
        "input_ids": (2, 3),
        "tiles": (10, 4),
        "others": (9,),
    }
    assert padded["tiles"].sum(1).tolist() == [4] * 9 + [0]


def test_rows_are_filled_up_on_the_left():
    arrays = {
        "input_ids": np.array([[7, 8]]),
        "attention_mask": np.array([[1, 1]]),
        "pixel_values": np.zeros((1, 3, 5, 5)),
    }
    padded = padding.pad_to_bucket(arrays, pad_token=4)
    np.testing.assert_array_equal(padded["input_ids"], [[4] * 14 + [7, 8]])
    np.testing.assert_array_equal(padded["attention_mask"], [[0] * 14 + [1, 1]])
    assert padded["pixel_values"].shape == (1, 3, 5, 5)


def test_tokens_move_to_the_end_of_their_row_in_order():
    arrays = {
        "input_ids": np.array([[5, 6, 7, 0], [0, 8, 9, 0]]),
        "attention_mask": np.array([[1, 1, 1, 0], [0, 1, 1, 0]]),
    }
    moved = padding.align_right(arrays)
    np.testing.assert_array_equal(moved["input_ids"], [[0, 5, 6, 7], [0, 0, 8, 9]])
    np.testing.assert_array_equal(moved["attention_mask"], [[0, 1, 1, 1], [0, 0, 1, 1]])


def test_states_move_back_to_the_columns_that_their_tokens_came_from():
    arrays = {
        "input_ids": np.array([[5, 6, 7, 0], [0, 8, 9, 0]]),
        "attention_mask": np.array([[1, 1, 1, 0], [0, 1, 1, 0]]),
    }
    moved = jnp.asarray(padding.align_right(arrays)["input_ids"][..., None])
    states = {"layer": moved, "head": moved[:, -1:]}
    back = padding.realign(arrays, states)
    np.testing.assert_array_equal(back["layer"][..., 0], arrays["input_ids"])
    assert back["head"] is states["head"]
    left = {"attention_mask": np.array([[0, 1]])}
    assert padding.realign(left, states) is states

"""Videos as frames: what is read, what is refused, and the scale of their values."""

import numpy as np
import pytest
from PIL import Image

from ports.inputs import videos

from .. import helpers

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 9, 5, 3), np.uint8)


@pytest.mark.parametrize("kind", [np.asarray, list, lambda v: [Image.fromarray(f) for f in v]])
def test_frames_in_any_form_are_the_same(kind):
    for given in ([kind(VIDEO)], kind(VIDEO) if isinstance(kind(VIDEO), list) else [VIDEO]):
        (clip,) = videos.read_clips(given)
        np.testing.assert_array_equal(clip.frames, VIDEO)
        assert (clip.total, clip.rate, list(clip.numbers)) == (3, None, [0, 1, 2])


def test_transparent_frames_are_put_on_white():
    frames = [Image.new("RGBA", (1, 1), (100, 0, 50, alpha)) for alpha in (0, 51, 255)]
    # Of an opacity of a fifth: 0.8 * 255 + 0.2 * (100, 0, 50).
    expected = [[255, 255, 255], [224, 204, 214], [100, 0, 50]]
    assert videos.read_frames(frames)[:, 0, 0].tolist() == expected
    assert videos.read_frames([Image.new("L", (1, 1), 9)])[0, 0, 0].tolist() == [9, 9, 9]


def test_rates_by_hand():
    (plain,) = videos.read_clips([VIDEO])
    (known,) = videos.read_clips([VIDEO], {"fps": 5.0})
    # Three of 30 frames, at 20 per second.
    said = {"total_num_frames": 30, "fps": 20.0, "frames_indices": [0, 10, 20]}
    (apart,) = videos.read_clips([VIDEO], [said])
    assert [clip.frame_rate for clip in (plain, known, apart)] == [24, 5, 2]


def test_scale_by_hand():
    values = {"image_mean": [0.5, 0.5, 0], "image_std": [0.5, 0.25, 1]}
    frames = np.array([[0, 255, 51]], np.uint8)
    scaled = videos.Settings.from_json(values).scale(frames)
    np.testing.assert_allclose(scaled, [[-1, 2, 0.2]], rtol=1e-6)


@pytest.mark.parametrize("count", range(1, 9))
def test_even_samples_are_distinct_and_begin_with_the_first(count):
    numbers = videos.sampled_evenly(8, count)
    assert len(numbers) == len(set(numbers)) == count
    assert numbers[0] == 0 and numbers[-1] < 8 and (np.diff(numbers) > 0).all()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "it has no frames; pass at least one, or leave the video out"),
        (np.zeros((0, 9, 9, 3), np.uint8), "it has no frames"),
        (
            [np.zeros((9, 5, 3), np.uint8), Image.new("RGB", (5, 7))],
            "it has frames of 9 x 5 and 7 x 5 pixels; resize them to one",
        ),
        (np.zeros((2, 3, 9, 9), np.uint8), "it is uint8[2, 3, 9, 9]; expected a list of PIL"),
        (np.zeros((2, 9, 9, 3)), "it is float64[2, 9, 9, 3]; expected a list of PIL images"),
    ],
    ids=["empty list", "empty", "sizes", "channels first", "floats"],
)
def test_other_frames(video, message):
    with helpers.raises_line(ValueError, "video 1: ", message):
        videos.read_clips([VIDEO, video])

"""Videos given as frames: the arrays of transformers' processors, which need torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ports
from ports.inputs.videos import Clip
from ports.models import port

from .. import helpers, qwen2_vl_helpers, video_cases
from . import test_internvl, test_llava_next

EXPECTED = Path(__file__).parents[2] / "data" / "videos" / "expected.npz"
CASES = [(name, case) for name, each in video_cases.FAMILIES.items() for case in each.cases]


@pytest.fixture(scope="module")
def made():
    """(family, case) -> our arrays."""
    return {
        (name, case): video_cases.process(
            name, video_cases.make_processor(name), **video_cases.CASES[case]
        )
        for name, case in CASES
    }


@pytest.mark.parametrize(("name", "case"), CASES)
def test_arrays_are_those_of_transformers(made, name, case):
    ours = made[name, case]
    with np.load(EXPECTED) as file:
        start = f"{name}/{case}/"
        expected = {key[len(start) :]: file[key] for key in file if key.startswith(start)}
        # InternVL's frames are images.
        kind = "pixel_values" if name == "internvl" else "pixel_values_videos"
        expected[kind] = file[f"pixels/{expected[kind]}"]
    # For some families, transformers returns no token types.
    assert {*expected, "pixel_values", "mm_token_type_ids"} == set(ours)
    for key, value in expected.items():
        # Pixels were rounded to their 256 values.
        given = ours[key] * 127.5 + 127.5 if key == kind else ours[key]
        np.testing.assert_allclose(given, value, rtol=0, atol=1e-4, err_msg=key)


def test_frames_in_any_form_are_the_same_video(made):
    """Lists of pictures and of arrays, and a video alone."""
    processor = video_cases.make_processor("qwen2_vl")
    first, second = video_cases.VIDEOS
    pictures = [Image.fromarray(frame) for frame in first]
    arrays = processor(
        text=video_cases.FAMILIES["qwen2_vl"].texts,
        images=[[second[0]], []],
        videos=[pictures, list(second)],
        padding=True,
    )
    for key, value in made["qwen2_vl", "plain"].items():
        np.testing.assert_array_equal(arrays[key], value)
    alone = processor(text="<|video_pad|>", videos=pictures)
    np.testing.assert_array_equal(alone["video_grid_thw"], arrays["video_grid_thw"][:1])


def test_times_of_qwen3_by_hand(made):
    """Five frames, 9 apart, at 10 per second: patches of frames 0 and 9, 18 and 27, 36 twice."""
    ids = made["qwen3_vl", "apart"]["input_ids"][0]
    said = video_cases.make_processor("qwen3_vl").tokenizer.convert_ids_to_tokens(ids)
    assert [word for word in said if word.startswith("<") and word[1].isdigit()] == [
        "<0.5",  # 0.45, rounded to one digit as floats are
        "<2.2",
        "<3.6",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_vl", [0, 2, 4, 6]),
        ("qwen2_5_vl", [0, 2, 4, 6]),
        ("qwen3_vl", [0, 2, 5, 7]),  # up to the last frame
        ("llava_onevision", [0, 2, 4, 6]),
        ("internvl", [1, 3, 5, 7]),  # in the middle of each part
    ],
)
def test_chosen_frames_by_hand(name, expected):
    """Four of eight frames; and two per second of a recording with four per second."""
    settings = video_cases.make_processor(name).video_settings
    clip = Clip(video_cases.VIDEOS[1], 8, 4.0, range(8))
    for options in ({"num_frames": 4}, {"fps": 2.0}):
        chosen = settings.choose(clip, True, **options)
        assert chosen.numbers == expected
        np.testing.assert_array_equal(chosen.frames, clip.frames[expected])
        assert chosen.frame_rate == 2


@pytest.mark.parametrize("files", [1, 2, 3])
def test_settings_are_read_from_the_first_file_that_has_them(tmp_path, files):
    contents = {
        "preprocessor_config.json": {"patch_size": 1},
        "video_preprocessor_config.json": {"patch_size": 2},
        "processor_config.json": {"video_processor": {"patch_size": 3}},
    }
    for name in list(contents)[:files]:
        (tmp_path / name).write_text(json.dumps(contents[name]))
    assert port.read_video_settings(tmp_path) == {"patch_size": files}


def test_a_last_patch_repeats_the_last_frame(made):
    arrays = made["qwen2_vl", "plain"]
    patches = int(arrays["video_grid_thw"][0].prod())
    video = arrays["pixel_values_videos"][:patches].reshape(3, -1, 3, 2, 7, 7)
    np.testing.assert_array_equal(video[2, :, :, 0], video[2, :, :, 1])
    assert (video[1, :, :, 0] != video[1, :, :, 1]).any()


class TestFromACheckpoint:
    @pytest.fixture(scope="class", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def loaded(self, request, tmp_path_factory):
        directory = tmp_path_factory.mktemp(request.param)
        pair = getattr(qwen2_vl_helpers, f"make_{request.param}")(directory)
        video_cases.make_processor(request.param).save_pretrained(directory)
        return request.param, pair

    def test_videos_beside_a_picture_give_pytorchs_logits(self, loaded, made):
        name, pair = loaded
        options = video_cases.CASES["all"]
        vlm = ports.load(pair.directory, **positions(name))
        second = video_cases.VIDEOS[1]
        inputs = vlm.process(
            video_cases.FAMILIES[name].texts,
            [[second[0]], []],
            videos=video_cases.VIDEOS,
            **options,
        )
        for key, value in made[name, "all"].items():
            np.testing.assert_array_equal(inputs[key], value, err_msg=key)
        expected, _ = helpers.torch_forward(pair.torch_model, inputs)
        valid = inputs["attention_mask"] == 1
        ours = np.asarray(vlm.forward(inputs).logits)
        np.testing.assert_allclose(ours[valid], expected[valid], rtol=0, atol=1e-4)
        layouts = vlm.patch_layout(inputs)
        assert [len(row) for row in layouts] == [4, 4]  # three frames and a picture, four frames

    @pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
    def test_files_are_read_and_arrays_fit_the_model(self, made, name, tmp_path):
        config = {
            "llava_onevision": lambda: test_llava_next.make_config("onevision"),
            "internvl": test_internvl.make_config,
        }[name]()
        config.save_pretrained(tmp_path)
        video_cases.make_processor(name).save_pretrained(tmp_path)
        if name == "internvl":
            settings = {"image_seq_length": test_internvl.TOKENS}
            (tmp_path / "processor_config.json").write_text(json.dumps(settings))
        vlm = ports.load_abstract(tmp_path)
        inputs = vlm.process(
            video_cases.FAMILIES[name].texts,
            [[video_cases.VIDEOS[1][0]], []],
            videos=video_cases.VIDEOS,
            **video_cases.CASES["counted"],
        )
        for key, value in made[name, "counted"].items():
            np.testing.assert_array_equal(inputs[key], value, err_msg=key)
        vlm.prepare(inputs)  # which checks that tokens, frames and pictures match
        # Four frames each; for InternVL, the picture is two tiles and the whole.
        pictures = {"llava_onevision": 1, "internvl": 3}[name]
        assert [len(row) for row in vlm.patch_layout(inputs)] == [4 + pictures, 4]


def positions(name: str) -> dict[str, str]:
    return {"video_positions": "transformers-5"} if name == "qwen2_vl" else {}


def test_frames_of_internvl_are_in_the_order_of_the_prompts():
    """A picture after one video and before another, of different lengths."""
    processor = video_cases.make_processor("internvl")
    first, second = video_cases.VIDEOS
    text = "<video> <image> <video>"
    pixels = processor(images=[second[0]], text=text, videos=[first, second])["pixel_values"]
    alone = [
        processor(text="<video>", videos=[first]),
        processor(images=[second[0]], text="<image>"),
        processor(text="<video>", videos=[second]),
    ]
    np.testing.assert_array_equal(pixels, np.concatenate([each["pixel_values"] for each in alone]))
    assert [len(each["pixel_values"]) for each in alone] == [5, 3, 8]
    assert set(processor(text="what")) == {"input_ids", "attention_mask", "mm_token_type_ids"}


class TestErrors:
    def process(self, *videos, name="qwen2_vl", text=None, **options):
        processor = video_cases.make_processor(name)
        text = "<|video_pad|>" * len(videos) if text is None else text
        return processor(text=text, videos=list(videos), **options)

    def test_other_numbers_of_videos(self):
        with helpers.raises_line(ValueError, "<|video_pad|> 2 times", "there are 1 videos"):
            self.process(video_cases.VIDEOS[0], text="<|video_pad|> <|video_pad|>")
        with helpers.raises_line(ValueError, "is of 1 video; expected one entry for each of the 2"):
            self.process(*video_cases.VIDEOS, video_metadata=video_cases.RATES[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_frames": 2, "fps": 1.0}, "num_frames and fps are given; pass one"),
            ({"fps": 1.0}, "a video's own rate is not known; pass video_metadata"),
            ({"num_frames": 8}, "8 frames would be taken from a video of 5; pass another"),
            (
                {"num_frames": 4, "video_metadata": {"total_num_frames": 90}},
                "has 5 frames, and its metadata says total_num_frames 90; pass all frames, or",
            ),
        ],
        ids=str,
    )
    def test_frames_that_can_not_be_chosen(self, options, message):
        with helpers.raises_line(ValueError, message):
            self.process(video_cases.VIDEOS[0], do_sample_frames=True, **options)

    def test_sizes(self):
        thin = np.zeros((2, 2, 500, 3), np.uint8)
        with helpers.raises_line(ValueError, "frames of 2 x 500 pixels", "leave the video out"):
            self.process(thin)
        with helpers.raises_line(ValueError, "1 of the 2 frames of a patch", "or an image"):
            self.process(video_cases.VIDEOS[0][:1], name="qwen3_vl")

    def test_sizes_of_one_family(self):
        video = video_cases.VIDEOS[0]
        with helpers.raises_line(ValueError, "videos have 2 and 5 frames; expected as many of"):
            self.process(video, video[:2], name="llava_onevision", text="<video> <video>")

    def test_values_that_are_not_implemented(self):
        processor = video_cases.make_processor("qwen2_vl")
        processor.video_values["cap_pixels_per_frame"] = True
        with helpers.raises_line(ValueError, "cap_pixels_per_frame of the video processor is True"):
            processor(text="<|video_pad|>", videos=[video_cases.VIDEOS[0]])

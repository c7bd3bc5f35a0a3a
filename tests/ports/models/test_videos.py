"""Videos given as frames: the arrays of transformers' processors, which need torchvision."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ports
from ports.inputs.videos import Clip
from ports.models import port, smolvlm_processor

from .. import helpers, idefics3_helpers, qwen2_vl_helpers, video_cases
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
        # InternVL's and SmolVLM's frames are images.
        kind = "pixel_values_videos" if "pixel_values_videos" in expected else "pixel_values"
        expected[kind] = file[f"pixels/{expected[kind]}"]
    # For some families, transformers returns no token types.
    own = {"tile_grids"} if name == "internvl" else set()
    assert {*expected, *own, "pixel_values", "mm_token_type_ids"} == set(ours)
    for key, value in expected.items():
        given = ours[key]
        if key == kind:
            # Without frames of zeros, which fill up videos of SmolVLM.
            given = given[given.any((2, 3, 4))] if name == "smolvlm" else given
            given = given * 127.5 + 127.5  # pixels were rounded to their 256 values
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
        ("molmo2", [0, 2, 4, 6]),
        ("smolvlm", [0, 2, 4, 7]),  # rounded down
    ],
)
def test_chosen_frames_by_hand(name, expected):
    """Four of eight frames; and two per second of a recording with four per second."""
    settings = video_cases.make_processor(name).video_settings
    clip = Clip(video_cases.VIDEOS[1], 8, 4.0, range(8))
    both = [{"num_frames": 4, "fps": 2.0}] if settings.takes_both else []
    for options in both or ({"num_frames": 4}, {"fps": 2.0}):
        chosen = settings.choose(clip, True, **options)
        assert chosen.numbers == expected
        np.testing.assert_array_equal(chosen.frames, clip.frames[expected])
        assert chosen.frame_rate == 2


def test_molmo2_takes_no_more_per_second_than_the_checkpoint_says():
    """Of 18 frames in 0.9 s, one; at another rate, 9; and up to 7, if the rate is not known."""
    settings = video_cases.make_processor("molmo2").video_settings
    clip = Clip(np.zeros((18, 1, 1, 3), np.uint8), 18, 20.0, range(18))
    assert settings.choose(clip).numbers == [0]
    assert settings.choose(clip, fps=10.0).numbers == [*range(0, 18, 2)]
    assert settings.choose(clip._replace(duration=1.6)).numbers == [0, 6, 12]
    unknown = settings.choose(clip._replace(rate=None))
    assert (unknown.rate, len(unknown.numbers)) == (2, 7)


def test_times_of_molmo2_by_hand():
    """0.45 s is rounded to 0.5 or, of chosen frames, to 0.4, as in transformers: there float32."""
    processor = video_cases.make_processor("molmo2")
    video = np.zeros((18, 35, 35, 3), np.uint8)
    rates = {"total_num_frames": 18, "fps": 20.0, "frames_indices": [*range(18)]}
    times = []
    for options in ({"fps": 2.3}, {"do_sample_frames": False}):
        arrays = processor(text="<|video|>", videos=[video], video_metadata=rates, **options)
        said = processor.tokenizer.convert_ids_to_tokens(arrays["input_ids"][0])
        times.append([word for word in said if word[0].isdigit()])
    assert times[0] == ["0.0", "0.4"] and times[1][9] == "0.5"


def test_smolvlm_leaves_out_a_second_at_both_ends_of_long_videos():
    """Of ten seconds, four frames from the second to the ninth; all, where two are asked for per
    second.
    """
    settings = video_cases.make_processor("smolvlm").video_settings
    clip = Clip(np.zeros((100, 1, 1, 3), np.uint8), 100, 10.0, range(100))
    assert settings.choose(clip, True, 4, 1.0).numbers == [10, 36, 63, 90]
    assert settings.choose(clip, True, 4, 2.0).numbers == [0, 33, 66, 99]
    # Those of the checkpoint: six, one per second.
    assert settings.choose(clip, True).numbers == [10, 26, 42, 58, 74, 90]


def test_frames_of_smolvlm_are_in_the_order_of_the_prompts():
    """A picture of one tile and of four beside videos of different lengths."""
    processor = video_cases.make_processor("smolvlm")
    first, second = video_cases.VIDEOS
    small, large = first[0], second[0].repeat(2, 0).repeat(2, 1)
    arrays = processor(
        images=[[small], [large]],
        text=["<video> <image>", "<image> <video>"],
        videos=[second, first],
        padding=True,
    )
    alone = [
        processor(text="<video>", videos=[second]),
        processor(images=[[small]], text="<image>"),
        processor(images=[[large]], text="<image>"),
        processor(text="<video>", videos=[first]),
    ]
    pixels = [each["pixel_values"][0] for each in alone]
    np.testing.assert_array_equal(arrays["pixel_values"][0], np.concatenate(pixels))
    assert arrays["pixel_attention_mask"].shape == arrays["pixel_values"][:, :, 0].shape
    frames = [(arrays["input_ids"] == 101).sum() // 9, sum(map(len, pixels))]
    assert frames[0] == frames[1]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (64, "sixty-four"),
        (100, "one hundred"),
        (128, "one hundred and twenty-eight"),
        (1000, "one thousand"),
        (2005, "two thousand and five"),
        (12_345, "twelve thousand, three hundred and forty-five"),
    ],
)
def test_numbers_in_words(number, expected):
    assert smolvlm_processor.in_words(number) == expected


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

    @pytest.mark.parametrize("name", ["llava_onevision", "internvl", "smolvlm"])
    def test_files_are_read_and_arrays_fit_the_model(self, made, name, tmp_path):
        config = {
            "llava_onevision": lambda: test_llava_next.make_config("onevision"),
            "internvl": test_internvl.make_config,
            "smolvlm": lambda: idefics3_helpers.make_config("smolvlm"),
        }[name]()
        config.save_pretrained(tmp_path)
        video_cases.make_processor(name).save_pretrained(tmp_path)
        vlm = ports.load_abstract(tmp_path)
        given = video_cases.FAMILIES[name]
        inputs = vlm.process(
            given.texts,
            [[video_cases.VIDEOS[1][0]] if given.image else [], []],
            videos=video_cases.VIDEOS,
            **video_cases.CASES["counted"],
        )
        for key, value in made[name, "counted"].items():
            np.testing.assert_array_equal(inputs[key], value, err_msg=key)
        vlm.prepare(inputs)  # which checks that tokens, frames and pictures match
        pictures = 0 if name == "smolvlm" else 1
        # Four frames each, or one per second.
        first, second = (2, 3) if name == "smolvlm" else (4, 4)
        assert [len(row) for row in vlm.patch_layout(inputs)] == [first + pictures, second]


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
    grids = processor(images=[second[0]], text=text, videos=[first, second])["tile_grids"]
    assert grids.tolist() == [[1, 1]] * 5 + [[1, 2]] + [[1, 1]] * 8
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

    def test_frames_of_smolvlm_without_numbers(self):
        processor = video_cases.make_processor("smolvlm")
        processor.video_values["video_sampling"] = None
        with helpers.raises_line(ValueError, "up to a number, which", "pass fps and num_frames"):
            processor(text="<video>", videos=[video_cases.VIDEOS[0]], do_sample_frames=True)

    def test_pictures_and_videos_of_other_sizes(self):
        processor = video_cases.make_processor("smolvlm")
        processor.video_values["max_image_size"] = {"longest_edge": 20}
        video = video_cases.VIDEOS[0]
        with helpers.raises_line(ValueError, "images become 44 x 44 pixels", "videos 20 x 20"):
            processor(images=[[video[0]]], text="<image> <video>", videos=[video])

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("smolvlm", {"do_pad": False}, "do_pad of the video processor is False; expected True"),
            ("smolvlm", {"resample": 2}, "resample of the video processor is 2; expected 3 or 1"),
            (
                "smolvlm",
                {"size": {"height": 9, "width": 9}},
                "'width': 9}; expected a longest_edge",
            ),
            ("molmo2", {"size": {"height": 35, "width": 42}}, "expected a square, a multiple of"),
            ("molmo2", {"resample": 3}, "resample of the video processor is 3; expected 2"),
        ],
        ids=str,
    )
    def test_values_of_one_family(self, name, values, message):
        settings = video_cases.make_processor(name).settings_class
        with helpers.raises_line(ValueError, message):
            settings.from_json(values)

    def test_values_that_are_not_implemented(self):
        processor = video_cases.make_processor("qwen2_vl")
        processor.video_values["cap_pixels_per_frame"] = True
        with helpers.raises_line(ValueError, "cap_pixels_per_frame of the video processor is True"):
            processor(text="<|video_pad|>", videos=[video_cases.VIDEOS[0]])

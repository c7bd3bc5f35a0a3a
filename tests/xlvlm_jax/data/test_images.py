"""Images as RGB: modes, orientation, damaged and oversized files."""

import io

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax.data import images
from xlvlm_jax.data.images import read_image

RED, GREEN = (255, 0, 0), (0, 128, 0)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def pixel(image, where=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(where)


def test_an_rgb_image_is_read_as_it_is(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(read_image(path)), values)


@pytest.mark.parametrize(
    ("mode", "value"),
    [("L", 90), ("1", 1), ("P", 90), ("CMYK", (0, 255, 255, 0)), ("LA", (90, 255)), ("I;16", 0)],
)
def test_every_mode_becomes_rgb(tmp_path, mode, value):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    path = saved(tmp_path / name, Image.new(mode, (4, 3), value))
    assert (read_image(path).mode, read_image(path).size) == ("RGB", (4, 3))


def test_cmyk_keeps_its_colour(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    assert pixel(read_image(path)) == pytest.approx(RED, abs=3)


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    path = saved(tmp_path / "a.png", Image.fromarray(values))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("most", "expected"), [(255, [0, 0, 0]), (65535, [0, 0, 255])])
def test_sixteen_bits_of_a_pgm_are_scaled_in_dark_pictures_too(tmp_path, most, expected):
    values = np.array([[0, 90, most]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 1\n65535\n" + values.tobytes())
    assert np.asarray(read_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("most", "expected"), [(255, [0, 90, 255]), (65535, [0, 0, 255])])
def test_thirty_two_bits_of_small_values_are_not_scaled(tmp_path, most, expected):
    values = np.array([[0, 90, most]], np.int32)
    path = saved(tmp_path / "a.tif", Image.fromarray(values))
    assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (2, 1), (*GREEN, 255))
    image.putpixel((1, 0), (*RED, 0))
    options = {}
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([*GREEN, *RED])
        image.putpixel((1, 0), 1)
        options = {"transparency": 1}
    read = read_image(saved(tmp_path / "a.png", image, **options))
    assert (pixel(read), pixel(read, (1, 0))) == (GREEN, (255, 255, 255))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    read = read_image(saved(tmp_path / "a.jpg", image, exif=exif))
    assert read.size == (8, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_no_harm(tmp_path):
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01"
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (16, 8), RED), exif=exif)
    assert read_image(path).size == (16, 8)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), GREEN)]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixel(read_image(path)) == RED


def test_large_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_SIDE", 10)
    path = saved(tmp_path / "a.png", Image.new("RGB", (11, 4)))
    path.write_bytes(path.read_bytes()[:45])  # the header alone
    with pytest.raises(ValueError, match=r"a.png: 11 x 4 pixels, expected at most 10 x 10; make"):
        read_image(path)


def test_what_pillow_takes_for_an_attack(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = saved(tmp_path / "a.png", Image.new("RGB", (11, 4)))
    with pytest.raises(ValueError, match=r"a.png: .*44 pixels.*, expected at most 12000 x 12000;"):
        read_image(path)


def jpeg():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not an image in a known format"),
        (jpeg()[:900], r"cannot be decoded \(image file is truncated"),
    ],
)
def test_unreadable_files_say_why(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(OSError, match=rf"a.jpg: {message}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)  # the file is wrong, not the disk


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.jpg: no such image file"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(OSError, match=r"cannot be decoded \(Is a directory\)"):
        read_image(tmp_path)


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", Image.new("F", (2, 2), 0.5))
    with pytest.raises(ValueError, match=r"a.tif: floating-point pixels; save it with 8 bits"):
        read_image(path)

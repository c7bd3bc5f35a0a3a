"""Extraction over a folder of odd and damaged pictures."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import Features, data
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection

NORM = "language_model.model.norm"
BAD = {
    "truncated.jpg": "cannot be decoded",
    "empty.jpg": "the file is empty",
    "text.jpg": "not an image in a known format",
    "huge.png": "30000 x 30000 pixels|limit|exceeds",
}


def huge(path: Path, side: int = 30_000) -> None:
    """Writes a valid, black PNG with one bit per pixel, small on disk."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.fixture(scope="module")
def folder(pictures, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    drawn = sorted(pictures.rglob("*.jpg"))[:2]
    picture = Image.open(drawn[0]).convert("RGB")
    for number, file in enumerate(drawn):
        (root / f"drawn{number}.jpg").write_bytes(file.read_bytes())
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "turned.jpg", exif=exif)
    picture.convert("CMYK").save(root / "cmyk.jpg")
    picture.convert("P").save(root / "palette.png")
    picture.convert("RGBA").save(root / "rgba.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(root / "16.png")
    Image.new("RGB", (1, 1), "red").save(root / "one.png")
    picture.save(root / "with spaces.jpg")
    picture.save(root / "été 猫.jpg")
    (root / "truncated.jpg").write_bytes(drawn[0].read_bytes()[:700])
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("no picture")
    huge(root / "huge.png")
    return root


def test_odd_pictures_have_rows_and_bad_ones_a_reason(vlm, folder, tmp_path):
    samples = data.load("folder", folder)
    selection = Selection.parse("index:-1")
    settings = ExtractionSettings(
        sites=(NORM,), selection=selection, batch_size=4, max_new_tokens=8
    )
    summary = extract(vlm, samples, tmp_path / "features", settings)
    features = Features.open(tmp_path / "features")
    assert {name for name, _ in summary.failed} == set(BAD)
    rows = set(features.sample_rows.tolist())
    for number, sample in enumerate(features.samples):
        if sample["id"] in BAD:
            assert any(part in sample["error"] for part in BAD[sample["id"]].split("|"))
            assert number not in rows
        else:
            assert "error" not in sample and number in rows
    assert np.isfinite(features.matrix(NORM)).all()


def test_a_huge_picture_is_refused_before_it_takes_memory(tmp_path):
    huge(tmp_path / "huge.png")
    code = f"""
import resource
from xlvlm_jax.data.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image({str(tmp_path / "huge.png")!r})
except ValueError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 300 * 1024  # ru_maxrss counts kilobytes

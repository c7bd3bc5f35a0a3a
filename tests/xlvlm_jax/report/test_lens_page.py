"""The page of a lens, through the command: what is on it, its data, arrays, steering, messages."""

import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import SteeringVector
from xlvlm_jax.features.writer import FeaturesWriter

LAYER = "language_model.model.layers.4"


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "wide.png"
    Image.new("RGB", (168, 112), "red").save(file)
    return file


def arguments(picture, tmp_path, *more):
    page, arrays = tmp_path / "lens.html", tmp_path / "lens.npz"
    asked = ("--prompt", "What </script> is it?", "--num-words", 3, "--max-new-tokens", 3)
    return ("lens", "embedded", picture, *asked, "--output", page, "--arrays", arrays, *more)


@pytest.fixture(scope="module")
def written(picture, tmp_path_factory):
    """The page and the arrays of a plain run with neighbours."""
    import sys

    from xlvlm_jax import cli

    tmp_path = tmp_path_factory.mktemp("lens")
    states = np.random.default_rng(0).standard_normal((5, 192), np.float32)
    with FeaturesWriter(tmp_path / "features", {}) as writer:
        rows = np.arange(5)
        samples = [{"id": str(i), "prediction": f"<b>answer {i}"} for i in rows]
        writer.append(samples, {LAYER: states}, rows, rows, rows + 30)
        writer.close()
    asked = arguments(picture, tmp_path, "--neighbours", tmp_path / "features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xlvlm", *map(str, asked)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    with np.load(tmp_path / "lens.npz", allow_pickle=False) as arrays:
        return (tmp_path / "lens.html").read_text("utf-8"), dict(arrays)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_the_arrays(written):
    _, arrays = written
    L, P, k = arrays["words"].shape
    assert (L, k) == (8, 3) and arrays["probabilities"].shape == (L, P, k)
    assert arrays["entropy"].shape == (L, P) and len(arrays["tokens"]) == P
    assert arrays["picture 0 positions"].shape == (8, 8)
    # The processor keeps the middle of a picture that is wider than high.
    assert arrays["picture 0 boxes"][0, 0, 0] == pytest.approx(1 / 6)
    assert arrays[f"neighbours {LAYER}"].shape == (P, 3)


def test_the_page_shows_them(written):
    page, arrays = written
    data = data_of(page)
    L, P, k = data["shape"]
    assert (L, P, k) == arrays["words"].shape
    index = np.frombuffer(base64.b64decode(data["index"]), "<u2").reshape(L, P, k)
    ids = np.unique(arrays["words"])
    np.testing.assert_array_equal(ids[index], arrays["words"])
    shares = np.frombuffer(base64.b64decode(data["shares"]), np.uint8).reshape(L, P, k)
    np.testing.assert_allclose(shares / 255, arrays["probabilities"], atol=0.003)
    assert data["neighbours"]["layers"]["4"]["rows"] == arrays[f"neighbours {LAYER}"].tolist()
    # A row per token of text, a cell per layer, and a button per image token.
    texts = [p for p, kind in enumerate(arrays["kinds"]) if kind != "image"]
    cells = re.findall(r'<td tabindex="-?\d" data-p="(\d+)"', page)
    assert cells == [str(p) for p in texts for _ in range(L)]
    assert len(re.findall(r'<button type="button" tabindex="-?\d" data-p="\d+"', page)) == 64
    assert page.count('tabindex="0"') == 2  # where Tab enters the table and the picture
    last = data["words"][index[-1, texts[-1], 0]]
    assert page.rindex(f">{last}</td></tr>") > page.index("<tbody>\n      <tr")


def test_nothing_escapes_and_nothing_is_fetched(written):
    page, _ = written
    assert "What &lt;/script&gt; is it?" in page
    assert page.count("</script>") == 2 and "<b>answer" not in page
    assert "default-src 'none'" in page and not re.search(r'(src|href)="http', page)
    assert len(page) < 5_000_000


def test_a_steered_run(xlvlm, written, picture, tmp_path):
    vector = 3 * np.random.default_rng(1).standard_normal(192).astype(np.float32)
    SteeringVector(vector, LAYER).save(tmp_path / "v.safetensors")
    more = ("--vector", tmp_path / "v.safetensors", "--alpha", 2)
    status, _, errors = xlvlm(*arguments(picture, tmp_path, *more))
    assert status == 0, errors
    assert "v.safetensors, strength 2" in (tmp_path / "lens.html").read_text("utf-8")
    with np.load(tmp_path / "lens.npz") as arrays:
        plain, steered = written[1]["probabilities"], arrays["probabilities"]
        shared = min(plain.shape[1], steered.shape[1]) - 3  # positions of the prompt
        np.testing.assert_allclose(steered[:4, :shared], plain[:4, :shared], atol=1e-5)
        assert np.abs(steered[4:, :shared] - plain[4:, :shared]).max() > 0.05


def test_messages(xlvlm, picture, tmp_path):
    (tmp_path / "lens.html").write_text("mine")
    status, _, errors = xlvlm(*arguments(picture, tmp_path))
    assert status == 2 and "lens.html exists; name another output or replace it" in errors
    again = arguments(picture, tmp_path, "--overwrite")
    status, _, errors = xlvlm(*again, "--jacobian", tmp_path / "none.pt")
    assert status == 2 and "none.pt: no such file; expected a Jacobian lens" in errors
    with FeaturesWriter(tmp_path / "features", {}) as writer:
        one = np.zeros(1, int)
        writer.append([{"id": "a"}], {"elsewhere": np.ones((1, 3), np.float32)}, one, one, one)
        writer.close()
    status, _, errors = xlvlm(*again, "--neighbours", tmp_path / "features")
    assert status == 2 and "has states of none of the layers, but of elsewhere" in errors
    assert (tmp_path / "lens.html").read_text() == "mine" and not (tmp_path / "lens.npz").exists()

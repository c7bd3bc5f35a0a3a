"""`xlvlm convert`: the same model in Orbax's format, complete or not written at all."""

import json

import jax
import numpy as np
import pytest

import ports
from ports import checkpoint
from ports.checkpoint import orbax_io
from xlvlm_jax.demo import embedded


@pytest.fixture
def no_leftovers(tmp_path):
    yield
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("no_leftovers")
class TestConvert:
    def test_gives_the_same_model(self, xlvlm, tmp_path, vlm):
        status, out, _ = xlvlm("convert", "embedded", "--output", tmp_path / "new" / "model")
        assert status == 0
        assert "GB in" in out
        converted = ports.load(tmp_path / "new" / "model")
        same = jax.tree.map(np.array_equal, vlm.params, converted.params)
        assert all(jax.tree.leaves(same))
        assert checkpoint.fingerprint(converted.directory) == checkpoint.fingerprint(embedded.LLAVA)
        assert not list(converted.directory.glob("*.safetensors"))
        # Processor, tokenizer, chat template and the tokens that end an answer.
        prompt = vlm.render("What is this?")
        assert converted.render("What is this?") == prompt
        assert converted.tokenizer(prompt)["input_ids"] == vlm.tokenizer(prompt)["input_ids"]
        assert converted.eos_tokens == vlm.eos_tokens

    def test_converts_the_dtype_and_what_was_converted(self, xlvlm, tmp_path):
        """Converts float32 to bfloat16 and back; the fingerprint stays."""
        half, back = tmp_path / "half", tmp_path / "back"
        half.mkdir()  # empty
        assert xlvlm("convert", "embedded", "--output", half, "--dtype", "bfloat16")[0] == 0
        assert xlvlm("convert", half, "--output", back)[0] == 0
        assert orbax_io.read_record(half)["dtype"] == "bfloat16"
        assert orbax_io.read_record(back)["dtype"] == "float32"
        expected = ports.load(embedded.LLAVA, dtype="bfloat16").params
        for directory in (half, back):
            assert checkpoint.fingerprint(directory) == checkpoint.fingerprint(embedded.LLAVA)
            restored = ports.load(directory, dtype="bfloat16").params
            assert all(jax.tree.leaves(jax.tree.map(np.array_equal, expected, restored)))

    @pytest.mark.parametrize("what", ["directory", "file"])
    def test_does_not_overwrite(self, xlvlm, tmp_path, what):
        target = tmp_path / "there"
        kept = target if what == "file" else target / "kept"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("1")
        status, _, errors = xlvlm("convert", "embedded", "--output", target)
        assert status == 2
        assert "not empty; name a new directory" in errors
        assert kept.read_text() == "1"

    def test_leaves_nothing_half_written(self, xlvlm, tmp_path, monkeypatch):
        def fail(params, directory, fingerprint):
            (directory / "params").mkdir()
            raise OSError("No space left on device")

        monkeypatch.setattr(orbax_io, "save", fail)
        status, _, errors = xlvlm("convert", "embedded", "--output", tmp_path / "model")
        assert status == 1
        assert "No space left" in errors
        assert not list(tmp_path.iterdir())

    def test_replaces_what_a_killed_run_left(self, xlvlm, tmp_path):
        (tmp_path / ".model.tmp" / "params").mkdir(parents=True)
        assert xlvlm("convert", "embedded", "--output", tmp_path / "model")[0] == 0

    def test_a_model_without_a_port(self, xlvlm, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "config.json").write_text(json.dumps({"model_type": "other"}))
        status, _, errors = xlvlm("convert", source, "--output", tmp_path / "model")
        assert status == 2
        assert "model_type 'other' is not supported" in errors
        assert not (tmp_path / "model").exists()

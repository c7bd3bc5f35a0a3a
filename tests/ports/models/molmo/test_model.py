"""Molmo against what the original PyTorch code computed, stored in tests/data/molmo."""

import functools
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from PIL import Image

import ports
from ports import checkpoint, names
from ports.checkpoint import orbax_io
from ports.models.molmo import model as molmo
from ports.parallel import sharding

from ... import helpers

DATA = Path(__file__).parents[3] / "data" / "molmo"
FULL_SIZE = Path(__file__).parents[3] / "data" / "checkpoints" / "molmo-7b-d.json"
CASES = range(3)
STATES = (
    "model.vision_backbone",
    "model.transformer.blocks.0",
    "model.transformer.blocks.1",
    "model.transformer.blocks.2",
    "model.transformer.ln_f",
)
NAMES = ("input_ids", "images", "image_masks", "image_input_idx")


@pytest.fixture(scope="module")
def vlm():
    return ports.load(DATA)


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "expected.npz")


def inputs_of(expected, case: int) -> dict[str, np.ndarray]:
    arrays = {name: expected[f"{case}.{name}"][None] for name in NAMES}
    return arrays | {"attention_mask": np.ones_like(arrays["input_ids"])}


def batch_of(expected, cases=CASES) -> dict[str, np.ndarray]:
    """Returns the cases in one batch, padded on the left, missing crops filled with -1."""
    rows = [inputs_of(expected, case) for case in cases]
    length = max(row["input_ids"].shape[1] for row in rows)
    crops = max(row["images"].shape[1] for row in rows)
    batch: dict[str, list] = {name: [] for name in rows[0]}
    for row in rows:
        missing = length - row["input_ids"].shape[1]
        for name, value in row.items():
            if name in ("input_ids", "attention_mask"):
                padded = np.pad(value[0], (missing, 0))
            else:
                if name == "image_input_idx":
                    value = np.where(value >= 0, value + missing, -1)
                widths = [(0, crops - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
                padded = np.pad(value[0], widths, constant_values=-1)
            batch[name].append(padded)
    return {name: np.stack(values) for name, values in batch.items()}


@pytest.mark.parametrize("case", CASES)
def test_states_and_logits_are_the_originals(vlm, expected, case):
    inputs = inputs_of(expected, case)
    ours = vlm.forward(inputs, sites=STATES)
    for site in STATES:
        theirs = expected[f"{case}.states.{site}"]
        # Crops that only fill up follow those of the image.
        states = np.asarray(ours.states[site])[:, : theirs.shape[1]]
        width = theirs.shape[-1]
        error = helpers.relative_error(states.reshape(-1, width), theirs.reshape(-1, width))
        assert error < 1e-5, site
    np.testing.assert_allclose(ours.logits[0], expected[f"{case}.logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_originals(vlm, expected, case):
    tokens = vlm.generate(inputs_of(expected, case), max_new_tokens=8).tokens
    np.testing.assert_array_equal(tokens[0], expected[f"{case}.generated"])


@pytest.mark.parametrize(("name", "shared"), [("blocks.0", 1), ("ln_f", None)])
def test_a_sweep_is_each_of_its_variants(vlm, expected, name, shared):
    site = f"model.transformer.{name}"
    axes = vlm.module.prompt_cache_axes([site])["model"]["transformer"]
    count = len(axes)
    shared = count if shared is None else shared
    assert list(axes.values()) == [None] * shared + [0] * (count - shared)
    helpers.check_sweep(vlm, inputs_of(expected, 0), site)


def test_a_batch_padded_on_the_left_is_its_rows(vlm, expected):
    inputs = batch_of(expected)
    ours = vlm.forward(inputs, sites=STATES[1:])
    for case in CASES:
        length = len(expected[f"{case}.input_ids"])
        for site in STATES[1:]:
            theirs = expected[f"{case}.states.{site}"][0]
            assert helpers.relative_error(ours.states[site][case, -length:], theirs) < 1e-5
        np.testing.assert_allclose(
            ours.logits[case, -length:], expected[f"{case}.logits"], rtol=0, atol=1e-4
        )
    tokens = vlm.generate(inputs, max_new_tokens=8).tokens
    theirs = np.stack([expected[f"{case}.generated"] for case in CASES])
    np.testing.assert_array_equal(tokens, theirs)


def test_apply_takes_the_processors_arrays_as_they_are(vlm, expected):
    inputs = batch_of(expected)
    logits = jax.jit(vlm.apply)(vlm.params, inputs)
    for case in CASES:
        theirs = expected[f"{case}.logits"]
        np.testing.assert_allclose(logits[case, -len(theirs) :], theirs, rtol=0, atol=1e-4)


def test_32_tokens_are_those_of_forward_passes_without_a_cache(vlm, expected):
    """In a batch padded on the left, each token is the likeliest after those before it."""
    inputs = batch_of(expected)
    generation = vlm.generate(inputs, max_new_tokens=32, sites=["model.transformer.blocks.1"])
    tokens = np.asarray(generation.tokens)
    longer = dict(inputs)
    longer["input_ids"] = np.concatenate([inputs["input_ids"], tokens[:, :-1]], axis=1)
    ones = np.ones_like(tokens[:, :-1])
    longer["attention_mask"] = np.concatenate([inputs["attention_mask"], ones], axis=1)
    output = vlm.forward(longer, sites=["model.transformer.blocks.1"])
    start = inputs["input_ids"].shape[1] - 1
    np.testing.assert_array_equal(np.asarray(output.logits)[:, start:].argmax(-1), tokens)
    states = output.states["model.transformer.blocks.1"][:, start:]
    ours = generation.states["model.transformer.blocks.1"]
    assert helpers.relative_error(ours, states) < 1e-5


def test_a_prompt_without_an_image(vlm, expected):
    """A row gives the same result in a batch with images as by itself."""
    ids = expected["0.text_ids"][None].astype(int)
    alone = vlm.forward({"input_ids": ids}).logits[0]
    batch = inputs_of(expected, 0)
    length = batch["input_ids"].shape[1]
    missing = length - ids.shape[1]
    text = {
        "input_ids": np.pad(ids, ((0, 0), (missing, 0))),
        "attention_mask": np.pad(np.ones_like(ids), ((0, 0), (missing, 0))),
        "images": np.full_like(batch["images"], -1),
        "image_masks": np.full_like(batch["image_masks"], -1),
        "image_input_idx": np.full_like(batch["image_input_idx"], -1),
    }
    both = {name: np.concatenate([batch[name], text[name]]) for name in batch}
    logits = vlm.forward(both).logits
    np.testing.assert_allclose(logits[1, -ids.shape[1] :], alone, rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[0], expected["0.logits"], rtol=0, atol=1e-4)


def test_the_sites_of_the_references_scripts_are_there(vlm):
    names = ("model.transformer.blocks.2", "model.transformer.ln_f", "model.transformer.ff_out")
    assert vlm.check_sites(names, generated=True) == names


def test_unembed_is_the_head_alone(vlm, expected):
    states = expected["0.states.model.transformer.ln_f"]
    np.testing.assert_allclose(vlm.unembed(states)[0], expected["0.logits"], rtol=0, atol=1e-4)


def test_steering_knows_the_image_positions(vlm, expected):
    inputs = inputs_of(expected, 0)
    edits = {"model.transformer.blocks.0": ports.add(np.ones(64), where="image")}
    _, masks = jax.jit(ports.steer(vlm.apply, edits, masks=True))(vlm.params, inputs)
    np.testing.assert_array_equal(
        masks["model.transformer.blocks.0"][0], inputs["input_ids"] >= 512
    )


def test_positions_that_are_given_are_used(vlm, expected):
    """Rotary embedding depends only on distances: shifted positions give the same logits, spread
    ones do not."""
    inputs = inputs_of(expected, 2)
    positions = np.arange(inputs["input_ids"].shape[1])[None]
    for factor, same in ((1, True), (3, False)):
        logits = vlm.forward(inputs | {"position_ids": factor * positions + 5}).logits[0]
        assert np.allclose(logits, expected["2.logits"], rtol=0, atol=1e-4) is same


class TestSharding:
    def test_columns_of_what_widens_and_rows_of_what_narrows(self, vlm):
        mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))

        def spec(*path: str) -> tuple:
            shape = functools.reduce(lambda tree, key: tree[key], path, vlm.params).shape
            placed = sharding.param_sharding(mesh, path, shape, molmo.AXES, vlm.kv_heads)
            return tuple(placed.spec)

        decoder = ("model", "transformer")
        # The parts of fused layers, each by itself.
        for parts in (("att_proj", "query"), ("ff_proj", "up"), ("ff_proj", "gate")):
            assert spec(*decoder, "blocks_0", *parts, "kernel") == (None, "model")
        for part in ("key", "value"):  # two heads, four devices
            assert spec(*decoder, "blocks_0", "att_proj", part, "kernel") == (None, None)
        for module in ("attn_out", "ff_out"):
            assert spec(*decoder, "blocks_0", module, "kernel") == ("model", None)
        assert spec(*decoder, "ff_out", "kernel") == (None, "model")
        for table in ("table", "new_embedding"):
            assert spec(*decoder, "wte", table) == ("model", None)

    @pytest.mark.slow
    def test_eight_devices_compute_what_one_does(self, expected, tmp_path):
        cases = [0, 2, 0, 2]
        np.savez(tmp_path / "inputs.npz", **batch_of(expected, cases))
        helpers.run_python(
            """
            import re
            import numpy as np
            import ports

            directory, inputs, results = sys.argv[1:]
            inputs = dict(np.load(inputs))
            vlm = ports.load(directory, mesh=ports.make_mesh(2, 4))
            layer = vlm.params["model"]["transformer"]["blocks_0"]["ff_proj"]
            kernel = layer["up"]["kernel"]
            # Two devices divide all heads.
            whole = ports.load(directory, mesh=ports.make_mesh(4, 2))
            program = whole.lower(inputs, sites=[], max_new_tokens=8).compile().as_text()
            np.savez(
                results,
                gathered=re.findall(
                    r"= (.+?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program
                ),
                logits=vlm.forward(inputs).logits,
                tokens=vlm.generate(inputs, max_new_tokens=8).tokens,
                columns=kernel.sharding.shard_shape(kernel.shape)[1],
            )
            """,
            DATA,
            tmp_path / "inputs.npz",
            tmp_path / "results.npz",
            XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        )
        results = np.load(tmp_path / "results.npz")
        assert results["columns"] == 96 // 4
        # Of all activations, only the largest logits of a row and their indices, twice.
        shapes = sorted(re.sub(r"\{.*?\}", "", shape) for shape in results["gathered"])
        assert shapes == ["f32[1,2]", "f32[1,2]", "s32[1,2]", "s32[1,2]"]
        for row, case in enumerate(cases):
            theirs = expected[f"{case}.logits"]
            ours = results["logits"][row, -len(theirs) :]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(results["tokens"][row], expected[f"{case}.generated"])


class TestProcessor:
    """A checkpoint with a tokenizer, from images to an answer."""

    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("molmo")
        for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
            shutil.copy(DATA / name, directory)
        words = ["User:", "Assistant:", "what", "is", "this"]
        helpers.make_tokenizer(words, {}).save_pretrained(directory)
        return directory

    def test_from_images_to_tokens(self, directory, expected):
        vlm = ports.load(directory)
        images = [Image.fromarray(expected[f"{case}.image"]) for case in CASES]
        prompts = [vlm.render("what is this")] * 3
        inputs = vlm.process(prompts, images)
        together = vlm.generate(inputs, max_new_tokens=6).tokens
        for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            alone = vlm.generate(vlm.process([prompt], [image]), max_new_tokens=6).tokens
            np.testing.assert_array_equal(together[row], alone[0])


REAL_TOKENIZER = Path(__file__).parents[5] / "shared" / "molmo" / "tokenizer"


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason="needs the real vocabulary, 4.5 MB")
class TestRealTokenizer:
    """The files of Molmo-7B-D with its configuration, which refers to remote code."""

    @pytest.fixture(scope="class")
    def vlm(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("molmo")
        shutil.copytree(REAL_TOKENIZER, directory, dirs_exist_ok=True)
        settings = REAL_TOKENIZER.parent / "preprocessor_config_7b.json"
        shutil.copy(settings, directory / "preprocessor_config.json")
        config = json.loads(FULL_SIZE.read_text())["config"]
        # The hub's file says nothing of these.
        for name in ("vision_config", "additional_vocab_size"):
            config.pop(name)
        (directory / "config.json").write_text(json.dumps(config))
        return ports.load_abstract(directory)

    def test_loads_without_remote_code(self, vlm):
        assert vlm.eos_tokens == (151643,)
        ids = vlm.tokenizer(vlm.render("What is this?"))["input_ids"]
        assert vlm.tokenizer.decode(ids) == " User: What is this? Assistant:"

    def test_an_image_of_the_real_size(self, vlm):
        inputs = vlm.process([vlm.render("What is this?")], [Image.new("RGB", (640, 480))])
        ids = inputs["input_ids"][0]
        assert ids[0] == 151643
        assert (ids == 152066).sum() == 12 * 12 + 20 * 28
        assert inputs["images"].shape == (1, 7, 576, 588)
        assert vlm.prepare(inputs)["images"].shape == (1, 7, 576, 588)
        assert set(vlm.image_tokens) <= set(ids)


class TestMessages:
    def check(self, vlm, inputs, *parts):
        with helpers.raises_line(ValueError, *parts):
            vlm.forward(inputs)

    def test_images_for_another_prompt(self, vlm, expected):
        inputs = inputs_of(expected, 0)
        inputs["input_ids"] = np.roll(inputs["input_ids"], 1, axis=1)
        self.check(vlm, inputs, "image_input_idx has 40 positions", "hold 40 image tokens")

    def test_positions_after_the_prompt(self, vlm, expected):
        inputs = inputs_of(expected, 0)
        inputs["image_input_idx"] = inputs["image_input_idx"] + 500
        self.check(vlm, inputs, "image_input_idx has position", "the prompts have 59 positions")

    def test_image_tokens_without_images(self, vlm, expected):
        inputs = {"input_ids": inputs_of(expected, 0)["input_ids"]}
        self.check(vlm, inputs, "40 image tokens, but there are no images")

    def test_images_without_their_masks(self, vlm, expected):
        inputs = inputs_of(expected, 0)
        del inputs["image_masks"]
        self.check(vlm, inputs, "inputs have only images, image_input_idx")

    def test_crops_of_another_size(self, vlm, expected):
        inputs = inputs_of(expected, 0)
        inputs["images"] = inputs["images"][:, :, :-1]
        self.check(vlm, inputs, "images has shape (1, 3, 63, 588); expected (1, 3, 64, 588)")


class TestConfiguration:
    @pytest.fixture
    def directory(self, tmp_path):
        shutil.copy(DATA / "config.json", tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "parts"),
        [
            ({"layer_norm_type": "default"}, ("layer_norm_type 'default'", "'rms'")),
            ({"norm_after": True}, ("norm_after True",)),
            ({"weight_tying": True}, ("weight_tying True",)),
            ({"num_attention_heads": 5}, ("5 heads",)),
            ({"intermediate_size": 191}, ("191",)),
            ({"vision_config": {"num_positions": 50}}, ("num_positions is 50", "65")),
            ({"vision_config": {"image_size": [112, 98]}}, ("[112, 98]",)),
            ({"vision_config": {"vit_layers": [-10]}}, ("layer -10", "-9 to 8")),
        ],
        ids=str,
    )
    def test_is_refused_by_name(self, directory, change, parts):
        values = json.loads((directory / "config.json").read_text())
        if "vision_config" in change:
            change = {"vision_config": {**values["vision_config"], **change["vision_config"]}}
        (directory / "config.json").write_text(json.dumps({**values, **change}))
        with helpers.raises_line(ValueError, *parts):
            ports.load(directory)

    def test_missing_values_are_named(self, directory):
        values = json.loads((directory / "config.json").read_text())
        values["d_model"] = values.pop("hidden_size")
        (directory / "config.json").write_text(json.dumps(values))
        with helpers.raises_line(ValueError, "config.json: hidden_size is missing", "Molmo-7B-D"):
            ports.load(directory)

    def test_as_many_key_value_heads_as_heads_unless_it_says_otherwise(self, directory):
        values = json.loads((directory / "config.json").read_text())
        values["num_key_value_heads"] = None
        assert molmo.Config.from_hf(molmo.read_config(values)).text.num_kv_heads == 4

    def test_a_related_model(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "molmoact"}')
        with helpers.raises_line(ValueError, "'molmoact' is not supported", "molmo"):
            ports.load(tmp_path)


def test_parameters_survive_saving(vlm, tmp_path):
    checkpoint.save_params(vlm.params, tmp_path)
    shutil.copy(DATA / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, ports.load(tmp_path).params, vlm.params)
    # Fused layers are written as the original has them.
    ours, theirs = (
        safetensors.numpy.load_file(directory / "model.safetensors")
        for directory in (tmp_path, DATA)
    )
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}


class TestFusedLayers:
    """Layers that the checkpoint has in one, and the port in parts."""

    LAYER = "model.transformer.blocks.1"

    def test_are_the_rows_of_the_checkpoint(self, vlm):
        stored = safetensors.numpy.load_file(DATA / "model.safetensors")
        block = vlm.params["model"]["transformer"]["blocks_1"]
        whole = stored[f"{self.LAYER}.att_proj.weight"]
        assert whole.shape == (128, 64)  # 4 heads and twice 2 of 16
        for part, rows in (("query", (0, 64)), ("key", (64, 96)), ("value", (96, 128))):
            kernel = block["att_proj"][part]["kernel"]
            np.testing.assert_array_equal(kernel, whole[slice(*rows)].T)
        gate = block["ff_proj"]["gate"]["kernel"]
        np.testing.assert_array_equal(gate, stored[f"{self.LAYER}.ff_proj.weight"][96:].T)

    def test_are_one_site_each(self, vlm, expected):
        inputs = inputs_of(expected, 0)
        sites = [f"{self.LAYER}.{name}" for name in ("attn_norm", "att_proj", "ff_norm", "ff_proj")]
        normed, joint, ff_normed, feed = vlm.forward(inputs, sites=sites).states.values()
        stored = safetensors.numpy.load_file(DATA / "model.safetensors")
        weight, bias = (stored[f"{sites[1]}.{leaf}"] for leaf in ("weight", "bias"))
        np.testing.assert_allclose(joint, normed @ weight.T + bias, rtol=0, atol=1e-4)
        weight = stored[f"{sites[3]}.weight"]
        np.testing.assert_allclose(feed, ff_normed @ weight.T, rtol=0, atol=1e-4)
        below = {name for name in vlm.sites if name.startswith((f"{sites[1]}.", f"{sites[3]}."))}
        assert not below

    def test_are_steered_as_one(self, vlm, expected):
        # Without its first half, the values, the layer adds nothing.
        inputs, site = inputs_of(expected, 2), f"{self.LAYER}.ff_proj"
        zeroed = np.concatenate([np.zeros(96), np.ones(96)]).astype(np.float32)
        edits = {site: ports.edit_with(lambda x: x * zeroed)}
        states = vlm.forward(inputs, sites=[f"{self.LAYER}.ff_out"], edits=edits).states
        assert vlm.site_shapes[site][-1] == 192
        assert not np.any(states[f"{self.LAYER}.ff_out"])

    def test_are_read_whole_from_orbax_of_the_first_release(self, vlm, tmp_path):
        shutil.copy(DATA / "config.json", tmp_path)
        groups = names.by_tensor(traverse_util.flatten_dict(vlm.params))
        tree = {
            path: np.concatenate(list(parts.values()), axis=-1) if len(parts) > 1 else leaf
            for path, parts in groups.items()
            for leaf in list(parts.values())[:1]
        }
        orbax_io.save(traverse_util.unflatten_dict(tree), tmp_path, "0123456789abcdef")
        for mesh in (None, ports.make_mesh(1)):
            loaded = ports.load(tmp_path, mesh=mesh).params
            jax.tree.map(np.testing.assert_array_equal, loaded, vlm.params)

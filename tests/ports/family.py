"""Checks against PyTorch that every family must pass; its test file calls them with its checkpoint.

To compile few programs, give all checks the same inputs and sites where you can.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import ports
from ports import checkpoint, description, passes
from ports.checkpoint import peft_io
from ports.decoding import tail
from ports.intervene import lora
from ports.models.port import Port
from ports.parallel import sharding

from . import helpers, questions

Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
    """A port and its small checkpoint.

    Attributes:
        port: the port.
        pair: the checkpoint, as PyTorch and as the port load it.
        layer: name of a decoder layer other than the last.
        site_errors: (our states, PyTorch's, inputs) -> site -> relative error.
        functions: name endings of PyTorch's modules that are not sites.
        own: sites without a module in PyTorch.
    """

    port: Port
    pair: helpers.Pair
    layer: str
    site_errors: Callable[..., dict[str, float]]
    functions: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def vlm(self) -> ports.VLM:
        """Returns the port's model in float32."""
        return self.pair.vlm

    def torch_forward(self, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns PyTorch's logits, and its states by the port's names."""
        return helpers.torch_forward(self.pair.torch_model, inputs, self.port.canonical_name)


def assert_logits(ours: Any, theirs: np.ndarray, inputs: Inputs) -> None:
    """Checks that the logits at the tokens are PyTorch's."""
    tokens = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours)[tokens], theirs[tokens], rtol=0, atol=1e-4)


def check_sites(family: Family, inputs: Inputs) -> None:
    """Checks that every module of PyTorch is a site with its states, and that logits agree."""
    vlm = family.vlm
    logits, states = family.torch_forward(inputs)
    # A tied head is not a module of the port; what has no name in it is not used.
    functions = (*family.functions, vlm.head) if vlm.is_tied else family.functions
    check_encoded_images(family, inputs)
    modules = {site for site in states if site and not site.endswith(functions)}
    assert {*modules, *family.own} == set(vlm.sites)
    ours = vlm.forward(inputs, sites=vlm.sites)
    shared = {site: value for site, value in ours.states.items() if site not in family.own}
    errors = family.site_errors(shared, states, inputs)
    assert max(errors.values()) < 1e-5, errors
    assert_logits(ours.logits, logits, inputs)
    check_lens(vlm, ours)


def check_encoded_images(family: Family, inputs: Inputs) -> None:
    """Checks that kept states of images give the decoder what running the vision tower does."""
    vlm = family.vlm
    module, arrays = vlm.module, vlm.place(inputs)

    @jax.jit
    def embed(params: dict, arrays: dict) -> tuple[Any, Any]:
        def run(method: str, arrays: dict) -> Any:
            return module.apply({"params": params}, arrays, method=method)

        images = run("encode_images", arrays)
        kept = arrays | {"image_states": images}
        return run("embed_with_injections", arrays), run("_embedded", kept)

    expected, got = embed(vlm.params, arrays)
    real = np.asarray(arrays["attention_mask"]) != 0
    assert len(expected[1]) == len(got[1])
    for theirs, ours in zip((expected[0], *expected[1]), (got[0], *got[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[real], np.asarray(theirs)[real])


def check_rounding(family: Family, inputs: Inputs) -> None:
    """Checks that the logits are as near to PyTorch's in float64 as PyTorch's are in float32.

    Args:
        family: the family.
        inputs: those of `check_sites`, whose program exists.
    """
    with helpers.float64():
        exact = {k: v.astype("f8") if v.dtype == "f4" else v for k, v in inputs.items()}
        model = copy.deepcopy(family.pair.torch_model).double()
        truth, _ = helpers.torch_forward(model, exact)
    assert truth.dtype == np.float64
    theirs, _ = family.torch_forward(inputs)
    ours = np.asarray(family.vlm.forward(inputs, sites=family.vlm.sites).logits)
    tokens = inputs["attention_mask"] == 1
    errors = [np.sqrt(np.mean((x - truth)[tokens] ** 2)) for x in (ours, theirs)]
    assert 0 < errors[0] < 2 * errors[1], errors


def check_lens(vlm: ports.VLM, output: ports.Output) -> None:
    """The last of the layers' states say, through the final norm and the head, what the model says.

    Args:
        vlm: the model.
        output: of a run, steered or not, that captured the last layer.
    """
    assert len(vlm.layers) == vlm.sizes.text.num_layers
    assert set(vlm.layers) <= set(vlm.sites)
    read = vlm.unembed(output.states[vlm.layers[-1]], through_norm=True)
    assert helpers.relative_error(read, output.logits) < 1e-5


def check_logits(family: Family, inputs: Inputs) -> None:
    """Checks the logits against PyTorch's, for prepared inputs and for those of the processor."""
    logits, _ = family.torch_forward(inputs)
    assert_logits(family.vlm.forward(inputs).logits, logits, inputs)
    arrays = {name: inputs[name] for name in family.port.inputs if name in inputs}
    assert_logits(jax.jit(family.vlm.apply)(family.vlm.params, arrays), logits, inputs)


def check_pieces(family: Family, nine: Inputs, ten: Inputs) -> None:
    """Checks that batches of nine and of ten tiles or frames share a program, in which those that
    are added change nothing, and that edits of the tower are of the nine.
    """
    vlm = family.vlm
    tower = next(site for site in vlm.sites if not vlm.module.is_of_decoder(site))
    logits, _ = family.torch_forward(nine)
    output = vlm.forward(nine, sites=[tower])
    assert_logits(output.logits, logits, nine)
    before = passes.forward._cache_size()
    full = vlm.forward(ten, sites=[tower])
    assert passes.forward._cache_size() == before
    assert (len(output.states[tower]), len(full.states[tower])) == (9, 10)
    states = output.states[tower]
    np.testing.assert_array_equal(vlm.states(nine, sites=[tower])[tower], states)
    # Each gets another's states; a function of all of them would count those that are added.
    edits = {tower: [ports.replace(np.array(states)[::-1]), lambda x: x - x.mean(0)]}
    found = vlm.states(nine, sites=[tower], edits=edits)[tower]
    expected = states[::-1] - states.mean(0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def check_marked_cells(family: Family, inputs: Inputs) -> None:
    """Checks that pixels that change within a cell change the image token there, and no other.

    Where no attention adds anything, a token depends on its own patches alone.

    Args:
        family: a family whose images are pixel_values float[I, 3, height, width].
        inputs: those of `check_sites`, whose program exists.
    """
    mixing = {"o_proj", "out_proj", "projection_layer"}

    def without_attention(path: tuple[Any, ...], leaf: Any) -> Any:
        return 0 * leaf if mixing & {each.key for each in path} else leaf

    vlm = copy.copy(family.vlm)
    vlm.params = jax.tree_util.tree_map_with_path(without_attention, vlm.params)
    layer, pixels = vlm.layers[0], inputs["pixel_values"]
    layouts = [(row, each) for row, found in enumerate(vlm.patch_layout(inputs)) for each in found]
    assert len(layouts) == len(pixels)

    def states(pixels: np.ndarray, row: int) -> np.ndarray:
        output = vlm.forward({**inputs, "pixel_values": pixels}, sites=vlm.sites)
        return np.asarray(output.states[layer])[row]

    for number, (row, layout) in enumerate(layouts):
        # Images of different sizes are padded.
        height, width = inputs.get("image_sizes", [pixels.shape[2:]] * len(pixels))[number]
        for cell in ((0, 0), tuple(np.array(layout.positions.shape) - 1), (-1, 0)):
            box = layout.boxes[cell] * [width, height, width, height]
            x0, y0, x1, y1 = np.rint(box).astype(int)
            marked = pixels.copy()
            marked[number, :, y0:y1, x0:x1] += 2.0
            changed = (states(marked, row) != states(pixels, row)).any(-1)
            assert np.flatnonzero(changed).tolist() == [layout.positions[cell]]


def check_generation(family: Family, inputs: Inputs) -> None:
    """Checks 32 greedy tokens, and the states that predicted them, against PyTorch's."""
    model, vlm = family.pair.torch_model, family.vlm
    options = {"output_hidden_states": True, "output_logits": True}
    theirs = helpers.torch_generate(model, inputs, 32, **options)
    norm = f"{vlm.decoder}.{vlm.module.norm_name}"
    heads = [] if vlm.is_tied else [vlm.head]
    ours = vlm.generate(inputs, max_new_tokens=32, sites=[norm, *heads])
    expected = theirs.sequences[:, inputs["input_ids"].shape[1] :]
    np.testing.assert_array_equal(ours.tokens, expected)
    last = np.stack([step[-1][:, -1] for step in theirs.hidden_states], axis=1)
    assert helpers.relative_error(ours.states[norm], last) < 1e-5
    for head in heads:
        assert helpers.relative_error(ours.states[head], np.stack(theirs.logits, 1)) < 1e-5


def check_steering(family: Family, inputs: Inputs) -> None:
    """Checks vectors added to a layer, and to the heads inside it, at each kind of position against
    hooks in PyTorch.
    """
    vlm, layer = family.vlm, family.layer
    heads = f"{layer}.self_attn.heads"
    vector, of_heads = (
        np.random.default_rng(3).standard_normal(vlm.site_shapes[site][-1], np.float32)
        for site in (layer, heads)
    )
    image = np.isin(inputs["input_ids"], vlm.image_tokens)
    tokens = inputs["attention_mask"].astype(bool)
    names = dict(family.pair.torch_model.named_modules())
    module = next(m for name, m in names.items() if family.port.hub_name(name) == layer)

    def torch_steered(mask: np.ndarray) -> np.ndarray:
        added = torch.from_numpy(np.where(mask[..., None], vector, 0))

        def hook(_: Any, __: Any, out: Any) -> Any:
            return (out[0] + added, *out[1:]) if isinstance(out, tuple) else out + added

        model, to_heads = family.pair.torch_model, np.where(mask[..., None], of_heads, 0)
        handles = (
            module.register_forward_hook(hook),
            helpers.add_to_heads(model, heads, to_heads, family.port.hub_name),
        )
        logits, _ = family.torch_forward(inputs)
        for handle in handles:
            handle.remove()
        return logits

    for where, mask in (("image", image), ("text", tokens & ~image), ("prompt", tokens)):
        added = {layer: vector, heads: of_heads}
        edits = {site: ports.add(each, where=where) for site, each in added.items()}
        output = vlm.forward(inputs, sites=vlm.layers[-1:], edits=edits)
        assert_logits(output.logits, torch_steered(mask & tokens), inputs)
        check_lens(vlm, output)
    plain, steered = (
        vlm.generate(inputs, max_new_tokens=4, edits={layer: ports.add(vector, alpha, "generated")})
        for alpha in (0.0, 9.0)
    )
    np.testing.assert_array_equal(steered.tokens[:, 0], plain.tokens[:, 0])
    if not vlm.module.prefix_lm:  # whose earlier positions see the last ones
        check_tail(vlm, layer, inputs)
    assert (np.asarray(steered.tokens) != np.asarray(plain.tokens))[:, 1:].any()


def check_questions(
    family: Family, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, pictures: Sequence[int]
) -> None:
    """Rows that ask about one picture share it, and have the tokens and states of rows apart."""
    asked = questions.ask(inputs, pictures)
    sites = [family.layer]
    if f"{family.layer}.self_attn.q_norm" in family.vlm.sites:
        sites.append(f"{family.layer}.self_attn.q_norm")  # whose states may be those of heads
    shared, apart = questions.both(
        family.vlm, asked, monkeypatch, sites=sites, prompt_states=len(sites) > 1
    )
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    everywhere = np.ones(np.shape(apart.tokens), bool)
    for site in sites:
        assert helpers.relative_error(shared.states[site], apart.states[site], everywhere) < 1e-5
    real = asked["attention_mask"] == 1
    for site, states in shared.prompt_states.items():
        assert helpers.relative_error(states, apart.prompt_states[site], real) < 1e-5


def check_apart(family: Family, inputs: Inputs) -> None:
    """Rows that ask about one picture share nothing."""
    asked = questions.ask(inputs)
    assert family.vlm._divided(asked, family.vlm._check(asked), [], 4)[1] is None


def check_tail(vlm: ports.VLM, layer: str, inputs: Inputs, count: int = 3) -> None:
    """The last positions, run again over the cache of the rest, are those of the whole run.

    Args:
        vlm: the model.
        layer: the layer that is edited.
        inputs: prompts that end with `count` tokens of text.
        count: number of positions.
    """
    vector = np.random.default_rng(5).standard_normal(vlm.site_shapes[layer][-1], np.float32)
    ids = inputs["input_ids"]
    last = np.broadcast_to(np.arange(ids.shape[1]) >= ids.shape[1] - count, ids.shape)
    edits = {layer: ports.add(vector, where=last)}
    expected = vlm.forward(inputs, edits=edits).logits[:, -count:]

    @jax.jit
    def run(params: dict, arrays: dict) -> jax.Array:
        cut = tail.cut_tail(vlm.module, params, arrays, count, layer)
        states, _ = tail.run_tail(vlm.module, params, cut, {layer: ports.add(vector)})
        return vlm.module.bind({"params": params}).unembed(states)

    found = run(vlm.params, vlm.place(inputs))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def check_adapters(family: Family, inputs: Inputs, directory: Path, targets: str) -> None:
    """Checks that PEFT's adapter of the layers `targets` loads here, and ours loads in PEFT."""
    vlm = family.vlm
    model = copy.deepcopy(family.pair.torch_model)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        plain = family.pair.torch_model(**helpers.to_torch(inputs)).logits.numpy()
        expected = theirs.eval()(**helpers.to_torch(inputs)).logits.numpy()
    theirs.save_pretrained(str(directory / "theirs"))
    assert np.abs(expected - plain).max() > 0.1
    adapted = vlm.with_adapter(directory / "theirs")
    assert_logits(adapted.forward(inputs).logits, expected, inputs)

    shapes = lora.select_layers(lora.linear_layers(vlm.params), [targets])
    ranks = lora.Ranks(3, 5)
    adapter = lora.init(shapes, ranks, jax.random.key(0), vlm.module_names)
    random = np.random.default_rng(2)
    adapter = adapter._replace(
        factors=jax.tree.map(
            lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), adapter.factors
        )
    )
    base = str(family.pair.directory)
    peft_io.write(directory / "ours", adapter, ranks, vlm.module_names, base_model=base)
    model = copy.deepcopy(family.pair.torch_model)
    theirs = peft.PeftModel.from_pretrained(model, directory / "ours").eval()
    with torch.no_grad():
        expected = theirs(**helpers.to_torch(inputs)).logits.numpy()
    adapted = vlm.with_adapter(directory / "ours")
    assert_logits(adapted.forward(inputs).logits, expected, inputs)


def check_files(family: Family, directory: Path) -> None:
    """Checks that files of transformers load whatever their names, shards and dtype, and that
    missing and unknown tensors are refused.
    """
    pair, vlm = family.pair, family.vlm

    def same(path: Path, dtype: str = "float32") -> None:
        loaded = ports.load(path, dtype=dtype).params
        jax.tree.map(
            lambda ours, whole: np.testing.assert_array_equal(ours, whole.astype(dtype)),
            loaded,
            vlm.params,
        )

    pair.torch_model.save_pretrained(directory / "shards", max_shard_size="20KB")
    assert len(list((directory / "shards").glob("*.safetensors"))) > 2
    same(directory / "shards")
    today = directory / "today"
    today.mkdir()
    config = (pair.directory / "config.json").read_text()
    (today / "config.json").write_text(config)
    stored = {k: v.numpy().copy() for k, v in pair.torch_model.state_dict().items()}
    if vlm.is_tied:
        stored.pop("lm_head.weight")
    safetensors.numpy.save_file(stored, today / "model.safetensors")
    same(today)
    for dtype in ("bfloat16", "float16"):
        model = copy.deepcopy(pair.torch_model).to(getattr(torch, dtype))
        model.save_pretrained(directory / dtype)
        same(directory / dtype, dtype)
    first = next(name for name in stored if name.endswith("weight"))
    for tensors, message in (
        ({k: v for k, v in stored.items() if k != first}, family.port.canonical_name(first)),
        ({**stored, "model.stranger.weight": np.ones(3, np.float32)}, "stranger"),
    ):
        safetensors.numpy.save_file(tensors, today / "model.safetensors")
        with helpers.raises_line(ValueError, str(message)):
            ports.load(today)


def check_mesh(family: Family, inputs: Inputs, directory: Path, sites: Sequence[str]) -> None:
    """Checks that eight devices, 2 x 4, give the states, logits and tokens of one."""
    np.savez(directory / "inputs.npz", allow_pickle=False, **inputs)
    script = (Path(__file__).parent / "parallel" / "sharded.py").read_text()
    what = {"steered": family.layer, "sites": [*sites, family.layer], "meshes": ["2x4"]}
    arguments = (family.pair.directory, directory / "inputs.npz", directory, json.dumps(what))
    helpers.run_python(script, *arguments, **helpers.EIGHT_DEVICES)
    one, ours = (np.load(directory / f"{mesh}.npz") for mesh in ("1", "2x4"))
    tokens = inputs["attention_mask"].reshape(-1) == 1
    for name in one:
        if name.endswith("tokens"):
            np.testing.assert_array_equal(ours[name], one[name])
        else:
            rows = one[name].reshape(-1, one[name].shape[-1])
            where = tokens if name.endswith(("logits", family.layer)) else None
            assert helpers.relative_error(ours[name], rows, where) < 1e-5, name


def check_full_size(
    port: Port,
    values: dict[str, Any],
    directory: Path,
    parameters: int,
    share: float,
    share_of_four: float | None = None,
) -> None:
    """Checks names and shapes against PyTorch's model from the published config.json alone, the
    count by part, and that each of eight devices holds `share` x an eighth of them (and each of
    four `share_of_four` x a quarter). Loading traces the forward pass at its full size.
    """
    config = transformers.AutoConfig.for_model(**copy.deepcopy(values))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    expected = {
        port.canonical_name(name): tuple(value.shape) for name, value in model.named_parameters()
    }
    (directory / "config.json").write_text(json.dumps(values))
    vlm = ports.load_abstract(directory, dtype="bfloat16")
    assert checkpoint.stored_shapes(vlm.params) == expected
    assert sum(description.count_by_part(vlm.module, vlm.params).values()) == parameters
    for devices, held in ((8, share), (4, share_of_four)):
        mesh = sharding.abstract_mesh(1, devices)
        axes, kv_heads = vlm.module.axes, vlm.module.kv_heads
        placed = sharding.param_shardings(mesh, vlm.params, axes, kv_heads)
        found = sharding.parameter_bytes(vlm.params, placed) * devices / (2 * parameters)
        assert held is None or found == pytest.approx(held, abs=1e-3)

"""LoRA: by hand, against PyTorch's peft in both directions, an adapter on and off, messages."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

import ports
from ports import checkpoint
from ports.checkpoint import peft_io
from ports.intervene import lora
from ports.nn import layers
from ports.parallel import sharding

from .. import helpers, idefics2_helpers, molmo_helpers, qwen2_vl_helpers

KEY = jax.random.key(0)
# Linear layers of the decoder, the vision tower and what lies between, by names that all ports have
# or one of them has.
TARGETS = r".*\.(q_proj|v_proj|down_proj|fc1|linear_2|qkv)"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, small):
    """pairs(port) returns a small checkpoint and a batch of inputs."""
    makers = {
        "idefics2": lambda d: (
            idefics2_helpers.make_idefics2(d),
            idefics2_helpers.make_inputs([[(14, 21)], [(28, 14)]], [4, 9]),
        ),
        "qwen2_vl": lambda d: (
            qwen2_vl_helpers.make_qwen2_vl(d),
            qwen2_vl_helpers.make_inputs([[(1, 4, 4)], [(1, 2, 4)]], [4, 9]),
        ),
    }
    known = {"llava": (small, helpers.make_inputs([1, 1], [4, 9]))}

    def get(port: str):
        if port not in known:
            known[port] = makers[port](tmp_path_factory.mktemp(port))
        return known[port]

    return get


def train_peft(model: torch.nn.Module, directory, **options) -> torch.nn.Module:
    """Saves a peft model with random factors, as if trained, and returns it."""
    # peft changes the model that it is given.
    model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model.eval()


def torch_logits(model: torch.nn.Module, inputs) -> np.ndarray:
    with torch.no_grad():
        return model(**helpers.to_torch(inputs)).logits.numpy()


def assert_same_logits(ours, theirs, inputs) -> None:
    tokens = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours)[tokens], theirs[tokens], rtol=0, atol=1e-4)


class TestByHand:
    X = jnp.array([[1.0, 2.0]])
    KERNEL = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    ADAPTER = lora.Adapter(
        {"": lora.Factors(jnp.array([[1.0], [1.0]]), jnp.array([[0.0, 1.0, 2.0]]))}, {"": 0.5}
    )

    def test_merged(self):
        tree = {"layer": {"kernel": self.KERNEL}}
        adapter = lora.Adapter({"layer": self.ADAPTER.factors[""]}, {"layer": 0.5})
        merged = lora.merge(tree, adapter)["layer"]["kernel"]
        np.testing.assert_array_equal(merged, [[1, 0.5, 1], [0, 1.5, 1]])
        np.testing.assert_array_equal(tree["layer"]["kernel"], self.KERNEL)
        # Placed like the kernel: the programs of the base model are used for it too.
        assert not merged.committed
        placed = {"layer": {"kernel": jax.device_put(self.KERNEL, jax.devices()[0])}}
        assert lora.merge(placed, adapter)["layer"]["kernel"].committed

    def test_beside_the_kernel(self):
        module, params = nn.Dense(3, use_bias=False), {"kernel": self.KERNEL}

        def apply(params, x):
            return module.apply({"params": params}, x)

        y = lora.adapted(apply)(params, self.ADAPTER, self.X)
        # x A = 3; 0.5 * 3 * (0, 1, 2)
        np.testing.assert_array_equal(y, [[1, 2 + 1.5, 3]])
        off = lora.adapted(apply)(params, self.ADAPTER.scaled(0.0), self.X)
        np.testing.assert_array_equal(off, apply(params, self.X))

    def test_scales(self):
        ranks = lora.Ranks(4, 6, {"layers.1.mlp": 9}, {"q_proj": 3}, use_rslora=False)
        assert ranks.scale_of("model.layers.0.mlp") == 1.5
        assert ranks.scale_of("model.layers.1.mlp") == 6 / 9
        assert ranks.scale_of("model.layers.0.q_proj") == 3 / 4
        assert lora.Ranks(4, 6, use_rslora=True).scale_of("any") == 3


@pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl"])
def test_an_adapter_of_peft_loads_here(pairs, tmp_path, port):
    pair, inputs = pairs(port)
    theirs = train_peft(
        pair.torch_model,
        tmp_path,
        r=3,
        lora_alpha=5,
        target_modules=TARGETS,
        rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.down_proj": 4},
        alpha_pattern={"layers.0.self_attn.q_proj": 7},
        use_rslora=True,
    )
    vlm = ports.load(pair.directory, adapter=tmp_path)
    assert vlm.adapter == tmp_path
    expected = torch_logits(theirs, inputs)
    assert np.abs(expected - torch_logits(pair.torch_model, inputs)).max() > 0.1
    assert_same_logits(vlm.forward(inputs).logits, expected, inputs)


@pytest.mark.parametrize(
    ("port", "options"),
    [
        # A convolution over patches, and the linear layers of that name.
        ("qwen2_vl", {"target_modules": ["proj"]}),
        ("llava", {"target_modules": ["patch_embedding", "fc1"]}),
        ("idefics2", {"target_modules": ["patch_embedding"]}),
        # peft stores the base weights of these beside the factors.
        ("qwen2_vl", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llava", {"target_modules": ["embed_tokens", "position_embedding"]}),
        ("idefics2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("llava", {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}),
        ("qwen2_vl", {"target_modules": ["embed_tokens"], "use_rslora": True}),
        # Parameters that are called neither weight nor bias: class_embedding, latents.
        ("llava", {"target_modules": ["q_proj"], "modules_to_save": ["embeddings"]}),
        ("idefics2", {"target_modules": ["q_proj"], "modules_to_save": ["perceiver_resampler"]}),
    ],
    ids=str,
)
def test_adapters_of_more_than_linear_layers_are_merged(pairs, tmp_path, port, options):
    pair, inputs = pairs(port)
    theirs = train_peft(pair.torch_model, tmp_path, r=3, lora_alpha=5, **options)
    expected = torch_logits(theirs, inputs)
    tokens = inputs["attention_mask"].astype(bool)
    change = np.abs(expected - torch_logits(pair.torch_model, inputs))[tokens].max()
    assert change > 0.1
    assert_same_logits(pair.vlm.with_adapter(tmp_path).forward(inputs).logits, expected, inputs)


def test_base_weights_next_to_an_adapter_replace_the_models(pairs, tmp_path):
    pair, inputs = pairs("qwen2_vl")
    train_peft(pair.torch_model, tmp_path, r=3, target_modules=["embed_tokens"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if name.endswith(".base_layer.weight"))
    tensors[name] *= 1.5
    safetensors.numpy.save_file(tensors, file)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path).eval()
    ours = pair.vlm.with_adapter(tmp_path).forward(inputs).logits
    assert_same_logits(ours, torch_logits(theirs, inputs), inputs)

    tensors[name] = tensors[name][:-1].copy()
    safetensors.numpy.save_file(tensors, file)
    with helpers.raises_line(
        ValueError, "(102, 60), but this model expects (103, 60)", "merge_and_unl"
    ):
        pair.vlm.with_adapter(tmp_path)


@pytest.mark.parametrize("variant", ["grouped queries", "tied embeddings, class position kept"])
def test_embeddings_stored_beside_an_adapter_replace_the_models(llava_pair, tmp_path, variant):
    """As peft stores them with save_embedding_layers; tied ones are then replaced together."""
    pair, inputs = llava_pair(variant), helpers.make_inputs([1, 1], [4, 9])
    if "class" in variant:
        inputs = helpers.make_inputs([1, 1], [4, 9], tokens_per_image=helpers.PATCHES + 1)
    theirs = train_peft(pair.torch_model, tmp_path, r=3, target_modules=["q_proj"])
    with torch.no_grad():
        theirs.get_input_embeddings().weight *= 1.5
        theirs.get_output_embeddings().weight += 0.01
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("embed_tokens.weight") for name in stored)
    ours = pair.vlm.with_adapter(tmp_path).forward(inputs).logits
    assert_same_logits(ours, torch_logits(theirs, inputs), inputs)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_tied_head_is_not_adapted(llava_pair, tmp_path, target, whole):
    pair = llava_pair("tied embeddings, class position kept")
    options = {"target_modules": [target]}
    if whole:
        options = {"target_modules": ["q_proj"], "modules_to_save": [target]}
    train_peft(pair.torch_model, tmp_path, r=3, **options)
    with helpers.raises_line(ValueError, f"{target}, but this model ties its head to"):
        pair.vlm.with_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "sets 'use_dora', which is not implemented"),
        ({"lora_bias": True}, "sets 'lora_bias'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"trainable_token_indices": [1, 2]}, "sets 'trainable_token_indices'"),
    ],
)
def test_what_peft_does_beyond_that_is_named(small, tmp_path, options, message):
    train_peft(small.torch_model, tmp_path, r=3, target_modules=["q_proj"], **options)
    with helpers.raises_line(ValueError, message):
        small.vlm.with_adapter(tmp_path)


def test_beside_the_kernels_run_linear_layers_alone(pairs, tmp_path):
    pair, inputs = pairs("qwen2_vl")
    train_peft(pair.torch_model, tmp_path / "conv", r=3, target_modules=["patch_embed.proj"])
    options = {"target_modules": ["qkv"], "modules_to_save": ["lm_head"]}
    train_peft(pair.torch_model, tmp_path / "whole", r=3, **options)
    run, prepared = lora.adapted(pair.vlm.apply), pair.vlm.place(inputs)
    with helpers.raises_line(ValueError, "for 'visual.patch_embed.proj', which did not run or is"):
        run(pair.vlm.params, pair.vlm.read_adapter(tmp_path / "conv"), prepared)
    adapter = pair.vlm.read_adapter(tmp_path / "whole")
    with helpers.raises_line(ValueError, "replaces lm_head.weight as a whole; merge it"):
        run(pair.vlm.params, adapter, prepared)
    with helpers.raises_line(ValueError, "replaces lm_head.weight as a whole, which"):
        adapter.scaled(0.5)


@pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl"])
def test_an_adapter_of_ours_loads_in_peft(pairs, tmp_path, port):
    pair, inputs = pairs(port)
    write(pair, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.torch_model), tmp_path)
    expected = torch_logits(theirs.eval(), inputs)
    assert_same_logits(pair.vlm.with_adapter(tmp_path).forward(inputs).logits, expected, inputs)


def test_on_and_off_beside_the_kernels(pairs, tmp_path):
    """One program and one set of parameters serve both models."""
    pair, inputs = pairs("llava")
    vlm = pair.vlm
    write(pair, tmp_path)
    adapter, prepared = vlm.read_adapter(tmp_path), vlm.place(inputs)
    length = inputs["input_ids"].shape[1]
    apply = jax.jit(lora.adapted(vlm.apply))
    on = apply(vlm.params, adapter, prepared)[:, -length:]
    off = apply(vlm.params, adapter.scaled(0.0), prepared)[:, -length:]
    merged = vlm.with_adapter(tmp_path).forward(inputs).logits
    assert_same_logits(on, np.asarray(merged), inputs)
    assert_same_logits(off, torch_logits(pair.torch_model, inputs), inputs)
    assert apply._cache_size() == 1


def write(pair: helpers.Pair, directory) -> None:
    """Writes one of our adapters, with random factors."""
    vlm = pair.vlm
    shapes = lora.select_layers(lora.linear_layers(vlm.params), [TARGETS])
    ranks = lora.Ranks(3, 5, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 7})
    adapter = randomised(lora.init(shapes, ranks, KEY, vlm.module_names))
    peft_io.write(directory, adapter, ranks, vlm.module_names, base_model=str(pair.directory))


def randomised(adapter: lora.Adapter) -> lora.Adapter:
    random = np.random.default_rng(2)
    return adapter._replace(
        factors=jax.tree.map(
            lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), adapter.factors
        )
    )


class FusedPair(nn.Module):
    """A layer of two parts, one column and two."""

    @nn.compact
    def __call__(self, x):
        return jnp.concatenate(layers.fused(x, (1, 2), False, jnp.float32, "ff_proj"), axis=-1)


class TestFactorsByPart:
    FACTORS = lora.Factors(jnp.array([[1.0], [1.0]]), jnp.array([[0.0, 1.0, 2.0]]))

    @property
    def params(self):
        parts = {"up": {"kernel": jnp.ones((2, 1))}, "gate": {"kernel": jnp.ones((2, 2))}}
        return {"ff_proj": parts}

    def test_by_hand(self):
        tree = {"count": jnp.int32(3), "mu": {"ff_proj": self.FACTORS, "dense": self.FACTORS}}
        parts = lora.by_part(tree, self.params)
        down, ups = parts["mu"]["ff_proj"]
        assert down is self.FACTORS.down and [up.tolist() for up in ups] == [[[0]], [[1, 2]]]
        assert parts["mu"]["dense"] is self.FACTORS and parts["count"] is tree["count"]
        jax.tree.map(np.testing.assert_array_equal, lora.joined(parts), tree)
        assert isinstance(lora.joined(parts)["mu"]["ff_proj"], lora.Factors)

    def test_all_layers_are_one_program(self):
        params = {f"blocks_{i}": self.params for i in range(3)}
        factors = {f"blocks.{i}.ff_proj": self.FACTORS for i in range(3)}
        tree = {"mu": factors, "nu": factors}
        parts = lora.by_part(tree, params)
        assert isinstance(parts["nu"]["blocks.2.ff_proj"], lora.PartFactors)
        assert len(jax.make_jaxpr(lambda x: lora.by_part(x, params))(tree).eqns) == 1
        assert len(jax.make_jaxpr(lora.joined)(parts).eqns) == 1

    def test_they_add_what_the_whole_adds_and_have_its_gradient(self):
        def total(factors):
            adapter = lora.Adapter({"ff_proj": factors}, {"ff_proj": 0.5})
            variables = {"params": self.params}
            y = lora.adapted(FusedPair().apply)(variables, adapter, jnp.array([[1.0, 2.0]]))
            return (y * jnp.array([1.0, 10.0, 100.0])).sum(), y

        by_part = lora.by_part({"ff_proj": self.FACTORS}, self.params)["ff_proj"]
        gradient, y = jax.grad(total, has_aux=True)(by_part)
        # x W = 3, x A = 3; 0.5 * 3 * (0, 1, 2)
        np.testing.assert_array_equal(y, [[3, 4.5, 6]])
        whole, same = jax.grad(total, has_aux=True)(self.FACTORS)
        np.testing.assert_array_equal(y, same)
        jax.tree.map(np.testing.assert_array_equal, lora.joined(gradient), whole)
        # 0.5 * 3 * (1, 10, 100)
        assert [up.tolist() for up in gradient.ups] == [[[1.5]], [[15, 150]]]

    def test_shardings_by_hand(self):
        mesh = sharding.abstract_mesh(1, 2)

        def kernel(width, *axes):
            where = NamedSharding(mesh, PartitionSpec(*axes))
            return {"kernel": jax.ShapeDtypeStruct((2, width), jnp.float32, sharding=where)}

        params = {
            "ff_proj": {"up": kernel(1), "gate": kernel(2, None, "model")},
            "ff_out": kernel(3, "model", None),
        }
        both = lora.by_part(dict.fromkeys(params, self.FACTORS), params)
        found = lora.shardings(both, params, mesh)
        assert jax.tree.map(lambda where: where.spec, found) == {
            "ff_proj": (PartitionSpec(), (PartitionSpec(), PartitionSpec(None, "model"))),
            "ff_out": (PartitionSpec("model"), PartitionSpec()),
        }

    def test_they_merge_like_the_whole(self):
        whole = lora.Adapter({"ff_proj": self.FACTORS}, {"ff_proj": 0.5})
        by_part = whole._replace(factors=lora.by_part(whole.factors, self.params))
        expected, found = (lora.merge(self.params, each) for each in (whole, by_part))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        # 1 + 0.5 (1, 1)^T (1, 2)
        np.testing.assert_array_equal(found["ff_proj"]["gate"]["kernel"], [[1.5, 2], [1.5, 2]])

    def test_parts_of_another_layer(self):
        first, _ = lora.by_part({"ff_proj": self.FACTORS}, self.params)["ff_proj"].ups
        adapter = lora.Adapter({"ff_proj": lora.PartFactors(self.FACTORS.down, (first,))}, {})
        with pytest.raises(ValueError, match="ff_proj: factors of 1 part, the layer has 2"):
            lora.adapted(FusedPair().apply)({"params": self.params}, adapter, jnp.ones((1, 2)))


class TestFusedLayers:
    """Molmo's att_proj and ff_proj, which the port keeps in parts: adapters are of the whole."""

    TARGETS = ("att_proj", "ff_proj", "transformer.ff_out", "wq")

    @pytest.fixture(scope="class")
    def base(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("molmo")
        molmo_helpers.make_checkpoint(directory, molmo_helpers.CONFIG)
        return directory

    @pytest.fixture(scope="class")
    def weights(self, base):
        return molmo_helpers.read_weights(base)

    @pytest.fixture(scope="class")
    def inputs(self):
        return molmo_helpers.make_inputs(molmo_helpers.CONFIG, *molmo_helpers.PROMPTS["no image"])

    def check(self, ours, weights, inputs):
        """Compares logits with those of the original's equations with these weights."""
        for i, row in enumerate(molmo_helpers.rows(inputs)):
            expected = molmo_helpers.reference(molmo_helpers.CONFIG, weights, *row.values())[0]
            last = np.asarray(ours)[i, -len(expected) :]
            np.testing.assert_allclose(last, expected, rtol=0, atol=1e-4)

    def test_an_adapter_of_peft_loads_here(self, base, weights, inputs, tmp_path):
        # The original's modules are remote code: what peft needs of them is names and weights.
        theirs = train_peft(
            tree_of_linear_layers(weights),
            tmp_path / "adapter",
            r=3,
            lora_alpha=5,
            target_modules=list(self.TARGETS),
            rank_pattern={"blocks.1.ff_proj": 5},
            modules_to_save=["blocks.0.attn_out"],
        )
        merged = {name: tensor for name, tensor in theirs.merge_and_unload().state_dict().items()}
        vlm = ports.load(base, adapter=tmp_path / "adapter")
        self.check(vlm.forward(inputs).logits, {**weights, **merged}, inputs)

    def test_a_fused_layer_is_replaced_as_a_whole(self, base, weights, inputs, tmp_path):
        train_peft(
            tree_of_linear_layers(weights),
            tmp_path / "adapter",
            r=2,
            target_modules=["wq"],
            modules_to_save=["ff_proj"],
        )
        name = "model.transformer.blocks.1.ff_proj.weight"
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        kept = safetensors.numpy.load_file(file)[f"base_model.model.{name}"]
        assert kept.shape == (154, 60) and not np.array_equal(kept, weights[name].numpy())
        merged = ports.load(base, adapter=tmp_path / "adapter").params
        written = dict(checkpoint.stored_tensors(merged, np.float32))
        np.testing.assert_array_equal(written[name], kept)

    def test_an_adapter_of_ours_loads_in_peft(self, base, weights, inputs, tmp_path):
        vlm = ports.load(base)
        shapes = lora.select_layers(lora.linear_layers(vlm.params), ["att_proj", "ff_proj"])
        # 6 + 2 x 2 heads of 10; 77 values and as many gates.
        assert set(shapes.values()) == {(60, 100), (60, 154)}
        ranks = lora.Ranks(3, 5)
        adapter = randomised(lora.init(shapes, ranks, KEY, vlm.module_names))
        peft_io.write(tmp_path, adapter, ranks, vlm.module_names, base_model=str(base))
        theirs = peft.PeftModel.from_pretrained(tree_of_linear_layers(weights), tmp_path)
        merged = theirs.merge_and_unload().state_dict()
        ours = vlm.with_adapter(tmp_path)
        written = dict(checkpoint.stored_tensors(ours.params, np.float32))
        for name, tensor in merged.items():
            np.testing.assert_allclose(written[name], tensor, rtol=0, atol=1e-6)
        # Beside the kernels, and merged.
        apply = jax.jit(lora.adapted(vlm.apply))
        logits = apply(vlm.params, vlm.read_adapter(tmp_path), vlm.place(inputs))
        self.check(logits[:, -inputs["input_ids"].shape[1] :], {**weights, **merged}, inputs)
        self.check(ours.forward(inputs).logits, {**weights, **merged}, inputs)


def tree_of_linear_layers(weights) -> torch.nn.Module:
    """Returns modules with the weights' names; linear layers without biases."""
    root = torch.nn.Module()
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        if leaf != "weight" or tensor.ndim != 2:
            continue
        module = root
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(tensor)
        module.add_module(path[-1], layer)
    return root


class TestMerged:
    @pytest.fixture(scope="class")
    def adapter(self, small):
        shapes = lora.select_layers(lora.linear_layers(small.vlm.params), ["q_proj"])
        ranks = lora.Ranks(2, 2)
        return randomised(lora.init(shapes, ranks, KEY, small.vlm.module_names))

    def test_other_parameters_are_shared(self, small, adapter):
        params = small.vlm.params
        merged = lora.merge(params, adapter)
        changed = [
            jax.tree_util.keystr(path)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(merged), strict=True
            )
            if a is not b
        ]
        assert len(changed) == len(adapter.factors)
        assert all("q_proj" in name and "kernel" in name for name in changed)

    def test_half_precision_is_rounded_once(self, small, adapter):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small.vlm.params)
        merged = lora.merge(params, adapter)
        single = lora.merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), adapter)
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(single), strict=True):
            assert a.dtype == jnp.bfloat16
            np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))

    def test_another_model(self, small, adapter):
        with pytest.raises(ValueError, match="which this model does not have"):
            lora.merge({"other": small.vlm.params}, adapter)
        site = next(iter(adapter.factors))
        wide = adapter._replace(
            factors={site: lora.Factors(np.ones((61, 2)), adapter.factors[site].up)}
        )
        with pytest.raises(ValueError, match=r"\(61, 2\) and .* use the base model"):
            lora.merge(small.vlm.params, wide)


def test_a_second_adapter_is_refused(small, tmp_path):
    """`adapter` could name only one of the two."""
    write(small, tmp_path)
    adapted = small.vlm.with_adapter(tmp_path)
    for model in (adapted, adapted.with_generation_config({})):
        with helpers.raises_line(ValueError, f"has the adapter {tmp_path} merged already"):
            model.with_adapter(tmp_path)
    assert small.vlm.adapter is None


def test_an_adapter_begins_without_effect(small):
    shapes = lora.linear_layers(small.vlm.params)
    ranks = lora.Ranks(4, 8, rank_pattern={"fc1": 2})
    adapter = lora.init(shapes, ranks, KEY, small.vlm.module_names)
    for site, (down, up) in adapter.factors.items():
        rank = 2 if site.endswith("fc1") else 4
        assert (down.shape, up.shape) == ((shapes[site][0], rank), (rank, shapes[site][1]))
        assert 0.5 < np.abs(down).max() * shapes[site][0] ** 0.5 <= 1
        assert not np.any(up)


def test_targets(small):
    shapes = lora.linear_layers(small.vlm.params)
    chosen = lora.select_layers(shapes, [r"language_model\..*\.[qv]_proj", "linear_1"])
    layers = [f"language_model.model.layers.{i}.self_attn.{x}" for i in (0, 1) for x in "qv"]
    assert set(chosen) == {f"{name}_proj" for name in layers} | {"multi_modal_projector.linear_1"}
    same = [
        ["language_model.layers.*v_proj"],  # in today's transformers
        ["**.language_model.layers.?.self_attn.v_proj"],
        [r"language_model\.model\.layers\..*v_proj"],
    ]
    for patterns in same:
        chosen = lora.select_layers(shapes, patterns, small.vlm.module_names)
        assert list(chosen) == [n for n in shapes if n.startswith("lang") and n.endswith("v_proj")]
    with pytest.raises(ValueError, match=r"'w_proj' matches no linear layer; .*q_proj"):
        lora.select_layers(shapes, ["w_proj"])
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        lora.select_layers(shapes, ["("])


class TestRefused:
    """One clear line for adapters that cannot be read or belong to another model."""

    @pytest.fixture
    def written(self, small, tmp_path):
        vlm = small.vlm
        shapes = lora.select_layers(lora.linear_layers(vlm.params), ["v_proj"])
        ranks = lora.Ranks(2, 2)
        adapter = randomised(lora.init(shapes, ranks, KEY, vlm.module_names))
        peft_io.write(
            tmp_path,
            adapter,
            ranks,
            vlm.module_names,
            base_model="some/model",
            base_class=("LlavaForConditionalGeneration", "transformers"),
        )
        return tmp_path

    def change(self, directory, **values):
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"use_dora": True}, "sets 'use_dora', which is not implemented"),
            ({"modules_to_save": ["lm_head"]}, "'lm_head' in modules_to_save, but adapter_mod"),
            ({"something_new": 1}, "sets 'something_new'"),
            ({"two\rlines": 1}, r"sets 'two\rlines'"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes"),
            ({"r": 3}, "has rank 2, but adapter_config.json says 3"),
            ({"r": 0}, "expected whole numbers above 0"),
            (
                {"auto_mapping": {"base_model_class": "Qwen2VLForConditionalGeneration"}},
                "for a 'Qwen2VLForConditionalGeneration', but the model is a LlavaForConditional",
            ),
            (
                {"auto_mapping": {"base_model_class": "a\nb"}},
                r"the adapter is for a 'a\nb', but the model",
            ),
        ],
    )
    def test_configurations(self, small, written, values, message):
        self.change(written, **values)
        with helpers.raises_line(ValueError, message, str(written)):
            ports.load(small.directory, adapter=written)

    def test_missing_and_damaged_files(self, small, written):
        with helpers.raises_line(FileNotFoundError, "no directory", "adapter_config.json"):
            small.vlm.with_adapter(written / "nowhere")
        (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
        with helpers.raises_line(FileNotFoundError, "has no adapter_model.safetensors", ".bin"):
            small.vlm.with_adapter(written)
        (written / "adapter_config.json").write_text("{")
        with helpers.raises_line(ValueError, "not a JSON object"):
            small.vlm.with_adapter(written)
        (written / "adapter_config.json").unlink()
        with helpers.raises_line(FileNotFoundError, "has no adapter_config.json"):
            small.vlm.with_adapter(written)

    def rewrite(self, directory, change):
        file = directory / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        change(tensors)
        safetensors.numpy.save_file(tensors, file)

    def test_tensors_of_another_base(self, small, written, pairs):
        with helpers.raises_line(ValueError, "modules are not linear layers, patch embeddings or"):
            pairs("idefics2")[0].vlm.read_adapter(self.without_class(written))
        name = "base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_A.weight"
        self.rewrite(written, lambda t: t.update({name: np.ones((2, 61), np.float32)}))
        with helpers.raises_line(ValueError, "(61, 2)", "use the base model"):
            small.vlm.with_adapter(written)

    def without_class(self, directory):
        self.change(directory, auto_mapping=None)
        return directory

    def test_strange_tensors(self, small, written):
        name = "base_model.model.lm_head.lora_magnitude_vector"
        self.rewrite(written, lambda t: t.update({name: np.ones(2, np.float32)}))
        with helpers.raises_line(ValueError, "1 tensors are not LoRA factors", name):
            small.vlm.with_adapter(written)

    def test_half_of_the_factors(self, small, written):
        name = "base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_B.weight"
        self.rewrite(written, lambda t: t.pop(name))
        with helpers.raises_line(ValueError, "only one of the two factors"):
            small.vlm.with_adapter(written)

"""The models' programs in bfloat16, from published configurations without a weight allocated.

Real widths at cut depth: LAYERS layers of decoder and tower, unless the whole is asked for. B rows
of one photograph each per group of devices.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from benchmarks import full_size
from benchmarks.tpu.cases import Built, Case
from benchmarks.tpu.chips import Place
from ports import checkpoint, paired, passes
from ports.models.molmo import model as molmo
from ports.parallel import sharding
from ports.vlm import VLM
from xlvlm_jax.finetune import FinetuneSettings, training

LAYERS, B, NEW_TOKENS, ANSWER = 3, 2, 20, 32
# What a configuration is cut to, for the layers that are read too.
CUT: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "text_config": {"num_hidden_layers": LAYERS},
        "vision_config": {"num_hidden_layers": LAYERS},
    },
    "idefics2-8b": {
        "text_config": {"num_hidden_layers": LAYERS},
        "vision_config": {"num_hidden_layers": LAYERS},
    },
    "qwen2-vl-7b": {"num_hidden_layers": LAYERS, "vision_config": {"depth": LAYERS}},
    "molmo-7b-d": {
        "num_hidden_layers": LAYERS,
        "vision_config": {"num_hidden_layers": LAYERS, "vit_layers": [-2, -3]},
    },
}


def config_of(name: str, whole: bool) -> Any:
    """Returns a model's published configuration, cut unless the whole is asked for."""
    values = json.loads((full_size.CHECKPOINTS / f"{name}.json").read_text())["config"]
    values = values if whole else merged(values, CUT[name])
    if full_size.CASES[name].port is molmo:
        return molmo.read_config(values)
    return transformers.AutoConfig.for_model(**values)


def check_mesh(name: str, place: Place) -> None:
    """Checks that the mesh axis `model` divides the heads of a model's decoder.

    Raises:
        ValueError: it does not; with the sizes that do.
    """
    if place.mesh is None:
        return
    heads = full_size.CASES[name].port.Config.from_hf(config_of(name, False)).text.num_heads
    size = place.mesh.shape["model"]
    if heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"mesh {place.data}x{size} does not divide {name}: {heads} heads over {size} devices; "
            f"choose a size of `model` among {fitting}"
        )


def model_of(name: str, place: Place, whole: bool) -> VLM:
    """Returns a model whose parameters are shapes on the described devices."""
    case, config = full_size.CASES[name], config_of(name, whole)
    module = case.kind(case.port.Config.from_hf(config), dtype=jnp.dtype(jnp.bfloat16))
    shapes = checkpoint.abstract_params(module, case.port.example_inputs(module.config))
    if place.mesh is None:
        params = place.like(shapes)
    else:
        placed = sharding.param_shardings(place.mesh, shapes, module.axes, module.kv_heads)
        params = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            placed,
        )
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding), params
    )
    return VLM(module, params, config, case.port.PORT, None, place.mesh)


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the changes, at any depth."""
    both = {
        key: merged(values.get(key, {}), change) if isinstance(change, dict) else change
        for key, change in changes.items()
    }
    return values | both


def inputs_of(name: str, place: Place) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a batch."""
    case, rows = full_size.CASES[name], B * place.data
    shapes = {"input_ids": (case.tokens,), "attention_mask": (case.tokens,), **case.images}
    return {
        key: place.abstract(
            (rows, *shape), np.int32 if key in full_size.WHOLE else np.float32, "data"
        )
        for key, shape in shapes.items()
    }


def generation(name: str, whole: bool, place: Place, times: int) -> Built:
    """Prefill and decoding, with the states of a layer; figures of loops are per token."""
    del times
    vlm = model_of(name, place, whole)
    options = {
        "max_new_tokens": NEW_TOKENS,
        "eos_tokens": (2,),
        "pad_token": 0,
        "sites": (layer(vlm, 1),),
        "mesh": place.mesh,
    }

    def run(params: Any, inputs: Any) -> Any:
        return passes.generate(vlm.module, params, inputs, None, {}, None, **options)

    return Built(run, (vlm.params, inputs_of(name, place)), params=vlm.params)


def extraction(name: str, whole: bool, place: Place, times: int) -> Built:
    """The states of a layer of given texts."""
    del times
    vlm = model_of(name, place, whole)
    site = layer(vlm, 1)

    def run(params: Any, inputs: Any) -> Any:
        return passes.states(vlm.module, params, inputs, {}, (site,), mesh=place.mesh)

    return Built(run, (vlm.params, inputs_of(name, place)), params=vlm.params)


def lora_step(name: str, whole: bool, place: Place, times: int) -> Built:
    """An update of LoRA's factors on a batch."""
    del times
    vlm = model_of(name, place, whole)
    # transformers' names of layers do not depend on weights.
    settings = FinetuneSettings(steps=10, recompute=True)
    shapes = training.lora.linear_layers(vlm.params)
    inside = {s: v for s, v in shapes.items() if s.startswith(f"{vlm.decoder}.") and s != vlm.head}
    ranks = training.lora.Ranks(settings.rank, settings.alpha)
    adapter = jax.eval_shape(
        lambda key: training.lora.init(inside, ranks, key, {site: site for site in inside}).factors,
        jax.random.key(0),
    )
    adapter = jax.eval_shape(partial(training.lora.by_part, params=vlm.params), adapter)
    scale = {site: settings.alpha / settings.rank for site in inside}
    optimizer = settings.optimizer(10)
    adapter = place.like(adapter)
    if place.mesh is not None:
        where = training.lora.shardings(adapter, vlm.params, place.mesh)
        adapter = jax.tree.map(lambda leaf, there: leaf.update(sharding=there), adapter, where)
    # Moments lie beside the factors.
    moments = place.like(jax.eval_shape(optimizer.init, adapter))
    moments = jax.tree.map(
        lambda leaf: adapter if isinstance(leaf, dict) else leaf,
        moments, is_leaf=lambda leaf: isinstance(leaf, dict),
    )  # fmt: skip
    none = place.like((jnp.zeros(()), jnp.zeros((), jnp.int32)))
    state = training.State(adapter, moments, None, *none)
    inputs = inputs_of(name, place)
    lengths = place.abstract((B * place.data,), jnp.int32)
    where = None
    if place.mesh is not None:
        where = tuple(leaf.sharding for leaf in jax.tree.leaves(state))

    def run(state: Any, params: Any, inputs: Any, lengths: Any) -> Any:
        return training.train_step(
            vlm.module, settings, 10, ANSWER, state, (params, scale), inputs, lengths, True,
            where=where, mesh=place.mesh,
        )  # fmt: skip

    arguments = (state, vlm.params, inputs, lengths)
    return Built(run, arguments, donate=(0,), params=vlm.params)


def paired_pass(name: str, whole: bool, place: Place, times: int) -> Built:
    """The states of a layer under the original parameters and those of a fine-tuned decoder."""
    del times
    vlm = model_of(name, place, whole)
    leaves, tree = jax.tree.flatten(vlm.params)
    decoder = vlm.module.decoder_path
    paths = [
        tuple(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(vlm.params)
    ]
    tuned = [i for i, path in enumerate(paths) if path[: len(decoder)] == decoder]
    second = list(range(len(leaves)))
    for new, i in enumerate(tuned, len(leaves)):
        second[i] = new
    places = tuple(range(len(leaves))), tuple(second)
    distinct = [*leaves, *(leaves[i] for i in tuned)]

    def run(distinct: Any, inputs: Any) -> Any:
        sites = (layer(vlm, 1),)
        return paired.states_of_pair(
            vlm.module, distinct, inputs, tree, places, sites, mesh=place.mesh
        )

    return Built(run, (distinct, inputs_of(name, place)), params=vlm.params)


def layer(vlm: VLM, number: int) -> str:
    """Returns the site of a layer of the decoder."""
    return f"{vlm.decoder}.{vlm.module.cache_path[0].format(number).replace('_', '.')}"


PROGRAMS: dict[str, Callable[..., Built]] = {
    "generation": generation,
    "extraction": extraction,
    "lora step": lora_step,
    "paired pass": paired_pass,
}


def model_cases(whole: bool = False) -> list[Case]:
    """Returns the cases of all models."""
    return [
        Case(f"{name} {what}", partial(build, name, whole), False, partial(check_mesh, name))
        for name in full_size.CASES
        for what, build in PROGRAMS.items()
    ]

"""Two sets of parameters, one pass: the states of the original and of the fine-tuned model.

B batch, T positions, D width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports.intervene.sites import capture
from ports.vlm import VLM

Params = dict[str, Any]
States = dict[str, jax.Array]


def paired_states(
    vlm: VLM,
    original: Params,
    finetuned: Params,
    inputs: dict[str, np.ndarray],
    sites: Sequence[str],
) -> tuple[States, States]:
    """The states of one batch under two sets of parameters, in one compiled program.

    Runs on the host: it does not trace.

    What the two trees have in common (the very same arrays; see `share_params`) is an argument
    once, and what is computed from it alone, such as the image features under a LoRA of the
    decoder, is computed once.

    Args:
        vlm: whose module runs.
        original, finetuned: trees of parameters as `vlm.params`.
        inputs: the numpy arrays of the processor, each row a prompt, or a prompt with an answer.
        sites: of the decoder; what lies behind the last one is not computed.

    Returns two dicts {site: [B, T, D]}.
    Raises ValueError for an unknown site, and for trees of other shapes than each other.
    """
    sites = vlm.check_sites(sites, generated=True)
    check_alike(original, finetuned)
    leaves_a, tree = jax.tree.flatten(original)
    leaves_b = jax.tree.leaves(finetuned)
    places: dict[int, int] = {}
    for leaf in (*leaves_a, *leaves_b):
        places.setdefault(id(leaf), len(places))
    distinct = list({id(leaf): leaf for leaf in (*leaves_a, *leaves_b)}.values())
    a, b = (tuple(places[id(leaf)] for leaf in leaves) for leaves in (leaves_a, leaves_b))
    prepared = {name: jnp.asarray(value) for name, value in vlm.prepare(inputs).items()}
    pair = _paired(vlm.module, distinct, prepared, tree, (a, b), sites)
    length = inputs["input_ids"].shape[1]
    # Batches are filled up on the left to one of few lengths.
    first, second = (
        {site: value[:, -length:] for site, value in states.items()} for states in pair
    )
    return first, second


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _paired(
    module: Any,
    distinct: list[jax.Array],
    inputs: dict[str, jax.Array],
    tree: Any,
    places: tuple[tuple[int, ...], tuple[int, ...]],
    sites: tuple[str, ...],
) -> tuple[States, States]:
    def states(places: tuple[int, ...]) -> States:
        params = jax.tree.unflatten(tree, [distinct[place] for place in places])
        return capture(module.apply, sites)({"params": params}, inputs)[1]

    return states(places[0]), states(places[1])


def share_params(original: Params, finetuned: Params) -> Params:
    """`finetuned` with the arrays of `original` wherever the two hold the same numbers.

    Runs on the host: it does not trace.

    Raises ValueError for trees of other shapes than each other.
    """
    check_alike(original, finetuned)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        same = a is b or (a.dtype == b.dtype and bool(jnp.array_equal(a, b)))
        return a if same else b

    return jax.tree.map(one, original, finetuned)


def with_like_heads(original: VLM, finetuned: VLM) -> tuple[VLM, VLM]:
    """The two models, each with a head of its own if one ties its head and the other does not.

    A fine-tuning that unties the head stores it; the names of the parameters are then the same.
    """
    if bool(original.module.tied) == bool(finetuned.module.tied):
        return original, finetuned
    if original.module.tied:
        return original.untied(), finetuned
    return original, finetuned.untied()


def check_alike(original: Params, finetuned: Params) -> None:
    """ValueError for trees of other names or shapes than each other; names the first of them."""
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in leaves
        }
        for leaves in map(jax.tree_util.tree_leaves_with_path, (original, finetuned))
    ]
    for name in shapes[0] | shapes[1]:
        a, b = (each.get(name, "missing") for each in shapes)
        if a != b:
            raise ValueError(
                f"the fine-tuned model's {name} is {b}, the original's {a}; a shift needs a"
                " fine-tuned version of the same model"
            )

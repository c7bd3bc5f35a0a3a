"""States of an original and a fine-tuned model, computed in one pass.

B batch, T positions, D width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports.intervene.sites import capture
from ports.parallel import compiled
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
    """Computes the states of one batch under two sets of parameters, in one compiled program.

    Arrays that the two trees share (the same objects; see `share_params`) are passed once, and
    whatever depends only on them is computed once, such as the image features when only the
    decoder was fine-tuned. Runs on the host and cannot be traced.

    Args:
        vlm: the model whose module runs.
        original: a parameter tree with the structure of `vlm.params`.
        finetuned: a parameter tree with the same structure.
        inputs: the processor's numpy arrays; each row is a prompt, or a prompt with its answer.
        sites: sites of the decoder; layers after the last one are not computed.

    Returns:
        Two dicts {site: states [B, T, D]}, for the original and for the fine-tuned parameters.

    Raises:
        ValueError: a site is unknown, or the shapes of the two trees differ.
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
    pair = states_of_pair(
        vlm.module, distinct, vlm.place(inputs), tree, (a, b), sites, mesh=vlm.mesh
    )
    length = inputs["input_ids"].shape[1]
    # `prepare` pads batches on the left to one of a few lengths.
    first, second = (
        {site: value[:, -length:] for site, value in states.items()} for states in pair
    )
    return first, second


@compiled.program(static=["tree", "places", "sites"])
def states_of_pair(
    module: Any,
    distinct: list[jax.Array],
    inputs: dict[str, jax.Array],
    tree: Any,
    places: tuple[tuple[int, ...], tuple[int, ...]],
    sites: tuple[str, ...],
) -> tuple[States, States]:
    """Returns the states under both trees, given by the places of their leaves in `distinct`."""

    def states(places: tuple[int, ...]) -> States:
        params = jax.tree.unflatten(tree, [distinct[place] for place in places])
        return capture(module.apply, sites)({"params": params}, inputs)[1]

    return states(places[0]), states(places[1])


def share_params(original: Params, finetuned: Params) -> Params:
    """Returns `finetuned` with every array that equals the original's replaced by the original's.

    Runs on the host and cannot be traced.

    Args:
        original: a tree of parameters.
        finetuned: a tree with the same structure.

    Returns:
        A tree like `finetuned`, which shares its unchanged arrays with `original`.

    Raises:
        ValueError: the shapes of the two trees differ.
    """
    check_alike(original, finetuned)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        same = a is b or (a.dtype == b.dtype and bool(jnp.array_equal(a, b)))
        return a if same else b

    return jax.tree.map(one, original, finetuned)


def with_like_heads(original: VLM, finetuned: VLM) -> tuple[VLM, VLM]:
    """Returns both models, with both heads untied if only one model ties its head.

    Fine-tuning may untie the head and store it; untying the other too makes the trees match.
    """
    if original.is_tied == finetuned.is_tied:
        return original, finetuned
    if original.is_tied:
        return original.untied(), finetuned
    return original, finetuned.untied()


def check_alike(original: Params, finetuned: Params) -> None:
    """Checks that two parameter trees have the same names and shapes.

    Raises:
        ValueError: they differ; the message names the first difference.
    """
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

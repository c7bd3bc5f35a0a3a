"""Sliders -> edits of the states, whose strengths and positions are arguments of one program.

D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports import VLM
from ports.intervene.edits import Edit, Places, add, make_edit
from xlvlm_jax.playground.items import Item
from xlvlm_jax.playground.settings import WHERE, Slider
from xlvlm_jax.steering import SteeringVector
from xlvlm_jax.storage.same_model import model_of

KINDS = 4  # kinds of positions, see `ports.intervene.edits`


class Setting(NamedTuple):
    """A slider together with what it moves."""

    item: Item
    strength: float
    where: Any
    site: str


def settings_of(
    vlm: VLM, items: Mapping[str, Item], sliders: Sequence[Slider]
) -> tuple[Setting, ...]:
    """Finds what sliders move.

    Raises:
        LookupError: there is no such concept or vector.
        ValueError: a site is unknown or of another width, or a map is asked to steer elsewhere.
    """
    found = []
    for slider in sliders:
        if slider.item not in items:
            raise LookupError(
                f"there is no concept or vector {slider.item!r} here; reload the page"
            )
        item = items[slider.item]
        site = item.site if slider.site is None else vlm.find_site(slider.site, generated=True)
        if site != item.site:
            vector, width = item.vector, vlm.site_shapes[site][-1]
            if vector is None:
                raise ValueError(f"{item.name} steers only at its own site, {item.site!r}")
            if len(vector) != width:
                raise ValueError(
                    f"{item.name} has width {len(vector)}; the states at {site!r} have width "
                    f"{width}, choose another site"
                )
        where = item.where if slider.where is None else slider.where
        found.append(Setting(item, slider.strength, where, site))
    return tuple(found)


def edits_of(
    vlm: VLM, inputs: Mapping[str, Any], settings: Sequence[Setting], sites: Sequence[str]
) -> dict[str, tuple[Edit, ...]]:
    """Returns the edits that sliders mean.

    All vectors together are one edit at each site, a vector per kind of position, whether a slider
    is at zero or not: the program that they are arguments of is always the same. What is not a
    vector adds edits of its own, once its slider has left zero.

    Args:
        vlm: the model.
        inputs: the processor's arrays of the prompt.
        settings: the sliders that are not at zero.
        sites: the sites at which vectors may be added.

    Returns:
        {site: edits}.
    """
    sums = {site: np.zeros((KINDS, vlm.site_shapes[site][-1]), np.float32) for site in sites}
    others: list[dict[str, Any]] = []
    for item, strength, where, site in settings:
        vector = item.vector
        if vector is not None and isinstance(where, str) and where in WHERE:
            kinds = np.asarray(add([0.0], where=where).kinds)
            sums.setdefault(site, np.zeros((KINDS, len(vector)), np.float32))
            sums[site] += strength * kinds[:, None] * vector
        elif vector is not None:
            others.append({site: add(vector, strength, where)})
        elif item.steering is not None:
            others.append(item.steering.edits_for(vlm, inputs, strength, where))
    edits: dict[str, tuple[Edit, ...]] = {
        site: (make_edit(_add_by_kind, (vectors,), 1.0, "all"),) for site, vectors in sums.items()
    }
    for each in others:
        for site, given in each.items():
            listed = given if isinstance(given, Sequence) else (given,)
            edits[site] = (*edits.get(site, ()), *listed)
    return edits


def _add_by_kind(
    x: jax.Array, arrays: tuple[jax.Array], alpha: jax.Array, places: Places | None
) -> jax.Array:
    """Adds to each position the vector of its kind; the arrays are one float[KINDS, D]."""
    if places is None:
        raise ValueError("the positions at this site are not tokens; choose another site")
    added = arrays[0][jnp.maximum(places.kind, 0)]
    # Heads [B, T, H, D] of a position get the same vector.
    return x + alpha * added.reshape(*added.shape[:-1], *(1,) * (x.ndim - 3), added.shape[-1])


def summed(vlm: VLM, settings: Sequence[Setting]) -> SteeringVector:
    """Returns the one vector that all sliders amount to.

    Args:
        vlm: the model.
        settings: the sliders that are not at zero.

    Raises:
        ValueError: all are at zero, they steer at several sites or positions, or one is not a
            vector.
    """
    if not settings:
        raise ValueError("all sliders are at zero; move one, then save")
    for item, *_ in settings:
        if item.vector is None:
            raise ValueError(f"{item.name} is not a vector; set its slider to zero, then save")
    first = settings[0]
    for item, _, where, site in settings:
        if site != first.site or where != first.where:
            raise ValueError(
                f"a file holds a vector of one site for one set of positions, but {item.name} "
                f"steers {where!r} at {site!r} and {first.item.name} {first.where!r} at "
                f"{first.site!r}; make them the same, then save"
            )
    vector = np.sum([s.strength * s.item.vector for s in settings if s.item.vector is not None], 0)
    told = [{"of": s.item.id, "strength": s.strength} for s in settings]
    source = model_of(vlm) | {"method": "playground", "sum of": told}
    return SteeringVector(np.asarray(vector, np.float32), first.site, source, first.where)

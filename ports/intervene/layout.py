"""Edits by the names and columns of a caller -> edits as a compiled program takes them.

B batch, T positions.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports.intervene.edits import Edit, check_batch, is_everywhere, lay_out, reaches
from ports.names import normal_name

LaidOut = dict[str, tuple[Edit, ...]]  # site -> its edits, in the order in which they are done


def lay_out_edits(
    given: Mapping[str, tuple[Edit, ...]],
    sites_of: Callable[[str], Collection[str]],
    is_of_decoder: Callable[[str], bool],
    shape: tuple[int, int],
    compiled_length: int,
    last: int,
) -> LaidOut:
    """Returns the edits by site, each laid out in the columns that the program is compiled for.

    Args:
        given: name or pattern -> edits, of `as_edits`.
        sites_of: a name or pattern -> the sites that it means.
        is_of_decoder: whether a site's rows and positions are those of the prompts.
        shape: (B, T) of the caller's input_ids.
        compiled_length: T of the program.
        last: how many tokens a row may have in the end.

    Raises:
        ValueError: an edit that does not fit the batch, or what `sites_of` raises.
    """
    missing = compiled_length - shape[1]

    def move(columns: Any) -> Any:
        """Pads [B, T, ...] on the right, from the caller's columns to the program's length."""
        xp = np if isinstance(columns, np.ndarray) else jnp
        return xp.pad(columns, ((0, 0), (0, missing), *((0, 0),) * (columns.ndim - 2)))

    laid: LaidOut = {}
    for name, listed in given.items():
        for site in sites_of(name):
            here = listed
            # In the towers, rows and positions are those of images.
            if is_of_decoder(site):
                for edit in here:
                    check_batch(edit, *shape)
                    _warn_of_beyond(site, edit, last)
                here = tuple(lay_out(edit, move) for edit in here)
            laid[site] = (*laid.get(site, ()), *here)
    return laid


def stack_variants(variants: Sequence[LaidOut]) -> LaidOut:
    """Returns variants of the same edits as one, whose arrays have a leading axis for them.

    Raises:
        ValueError: they have different structures, or arrays of different shapes.
    """
    structures = {jax.tree.structure(edits) for edits in variants}
    if len(structures) != 1:
        raise ValueError(
            f"{len(variants)} variants of edits have {len(structures)} structures; expected the "
            "same sites and kinds of edits, all with a mask or all without (see ports.stacked)"
        )
    for site in variants[0]:
        of_site = [jax.tree.leaves(edits[site]) for edits in variants]
        for leaves in zip(*of_site, strict=True):
            shapes = dict.fromkeys(map(np.shape, leaves))
            if len(shapes) > 1:
                raise ValueError(
                    f"variants of the edits at {site!r} have arrays of shapes "
                    f"{' and '.join(map(str, shapes))}; expected vectors, strengths and positions "
                    "of the same shapes in all variants"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *variants)


def _warn_of_beyond(site: str, edit: Edit, length: int) -> None:
    if not reaches(edit, length):
        where = f"from {int(edit.start)} on" if edit.at is None else f"{np.ravel(edit.at).tolist()}"
        warnings.warn(
            f"the edit at {site!r} changes nothing: it is for the tokens {where:.60}, but no row "
            f"has more than {length}",
            stacklevel=5,
        )


def require_token_sites(
    laid: LaidOut, token_sites: Callable[[], Collection[str]], decoder: str
) -> None:
    """Refuses edits at some of the positions where positions are not tokens.

    Args:
        laid: of `lay_out_edits`.
        token_sites: gives the sites, in their normal spelling, whose positions are tokens; called
            only where an edit needs it.
        decoder: the name of the decoder, for the message.

    Raises:
        ValueError: such an edit.
    """
    for site, listed in laid.items():
        if not all(map(is_everywhere, listed)) and normal_name(site) not in token_sites():
            raise ValueError(
                f"site {site!r} comes before image and text are joined, so its positions are "
                f"not tokens; expected where='all', or a site below {decoder!r}"
            )

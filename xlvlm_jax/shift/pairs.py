"""Pairs: the rows that the original and the fine-tuned model made of the same sample.

Only samples that both models kept count: with a token of interest, those whose answer holds the
token for both.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from ports import hub_names
from ports.messages import few
from ports.sites import match_sites
from xlvlm_jax.store import Features

# What names a sample beside its id; where both directories have it, it must agree.
_NAMING = ("image_id", "prompt")


class Pairs(NamedTuple):
    """M pairs of rows."""

    original: Int[np.ndarray, " M"]  # the row of the original features
    finetuned: Int[np.ndarray, " M"]  # the row of the fine-tuned features
    num_samples: int  # that both directories hold, with or without rows


def match_samples(original: Features, finetuned: Features) -> Pairs:
    """The rows of two directories that belong together: by sample id, in the original's order.

    Runs on the host: it does not trace.

    Where a sample has several rows, its n-th row of one belongs to its n-th row of the other.

    Raises ValueError when the two were selected differently, hold different samples, or have no
    sample of which both have a row.
    """
    _check_selection(original, finetuned)
    samples_a, samples_b = (
        {str(sample.get("id", number)): sample for number, sample in enumerate(each.samples)}
        for each in (original, finetuned)
    )
    shared = samples_a.keys() & samples_b.keys()
    if not shared:
        some = [next(iter(samples), "none") for samples in (samples_a, samples_b)]
        raise ValueError(
            f"{original.path} and {finetuned.path} hold different samples (ids such as"
            f" {some[0]!r} and {some[1]!r}); extract both from the same data"
        )
    for name in samples_a:
        if name in shared:
            _check_sample(name, samples_a[name], samples_b[name], original, finetuned)
    rows_a, rows_b = _rows_by_name(original), _rows_by_name(finetuned)
    common = [(row, rows_b[name]) for name, row in rows_a.items() if name in rows_b]
    if not common:
        raise ValueError(
            f"{original.path} and {finetuned.path} have no common samples: of the {len(shared)}"
            f" that both hold, {len(rows_a)} have rows in one and {len(rows_b)} in the other, none"
            " in both; take more samples, or a token that both models produce"
        )
    a, b = np.array(common, np.int64).T
    return Pairs(a, b, len(shared))


def common_site(original: Features, finetuned: Features, site: str | None) -> str:
    """The site asked for, or the only one that both hold. ValueError if there is not that one."""
    both = [name for name in original.sites if name in finetuned.sites]
    if site is None and len(both) == 1:
        return both[0]
    found = [] if site is None else match_sites(site, both, hub_names)
    if len(found) != 1:
        held = [few(each.sites) or "none" for each in (original, finetuned)]
        raise ValueError(
            f"{original.path} holds the sites {held[0]} and {finetuned.path} {held[1]};"
            f" choose one that both hold, got {site!r}"
        )
    return found[0]


def _rows_by_name(features: Features) -> dict[tuple[str, int], int]:
    """{(sample id, number of the row among the sample's): row}."""
    rows: dict[tuple[str, int], int] = {}
    seen: dict[int, int] = {}
    for row, number in enumerate(features.sample_rows.tolist()):
        name = str(features.samples[number].get("id", number))
        rows[name, seen.get(number, 0)] = row
        seen[number] = seen.get(number, 0) + 1
    return rows


def _check_selection(original: Features, finetuned: Features) -> None:
    for key in ("selection", "mode"):
        a, b = (each.manifest.get(key) for each in (original, finetuned))
        if None not in (a, b) and a != b:
            raise ValueError(
                f"{original.path} was extracted with {key} {_short(a)}, {finetuned.path} with"
                f" {_short(b)}; extract both alike"
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        named = ":".join(str(value[key]) for key in ("mode", "argument") if value.get(key))
        rest = (f"{key} {value[key]}" for key in value if key not in ("mode", "argument"))
        return f"{named} ({', '.join(rest)})"
    return repr(value)


def _check_sample(
    name: str, a: dict[str, Any], b: dict[str, Any], original: Features, finetuned: Features
) -> None:
    for key in _NAMING:
        if key in a and key in b and a[key] != b[key]:
            raise ValueError(
                f"sample {name!r} has {key} {a[key]!r} in {original.path} and {b[key]!r} in"
                f" {finetuned.path}: features of different samples; extract both from the same data"
            )

"""Maps of concepts over the pictures that activate them most, beside the concepts on disk.

    concepts/maps.safetensors    concept int32[M], sample int64[M], start int64[M + 1],
                                 values float32[n], boxes float32[n, 4]; metadata "version", and the
                                 "digest" of the components

Map m is of concept[m] over the picture of sample[m] of the features that the concepts were learnt
on; its cells are start[m] to start[m + 1].
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
from jaxtyping import Float, Int

from ports import VLM
from xlvlm_jax.concepts import maps
from xlvlm_jax.concepts.picture_maps import BATCH, concept_site, picture_layouts
from xlvlm_jax.concepts.record import MAPS as FILE
from xlvlm_jax.concepts.record import Concepts, digest_of_components
from xlvlm_jax.concepts.stage import top_samples
from xlvlm_jax.data.batches import groups_of, make_batch
from xlvlm_jax.features.reader import Features, sample_of
from xlvlm_jax.storage import atomic, damaged, versions
from xlvlm_jax.storage.same_model import require_model
from xlvlm_jax.storage.tensors import as_bytes


class CellValues(NamedTuple):
    """A map as a list of cells."""

    values: Float[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]  # x0, y0, x1 and y1 as fractions of the picture


StoredMaps = dict[tuple[int, int], CellValues]  # {(concept, sample): map}


def map_top_pictures(
    vlm: VLM,
    concepts: Concepts,
    features: Features,
    *,
    num_images: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> StoredMaps:
    """Maps each concept over the pictures that activate it most.

    Args:
        vlm: the model that the concepts were learnt on.
        concepts: concepts with the activations of the rows of `features`.
        features: the features that they were learnt on.
        num_images: number of pictures per concept.
        progress: called after each batch with (pictures done, number of pictures).

    Raises:
        ValueError: the concepts have no activations of these features, are of another model or
            width, or the model's image tokens have no place.
        OSError: a picture can't be read.
    """
    require_model(concepts.source, vlm, "the concepts were learnt on the states of")
    site = concept_site(vlm, None, concepts)
    if concepts.activations is None or len(concepts.activations) != features.num_rows:
        raise ValueError(
            f"the concepts have no activations of the {features.num_rows} rows of "
            f"{features.path}; give the features that they were learnt on"
        )
    top = top_samples(features, concepts.activations, num_images)
    wanted: dict[int, list[int]] = {}
    for k, samples in enumerate(top):
        for sample in samples:
            wanted.setdefault(sample, []).append(k)
    found: StoredMaps = {}
    numbers = sorted(wanted)
    asked = [sample_of(features.samples[number], number) for number in numbers]
    done = 0
    for group in groups_of(asked, BATCH):
        batch = make_batch(vlm, group, BATCH, strict=True)
        (inputs,) = batch.inputs
        layouts = picture_layouts(vlm, inputs, batch.sizes)
        states = np.asarray(vlm.states(inputs, sites=[site])[site], np.float32)
        drawn = maps.concept_maps_by_row(states, concepts, layouts)
        for number, (layout,), (every,) in zip(
            numbers[done : done + len(group)], layouts, drawn, strict=False
        ):
            boxes = np.asarray(layout.boxes, np.float32).reshape(-1, 4)
            for k in wanted[number]:
                # A view would keep the maps of all concepts.
                found[k, number] = CellValues(every[k].reshape(-1).copy(), boxes)
        done += len(group)
        if progress is not None:
            progress(done, len(numbers))
    return found


def save_maps(directory: Path, concepts: Concepts, found: StoredMaps) -> None:
    """Writes maps beside the concepts that they are of.

    Args:
        directory: the directory of the concepts.
        concepts: the concepts in it.
        found: from `map_top_pictures`; may be empty.
    """
    keys = sorted(found)
    cells = [found[key] for key in keys]
    tensors = {
        "concept": np.array([k for k, _ in keys], np.int32),
        "sample": np.array([sample for _, sample in keys], np.int64),
        "start": np.cumsum([0, *(len(each.values) for each in cells)], dtype=np.int64),
        # The first parts are for maps without a cell, or no maps.
        "values": np.concatenate([np.zeros(0), *(each.values for each in cells)], dtype=np.float32),
        "boxes": np.concatenate(
            [np.zeros((0, 4)), *(each.boxes for each in cells)], dtype=np.float32
        ),
    }
    metadata = {"version": str(versions.VERSION), "digest": digest_of_components(concepts)}
    atomic.write(directory / FILE, as_bytes(tensors, metadata))


def load_maps(directory: Path, concepts: Concepts) -> StoredMaps:
    """Reads what `save_maps` wrote; {} if there is nothing.

    Args:
        directory: the directory of the concepts.
        concepts: the concepts in it.

    Raises:
        ValueError: the file is damaged, or its maps are of other concepts.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    with damaged.reported(path, "maps", "write them again with `xlvlm map`"):
        with safetensors.safe_open(path, "numpy") as file:
            metadata = dict(file.metadata() or {})
            concept, sample, start, values, boxes = (
                file.get_tensor(name) for name in ("concept", "sample", "start", "values", "boxes")
            )
        versions.require(path, {"version": int(metadata["version"])}, "map again")
        if metadata["digest"] != digest_of_components(concepts):
            raise ValueError(f"{path}: of other concepts than those beside it; map them again")
        return _by_key(concept, sample, start, values, boxes)


def _by_key(
    concept: Int[np.ndarray, " M"],
    sample: Int[np.ndarray, " M"],
    start: Int[np.ndarray, " M_plus_1"],
    values: Float[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
) -> StoredMaps:
    return {
        (int(k), int(s)): CellValues(values[begin:end], boxes[begin:end])
        for k, s, begin, end in zip(concept, sample, start[:-1], start[1:], strict=True)
    }

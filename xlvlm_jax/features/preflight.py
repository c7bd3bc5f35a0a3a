"""What an extraction will need, known before it starts: rows, disk, memory and programs.

T prompt positions, M new tokens, D width.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ports import VLM
from ports.inputs.padding import bucket_length
from ports.programs import program_bytes
from xlvlm_jax.data.batches import groups_of
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.manifest import manifest_of
from xlvlm_jax.features.pipeline import prepare
from xlvlm_jax.features.settings import ExtractionSettings

_LOOKED_AT = 8  # batches, spread over the samples, to determine the programs
_ROW_BYTES = 16  # for a row's sample, position and token
_CELL_BYTES = 32  # for the cell and box of an image token


class ExtractionNeeds(NamedTuple):
    """What a run over some samples will need; sizes in bytes."""

    samples: int
    done: int  # samples already in the directory
    missing: tuple[str, ...]  # images that do not exist
    rows: int  # maximum, for the remaining samples
    disk: int  # for those rows and samples
    free: int  # on the disk they will be written to
    programs: tuple[tuple[int, int], ...]  # (T as compiled, number of examined batches)
    parameters: int  # per device
    temporaries: int  # per device, for the largest program: cache, states, buffers

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.disk <= self.free


def sites_of(vlm: VLM, settings: ExtractionSettings) -> tuple[str, ...]:
    """Returns the sites that the settings name, all with a state at every position of a selection.

    Args:
        vlm: the model.
        settings: what to extract.

    Raises:
        ValueError: a site is unknown, or its states do not lie at these positions: those of the
            vision tower belong to patches, and of the head a prompt has only the last.
    """
    try:
        sites = vlm.check_sites(settings.sites, generated=True, one_state=True)
    except ValueError:
        every = vlm.check_sites(settings.sites)
        if outside := [site for site in every if not vlm.module.is_of_decoder(site)]:
            raise ValueError(
                f"the states at site {outside[0]!r} belong to patches, not tokens; choose a site "
                "of the decoder"
            ) from None
        raise
    prompts = settings.mode == "teacher-forcing" or not settings.selection.generated_only
    if prompts and vlm.head in sites:
        raise ValueError(
            f"site {vlm.head!r} has no states for the tokens of prompts; generate with "
            "--generated-only, or choose sites below it"
        )
    return sites


def disk_needs(
    vlm: VLM, samples: Sequence[Sample], settings: ExtractionSettings, *, models: int = 1
) -> tuple[int, int]:
    """Returns the maximum number of rows, and of bytes on disk, that the samples give.

    Rows from prompts are counted as twice the length of the port's example prompt with one image; a
    selection of one row per sample is exact.

    Args:
        vlm: the model.
        samples: the samples to extract.
        settings: what to extract.
        models: number of models that have states at each site.
    """
    positions = settings.max_new_tokens
    if not settings.selection.generated_only or settings.mode == "teacher-forcing":
        positions += 2 * vlm.example_inputs()["input_ids"].shape[1]
    rows = len(samples) * settings.selection.rows_at_most(positions)
    width = sum(vlm.site_shapes[site][-1] for site in settings.sites)
    state_bytes = models * width * jnp.dtype(settings.dtype).itemsize
    # An answer's text, in addition to what is known about the sample.
    described = sum(len(json.dumps(sample.to_dict())) for sample in samples)
    described += len(samples) * 8 * settings.max_new_tokens
    row_bytes = state_bytes + _ROW_BYTES + _CELL_BYTES * settings.selection.has_cells
    return rows, rows * row_bytes + described


def free_bytes(output: Path) -> int:
    """Returns the free bytes of the disk that a path is, or will be, on."""
    existing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def require_disk(output: Path, needed: int) -> None:
    """Checks that the disk has room for this many bytes.

    Raises:
        OSError: it does not.
    """
    free = free_bytes(output)
    if needed > free:
        raise OSError(
            f"{output} needs up to {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB "
            "free; free some space, capture fewer sites, or start anyway with --ignore-disk"
        )


def preflight(
    vlm: VLM,
    samples: Sequence[Sample],
    output: str | Path,
    settings: ExtractionSettings,
    *,
    models: int = 1,
) -> ExtractionNeeds:
    """Returns what `extract` with the same arguments will need; writes nothing.

    Preprocesses a few batches and compiles the largest program that they need.

    Args:
        vlm: from `ports.load_abstract` or `load`.
        samples: the samples to extract.
        output: directory of the features.
        settings: what to extract.
        models: number of models that have states at each site: 2 with a fine-tuned one.

    Raises:
        ValueError: as for `extract`, or none of the examined images can be read.
    """
    output = Path(output)
    settings = dataclasses.replace(settings, sites=sites_of(vlm, settings))
    state = manifest_of(output)
    done = 0 if state is None else state["samples"]
    left = samples[done:]
    rows, disk = disk_needs(vlm, left, settings, models=models)
    programs, largest = _programs(vlm, left or samples, settings)
    memory = _compiled_memory(vlm, largest, settings)
    return ExtractionNeeds(
        samples=len(samples),
        done=done,
        missing=tuple(str(s.image) for s in samples if not s.image.is_file()),
        rows=rows,
        disk=disk,
        free=free_bytes(output),
        programs=programs,
        parameters=models * memory[0],
        temporaries=memory[1],
    )


def _programs(
    vlm: VLM, samples: Sequence[Sample], settings: ExtractionSettings
) -> tuple[tuple[tuple[int, int], ...], dict[str, np.ndarray]]:
    """Returns the lengths that some of the batches are compiled for, and the longest arrays."""
    groups = groups_of(samples, settings.batch_size)
    chosen = sorted({round(i) for i in np.linspace(0, len(groups) - 1, _LOOKED_AT)})
    ready = [prepare(vlm, groups[i], settings=settings, strict=False) for i in chosen]
    arrays = [inputs for batch in ready for inputs in batch.inputs]
    if not arrays:
        reason = next(error for error in ready[0].errors if error)
        raise ValueError(f"none of the examined images can be read; the first: {reason}")
    lengths = [bucket_length(each["input_ids"].shape[1]) for each in arrays]
    counts = tuple((length, lengths.count(length)) for length in sorted(set(lengths)))
    return counts, arrays[int(np.argmax(lengths))]


def _compiled_memory(
    vlm: VLM, inputs: dict[str, np.ndarray], settings: ExtractionSettings
) -> tuple[int, int]:
    """Returns the `program_bytes` of the program that runs such a batch."""
    generating = settings.mode == "generate"
    lowered = vlm.lower(
        inputs,
        sites=settings.sites,
        max_new_tokens=settings.max_new_tokens if generating else None,
        prompt_states=generating and not settings.selection.generated_only,
    )
    return program_bytes(lowered)

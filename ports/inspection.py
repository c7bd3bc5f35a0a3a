"""Describes a checkpoint and the memory that a run needs, from its configuration alone.

B batch, T prompt positions, M new tokens, D width.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from PIL import Image

from ports import description
from ports.intervene.sites import capture, trace_sites
from ports.nn.vision_language import EXAMPLE_TEXT
from ports.parallel import sharding
from ports.vlm import VLM

PROMPT = "Describe the image."


class BatchNeeds(NamedTuple):
    """Size of one batch, in tokens and bytes."""

    batch_size: int
    image_size: tuple[int, int] | None  # (width, height) in pixels; None: the port's example
    prompt_tokens: int  # T of one sample, including image tokens
    image_tokens: int  # how many of these stand for the image
    bucket: int  # T as compiled
    new_tokens: int  # M
    parameters: int
    cache: int  # keys and values of T + M positions
    states: int  # states of the chosen sites, at all T positions
    logits: int  # [B, T, V], returned by a forward pass but not by generation
    # The largest output of one module, of the head for the last position alone; a few of these are
    # alive at a time.
    largest: int

    @property
    def total(self) -> int:
        """Lower bound of the bytes needed for generation on one device: parameters, cache, states
        and the largest output.
        """
        return self.parameters + self.cache + self.states + self.largest


class Placement(NamedTuple):
    """Placement of the parameters on a mesh."""

    mesh: tuple[int, int]  # (data, model)
    device_bytes: int  # bytes of parameters on each device
    share: float  # device_bytes over the model's bytes; 1 / model if everything is sharded
    total: int  # lower bound of the bytes needed on each device, see `BatchNeeds.total`
    notes: tuple[str, ...]  # what is replicated rather than sharded, and why


class Inspection(NamedTuple):
    """Description of a checkpoint."""

    model_type: str
    dtype: str
    parts: dict[str, int]  # part of the model -> number of parameters
    sites: dict[str, tuple[int, int]]  # pattern such as "layers.{0-31}.mlp" -> (count, width)
    prompt: str | None  # a rendered prompt; None if the processor does not load
    no_prompt: str | None  # why there is no prompt
    needs: BatchNeeds
    devices: str
    device_bytes: int | None  # memory of one device; of CPU devices, which share it, the host's
    shared_memory: bool  # whether the devices share `device_bytes`
    placement: Placement | None  # None without a mesh

    @property
    def fits(self) -> bool | None:
        """Whether it fits on devices such as the available ones, of which it takes as many as the
        mesh has, or one; None if their memory is unknown. False is certain, True is not: `total` is
        a lower bound.
        """
        if self.device_bytes is None:
            return None
        if self.placement is None:
            return self.needs.total <= self.device_bytes
        count = math.prod(self.placement.mesh) if self.shared_memory else 1
        return count * self.placement.total <= self.device_bytes


def inspect(
    vlm: VLM,
    *,
    batch_size: int = 16,
    image_size: tuple[int, int] = (640, 480),
    new_tokens: int = 20,
    sites: Sequence[str] = (),
    mesh: tuple[int, int] | None = None,
) -> Inspection:
    """Describes a model and the memory that one batch needs.

    Args:
        vlm: a model from `ports.load_abstract` (or `ports.load`).
        batch_size: samples per batch, B.
        image_size: (width, height) of the images, in pixels. The checkpoint's processor determines
            their number of tokens; without a processor, the port's example image is used.
        new_tokens: generated tokens per sample, M.
        sites: sites whose states are kept.
        mesh: (data, model): devices that share the batch, and devices that share the model. The
            devices need not exist.

    Returns:
        The description; nothing is computed on the model's weights.

    Raises:
        ValueError: a site is unknown, or the processor rejects the image.
    """
    sites = vlm.check_sites(sites)
    prompt, no_prompt, inputs = _batch(vlm, batch_size, image_size)
    known = image_size if prompt is not None else None
    rows, length = inputs["input_ids"].shape
    (logits, states), shapes = trace_sites(capture(vlm.apply, sites), vlm.params, inputs)
    width = vlm.dtype.itemsize
    ids = inputs["input_ids"][0] if prompt is not None else None
    image_tokens = _image_tokens(vlm, ids, length)
    needs = BatchNeeds(
        batch_size=rows,
        image_size=known,
        prompt_tokens=length if ids is None else int(inputs["attention_mask"][0].sum()),
        image_tokens=image_tokens,
        bucket=length,
        new_tokens=new_tokens,
        parameters=_bytes(vlm.params),
        cache=vlm.cache_bytes(rows, length + new_tokens),
        states=_bytes(states),
        logits=_bytes(logits),
        # Logits are float32 in every dtype, and those of all positions are of `forward` alone.
        largest=max(
            _bytes(logits) // length,
            *(width * math.prod(shape) for shape in shapes.values() if shape != logits.shape),
        ),
    )
    devices, memory, shared = _devices()
    return Inspection(
        model_type=vlm.config.model_type,
        dtype=vlm.dtype.name,
        parts=description.count_by_part(vlm.module, vlm.params),
        sites=description.patterns(shapes),
        prompt=prompt,
        no_prompt=no_prompt,
        needs=needs,
        devices=devices,
        device_bytes=memory,
        shared_memory=shared,
        placement=None if mesh is None else _placement(vlm, mesh, needs),
    )


def _placement(vlm: VLM, mesh: tuple[int, int], needs: BatchNeeds) -> Placement:
    placed = sharding.abstract_mesh(*mesh)
    shardings = sharding.param_shardings(placed, vlm.params, vlm.axes, vlm.kv_heads)
    size = sharding.parameter_bytes(vlm.params, shardings)
    # Rows that do not divide evenly are on every device, and so are key-value heads.
    data, model = mesh
    rows = data if needs.batch_size % data == 0 else 1
    heads = 1 if vlm.sizes.text.num_kv_heads % model else model
    # At least: states of the residual stream are divided by rows alone.
    rest = needs.cache // (rows * heads) + (needs.states + needs.largest) // (rows * model)
    return Placement(mesh, size, size / _bytes(vlm.params), size + rest, _notes(vlm, model))


def _notes(vlm: VLM, devices: int) -> tuple[str, ...]:
    """Returns a line for each dimension that the number of devices does not divide evenly."""
    text, notes = vlm.sizes.text, []
    for path, count in vlm.kv_heads.items():
        if count % devices:
            what = "" if path == vlm.module.decoder_path else f" of {'.'.join(path)}"
            notes.append(
                f"key-value heads{what}: {count} can't be divided evenly over {devices} devices; "
                "their cache and their projections are replicated"
            )
    for what, count, then in (
        ("query heads", text.num_heads, "every device computes attention for all of them"),
        ("vocabulary", text.vocab_size, "embeddings and head are divided along their width"),
        ("feed-forward width", text.intermediate_size, "these layers are replicated"),
    ):
        if count % devices:
            notes.append(f"{what}: {count} can't be divided evenly over {devices} devices; {then}")
    return tuple(notes)


def _batch(
    vlm: VLM, batch_size: int, image_size: tuple[int, int]
) -> tuple[str | None, str | None, dict[str, Any]]:
    """Returns (prompt, None, padded inputs), or (None, reason, the port's example inputs)."""
    try:
        prompt = vlm.render(PROMPT)
    except ValueError as error:
        return None, str(error), vlm.example_inputs(batch_size)
    image = Image.new("RGB", image_size)
    inputs = vlm.process([prompt] * batch_size, [image] * batch_size)
    return prompt, None, vlm.prepare(inputs)


def _image_tokens(vlm: VLM, ids: Any, length: int) -> int:
    if ids is None:
        return length - EXAMPLE_TEXT
    return int(sum((ids == token).sum() for token in vlm.image_tokens))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _devices() -> tuple[str, int | None, bool]:
    """Returns the devices' name, the memory of one, and whether they share it."""
    devices = jax.devices()
    name = f"{len(devices)} x {devices[0].device_kind}"
    # Of this process: those of others do not say.
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("bytes_limit" in s for s in stats):
        return name, min(s["bytes_limit"] for s in stats), False
    if devices[0].platform != "cpu":
        return name, None, False
    return name, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), True

"""Drawn pictures whose contents are known, and a model's states on them.

N pictures, C cells of a picture, D width, R states that predict words of captions, M rows to learn
from, E width of the embedding.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from ports import VLM, checkpoint
from ports.inputs.patch_layout import PatchLayout
from ports.models.clip import DualEncoder
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.answers import answered
from xlvlm_jax.data.scenes.scene import SPLITS, Split
from xlvlm_jax.metrics import embed_images
from xlvlm_jax.storage import tensors, versions
from xlvlm_jax.storage.same_model import ADAPTER, model_of

Progress = Callable[[int, int], None]
BATCH = 50  # pictures that run together
LEARNT_CELLS = 16  # image tokens per picture that are learnt from
COUNTS = (500, 200, 200)  # pictures to learn from, to fit probes to, and to test on
FILE = "pictures.safetensors"
BUNDLED_CLIP = "d7cbc389e2c8933d"  # fingerprint of the CLIP that ships with the package


class Pictures(NamedTuple):
    """Pictures, what they show, and the states at one site.

    Attributes:
        attributes: N dicts, what each picture shows, see `scenes.attributes`.
        cells: float32[N, C, D], states of the image tokens.
        said: float32[R, D], states that predict the words of a caption.
        picture: int[R], the picture of each of these.
        pixels: int[N, C], pixels of objects in each cell.
        area: int[N, C], all pixels of each cell.
        in_box: bool[N, C], whether a cell's middle lies in the box of an object.
    """

    attributes: list[dict[str, Any]]
    cells: Float[np.ndarray, "N C D"]
    said: Float[np.ndarray, "R D"]
    picture: Int[np.ndarray, " R"]
    pixels: Int[np.ndarray, "N C"]
    area: Int[np.ndarray, "N C"]
    in_box: Bool[np.ndarray, "N C"]

    @property
    def states(self) -> Float[np.ndarray, "M D"]:
        """All states: those of the image tokens, picture by picture, then those of captions."""
        return np.concatenate([self.cells.reshape(-1, self.cells.shape[-1]), self.said])


class KnownPictures(NamedTuple):
    """What dictionaries of one site are learnt from and scored on.

    Attributes:
        site: the site of all states.
        seed: of the drawing.
        rows: float32[M, D], states to learn from, of pictures of their own.
        fit: pictures that probes are fitted to and concepts are chosen on.
        test: pictures that are scored.
        embeddings: float32[N, E] of the test pictures, by CLIP.
    """

    site: str
    seed: int
    rows: Float[np.ndarray, "M D"]
    fit: Pictures
    test: Pictures
    embeddings: Float[np.ndarray, "N E"]


def made_with(vlm: VLM, clip: DualEncoder | None = None) -> dict[str, Any]:
    """Returns what states, and embeddings of pictures, depend on, as JSON values.

    What all runs of earlier releases had, and did not name, is left out: float32, and the CLIP that
    ships with the package.

    Args:
        vlm: the model whose states are kept.
        clip: the model of the embeddings; None where none are kept.
    """
    described: dict[str, Any] = dict(model_of(vlm))
    if vlm.dtype.name != "float32":
        described["dtype"] = vlm.dtype.name
    if clip is not None:
        digest = checkpoint.fingerprint(clip.directory)
        kind = jnp.dtype(clip.module.dtype).name
        if (digest, kind) != (BUNDLED_CLIP, "float32"):
            described |= {"clip": digest, "clip dtype": kind}
    return described


def is_of(known: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Returns whether a record of something kept is of what is asked for.

    Args:
        known: with the entries of `made_with` from when it was made; earlier releases named no
            adapter, and had none.
        asked: the same now.
    """
    without = {"adapter": None, ADAPTER: None}
    return without | dict(known) == without | dict(asked)


class Captioned(NamedTuple):
    """A batch of pictures, each with its prompt and a caption."""

    inputs: dict[str, np.ndarray]
    lengths: Int[np.ndarray, " B"]  # tokens of each caption
    layouts: list[PatchLayout]  # of each picture
    predicts: Bool[np.ndarray, "B T"]  # positions whose states predict a token of the caption


def caption_batch(vlm: VLM, drawn: Sequence[scenes.Scene], images: Sequence[Any]) -> Captioned:
    """Returns the processor's arrays of pictures with their first captions.

    Args:
        vlm: the model.
        drawn: scenes.
        images: their pictures.

    Raises:
        ValueError: the model's image tokens have no place of their own.
    """
    render = vlm.render(prompts.CAPTION)
    said = [scenes.captions(scene)[0] for scene in drawn]
    texts, suffixes, lengths = answered(vlm, [render] * len(drawn), said, ended=False)
    if suffixes is not None:
        raise ValueError(
            f"a {vlm.config.model_type} sees its prompts as a prefix, which the benchmark does not "
            "run; use a model that reads from left to right"
        )
    inputs = vlm.process(texts, list(images))
    T = inputs["input_ids"].shape[1]
    before = T - 1 - np.arange(T)  # number of positions after each
    predicts = (before >= 1) & (before <= lengths[:, None])
    layouts = [row[0] for row in vlm.patch_layout(inputs)]
    if layouts[0].latents:
        raise ValueError(
            f"the image tokens of a {vlm.config.model_type} are latents that each see the whole "
            "picture, so maps of them mean nothing; use a model without a resampler"
        )
    return Captioned(inputs, lengths, layouts, predicts)


def cells_of(layouts: Sequence[PatchLayout]) -> Int[np.ndarray, " C"]:
    """Returns the numbers of the cells, row by row, that have a state and show part of the picture.

    Args:
        layouts: of pictures of one size.

    Raises:
        ValueError: they are not the same cells in all pictures.
    """
    parts = []
    for layout in layouts:
        sides = np.ptp(layout.boxes.reshape(-1, 2, 2), axis=1)
        parts.append((layout.positions.reshape(-1) >= 0) & (sides > 0).all(axis=1))
    if not all(np.array_equal(part, parts[0]) for part in parts):
        raise ValueError(
            "pictures of one size have states of different cells, which the benchmark does not "
            "compare; use a model whose image tokens are the same for all"
        )
    return np.flatnonzero(parts[0])


def draw_and_run(
    vlm: VLM,
    site: str,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Pictures:
    """Draws the first scenes of a split and runs the model over them, with a caption each.

    Args:
        vlm: the model.
        site: a site of its decoder.
        split: "train", "val" or "test".
        count: N.
        seed: random seed of the scenes.
        progress: called with (pictures done, N).

    Returns:
        The pictures; the same arguments give the same ones.

    Raises:
        ValueError: as for `caption_batch`, or the site is unknown.
    """
    drawn = _scenes(split, count, seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Pictures._fields[1:]}
    for start in range(0, count, BATCH):
        some = drawn[start : start + BATCH]
        pictures, masks = zip(*map(scenes.draw_with_masks, some), strict=True)
        batch = caption_batch(vlm, some, [Image.fromarray(picture) for picture in pictures])
        states = np.asarray(vlm.states(batch.inputs, sites=[site])[site], np.float32)
        rows, columns = np.nonzero(batch.predicts)
        parts["said"].append(states[rows, columns])
        parts["picture"].append(rows + start)
        cells = cells_of(batch.layouts)
        for n, (layout, shown) in enumerate(zip(batch.layouts, masks, strict=True)):
            parts["cells"].append(states[n, layout.positions.reshape(-1)[cells]][None])
            for name, values in _overlaps(layout, shown).items():
                parts[name].append(values[cells][None])
        if progress is not None:
            progress(start + len(some), count)
    found = {name: np.concatenate(values) for name, values in parts.items()}
    return Pictures([scenes.attributes(scene) for scene in drawn], **found)


def _scenes(split: Split, count: int, seed: int) -> list[scenes.Scene]:
    return [scenes.sample_scene(split, index, seed) for index in range(count)]


def _overlaps(layout: PatchLayout, masks: Bool[np.ndarray, "O H W"]) -> dict[str, np.ndarray]:
    """Returns the pixels of objects in each cell, its area, and whether its middle is in a box."""
    height, width = masks.shape[1:]
    boxes = layout.boxes.reshape(-1, 4)
    x0, y0, x1, y1 = np.rint(boxes * [width, height, width, height]).astype(int).T
    # Sums over rectangles from the sums of all that begin in the corner.
    sums = np.pad(masks.any(axis=0).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    pixels = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    in_box = np.zeros(len(boxes), bool)
    for left, top, right, bottom in scenes.boxes(masks):
        in_box |= (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return {"pixels": pixels, "area": (x1 - x0) * (y1 - y0), "in_box": in_box}


def make_pictures(
    vlm: VLM,
    clip: DualEncoder,
    site: str,
    *,
    seed: int = 0,
    counts: tuple[int, int, int] = COUNTS,
    progress: Progress | None = None,
) -> KnownPictures:
    """Draws pictures and computes the states that dictionaries are learnt from and scored on.

    Rows to learn from are those of 16 image tokens of each picture, drawn by the seed, and of all
    positions that predict a token of its caption.

    Args:
        vlm: the model.
        clip: embeds the test pictures.
        site: a site of the model's decoder.
        seed: random seed.
        counts: numbers of pictures to learn from, to fit to and to test on.
        progress: called with (pictures done, all).

    Raises:
        ValueError: as for `draw_and_run`.
    """
    site, total, done = vlm.find_site(site, one_state=True), sum(counts), 0

    def advance(part: int, _: int) -> None:
        if progress is not None:
            progress(done + part, total)

    found = {}
    for split, count in zip(SPLITS, counts, strict=True):
        found[split] = draw_and_run(vlm, site, split, count, seed=seed, progress=advance)
        done += count
    random = np.random.default_rng(seed)
    learnt = found["train"]
    C = learnt.cells.shape[1]
    drawn = [cells[random.permutation(C)[:LEARNT_CELLS]] for cells in learnt.cells]
    images = (Image.fromarray(scenes.draw(each)) for each in _scenes("test", counts[2], seed))
    return KnownPictures(
        site=site,
        seed=seed,
        rows=np.concatenate([*drawn, learnt.said]),
        fit=found["val"],
        test=found["test"],
        embeddings=embed_images(clip, images),
    )


def load_or_make(
    directory: Path,
    vlm: VLM,
    clip: DualEncoder,
    site: str,
    *,
    seed: int = 0,
    counts: tuple[int, int, int] = COUNTS,
    progress: Progress | None = None,
) -> KnownPictures:
    """Returns the pictures that a directory holds, after making them if it has none or others.

    The file, pictures.safetensors, has the states to learn from as "rows", for other tools.

    Args:
        directory: made if it does not exist.
        vlm, clip, site, seed, counts, progress: as for `make_pictures`.

    Raises:
        ValueError: as for `make_pictures`, or the file is of another version or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path, site = directory / FILE, vlm.find_site(site, one_state=True)
    asked = {"version": versions.VERSION, "site": site, "seed": seed, "pictures": list(counts)}
    asked |= {"learnt cells": LEARNT_CELLS, **made_with(vlm, clip)}
    if path.is_file():
        try:
            with safe_open(path, "numpy") as file:
                known = json.loads(file.metadata()["pictures"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it") from None
        versions.require(path, known, "remove it")
        if is_of(known, asked):
            fit, test = (
                Pictures(
                    [scenes.attributes(each) for each in _scenes(split, count, seed)],
                    **{name: arrays[f"{part}.{name}"] for name in Pictures._fields[1:]},
                )
                for part, split, count in zip(("fit", "test"), SPLITS[1:], counts[1:], strict=True)
            )
            return KnownPictures(site, seed, arrays["rows"], fit, test, arrays["embeddings"])
    made = make_pictures(vlm, clip, site, seed=seed, counts=counts, progress=progress)
    arrays = {"rows": made.rows, "embeddings": made.embeddings}
    for part, pictures in (("fit", made.fit), ("test", made.test)):
        arrays |= {f"{part}.{name}": getattr(pictures, name) for name in Pictures._fields[1:]}
    directory.mkdir(parents=True, exist_ok=True)
    tensors.write(path, arrays, {"pictures": json.dumps(asked)})
    return made

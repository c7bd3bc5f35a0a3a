"""VTI (visual and textual intervention): what masked pictures, or right captions, share.

    image   x_i = mean over masks m of h(mask_m(picture_i)) - h(picture_i)
    text    x_i = h(prompt_i, positive_i) - h(prompt_i, negative_i)         the vectors of P2S

h is the mean state over the picture's tokens for the image part, and the state of the last token
for the text part. At each site, u maximises the sum over samples of <x_i, u>^2, and

    vector = <mean(x), u> u

which is added to the states. From "Reducing Hallucinations in Vision-Language Models via Latent
Space Steering" (Liu et al. 2024, arXiv 2410.15778). What differs: there the image part has a
direction for each token, here one for all tokens, so that the number of tokens may vary; there
cells are masked behind the processor, here before it, so that any processor will do; there states
are scaled back to their norm after the addition, here `ports.add` or, for a step relative to the
norm, `ports.add_relative` is used.

N samples, D width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from ports import VLM
from ports.intervene.edits import IMAGE
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.steering import teacher_forcing
from xlvlm_jax.steering.directions import along, principal_direction
from xlvlm_jax.steering.l2s import contrast_shifts
from xlvlm_jax.steering.vectors import SteeringVector
from xlvlm_jax.storage.same_model import model_of

Array = jax.Array | np.ndarray
CELLS = 24  # on a side of a picture, as LLaVA's vision tower has patches


def mask_cells(
    picture: UInt8[np.ndarray, "H W 3"], share: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture some of whose cells have its mean colour.

    Args:
        picture: uint8[H, W, 3]; it is divided into CELLS x CELLS cells (fewer if it has fewer
            pixels).
        share: the share of cells to mask, in [0, 1].
        rng: draws the cells.

    Returns:
        uint8[H, W, 3].
    """
    height, width, _ = picture.shape
    rows, columns = min(CELLS, height), min(CELLS, width)
    chosen = np.zeros(rows * columns, bool)
    chosen[rng.permutation(rows * columns)[: round(share * rows * columns)]] = True
    row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
    masked = chosen.reshape(rows, columns)[row][:, column]
    mean = picture.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.where(masked[..., None], mean, picture)


def mask_shifts(
    vlm: VLM,
    samples: Sequence[Sample],
    sites: Sequence[str],
    *,
    share: float = 0.99,
    num_masks: int = 10,
    seed: int = 0,
    strict: bool = False,
    errors: dict[str, str] | None = None,
    progress: teacher_forcing.Progress | None = None,
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Returns how masking a picture moves the mean state of its tokens, at each site.

    Args:
        vlm: the model.
        samples: images and prompts.
        sites: sites of the decoder or of the vision tower.
        share: the share of cells to mask, in (0, 1].
        num_masks: number of masked versions of each picture, which are averaged.
        seed: random seed of the masks.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        errors: receives {sample: why it was skipped}.
        progress: called with (samples done, number of samples).

    Returns:
        {site: float32[N, D]}, N the samples that were not skipped.

    Raises:
        ValueError: the share or the number of masks is out of range, a site's states are not those
            of the pictures, or no sample can be processed.
        OSError: if strict, for the first image that can't be read.
        FloatingPointError: if strict, for the first state that is not finite.
    """
    if not 0 < share <= 1 or num_masks < 1:
        raise ValueError(
            f"share is {share} and num_masks {num_masks}; expected a share in (0, 1] and one mask "
            "or more"
        )
    rng = np.random.default_rng(seed)
    errors = {} if errors is None else errors
    found: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    kept: list[str] = []
    for done, sample in enumerate(samples, start=1):
        try:
            picture = np.asarray(read_image(sample.image))
            versions = [picture, *(mask_cells(picture, share, rng) for _ in range(num_masks))]
            inputs = vlm.process([vlm.render(sample.prompt)] * len(versions), versions)
        except (OSError, ValueError) as error:
            if strict:
                raise type(error)(f"sample {sample.id}: {error}") from error
            errors[sample.id] = str(error)
            continue
        is_image = np.asarray(vlm.places(inputs).kind) == IMAGE
        shifts, bad = {}, {}
        for site, states in vlm.states(inputs, sites=sites).items():
            shifts[site] = _shift(site, states, is_image)
            bad |= teacher_forcing.not_finite(site, shifts[site][None], [sample], strict=strict)
        if bad:
            errors |= bad
            continue
        for site, shift in shifts.items():
            found[site].append(shift)
        kept.append(sample.id)
        if progress is not None:
            progress(done, len(samples))
    teacher_forcing.require_some(kept, samples, errors)
    return {site: np.stack(rows) for site, rows in found.items()}


def _shift(site: str, states: Array, is_image: Bool[np.ndarray, "V T"]) -> np.ndarray:
    """Returns float32[D], the mean over the masked versions minus the first, intact one.

    Only the means of the versions leave the device.
    """
    versions = len(is_image)
    if states.shape[:2] == is_image.shape:  # positions are tokens
        means = teacher_forcing.token_means(states, is_image)
    elif states.size % (versions * states.shape[-1]):
        raise ValueError(
            f"the states at {site!r} have shape {states.shape}, which is not that of {versions} "
            "pictures; choose a layer of the decoder or of the vision tower"
        )
    else:
        # All versions have one size and so the same number of patches, in order.
        rows = states.reshape(versions, -1, states.shape[-1])
        means = teacher_forcing.token_means(rows, np.ones(rows.shape[:2], bool))
    means = np.asarray(means)
    with np.errstate(invalid="ignore"):  # of infinite states, which the caller looks for
        return means[1:].mean(axis=0) - means[0]


def fit_vti_image(
    vlm: VLM,
    samples: Sequence[Sample],
    sites: str | Sequence[str],
    *,
    share: float = 0.99,
    num_masks: int = 10,
    seed: int = 0,
    where: Any = None,
    strict: bool = False,
    progress: teacher_forcing.Progress | None = None,
) -> dict[str, SteeringVector]:
    """Fits VTI's image part: a vector per site, along what masking does to the states of pictures.

    Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        samples: images and prompts; answers are not needed.
        sites: names or patterns, of the vision tower's layers as in the paper, or of the decoder.
        share, num_masks, seed, strict, progress: as for `mask_shifts`; `source["skipped"]` says
            why samples were skipped.
        where: the token positions that the vectors are meant for; None for "all" before the
            decoder, whose positions are not tokens, and "image" in it.

    Returns:
        {site: vector}, to be applied together.

    Raises:
        ValueError: as `mask_shifts`, a site is unknown, or masking changes nothing there.
    """
    listed = vlm.check_sites(sites, one_state=True)
    skipped: dict[str, str] = {}
    options: dict[str, Any] = {"share": share, "num_masks": num_masks, "seed": seed}
    shifts = mask_shifts(
        vlm, samples, listed, **options, strict=strict, errors=skipped, progress=progress
    )
    source = {
        **model_of(vlm),
        "method": "vti-image",
        "samples": len(samples) - len(skipped),
        "skipped": skipped,
        **options,
    }
    vectors = {}
    for site, rows in shifts.items():
        meant = ("image" if vlm.module.is_of_decoder(site) else "all") if where is None else where
        vectors[site] = SteeringVector(principal_part(rows), site, dict(source), meant)
    return vectors


def fit_vti_text(
    vlm: VLM,
    samples: Sequence[Sample],
    positive: Sequence[str],
    negative: Sequence[str],
    sites: str | Sequence[str],
    *,
    contrast: str = "completion",
    states: str = "last",
    where: Any = "all",
    batch_size: int = 16,
    strict: bool = False,
    progress: teacher_forcing.Progress | None = None,
) -> dict[str, SteeringVector]:
    """Fits VTI's text part: a vector per site, along what right captions do to the last state.

    Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        samples: images and prompts.
        positive, negative: captions without and with hallucination (or other counterparts), one
            each per sample.
        sites: names or patterns of sites of the decoder.
        where: the token positions that the vectors are meant for, see `ports.add`.
        contrast, states, batch_size, strict, progress: as for `fit_p2s`.

    Returns:
        {site: vector}, to be applied together.

    Raises:
        ValueError: as `fit_p2s`, a site is unknown, or the counterparts are the same everywhere.
    """
    skipped: dict[str, str] = {}
    options = {"contrast": contrast, "states": states}
    shifts = contrast_shifts(
        vlm,
        samples,
        positive,
        negative,
        vlm.check_sites(sites, generated=True, one_state=True),
        **options,
        batch_size=batch_size,
        strict=strict,
        errors=skipped,
        progress=progress,
    )
    kept = [i for i, sample in enumerate(samples) if sample.id not in skipped]
    told = {"method": "vti-text", "samples": len(kept), "skipped": skipped, **options}
    return {
        site: SteeringVector(principal_part(rows[kept]), site, {**model_of(vlm), **told}, where)
        for site, rows in shifts.items()
    }


def principal_part(shifts: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " D"]:
    """Returns the mean shift along the first principal direction of the shifts, not centred."""
    mean = np.asarray(np.mean(shifts, axis=0, dtype=np.float64), np.float32)
    return np.asarray(along(mean, principal_direction(shifts)), np.float32)

"""Learnt steering: optimises a vector or low-rank map so that the model gives the wanted answers.

    minimise over v   mean over samples of  w_i * -log p(answer_i | prompt_i, states + shift)
                      + penalty * |v|^2 / mean |states|^2    (of a map: (|A|^2 + |B|^2) / D)

with shift = v, or B A states for a map of rank R (A[R, D], B[D, R]), by Adam (Kingma and Ba 2015)
and gradients through the layers after the site. Samples whose wanted answer is the model's own
keep its other answers as they are. `states` are those of the last layer up to the site, which is
also the unit of v where the site is within a layer: what is added there is added to that layer's
states in the end. N samples, D width of the site.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from ports import VLM
from ports.intervene.edits import PADDING, Edit, add, add_mapped
from ports.nn.vision_language import VisionLanguageModel
from ports.parallel import compiled, sharding
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.solvers.collectives import keep_pace
from xlvlm_jax.steering import files, teacher_forcing
from xlvlm_jax.steering.site_steering import SiteSteering
from xlvlm_jax.steering.vectors import SteeringVector
from xlvlm_jax.storage.same_model import model_of

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class LowRankMap(SiteSteering):
    """A shift that depends linearly on the state: states + alpha * up down states.

    Attributes:
        down: float32[R, D].
        up: float32[D, R].
        site: the site whose states it is added to.
        source: how and on what it was fitted, as JSON values.
        where: the token positions it is meant for, see `ports.add`.
    """

    KIND = "low-rank map"
    TENSORS = ("down", "up")

    down: Float[Array, "R D"]
    up: Float[Array, "D R"]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def __repr__(self) -> str:
        rank, width = np.shape(self.down)
        return f"LowRankMap(rank {rank}, width {width} at {self.site!r}, where={self.where!r})"

    def _repr_html_(self) -> str:
        rank, width = np.shape(self.down)
        return files.as_html(self, rank=rank, width=width)

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            alpha: the strength, see `ports.add_mapped`.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: as for `ports.add_mapped`.
        """
        where = self.where if where is None else where
        return {self.site: add_mapped(self.down, self.up, alpha, where)}


class _Program(NamedTuple):
    """What a compiled step depends on besides shapes; equal programs compile once."""

    begin: str  # the site whose states are stored and run from
    site: str  # the site that is shifted
    length: int  # tokens of the longest answer


class _Setting(NamedTuple):
    """Arguments of the program besides what is learnt."""

    kinds: jax.Array  # kinds of positions to shift, see `Edit`
    start: jax.Array
    at: jax.Array | None
    scale: jax.Array  # unit of the vector: the stored states' root mean square
    rate: jax.Array
    penalty: jax.Array


_adam = optax.scale_by_adam()


def _losses_of(
    module: VisionLanguageModel,
    program: _Program,
    params: dict,
    learnt: dict,
    setting: _Setting,
    batch: teacher_forcing.Forced,
) -> jax.Array:
    """Returns float32[B], the mean cross-entropy of each answer's tokens."""
    if "vector" in learnt:
        edit = add(setting.scale * learnt["vector"])
    else:
        edit = add_mapped(learnt["down"], learnt["up"])
    places = {"kinds": setting.kinds, "start": setting.start, "at": setting.at}
    edits = {program.site: dataclasses.replace(edit, **places)}
    losses, weights = teacher_forcing.answer_losses(
        module, params, batch, program.begin, edits, program.length
    )
    return losses.sum(1) / weights.sum(1)


_losses = compiled.program(static=["program"])(_losses_of)


@compiled.program(static=["program"])
def _update(
    module: VisionLanguageModel,
    program: _Program,
    params: dict,
    learnt: dict,
    moments: Any,
    setting: _Setting,
    batch: teacher_forcing.Forced,
    weights: jax.Array,
) -> tuple[dict, Any, jax.Array]:
    """Runs a step of Adam; returns what is learnt, the moments and the loss before the step."""

    def loss(learnt: dict) -> jax.Array:
        losses = _losses_of(module, program, params, learnt, setting, batch)
        size = sum(jnp.sum(value**2) for value in learnt.values())
        return (losses * weights).sum() / weights.sum() + setting.penalty * size

    value, gradient = jax.value_and_grad(loss)(learnt)
    direction, moments = _adam.update(gradient, moments)
    learnt = jax.tree.map(lambda x, d: x - setting.rate * d, learnt, direction)
    # As they were given, so that all steps share one program.
    return *sharding.replicate((learnt, moments)), value


def fit_learned(
    vlm: VLM,
    samples: Sequence[Sample],
    targets: Sequence[str],
    site: str,
    *,
    rank: int | None = None,
    where: Any = "all",
    weights: Sequence[float] | None = None,
    start: Float[Array, " D"] | None = None,
    validation: float = 0.2,
    steps: int = 150,
    rate: float = 0.02,
    penalty: float = 0.0,
    batch_size: int = 32,
    strict: bool = False,
    evaluate_every: int = 10,
    patience: int = 3,
    seed: int = 0,
    progress: teacher_forcing.Progress | None = None,
) -> SteeringVector | LowRankMap:
    """Fits the vector (or map) that minimises the cross-entropy of the wanted answers.

    Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        samples: N images and prompts.
        targets: the wanted answer to each; for samples that must stay, the model's own answer.
        site: a site of the decoder, whose states are shifted.
        rank: None for a vector; R for a low-rank map.
        where: the token positions to shift, see `ports.add`; no mask and no indices for each row,
            which would be those of some prompts alone.
        weights: float[N], weights of the samples in the loss; None for equal weights.
        start: float[D], the initial vector; None for zero.
        validation: share of the samples held out for early stopping.
        steps: maximum number of steps of Adam.
        rate: learning rate of Adam, in units of the root mean square of the states at the last
            layer up to the site (for a map, of 1 / sqrt(D)).
        penalty: see the top of this file.
        batch_size: B.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        evaluate_every: steps between evaluations on the held-out samples.
        patience: number of evaluations without a 1 % lower loss after which training stops.
        seed: random seed of the split, the batches and the initial map.
        progress: called with (steps done, maximum number of steps).

    Returns:
        The vector or map with the lowest validation loss. `source["history"]` lists the
        evaluations: step, mean loss on the batches since the previous one, and validation loss;
        step 0 is without a shift. `source["skipped"]` says why samples were skipped.

    Raises:
        ValueError: the numbers of samples, answers and weights differ, there are too few samples
            to split, an option is out of its range, nothing can be learnt at the site, `start` has
            another width than the site, an answer has no tokens, or `where` is for some prompts
            alone.
        FloatingPointError: a loss is NaN or infinite, and none before it was better than that of
            step 0. Otherwise training stops there with a warning.
    """
    if len(samples) < 2 or not 0 < validation < 1:
        raise ValueError(
            f"{len(samples)} samples and validation={validation}; expected two samples or more and "
            "a share between 0 and 1"
        )
    weight = np.ones(len(samples)) if weights is None else np.asarray(weights, float)
    if weight.shape != (len(samples),) or not (weight > 0).all():
        raise ValueError(
            f"weights have shape {weight.shape} and a minimum of {weight.min(initial=np.inf):g}; "
            f"expected [{len(samples)}], all positive"
        )
    if rank is not None and (rank < 1 or start is not None):
        raise ValueError(f"rank is {rank}; expected at least 1, and start=None")
    if not (rate > 0 and penalty >= 0):
        raise ValueError(
            f"rate is {rate} and penalty {penalty}; expected a positive rate, and a penalty of at "
            "least 0"
        )
    teacher_forcing.require_counts(
        steps=steps, batch_size=batch_size, evaluate_every=evaluate_every, patience=patience
    )
    template = add(np.zeros(1), 1.0, where)
    if template.mask is not None or np.ndim(template.at) == 2:
        raise ValueError(
            "where is a mask or has indices for each row, which do not apply to other prompts; "
            "name positions"
        )
    site = vlm.find_site(site, one_state=True)
    begin = teacher_forcing.begin_site(vlm, site)
    width = vlm.site_shapes[site][-1]
    if start is not None and np.shape(start) != (width,):
        raise ValueError(
            f"start has shape {np.shape(start)}; the states at {site!r} have width {width}"
        )
    forced, kept, skipped = teacher_forcing.force(
        vlm, samples, targets, begin, batch_size=batch_size, strict=strict
    )
    if len(kept) < 2:
        raise ValueError(
            f"only one of {len(samples)} samples can be processed, expected two or more; the first "
            f"problem: {next(iter(skipped.values()))}"
        )
    weight, targets = weight[kept], [targets[int(i)] for i in kept]

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(kept))
    held = min(len(kept) - 1, max(1, round(validation * len(kept))))
    held_out, train = order[:held], order[held:]
    square = _mean_square(forced)
    if rank is None:
        scale = np.sqrt(square)
        first = np.zeros(width) if start is None else np.asarray(start) / scale
        learnt = {"vector": jnp.asarray(first, jnp.float32)}
    else:
        scale = 1.0
        down = rng.standard_normal((rank, width)) / np.sqrt(width)
        learnt = {"down": jnp.asarray(down, jnp.float32), "up": jnp.zeros((width, rank))}
    program = _Program(begin, site, forced.answer_length)
    model, on = (vlm.module, program, vlm.params), {"mesh": vlm.mesh}
    setting = _Setting(
        jnp.asarray(template.kinds),
        template.start,
        template.at,
        jnp.float32(scale),
        jnp.float32(rate if rank is None else rate / np.sqrt(width)),
        jnp.float32(penalty / (forced.states.shape[-1] if rank is None else width)),
    )
    moments = _adam.init(learnt)
    if vlm.mesh is not None:
        learnt, moments = jax.device_put((learnt, moments), sharding.replicated(vlm.mesh))

    def rows(index: np.ndarray) -> tuple[teacher_forcing.Forced, np.ndarray]:
        placed = sharding.put_batch({k: v[index] for k, v in forced._asdict().items()}, vlm.mesh)
        return forced._replace(**placed), weight[index]

    def validate(learnt: dict) -> float:
        total = 0.0
        for first in range(0, held, batch_size):
            index = held_out[first : first + batch_size]
            # Padded with samples that do not count, so that every batch runs the same program.
            fill = np.resize(held_out, batch_size)
            fill[: len(index)] = index
            losses = np.asarray(_losses(*model, learnt, setting, rows(fill)[0], **on))
            total += float((losses[: len(index)] * weight[index]).sum())
        return total / float(weight[held_out].sum())

    begun = best = learnt
    best_loss = validate(begun)
    _require_finite(0, best_loss)
    history = [{"step": 0, "train": None, "validation": best_loss}]
    to_beat, waited = 0.99 * best_loss, 0
    recent: list[jax.Array] = []
    queue = np.zeros(0, int)
    for step in range(1, steps + 1):
        while len(queue) < batch_size:
            queue = np.concatenate([queue, rng.permutation(train)])
        index, queue = queue[:batch_size], queue[batch_size:]
        changed = _update(*model, learnt, moments, setting, *rows(index), **on)
        learnt, moments, value = keep_pace(changed)
        recent.append(value)
        if progress is not None:
            progress(step, steps)
        if step % evaluate_every == 0 or step == steps:
            loss = validate(learnt)
            mean = float(np.mean([float(value) for value in recent]))
            if best is not begun and not np.isfinite([loss, mean]).all():
                warnings.warn(
                    f"at step {step}, the loss is not finite; the best step before is kept, lower "
                    "the learning rate",
                    stacklevel=2,
                )
                break
            _require_finite(step, loss, mean)
            history.append({"step": step, "train": mean, "validation": loss})
            if loss < best_loss:
                best, best_loss = learnt, loss
            waited = 0 if loss < to_beat else waited + 1
            to_beat, recent = min(to_beat, 0.99 * loss), []
            if waited == patience:
                break
    source = {
        **model_of(vlm),
        "method": "learned",
        "samples": len(kept),
        "skipped": skipped,
        "targets": _counts(targets),
        "validation samples": held,
        "rank": rank,
        "rate": rate,
        "penalty": penalty,
        "batch size": batch_size,
        "seed": seed,
        "best step": min(history, key=lambda look: look["validation"])["step"],
        "history": history,
    }
    arrays = {name: np.asarray(scale * value, np.float32) for name, value in best.items()}
    kind = SteeringVector if rank is None else LowRankMap
    return kind(**arrays, site=site, source=source, where=where)


def _mean_square(forced: teacher_forcing.Forced) -> float:
    """Returns the mean square of the stored states, without padding.

    Sample by sample: there is no second copy of all in memory.
    """
    total, count = 0.0, 0
    for states, kinds in zip(forced.states, forced.kinds, strict=True):
        rows = states[kinds != PADDING].astype(np.float32)
        total, count = total + float(np.sum(rows**2, dtype=np.float64)), count + rows.size
    return total / count


def _require_finite(step: int, *losses: float) -> None:
    """Raises FloatingPointError for a loss that is not: Adam keeps it for ever."""
    if wrong := [loss for loss in losses if not np.isfinite(loss)]:
        lower = "lower the learning rate, or " if step else ""
        raise FloatingPointError(
            f"at step {step}, the loss is {wrong[0]}; {lower}load the model in float32 or bfloat16 "
            "(numbers above 65,504 overflow in float16)"
        )


def _counts(words: Sequence[str]) -> dict[str, int]:
    names, numbers = np.unique(list(words), return_counts=True)
    return {str(name): int(count) for name, count in zip(names, numbers, strict=True)}

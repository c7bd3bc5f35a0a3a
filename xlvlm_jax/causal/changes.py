"""What edits of concepts change in predictions: all concepts and strengths in one program.

Each edit adds a direction, scaled by each state's norm, or removes the states' component along it.
The batch runs once up to the edited layer. If all edited positions are among the last n, only
these run again for each edit, over the cache of the rest (see `ports.decoding.tail`).

E edits, K concepts, B batch, T positions, n of them that predict, W words, R spellings of a word,
P words of a concept, V vocabulary, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ports import VLM
from ports.decoding.tail import Tail, cut_tail, run_tail
from ports.intervene.edits import (
    GENERATED,
    LAST_PROMPT,
    Edits,
    Where,
    ablate,
    add,
    add_relative,
    replace,
)
from ports.intervene.sites import capture
from ports.intervene.steer import steer, substitute
from ports.nn.vision_language import VisionLanguageModel
from ports.parallel import compiled
from xlvlm_jax.causal.words import NONE
from xlvlm_jax.steering.teacher_forcing import begin_site, position_kinds

Array = jax.Array
# Numbers of logits that the edits which run side by side may have. On CPU, they should stay in its
# cache; an accelerator needs many to be busy, and no other array of theirs may have more numbers.
LOGITS, ACCELERATOR_LOGITS = 2**20, 2**28


class ConceptEdits(NamedTuple):
    """E edits of a site, each of one concept.

    Attributes:
        vectors: float[E, D], direction of each edit; its length does not count.
        add: float[E], added along the vector, as a fraction of each state's norm.
        ablate: float[E], fraction removed of the states' component along the vector.
        concept: int[E], the concept of each edit.
    """

    vectors: Float[Any, "E D"]
    add: Float[Any, " E"]
    ablate: Float[Any, " E"]
    concept: Int[Any, " E"]


class Effects(NamedTuple):
    """Changes of predictions by each edit: with the edit minus without it.

    Attributes:
        words: float32[E, B, W], change of each word's log-probability, mean over the positions that
            predict.
        answer: float32[E, B], change of the answer's log-probability; NaN without answers.
        rest: float32[E, B], KL divergence, in nats, of all tokens but the concept's own.
    """

    words: Float[Any, "E B W"]
    answer: Float[Any, "E B"]
    rest: Float[Any, "E B"]


class Slopes(NamedTuple):
    """Derivatives with respect to the removed fraction of each concept's component.

    Attributes:
        words: float32[E, B], of the mean log-probability of the concept's own words.
        answer: float32[E, B], of the answer's log-probability; NaN without answers.
    """

    words: Float[Any, "E B"]
    answer: Float[Any, "E B"]


class Questions(NamedTuple):
    """A batch whose predictions are measured; the model has run up to the edited layer.

    Made by `prepare`.

    Attributes:
        vlm: the model.
        site: the edited site.
        inputs: arrays of the model's processor, B samples of T positions.
        tail: what runs the last n positions alone; None if positions before them are edited, or see
            them.
        begun: site -> states [B, T, D] to start from, if there is no tail.
        mask: bool[B, n] or bool[B, T], the positions that are edited.
        weights: float32[B, n], 1 at the positions that predict.
        targets: int32[B, n], the answer's tokens; None without answers.
    """

    vlm: VLM
    site: str
    inputs: dict[str, Array]
    tail: Tail | None
    begun: dict[str, Array]
    mask: Array
    weights: Array
    targets: Array | None


def concept_edits(
    vectors: Float[Any, "K D"],
    add: Sequence[float] = (),
    ablate: Sequence[float] = (),
) -> ConceptEdits:
    """Returns every concept added and ablated at several strengths.

    Args:
        vectors: float[K, D], the concepts' directions; their lengths do not count.
        add: strengths of the addition, as fractions of each state's norm.
        ablate: fractions of the component to remove.

    Returns:
        K (len(add) + len(ablate)) edits, concept by concept.

    Raises:
        ValueError: there are no strengths, one is zero or not finite, or vectors are not finite.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import causal
        >>> edits = causal.concept_edits(np.eye(2), add=[0.1], ablate=[1.0])
        >>> edits.concept.tolist(), edits.add.round(1).tolist(), edits.ablate.tolist()
        ([0, 0, 1, 1], [0.10000000149011612, 0.0, 0.10000000149011612, 0.0], [0.0, 1.0, 0.0, 1.0])
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"directions of concepts have shape {vectors.shape}; expected finite numbers [K, D]"
        )
    strengths = [*add, *ablate]
    wrong = [s for s in strengths if not np.isfinite(s) or s == 0]
    if not strengths or wrong:
        got = f"got {wrong[0]}" if wrong else "there are none"
        raise ValueError(f"strengths of edits are finite numbers other than 0; {got}")
    K, count = len(vectors), len(strengths)
    added = np.asarray([*add, *[0.0] * len(ablate)], np.float32)
    removed = np.asarray([*[0.0] * len(add), *ablate], np.float32)
    return ConceptEdits(
        np.repeat(vectors, count, axis=0),
        np.tile(added, K),
        np.tile(removed, K),
        np.repeat(np.arange(K, dtype=np.int32), count),
    )


def prepare(
    vlm: VLM,
    inputs: Mapping[str, Any],
    site: str,
    *,
    answer_lengths: Int[np.ndarray, " B"] | None = None,
    count: int | None = None,
    where: Where | Bool[np.ndarray, "B T"] = "predicting",
) -> Questions:
    """Runs a batch up to the edited layer, and keeps what `effects` needs.

    Args:
        vlm: the model.
        inputs: the processor's arrays, rows padded on the left.
        site: a site of the decoder whose states are edited.
        answer_lengths: how many of each row's last tokens are its answer; None for prompts alone,
            where the last position predicts.
        count: n - 1, at least the longest answer; None for the longest one. Batches of one length
            with the same number share a program. Of a shorter batch, all but one position count.
        where: the positions to edit, as for `ports.add`. "predicting": those that predict the
            answer.

    Returns:
        The batch.

    Raises:
        ValueError: the site is unknown or not in the decoder, no position is edited, or the inputs
            are invalid.
    """
    site = vlm.find_site(site, one_state=True)
    if site == vlm.head or not vlm.module.is_of_decoder(site):
        raise ValueError(
            f"concepts are edited in the decoder's states, but site {site!r} is not in it; choose "
            f"a layer, such as {vlm.layers[-1]!r}"
        )
    begin = begin_site(vlm, site)
    prepared = vlm.prepare(inputs)
    lengths = np.zeros(len(prepared["input_ids"]), int)
    if answer_lengths is not None:
        lengths = np.asarray(answer_lengths, int)
    kinds = position_kinds(vlm, prepared, lengths)
    answers = kinds == GENERATED
    length = kinds.shape[1]
    n = min(1 + int(lengths.max()), length)
    if count is not None:
        # The longest answer of all batches may be longer than this one is.
        n = max(n, min(1 + count, length - 1))
    predicts = np.pad(answers[:, 1:], ((0, 0), (0, 1)))
    if answer_lengths is None:
        predicts = kinds == LAST_PROMPT
    if isinstance(where, str) and where == "predicting":
        mask = predicts
    else:
        arrays = {**prepared, "position_kinds": kinds}
        edit = add(np.zeros(1, np.float32), where=_padded(where, prepared, length))
        places = vlm.places(arrays)
        mask = np.broadcast_to(edit.positions((*kinds.shape, 1), places), kinds.shape)
    if not mask.any():
        raise ValueError(f"where={where!r} selects no position of the batch; choose others")
    placed = vlm.place(inputs) | {"position_kinds": jnp.asarray(kinds)}
    # The tail's positions see the prompt's cache; a prefix-LM's prompt sees its own end.
    tail = n < length and not mask[:, : length - n].any() and not vlm.module.prefix_lm
    return Questions(
        vlm=vlm,
        site=site,
        inputs=placed,
        tail=_cut(vlm.module, n, begin, vlm.params, placed, mesh=vlm.mesh) if tail else None,
        begun={} if tail else _begun(vlm.module, begin, vlm.params, placed, mesh=vlm.mesh),
        mask=jnp.asarray(mask[:, length - n :] if tail else mask),
        weights=jnp.asarray(predicts[:, length - n :], jnp.float32),
        targets=None
        if answer_lengths is None
        else jnp.asarray(np.pad(prepared["input_ids"][:, length - n + 1 :], ((0, 0), (0, 1)))),
    )


def _padded(where: Any, prepared: Mapping[str, np.ndarray], length: int) -> Any:
    """Returns a mask over the caller's columns as one over the padded ones."""
    if np.ndim(where) != 2:
        return where
    return np.pad(np.asarray(where), ((0, 0), (length - np.shape(where)[1], 0)))


@compiled.program(static=["n", "begin"])
def _cut(model: VisionLanguageModel, n: int, begin: str, params: dict, inputs: dict) -> Tail:
    return cut_tail(model, params, inputs, n, begin)


@compiled.program(static=["begin"])
def _begun(model: VisionLanguageModel, begin: str, params: dict, inputs: dict) -> dict[str, Array]:
    return capture(model.apply, (begin,))({"params": params}, inputs, method="states")[1]


def _log_probabilities(
    model: VisionLanguageModel, params: dict, asked: "_Arrays", edits: Edits
) -> Array:
    """Returns float32[B, n, V] of the positions that predict, under edits."""
    if asked.tail is not None:
        states, _ = run_tail(model, params, asked.tail, edits)
    else:
        apply = steer(substitute(model.apply, asked.begun), edits)
        states = apply({"params": params}, asked.inputs, method="states")
        states = states[:, -asked.weights.shape[1] :]
    return jax.nn.log_softmax(model.bind({"params": params}).unembed(states))


class _Arrays(NamedTuple):
    """The arrays of `Questions`, as arguments of a compiled program."""

    inputs: dict[str, Array]
    tail: Tail | None
    begun: dict[str, Array]
    mask: Array
    weights: Array
    targets: Array | None


def _arrays(asked: Questions) -> _Arrays:
    # With a tail, pixels and prompts are no longer needed.
    return _Arrays(asked.inputs if asked.tail is None else {}, *asked[3:])


class _Measures(NamedTuple):
    words: Array  # float32[B, W]
    answer: Array  # float32[B]


def _measures(asked: _Arrays, logp: Array, words: Array) -> _Measures:
    """Returns the log-probabilities of words, as means over positions, and of the answer."""
    spelt = logp.at[..., _beyond(words, logp)].get(mode="fill", fill_value=-jnp.inf)
    each = jax.nn.logsumexp(spelt, axis=-1)  # [B, n, W]
    total = jnp.maximum(asked.weights.sum(1), 1)
    # Not as a product of matrices, whose factors a compiler may round to bfloat16.
    mean = (asked.weights[..., None] * each).sum(1) / total[:, None]
    answer = jnp.full(len(logp), jnp.nan)
    if asked.targets is not None:
        said = jnp.take_along_axis(logp, asked.targets[..., None], axis=-1)[..., 0]
        answer = (asked.weights * said).sum(1)
    return _Measures(mean, answer)


def _beyond(tokens: Array, logp: Array) -> Array:
    """Returns token ids with those that fill a row moved beyond the vocabulary, to be left out."""
    return jnp.where(tokens == NONE, logp.shape[-1], tokens)


def _divergence(asked: _Arrays, before: Array, after: Array, own: Array) -> Array:
    """Returns float32[B]: KL(before | after) of the distributions without the tokens `own`."""

    def rest(logp: Array) -> Array:
        hidden = logp.at[..., _beyond(own, logp)].set(-jnp.inf, mode="drop")
        return jax.nn.log_softmax(hidden)

    p, q = rest(before), rest(after)
    each = jnp.where(jnp.isfinite(p), jnp.exp(p) * (p - q), 0).sum(-1)
    return (asked.weights * each).sum(1) / jnp.maximum(asked.weights.sum(1), 1)


def _edits(site: str, asked: _Arrays, vector: Array, added: Array, removed: Array) -> Edits:
    # One of them has strength zero: adding and ablating share a program.
    return {
        site: (
            add_relative(vector, added, asked.mask),
            ablate(vector, removed, asked.mask),
        )
    }


def _in_groups(function: Callable[..., Any], size: int, edits: Any) -> Any:
    """Maps a function over the leading axis of a tree, `size` elements side by side."""
    count = len(jax.tree.leaves(edits)[0])
    groups = -(-count // size)
    size = -(-count // groups)  # groups of nearly the same size
    missing = groups * size - count

    def split(leaf: Array) -> Array:
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[-1:], missing, axis=0)])
        return leaf.reshape(groups, size, *leaf.shape[1:])

    grouped = jax.lax.map(jax.vmap(function), jax.tree.map(split, edits))
    return jax.tree.map(lambda x: x.reshape(groups * size, *x.shape[2:])[:count], grouped)


@compiled.program(static=["site", "size"])
def _effects(
    model: VisionLanguageModel,
    site: str,
    size: int,
    params: dict,
    asked: _Arrays,
    words: Array,
    own: Array,
    edits: ConceptEdits,
) -> tuple[Effects, Array]:
    before = _log_probabilities(model, params, asked, {})
    plain = _measures(asked, before, words)

    def one(edit: ConceptEdits) -> Effects:
        given = _edits(site, asked, edit.vectors, edit.add, edit.ablate)
        after = _log_probabilities(model, params, asked, given)
        changed = _measures(asked, after, words)
        return Effects(
            changed.words - plain.words,
            changed.answer - plain.answer,
            _divergence(asked, before, after, own[edit.concept]),
        )

    return _in_groups(one, size, edits), plain.words


def effects(
    asked: Questions,
    edits: ConceptEdits,
    words: Int[Any, "W R"],
    own: Int[Any, "K P"],
    *,
    at_once: int | None = None,
) -> tuple[Effects, Float[Array, "B W"]]:
    """Measures what every edit changes in a batch, in one compiled program.

    Vectors, strengths, positions and words are arguments of the program: others of the same number
    compile nothing.

    Args:
        asked: the batch, of `prepare`.
        edits: E edits, such as those of `concept_edits`.
        words: token ids of the spellings of each word, -1 after the last; `Vocabulary.tokens`.
        own: token ids of each concept's own words, which `Effects.rest` leaves out, -1 after the
            last; `own_tokens`.
        at_once: number of edits that run side by side; None chooses by backend and size.

    Returns:
        The changes, and float32[B, W], the words' log-probabilities without an edit.

    Raises:
        ValueError: the directions have another width than the states.
    """
    _check_width(asked, edits)
    return _effects(
        asked.vlm.module,
        asked.site,
        at_once or _at_once(asked, np.size(words)),
        asked.vlm.params,
        _arrays(asked),
        jnp.asarray(words),
        jnp.asarray(own),
        jax.tree.map(jnp.asarray, edits),
        mesh=asked.vlm.mesh,
    )


def _check_width(asked: Questions, edits: ConceptEdits) -> None:
    width = asked.vlm.site_shapes[asked.site][-1]
    if edits.vectors.shape[-1] != width:
        raise ValueError(
            f"the concepts are {edits.vectors.shape[-1]} wide, but the states at {asked.site!r} "
            f"have width {width}; choose the site and the model that they were learnt on"
        )


def _at_once(asked: Questions, spellings: int = 0) -> int:
    """Returns how many edits run side by side: as many as keep their largest array small."""
    config = asked.vlm.sizes.text
    logits = asked.weights.size * max(config.vocab_size, spellings)
    if jax.default_backend() == "cpu":
        return max(1, LOGITS // logits)
    B, positions = asked.mask.shape
    seen = asked.inputs["input_ids"].shape[1]
    # Without a tail, whole sequences run for each edit, and these outgrow the logits of a few.
    widest = max(config.intermediate_size, config.num_heads * seen)
    return max(1, ACCELERATOR_LOGITS // max(logits, B * positions * widest))


@compiled.program(static=["site", "size"])
def _slopes(
    model: VisionLanguageModel,
    site: str,
    size: int,
    params: dict,
    asked: _Arrays,
    words: Array,
    own: Array,
    edits: ConceptEdits,
) -> Slopes:
    def one(edit: ConceptEdits) -> Slopes:
        chosen = own[edit.concept]

        def measured(removed: Array) -> tuple[Array, Array]:
            given = _edits(site, asked, edit.vectors, edit.add, removed)
            logp = _log_probabilities(model, params, asked, given)
            found = _measures(asked, logp, words)
            is_own = chosen != NONE
            values = jnp.where(is_own, found.words[:, chosen], 0)
            return values.sum(1) / jnp.maximum(is_own.sum(), 1), found.answer

        # Rows do not see each other, so that one pass backwards serves all of them.
        removed = jnp.full(len(asked.mask), edit.ablate)
        (mean, answer), back = jax.vjp(measured, removed)
        ones, zeros = jnp.ones_like(mean), jnp.zeros_like(mean)
        # Without answers, theirs is NaN and has no slope.
        return Slopes(back((ones, zeros))[0], back((zeros, ones))[0] + 0 * answer)

    return _in_groups(one, size, edits)


def slopes(
    asked: Questions,
    vectors: Float[Any, "K D"],
    words: Int[Any, "W R"],
    own_words: Int[Any, "K P"],
    *,
    steps: int = 1,
    at_once: int | None = None,
) -> Slopes:
    """Estimates the effect of removing each concept's component from gradients.

    The derivative with respect to the removed fraction is minus the gradient times the component
    ("gradient x activation"): to first order, the effect of removing all of it. With several steps
    it is averaged along the way from none to all (integrated gradients, by Gauss's quadrature),
    which in the limit is the effect itself.

    Args:
        asked: the batch, of `prepare`.
        vectors: float[K, D], the concepts' directions.
        words: token ids of the spellings of each word; `Vocabulary.tokens`.
        own_words: which of the words are each concept's own, -1 after the last.
        steps: number of gradients per concept; 1 for the derivative where nothing is removed.
        at_once: number of gradients that run side by side; None chooses by backend and size.

    Returns:
        Estimated changes by each concept's removal.

    Raises:
        ValueError: as for `effects`, or steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    K = len(vectors)
    nodes, weights = np.zeros(1), np.ones(1)
    if steps > 1:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        nodes, weights = (nodes + 1) / 2, weights / 2
    edits = ConceptEdits(
        np.repeat(np.asarray(vectors, np.float32), steps, axis=0),
        np.zeros(K * steps, np.float32),
        np.tile(np.float32(nodes), K),
        np.repeat(np.arange(K, dtype=np.int32), steps),
    )
    _check_width(asked, edits)
    found = _slopes(
        asked.vlm.module,
        asked.site,
        # A pass backwards keeps what every layer computed.
        at_once or max(1, _at_once(asked, np.size(words)) // 4),
        asked.vlm.params,
        _arrays(asked),
        jnp.asarray(words),
        jnp.asarray(own_words),
        jax.tree.map(jnp.asarray, edits),
        mesh=asked.vlm.mesh,
    )
    return jax.tree.map(
        lambda x: (x.reshape(K, steps, -1) * jnp.float32(weights)[:, None]).sum(1), found
    )


@compiled.program(static=["site"])
def _losses(
    model: VisionLanguageModel,
    site: str,
    params: dict,
    asked: _Arrays,
    states: Array,
    alphas: Array,
) -> Array:
    def one(given: tuple[Array, Array]) -> Array:
        edits = {site: replace(given[0], given[1], asked.mask)}
        logp = _log_probabilities(model, params, asked, edits)
        answer = _measures(asked, logp, jnp.zeros((1, 1), jnp.int32)).answer
        return -answer / jnp.maximum(asked.weights.sum(1), 1)

    return jax.lax.map(one, (states, alphas))


def spliced_losses(
    asked: Questions,
    reconstruct: Callable[[np.ndarray], Any],
    mean: Float[Any, " D"],
) -> dict[str, Float[np.ndarray, " B"]]:
    """Returns the loss of the answers with other states spliced into the site.

    Args:
        asked: the batch, of `prepare`, with answers.
        reconstruct: states [M, D] -> what a dictionary makes of them, [M, D].
        mean: float[D], the mean state.

    Returns:
        Cross-entropy per token of each row's answer, float32[B], by what stands in the place of the
        states: "own", the model's; "spliced", their reconstruction; "zero"; "mean".

    Raises:
        ValueError: the batch has no answers, or reconstructions have another shape.
    """
    if asked.targets is None:
        raise ValueError("the loss is that of answers; prepare the batch with answer_lengths")
    vlm, site = asked.vlm, asked.site
    states = _site_states(vlm.module, site, vlm.params, _arrays(asked), mesh=vlm.mesh)
    mask = np.asarray(asked.mask)
    chosen = np.asarray(states, np.float32)[mask]
    made = np.asarray(reconstruct(chosen), np.float32)
    if made.shape != chosen.shape:
        raise ValueError(
            f"the reconstruction of states {chosen.shape} has shape {made.shape}; expected the same"
        )
    spliced = np.zeros(states.shape, np.float32)
    spliced[mask] = made
    others = np.stack(
        [
            np.zeros_like(spliced),
            spliced,
            np.zeros_like(spliced),
            np.broadcast_to(np.asarray(mean, np.float32), spliced.shape),
        ]
    )
    losses = _losses(
        vlm.module,
        site,
        vlm.params,
        _arrays(asked),
        jnp.asarray(others),
        jnp.float32([0, 1, 1, 1]),
        mesh=vlm.mesh,
    )
    names = ("own", "spliced", "zero", "mean")
    return dict(zip(names, np.asarray(losses), strict=True))


@compiled.program(static=["site"])
def _site_states(model: VisionLanguageModel, site: str, params: dict, asked: _Arrays) -> Array:
    """Returns the states of the site at the positions of the mask, [B, n or T, D]."""
    if asked.tail is None:
        apply = capture(substitute(model.apply, asked.begun), (site,))
        return apply({"params": params}, asked.inputs, method="states")[1][site]
    return run_tail(model, params, asked.tail, {}, (site,))[1][site]

"""Training steps, and the loss on a split."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import ports
from ports import VLM
from ports.intervene import lora
from ports.nn import decoder
from ports.parallel import compiled, sharding
from xlvlm_jax.finetune.examples import TrainingBatch
from xlvlm_jax.finetune.settings import FinetuneSettings
from xlvlm_jax.solvers.collectives import keep_pace

Array = jax.Array


class State(NamedTuple):
    """The training state. Each update overwrites its buffers."""

    trained: Any  # float32: the LoRA factors by site and part, or all parameters
    moments: Any  # state of the optimizer
    gradient: Any  # sum over the batches since the last update; None if every batch updates
    loss: Array  # float32[]: sum over the answers' tokens of the same batches
    num_tokens: Array  # int32[]: number of these tokens


def initial_adapter(vlm: VLM, settings: FinetuneSettings) -> tuple[lora.Adapter, lora.Ranks]:
    """Returns the untrained adapter.

    Args:
        vlm: the model.
        settings: how to train.

    Returns:
        The adapter and its ranks.

    Raises:
        ValueError: the targets match no linear layer.
    """
    shapes = lora.linear_layers(vlm.params)
    if settings.targets:
        shapes = lora.select_layers(shapes, settings.targets, vlm.module_names)
    else:
        inside = f"{vlm.decoder}."
        shapes = {s: v for s, v in shapes.items() if s.startswith(inside) and s != vlm.head}
    ranks = lora.Ranks(settings.rank, settings.alpha)
    key = jax.random.key(settings.seed)
    return lora.init(shapes, ranks, key, vlm.module_names), ranks


class Trainer:
    """The functions of a training run; they change nothing but the state they are given.

    Args:
        vlm: the model; with a mesh, the rows of batches are spread over its axis "data".
        settings: how to train.
        num_steps: total number of updates, for the schedule.
    """

    def __init__(self, vlm: VLM, settings: FinetuneSettings, num_steps: int):
        self.vlm, self.settings, self.num_steps = vlm, settings, num_steps
        self.rate = settings.learning_rate(num_steps)
        self._begin = initial_adapter(vlm, settings)[0] if settings.method == "lora" else None
        # What the loss needs besides the trained values.
        self._frozen = None if self._begin is None else (vlm.params, self._begin.scale)

    def begin(self) -> State:
        """Returns the state before the first update.

        On a mesh, all parameters are divided as the model's are, LoRA's factors like the kernels
        of their layers, and moments and sums of gradients like what they belong to.
        """
        mesh, params = self.vlm.mesh, self.vlm.params
        if self._begin is not None:
            trained = lora.by_part(jax.tree.map(jnp.copy, self._begin.factors), params)
        else:
            trained = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
        if mesh is not None:
            where = (
                jax.tree.map(lambda leaf: leaf.sharding, params)
                if self._begin is None
                else lora.shardings(trained, params, mesh)
            )
            trained = jax.device_put(trained, jax.tree.map(sharding.as_returned, where))
        several = self.settings.accumulate > 1
        state = State(
            trained,
            self.settings.optimizer(self.num_steps).init(trained),
            jax.tree.map(jnp.zeros_like, trained) if several else None,
            jnp.zeros(()),
            jnp.zeros((), jnp.int32),
        )
        if mesh is None:
            return state
        everywhere = sharding.replicated(mesh)
        return jax.tree.map(lambda x: x if x.ndim else jax.device_put(x, everywhere), state)

    def update(
        self, state: State, group: Iterable[TrainingBatch]
    ) -> tuple[State, dict[str, Array]]:
        """Runs one update on the `accumulate` batches of a group.

        Args:
            state: the state; its buffers are donated, so it can't be used afterwards. On a mesh,
                the new one is where it was.
            group: the batches.

        Returns:
            The new state and {"loss": nats per token, "norm": of the gradient before clipping}.
        """
        figures: dict[str, Array] = {}
        where = None
        if self.vlm.mesh is not None:
            where = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
        for i, batch in enumerate(group, 1):
            is_last = i == self.settings.accumulate
            arrays = (*self._place(batch), is_last)
            static = (self.vlm.module, self.settings, self.num_steps, batch.window)
            on = {"where": where, "mesh": self.vlm.mesh}
            state, figures = keep_pace(train_step(*static, state, self._frozen, *arrays, **on))
        return state, figures

    def evaluate(self, state: State, split: Iterable[TrainingBatch]) -> float:
        """Computes the loss on a split.

        Args:
            state: the state.
            split: the batches.

        Returns:
            The mean loss per token of the answers, in nats.

        Raises:
            ValueError: there are no batches.
        """
        vlm, given = self.vlm, (state.trained, self._frozen)
        sums = [
            keep_pace(_loss(vlm.module, batch.window, *given, *self._place(batch), mesh=vlm.mesh))
            for batch in split
        ]
        if not sums:
            raise ValueError(
                "no sample of the evaluation split can be read and processed; check its images"
            )
        loss, count = (sum(map(float, column)) for column in zip(*sums, strict=True))
        return loss / count

    def finished(self, state: State) -> lora.Adapter | dict:
        """Returns the trained adapter, or the trained parameters in the model's dtype."""
        if self._begin is not None:
            return lora.Adapter(lora.joined(state.trained), self._begin.scale)
        return jax.tree.map(lambda a, b: a.astype(b.dtype), state.trained, self.vlm.params)

    def _place(self, batch: TrainingBatch) -> tuple[dict[str, Array], Array]:
        return self.vlm.place(batch.inputs), jnp.asarray(batch.lengths)


def _loss_of(
    model: Any,
    window: int,
    trained: Any,
    frozen: tuple[dict, dict[str, Any]] | None,
    inputs: dict[str, Array],
    lengths: Array,
    recompute: bool = False,
) -> tuple[Array, Array]:
    """Returns the cross-entropy summed over the answers' tokens, and their number.

    For LoRA, `frozen` holds the model's parameters and the adapter's scales.
    """

    def apply(params: dict, x: Any, method: str) -> Array:
        return model.apply({"params": params}, x, method=method)

    if frozen is None:
        params = jax.tree.map(lambda leaf: leaf.astype(model.dtype), trained)
    else:
        params, scale = frozen
        adapter = lora.Adapter(trained, scale)
        apply = functools.partial(ports.adapted(apply), adapter=adapter)
    # The head, the most expensive layer, runs only at positions that predict an answer.
    with decoder.recomputing(recompute):
        states = apply(params, x=inputs, method="states")[:, -window - 1 : -1]
    logits = apply(params, x=states, method="unembed")
    target = inputs["input_ids"][:, -window:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    is_answer = jnp.arange(window) >= window - lengths[:, None]
    return jnp.where(is_answer, losses, 0).sum(), lengths.sum()


_loss = compiled.program(static=["window"])(_loss_of)


@compiled.program(static=["settings", "num_steps", "window", "where"], donate=["state"])
def train_step(
    model: Any,
    settings: FinetuneSettings,
    num_steps: int,
    window: int,
    state: State,
    frozen: Any,
    inputs: dict[str, Array],
    lengths: Array,
    is_last: Array,
    where: tuple[jax.sharding.Sharding, ...] | None = None,
) -> tuple[State, dict[str, Array]]:
    """Adds a batch's gradient, and after the last batch of a group updates the trained values.

    `where` are the shardings of the state's leaves. Left to the compiler, those of the new state
    could be others: the next update would be another program, and memory would not be reused.
    """

    def update(gradient: Any, loss: Array, count: Array) -> tuple[State, dict[str, Array]]:
        # The mean over all tokens of the update, regardless of how batches divide them.
        gradient = jax.tree.map(lambda g: g / count, gradient)
        transform = settings.optimizer(num_steps)
        change, moments = transform.update(gradient, state.moments, state.trained)
        new = State(
            optax.apply_updates(state.trained, change),
            moments,
            state.gradient and jax.tree.map(jnp.zeros_like, gradient),
            jnp.zeros(()),
            jnp.zeros((), jnp.int32),
        )
        return new, {"loss": loss / count, "norm": optax.global_norm(gradient)}

    def loss_of(trained: Any) -> tuple[Array, Array]:
        given = trained, frozen, inputs, lengths
        return _loss_of(model, window, *given, settings.recomputes)

    (loss, count), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.trained)
    if state.gradient is None:
        new, figures = update(gradient, loss, count)
        return _placed(new, where), figures
    gradient = jax.tree.map(jnp.add, state.gradient, gradient)
    loss, count = state.loss + loss, state.num_tokens + count

    def keep(*sums: Any) -> tuple[State, dict[str, Array]]:
        gradient, loss, count = sums
        kept = state._replace(gradient=gradient, loss=loss, num_tokens=count)
        return kept, {"loss": loss / count, "norm": jnp.zeros(())}

    new, figures = jax.lax.cond(is_last, update, keep, gradient, loss, count)
    return _placed(new, where), figures


def _placed(state: State, where: tuple[jax.sharding.Sharding, ...] | None) -> State:
    if where is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    return structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, where))

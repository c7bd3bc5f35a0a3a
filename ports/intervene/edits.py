"""Edits of the residual stream: how they change states, and at which positions.

B batch, T positions, D width.

An edit is a pytree. Its vector, strength and positions are arrays and so arguments of the compiled
program: changing them never recompiles, `jax.vmap` sweeps them and `jax.grad` differentiates with
respect to them. The kind of edit and the site are part of the program.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports.tracing import is_traced

Array = jax.Array
Where = (
    Literal["all", "prompt", "generated", "last_prompt", "predicting", "image", "text"]
    | dict[str, Any]
)

MOST_INDEX = 2**31 - 1  # of a token: indices are int32
# Kinds of positions; padding is never edited.
PADDING, IMAGE, TEXT, LAST_PROMPT, GENERATED = -1, 0, 1, 2, 3
_WHERE = {
    "all": (IMAGE, TEXT, LAST_PROMPT, GENERATED),
    "prompt": (IMAGE, TEXT, LAST_PROMPT),
    "generated": (GENERATED,),
    "last_prompt": (LAST_PROMPT,),
    "predicting": (LAST_PROMPT, GENERATED),
    "image": (IMAGE,),
    "text": (TEXT, LAST_PROMPT, GENERATED),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Describes the positions of a call; the models set it while their decoder runs.

    Attributes:
        kind: int32[B, T]: PADDING, IMAGE, TEXT, LAST_PROMPT or GENERATED.
        index: int32[B, T]: index of the token in its row, not counting padding.
        slot: int32[B or 1, T]: column in the caller's inputs, continued by the generated tokens; -1
            for padding up to a compiled length.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> row = jnp.arange(2)[None]  # kinds 0 and 1: a position of an image, one of text
        >>> places = ports.Places(kind=row, index=row, slot=row)
        >>> ports.add([1.0], where="image")(jnp.zeros((1, 2, 1)), places).tolist()
        [[[1.0], [0.0]]]
    """

    kind: Array
    index: Array
    slot: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector", "alpha", "kinds", "start", "mask", "at"],
    meta_fields=["change"],
)
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of a module's output, made by `add`, `ablate`, `replace` and the like.

    States are usually [B, T, D]. In [N, D] each row is a position, and [D] is a single position;
    axes between the first and the last two are all edited alike. States [B, T, H, D] of a decoder,
    such as those of norms of single heads, have their positions on the second axis: all heads of a
    position are edited alike, unless a vector [B, T, H, D] has one for each.

    Attributes:
        vector: float[D], float[B, D] or float[B, T, D], see `add`; a pair (down[R, D], up[D, R])
            for a linear map, or other arrays that `change` takes; None if it needs none.
        alpha: float[] or float[B], the strength.
        kinds: bool[4], which kinds of positions are edited.
        start: int32[], index of the first edited token.
        mask: bool[B, T], which positions of the prompt are edited; bool[B], which rows; or None
            for all.
        at: int32[P] or int32[B, P], indices of the edited tokens; or None for all.
        change: (states, vector, alpha, places) -> states; vector and alpha broadcast against the
            states.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> edit = ports.add([1.0, 0.0], alpha=3.0)
        >>> edit.width, edit(jnp.zeros((1, 2))).tolist()
        (2, [[3.0, 0.0]])
    """

    vector: Any
    alpha: Any
    kinds: Any
    start: Any
    mask: Any
    change: Callable[..., Array]
    at: Any = None

    @property
    def width(self) -> int | None:
        """Width D of the vector or map; None for an edit without either."""
        first = self.vector[0] if isinstance(self.vector, tuple) else self.vector
        return None if first is None else np.shape(first)[-1]

    @property
    def vector_rank(self) -> int:
        """Number of axes of the vector; 0 for an edit without one."""
        return 0 if isinstance(self.vector, tuple) else np.ndim(self.vector)

    def has_vector_per_position(self, rank: int) -> bool:
        """Returns whether states with `rank` axes get a separate vector at each position."""
        return self.vector_rank > 2 or (self.vector_rank == rank == 2 and len(self.vector) > 1)

    def positions(self, shape: tuple[int, ...], places: Places | None) -> Array:
        """Returns which states are edited.

        Args:
            shape: shape of the states.
            places: what the positions are; None at a module whose positions are not tokens. They
                have no kinds there, so only an edit of all kinds applies.

        Returns:
            bool[B or 1, T] for states [B, T, D], bool[N] for [N, D]; broadcasts against shape[:-1].
        """
        chosen, _ = self._locate(shape, places)
        if len(shape) < 3:
            return chosen.reshape(shape[:-1])
        if token_axis(shape, places) == -3:
            return chosen[..., None]
        return chosen.reshape(len(chosen), *(1,) * (len(shape) - 3), -1)

    def _locate(self, shape: tuple[int, ...], places: Places | None) -> tuple[Array, Array]:
        """Returns which positions are edited, bool[B or 1, T], and which column of the mask or of
        a per-position vector belongs to each, int[B or 1, T].
        """
        kinds = jnp.asarray(self.kinds)
        if places is None:
            index = slots = jnp.arange(shape[-2] if len(shape) > 1 else 1)[None]
            chosen = kinds.all()
        else:
            index, slots = places.index, jnp.atleast_2d(places.slot)
            chosen = kinds[jnp.maximum(places.kind, 0)] & (places.kind != PADDING)
        chosen = chosen & (index >= self.start)
        if self.mask is not None:
            mask = jnp.asarray(self.mask, bool)
            if mask.ndim == 1:
                mask = mask[None] if len(shape) == 2 else mask[:, None]
            else:
                mask = jnp.take_along_axis(mask, slots, -1, mode="fill", fill_value=False)
            chosen = chosen & mask
        if self.at is not None:
            found = index[..., None] == jnp.atleast_2d(self.at)[:, None]
            return chosen & found.any(-1), found.argmax(-1)
        if self.has_vector_per_position(len(shape)):
            # Tokens generated after the prompt have no vector.
            vectors = np.shape(self.vector)
            chosen = chosen & (slots < vectors[token_axis(vectors, places)])
        return chosen, slots

    def __call__(self, states: Array, places: Places | None = None) -> Array:
        """Returns the edited states, in their dtype.

        Raises:
            ValueError: the edit changes the shape of the states.
        """
        x = jnp.asarray(states)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        vector = self._spread(x, places)
        alpha = jnp.asarray(self.alpha, x.dtype)
        alpha = alpha.reshape(-1, *(1,) * (x.ndim - 1)) if x.ndim > 1 else alpha.reshape(())
        changed = self.change(x, vector, alpha, places)
        if changed.shape != x.shape:
            raise ValueError(
                f"an edit turns states of shape {x.shape} into {changed.shape}; expected the same "
                "shape"
            )
        chosen = self.positions(x.shape, places)[..., None]
        return jnp.where(chosen, changed.astype(states.dtype), states)

    def _spread(self, x: Array, places: Places | None) -> Any:
        """Returns the vector or map in the dtype of the states x, broadcasting against them."""
        if isinstance(self.vector, tuple):
            return jax.tree.map(lambda array: jnp.asarray(array, x.dtype), self.vector)
        if self.vector is None:
            return None
        vector = jnp.asarray(self.vector, x.dtype)
        if x.ndim < 2 or vector.ndim == 1:
            return vector.reshape(-1)
        if token_axis(x.shape, places) == -3:  # heads before positions, and back
            vector = vector if vector.ndim < 4 else jnp.swapaxes(vector, 1, 2)
            return jnp.swapaxes(self._over_rows(vector, jnp.swapaxes(x, 1, 2), places), 1, 2)
        return self._over_rows(vector, x, places)

    def _over_rows(self, vector: Array, x: Array, places: Places | None) -> Array:
        """Returns vectors [B, D] or [..., T, D], broadcasting against the states x[..., T, D]."""
        each = self.has_vector_per_position(x.ndim)
        if not each or vector.ndim < x.ndim:
            between = (1,) * (x.ndim - vector.ndim)
            vector = vector.reshape(len(vector), *between, *vector.shape[1:])
        if not each or (places is None and self.at is None):
            return vector
        columns = self._locate(x.shape, places)[1]
        rows = (len(columns), *(1,) * (x.ndim - 3)) if x.ndim > 2 else ()
        return jnp.take_along_axis(vector, columns.reshape(*rows, -1, 1), axis=-2, mode="clip")


def token_axis(shape: tuple[int, ...], places: Places | None) -> int:
    """Returns the axis of the positions, from the end.

    It is the second to last; in a decoder's states [B, T, H, D], one for each head, that before it.

    Args:
        shape: shape of the states.
        places: what the positions are; None at a module whose positions are not tokens.
    """
    return -3 if places is not None and len(shape) == 4 else -2


Edits = Mapping[str, Edit | Callable[..., Array] | Sequence[Edit | Callable[..., Array]]]


def as_edits(edits: Edits) -> dict[str, tuple[Edit, ...]]:
    """Converts the edits at each site to a tuple; a function of the states becomes an `edit_with`.

    Raises:
        ValueError: something is neither an edit nor a function.
    """
    if not isinstance(edits, Mapping):
        raise ValueError(
            f"edits is {_described(edits)}; expected {{site: edit}}, such as "
            "{'layers.19': add(vector)}"
        )
    return {
        site: tuple(
            _as_edit(site, each) for each in (given if isinstance(given, Sequence) else [given])
        )
        for site, given in edits.items()
    }


def _as_edit(site: str, given: Edit | Callable[..., Array]) -> Edit:
    if isinstance(given, Edit):
        return given
    if callable(given):
        return edit_with(given)
    raise ValueError(
        f"the edit at {site!r} is {_described(given)}; expected add(vector), replace(states) or "
        "another edit, or a function of the states"
    )


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"of type {kind}" if shape is None else f"an array of shape {tuple(shape)}"


def make_edit(change: Callable[..., Array], vector: Any, alpha: Any, where: Any) -> Edit:
    """Returns an edit of a new kind.

    Args:
        change: see `Edit`; a function of its own, since equal ones share a compiled program. With
            alpha 0 it must return the states.
        vector: float[D], float[B, D] or float[B, T, D] (see `add`), which broadcasts against the
            states; or a tuple of arrays, or of pytrees of them, handed over as they are, the first
            one [..., D].
        alpha, where: as for `add`.

    Raises:
        ValueError: as for `add`.
    """
    if not (vector is None or isinstance(vector, tuple | jax.Array)):
        traced = any(map(is_traced, jax.tree.leaves(vector)))
        vector = jnp.asarray(vector) if traced else np.asarray(vector)
    for name, values in (("alpha", alpha), ("the steering vector", vector)):
        for value in jax.tree.leaves(values):
            _check_numbers(name, value)
    if not (vector is None or isinstance(vector, tuple) or np.ndim(vector)):
        raise ValueError(
            f"a steering vector has shape {np.shape(vector)}; expected [D], [B, D] for one per "
            "row, or [B, T, D] for one per position"
        )
    if np.ndim(alpha) > 1:
        raise ValueError(f"alpha has shape {np.shape(alpha)}; expected a number, or [B]")
    kinds, start, mask, at = _positions(where)
    alpha = jnp.asarray(alpha, float)  # float32, or float64 where that is switched on
    edit = Edit(vector, alpha, kinds, jnp.asarray(start, jnp.int32), mask, change, at)
    if at is not None and edit.vector_rank > 2 and at.shape[-1] not in edit.vector.shape[1:-1]:
        raise ValueError(
            f"where names {at.shape[-1]} positions for {edit.vector.shape[-2]} states; expected "
            "one state per position"
        )
    return edit


def _check_numbers(name: str, value: Any) -> None:
    """Raises ValueError unless a value is finite and real; tracers have no values to check."""
    if value is None or is_traced(value):
        return
    array = np.asarray(value)
    if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.integer)) and not (
        jnp.issubdtype(array.dtype, jnp.floating)
    ):
        raise ValueError(f"{name} is {_described(value)} ({array.dtype}); expected real numbers")
    if not np.isfinite(array).all():
        shown = f"is {value}" if array.ndim == 0 else "has entries that are not finite"
        raise ValueError(f"{name} {shown}; expected finite numbers")


def _positions(where: Any) -> tuple[np.ndarray, Any, Any, Any]:
    """Returns an edit's kinds, start, mask and indices; raises ValueError if `where` is invalid."""
    everything = np.ones(4, bool)
    if isinstance(where, Mapping) and set(where) == {"from"}:
        start = where["from"]
        if not is_traced(start) and not _is_index(start):
            raise ValueError(
                f"where is {where}; expected {{'from': i}} with a whole number i from 0 to "
                f"{MOST_INDEX}"
            )
        return everything, start, None, None
    if isinstance(where, Mapping) and set(where) == {"at"}:
        at = where["at"]
        if not is_traced(at):
            at = np.asarray(at)
            if (
                at.ndim > 2
                or not at.size
                or not np.issubdtype(at.dtype, np.integer)
                or at.min() < 0
                or at.max() > MOST_INDEX
            ):
                raise ValueError(
                    f"where is {where}; expected {{'at': indices}} with whole numbers from 0 to "
                    f"{MOST_INDEX}, [P] or [B, P]"
                )
        return everything, 0, None, jnp.atleast_1d(jnp.asarray(at, jnp.int32))
    if is_traced(where) or (not isinstance(where, str | Mapping) and np.ndim(where) in (1, 2)):
        mask = where if isinstance(where, jax.Array) else np.asarray(where)
        if not is_traced(mask) and (
            mask.dtype != bool if mask.ndim == 1 else not np.isin(mask, (0, 1)).all()
        ):
            raise ValueError(
                f"where is an array of {mask.dtype}; expected a mask bool[B, T] or bool[B], or "
                "{'at': indices}"
            )
        return everything, 0, mask, None
    if not isinstance(where, str) or where not in _WHERE:
        raise ValueError(
            f"where is {str(where)!r}; expected one of {', '.join(_WHERE)}, {{'from': index}}, "
            "{'at': indices}, or a mask bool[B, T] or bool[B]"
        )
    return np.isin(np.arange(4), _WHERE[where]), 0, None, None


def _is_index(value: Any) -> bool:
    """Returns whether a value is a whole number that an int32 of at least zero can hold."""
    array = np.asarray(value)
    if array.ndim or not jnp.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
        return False
    return bool(0 <= array <= MOST_INDEX and array == np.floor(array))


def _add(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return x + alpha * vector


def _add_relative(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return x + alpha * _norm(x) * unit(vector)


def _ablate(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    direction = unit(vector)
    return x - alpha * jnp.sum(x * direction, axis=-1, keepdims=True) * direction


def _replace(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return _mixed(x, vector, alpha)


def _mixed(x: Array, out: Array, alpha: Array) -> Array:
    """Returns (1 - alpha) * x + alpha * out, in which what has the weight 0 leaves no NaN.

    Of such a state, Inf or NaN counts as 0; the derivative with respect to alpha stays that of the
    formula wherever both are finite. Values alone are mended: gradients through what computed such
    a state may still be NaN.
    """
    x = jnp.where((alpha == 1) & ~jnp.isfinite(x), 0, x)
    out = jnp.where((alpha == 0) & ~jnp.isfinite(out), 0, out)
    return (1 - alpha) * x + alpha * out


def _norm(x: Array) -> Array:
    """Returns the norm of states [..., D] as [..., 1], with gradient zero at a state of zeros."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def unit(vector: Array) -> Array:
    """Returns vectors [..., D] at unit length; a zero vector, without a direction, stays zero."""
    square = jnp.sum(vector**2, axis=-1, keepdims=True)
    return vector * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def add(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Adds a vector: states + alpha * vector.

    Works under jit, vmap and grad; its arguments may be traced.

    Args:
        vector: float[D]; float[B, D], one vector per row of the batch; or float[B or 1, T, D], one
            per position. The positions are the columns of the inputs (tokens generated after them
            are not edited) or, with {"at": indices}, the P tokens there. At a module whose output
            is [N, D], float[N, D] has one vector per row.
        alpha: the strength, a number or float[B].
        where: the positions to edit: "all"; "prompt"; "generated" (generated tokens, when they are
            fed back to the model); "last_prompt"; "predicting" (both: the states that predict the
            answer); "image"; "text" (everything but image tokens);
            {"from": i}, the i-th token of each row and all later ones; {"at": indices}, the tokens
            with these indices, int[P] or int[B, P]; a mask bool[B, T] over the prompt; or bool[B],
            whole rows. Tokens are counted per row from 0, without padding. Rows that end before an
            index are not edited there (models warn if that applies to every row).

    Returns:
        The edit, for the `edits` of `steer` and `VLM`.

    Raises:
        ValueError: `where` is invalid, vector or alpha has an unexpected shape, or a value is not
            finite.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.add([0.0, 1.0], alpha=2.0)(jnp.ones((1, 2))).tolist()
        [[1.0, 3.0]]
    """
    return make_edit(_add, vector, alpha, where)


def add_relative(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Adds a direction scaled by each state's norm: states + alpha |states| vector / |vector|.

    Works under jit, vmap and grad; its arguments may be traced.

    Args:
        vector: the direction, as for `add`; its length does not matter.
        alpha: the strength as a fraction of each state's norm, a number or float[B].
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.add_relative([0.0, 8.0], alpha=0.5)(jnp.array([[2.0, 0.0]])).tolist()
        [[2.0, 1.0]]
    """
    return make_edit(_add_relative, vector, alpha, where)


def ablate(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Removes the states' component along a vector.

    Works under jit, vmap and grad; its arguments may be traced.

    Args:
        vector: the direction, as for `add`; its length does not matter.
        alpha: the fraction removed, a number or float[B]. 1 removes the whole component; 2
            reflects the states in the hyperplane orthogonal to the vector.
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`.

    Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction".

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.ablate([0.0, 4.0])(jnp.array([[3.0, 5.0]])).tolist()
        [[3.0, 0.0]]
    """
    return make_edit(_ablate, vector, alpha, where)


def replace(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Replaces the states: (1 - alpha) * states + alpha * vector.

    With the states of another run, float[B, T, D], this is activation patching, at all positions
    or at some:

        clean = vlm.forward(inputs, sites=[site]).states[site]
        edits = {site: replace(clean, where="image")}  # both inputs have the same layout
        edits = {site: replace(clean[:, 5:7], where={"at": [9, 10]})}

    Works under jit, vmap and grad; its arguments may be traced.

    Args:
        vector: the new states, as for `add`.
        alpha: the weight of the new states, a number or float[B]; 1 replaces the old ones entirely,
            also Inf and NaN.
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`.

    Vig et al. 2020; Meng et al. 2022.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.replace([0.0, 4.0], alpha=0.5)(jnp.array([[2.0, 2.0]])).tolist()
        [[1.0, 3.0]]
    """
    return make_edit(_replace, vector, alpha, where)


def _add_mapped(x: Array, maps: tuple[Array, Array], alpha: Array, _: Any) -> Array:
    down, up = maps
    product = functools.partial(jnp.matmul, precision="highest")
    return x + alpha * product(product(x, down.T), up.T)


def add_mapped(down: Any, up: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Adds a low-rank linear map of the states: states + alpha * up down states.

    Works under jit, vmap and grad; its arguments may be traced.

    Args:
        down: float[R, D].
        up: float[D, R].
        alpha: the strength, a number or float[B].
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: as for `add`, or the shapes of the two matrices do not match.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.add_mapped(down=[[1.0, 1.0]], up=[[0.0], [2.0]])(jnp.ones((1, 2))).tolist()
        [[1.0, 5.0]]
    """
    if np.ndim(down) != 2 or np.shape(up) != np.shape(down)[::-1]:
        raise ValueError(
            f"down and up have shapes {np.shape(down)} and {np.shape(up)}; expected [R, D] and "
            "[D, R]"
        )
    return make_edit(_add_mapped, (jnp.asarray(down), jnp.asarray(up)), alpha, where)


class _Function(NamedTuple):
    """A user's function as a `change`; hashable, so that equal functions share a program."""

    function: Callable[..., Array]

    def __call__(self, x: Array, vector: Any, alpha: Array, places: Places | None) -> Array:
        axis = token_axis(x.shape, places)
        if places is None or x.shape[axis] == 1:
            out = self._result(x, places)
        else:

            def arranged(states: Array, order: Array) -> Array:
                index = order.reshape(*order.shape, *(1,) * (-axis - 1))
                return jnp.take_along_axis(states, index, axis)

            # Restore the order of the caller's columns: generation moves tokens within rows.
            slot = jnp.broadcast_to(places.slot, places.kind.shape)
            order = jnp.argsort(jnp.where(slot < 0, jnp.iinfo(slot.dtype).max, slot), axis=-1)
            fields = (places.kind, places.index, slot)
            ordered = Places(*(jnp.take_along_axis(field, order, -1) for field in fields))
            out = self._result(arranged(x, order), ordered)
            if out.ndim >= -axis and out.shape[axis] == x.shape[axis]:
                out = arranged(out, jnp.argsort(order, axis=-1))
        # If it does not broadcast, `Edit.__call__` raises, with the expected shape.
        sizes = zip(out.shape[::-1], x.shape[::-1], strict=False)
        fits = out.ndim <= x.ndim and all(size in (1, full) for size, full in sizes)
        return _mixed(x, out, alpha) if fits else out

    def _result(self, x: Array, places: Places | None) -> Array:
        """Calls the function; raises ValueError if it does not return an array."""
        out = self.function(*_arguments(self.function, x, places))
        if not hasattr(out, "shape"):
            raise ValueError(
                f"the function of an edit returns {_described(out)}; expected states of shape "
                f"{x.shape}"
            )
        return jnp.asarray(out)


def _arguments(function: Callable[..., Array], x: Array, places: Places | None) -> tuple[Any, ...]:
    """Returns the states, plus the places if the function requires a second argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some builtins have no signature
        return (x,)
    needed = [p for p in parameters if p.default is p.empty and p.kind <= p.VAR_POSITIONAL]
    return (x, places) if len(needed) > 1 else (x,)


def edit_with(function: Callable[..., Array], alpha: Any = 1.0, where: Any = "all") -> Edit:
    """Applies a function to the states.

    The function is called once for the prompt, with columns as in the caller's inputs (T may be
    larger: the columns after them pad to a compiled length and have the kind PADDING), and once per
    generated token (T = 1, with its column in `places.slot`). In generation, the last layer may
    pass the last column only. Reuse the same function object: a new one compiles a new program.

    Works under jit, vmap and grad if the function does.

    Args:
        function: (states) -> states or (states, places) -> states, of the same shape. `places` is a
            `Places`, or None at a site whose positions are not tokens.
        alpha: the weight of the function's result, a number or float[B]; 1 replaces the states.
        where: the positions to edit, as for `add`.

    Returns:
        The edit.

    Raises:
        ValueError: `function` is not callable, or as for `add`.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> ports.edit_with(jnp.tanh, alpha=1.0)(jnp.zeros((1, 2))).tolist()
        [[0.0, 0.0]]
    """
    if not callable(function):
        raise ValueError(f"edit_with takes a function of the states; got {_described(function)}")
    return make_edit(_Function(function), None, alpha, where)


def stacked(
    sites: Sequence[str], vectors: Any, alpha: Any = 1.0, where: Any = "all"
) -> dict[str, Edit]:
    """Adds one vector at each site.

    With alpha zero at all sites but one, the steered site becomes an argument of the compiled
    program, like the vector. Works under jit, vmap and grad; its arguments may be traced.

    Args:
        sites: names of the S sites.
        vectors: float[S, D].
        alpha: the strength, a number or float[S].
        where: the positions to edit, as for `add`.

    Returns:
        {site: edit}.

    Raises:
        ValueError: the number of vectors differs from the number of sites, or as for `add`.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> edits = ports.stacked(["layers.0", "layers.1"], jnp.eye(2), alpha=[0.0, 3.0])
        >>> edits["layers.1"](jnp.zeros((1, 2))).tolist()
        [[0.0, 3.0]]
    """
    vectors = jnp.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != len(sites):
        raise ValueError(
            f"vectors has shape {vectors.shape}; expected [{len(sites)}, D], one vector per site"
        )
    alpha = jnp.broadcast_to(jnp.asarray(alpha, float), (len(sites),))
    return {site: add(vectors[i], alpha[i], where) for i, site in enumerate(sites)}


def is_same_for_rows(edit: Edit) -> bool:
    """Returns whether an edit changes equal states at equal positions of all rows alike.

    What a function of the caller depends on is not known.
    """
    return (
        edit.vector_rank < 2
        and not np.ndim(edit.alpha)
        and edit.mask is None
        and np.ndim(edit.at) < 2
        and not isinstance(edit.change, _Function)
    )


def edits_prompt(edit: Edit) -> bool:
    """Returns whether an edit is not for generated tokens alone."""
    return is_traced(edit.kinds) or bool(np.asarray(edit.kinds)[:GENERATED].any())


def at_prompt(variants: Iterable[Mapping[str, Sequence[Edit]]]) -> frozenset[tuple[str, int]]:
    """Returns the (site, index) of all edits that `edits_prompt` in at least one variant."""
    return frozenset(
        (site, index)
        for edits in variants
        for site, listed in edits.items()
        for index, edit in enumerate(listed)
        if edits_prompt(edit)
    )


def only(
    edits: Mapping[str, Sequence[Edit]], kept: Collection[tuple[str, int]]
) -> dict[str, tuple[Edit, ...]]:
    """Returns the edits whose (site, index) is kept, without sites that have none."""
    chosen = {
        site: tuple(edit for index, edit in enumerate(listed) if (site, index) in kept)
        for site, listed in edits.items()
    }
    return {site: listed for site, listed in chosen.items() if listed}


def is_everywhere(edit: Edit) -> bool:
    """Returns whether an edit applies to all positions; traced positions count as all."""
    kinds = is_traced(edit.kinds) or np.all(edit.kinds)
    start = is_traced(edit.start) or edit.start == 0
    return bool(kinds and start and edit.mask is None and edit.at is None)


def reaches(edit: Edit, length: int) -> bool:
    """Returns whether an edit's first index is below `length`; traced indices count as below."""
    first = edit.start if edit.at is None else edit.at
    return is_traced(first) or bool(np.min(first) < length)


def lay_out(edit: Edit, move: Callable[[Any], Any]) -> Edit:
    """Rearranges an edit's per-position vector and mask like the tokens of the batch.

    Tokens after the prompt, which have no vector of their own, are not edited.

    Args:
        edit: an edit for the caller's columns.
        move: moves the columns of an array [B, T, ...] to where the tokens are.

    Returns:
        The same edit for the moved columns.
    """
    vector, mask = edit.vector, edit.mask
    if edit.at is None and edit.vector_rank > 2:
        everywhere = np.ones(np.shape(vector)[:2], bool)
        if np.ndim(mask) < 2:
            mask = everywhere if mask is None else everywhere & np.asarray(mask, bool)[:, None]
        vector = move(vector)
    if np.ndim(mask) == 2:
        mask = move(np.asarray(mask, bool))
    return dataclasses.replace(edit, vector=vector, mask=mask)


def check_batch(edit: Edit, batch: int, length: int) -> None:
    """Checks that an edit's per-row arrays match a batch.

    Args:
        edit: the edit.
        batch: number of rows of the batch.
        length: number of columns of the inputs.

    Raises:
        ValueError: they do not match.
    """
    vector = None if isinstance(edit.vector, tuple) or edit.vector_rank < 2 else edit.vector
    alpha = edit.alpha if np.ndim(edit.alpha) else None
    at = edit.at if np.ndim(edit.at) == 2 else None
    for name, value in (("vector", vector), ("alpha", alpha), ("'at'", at)):
        if value is not None and len(value) not in (1, batch):
            raise ValueError(
                f"the {name} of an edit has {len(value)} rows; expected 1 or the batch's {batch}"
            )
    if edit.mask is not None and np.shape(edit.mask) not in ((batch, length), (batch,)):
        raise ValueError(
            f"the mask of an edit has shape {np.shape(edit.mask)}; expected the shape of input_ids,"
            f" {(batch, length)}, or one entry per row"
        )
    if edit.vector_rank > 4 or (
        vector is not None and vector.ndim > 2 and edit.at is None and vector.shape[1] != length
    ):
        raise ValueError(
            f"the states of an edit have shape {np.shape(edit.vector)}; expected "
            f"({batch}, {length}, D), one per position of input_ids, or give their positions with "
            "where={'at': indices}"
        )


def check_fits(site: str, edit: Edit, shape: tuple[int, ...], places: Places | None) -> None:
    """Checks that an edit fits the states at a site.

    Args:
        site: the site, for the message.
        edit: the edit.
        shape: shape of the states.
        places: what the positions are; None at a module whose positions are not tokens.

    Raises:
        ValueError: it does not fit.
    """
    if edit.width not in (None, shape[-1]):
        raise ValueError(
            f"the steering vector has width {edit.width}; the states at {site!r} have width "
            f"{shape[-1]}"
        )
    rank = len(shape)
    rows = shape[0] if rank > 1 else 1
    # The number of columns, where the vector and the mask must match it.
    axis = token_axis(shape, places)
    columns = shape[axis] if rank > 1 and (places is None or shape[axis] > 1) else None
    vectors = () if isinstance(edit.vector, tuple) else np.shape(edit.vector)
    by_head = axis == -3 and len(vectors) == 4
    fits = len(vectors) <= max(rank, 2) and (
        len(vectors) < 2
        or (
            (edit.at is not None or vectors[0] in (1, rows))
            and (not by_head or vectors[2] in (1, shape[2]))
            and (
                edit.at is not None
                or not edit.has_vector_per_position(rank)
                or columns in (None, vectors[token_axis(vectors, places)])
            )
        )
    )
    if not fits:
        raise ValueError(
            f"the vector of an edit has shape {np.shape(edit.vector)}; the states at {site!r} have "
            f"shape {shape}: expected [D], or one vector per row or position"
        )
    if np.ndim(edit.alpha) and len(edit.alpha) not in (1, rows):
        raise ValueError(
            f"alpha has shape {np.shape(edit.alpha)}; the states at {site!r} have {rows} rows"
        )
    mask = np.shape(edit.mask)
    if edit.mask is not None and not (
        mask in ((rows,), (1,))
        if len(mask) == 1
        else rank > 2 and mask[0] in (1, rows) and columns in (None, mask[1])
    ):
        raise ValueError(
            f"the mask of an edit has shape {mask}; the states at {site!r} have shape {shape}: "
            "expected " + (f"[{rows}]" if rank < 3 else f"[{rows}] or [{rows}, {shape[axis]}]")
        )
    # Inside a compiled program the kinds are traced; `VLM` has already checked them.
    if places is None and not is_traced(edit.kinds) and not np.all(edit.kinds):
        raise ValueError(
            f"the positions at site {site!r} are not tokens; expected where to be 'all', "
            "{'from': index}, {'at': indices} or a mask"
        )

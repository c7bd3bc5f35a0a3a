"""The atoms of a semi-NMF: one step from the sums U^T Z and U^T U, all it needs from the rows.

See `semi_nmf` for the objective and the method. K atoms, D width, W window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xlvlm_jax.solvers.linalg import matmul

WINDOW = 5  # updates that the stopping rule looks back: one alone can be tiny after a restart
# Decreases are relative to f, or to MISFIT times the misfit 1/2 |Z - U V|^2 if that is less, but to
# no less than the share LEAST_MOVING of f, which rounding is relative to.
MISFIT, LEAST_MOVING = 10, 0.05
BLOCK = 32  # atoms that move within one span
TINY = 1e-30


class Atoms(NamedTuple):
    """What an update reads and writes besides the codes; small, and replicated over devices."""

    atoms: Float[Array, "K D"]
    before: Float[Array, "K D"]  # one update earlier; extrapolation starts there
    scale: Float[Array, " K"]  # the codes have yet to be multiplied by it
    momentum: Float[Array, ""]  # Nesterov's t; 1 means that the next update is a plain one
    recent: Float[Array, " W"]  # the last WINDOW objectives, oldest first
    objective: Float[Array, ""]
    error: Float[Array, ""]


class Sums(NamedTuple):
    """What an update needs from the rows: totals, whose size does not depend on N."""

    products: Float[Array, "K D"]  # U^T Z
    overlap: Float[Array, "K K"]  # U^T U
    used: Float[Array, " K"]  # sum of |codes| of each atom
    objective: Float[Array, ""]  # f at the new codes and the atoms they were computed on


def begin(atoms: Float[Array, "K D"], objective: Float[Array, ""]) -> Atoms:
    """Returns the state before the first update, at atoms with a known objective."""
    inf = jnp.full_like(objective, jnp.inf)
    recent = jnp.full(WINDOW, inf).at[-1].set(objective)
    ones = jnp.ones(atoms.shape[0], atoms.dtype)
    return Atoms(atoms, atoms, ones, jnp.ones_like(objective), recent, objective, inf)


def extrapolate(small: Atoms) -> tuple[Float[Array, "K D"], Float[Array, ""]]:
    """Returns the atoms extrapolated from the last step, in the unit ball, and the next t."""
    momentum = (1 + jnp.sqrt(1 + 4 * small.momentum**2)) / 2
    weight = (small.momentum - 1) / momentum
    ahead = small.atoms + weight * (small.atoms - small.before)
    return ahead / jnp.maximum(1, jnp.linalg.norm(ahead, axis=1, keepdims=True)), momentum


def advance(
    small: Atoms,
    sums: Sums,
    residuals: Float[Array, "K D"],
    alpha: Float[Array, ""],
    unused: Bool[Array, " K"],
) -> tuple[Atoms, Bool[Array, ""]]:
    """Returns new atoms, and whether they and the codes are accepted.

    Args:
        small: the current atoms.
        sums: totals over all rows.
        residuals: float[K, D], residuals of the worst encoded rows; an unused atom is reset to one.
        alpha: weight of the l1 penalty.
        unused: bool[K], atoms that no code uses.
    """
    ahead, momentum = extrapolate(small)
    atoms, change = _update_atoms(ahead, sums.products, sums.overlap)
    # f is a small difference of large sums, so the change due to the atoms is computed separately.
    objective = sums.objective + change
    # Inside the ball, longer atoms with smaller codes fit equally well and cost less.
    norm = jnp.linalg.norm(atoms, axis=1)
    scale = jnp.where(norm > 0, norm, 1)
    objective = objective + alpha * jnp.sum(sums.used * (scale - 1))
    atoms = _revive(atoms / scale[:, None], residuals, alpha, unused)

    # A plain step cannot raise f; judging it by float32's rounding of f would end runs early.
    accepted = (objective <= small.objective) | (small.momentum <= 1)
    objective = jnp.minimum(objective, small.objective)
    # The penalty is nearly the same for all atoms, and may be nearly all of f.
    misfit = objective - alpha * jnp.sum(sums.used)
    moving = jnp.clip(MISFIT * misfit, LEAST_MOVING * objective, objective)
    # A revived atom has jumped, and a jump must not be extrapolated.
    restart = ~accepted | jnp.any(unused)
    kept = jnp.where(accepted, atoms, small.atoms)
    new = Atoms(
        atoms=kept,
        before=jnp.where(restart, kept, small.atoms),
        scale=jnp.where(accepted, scale, 1),
        momentum=jnp.where(restart, 1.0, momentum),
        recent=jnp.concatenate([small.recent[1:], objective[None]]),
        objective=objective,
        error=(small.recent[0] - objective) / (WINDOW * jnp.maximum(moving, TINY)),
    )
    return new, accepted


def _update_atoms(
    atoms: Float[Array, "K D"], products: Float[Array, "K D"], overlap: Float[Array, "K K"]
) -> tuple[Float[Array, "K D"], Float[Array, ""]]:
    """Minimises exactly over one atom after another; returns the atoms and the change of f.

    products = U^T Z, overlap = U^T U.

    Each block of new atoms lies in the span of the old atoms and their gradients. The steps are
    taken in those coordinates, with the Gram matrix for lengths, so no step touches D numbers.
    """
    K = atoms.shape[0]

    def move(first: Array | int, size: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        atoms, change = carry
        old, wanted, rows = (
            jax.lax.dynamic_slice_in_dim(x, first, size) for x in (atoms, products, overlap)
        )
        within = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)
        span = jnp.concatenate([old, matmul(rows, atoms) - wanted])
        gram = matmul(span, span.T)

        def one(k: Array, carry: tuple) -> tuple:
            atoms, gradients = carry
            atom = atoms[k] - gradients[k] / jnp.maximum(within[k, k], TINY)
            squared = jnp.sum(atom * matmul(gram, atom))
            atom = atom / jnp.sqrt(jnp.maximum(1, squared))
            atom = jnp.where(within[k, k] > 0, atom, atoms[k])
            gradients = gradients + within[:, k, None] * (atom - atoms[k])
            return atoms.at[k].set(atom), gradients

        identity = jnp.eye(2 * size, dtype=atoms.dtype)
        moved, _ = jax.lax.fori_loop(0, size, one, (identity[:size], identity[size:]))
        step = moved - identity[:size]
        lengths = matmul(step, gram)
        change += jnp.trace(lengths[:, size:]) + 0.5 * jnp.sum(within * matmul(lengths, step.T))
        new = matmul(moved, span)
        return jax.lax.dynamic_update_slice_in_dim(atoms, new, first, 0), change

    # All whole blocks are one loop: one after the other in the program, they take minutes to trace.
    whole, rest = divmod(K, BLOCK)
    carry = (atoms, jnp.zeros((), atoms.dtype))
    if whole:
        carry = jax.lax.fori_loop(0, whole, lambda i, carry: move(i * BLOCK, BLOCK, carry), carry)
    return move(whole * BLOCK, rest, carry) if rest else carry


def _revive(
    atoms: Float[Array, "K D"],
    residuals: Float[Array, "K D"],
    alpha: Float[Array, ""],
    unused: Bool[Array, " K"],
) -> Float[Array, "K D"]:
    """Resets each unused atom to a residual: the j-th to that of the j-th worst encoded row.

    Codes of unused atoms are zero, so f does not change. An atom stays if its residual is no longer
    than alpha, as no code would use it.
    """
    length = jnp.linalg.norm(residuals, axis=1)
    order = jnp.cumsum(unused) - 1
    useful = unused & (length[order] > alpha)
    pointed = residuals / jnp.maximum(length, TINY)[:, None]
    return jnp.where(useful[:, None], pointed[order], atoms)

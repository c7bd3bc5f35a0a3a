"""Transcoders and crosscoders: loss and derivatives are those of the same formulas in PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xlvlm_jax.solvers.sae import METHODS
from xlvlm_jax.solvers.sae.start import per_column, start
from xlvlm_jax.solvers.sae.training import Given, slopes

KEY = jax.random.key(0)


def in_torch(method, params, sources, x, width, dead):
    """L as the heads of the files give it."""
    z = x[:, :width] if "transcoder" in method else x
    t = x[:, width:] if "transcoder" in method else x
    W = params["W_dec"]
    if "transcoder" in method:
        h = z @ params["W_enc"] + params["b_enc"]
        w = torch.ones(len(W))
    else:
        h = (z - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
        w = sum((W[:, of] ** 2).sum(1).sqrt() for of in sources)
    c, penalty = h.relu(), 0
    if "topk" in method:
        kept = (h * w).topk(3, dim=1)[1]
        c = torch.zeros_like(h).scatter(1, kept, 1) * c
    else:
        penalty = 0.2 * (c * w).sum(1).mean() / t.shape[1] ** 0.5
    error = t - c @ W - params["b_dec"]
    if "W_skip" in params:
        error = error - z @ params["W_skip"].T
    total = (error**2).mean() + penalty
    rows = len(x) // 8
    alone = h[:rows].masked_fill(~dead, -torch.inf)
    values, at = alone.topk(min(t.shape[1] // 2, len(W)), dim=1)
    revived = torch.zeros_like(alone).scatter(1, at, values.clamp(min=-1e30)) * dead
    return total + ((error[:rows].detach() - revived @ W) ** 2).mean() / 32


@pytest.mark.parametrize(
    "method", ["transcoder", "topk-transcoder", "topk-crosscoder", "crosscoder"]
)
def test_loss_and_derivatives(method):
    widths, K = (6, 4), 10
    rng = np.random.default_rng(3)
    rows = np.concatenate([rng.normal(size=(24, 6)) * 3 + 1, rng.normal(size=(24, 4))], axis=1)
    options = {"k": 3} if "topk" in method else {"l1": 0.2}
    options |= {"skip": True} if method == "transcoder" else {}
    settings = METHODS[method](max_iter=10, learning_rate=0.02, **options)
    begun = start(rows.astype(np.float32), None, widths)
    params, fixed = settings.begin(begun, KEY, K)
    params = {
        name: value + jnp.float32(0.1 * rng.normal(size=value.shape))
        for name, value in params.items()
    }
    settings = dataclasses.replace(settings, input_scale=begun.scale)
    given = Given(fixed, jnp.float32(per_column(begun.scale, widths)))
    dead = np.arange(K) % 3 == 0
    total, found, _ = jax.jit(slopes, static_argnums=4)(
        params, given, begun.rows, jnp.asarray(dead), settings
    )
    theirs = {
        name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()
    }
    x = torch.tensor(np.asarray(begun.rows))
    sources = (slice(6), slice(6, None))
    expected = in_torch(method, theirs, sources, x, 6, torch.tensor(dead))
    expected.backward()
    assert float(total) == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in theirs.items():
        largest = float(tensor.grad.abs().max())
        assert largest > 0
        np.testing.assert_allclose(found[name], tensor.grad, atol=1e-5 * largest, err_msg=name)

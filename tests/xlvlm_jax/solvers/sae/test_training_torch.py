"""Loss, derivatives and updates are those of the same formulas in PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xlvlm_jax.solvers.sae import METHODS
from xlvlm_jax.solvers.sae.start import start
from xlvlm_jax.solvers.sae.training import Given, _begin, slopes, update

B, D, K = 24, 6, 10
ROWS = np.random.default_rng(0).normal(size=(B, D)).astype(np.float32) * 3 + 1
OPTIONS = {
    "topk-sae": {"k": 3},
    "batchtopk-sae": {"k": 3},
    "matryoshka-sae": {"k": 3, "prefixes": (2, 5)},
    "archetypal-sae": {"k": 3},
    "relu-sae": {"l1": 0.2},
    "jumprelu-sae": {"k": 3, "bandwidth": 0.8, "l0_weight": 0.3},
}


class Jump(torch.autograd.Function):
    """h where it exceeds theta; derivatives by a rectangle of width eps."""

    @staticmethod
    def forward(ctx, h, theta, eps):
        ctx.save_for_backward(h, theta)
        ctx.eps = eps
        return h * (h > theta)

    @staticmethod
    def backward(ctx, g):
        h, theta = ctx.saved_tensors
        near = ((h - theta).abs() < ctx.eps / 2).float() / ctx.eps
        return g * (h > theta), (-theta * near * g).sum(0), None


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, theta, eps):
        ctx.save_for_backward(h, theta)
        ctx.eps = eps
        return (h > theta).float()

    @staticmethod
    def backward(ctx, g):
        h, theta = ctx.saved_tensors
        near = ((h - theta).abs() < ctx.eps / 2).float() / ctx.eps
        return None, (-near * g).sum(0), None


def in_torch(method, options, params, fixed, x, dead):
    """Returns L, as the docstrings of the methods' files define it."""
    both = {**fixed, **params}
    h = (x - both["b_dec"]) @ both["W_enc"] + both["b_enc"]
    W_dec = both.get("W_dec")
    if method == "archetypal-sae":
        W_dec = both["weights"] @ (both["points"] - both["b_dec"])
    penalty = 0
    if method in ("topk-sae", "archetypal-sae"):
        values, at = h.topk(options["k"], dim=1)
        c = torch.zeros_like(h).scatter(1, at, values.relu())
    elif method in ("batchtopk-sae", "matryoshka-sae"):
        values, at = h.flatten().topk(options["k"] * len(h))
        c = torch.zeros_like(h.flatten()).scatter(0, at, values.relu()).reshape(h.shape)
    elif method == "relu-sae":
        c = h.relu()
        penalty = options["l1"] * c.sum(1).mean() / D**0.5
    else:
        theta = both["log_threshold"].exp()
        eps = options["bandwidth"] * theta.detach()
        c = Jump.apply(h, theta, eps)
        l0 = Step.apply(h, theta, eps).sum(1).mean()
        penalty = options["l0_weight"] * (l0 / options["k"] - 1) ** 2
    sizes = (*options.get("prefixes", ()), K)
    errors = [x - c[:, :m] @ W_dec[:m] - both["b_dec"] for m in sizes]
    total = sum((e**2).mean() for e in errors) / len(sizes) + penalty
    if dead.any():
        h, error = h[: B // 8], errors[-1][: B // 8].detach()
        alone = h.masked_fill(~dead, -torch.inf)
        values, at = alone.topk(D // 2, dim=1)
        of_dead = torch.zeros_like(h).scatter(1, at, values.clamp(min=-1e30))
        of_dead = of_dead * dead
        total = total + ((error - of_dead @ W_dec) ** 2).mean() / 32
    return total


def prepared(method):
    settings = METHODS[method](
        **OPTIONS[method], max_iter=10, learning_rate=0.02, warm_up=0.5, dead_after=20
    )
    begun = start(ROWS, None)
    params, fixed = settings.begin(begun, jax.random.key(1), K)
    rng = np.random.default_rng(2)
    # Nothing is zero by chance, or the same in encoder and decoder.
    params = {
        name: value + (0.1 * rng.normal(size=value.shape) if name != "weights" else 0)
        for name, value in params.items()
    }
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    params = settings.constrain(params)
    settings = dataclasses.replace(settings, input_scale=begun.scale)
    return settings, params, fixed, begun


def as_tensors(params, grad=False):
    return {
        name: torch.tensor(np.asarray(value), requires_grad=grad) for name, value in params.items()
    }


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("method", OPTIONS)
def test_loss_and_derivatives(method, with_dead):
    settings, params, fixed, begun = prepared(method)
    dead = np.arange(K) % 3 == 0 if with_dead else np.zeros(K, bool)
    given = Given(fixed, jnp.float32(begun.scale))
    total, found, _ = jax.jit(slopes, static_argnums=4)(
        params, given, begun.rows, jnp.asarray(dead), settings
    )
    theirs = as_tensors(params, grad=True)
    x = torch.tensor(np.asarray(begun.rows))
    expected = in_torch(method, OPTIONS[method], theirs, as_tensors(fixed), x, torch.tensor(dead))
    expected.backward()
    assert float(total) == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in theirs.items():
        largest = float(tensor.grad.abs().max())
        assert largest > 0
        np.testing.assert_allclose(found[name], tensor.grad, atol=1e-5 * largest, err_msg=name)


@pytest.mark.parametrize("method", ["topk-sae", "archetypal-sae"])
def test_updates(method):
    """Adam with the schedule, the derivative across the decoder's rows, and the constraint."""
    settings, params, fixed, begun = prepared(method)
    given = Given(fixed, jnp.float32(begun.scale))
    theirs = as_tensors(params, grad=True)
    frozen, x = as_tensors(fixed), torch.tensor(np.asarray(begun.rows))
    state = _begin(params, settings=settings, mesh=None)
    adam = torch.optim.Adam(theirs.values(), lr=1, betas=(0.9, 0.999), eps=1e-10)
    # By hand: five updates of rising rate, then constant, then two of falling rate.
    rates = [0.02 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0.5)]
    for rate in rates:
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        none_dead = torch.zeros(K, dtype=bool)
        total = in_torch(method, OPTIONS[method], theirs, frozen, x, none_dead)
        total.backward()
        if method == "topk-sae":
            W = theirs["W_dec"]
            W.grad -= (W.grad * W).sum(1, keepdim=True).detach() * W.detach()
        adam.step()
        with torch.no_grad():
            if method == "topk-sae":
                theirs["W_dec"] /= theirs["W_dec"].norm(dim=1, keepdim=True)
            else:
                A = theirs["weights"].clamp_(min=0)
                A /= A.sum(1, keepdim=True)
        state, figures = update(state, given, jnp.asarray(ROWS), settings=settings)
        assert float(figures.loss) == pytest.approx(total.item(), rel=1e-4)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(
            state.params[name], tensor.detach(), rtol=1e-3, atol=2e-4, err_msg=name
        )

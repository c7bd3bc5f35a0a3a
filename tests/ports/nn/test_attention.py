"""Attention: masks by hand, and every implementation against the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ports.nn import attention

from .. import helpers

B, T, S, HEADS, KV_HEADS, WIDTH = 2, 7, 7, 6, 2, 4


def arrays(length=T, slots=S, dtype=np.float32):
    """Returns query, key and value; three neighbouring query heads share a key-value head."""
    random = np.random.default_rng(2)
    query = random.standard_normal((B, length, HEADS, WIDTH))
    key, value = random.standard_normal((2, B, slots, KV_HEADS, WIDTH))
    return tuple(jnp.asarray(x, dtype) for x in (query, key, value))


def formula(query, key, value, mask, scalar=4, softcap=None):
    """Computes the definition in float64; mask bool[B, 1, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    scores = np.einsum("bthc,bshc->bhts", query, key.repeat(group, 2)) / scalar**0.5
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(np.where(mask, scores, -700.0))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshc->bthc", weights, value.repeat(group, 2))


def test_heads_follow_each_other():
    y = jnp.arange(24.0).reshape(1, 2, 3, 4)
    with attention.counting_heads() as found:
        joined = attention.Heads().apply({}, y)
    assert joined.shape == (1, 2, 12) and found == {"": 3}
    np.testing.assert_array_equal(joined[0, 1, 4:8], y[0, 1, 1])  # the second head


# Rows of 7 tokens and of 5, after padding.
TOKENS = np.arange(S) >= np.array([[0], [2]])
CAUSAL = np.tri(S, dtype=bool)
PAIRS = np.eye(S, dtype=bool) | (np.random.default_rng(3).random((B, 1, S, S)) < 0.4)
NEAR = np.subtract.outer(np.arange(S), np.arange(S)) < 3
# Name -> (arguments, which query sees which key).
KINDS = {
    "everything": ({}, np.ones((S, S), bool)),
    "keys of each row": ({"mask": TOKENS[:, None, None]}, TOKENS[:, None, None]),
    "keys of all rows": ({"mask": TOKENS[1:, None, None]}, TOKENS[1:, None, None]),
    "pairs": ({"mask": PAIRS}, PAIRS),
    "causal": ({"causal": True}, CAUSAL),
    "causal after padding": (
        {"mask": TOKENS[:, None, None], "causal": True},
        TOKENS[:, None, None] & CAUSAL,
    ),
    "a window of three": ({"causal": True, "window": 3}, CAUSAL & NEAR),
    "softcap and scalar": ({"causal": True, "softcap": 0.7, "scalar": 0.25}, CAUSAL),
}


def in_whole(monkeypatch):
    """Computes the scores of all heads at once."""


def by_head(monkeypatch):
    """Computes one head after the other, two of seven queries at a time."""
    monkeypatch.setattr(attention, "WHOLE", 0)
    monkeypatch.setattr(attention, "BLOCK", 2 * S * HEADS // KV_HEADS)


def by_queries(monkeypatch):
    """Computes all heads, two of seven queries at a time, as on accelerators."""
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    monkeypatch.setattr(attention, "ACCELERATOR_WHOLE", 2 * S * HEADS * B * 4)


@pytest.mark.parametrize("way", [in_whole, by_head, by_queries])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_its_gradients_equal_the_formula(kind, way, monkeypatch):
    way(monkeypatch)
    options, visible = KINDS[kind]
    mask = options.get("mask")
    options = options | {"mask": None if mask is None else jnp.asarray(mask)}
    given = arrays()
    visible = np.broadcast_to(visible, (B, 1, T, S))
    seen = visible.any(-1)[:, 0, :, None, None]  # padding sees nothing, and gives any number
    kept = {name: options[name] for name in ("scalar", "softcap") if name in options}
    expected = np.where(seen, formula(*given, visible, **kept), 0)

    def attend(*given):
        y = attention.attend(*given, **options)
        return jnp.where(seen, y, 0)

    np.testing.assert_allclose(jax.jit(attend)(*given), expected, rtol=0, atol=2e-6)
    # The slope in one direction, of a weighted sum of the outputs.
    random = np.random.default_rng(4)
    weights = random.standard_normal(expected.shape)
    gradients = jax.jit(jax.grad(lambda given: (attend(*given) * weights).sum()))(given)
    step = [random.standard_normal(x.shape) for x in given]
    ends = (
        [np.asarray(x, np.float64) + sign * dx for x, dx in zip(given, step, strict=True)]
        for sign in (1e-5, -1e-5)
    )
    up, down = (np.where(seen, formula(*end, visible, **kept), 0) for end in ends)
    slope = sum(float(np.vdot(g, dx)) for g, dx in zip(gradients, step, strict=True))
    assert slope == pytest.approx(((up - down) * weights).sum() / 2e-5, rel=1e-4)


@pytest.mark.parametrize("way", [in_whole, by_head, by_queries])
def test_fewer_queries_than_keys(way, monkeypatch):
    way(monkeypatch)
    query, key, value = arrays(length=3)
    # A resampler's latents see all; with a rule about order they are the last positions.
    np.testing.assert_allclose(
        attention.attend(query, key, value), formula(query, key, value, True), rtol=0, atol=2e-6
    )
    got = attention.attend(query, key, value, causal=True, window=3)
    np.testing.assert_allclose(
        got, formula(query, key, value, (CAUSAL & NEAR)[-3:]), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("way", [in_whole, by_head, by_queries])
def test_a_position_that_sees_nothing_gives_numbers(way, monkeypatch):
    way(monkeypatch)
    # Padding on the left sees no key at all; NaN there would spread through the cache.
    given, nothing = arrays(), jnp.zeros((1, 1, T, S), bool)
    assert np.isfinite(attention.attend(*given, nothing)).all()
    gradient = jax.grad(lambda q: attention.attend(q, *given[1:], nothing).sum())(given[0])
    assert np.isfinite(gradient).all()


def test_blocks_need_no_scores_of_all_heads():
    shape = jax.ShapeDtypeStruct((2, 512, 8, 16), np.float32)
    scores = 4 * 2 * 8 * 512 * 512

    def temporaries(function):
        compiled = jax.jit(function).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def attend(*given):
        return attention.attend(*given, causal=True)

    assert scores > attention.WHOLE
    assert temporaries(attend) < scores / 4
    assert temporaries(jax.grad(lambda *given: attend(*given).sum(), (0, 1, 2))) < scores / 2


def test_a_cache_in_one_or_two_parts_equals_the_formula():
    query, key, value = arrays(length=2)
    tokens, first = TOKENS[:, None, None], 5
    lying = attention.cache_layout(key, value)
    parts = [
        (lying[0][..., slots], lying[1][:, :, slots]) for slots in (slice(0, 2), slice(2, None))
    ]
    for cache in ([lying], parts):
        got = attention.attend_cached(query, cache, jnp.asarray(tokens))
        expected = formula(query, key, value, tokens)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)
        got = attention.attend_cached(
            query, cache, jnp.asarray(tokens), first=first, window=4, softcap=0.7, scalar=0.25
        )
        near = np.arange(first, first + 2)[:, None] - np.arange(S) < 4
        expected = formula(query, key, value, tokens & near, 0.25, 0.7)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", [in_whole, by_head, by_queries])
def test_low_precision_keeps_its_dtype_and_sums_in_float32(way, monkeypatch):
    way(monkeypatch)
    given = arrays(dtype=jnp.bfloat16)
    got = attention.attend(*given, causal=True)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(np.float32), formula(*given, CAUSAL), rtol=2**-7, atol=2**-7
    )


def test_masks_by_hand():
    tokens = attention.token_mask(jnp.array([[0, 1, 1]]))
    assert tokens.tolist() == [[[[False, True, True]]]]
    seen = attention.sees(tokens, jnp.arange(1, 3), 3, causal=True, window=1)
    assert seen is not None
    assert seen[0, 0].tolist() == [[False, True, False], [False, False, True]]
    pairs = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    np.testing.assert_array_equal(attention.token_mask(jnp.asarray(pairs))[:, 0], pairs)
    assert attention.sees(None, jnp.arange(3), 3, causal=False, window=None) is None


# The splash kernel, here interpreted; its lengths are padded to multiples of 128.
@pytest.mark.parametrize("kind", ["cross", "causal after padding", "window and soft cap"])
def test_the_kernel_of_tpus_equals_plain_attention(kind, monkeypatch):
    slots = 150
    length = 130 if kind == "cross" else slots
    query, key, value = arrays(length, slots)
    tokens = jnp.arange(slots) >= jnp.array([[0], [20]])
    options = {"softcap": None, "window": None, "causal": kind != "cross"}
    if kind.startswith("window"):
        options |= {"window": 40, "softcap": 0.7}
    mask = tokens[:, None, None]
    seen = 1 if kind == "cross" else tokens[:, :, None, None]

    def total(attend, given):
        y = attend(*given, mask, **options) * seen
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    given = (query, key, value)
    on_tpus = partial(attention._attend_on_tpu, scalar=4, interpret=True)
    (_, expected), slopes = jax.jit(
        jax.value_and_grad(partial(total, attention.attend), has_aux=True)
    )(given)
    (_, got), slopes_too = jax.jit(jax.value_and_grad(partial(total, on_tpus), has_aux=True))(given)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    for one, other in zip(slopes, slopes_too, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("cpu", {}, None),
        ("gpu", {}, attention._attend_on_gpu),
        ("gpu", {"dtype": jnp.float32}, None),
        ("gpu", {"softcap": 30.0}, None),
        ("gpu", {"length": 577, "slots": 577}, None),  # odd, with a mask
        ("gpu", {"length": 577, "slots": 577, "mask": None}, attention._attend_on_gpu),
        ("gpu", {"length": 1}, None),
        ("gpu", {"widest": 0}, None),
        ("tpu", {"softcap": 30.0, "dtype": jnp.float32}, attention._attend_on_tpu),
        ("tpu", {"mask": jax.ShapeDtypeStruct((1, 1, 640, 640), bool)}, None),
        ("tpu", {"length": 128}, None),  # causal, but not from the first position on
    ],
)
def test_which_kernel_is_used(backend, changes, expected):
    given = {
        "length": 640,
        "slots": 640,
        "dtype": jnp.bfloat16,
        "mask": jax.ShapeDtypeStruct((1, 1, 1, 640), bool),
        "softcap": None,
        "widest": 128,
    } | changes
    query, key = (
        jax.ShapeDtypeStruct((1, given[name], 8, 64), given["dtype"])
        for name in ("length", "slots")
    )
    found = attention._kernel(
        query, key, given["mask"], backend, True, None, given["softcap"], given["widest"]
    )
    assert found is expected


def test_which_gpus_have_the_kernel():
    version = "PJRT C API\ncuda 12090"
    assert attention.widest_head(version, ["8.0"]) == 128
    assert attention.widest_head(version, ["10.3", "9.0"]) == 128
    for older in ("7.5", "7.0"):  # T4 and V100
        assert attention.widest_head(version, ["8.6", older]) == 0
    assert attention.widest_head(version, [None]) == 0
    assert attention.widest_head(version, []) == 0
    for said in ("gfx90a", "gfx942", "unknown", None):
        assert attention.widest_head("PJRT C API\nrocm 60300", [said]) == 0


class TestCudnn:
    """What is asked of cuDNN: its own numbers need a GPU, its calls can be read on any machine."""

    @staticmethod
    def plain(query, key, value, mask=None, *, causal, window, scalar):
        """Computes what cuDNN would, of arrays that have the same rows; a mask may have one."""
        assert len(query) == len(key) == len(value)
        assert mask is None or len(mask) in (1, len(query))
        keys, values = attention.cache_layout(key, value)
        return attention._attend_plainly(query, keys, values, mask, causal, window, scalar, None)

    @pytest.fixture
    def attend(self, monkeypatch):
        monkeypatch.setattr(attention, "_cudnn", self.plain)
        options = {"causal": True, "window": None, "scalar": 4, "softcap": None}
        return partial(attention._attend_on_gpu, **options)

    MASKS = (None, TOKENS[:, None, None], TOKENS[1:, None, None])

    @pytest.mark.parametrize("mapped", ["q", "k", "kv", "qkv", "m", "qm"])
    def test_a_mapped_axis_becomes_rows(self, attend, mapped):
        masks = [mask for mask in self.MASKS if mask is not None or "m" not in mapped]
        for mask in masks:
            given = [*arrays(), *([] if mask is None else [jnp.asarray(mask)])]
            axes = [0 if name in mapped else None for name in "qkvm"[: len(given)]]
            random = np.random.default_rng(5)
            given = [
                x
                if axis is None
                else random.random((3, *x.shape)) < 0.7
                if x.dtype == bool
                else random.standard_normal((3, *x.shape), np.float32)
                for x, axis in zip(given, axes, strict=True)
            ]

            def run(*given):
                return attend(*given) if len(given) > 3 else attend(*given, None)

            got = jax.jit(jax.vmap(run, axes))(*given)
            for i in range(3):
                one = [x if axis is None else x[i] for x, axis in zip(given, axes, strict=True)]
                np.testing.assert_allclose(got[i], run(*one), rtol=0, atol=1e-6)

    def test_two_mapped_axes(self, attend):
        query, key, value = arrays()
        tokens = jnp.asarray(self.MASKS[1])
        scales = jnp.array([1.0, 2.0, 3.0])
        run = lambda a, b: attend(a * query, b * key, value, tokens)  # noqa: E731
        got = jax.vmap(jax.vmap(run, (None, 0)), (0, None))(scales, scales[:2])
        np.testing.assert_allclose(got[2, 1], run(3.0, 2.0), rtol=0, atol=1e-6)

    def test_gradients(self, attend):
        query, key, value = arrays()
        mask = jnp.asarray(self.MASKS[1])
        weights = jnp.cos(jnp.arange(query.size)).reshape(query.shape)
        weights = weights * TOKENS[:, :, None, None]

        def loss(attend, *given):
            return (attend(*given, mask) * weights).sum()

        ours, expected = (
            jax.grad(partial(loss, way), (0, 1, 2))(query, key, value)
            for way in (attend, partial(attention.attend, causal=True))
        )
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("mapped", ["k", "qv", "g", "kmg"])
    def test_mapped_gradients(self, attend, mapped):
        """A mapped axis of arrays (q, k, v, m), or of what is pulled back alone (g)."""
        given = dict(zip("qkv", arrays(), strict=True))
        tokens = jnp.asarray(self.MASKS[1 if "m" in mapped else 2])
        weights = jnp.cos(jnp.arange(given["q"].size)).reshape(given["q"].shape)
        # Not of queries that see nothing.
        weights = weights * TOKENS[:, :, None, None] * TOKENS[::-1, :, None, None]

        def pulled(attend, scale, index):
            scaled = [scale * x if name in mapped else x for name, x in given.items()]
            mask = jnp.roll(tokens, index, 0) if "m" in mapped else tokens
            pull = jax.vjp(lambda *x: attend(*x, mask), *scaled)[1]
            return pull(scale * weights if "g" in mapped else weights)

        scales = jnp.array([1.0, -0.5])
        got = jax.jit(jax.vmap(partial(pulled, attend)))(scales, jnp.arange(2))
        reference = jax.jit(partial(pulled, partial(attention.attend, causal=True)))
        for i in range(2):
            for one, other in zip(got, reference(scales[i], i), strict=True):
                np.testing.assert_allclose(one[i], other, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("mapped", [False, True])
    def test_the_call_for_gpus(self, monkeypatch, mapped):
        """Lowered for CUDA: queries, keys and the mask as a bias have the same rows."""
        cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        query, key = (jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (6, 2))
        tokens = jax.ShapeDtypeStruct((2, 1, 1, 128), bool)
        options = {"causal": True, "window": 40, "scalar": 64, "softcap": None}
        run = partial(attention._attend_on_gpu, **options)
        if mapped:
            query = jax.ShapeDtypeStruct((5, *query.shape), query.dtype)
            run = jax.vmap(run, (0, None, None, None))
        lowered = jax.jit(run).trace(query, key, key, tokens).lower(lowering_platforms=("cuda",))
        (call,) = [line for line in lowered.as_text().splitlines() if "__cudnn$fmha" in line]
        rows = 10 if mapped else 2
        of_key = f"tensor<{rows}x128x2x64xbf16>"
        operands = (
            f"(tensor<{rows}x128x6x64xbf16>, {of_key}, {of_key}, tensor<{rows}x1x128x128xbf16>)"
        )
        assert f": {operands} -> " in call

    @pytest.mark.parametrize("mapped", ["", "q", "g"])
    def test_the_calls_for_gradients_on_gpus(self, monkeypatch, mapped):
        """As above, with jax's own rules: a mapped axis becomes rows of the backward call too."""
        cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
        shape = (2, 128, 2, 64)
        given = [
            jax.ShapeDtypeStruct((3, *shape) if name in mapped else shape, jnp.bfloat16)
            for name in ("q", "k", "v", "g")
        ]
        tokens = jax.ShapeDtypeStruct((2, 1, 1, 128), bool)
        options = {"causal": True, "window": None, "scalar": 64, "softcap": None}

        def pulled(query, key, value, gradient, tokens):
            run = partial(attention._attend_on_gpu, mask=tokens, **options)
            return jax.vjp(run, query, key, value)[1](gradient)

        if mapped:
            axes = [0 if name in mapped else None for name in ("q", "k", "v", "g")]
            pulled = jax.vmap(pulled, (*axes, None))
        lowered = jax.jit(pulled).trace(*given, tokens).lower(lowering_platforms=("cuda",))
        calls = [line for line in lowered.as_text().splitlines() if "__cudnn$fmha" in line]
        assert any("Backward" in call for call in calls)
        rows = 6 if mapped else 2
        assert all(f"tensor<{rows}x128x2x64xbf16>" in call for call in calls)


ON_A_MESH = """
import functools
import jax, jax.numpy as jnp, numpy as np
from jax._src.cudnn import fused_attention_stablehlo
import ports
from ports.nn import attention
from ports.parallel import sharding

random = np.random.default_rng(0)
query = jnp.asarray(random.standard_normal((2, 130, 8, 4), np.float32))
key, value = jnp.asarray(random.standard_normal((2, 2, 130, 4, 4), np.float32))
mask = (jnp.arange(130) >= jnp.array([[0], [20]]))[:, None, None]
options = {"causal": True, "window": None, "softcap": None}
own, fused_attention_stablehlo.check_cudnn_version = attention._cudnn, lambda: 91000
expected = attention.attend(query, key, value, mask, **options)
# The second mesh divides rows, but not the four key-value heads.
for shape in ((2, 4), (1, 8)):
    mesh = ports.make_mesh(*shape)

    @jax.jit
    def kernel(*given):
        with sharding.on(mesh):
            given = [sharding.heads(x, "kv_heads") for x in given]
            return attention._attend_on_tpu(*given, mask, scalar=4, interpret=True, **options)

    @jax.jit
    def blocks(*given):
        with sharding.on(mesh):
            given = [sharding.heads(x, "kv_heads") for x in given]
            return attention.attend(*given, mask, **options)

    # cuDNN's call, with plain attention in its place: keys and values are already divided by heads
    # or whole on each device, and the mask is whole.
    def plain(query, key, value, mask=None, *, causal, window, scalar):
        assert mask is None or len(mask) in (1, len(query))
        assert query.shape[2] % key.shape[2] == 0
        keys, values = attention.cache_layout(key, value)
        return attention._attend_plainly(query, keys, values, mask, causal, window, scalar, None)

    # First the call itself and its gradient, lowered for CUDA: rows of a device, of the mask too.
    def total(*given):
        with sharding.on(mesh):
            y = attention._attend_on_gpu(*given, scalar=64, **options)
            return y.astype(jnp.float32).sum()

    attention._cudnn = own
    rows, shape_of = 8 // shape[0], jax.ShapeDtypeStruct
    given = [shape_of((8, 128, heads, 64), jnp.bfloat16) for heads in (16, 2, 2)]
    slopes = jax.jit(jax.grad(total, (0, 1, 2)))
    traced = slopes.trace(*given, shape_of((8, 1, 1, 128), bool))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line.split(" : (")[-1] for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2, calls
    for call in calls:
        assert call.startswith(f"tensor<{rows}x128x16x64xbf16>, tensor<{rows}x128x2x64xbf16>"), call
        assert f"tensor<{rows}x1x128x128xbf16>" in call, call
    attention._cudnn = plain

    @jax.jit
    def cudnn(query, key, value):
        with sharding.on(mesh):
            given = sharding.heads(query), *(sharding.heads(x, "kv_heads") for x in (key, value))
            return attention._attend_on_gpu(*given, mask, scalar=4, **options)

    for ours in (kernel, blocks, cudnn):
        error = np.abs(ours(query, key, value) - expected)[:, 20:].max()
        assert error < 1e-5, (shape, error)
    attention.ACCELERATOR_WHOLE = 1 << 16
print("done")
"""


def test_a_mesh_changes_nothing():
    flags = "--xla_force_host_platform_device_count=8"
    assert helpers.run_python(ON_A_MESH, XLA_FLAGS=flags).strip().endswith("done")

"""One layer as wide as those of real models against transformers with sdpa, with the same weights.

    python -m benchmarks.wide_layers              # 1.7 GB of memory
    python -m benchmarks.wide_layers --cpu        # where something else is running

    prefill   a decoder layer of a 7B Llama (width 4096) and the final norm, 640 positions
    decode    the same for one token after them
    tower     a layer of CLIP's ViT-L at 336 pixels: 577 positions of two pictures

Both sides run in turn in float32 with all cores; "ratio" is the median of transformers' seconds
over ours, pair by pair, and "error" the largest difference over the largest state. "share" is the
share of the machine's limit that we reach: the least time for a case's operations at the best rate
of a product of this width, or for reading its weights at the best rate of reading, over ours.
"""

import argparse
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.models.clip.modeling_clip import CLIPEncoder

from benchmarks import measure
from ports.nn import attention, decoder, encoder
from ports.nn.decoder_config import DecoderConfig

LENGTH, PICTURES, PATCHES = 640, 2, 577
LLAMA = transformers.LlamaConfig(
    vocab_size=8,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=32,
    attn_implementation="sdpa",
)
CLIP = transformers.CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=1,
    num_attention_heads=16,
    attn_implementation="sdpa",
)
# The name changed in transformers 5.
CACHE = (
    "cache"
    if "cache" in signature(transformers.LlamaModel.forward).parameters
    else "past_key_values"
)
Sides = tuple[Callable[[], Any], Callable[[], Any]]


class Work(NamedTuple):
    """What a case can't do without."""

    operations: int  # of floating point; a multiplication and an addition are two
    bytes: int  # of weights and cache, read once


def work() -> dict[str, Work]:
    """Returns the work of each case; attention of the decoder sees earlier positions alone."""
    width, positions = LLAMA.hidden_size, PICTURES * PATCHES
    decoder_weights = width * (4 * width + 3 * LLAMA.intermediate_size)
    tower_weights = CLIP.hidden_size * (4 * CLIP.hidden_size + 2 * CLIP.intermediate_size)
    seen = LENGTH * (LENGTH + 1) // 2
    return {
        "prefill": Work(2 * decoder_weights * LENGTH + 4 * width * seen, 4 * decoder_weights),
        "decode": Work(
            2 * decoder_weights + 4 * width * LENGTH, 4 * decoder_weights + 8 * width * LENGTH
        ),
        "tower": Work(
            2 * tower_weights * positions + 4 * CLIP.hidden_size * positions * PATCHES,
            4 * tower_weights,
        ),
    }


def limits(repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Returns the best rates of a product, in operations per second, and of reading, in bytes.

    Both by JAX and by PyTorch, whichever is faster.
    """
    random = np.random.default_rng(0)
    width, wide = LLAMA.hidden_size, LLAMA.intermediate_size
    x = random.standard_normal((LENGTH, width), np.float32)
    kernel = random.standard_normal((width, wide), np.float32)
    ours, theirs = (jnp.asarray(x), jnp.asarray(kernel)), (torch.tensor(x), torch.tensor(kernel))
    product, one = jax.jit(jnp.matmul), theirs[0][0]

    def best(*calls: Callable[[], Any]) -> float:
        for call in calls:
            call()
        return min(measure.seconds(call, clock)[0] for call in calls for _ in range(repeats))

    multiplied = best(lambda: product(*ours), lambda: (theirs[0] @ theirs[1]).numpy())
    read = best(
        lambda: product(ours[0][:1], ours[1]),
        lambda: theirs[1].sum().numpy(),
        lambda: (one @ theirs[1]).numpy(),
    )
    return 2 * LENGTH * width * wide / multiplied, kernel.nbytes / read


def params_of(model: torch.nn.Module) -> dict[str, Any]:
    """Returns the parameters of a PyTorch module by the port's names."""
    tree: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        *path, last = name.replace("layers.0", "layers_0").split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        array = value.numpy()
        if path[-1] == "embed_tokens":
            last = "embedding"
        elif last == "weight":
            last = "kernel" if array.ndim == 2 else "scale"
        inner[last] = jnp.asarray(np.ascontiguousarray(array.T) if last == "kernel" else array)
    return tree


def decoder_sides() -> dict[str, Sides]:
    """Returns our side and the peer's of a prefill and a decode step."""
    peer = transformers.LlamaModel(LLAMA).eval()
    module = decoder.Decoder(config := DecoderConfig.from_hf(LLAMA, False, "llama"))
    params = params_of(peer)
    x = np.random.default_rng(0).standard_normal((1, LENGTH + 1, LLAMA.hidden_size), np.float32)
    given, one = torch.from_numpy(x[:, :-1]), torch.from_numpy(x[:, -1:])
    slots = LENGTH + 32
    valid = jnp.arange(slots)[None, None, None] <= LENGTH

    @jax.jit
    def prefill(params: dict, x: np.ndarray) -> tuple[jax.Array, Any]:
        mask = attention.token_mask(jnp.ones((1, LENGTH), int))
        variables = {"params": params, "cache": decoder.init_cache(config, 1, slots, x.dtype)}
        y, new = module.apply(variables, x, jnp.arange(LENGTH)[None], mask, mutable=["cache"])
        return y, new["cache"]

    squeezed = decoder.is_squeezed(1)  # as the loop of `generate` carries its cache

    def step(params: dict, cache: Any, x: np.ndarray) -> tuple[jax.Array, Any]:
        cache = jax.tree.map(lambda part: part[None], cache) if squeezed else cache
        variables, slot = {"params": params, "cache": cache}, jnp.int32(LENGTH)
        positions = jnp.full((1, 1), LENGTH)
        y, new = module.apply(variables, x, positions, valid, slot, mutable=["cache"])
        return y, jax.tree.map(lambda part: part[0], new["cache"]) if squeezed else new["cache"]

    step = jax.jit(step, donate_argnums=1)
    filled = prefill(params, x[:, :-1])[1]
    filled = jax.tree.map(lambda part: part[0], filled) if squeezed else filled
    held = {"ours": filled, "theirs": transformers.DynamicCache()}

    def our_step() -> jax.Array:
        y, held["ours"] = step(params, held["ours"], x[:, -1:])
        return y

    @torch.no_grad()
    def their_prefill() -> np.ndarray:
        held["theirs"] = transformers.DynamicCache()
        out = peer(inputs_embeds=given, use_cache=True, **{CACHE: held["theirs"]})
        return out.last_hidden_state.numpy()

    @torch.no_grad()
    def their_step() -> np.ndarray:
        # The cache grows by the same token at every call: by less than one in forty.
        place = torch.full((1, 1), LENGTH)
        options = {CACHE: held["theirs"], "position_ids": place, "use_cache": True}
        return peer(inputs_embeds=one, **options).last_hidden_state.numpy()

    return {
        "prefill": (lambda: prefill(params, x[:, :-1])[0], their_prefill),
        "decode": (our_step, their_step),
    }


def tower_sides() -> Sides:
    """Returns our side and the peer's of the tower's layer."""
    peer = CLIPEncoder(CLIP).eval()
    module, params = encoder.Encoder(encoder.EncoderConfig.from_hf(CLIP)), params_of(peer)
    shape = (PICTURES, PATCHES, CLIP.hidden_size)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x)[-1])

    @torch.no_grad()
    def theirs() -> np.ndarray:
        out = peer(inputs_embeds=torch.from_numpy(x), attention_mask=None)
        return out.last_hidden_state.numpy()

    return lambda: run(params, x), theirs


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=7, help="paired runs of each case")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of all threads, not wall")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/wide_layers.json"))
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    torch.manual_seed(0)
    rows, shown = [], Table("what", "ours", "transformers", "ratio", "share", "error")
    rate, stream = limits(arguments.repeats, clock)
    required = work()
    for what, (ours, theirs) in {**decoder_sides(), "tower": tower_sides()}.items():
        got, expected = np.asarray(ours()), theirs()
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        times = measure.paired(ours, theirs, arguments.repeats, clock)
        least = max(required[what].operations / rate, required[what].bytes / stream)
        share = least / times.ours
        rows.append({"what": what, **times._asdict(), "share": share, "error": error})
        milliseconds = (f"{1e3 * each:.1f} ms" for each in (times.ours, times.theirs))
        shown.add_row(what, *milliseconds, f"{times.ratio:.2f}", f"{share:.2f}", f"{error:.0e}")
    console = Console(width=100, markup=False)
    console.print(f"products {rate / 1e9:.0f} GFLOP/s, reading {stream / 1e9:.1f} GB/s")
    console.print(shown)
    measure.save(arguments.output, rows, "torch", "transformers")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()

"""Runs one port on several meshes, for test_sharding in a separate process with eight devices.

    python sharded.py DIRECTORY INPUTS RESULTS JSON

with {"steered": site, "sites": [...], "meshes": ["8x1", "explicit 2x4", ...]}. Writes
RESULTS/<mesh>.npz for these meshes, and RESULTS/1.npz without a mesh. Axes of an explicit mesh have
the type that `jax.make_mesh` gives them.
"""

import json
import sys

import jax
import numpy as np

import ports
from ports.parallel import sharding


def run(vlm: ports.VLM, inputs: dict, steered: str, sites: list[str]) -> dict[str, np.ndarray]:
    """Returns logits, states and tokens, plain and steered: each row by its vector and strength,
    and all by edits that depend on the states.

    Strengths are arguments of the program; zeros give the plain model.
    """
    rows = len(inputs["input_ids"])
    width = vlm.site_shapes[steered][-1]
    vectors = np.random.default_rng(0).standard_normal((rows, width)).astype("float32")
    out = {}
    for name, strength in (("plain", 0.0), ("steered", 1.0)):
        alpha = strength * np.arange(rows, dtype="float32")
        own = ports.add(vectors, alpha, where="text")
        adaptive = ports.add_adaptive(vectors[0], vectors[-1], 0.5 * strength, "text")
        nearest = ports.add_if_similar(vectors[:2], vectors[:2], -1.0, alpha=0.5 * strength)
        edits = {steered: [own, adaptive, nearest]}
        forward = vlm.forward(inputs, sites=sites, edits=edits)
        generation = vlm.generate(inputs, max_new_tokens=4, sites=[steered], edits=edits)
        out |= {f"{name} state of {site}": state for site, state in forward.states.items()}
        out[f"{name} logits"] = forward.logits
        out[f"{name} tokens"] = generation.tokens
        out[f"{name} generated states"] = generation.states[steered]
    return {key: np.asarray(value) for key, value in out.items()}


def held(vlm: ports.VLM) -> int:
    """Returns the bytes of the parameters on the last device."""
    shards = [s for leaf in jax.tree.leaves(vlm.params) for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == jax.devices()[-1])


def mesh_of(name: str) -> jax.sharding.Mesh:
    """Returns the mesh of this name."""
    if not name.startswith("explicit"):
        return ports.make_mesh(*ports.parse_mesh(name))
    mesh = jax.make_mesh(ports.parse_mesh(name.split()[1]), ("data", "model"))
    assert mesh.explicit_axes == ("data", "model")
    return mesh


def main() -> None:
    """Writes the results as described above."""
    directory, inputs, results, what = sys.argv[1:]
    inputs, what = dict(np.load(inputs)), json.loads(what)
    for name in (None, *what.pop("meshes")):
        mesh = None if name is None else mesh_of(name)
        vlm = ports.load(directory, mesh=mesh)
        out = run(vlm, inputs, **what)
        if mesh is not None:
            placed = sharding.param_shardings(mesh, vlm.params, vlm.axes, vlm.kv_heads)
            assert held(vlm) == sharding.parameter_bytes(vlm.params, placed)
        np.savez(f"{results}/{name or '1'}.npz", **out)


main()

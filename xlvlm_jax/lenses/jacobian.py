"""The Jacobian lens: carries a layer's states to the last layer by the average Jacobian.

    read(state of layer l) = head(norm(J_l state)),   J_l = mean of d(last layer) / d(layer l)

The derivatives are summed over the positions of the last layer, and averaged over positions of
layer l and prompts; the first positions, on which attention rests whatever the text, are left out.

B batch, T positions, D width, L layers.

Gurnee, Sofroniew, Lindsey et al. 2026, "Verbalizable Representations Form a Global Workspace in
Language Models".
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Float

from ports import VLM
from ports.intervene.edits import add
from ports.intervene.sites import capture
from ports.intervene.steer import steer
from ports.nn.vision_language import VisionLanguageModel
from ports.parallel import compiled
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.storage import damaged, tensors, versions
from xlvlm_jax.storage.same_model import model_of, require_model

Array = jax.Array
KIND, NAME = "jacobian lens", "layers.{}"
# Passes backwards side by side: on CPU, few keep their states in its cache.
AT_ONCE, ACCELERATOR_AT_ONCE = 8, 64


def average_jacobian(
    function: Callable[[Any], Float[Array, "B T D"]],
    x: Any,
    weights: Float[Array, "B T"],
    *,
    at_once: int | None = None,
) -> Any:
    """Returns the average Jacobian of a function of states, without ever holding the whole one.

    For each of the D outputs, one pass backwards from all positions at once, `at_once` of them side
    by side. Works under jit and vmap.

    Args:
        function: x -> float[B, T, D].
        x: float[B, T, E], or a tree of such arrays.
        weights: float[B, T], 1 at the positions that count, on both sides, else 0.
        at_once: number of passes side by side; None chooses by backend.

    Returns:
        For each array of x float[D, E]: the mean over rows of the mean over source positions of the
        sum over target positions of d function / d x.

    Examples:
        >>> import jax.numpy as jnp
        >>> from xlvlm_jax import lenses
        >>> A, x = jnp.array([[1.0, 2.0], [0.0, 3.0]]), jnp.ones((1, 4, 2))
        >>> lenses.average_jacobian(lambda x: x @ A.T, x, jnp.ones((1, 4))).tolist()
        [[1.0, 2.0], [0.0, 3.0]]
    """
    out, back = jax.vjp(function, x)
    size = at_once or (AT_ONCE if jax.default_backend() == "cpu" else ACCELERATOR_AT_ONCE)
    D = out.shape[-1]
    share = weights / jnp.maximum(weights.sum(1, keepdims=True), 1) / len(weights)

    def row(index: Array) -> Any:
        one = jax.nn.one_hot(index, D, dtype=out.dtype)
        (slopes,) = back(weights[..., None].astype(out.dtype) * one)
        # As exact as its inputs, also where the model computes in bfloat16.
        mean = functools.partial(jnp.einsum, "bt,bte->e", share, precision="highest")
        return jax.tree.map(lambda s: mean(s.astype(share.dtype)), slopes)

    return jax.lax.map(row, jnp.arange(D), batch_size=min(size, D))


@compiled.program(static=["sites", "last", "at_once"])
def _jacobians(
    model: VisionLanguageModel,
    sites: tuple[str, ...],
    last: str,
    at_once: int | None,
    params: dict,
    inputs: dict,
    weights: Array,
) -> dict[str, Array]:
    def final(shifts: dict[str, Array]) -> Array:
        edits = {site: add(shift) for site, shift in shifts.items()}
        apply = capture(steer(model.apply, edits), (last,))
        return apply({"params": params}, inputs, method="states")[1][last]

    # What is added to a layer's states acts as the states do: all layers share the passes.
    zeros = jnp.zeros((*weights.shape, model.config.text.hidden_size), model.dtype)
    return average_jacobian(final, dict.fromkeys(sites, zeros), weights, at_once=at_once)


@dataclasses.dataclass(frozen=True, repr=False)
class JacobianLens:
    """Matrices that carry the states of layers to the last one.

    Attributes:
        jacobians: layer's number -> float32[D, D], to be multiplied from the left.
        num_prompts: number of prompts they are the mean of.
        source: "model" and "fingerprint" of the checkpoint, and more; JSON values.

    Examples:
        >>> import numpy as np, tempfile
        >>> from xlvlm_jax import lenses
        >>> lens = lenses.JacobianLens({0: np.eye(2, dtype="float32")}, num_prompts=3)
        >>> lens.save(file := tempfile.mkdtemp() + "/lens.safetensors")
        >>> lenses.load_jacobian_lens(file)
        JacobianLens(1 layer of width 2, 3 prompts)
    """

    jacobians: Mapping[int, Float[np.ndarray, "D D"]]
    num_prompts: int
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        layers = len(self.jacobians)
        width = len(next(iter(self.jacobians.values())))
        return (
            f"JacobianLens({layers} layer{'s' * (layers != 1)} of width {width}, "
            f"{self.num_prompts} prompts)"
        )

    def carried(self, vlm: VLM) -> dict[str, Float[np.ndarray, "D D"]]:
        """Returns {site of `vlm.layers`: its matrix}, for `logit_lens(carried=...)`.

        Args:
            vlm: the model.

        Raises:
            ValueError: the lens was fitted on another model, or has other layers or another width.
        """
        require_model(self.source, vlm, "the lens was fitted on")
        width, count = vlm.sizes.text.hidden_size, len(vlm.layers)
        for number, matrix in self.jacobians.items():
            if number >= count or matrix.shape != (width, width):
                raise ValueError(
                    f"the lens has a matrix {matrix.shape} for layer {number}; the model has "
                    f"{count} layers of width {width}: use the lens of this model"
                )
        return {vlm.layers[number]: matrix for number, matrix in self.jacobians.items()}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file in float32; a missing parent directory is created."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        described = {"prompts": self.num_prompts, "source": self.source}
        metadata = {
            "kind": KIND,
            "described": json.dumps({"version": versions.VERSION} | described),
        }
        matrices = {
            NAME.format(number): np.asarray(matrix, np.float32)
            for number, matrix in self.jacobians.items()
        }
        tensors.write(path, matrices, metadata)


def load_jacobian_lens(path: str | Path) -> JacobianLens:
    """Reads a lens: our safetensors file, or a published one (.pt) of the authors' jlens.

    A published file is a dict of "J" (layer's number -> matrix), "n_prompts" and "d_model", saved
    with torch.save; nothing in it is executed and PyTorch is not needed. Runs on the host and
    cannot be traced.

    Args:
        path: the file.

    Returns:
        The lens, in float32.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or its matrices are not square and finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Jacobian lens")
    if path.suffix in (".pt", ".pth"):
        stored = read_pth(path)
        if not isinstance(stored, dict) or not isinstance(stored.get("J"), dict):
            raise ValueError(
                f"{path} has no 'J', a dict of matrices; expected a lens that jlens saved (its "
                "checkpoints of unfinished fits hold sums instead)"
            )
        matrices, prompts = stored["J"], stored.get("n_prompts", 0)
        source: dict[str, Any] = {"file": path.name}
    else:
        with damaged.reported(path, "Jacobian lens", "fit it again"):
            with safetensors.safe_open(path, "numpy") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("kind") != KIND:
                raise ValueError(f"{path} holds no Jacobian lens; expected one that `save` wrote")
            described = json.loads(metadata["described"])
            versions.require(path, described, "fit it again")
            matrices = {int(name.rpartition(".")[2]): value for name, value in tensors.items()}
            prompts, source = described["prompts"], described["source"]
    jacobians = {int(n): np.asarray(m).astype(np.float32) for n, m in sorted(matrices.items())}
    shapes = {matrix.shape for matrix in jacobians.values()}
    if len(shapes) != 1 or any(len(s) != 2 or s[0] != s[1] for s in shapes):
        raise ValueError(f"{path}: matrices have shapes {sorted(shapes)}; expected one, [D, D]")
    for number, matrix in jacobians.items():
        if not np.isfinite(matrix).all():
            raise ValueError(f"{path}: the matrix of layer {number} holds NaN or Inf")
    return JacobianLens(jacobians, int(prompts), source)


def fit_jacobian_lens(
    vlm: VLM,
    batches: Iterable[Mapping[str, Any] | tuple[Mapping[str, Any], int]],
    *,
    layers: Iterable[int] | None = None,
    skip: int = 16,
    at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> JacobianLens:
    """Fits a Jacobian lens: the mean over the rows of all batches.

    A forward pass and D passes backwards per batch, for all layers together. Runs on the host and
    cannot be traced.

    Args:
        vlm: the model.
        batches: the processor's arrays of each batch, or these and the number of its rows that
            count; the rows after them fill it up.
        layers: numbers of the layers to fit; None for all but the last.
        skip: number of positions at the beginning of each row to leave out, as the authors do.
        at_once: as for `average_jacobian`.
        progress: called after each batch with the number of rows so far.

    Returns:
        The lens.

    Raises:
        ValueError: there are no batches, a layer does not exist, `skip` is negative, or a row has
            no more than `skip` tokens.

    Examples:
        >>> import ports
        >>> from PIL import Image
        >>> from xlvlm_jax import lenses
        >>> vlm = ports.load("embedded")
        >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
        >>> inputs = vlm.process([prompt], [picture])
        >>> lenses.fit_jacobian_lens(vlm, [inputs], layers=[6])
        JacobianLens(1 layer of width 192, 1 prompts)
    """
    if skip < 0:
        raise ValueError(f"skip is {skip}; expected a number of positions, 0 or more")
    *before, last = vlm.layers
    numbers = list(range(len(before))) if layers is None else sorted(set(layers))
    if not numbers or min(numbers) < 0 or max(numbers) >= len(before):
        raise ValueError(f"layers are {numbers}; expected some of 0 to {len(before) - 1}")
    sites = tuple(before[number] for number in numbers)
    total: dict[str, np.ndarray] = {}
    rows = 0
    for given in batches:
        inputs, count = given if isinstance(given, tuple) else (given, None)
        placed = vlm.place(inputs)
        index = np.asarray(vlm.places(placed).index)
        weights = (np.asarray(placed["attention_mask"]) != 0) & (index >= skip)
        if not weights.any(1).all():
            raise ValueError(
                f"a prompt has no more than {skip} tokens, which are all left out; give longer "
                "prompts or a smaller skip"
            )
        count = len(weights) if count is None else count
        weights[count:] = False
        found = _jacobians(
            vlm.module,
            sites,
            last,
            at_once,
            vlm.params,
            placed,
            jnp.float32(weights),
            mesh=vlm.mesh,
        )
        for site, matrix in found.items():
            total[site] = total.get(site, 0) + len(weights) * np.asarray(matrix, np.float64)
        rows += count
        if progress is not None:
            progress(rows)
    if not rows:
        raise ValueError("there are no batches to fit a lens on; give at least one")
    return JacobianLens(
        {
            n: (total[site] / rows).astype(np.float32)
            for n, site in zip(numbers, sites, strict=True)
        },
        rows,
        {**model_of(vlm), "skip": skip},
    )

"""Where in a picture a concept, a word or a direction is: values on the picture's grid of cells.

B rows, T positions, D width, K concepts (or words, or vectors), V vocabulary, h x w cells of a
picture, n cells of all pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from ports.inputs.padding import bucket_length
from ports.inputs.patch_layout import PatchLayout
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.grounding import Unembed
from xlvlm_jax.concepts.record import Concepts

Layouts = Sequence[Sequence[PatchLayout]]
Maps = list[list[np.ndarray]]  # for each row and picture float32[K, h, w]
_VALUES_AT_ONCE = 2**24  # activations of cells that are in memory together
_AT_ONCE = 256  # cells whose logits are in memory together: V numbers each


def concept_maps(
    states: Float[np.ndarray, "B T D"], concepts: Concepts, layouts: Layouts
) -> list[list[Float[np.ndarray, "K h w"]]]:
    """Returns the activations of concepts in each cell of each picture.

    All cells are projected together, so that rows of any number of pictures cost one call. Runs on
    the host and cannot be traced.

    Args:
        states: float[B, T, D], the states of the concepts' site at every position of a prompt.
        concepts: K concepts of width D, learnt at that site.
        layouts: for each row its pictures, as `VLM.patch_layout` returns them for the same inputs.

    Returns:
        For each row and picture float32[K, h, w], on the grid of `positions`; NaN in cells that no
        position covers. `paint` draws a map in the pixels of its picture.

    Raises:
        ValueError: the layouts have another number of rows or positions beyond T, no row has a
            picture, or the states have another width than the concepts or are not finite.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> from ports.inputs.patch_layout import grid
        >>> concepts = xlvlm_jax.Concepts.from_components(np.eye(2), alpha=1.0)
        >>> states = np.float32([[[9, 9], [3, 0], [0, 5]]])  # the picture's cells are 1 and 2
        >>> maps = xlvlm_jax.concept_maps(states, concepts, [[grid([1, 2], 1, 2)]])
        >>> maps[0][0].tolist()
        [[[2.0, 0.0]], [[0.0, 4.0]]]
    """
    return _on_cells(states, layouts, lambda cells: np.asarray(project(cells, concepts)))


def concept_maps_by_row(
    states: Float[np.ndarray, "B T D"], concepts: Concepts, layouts: Layouts
) -> Iterator[list[Float[np.ndarray, "K h w"]]]:
    """Yields what `concept_maps` returns, row by row.

    With thousands of concepts, the maps of a batch need gigabytes; here only those of a few rows
    are in memory together. Runs on the host and cannot be traced.

    Args:
        states: as for `concept_maps`.
        concepts: as for `concept_maps`.
        layouts: as for `concept_maps`.

    Yields:
        For each row a list of float32[K, h, w], one per picture.

    Raises:
        ValueError: as for `concept_maps`; each row needs a picture.
    """
    cells = max((sum(one.positions.size for one in row) for row in layouts), default=1)
    size = max(1, _VALUES_AT_ONCE // (max(cells, 1) * len(concepts.components)))
    for start in range(0, len(layouts), size):
        some = slice(start, start + size)
        yield from concept_maps(states[some], concepts, layouts[some])


def word_maps(
    states: Float[np.ndarray, "B T D"],
    unembed: Unembed,
    tokens: Sequence[Sequence[int]],
    layouts: Layouts,
    *,
    through_norm: bool = False,
) -> list[list[Float[np.ndarray, "K h w"]]]:
    """Returns how strongly each cell is read as each word: its log-probability by the logit lens.

    Logits are computed for some cells at a time, V numbers each. Runs on the host and cannot be
    traced.

    Args:
        states: float[B, T, D], states of one site at every position of a prompt.
        unembed: the language-model head, such as `VLM.unembed`.
        tokens: for each of K words the ids of the tokens that spell it, from `word_tokens`; their
            probabilities are added.
        layouts: as for `concept_maps`.
        through_norm: read states through the model's final norm; right for sites before it (see
            `VLM.is_before_norm`).

    Returns:
        For each row and picture float32[K, h, w], natural logarithms; NaN in cells that no position
        covers.

    Raises:
        ValueError: as for `concept_maps`, or a word has no token.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; for image tokens Neo et al.
    2024, "Towards Interpreting Visual Information Processing in Vision-Language Models".

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> from ports.inputs.patch_layout import grid
        >>> states = np.log(np.float32([[[1, 1], [3, 1], [1, 3]]]))
        >>> maps = xlvlm_jax.word_maps(states, lambda x: x, [[0]], [[grid([1, 2], 1, 2)]])
        >>> np.exp(maps[0][0]).round(3).tolist()
        [[[0.75, 0.25]]]
    """
    if not tokens or not all(len(ids) for ids in tokens):
        raise ValueError(f"expected one or more token ids per word, got {list(tokens)}")

    def log_probabilities(cells: np.ndarray) -> np.ndarray:
        size = min(_AT_ONCE, bucket_length(len(cells)))
        found = []
        for start in range(0, len(cells), size):
            some = cells[start : start + size]
            # Padded to one shape, so that one program is compiled.
            padded = np.pad(some, ((0, size - len(some)), (0, 0)))
            logits = unembed(padded, through_norm=True) if through_norm else unembed(padded)
            every = jax.nn.log_softmax(jax.numpy.asarray(logits, np.float32))
            of_words = [jax.nn.logsumexp(every[:, np.array(ids)], axis=1) for ids in tokens]
            found.append(np.stack(of_words, axis=1)[: len(some)])
        return np.concatenate(found)

    return _on_cells(states, layouts, log_probabilities)


def word_tokens(tokenizer: Any, word: str) -> list[int]:
    """Returns the ids of the tokens that spell a word, as `word_maps` takes them.

    A token that only begins a word does not count: a map of "to" is none of "toaster".

    Args:
        tokenizer: a Hugging Face tokenizer.
        word: the word; also found with a capital first letter and after a space.

    Raises:
        ValueError: no single token spells the word.

    Examples:
        >>> import ports
        >>> from xlvlm_jax.concepts.maps import word_tokens
        >>> tokenizer = ports.load("embedded").tokenizer
        >>> [tokenizer.decode([i]) for i in word_tokens(tokenizer, "dog")]
        ['dog']
    """
    word = word.strip()
    found = set()
    for spelling in {word, word[:1].upper() + word[1:], f" {word}"}:
        ids = tokenizer.encode(spelling, add_special_tokens=False)
        # Some vocabularies write the space before a word as a token of its own.
        texts = {i: text for i in ids if (text := tokenizer.decode([i]).strip())}
        if list(texts.values()) == [spelling.strip()]:
            found |= texts.keys()
    if not word or not found:
        raise ValueError(
            f"no token of the model spells {word!r}; use a word that is one token, such as a "
            "shorter one"
        )
    return sorted(found)


def vector_maps(
    states: Float[np.ndarray, "B T D"],
    vectors: Float[np.ndarray, "K D"],
    layouts: Layouts,
) -> list[list[Float[np.ndarray, "K h w"]]]:
    """Returns the cosine of the state in each cell with each vector.

    Runs on the host and cannot be traced.

    Args:
        states: float[B, T, D], states of one site at every position of a prompt.
        vectors: float[K, D], directions at that site, such as steering vectors.
        layouts: as for `concept_maps`.

    Returns:
        For each row and picture float32[K, h, w], from -1 to 1, 0 where the state is zero; NaN in
        cells that no position covers.

    Raises:
        ValueError: as for `concept_maps`; or a vector is zero or not finite, or its width differs.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> from ports.inputs.patch_layout import grid
        >>> states = np.float32([[[2, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, -1]]])
        >>> layouts, vectors = [[grid([0, 1, 2], 1, 3)]], np.float32([[0, 0, 0, 5]])
        >>> xlvlm_jax.vector_maps(states, vectors, layouts)[0][0].tolist()
        [[[0.0, 0.5, -1.0]]]
    """
    vectors = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if vectors.ndim != 2 or not (lengths > 0).all() or not np.isfinite(lengths).all():
        raise ValueError(
            f"vectors have shape {vectors.shape}; expected [K, D], finite and none of them zero"
        )

    def cosines(cells: np.ndarray) -> np.ndarray:
        if cells.shape[1] != vectors.shape[1]:
            raise ValueError(
                f"vectors are {vectors.shape[1]} wide and the states {cells.shape[1]}; use vectors "
                "of the same site and model"
            )
        norms = np.linalg.norm(cells, axis=1, keepdims=True)
        return cells @ (vectors / lengths).T / np.where(norms > 0, norms, 1)

    return _on_cells(states, layouts, cosines)


def gradient_maps(
    gradients: Float[np.ndarray, "B T D"],
    layouts: Layouts,
    states: Float[np.ndarray, "B T D"] | None = None,
) -> list[list[Float[np.ndarray, "1 h w"]]]:
    """Returns how much a score depends on the state of each cell, from its gradient.

    Without states, the length of the gradient: how fast the score can change there. With states,
    gradient times state: to first order, how much the score loses where the state is set to zero.
    Runs on the host and cannot be traced.

    Args:
        gradients: float[B, T, D], derivatives of the score of each row with respect to the states
            of a site, such as those of `answer_gradients`.
        layouts: as for `concept_maps`.
        states: float[B, T, D], the states; None for the length of the gradient.

    Returns:
        For each row and picture float32[1, h, w]; NaN in cells that no position covers.

    Raises:
        ValueError: as for `concept_maps`, or states have another shape.

    Source: Simonyan et al. 2014, "Deep Inside Convolutional Networks"; Shrikumar et al. 2016, "Not
    Just a Black Box".

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> from ports.inputs.patch_layout import grid
        >>> gradients, layouts = np.float32([[[3, 4], [0, 1]]]), [[grid([0, 1], 1, 2)]]
        >>> xlvlm_jax.gradient_maps(gradients, layouts)[0][0].tolist()
        [[[5.0, 1.0]]]
        >>> states = np.float32([[[1, -1], [7, 2]]])
        >>> xlvlm_jax.gradient_maps(gradients, layouts, states)[0][0].tolist()
        [[[-1.0, 2.0]]]
    """
    gradients = np.asarray(gradients, np.float32)
    if states is None:
        values = np.linalg.norm(gradients, axis=-1)
    else:
        states = np.asarray(states, np.float32)
        if states.shape != gradients.shape:
            raise ValueError(
                f"states have shape {states.shape} and gradients {gradients.shape}; expected the "
                "states of the same site and inputs"
            )
        values = (gradients * states).sum(axis=-1)
    return _on_cells(values[..., None], layouts, lambda cells: cells)


def _on_cells(
    states: np.ndarray, layouts: Layouts, score: Callable[[np.ndarray], np.ndarray]
) -> Maps:
    """Returns score(states of all cells [n, D]) -> [n, K] on the grids of the pictures."""
    states = np.asarray(states)
    if states.ndim != 3 or len(states) != len(layouts):
        raise ValueError(
            f"states have shape {states.shape} for layouts of {len(layouts)} rows; expected "
            "[rows, positions, width] of the same inputs"
        )
    cells = [(row, layout.positions) for row, pictures in enumerate(layouts) for layout in pictures]
    if not cells:
        raise ValueError("no prompt has a picture; maps need image tokens")
    highest = max(int(positions.max(initial=-1)) for _, positions in cells)
    if highest >= states.shape[1]:
        raise ValueError(
            f"a layout has position {highest}, but the states have {states.shape[1]} positions; "
            "pass the layout of the same inputs"
        )
    chosen = [states[row, positions[positions >= 0]] for row, positions in cells]
    joined = np.concatenate(chosen)
    # Very long pictures have no cell: a row of zeros tells how many values there would be.
    scored = score(joined if len(joined) else np.zeros((1, states.shape[2]), states.dtype))
    values = np.asarray(scored, np.float32)[: len(joined)]
    parts = np.split(values, np.cumsum([len(part) for part in chosen])[:-1])
    maps: Maps = [[] for _ in layouts]
    for (row, positions), part in zip(cells, parts, strict=True):
        drawn = np.full((values.shape[1], *positions.shape), np.nan, np.float32)
        drawn[:, positions >= 0] = part.T
        maps[row].append(drawn)
    return maps


def paint(
    values: Float[np.ndarray, "K h w"],
    boxes: Float[np.ndarray, "h w 4"],
    height: int,
    width: int,
) -> Float[np.ndarray, "K height width"]:
    """Draws maps in the pixels of their picture.

    A pixel has the value of the cell that its middle lies in; where boxes overlap, the mean of
    theirs. Runs on the host and cannot be traced.

    Args:
        values: float[K, h, w], maps; NaN cells are left out.
        boxes: float[h, w, 4], the cells' boxes, of `PatchLayout`.
        height: pixels of the picture.
        width: pixels of the picture.

    Returns:
        float32[K, height, width]; NaN where no cell lies.

    Raises:
        ValueError: the maps are not on the grid of the boxes, or a side is below one pixel.

    Examples:
        >>> import numpy as np
        >>> from ports.inputs.patch_layout import grid_boxes
        >>> from xlvlm_jax.concepts.maps import paint
        >>> paint(np.float32([[[1, 2]]]), grid_boxes(1, 2), 1, 4).tolist()
        [[[1.0, 1.0, 2.0, 2.0]]]
    """
    values, boxes = np.asarray(values, np.float32), np.asarray(boxes)
    if values.ndim != 3 or boxes.shape != (*values.shape[1:], 4):
        raise ValueError(
            f"maps have shape {values.shape} and boxes {boxes.shape}; expected [K, h, w] and "
            "[h, w, 4]"
        )
    if min(height, width) < 1:
        raise ValueError(f"the picture is {width} x {height} pixels; expected at least one")
    total = np.zeros((len(values), height, width))
    count = np.zeros((height, width))
    # The first pixel whose middle lies in a box, and the first after it.
    edges = np.ceil(boxes * (width, height, width, height) - 0.5).astype(int).clip(0)
    for (x0, y0, x1, y1), cell in zip(
        edges.reshape(-1, 4), values.reshape(len(values), -1).T, strict=True
    ):
        if np.isfinite(cell).all():
            total[:, y0:y1, x0:x1] += cell[:, None, None]
            count[y0:y1, x0:x1] += 1
    with np.errstate(invalid="ignore"):
        return (total / count).astype(np.float32)

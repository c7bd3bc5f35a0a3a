"""Maps on drawn scenes, whose objects' boxes and pixels are known: do they point at them?

    python -m benchmarks.maps                # 200 pictures to learn on, 150 others to test on
    python -m benchmarks.maps --method kmeans --layer 0 --layer 2 --dictionaries-only

At all layers but the last of the embedded model, dictionaries are learnt on image tokens (16 per
picture). Each value of an attribute ("dog", "red", "beach") is given the concept whose activation
ranks the cells that show it highest among all cells of the first pictures. On the other pictures,
with the value:

    pointing   share of pictures in which the middle of the cell of the highest activation lies in
               the box of an object (for places: in none)
    AUC        how well the map ranks the pixels of the objects (for places: of everything else)
               above all others of their picture; mean over pictures
    which      how well the concept ranks cells that show the value above cells that show another
               value of the attribute, over all pictures: .5 if it only finds objects
    own, apart in pictures of two objects, whether it finds the one with the value, not the other:
               .5 if it only finds objects (see `benchmarks.pairs`)

Beside: as many random directions, chosen in the same way; the difference between the mean states of
cells that show the value and of those that show others, which knows all labels; a random concept;
the length of the state; the attention of the last position of the prompt (PyTorch's, if it is
installed); the word of the object by the logit lens; and the gradient of the answer that names it.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

import ports
from benchmarks import measure
from benchmarks.pairs import (
    Pairs,
    cells_in_boxes,
    look_at_pairs,
    pixels_in_cells,
    score_pairs,
    states_of_cells,
)
from ports.inputs import patch_layout
from xlvlm_jax import Concepts, answer_gradients, decompose, gradient_maps, project, word_maps
from xlvlm_jax.concepts.maps import word_tokens
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.scenes.scene import Split
from xlvlm_jax.demo import embedded
from xlvlm_jax.metrics.localisation import picture_auc, rank_auc

GRID, SIDE, BATCH, PER_PICTURE = 8, 112, 50, 16
CELL = (SIDE // GRID) ** 2  # pixels
PROMPT = prompts.question("What is in the picture?")
SNMF = {"relative_alpha": True, "alpha": 0.1, "n_init": 1, "max_iter": 100}
SHOWN = 0.5  # share of a cell's pixels from which on it shows an object
ATTRIBUTES = ("object", "kind", "colour", "count", "mood", "place")


class Pictures(NamedTuple):
    """Drawn scenes, and their states at each site."""

    attributes: list[dict[str, Any]]
    inputs: list[dict[str, np.ndarray]]  # batches
    states: dict[str, np.ndarray]  # site -> float32[N, 64, D], of the image tokens
    pixels: np.ndarray  # float[N, 64], pixels of objects in each cell
    in_box: np.ndarray  # bool[N, 64], whether its middle lies in the box of an object


def look(vlm: ports.VLM, split: Split, count: int, sites: list[str]) -> Pictures:
    """Draws scenes and runs the model over them."""
    drawn = [scenes.sample_scene(split, index) for index in range(count)]
    masks = [scenes.draw_with_masks(scene)[1] for scene in drawn]
    batches, states = [], {site: [] for site in sites}
    for start in range(0, count, BATCH):
        images = [Image.fromarray(scenes.training_image(s)) for s in drawn[start : start + BATCH]]
        inputs, found = states_of_cells(vlm, PROMPT, images, sites)
        batches.append(inputs)
        for site, value in found.items():
            states[site].append(value)
    return Pictures(
        [scenes.attributes(scene) | {"object": "object"} for scene in drawn],
        batches,
        {site: np.concatenate(parts) for site, parts in states.items()},
        np.concatenate([pixels_in_cells(mask.any(0)) for mask in masks]),
        np.stack([cells_in_boxes(mask).any(0) for mask in masks]),
    )


class Scored(NamedTuple):
    """Means over the values of an attribute."""

    pointing: float
    auc: float
    which: float


def values_of(pictures: Pictures, name: str) -> list[Any]:
    """The values of an attribute."""
    return sorted({each[name] for each in pictures.attributes if each[name] is not None}, key=str)


def shows(pictures: Pictures, name: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
    """bool[N], pictures with the value, and bool[N, 64], cells that show objects, or the place."""
    with_value = np.array([each[name] == value for each in pictures.attributes])
    share = pictures.pixels / CELL
    return with_value, share < SHOWN if name == "place" else share >= SHOWN


def score(maps: Mapping[Any, np.ndarray], test: Pictures, name: str) -> Scored:
    """Scores one map float[N, 64] per value of an attribute."""
    found = []
    for value, values in maps.items():
        here, cells = shows(test, name, value)
        pixels, inside = test.pixels, test.in_box
        if name == "place":
            pixels, inside = CELL - pixels, ~inside
        best = values[here].argmax(1)
        pointing = inside[here][np.arange(here.sum()), best].mean()
        which = np.nan
        if len(maps) > 1:
            positive = (here[:, None] & cells).reshape(-1)
            known = np.array([each[name] is not None for each in test.attributes])
            among = (known[:, None] & cells).reshape(-1)
            ranks = rankdata(np.float64(values.reshape(-1)[among]))
            which = rank_auc(ranks[:, None], positive[among])[0]
        auc = picture_auc(values[here], pixels[here], CELL - pixels[here]).mean()
        found.append((pointing, auc, which))
    return Scored(*np.array(found).mean(0))


def chosen(ranks: np.ndarray, learnt: Pictures, name: str) -> dict[Any, int]:
    """{value: the number of its best concept}, from the ranks float[N 64, K] of activations."""
    found = {}
    for value in values_of(learnt, name):
        here, cells = shows(learnt, name, value)
        positive = (here[:, None] & cells).reshape(-1)
        found[value] = int(rank_auc(ranks, positive).argmax())
    return found


def differences(states: np.ndarray, learnt: Pictures, name: str) -> dict[Any, np.ndarray]:
    """{value: float[D]}, mean state of the cells that show it, less that of those that show others;
    of "object", of all others.
    """
    found = {}
    known = np.array([each[name] is not None for each in learnt.attributes])
    for value in values_of(learnt, name):
        here, cells = shows(learnt, name, value)
        others = ~cells if name == "object" else cells & (known & ~here)[:, None]
        found[value] = states[here[:, None] & cells].mean(0) - states[others].mean(0)
    return found


def maps_of(numbers: Mapping[Any, int], activations: np.ndarray) -> dict[Any, np.ndarray]:
    """{value: float[N, 64]}, the maps of these concepts, from activations [N, 64, K]."""
    return {value: activations[..., k] for value, k in numbers.items()}


def same_for_all(values: np.ndarray, pictures: Pictures, name: str) -> dict[Any, np.ndarray]:
    """One map for every value."""
    return dict.fromkeys(values_of(pictures, name), values)


def codes(states: np.ndarray, concepts: Concepts) -> np.ndarray:
    """Activations float[N, 64, K]; of pca, whose components have two signs, both: [N, 64, 2 K]."""
    flat = np.asarray(project(states.reshape(-1, states.shape[-1]), concepts))
    flat = np.concatenate([flat, -flat], axis=1) if concepts.method == "pca" else flat
    return flat.reshape(*states.shape[:2], -1)


def of_dictionaries(
    pictures: tuple[Pictures, Pictures], pairs: Pairs, methods: list[str], count: int
) -> list[dict[str, Any]]:
    """The scores of dictionaries and what is beside them, site by site."""
    learnt, tested = pictures
    rng, rows = np.random.default_rng(0), []

    def add(
        site: str,
        name: str,
        side: str,
        given: Mapping[Any, np.ndarray],
        of_pairs: Mapping[Any, np.ndarray],
    ) -> None:
        scored = score(given, tested, name)._asdict()
        scored |= zip(("own", "apart"), score_pairs(of_pairs, pairs, name), strict=True)
        rows.append({"site": site, "attribute": name, "map": side, **scored})

    for site, Z in learnt.states.items():
        some = np.stack([z[rng.choice(64, PER_PICTURE, replace=False)] for z in Z])
        some = some.reshape(-1, Z.shape[-1])
        for method in methods:
            options = {"snmf": SNMF}.get(method, {})
            concepts = decompose(some, count, method, key=jax.random.key(0), **options)
            of_states = (Z, tested.states[site], pairs.states[site])
            train, test, both = (codes(each, concepts) for each in of_states)
            ranks = rankdata(np.float64(train.reshape(-1, train.shape[-1])), axis=0)
            for name in ATTRIBUTES:
                best = chosen(ranks, learnt, name)
                add(site, name, f"concept, {method}", maps_of(best, test), maps_of(best, both))
                any_one = dict.fromkeys(best, rng.integers(count))
                side = f"random concept, {method}"
                add(site, name, side, maps_of(any_one, test), maps_of(any_one, both))
        directions = rng.standard_normal((Z.shape[-1], count)).astype(np.float32)
        of_states = (Z, tested.states[site], pairs.states[site])
        train, test, both = ((each - some.mean(0)) @ directions for each in of_states)
        ranks = rankdata(np.float64(train.reshape(-1, count)), axis=0)
        lengths, of_pairs = (np.linalg.norm(each, axis=-1) for each in of_states[1:])
        for name in ATTRIBUTES:
            best = chosen(ranks, learnt, name)
            add(site, name, "random directions", maps_of(best, test), maps_of(best, both))
            length = dict.fromkeys(best, lengths), dict.fromkeys(best, of_pairs)
            add(site, name, "length of the state", *length)
            means = differences(Z, learnt, name)
            known = (
                {value: states @ vector for value, vector in means.items()}
                for states in of_states[1:]
            )
            add(site, name, "difference of means", *known)
    return rows


def of_words(
    vlm: ports.VLM, states: np.ndarray, site: str, kinds: list[str]
) -> dict[str, np.ndarray]:
    """{kind: float[N, 64]}, its word's map by the logit lens, of states [N, 64, D]."""
    drawn = word_maps(
        states,
        vlm.unembed,
        [word_tokens(vlm.tokenizer, kind) for kind in kinds],
        [[patch_layout.grid(np.arange(64), GRID, GRID)]] * len(states),
        through_norm=vlm.is_before_norm(site),
    )
    every = np.stack([row[0].reshape(len(kinds), -1) for row in drawn], axis=1)
    return dict(zip(kinds, every, strict=True))


def of_the_model(
    vlm: ports.VLM, tested: Pictures, pairs: Pairs, sites: list[str]
) -> list[dict[str, Any]]:
    """The scores of the word of the object by the logit lens and of gradients of its answer."""
    rows = []
    kinds = [each["kind"] for each in tested.attributes]
    asked = values_of(tested, "kind")
    for site in sites:
        words = of_words(vlm, tested.states[site], site, asked)
        scored = score(words, tested, "kind")._asdict()
        of_pairs = of_words(vlm, pairs.states[site], site, asked)
        scored |= zip(("own", "apart"), score_pairs(of_pairs, pairs, "kind"), strict=True)
        rows.append({"site": site, "attribute": "kind", "map": "word", **scored})
        if site.endswith("layers.7"):
            continue
        lengths, products = [], []
        for start in range(0, len(kinds), BATCH):
            here = slice(start, start + BATCH)
            texts = [f"{vlm.render(PROMPT)} {kind}" for kind in kinds[here]]
            pixels = tested.inputs[start // BATCH]["pixel_values"]
            ids = vlm.tokenizer(
                [text.replace("<image>", "<image>" * 64) for text in texts], return_tensors="np"
            )
            inputs = {**ids, "pixel_values": pixels}
            slopes = answer_gradients(vlm, inputs, np.ones(len(texts), int), site)
            placed = vlm.patch_layout(inputs)
            gradients, states = np.asarray(slopes.gradients), np.asarray(slopes.states)
            lengths += [row[0].reshape(-1) for row in gradient_maps(gradients, placed)]
            products += [row[0].reshape(-1) for row in gradient_maps(gradients, placed, states)]
        for side, values in (("gradient", lengths), ("gradient x state", products)):
            maps = same_for_all(np.stack(values), tested, "kind")
            scored = score(maps, tested, "kind")._asdict() | {"which": np.nan}
            rows.append({"site": site, "attribute": "kind", "map": side, **scored})
    return rows


def of_attention(tested: Pictures, directory: Path) -> list[dict[str, Any]]:
    """The scores of the last position's attention, as PyTorch gives it; none without it."""
    try:
        import torch
        import transformers
    except ImportError:
        return []
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    parts: list[list[np.ndarray]] = []
    for inputs in tested.inputs:
        with torch.no_grad():
            out = model(**{k: torch.tensor(v) for k, v in inputs.items()}, output_attentions=True)
        where = np.stack([np.flatnonzero(row == 4) for row in inputs["input_ids"]])
        last = [np.asarray(layer[:, :, -1].mean(1)) for layer in out.attentions]
        parts.append([np.take_along_axis(layer, where, axis=1) for layer in last])
    rows = []
    for layer, values in enumerate(map(np.concatenate, zip(*parts, strict=True))):
        site = f"language_model.model.layers.{layer}"
        for name in ("object", "kind"):
            scored = score(same_for_all(values, tested, name), tested, name)._asdict()
            rows.append({"site": site, "attribute": name, "map": "attention", **scored})
    return rows


def run(
    train: int, test: int, methods: list[str], count: int, layers: list[int], others: bool
) -> list[dict[str, Any]]:
    """All rows."""
    vlm = ports.load(embedded.LLAVA)
    sites = [f"language_model.model.layers.{layer}" for layer in layers]
    pictures = look(vlm, "train", train, sites), look(vlm, "test", test, sites)
    pairs = look_at_pairs(vlm, PROMPT, test, sites, BATCH)
    rows = of_dictionaries(pictures, pairs, methods, count)
    if not others:
        return rows
    rows += of_the_model(vlm, pictures[1], pairs, sites)
    return rows + of_attention(pictures[1], embedded.LLAVA)


def table(rows: list[dict[str, Any]]) -> Table:
    """Of each attribute and kind of map the site with the highest AUC, or that finds its own object
    best.
    """
    shown = Table(title="Maps on drawn scenes, each at the site of its highest AUC, and own, apart")
    for heading in ("attribute", "map", "site", "pointing", "AUC", "which", "own", "apart"):
        shown.add_column(heading, justify="left" if heading in ("attribute", "map") else "right")
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        for measure_of in ("auc", "apart"):
            key = row["attribute"], row["map"], measure_of
            if not row.get(measure_of, np.nan) >= best.get(key, {}).get(measure_of, -np.inf):
                continue
            best[key] = row
    for row in {id(row): row for row in best.values()}.values():
        figures = [row.get(name, np.nan) for name in ("pointing", "auc", "which", "own", "apart")]
        site = row["site"].removeprefix("language_model.model.")
        told = ["" if np.isnan(x) else f"{x:.3f}" for x in figures]
        shown.add_row(row["attribute"], row["map"], site, *told)
    return shown


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train", type=int, default=200, help="pictures to learn on")
    parser.add_argument("--test", type=int, default=150, help="pictures to test on")
    parser.add_argument("--method", action="append", help="dictionaries (default: snmf kmeans pca)")
    parser.add_argument("--concepts", type=int, default=64, help="concepts of the dictionary")
    parser.add_argument("--layer", type=int, action="append", help="layers (default: 0 to 6)")
    parser.add_argument(
        "--dictionaries-only", action="store_true", help="leave out words, gradients and attention"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/maps.json"))
    given = parser.parse_args()
    layers = given.layer or list(range(7))
    methods = given.method or ["snmf", "kmeans", "pca"]
    others = not given.dictionaries_only
    rows = run(given.train, given.test, methods, given.concepts, layers, others)
    console = Console(markup=False)
    console.print(table(rows))
    measure.save(given.output, rows, "torch", "transformers")
    console.print(f"saved to {given.output}")


if __name__ == "__main__":
    main()

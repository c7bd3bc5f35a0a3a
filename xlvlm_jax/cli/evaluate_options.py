"""Options that `xlvlm evaluate` and `xlvlm steer apply` share, and what they stand for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Data = Annotated[Path, typer.Argument(help="The directory of the data set.")]
Output = Annotated[Path, typer.Option(help="The directory to write, such as RUN/steering/NAME.")]
Dataset = Annotated[
    Literal["vqav2", "coco"], typer.Option(help="vqav2: questions; coco: captions.")
]
Split = Annotated[str | None, typer.Option(help="train, val or test.")]
Instruction = Annotated[
    str | None,
    typer.Option(help='Also with these words behind the prompt, such as "Answer no.".'),
]
Words = Annotated[
    str | None,
    typer.Option(
        help="Captions: colours, places, sentiments, scenes:colour (place, mood), or words with "
        "commas; left out, the vector's target words."
    ),
]
Source = Annotated[
    str | None, typer.Option(help="Answers steered from, with commas; left out, the vector's.")
]
Target = Annotated[
    str | None, typer.Option(help="Answers steered to, with commas; left out, the vector's.")
]
NumSamples = Annotated[int | None, typer.Option(help="At most so many samples.")]
NewTokens = Annotated[
    int | None, typer.Option(help="Tokens at most; left out, 10 of an answer, 32 of a caption.")
]
BatchSize = Annotated[int, typer.Option(help="Samples a batch.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")]
Edit = typer.Option(
    help="What is done with a vector: add, add_relative, ablate (alpha 2 mirrors the states) or "
    "replace."
)
Java = Annotated[bool, typer.Option(help="Captions: METEOR and SPICE too, where Java is.")]


def parse_task(
    dataset: str,
    vectors: Sequence[Any],
    source: str | None,
    target: str | None,
    words: str | None,
    java: bool,
) -> Any:
    """What is measured: words that are not given are those that the first vector was fitted on."""
    from xlvlm_jax import evaluation
    from xlvlm_jax.data.words import class_words

    fitted = vectors[0].source if vectors else {}
    if dataset == "coco":
        if source is not None or target is not None:
            raise ValueError("--source and --target are of questions; give captions --words")
        return evaluation.Captions(
            tuple(class_words(words) if words is not None else fitted.get("target") or ()), java
        )
    if words is not None:
        raise ValueError("--words are of captions; give questions --source and --target")
    sources, targets = (
        tuple(fitted.get(name) or ()) if text is None else tuple(text.split(","))
        for name, text in (("source", source), ("target", target))
    )
    if bool(sources) != bool(targets):
        missing = "source" if targets else "target"
        raise ValueError(f"--{missing} is missing: the {missing} answers, with commas")
    return evaluation.Questions(sources, targets)


def vectors_at(vectors: Sequence[Any], sites: Sequence[str], together: bool) -> list[Any]:
    """What is tried: each vector at each site, or all of them at once."""
    if not sites:
        placed = [tuple(vectors)] if together else [(vector,) for vector in vectors]
    elif together:
        placed = [tuple(dataclasses.replace(v, site=site) for v in vectors) for site in sites]
    else:
        placed = [(dataclasses.replace(v, site=site),) for v in vectors for site in sites]
    return placed


def read_samples(
    dataset: str, data: Path, split: str | None, num_samples: int | None, seed: int
) -> list[Any]:
    """The samples of a split, or so many of them."""
    from xlvlm_jax import data as datasets
    from xlvlm_jax.data import select

    return select.subsample(datasets.load(dataset, data, split), num_samples, seed)


def describe_run(
    data: Path,
    dataset: str,
    split: str | None,
    seed: int,
    files: Sequence[Path],
    vectors: Sequence[Any],
) -> dict[str, Any]:
    """Where samples and vectors come from, for the summary."""
    names = ("method", "features", "source rows", "target rows", "model", "fingerprint")
    return {
        "data": str(data),
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "vectors": [
            {"file": str(file), "site": vector.site, "where": vector.where}
            | {name: vector.source[name] for name in names if name in vector.source}
            for file, vector in zip(files, vectors, strict=True)
        ],
    }

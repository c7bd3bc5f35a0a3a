"""`xlvlm bench-concepts`: scores any dictionary on drawn pictures whose contents are known."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli import runtime
from xlvlm_jax.cli.console import Adapter, Dtype, Seed, bars, console, load_model, progress_bars

DEFAULT_SITE = "layers.5"
ENCODERS = ("snmf", "kmeans", "simple", "pca")  # methods that encode on components alone


def bench_concepts(
    dictionaries: Annotated[
        list[str] | None,
        typer.Argument(
            help="Methods to learn (snmf, kmeans, pca, simple, random or a sparse autoencoder) and "
            "dictionaries as [NAME=]PATH: concepts, SAELens and Gemma Scope directories, .npy and "
            ".safetensors files. NAME=PATH,PATH gives one per seed. Default: snmf kmeans pca "
            "topk-sae random."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Run directory; finished parts are kept.")] = Path(
        "run/bench-concepts"
    ),
    model: Annotated[str, typer.Option(help="Model whose states are decomposed.")] = "embedded",
    adapter: Adapter = None,
    site: Annotated[str, typer.Option(help="Site of the states.")] = DEFAULT_SITE,
    num_concepts: Annotated[int, typer.Option(help="Concepts of those learnt here, K.")] = 128,
    k: Annotated[int, typer.Option("--k", help="Active concepts per state, L0.")] = 8,
    encode_as: Annotated[
        str,
        typer.Option(help="How states are encoded on bare components: snmf, kmeans, simple, pca."),
    ] = "snmf",
    pictures: Annotated[
        int,
        typer.Option(
            help="Pictures to learn from; 40 % as many each are for fitting probes and for testing."
        ),
    ] = 500,
    dtype: Dtype = "float32",
    seeds: Annotated[
        int, typer.Option(help="Number of seeds; each draws and learns anew. Ranks want 3.")
    ] = 1,
    seed: Seed = 0,
) -> None:
    """Score and rank dictionaries on drawn pictures whose contents are known."""
    from ports.messages import counted
    from ports.models import clip
    from xlvlm_jax.concept_benchmark import stage
    from xlvlm_jax.concept_benchmark.dictionaries import parse_entry
    from xlvlm_jax.demo import embedded

    counts = {"seeds": seeds, "pictures": pictures, "num-concepts": num_concepts, "k": k}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    if encode_as not in ENCODERS:
        raise ValueError(f"--encode-as is {encode_as!r}; expected one of {', '.join(ENCODERS)}")
    tested = max(round(0.4 * pictures), 1)
    entries = [parse_entry(text) for text in dictionaries or stage.METHODS]
    vlm = load_model(model, dtype, adapter=adapter)
    runtime.resumes()
    with progress_bars() as progress:
        result = stage.run_benchmark(
            output,
            vlm,
            clip.load_dual_encoder(embedded.CLIP),
            entries,
            stage.Settings(
                site,
                num_concepts,
                k,
                encode_as,
                (pictures, tested, tested),
                min(stage.ASKED, tested),
            ),
            seeds=range(seed, seed + seeds),
            progress=bars(progress),
        )
    head, rows = stage.as_rows(result)
    # A terminal has room for a line per measure, not for a column.
    table = Table("", *(name for name, *_ in rows), box=None)
    for number, title in enumerate(head[1:], start=1):
        table.add_row(title, *(row[number] for row in rows))
    console.print(table)
    console.print(f"probes on the states themselves: {result.probe_accuracy:.2f}", highlight=False)
    done = counted(len(result.lines), "dictionary", "dictionaries"), counted(seeds, "seed")
    console.print(f"{', '.join(done)} -> {output / stage.FILE}")

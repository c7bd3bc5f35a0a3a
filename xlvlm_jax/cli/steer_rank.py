"""`xlvlm steer rank`: ranks steering vectors by how well they steer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    IgnoreGenerationConfig,
    Images,
    Overwrite,
    Strict,
    as_it_generates,
    bars,
    console,
    load_model,
    named_features,
    progress_bars,
    refuse_existing,
    require_counts,
)


def rank(
    vectors: Annotated[
        Path, typer.Argument(help="Directory of vectors, such as `steer fit --method fine` writes.")
    ],
    model: Annotated[str, typer.Option(help="Model that the vectors were fitted on.")],
    output: Annotated[Path, typer.Option(help="File to write the ranking to (.json).")],
    features: Annotated[
        Path | None,
        typer.Option(
            help="Features whose samples to steer. Default: those that the vectors were fitted on."
        ),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the vectors.")] = 1.0,
    by: Annotated[
        Literal["score", "lead"],
        typer.Option(
            help="score: share of samples moved to the answers gained most; lead: as XL-VLMs "
            "ranks, by the distance of the main answers' gains to others', of vectors with at most "
            "--num-targets main answers, the best one for each of them."
        ),
    ] = "score",
    num_targets: Annotated[
        int, typer.Option(help="Number of answers, those gained most, that count as targets.")
    ] = 1,
    num_samples: Annotated[
        int, typer.Option(help="Maximum number of samples to try each vector on.")
    ] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    ignore_generation_config: IgnoreGenerationConfig = False,
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
) -> None:
    """Rank steering vectors: the best move the most answers to the fewest targets."""
    from ports.messages import counted
    from xlvlm_jax import Features as StoredFeatures
    from xlvlm_jax import steering
    from xlvlm_jax.features import reader
    from xlvlm_jax.steering.rank import save_ranking
    from xlvlm_jax.steering.vectors import load_vectors

    require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, num_samples=num_samples)
    require_counts(num_targets=num_targets)
    refuse_existing(output, overwrite, directory=False)
    loaded = load_vectors(vectors)
    first, vector = next(iter(loaded.items()))
    source = named_features(features, vector.source, first)
    samples = reader.samples_of(StoredFeatures.open(source, images=images))
    vlm = as_it_generates(load_model(model, dtype, adapter=adapter), ignore_generation_config)
    with progress_bars() as progress:
        ranked = steering.rank_vectors(
            vlm,
            list(loaded.values()),
            samples,
            alpha=alpha,
            num_targets=num_targets,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            strict=strict,
            progress=bars(progress)("steering"),
        )
    if by == "lead":
        ranked = steering.top_by_lead(ranked, num_vectors=len(ranked), num_targets=num_targets)
    settings: dict[str, Any] = {"alpha": alpha, "num_targets": num_targets}
    if vlm.logits_options:
        settings["generation_config"] = vlm.logits_options
    save_ranking(output, ranked, loaded, **settings)
    _show(ranked, {id(each): file.stem for file, each in loaded.items()})
    console.print(f"{counted(len(ranked), 'vector')} ranked -> {output}")


def _show(ranked: Sequence[Any], names: Mapping[int, str]) -> None:
    table = Table("vector", "score", "strength", "targets", "gained", "lost", box=None)
    for heading in ("samples", "main answers", "lead"):
        table.add_column(heading)
    for each in ranked:
        shift = each.shift
        gained, lost = (
            ", ".join(f"{answer} {count}" for answer, count in list(words.items())[:3])
            for words in (shift.gained, shift.lost)
        )
        table.add_row(
            names[id(each.vector)],
            f"{shift.score:.2f}",
            f"{shift.strength:.2f}",
            f"{shift.targets:.1f}",
            gained,
            lost,
            str(shift.samples),
            ", ".join(shift.main),
            str(shift.lead),
        )
    console.print(table)

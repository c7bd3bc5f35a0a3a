"""`xlvlm fit-lens`: the average Jacobians of a Jacobian lens, from samples of a data set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    Model,
    Overwrite,
    Seed,
    Strict,
    bars,
    console,
    load_model,
    progress_bars,
    refuse_existing,
    require_counts,
    show_skipped,
)


def fit_lens(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Directory of the data set.")],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("lens.safetensors"),
    dataset: Annotated[
        str, typer.Option(help="coco, vqav2, pope, amber, mmsb, scenes, questions or folder.")
    ] = "coco",
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references/--prompts-only",
            help="Whether the first reference of each sample follows its prompt.",
        ),
    ] = True,
    layer: Annotated[
        list[int] | None,
        typer.Option(help="Number of a layer; may be repeated. Default: all but the last."),
    ] = None,
    skip: Annotated[
        int, typer.Option(help="Positions at the beginning of each text to leave out.")
    ] = 16,
    num_samples: Annotated[int, typer.Option(help="Maximum number of samples.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 4,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
    strict: Strict = False,
    seed: Seed = 0,
) -> None:
    """Fit a Jacobian lens, for `xlvlm lens --jacobian`."""
    from ports.messages import counted
    from xlvlm_jax import lenses
    from xlvlm_jax.cli.sample_options import few_samples, read_samples
    from xlvlm_jax.steering.teacher_forcing import batches

    refuse_existing(output, overwrite, directory=False)
    require_counts(num_samples=num_samples, batch_size=batch_size)
    samples = few_samples(read_samples(dataset, data, split), num_samples, seed)
    answers = _first_references(samples) if references else None
    vlm = load_model(model, dtype, adapter=adapter)
    errors: dict[str, str] = {}
    made = batches(vlm, samples, answers, batch_size, ended=False, strict=strict, errors=errors)
    with progress_bars() as progress:
        told = bars(progress)("fitting")
        lens = lenses.fit_jacobian_lens(
            vlm,
            ((batch.inputs[0], batch.num_rows) for _, batch in made),
            layers=layer or None,
            skip=skip,
            progress=lambda done: told(done, len(samples)),
        )
    show_skipped(errors)
    lens.save(output)
    done = counted(lens.num_prompts, "sample"), counted(len(lens.jacobians), "layer")
    console.print(f"{done[0]}, {done[1]} -> {output}")


def _first_references(samples: list[Any]) -> list[str]:
    """Returns a text per sample.

    Raises:
        ValueError: a sample has none.
    """
    without = [sample.id for sample in samples if not any(map(str.strip, sample.references))]
    if without:
        raise ValueError(
            f"sample {without[0]} has no reference to follow its prompt; fit on --prompts-only"
        )
    return [next(text for text in sample.references if text.strip()) for sample in samples]

"""`xlvlm extract`: runs a model on data and stores its hidden states as features."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    IgnoreGenerationConfig,
    Mesh,
    Model,
    Seed,
    Strict,
    as_it_generates,
    bars,
    console,
    errors,
    load_finetuned,
    load_model,
    parse_mesh,
    progress_bars,
    show_skipped,
)
from xlvlm_jax.cli.runtime import DryRun, Hosts, Profile, Programs, join_hosts, profiled, resumes


def extract(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Directory of the data set.")],
    output: Annotated[Path, typer.Option(help="Directory of features to write.")],
    site: Annotated[
        list[str],
        typer.Option(
            help="Site to capture: a module whose output states are stored (`xlvlm sites` lists "
            "them), or a pattern such as 'layers.*'; may be repeated."
        ),
    ],
    tokens: Annotated[
        str,
        typer.Option(
            help="Token positions to keep: all, index:-1, range:3:7, token-of-interest:dog (where "
            "that word occurs), class:colours (places, sentiments, or words separated by commas), "
            "before-special-tokens."
        ),
    ],
    dataset: Annotated[str, typer.Option(help="coco, vqav2 or folder.")] = "coco",
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Rows to store per sample: first, last or each of the kept positions, or their "
            "mean; for a word, the positions of its tokens."
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="How a word is found: word matches tokens that spell the whole word, as written "
            "or capitalised (not 'dogs' for 'dog'); first-token matches its first token alone, as "
            "XL-VLMs does."
        ),
    ] = None,
    include_prompt: Annotated[
        bool | None,
        typer.Option(
            "--include-prompt/--generated-only",
            help="Whether to keep positions of the prompt too, or of generated tokens only.",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="generate: states of the model's own text; teacher-forcing: states of the data "
            "set's text."
        ),
    ] = "generate",
    containing: Annotated[
        str | None,
        typer.Option(
            help="Only samples whose references contain this word, or a word of this class."
        ),
    ] = None,
    key: Annotated[
        str, typer.Option(help="Field of a sample that --containing searches.")
    ] = "references",
    any_case: Annotated[bool, typer.Option(help="Ignore case in --containing.")] = False,
    image_ids: Annotated[
        Path | None, typer.Option(help="Only images whose IDs this file lists.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Maximum number of samples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the model's parameters: float32, bfloat16 or float16.")
    ] = "float32",
    states_dtype: Annotated[
        str, typer.Option(help="Dtype of the stored states: float32, float16 or bfloat16.")
    ] = "float32",
    strict: Strict = False,
    adapter: Annotated[
        str | None,
        typer.Option(help="LoRA adapter (directory or Hub ID) to merge into the model."),
    ] = None,
    finetuned: Annotated[
        str | None,
        typer.Option(
            help="Also run this fine-tuned version (a LoRA adapter or a checkpoint; directory or "
            "Hub ID) on the same batches, for `xlvlm shift`. The states of both models are stored "
            "in one directory."
        ),
    ] = None,
    ignore_generation_config: IgnoreGenerationConfig = False,
    mesh: Mesh = None,
    hosts: Hosts = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that read images. Default: one per core, at most 16."),
    ] = None,
    dry_run: DryRun = False,
    ignore_disk: Annotated[
        bool, typer.Option("--ignore-disk", help="Start even if the disk may be too small.")
    ] = False,
    profile: Profile = None,
    seed: Seed = 0,
) -> None:
    """Run a model on data and store its hidden states as features.

    Run the same command again to resume an interrupted run.
    """
    resumes()
    join_hosts(hosts)
    from ports.messages import counted
    from xlvlm_jax import data as datasets
    from xlvlm_jax import features as module
    from xlvlm_jax.data import select
    from xlvlm_jax.features.selection import Selection

    generated_only = None if include_prompt is None else not include_prompt
    settings = module.ExtractionSettings(
        sites=tuple(site),
        selection=Selection.parse(tokens, generated_only=generated_only, how=rows, match=match),
        mode=mode,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=states_dtype,
    )
    samples = datasets.load(dataset, data, split)
    samples = _containing(samples, containing, key, any_case)
    if image_ids is not None:
        samples = select.of_images(samples, select.read_image_ids(image_ids))
    samples = select.subsample(samples, num_samples, seed)
    if mode == "teacher-forcing" and settings.selection.words:
        samples = select.leading(samples, settings.selection.words)
    placing: dict[str, Any] = {"mesh": parse_mesh(mesh)}
    generating = mode == "generate"
    if dry_run:
        vlm = load_model(model, dtype, abstract=True, **placing)
        vlm = as_it_generates(vlm, ignore_generation_config) if generating else vlm
        _show_needs(module.preflight(vlm, samples, output, settings), settings, output)
        return
    vlm = load_model(model, dtype, adapter=adapter, **placing)
    vlm = as_it_generates(vlm, ignore_generation_config) if generating else vlm
    other = None
    if finetuned is not None:
        other = load_finetuned(model, finetuned, dtype, **placing)
        other = as_it_generates(other, ignore_generation_config) if generating else other
    source = {"dataset": dataset, "split": split, "containing": containing, "seed": seed}
    with progress_bars() as progress, profiled(profile), Programs() as programs:
        advance = bars(progress)("extracting")
        summary = module.extract(
            vlm,
            samples,
            output,
            settings,
            finetuned=other,
            source=source,
            strict=strict,
            workers=workers,
            ignore_disk=ignore_disk,
            progress=advance,
        )
    show_skipped(summary.failed)
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in summary.seconds_of.items())
    console.print(f"waited for: {spent or 'nothing'}; {programs}", highlight=False)
    console.print(
        f"{counted(summary.samples, 'sample')}, {counted(summary.rows, 'row')}, "
        f"{summary.seconds:.1f} s, {counted(summary.without_token, 'sample')} without the token, "
        f"{len(summary.failed)} skipped "
        f"-> {output}"
    )


def _containing(samples: list[Any], words: str | None, key: str, any_case: bool) -> list[Any]:
    """Returns the samples that contain a word, or a word of a class; all samples for None."""
    from xlvlm_jax.data import select
    from xlvlm_jax.data.words import CLASSES, class_words

    if words is None:
        return samples
    found = class_words(words) if words in CLASSES else words
    return select.containing(samples, found, key=key, any_case=any_case)


def _show_needs(needs: Any, settings: Any, output: Path) -> None:
    """Prints what --dry-run says."""
    lengths = ", ".join(f"{length} ({count} batches)" for length, count in needs.programs)
    done = f", {needs.done} of them done" if needs.done else ""
    missing = f", {len(needs.missing)} images missing" if needs.missing else ""
    console.print(f"samples: {needs.samples}{done}{missing}")
    for path in needs.missing[:5]:
        errors.print(f"missing: {path}", style="yellow")
    console.print(
        f"rows: at most {needs.rows} for each of {len(settings.sites)} sites, "
        f"{needs.disk / 1e6:,.1f} MB in {output}; {needs.free / 1e9:,.1f} GB free"
    )
    console.print(
        f"memory per device: parameters {needs.parameters / 1e9:,.3f} GB, everything else "
        f"{needs.temporaries / 1e9:,.3f} GB, as compiled for a batch of {settings.batch_size}"
    )
    console.print(
        f"programs: {len(needs.programs)} among the batches checked, for prompt lengths {lengths}"
    )
    if not needs.fits:
        raise OSError(f"the disk of {output} is too small; free some space or give --ignore-disk")

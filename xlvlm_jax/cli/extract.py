"""`xlvlm extract`: runs a model on data and stores its hidden states as features."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
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
    parse_where,
    progress_bars,
    refuse_given,
    show_skipped,
)
from xlvlm_jax.cli.protocol import Protocol
from xlvlm_jax.cli.runtime import DryRun, Hosts, Profile, Programs, join_hosts, profiled, resumes
from xlvlm_jax.cli.sample_options import (
    Annotations,
    ContainingIn,
    ContainingMatch,
    DatasetSize,
    First,
    Prompt,
    QuestionsFile,
    SampleIds,
    few_samples,
    read_samples,
    selected,
)


def extract(
    context: typer.Context,
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
            "token-id:29871, before-special-tokens (the answer; before-special-tokens:. also ends "
            "it at a full stop), image (every image token, with its cell; image:16 draws 16 per "
            "sample)."
        ),
    ],
    dataset: Annotated[
        str, typer.Option(help="coco, vqav2, pope, amber, mmsb, scenes, questions or folder.")
    ] = "coco",
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
    search_from: Annotated[
        int | None,
        typer.Option(
            help="Position where the search for a word or token begins, counted from the start of "
            "the prompt, or from the end of the answer if negative."
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
            help="Only samples whose references contain this word, or a word of this class: "
            "colours, places, sentiments, positive_sentiments, negative_sentiments, "
            "xl-vlms:colors and so on, scenes:colour and so on."
        ),
    ] = None,
    key: Annotated[
        str, typer.Option(help="Field of a sample that --containing searches.")
    ] = "references",
    any_case: Annotated[bool, typer.Option(help="Ignore case in --containing.")] = False,
    containing_match: ContainingMatch = "inflected",
    containing_in: ContainingIn = "any",
    sample_ids: SampleIds = None,
    image_ids: Annotated[
        Path | None, typer.Option(help="Only images whose IDs this file lists.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Maximum number of samples.")] = None,
    first: First = False,
    dataset_size: DatasetSize = None,
    prompt: Prompt = None,
    annotations: Annotations = None,
    questions: QuestionsFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    dtype: Dtype = "float32",
    states_dtype: Annotated[
        str, typer.Option(help="Dtype of the stored states: float32, float16 or bfloat16.")
    ] = "float32",
    strict: Strict = False,
    adapter: Adapter = None,
    finetuned: Annotated[
        str | None,
        typer.Option(
            help="Also run this fine-tuned version (a LoRA adapter or a checkpoint; directory or "
            "Hub ID) on the same batches, for `xlvlm shift`. The states of both models are stored "
            "in one directory."
        ),
    ] = None,
    processor: Annotated[
        str | None,
        typer.Option(help="Checkpoint (directory or Hub ID) whose processor to use instead."),
    ] = None,
    vector: Annotated[
        list[Path] | None,
        typer.Option(help="Capture states while this vector steers; may be repeated."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of --vector.")] = 1.0,
    where: Annotated[
        str | None,
        typer.Option(help="Token positions to steer, as in `steer apply`."),
    ] = None,
    ignore_generation_config: IgnoreGenerationConfig = False,
    protocol: Protocol = None,
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
    _refuse_ignored(context)
    join_hosts(hosts)
    from xlvlm_jax import features as module
    from xlvlm_jax.data import select

    settings = module.ExtractionSettings(
        sites=tuple(site),
        selection=_selection(tokens, rows, match, include_prompt, search_from, protocol, seed),
        mode=mode,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=states_dtype,
    )
    told: Any = dict(prompt=prompt, annotations=annotations, questions=questions)
    samples = selected(
        read_samples(dataset, data, split, dataset_size=dataset_size, seed=seed, **told),
        containing,
        key=key,
        any_case=any_case,
        match=containing_match,
        which=containing_in,
        image_ids=image_ids,
    )
    samples = few_samples(samples, num_samples, None if first else seed, sample_ids)
    if mode == "teacher-forcing" and settings.selection.words:
        samples = select.leading(samples, settings.selection.words)
    placing: dict[str, Any] = {"mesh": parse_mesh(mesh), "processor": processor}
    steering = _steering(vector or [], alpha, where)
    if dry_run:
        vlm = load_model(model, dtype, abstract=True, adapter=adapter, **placing)
        (vlm,) = _as_run([vlm], mode, ignore_generation_config)
        needs = module.preflight(
            vlm, samples, output, settings, models=1 if finetuned is None else 2
        )
        _show_needs(needs, settings, output)
        return
    models = [load_model(model, dtype, adapter=adapter, **placing)]
    if finetuned is not None:
        models.append(load_finetuned(model, finetuned, dtype, **placing))
    vlm, *others = _as_run(models, mode, ignore_generation_config)
    with progress_bars() as progress, profiled(profile), Programs() as programs:
        summary = module.extract(
            vlm,
            samples,
            output,
            settings,
            finetuned=next(iter(others), None),
            source={"dataset": dataset, "split": split, "containing": containing, "seed": seed},
            **steering,
            strict=strict,
            workers=workers,
            ignore_disk=ignore_disk,
            progress=bars(progress)("extracting"),
        )
    _show(summary, programs, output)


def _refuse_ignored(context: typer.Context) -> None:
    """Raises ValueError if an option was given that only has an effect beside another."""
    given = context.params
    if not given["vector"]:
        refuse_given(context, ("alpha", "where"), "without --vector")
    if given["containing"] is None:
        searching = ("key", "any_case", "containing_match", "containing_in")
        refuse_given(context, searching, "without --containing")
    if given["num_samples"] is None:
        refuse_given(context, ("first",), "without --num-samples")


def _selection(
    tokens: str,
    rows: str | None,
    match: str | None,
    include_prompt: bool | None,
    search_from: int | None,
    protocol: str | None,
    seed: int,
) -> Any:
    """Returns the selection that --tokens and the options beside it name.

    The protocol's rule for words, and the seed, only apply to selections that have one.
    """
    from xlvlm_jax.features.selection import WORD_MODES, Selection

    mode, _, argument = tokens.partition(":")
    if protocol is not None and match is None and mode.strip() in WORD_MODES:
        match = "first-token"
    return Selection.parse(
        tokens,
        generated_only=None if include_prompt is None else not include_prompt,
        how=rows,
        match=match,
        start=search_from,
        seed=seed if mode.strip() == "image" and argument.strip() else None,
    )


def _as_run(models: list[Any], mode: str, ignore_generation_config: bool) -> list[Any]:
    """Returns the models as the mode runs them: only generation heeds generation_config.json."""
    if mode != "generate":
        return models
    return [as_it_generates(vlm, ignore_generation_config) for vlm in models]


def _show(summary: Any, programs: Programs, output: Path) -> None:
    """Prints what was skipped, what the run waited for, and what the directory holds."""
    from ports.messages import counted

    show_skipped(summary.failed)
    spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in summary.seconds_of.items())
    console.print(f"waited for: {spent or 'nothing'}; {programs}", highlight=False)
    console.print(
        f"{counted(summary.samples, 'sample')}, {counted(summary.rows, 'row')}, "
        f"{summary.seconds:.1f} s, {counted(summary.without_token, 'sample')} without the token, "
        f"{len(summary.failed)} skipped "
        f"-> {output}"
    )


def _steering(vectors: list[Path], alpha: float, where: str | None) -> dict[str, Any]:
    """Returns what `extract` needs to capture states while vectors steer; {} without vectors."""
    from xlvlm_jax import evaluation, steering

    if not vectors:
        return {}
    loaded = tuple(steering.load(path) for path in vectors)
    meant = None if where is None else parse_where(where)
    condition = evaluation.Condition(loaded, alpha, meant)
    # With digests: a vector that is fitted again has the same name.
    files = {
        "vectors": [str(path.resolve()) for path in vectors],
        "digests": [steering.files.digest(path) for path in vectors],
    }
    return {"edits": condition.edits, "steering": files | condition.describe()}


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

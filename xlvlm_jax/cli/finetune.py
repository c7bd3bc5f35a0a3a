"""`xlvlm finetune`: fine-tunes on captions or answers, as a LoRA adapter or a checkpoint."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from xlvlm_jax.cli.console import (
    Dtype,
    Model,
    Seed,
    Strict,
    console,
    load_model,
    progress_bars,
    refuse_given,
    require_counts,
    show_skipped,
)
from xlvlm_jax.cli.runtime import resumes
from xlvlm_jax.cli.sample_options import Annotations, Prompt, QuestionsFile, read_samples

Words = Annotated[
    str | None,
    typer.Option(
        help="Only references that contain one of these words or classes, separated by commas. "
        "Classes: colours, places, sentiments; for drawn scenes scenes:colour, scenes:place, "
        "scenes:mood."
    ),
]


def finetune(
    context: typer.Context,
    model: Model,
    data: Annotated[Path, typer.Argument(help="Directory of the data set.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    dataset: Annotated[
        str, typer.Option(help="coco, vqav2 or folder; several, separated by commas.")
    ] = "coco",
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    containing: Words = None,
    excluding: Annotated[
        str | None,
        typer.Option(help="No references that contain one of these; same form as --containing."),
    ] = None,
    any_case: Annotated[
        bool, typer.Option(help="Ignore case in --containing and --excluding.")
    ] = False,
    num_samples: Annotated[int | None, typer.Option(help="Maximum number of samples.")] = None,
    prompt: Prompt = None,
    annotations: Annotations = None,
    questions: QuestionsFile = None,
    method: Annotated[str, typer.Option(help="lora, or full to train all parameters.")] = "lora",
    rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA updates are scaled by alpha / rank.")] = 16.0,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear layers to adapt with LoRA: the end of a name (q_proj) or a regular "
            "expression; may be repeated. Default: all linear layers of the decoder.",
            rich_help_panel="Method",
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Number of passes over the samples.")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Number of updates; overrides --epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    accumulate: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    schedule: Annotated[
        str, typer.Option(help="Learning rate schedule: cosine, linear or constant.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps used for warm-up.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0,
    clip: Annotated[
        float, typer.Option(help="Maximum norm of the gradients.", rich_help_panel="Method")
    ] = 1.0,
    evaluation_split: Annotated[
        str | None, typer.Option(help="Also compute the loss on this split.")
    ] = None,
    evaluation_samples: Annotated[
        int, typer.Option(help="Maximum number of samples of --evaluation-split.")
    ] = 200,
    evaluate_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations. Default: only before and after training."),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Steps between saved training states, rounded up to tens.")
    ] = 100,
    dtype: Dtype = "float32",
    strict: Strict = False,
    recompute: Annotated[
        bool | None,
        typer.Option(
            help="Compute layers again for gradients instead of keeping their activations. "
            "Default: on accelerators.",
            rich_help_panel="Method",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Fine-tune a model, by default as a LoRA adapter in PEFT's format.

    Run the same command again to resume an interrupted run.
    """
    resumes()
    from xlvlm_jax import finetune as module
    from xlvlm_jax.data import select

    require_counts(save_every=save_every, evaluate_every=evaluate_every, num_samples=num_samples)
    _refuse_ignored(context)
    settings = module.FinetuneSettings(
        method=method,
        rank=rank,
        alpha=alpha,
        targets=tuple(target or ()),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        rate=rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        seed=seed,
        recompute=recompute,
    )
    told: Any = dict(prompt=prompt, annotations=annotations, questions=questions)

    def read(split: str | None, count: int | None) -> list[Any]:
        samples = [s for n in dataset.split(",") for s in read_samples(n, data, split, **told)]
        if containing is not None or excluding is not None:
            samples = select.naming(
                samples, _words(containing), without=_words(excluding), any_case=any_case
            )
        return select.subsample(samples, count, seed)

    samples = read(split, num_samples)
    evaluation = read(evaluation_split, evaluation_samples) if evaluation_split else []
    vlm = load_model(model, dtype)
    source = {
        "dataset": dataset,
        "split": split,
        "containing": containing,
        "excluding": excluding,
        "any case": any_case,
    }
    with progress_bars() as progress:
        summary = module.finetune(
            vlm,
            samples,
            output,
            settings,
            evaluation=evaluation,
            evaluate_every=evaluate_every,
            save_every=save_every,
            base_model=model,
            source=source,
            command=shlex.join(["xlvlm", *sys.argv[1:]]),
            strict=strict,
            progress=_bar(progress),
        )
    show_skipped(summary.skipped)
    _show(summary, len(samples), output)


def _refuse_ignored(context: typer.Context) -> None:
    """Raises ValueError if an option was given that only has an effect beside another."""
    if context.params["evaluation_split"] is None:
        evaluating = ("evaluate_every", "evaluation_samples")
        refuse_given(context, evaluating, "without --evaluation-split")
    if context.params["method"] == "full":
        refuse_given(context, ("rank", "alpha"), "with --method full")


def _show(summary: Any, count: int, output: Path) -> None:
    """Prints the last line."""
    from ports.messages import counted

    told = f"{counted(summary.steps, 'step')} on {counted(count, 'sample')}"
    evaluations = [f"{loss:.3f} at step {step}" for step, loss in summary.evaluations.items()]
    console.print(
        f"{told}, {summary.seconds:.1f} s, loss {summary.loss:.3f}"
        f"{''.join(f', evaluation {text}' for text in evaluations)} -> {output}"
    )


def _bar(progress: Progress) -> Callable[[int, int, dict[str, float]], None]:
    """Returns a callback that shows a bar of the steps, with the numbers of the last one."""
    task = progress.add_task("fine-tuning", total=None, note="")

    def show(done: int, total: int, figures: dict[str, float]) -> None:
        note = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        progress.update(task, completed=done, total=total, note=note)

    return show


def _words(text: str | None) -> tuple[str, ...] | None:
    """Splits words at commas and expands names of word classes; None stays None."""
    from xlvlm_jax.data.words import CLASSES, class_words

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError(f"{text!r} has no words; expected words or classes, separated by commas")

    def is_class(part: str) -> bool:
        return part in (*CLASSES, "colors") or part.startswith("scenes:")

    return tuple(
        word for part in parts for word in (class_words(part) if is_class(part) else (part,))
    )

"""`xlvlm judge`: a language model judges whether answers are safe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Dtype,
    Overwrite,
    bars,
    console,
    errors,
    progress_bars,
    refuse_existing,
    require_counts,
    spinner,
)


def judge(
    run: Annotated[
        Path,
        typer.Argument(help="Directory of `xlvlm evaluate` or `xlvlm steer apply` to judge."),
    ],
    model: Annotated[
        str,
        typer.Argument(
            help="The judge: a causal language model that answers safe or unsafe, such as "
            "meta-llama/Llama-Guard-3-8B (a checkpoint directory or a Hub ID)."
        ),
    ],
    chat: Annotated[
        Path | None,
        typer.Option(
            help='What the judge reads, a JSON file [{"role": "user", "content": "..."}, ...] with '
            "{answer} and {question} in place of each sample's. Default: the question from the "
            "user, the answer from the assistant."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of a verdict.")
    ] = 20,
    batch_size: Annotated[int, typer.Option(help="Answers per batch.")] = 8,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Judge whether answers are safe, by a language model such as Llama Guard."""
    import ports
    from xlvlm_jax import evaluation
    from xlvlm_jax.evaluation.judge import SUMMARY

    refuse_existing(run / SUMMARY, overwrite, directory=False)
    require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size)
    told = evaluation.CHAT if chat is None else evaluation.read_chat(chat)
    evaluation.chats_of(evaluation.read_run(run), told)  # checked before the judge is loaded
    with spinner(f"loading {model}"):
        judging = ports.load_text(model, dtype=dtype)
    with progress_bars() as progress:
        summary = evaluation.judge_run(
            judging,
            run,
            told,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=bars(progress)("judging"),
        )
    _show(summary, run)


def _show(summary: Mapping[str, Any], run: Path) -> None:
    """Prints a line per condition, and which answers the judge did not decide on."""
    from rich.table import Table

    from xlvlm_jax.evaluation.judge import VERDICTS

    measured = summary["conditions"]
    thresholds = "; ".join(next(iter(measured.values()))["harmfulness"])
    heads = ("safe", "unsafe", "unclear", f"harmfulness {thresholds}", "categories")
    table = Table("answers", *heads, box=None)
    for name, counts in measured.items():
        found = "; ".join(f"{value:.3f}" for value in counts["harmfulness"].values())
        categories = ", ".join(f"{x} {count}" for x, count in counts["categories"].items())
        said = (str(counts[verdict]) for verdict in ("safe", "unsafe", "unclear"))
        table.add_row(name, *said, found, categories)
    console.print(table)
    for name, counts in measured.items():
        if counts["unclear"]:
            errors.print(
                f"{name}: the judge said neither safe nor unsafe of {counts['unclear']} answers, "
                f"which count as unclear; {VERDICTS} has what it wrote",
                style="yellow",
            )
    console.print(f"{summary['samples']} samples judged -> {run}")

"""The command line: parses, calls, saves. Every command is one stage between directories."""

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="Concept-based explanation and steering of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)
_debug = False
# Typer exports the parameter error, whose base is that of all errors in a command's arguments.
_UsageError = typer.BadParameter.__base__

Model = Annotated[
    str,
    typer.Argument(help="A checkpoint directory, a hub id, or 'embedded' for the demo's model."),
]
Site = Annotated[str | None, typer.Option(help="Which site's states; may be left out if one.")]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Concept-based explanation and steering of vision-language models."""
    global _debug
    _debug = debug


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The run directory.")] = Path("xlvlm-demo"),
    word: Annotated[str, typer.Option(help="The token of interest.")] = "dog",
    num_concepts: Annotated[int, typer.Option(help="K.")] = 12,
    seed: Seed = 0,
) -> None:
    """The whole of it on the embedded model: draw, extract, factor, ground, score, report."""
    from xlvlm_jax import demo as module

    with _progress() as progress:
        result = module.run(
            output, word=word, num_concepts=num_concepts, seed=seed, stage=_bars(progress)
        )
    module.show(result, console)


@app.command()
def sites(
    model: Model,
    pattern: Annotated[str, typer.Option(help="Only names that hold this text.")] = "",
) -> None:
    """Lists the names of a checkpoint's sites, in network order."""
    for site in _load(model).sites:
        if pattern in site:
            print(site)


@app.command()
def scenes(
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    train: Annotated[int, typer.Option(help="Pictures of the training split.")] = 2000,
    val: Annotated[int, typer.Option(help="Pictures of the validation split.")] = 500,
    test: Annotated[int, typer.Option(help="Pictures of the test split.")] = 500,
    seed: Seed = 0,
) -> None:
    """Draws the embedded data set, in the file layouts of COCO and VQAv2."""
    from xlvlm_jax.data import scenes as module

    with _progress() as progress:
        advance = _bars(progress)("drawing")
        module.write(output, train=train, val=val, test=test, seed=seed, progress=advance)
    console.print(f"{train + val + test} pictures in {output}")


@app.command()
def extract(
    model: Model,
    data: Annotated[Path, typer.Argument(help="The directory of the data set.")],
    output: Annotated[Path, typer.Option(help="The directory of features to write.")],
    site: Annotated[list[str], typer.Option(help="A site to capture; may be repeated.")],
    tokens: Annotated[
        str,
        typer.Option(
            help="Which positions: all, index:-1, range:3:7, token-of-interest:dog, class:colours "
            "(places, sentiments, or words with commas), before-special-tokens."
        ),
    ],
    dataset: Annotated[str, typer.Option(help="coco, vqav2 or folder.")] = "coco",
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    rows: Annotated[str | None, typer.Option(help="first, mean or each kept position.")] = None,
    include_prompt: Annotated[
        bool | None,
        typer.Option("--include-prompt/--generated-only", help="Where positions are looked for."),
    ] = None,
    mode: Annotated[str, typer.Option(help="generate or teacher-forcing.")] = "generate",
    containing: Annotated[
        str | None,
        typer.Option(help="Only samples whose references hold this word, or a word of this class."),
    ] = None,
    key: Annotated[str, typer.Option(help="Where --containing looks.")] = "references",
    any_case: Annotated[bool, typer.Option(help="--containing in any capitalisation.")] = False,
    image_ids: Annotated[
        Path | None, typer.Option(help="Only images whose ids this file lists.")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="At most so many samples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")] = (
        "float32"
    ),
    states_dtype: Annotated[str, typer.Option(help="Of the states on disk.")] = "float32",
    strict: Annotated[bool, typer.Option(help="Stop at an unreadable image.")] = False,
    seed: Seed = 0,
) -> None:
    """Model x data -> features. The same command again goes on with an interrupted run."""
    from xlvlm_jax import data as datasets
    from xlvlm_jax import extract as module
    from xlvlm_jax.data import select
    from xlvlm_jax.selection import Selection
    from xlvlm_jax.words import CLASSES, class_words

    generated_only = None if include_prompt is None else not include_prompt
    settings = module.Settings(
        sites=tuple(site),
        selection=Selection.parse(tokens, generated_only=generated_only, how=rows),
        mode=mode,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        dtype=states_dtype,
    )
    samples = datasets.load(dataset, data, split)
    if containing is not None:
        words = class_words(containing) if containing in CLASSES else containing
        samples = select.containing(samples, words, key=key, any_case=any_case)
    if image_ids is not None:
        samples = select.of_images(samples, select.read_image_ids(image_ids))
    samples = select.subsample(samples, num_samples, seed)
    vlm = _load(model, dtype)
    source = {"dataset": dataset, "split": split, "containing": containing, "seed": seed}
    with _progress() as progress:
        advance = _bars(progress)("extracting")
        summary = module.extract(
            vlm, samples, output, settings, source=source, strict=strict, progress=advance
        )
    for name, reason in summary.failed:
        errors.print(f"skipped sample {name}: {reason}", style="yellow")
    console.print(
        f"{summary.samples} samples, {summary.rows} rows, {summary.seconds:.1f} s, "
        f"{summary.without_token} samples without the token, {len(summary.failed)} unreadable "
        f"images -> {output}"
    )


@app.command()
def decompose(
    features: Annotated[Path, typer.Argument(help="A directory of features.")],
    output: Annotated[Path, typer.Option(help="The directory of concepts to write.")],
    num_concepts: Annotated[int, typer.Option(help="K.")] = 20,
    method: Annotated[str, typer.Option(help="snmf (nndl), kmeans, pca or simple.")] = "snmf",
    site: Site = None,
    alpha: Annotated[float | None, typer.Option(help="snmf: weight of the codes' sum.")] = None,
    tol: Annotated[float | None, typer.Option(help="When to stop; see the method.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="At most so many iterations.")] = None,
    seed: Seed = 0,
) -> None:
    """features/ -> concepts/."""
    from xlvlm_jax import Features, stages

    given = {"alpha": alpha, "tol": tol, "max_iter": max_iter}
    given = {name: value for name, value in given.items() if value is not None}
    concepts = stages.decompose_features(
        Features.open(features), output, num_concepts, method, site=site, seed=seed, **given
    )
    ended = "converged" if concepts.converged else "not converged: raise --max-iter"
    console.print(
        f"{concepts.method}: {num_concepts} concepts of {concepts.source['rows']} rows, objective "
        f"{concepts.objective:.6g} after {concepts.iterations} iterations ({ended}), "
        f"{concepts.source['seconds']:.1f} s -> {output}"
    )


@app.command()
def ground(
    concepts: Annotated[Path, typer.Argument(help="A directory of concepts.")],
    model: Annotated[str, typer.Option(help="The model that the states came from.")],
    features: Annotated[
        Path | None, typer.Option(help="Where they were learnt from, if it was moved.")
    ] = None,
    num_words: Annotated[int, typer.Option(help="Words a concept.")] = 10,
    num_candidates: Annotated[int, typer.Option(help="Highest logits looked through.")] = 50,
    num_images: Annotated[int, typer.Option(help="Images a concept.")] = 5,
) -> None:
    """Concepts -> words and images, written into the same directory."""
    from xlvlm_jax import Concepts, Features, stages

    source = features or Path(Concepts.load(concepts).source.get("features", ""))
    grounded = stages.ground_concepts(
        concepts,
        _load(model),
        Features.open(source),
        num_words=num_words,
        num_candidates=num_candidates,
        num_images=num_images,
    )
    table = Table("concept", "words", box=None)
    for number, words in enumerate(grounded.words):
        table.add_row(str(number), ", ".join(words))
    console.print(table)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run directory: features/ and concepts*/ in it.")],
    output: Annotated[Path | None, typer.Option(help="Instead of RUN/report.html.")] = None,
) -> None:
    """A run directory -> one self-contained HTML page."""
    from xlvlm_jax.report import write_report

    console.print(f"{write_report(run, output)}")


@app.command()
def train_demo(
    work: Annotated[Path, typer.Option(help="Checkpoints and log; training goes on from it.")],
    output: Annotated[Path, typer.Option(help="Where the trained models are written.")],
    seed: Seed = 0,
    num_test: Annotated[int, typer.Option(help="Test pictures to evaluate on.")] = 500,
) -> None:
    """Makes the embedded model again, from nothing: some ninety minutes on two free cores."""
    from xlvlm_jax.embedded import evaluate, train

    with _progress() as progress:
        bars: dict[str, Callable[[int, int], None]] = {}
        stage = _bars(progress)

        def log(figures: dict[str, Any]) -> None:
            name = figures.pop("stage")
            bars.setdefault(name, stage(name))(figures.pop("step"), figures.pop("of"))
            shown = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
            progress.console.print(f"{name}  {shown}", style="dim")

        train.train(work, output / "clip", output / "llava", seed=seed, log=log)
        result = evaluate.evaluate(output / "llava", num_test, progress=stage("evaluating"))
    evaluate.show(result, console)
    (output / "llava" / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


def _load(model: str, dtype: str = "float32") -> Any:
    import ports
    from xlvlm_jax import embedded

    with console.status(f"loading {model}"):
        return ports.load(embedded.LLAVA if model == "embedded" else model, dtype=dtype)


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _bars(progress: Progress) -> Callable[[str], Callable[..., None]]:
    """A function that starts a bar: bars(name) -> advance(done, total, rows=None)."""

    def start(name: str) -> Callable[..., None]:
        task = progress.add_task(name, total=None, note="")

        def advance(done: int, total: int, rows: int | None = None) -> None:
            note = "" if rows is None else f"{rows} rows"
            progress.update(task, completed=done, total=total, note=note)

        return advance

    return start


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Ends the process with one line and a status: 2 for bad input, 1 for a failed run."""

    def fail(message: str, status: int) -> None:
        if _debug:
            traceback.print_exc()
        errors.print(f"error: {message}", style="red", markup=False)
        sys.exit(status)

    try:
        yield
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except _UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; what was committed stays, the same command goes on from there")
        sys.exit(130)
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        fail(" ".join(str(error).split()), 2)
    except OSError as error:
        fail(" ".join(str(error).split()), 2 if isinstance(error, FileExistsError) else 1)
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        fail(f"{type(error).__name__}: {text} (--debug before the command shows where)", 1)


def main() -> None:
    """The entry point of `xlvlm`."""
    with _one_line_errors():
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)

"""What all commands share: the console, progress bars, common arguments, how a model is loaded."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from rich.text import Text

from xlvlm_jax.solvers.phases import Standing, Tell

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)

Model = Annotated[
    str,
    typer.Argument(help="A checkpoint directory, a hub id, or 'embedded' for the demo's model."),
]
Site = Annotated[str | None, typer.Option(help="Which site's states; may be left out if one.")]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="DATAxMODEL, such as 2x4: batches over 2 and the model over 4 of this host's devices."
    ),
]
ThroughNorm = Annotated[
    bool | None,
    typer.Option(
        "--through-norm/--no-through-norm",
        help="Read words through the model's final norm, as the logit lens does, or by the head "
        "alone, as XL-VLMs does; left out, through it where the states come before it.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop at a sample that can't be read or processed; else it is skipped."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="The directory of the pictures now, if they were moved without the run."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier command wrote there.")
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]
IgnoreGenerationConfig = Annotated[
    bool,
    typer.Option(
        "--ignore-generation-config",
        help="Leave out what the checkpoint's generation_config.json does to logits, such as a "
        "repetition_penalty. Its end tokens stay.",
    ),
]


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Before the work begins: FileExistsError for a file, or a directory that is not empty."""
    if overwrite or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    raise FileExistsError(f"{output} exists; name another output, or replace it by --overwrite")


def show_skipped(skipped: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """A line for each sample that was passed over, with the reason."""
    for name, reason in dict(skipped).items():
        errors.print(f"skipped sample {name}: {reason}", style="yellow", markup=False)


def load_model(
    model: str,
    dtype: str = "float32",
    *,
    abstract: bool = False,
    adapter: str | Path | None = None,
    mesh: tuple[int, int] | None = None,
) -> Any:
    """A model, or its shapes alone; 'embedded' is the one that ships with the package.

    adapter: the directory or hub id of a LoRA adapter to merge in, or the name of one of the
    embedded model's ("color", "place", "mood").
    mesh: how many devices of this host share the batches, and how many the model.
    """
    import jax

    import ports
    from xlvlm_jax.demo import embedded

    with console.status(f"loading {model}"):
        # Of several hosts each has the whole model, on its own devices.
        placed = None if mesh is None else ports.make_mesh(*mesh, devices=jax.local_devices())
        if abstract:
            return ports.load_abstract(model, dtype=dtype, mesh=placed)
        if model == "embedded" and adapter is not None:
            adapter = embedded.ADAPTERS.get(str(adapter), adapter)
        return ports.load(model, dtype=dtype, adapter=adapter, mesh=placed)


def load_finetuned(model: str, finetuned: str, dtype: str, **placing: Any) -> Any:
    """A fine-tuned version of a model: the LoRA adapter of that name merged in, or a checkpoint."""
    from ports.checkpoint import hub, peft_io
    from xlvlm_jax.demo import embedded

    named = model == "embedded" and finetuned in embedded.ADAPTERS
    if named or (hub.find_directory(finetuned) / peft_io.CONFIG).exists():
        return load_model(model, dtype, adapter=finetuned, **placing)
    return load_model(finetuned, dtype, **placing)


def as_it_generates(vlm: Any, ignore: bool) -> Any:
    """A model that is about to generate, with the values of its generation_config.json or without.

    Those that apply are told. Raises ValueError for one that is not implemented.
    """
    if ignore:
        return vlm.with_generation_config({})
    name = "generation_config.json"
    applied = ", ".join(f"{key} {value!r:.40}" for key, value in vlm.logits_options.items())
    if applied:
        console.print(f"{name}: {applied}; --ignore-generation-config leaves out", highlight=False)
    if vlm.generation_config.get("do_sample"):
        console.print(f"{name}: do_sample is left out, answers are greedy", highlight=False)
    return vlm


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """--mesh as `load_model` takes it. ValueError for what names none."""
    import ports

    return None if text is None else ports.parse_mesh(text)


def parse_where(text: str) -> str | dict[str, int]:
    """--where as `ports.add` takes it. ValueError for what names no positions."""
    from ports import add

    where: str | dict[str, int] = text
    if text.startswith("from:"):
        try:
            where = {"from": int(text.removeprefix("from:"))}
        except ValueError:
            raise ValueError(f"--where is {text!r}; expected from:INDEX, such as from:5") from None
    add([0.0], where=where)
    return where


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """The column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def progress_bars() -> Progress:
    """Bars with rate, time left and a note, to be used as a context."""
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


def bars(progress: Progress) -> Callable[[str], Callable[..., None]]:
    """A function that starts a bar: bars(name) -> advance(done, total, rows=None)."""

    def start(name: str) -> Callable[..., None]:
        task = progress.add_task(name, total=None, note="")

        def advance(done: int, total: int, rows: int | None = None) -> None:
            note = "" if rows is None else f"{rows} rows"
            progress.update(task, completed=done, total=total, note=note)

        return advance

    return start


@contextlib.contextmanager
def solver_bar(name: str) -> Iterator[Tell | None]:
    """On a terminal, a bar of a solver's updates with the objective, as `decompose` tells them."""
    import jax

    # Several hosts must run the same programs, whatever each has for a console.
    if not console.is_terminal or jax.process_count() > 1:
        yield None
        return
    with progress_bars() as progress:
        task = progress.add_task(name, total=None, note="")

        def tell(at: Standing) -> None:
            note = f"objective {at.objective:.6g}"
            progress.update(task, completed=at.iteration, total=at.max_iter, note=note)

        yield tell
        done = int(progress.tasks[0].completed)
        progress.update(task, total=done, completed=done)

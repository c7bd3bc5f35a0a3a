"""What commands share: the console, progress bars, common options and loading a model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from rich.status import Status
from rich.text import Text

if TYPE_CHECKING:
    from xlvlm_jax.features.reader import Features
    from xlvlm_jax.solvers.phases import Standing, Tell


class TextConsole(Console):
    """Folds tables to the terminal's width, but no line of text.

    A path that is folded can neither be copied nor be read by another program.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints as a rich console does."""
        text = all(isinstance(each, str | Text) for each in objects)
        options.setdefault("soft_wrap", text)
        super().print(*objects, **options)


# Answers, words and file names are text: "[/INST] yes" and "[a dog]" are not markup.
console = TextConsole(markup=False, emoji=False)
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def spinner(text: str) -> Status:
    """Returns a spinner with a text, which is not read as markup; use as a context manager."""
    # `Console.status` reads markup even where the console does not.
    return console.status(Text(text))


Model = Annotated[
    str,
    typer.Argument(help="A checkpoint directory, a Hub ID, or 'embedded' for the bundled model."),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="LoRA adapter (directory or Hub ID) to merge into the model; for the embedded model "
        "also color, place, mood or companions."
    ),
]
Site = Annotated[
    str | None, typer.Option(help="Site whose states to use; optional if there is only one.")
]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the model's parameters: float32, bfloat16 or float16.")
]
DtypeOfFeatures = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Dtype of the model's parameters: float32, bfloat16 or float16. Default: what the "
        "features were extracted with.",
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="DATAxMODEL, such as 2x4: split each batch over 2 and the model over 4 of this host's "
        "devices, or of all hosts' if it has fewer."
    ),
]
ThroughNorm = Annotated[
    bool | None,
    typer.Option(
        "--through-norm/--no-through-norm",
        help="Decode words through the model's final norm and head (logit lens) or through the "
        "head alone (XL-VLMs). Default: through the norm for sites before it.",
    ),
]
WordRules = Annotated[
    Literal["default", "xl-vlms"],
    typer.Option(
        help="Which tokens count as words: English words with plurals and recent ones, without "
        "names and repeats (default), or as XL-VLMs filters."
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop at a sample that can't be read or processed, instead of skipping it."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Directory that holds the images now, if they were moved."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
IgnoreGenerationConfig = Annotated[
    bool,
    typer.Option(
        "--ignore-generation-config",
        help="Ignore settings in the checkpoint's generation_config.json that change logits, such "
        "as repetition_penalty. Its end tokens still apply.",
    ),
]


def refuse_existing(output: Path, overwrite: bool, *, directory: bool | None = None) -> None:
    """Checks, before the work begins, that the output may and can be written.

    Args:
        output: a file or directory.
        overwrite: whether an existing one may be replaced.
        directory: whether the command writes a directory; None if it may write either.

    Raises:
        FileExistsError: `output` is a file or a directory with more than what a killed run was
            writing (*.tmp), and `overwrite` is False; or a file where a directory is written, or
            the reverse.
        OSError: its directory can't be written.
    """
    from xlvlm_jax.storage import outputs

    if output.is_dir() and directory is False:
        raise FileExistsError(f"{output} is a directory; expected a file to write")
    if output.exists() and not output.is_dir() and directory:
        raise FileExistsError(f"{output} is a file; expected a directory to write")
    unfinished = output.is_dir() and all(path.suffix == ".tmp" for path in output.iterdir())
    if output.exists() and not overwrite and not unfinished:
        raise FileExistsError(
            f"{output} exists; name another output or replace it with --overwrite"
        )
    outputs.require_writable(output if output.is_dir() else output.parent)


def is_given(context: typer.Context, name: str) -> bool:
    """Returns whether an argument of the command was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_given(context: typer.Context, names: Iterable[str], where: str) -> None:
    """Refuses options that were given on the command line and have no effect.

    Args:
        context: of the command.
        names: its arguments that have none.
        where: when, such as "without --vector".

    Raises:
        ValueError: one was given.
    """
    for name in names:
        if is_given(context, name):
            # A flag like --first/--draw by both names, as either may have been typed.
            opposite = [
                option
                for parameter in context.command.params
                if parameter.name == name
                for option in parameter.secondary_opts
                if not option.startswith("--no-")
            ]
            told = "/".join((f"--{name.replace('_', '-')}", *opposite))
            raise ValueError(f"{told} has no effect {where}; omit it")


def require_counts(**counts: int | None) -> None:
    """Checks, before a model is loaded, numbers that must be at least 1.

    Args:
        **counts: value by the name of the option; None passes.

    Raises:
        ValueError: one is less.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def named_features(
    given: Path | None, source: Mapping[str, Any], made: Path, option: str = "--features"
) -> Path:
    """Returns the features that an option names, or else those that something was made from.

    Args:
        given: the value of the option.
        source: what concepts or a vector record of their origin.
        made: where these are, for the message.
        option: what to give instead.

    Raises:
        ValueError: neither names features.
    """
    named = given or source.get("features")
    if named is None:
        raise ValueError(f"{made} does not name its features; give {option}")
    return Path(named)


def dtype_of(given: str | None, *features: "Features | None") -> str:
    """Returns the dtype to load a model with.

    Args:
        given: the value of --dtype.
        *features: features of the model; the first that names a dtype counts.

    Returns:
        The dtype that is given, or else that of the model when the features were extracted;
        float32 if none is known.
    """
    named = (each.manifest.get("model dtype") for each in features if each is not None)
    return given or next(filter(None, named), "float32")


def show_skipped(skipped: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Prints a line per skipped sample, with the reason."""
    for name, reason in dict(skipped).items():
        errors.print(f"skipped sample {name}: {reason}", style="yellow")


def load_model(
    model: str,
    dtype: str = "float32",
    *,
    abstract: bool = False,
    adapter: str | Path | None = None,
    processor: str | None = None,
    mesh: tuple[int, int] | None = None,
) -> Any:
    """Loads a model and shows that it is loading.

    Args:
        model: a checkpoint directory, a Hub ID, or "embedded" for the bundled model.
        dtype: the dtype of the parameters.
        abstract: whether to load only the shapes of the parameters.
        adapter: the directory or Hub ID of a LoRA adapter to merge in, or the name of one of the
            embedded model's adapters ("color", "place", "mood", "companions").
        processor: a directory or Hub ID of a checkpoint whose processor to use.
        mesh: the number of devices to split each batch over, and the model over: this host's, or,
            if it has fewer, those of all hosts.

    Returns:
        The `ports.VLM`.
    """
    import jax

    import ports
    from ports.checkpoint import hub
    from xlvlm_jax.demo import embedded

    with spinner(f"loading {model}"):
        placed = None
        if mesh is not None:
            # Hosts that hold the whole model need not wait for each other.
            needed, here = mesh[0] * mesh[1], jax.local_devices()
            placed = ports.make_mesh(*mesh, devices=here if needed <= len(here) else jax.devices())
        if model == "embedded" and adapter is not None:
            adapter = embedded.find_adapter(adapter)
        if abstract:
            vlm = ports.load_abstract(model, dtype=dtype, mesh=placed)
            if processor is None:
                return vlm
            return vlm.with_processor(hub.find_directory(processor, weights=False))
        return ports.load(model, dtype=dtype, adapter=adapter, processor=processor, mesh=placed)


def load_finetuned(model: str, finetuned: str, dtype: str, **placing: Any) -> Any:
    """Loads a fine-tuned version of a model.

    Args:
        model: the original model, as in `load_model`.
        finetuned: a LoRA adapter of it (directory, Hub ID or name) or another checkpoint.
        dtype: the dtype of the parameters.
        **placing: further arguments of `load_model`.

    Returns:
        The `ports.VLM`, with the adapter merged in.
    """
    from ports.checkpoint import hub, peft_io
    from xlvlm_jax.demo import embedded

    named = model == "embedded" and finetuned in embedded.ADAPTERS
    if named or (hub.find_directory(finetuned) / peft_io.CONFIG).exists():
        return load_model(model, dtype, adapter=finetuned, **placing)
    return load_model(finetuned, dtype, **placing)


def as_it_generates(vlm: Any, ignore: bool) -> Any:
    """Returns the model with or without its generation_config.json, and prints what applies.

    Args:
        vlm: the model.
        ignore: whether to ignore settings that change logits.

    Returns:
        The `ports.VLM` to generate with.

    Raises:
        ValueError: a setting is not implemented.
    """
    if ignore:
        return vlm.with_generation_config({})
    name = "generation_config.json"
    applied = ", ".join(f"{key} {value!r:.40}" for key, value in vlm.logits_options.items())
    if applied:
        console.print(
            f"{name}: applying {applied}; --ignore-generation-config disables this", highlight=False
        )
    if vlm.generation_config.get("do_sample"):
        console.print(f"{name}: do_sample is ignored, decoding is greedy", highlight=False)
    return vlm


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """Parses --mesh into the form that `load_model` takes.

    Args:
        text: DATAxMODEL or None.

    Returns:
        (data, model) or None.

    Raises:
        ValueError: `text` has another form.
    """
    import ports

    return None if text is None else ports.parse_mesh(text)


def parse_where(text: str) -> str | dict[str, int]:
    """Parses --where into the form that `ports.add` takes.

    Args:
        text: the name of a set of positions, or from:INDEX.

    Returns:
        The name, or {"from": index}.

    Raises:
        ValueError: `text` does not name positions.
    """
    from ports import add

    where: str | dict[str, int] = text
    if text.startswith("from:"):
        try:
            where = {"from": int(text.removeprefix("from:"))}
        except ValueError:
            raise ValueError(
                f"--where is {text!r}; expected from:INDEX with a whole number, such as from:5"
            ) from None
    add([0.0], where=where)
    return where


class _Rate(ProgressColumn):
    """Shows steps per second."""

    def render(self, task: Task) -> Text:
        """Returns the column's text."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def progress_bars() -> Progress:
    """Returns progress bars with rate, remaining time and a note; use as a context manager."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


def bars(progress: Progress) -> Callable[[str], Callable[..., None]]:
    """Returns a function that starts a bar: start(name) -> advance(done, total, rows=None)."""

    def start(name: str) -> Callable[..., None]:
        task = progress.add_task(name, total=None, note="")

        def advance(done: int, total: int, rows: int | None = None) -> None:
            note = "" if rows is None else f"{rows} rows"
            progress.update(task, completed=done, total=total, note=note)

        return advance

    return start


@contextlib.contextmanager
def solver_bar(name: str) -> "Iterator[Tell | None]":
    """Shows a bar with a solver's iterations and objective on a terminal.

    Args:
        name: the bar's label.

    Yields:
        The callback to pass to `decompose` as `progress`; None off a terminal or on several hosts.
    """
    import jax

    # Several hosts must run the same programs, whether or not each has a terminal.
    if not console.is_terminal or jax.process_count() > 1:
        yield None
        return
    with progress_bars() as progress:
        task = progress.add_task(name, total=None, note="")

        def tell(at: "Standing") -> None:
            figures = {"objective": at.objective, **at.figures}
            note = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            progress.update(task, completed=at.iteration, total=at.max_iter, note=note)

        yield tell
        done = int(progress.tasks[0].completed)
        progress.update(task, total=done, completed=done)

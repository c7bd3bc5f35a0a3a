"""The command line: parses, calls, saves. Every command is a stage that reads and writes files.

Commands import what they run in their bodies, so that help and errors in arguments come at once.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import xlvlm_jax
from xlvlm_jax.cli import (
    bench_concepts,
    causal,
    convert,
    decompose,
    demo,
    evaluate,
    explain,
    extract,
    finetune,
    fit_lens,
    ground,
    inspect,
    judge,
    lens,
    map,
    play,
    pth,
    report,
    runtime,
    scenes,
    score,
    shift,
    sites,
    steer,
    train_demo,
)
from xlvlm_jax.cli.console import errors
from xlvlm_jax.cli.panels import into_panels

app = typer.Typer(
    help="Concept-based explanation and steering of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False
# Typer does not export the base class of all argument errors, only this subclass.
_UsageError: Any = typer.BadParameter.__base__


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"xlvlm {xlvlm_jax.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback if a command fails.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Concept-based explanation and steering of vision-language models."""
    global _debug
    _debug = debug


# `xlvlm --help` lists the commands in this order.
for command in (
    demo.demo,
    inspect.inspect,
    sites.sites,
    extract.extract,
    decompose.decompose,
    ground.ground,
    explain.explain,
    map.map_,
    score.score,
    causal.causal,
    bench_concepts.bench_concepts,
    lens.lens,
    fit_lens.fit_lens,
    report.report,
    play.play,
    evaluate.evaluate,
    judge.judge,
    shift.shift,
    pth.import_pth,
    pth.export_pth,
    finetune.finetune,
    convert.convert,
    scenes.scenes,
    train_demo.train_demo,
):
    # `map_` is not called like Python's own function.
    called = command.__name__.removesuffix("_").replace("_", "-")
    app.command(called, cls=runtime.Command)(into_panels(command))
app.add_typer(steer.steer, name="steer")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns an exception into one line and an exit status: 2 for bad input, 1 for a failed run."""

    def fail(message: str, status: int) -> None:
        if _debug:
            traceback.print_exc()
        errors.print(f"error: {message}", style="red")
        sys.exit(status)

    try:
        yield
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except _UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except runtime.Interrupted as end:
        errors.print(runtime.stopped())
        sys.exit(end.status)
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        fail(" ".join(str(error).split()), 2)
    except OSError as error:
        fail(" ".join(str(error).split()), 2 if isinstance(error, FileExistsError) else 1)
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        fail(f"{type(error).__name__}: {text} (for a traceback: xlvlm --debug COMMAND)", 1)


def main() -> None:
    """Runs `xlvlm`."""
    with runtime.ending_on_signals(), _one_line_errors():
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)

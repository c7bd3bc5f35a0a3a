"""`xlvlm play`: a local page on which a person steers a model and watches its answers change."""

import errno
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli import runtime
from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    IgnoreGenerationConfig,
    Model,
    as_it_generates,
    console,
    errors,
    load_model,
)

# Seconds that a compilation may take once the server has ended. With the second that open tabs get,
# this is less than what `runtime` gives a command until it ends the process without clearing up.
_PATIENCE = 3.0


def play(
    model: Model,
    run: Annotated[
        Path | None,
        typer.Option(help="Run directory whose concepts*/ and steering/*.safetensors to show."),
    ] = None,
    concepts: Annotated[
        list[Path] | None, typer.Option(help="Directory of concepts to show; may be repeated.")
    ] = None,
    vector: Annotated[
        list[Path] | None,
        typer.Option(help="File of `xlvlm steer fit` to show; may be repeated."),
    ] = None,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum number of tokens of an answer.", min=1)
    ] = 48,
    port: Annotated[
        int, typer.Option(help="Port on this machine; 0 for any free one.", min=0, max=65535)
    ] = 8733,
    browser: Annotated[
        bool, typer.Option("--browser", help="Open the page in this machine's browser.")
    ] = False,
    ignore_generation_config: IgnoreGenerationConfig = False,
) -> None:
    """Steer a model on a local page: turn a concept up and watch the answer change."""
    try:
        import uvicorn

        from xlvlm_jax.playground import server
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise ValueError(
            f"xlvlm play needs {error.name}, which is not installed; run "
            "`pip install 'xlvlm-jax[play]'`"
        ) from None
    from ports.messages import counted
    from xlvlm_jax.playground.answers import Answers
    from xlvlm_jax.playground.items import find_items
    from xlvlm_jax.playground.pictures import Pictures

    with _listening(server.HOST, port) as listener, Pictures() as pictures:
        vlm = as_it_generates(load_model(model, dtype, adapter=adapter), ignore_generation_config)

        def tell(message: str) -> None:
            errors.print(message, style="yellow")

        items = find_items(vlm, run, concepts or (), vector or (), tell)
        token = server.new_token()
        loaded = server.Model(model, None if vlm.adapter is None else str(vlm.adapter))
        answers = Answers(vlm, items, max_new_tokens)
        app = server.create_app(answers, loaded, pictures, token, prepares=True)
        try:
            address = f"http://{server.HOST}:{listener.getsockname()[1]}/{token}/"
            shown = counted(len(items), "concept or vector", "concepts and vectors")
            console.print(f"{shown}; Ctrl-C ends the server", highlight=False)
            console.print(address, highlight=False)
            if browser:
                typer.launch(address)
            # Tabs that are open keep their connections; they need not be waited for.
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            _end(app.state.worker, pictures, sys.exception())


def _end(worker: Any, pictures: Any, error: BaseException | None) -> None:
    """Ends the worker, or the process with the exit status of an error if it can't be ended."""
    try:
        ended = worker.end(_PATIENCE)
    except BaseException:  # another Ctrl-C
        ended = False
    if ended:
        return
    # A long compilation can't be ended, and Python must not end before it.
    try:
        pictures.close()
        if error is not None and not isinstance(error, runtime.Interrupted):
            traceback.print_exception(error)
    finally:
        os._exit(error.status if isinstance(error, runtime.Interrupted) else 1)


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; raises ValueError, before a model is loaded, if none can."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # A port whose last server has just ended is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "in use" if error.errno == errno.EADDRINUSE else "not allowed"
        raise ValueError(
            f"port {port} is {reason}; choose another with --port, or --port 0 for any free one"
        ) from None
    return listener

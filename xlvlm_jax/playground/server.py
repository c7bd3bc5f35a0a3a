"""The server of the playground: loopback only, and only for who has the token in its address."""

import asyncio
import io
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xlvlm_jax.data.images import read_image
from xlvlm_jax.playground.answers import Answers
from xlvlm_jax.playground.edits import settings_of, summed
from xlvlm_jax.playground.items import Item, read_vector
from xlvlm_jax.playground.pictures import LARGEST, Picture, Pictures
from xlvlm_jax.playground.python_code import as_python
from xlvlm_jax.playground.settings import WHERE, Settings, read_settings
from xlvlm_jax.playground.worker import Event, Job, Work, Worker
from xlvlm_jax.report.environment import part
from xlvlm_jax.report.heat_maps import gradient_css

HOST = "127.0.0.1"
_HERE = Path(__file__).parent
_SIDE = 128  # pixels of the longer side of a concept's pictures
_FILES = {
    "": ("page.html", "text/html"),
    "play.css": ("play.css", "text/css"),
    "play.js": ("play.js", "text/javascript"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}

Value = TypeVar("Value")


class Model(NamedTuple):
    """What the page says of the model, and a program needs to load it."""

    name: str  # as `ports.load` takes it
    adapter: str | None


def create_app(
    answers: Answers, model: Model, pictures: Pictures, token: str, *, prepares: bool = False
) -> Starlette:
    """Returns the ASGI application.

    Args:
        answers: the model and what steers it.
        model: how the model is loaded.
        pictures: where uploaded pictures are kept.
        token: the first part of every path; whoever does not send it gets the status 403.
        prepares: whether to compile programs while nobody asks, see `Answers.prepare`.

    Returns:
        The application. Its model runs on one thread, `app.state.worker`, to be ended before the
        process ends.
    """
    spare = (lambda: answers.prepare(pictures.blank())) if prepares else None
    worker = Worker(spare)
    handlers = _Handlers(answers, model, pictures, worker)
    routes = [
        *(Route(f"/{name}", handlers.file) for name in _FILES),
        Route("/report.css", handlers.report_css),
        Route("/state", handlers.state),
        Route("/prepared", handlers.prepared),
        Route("/concepts/{item:path}/pictures/{number:int}", handlers.concept_picture),
        Route(
            "/concepts/{item:path}/pictures/{number:int}",
            handlers.use_concept_picture,
            methods=["POST"],
        ),
        Route("/pictures", handlers.add_picture, methods=["POST"]),
        Route("/pictures/{key}", handlers.picture),
        Route("/pictures/{key}/upload", handlers.upload),
        Route("/vectors", handlers.add_vector, methods=["POST"]),
        Route("/answers", handlers.answer, methods=["POST"]),
        Route("/maps", handlers.map, methods=["POST"]),
        Route("/python", handlers.python, methods=["POST"]),
        Route("/vector", handlers.vector, methods=["POST"]),
    ]
    app = Starlette(
        routes=[Mount(f"/{token}", routes=routes)],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
            Middleware(_Guard, token=token),
        ],
        exception_handlers={HTTPException: _as_json},
    )
    app.state.worker = worker
    return app


def new_token() -> str:
    """Returns a token that nobody guesses."""
    return secrets.token_urlsafe(16)


async def _as_json(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class _Guard:
    """Answers 403 to whoever does not send the token, and adds the headers of every answer."""

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        first = scope["path"].strip("/").split("/")[0].encode()
        app = self._app
        if not secrets.compare_digest(first, self._token):
            told = "this address lacks the token; open the one that `xlvlm play` printed"
            app = JSONResponse({"error": told}, 403)
        await app(scope, receive, send_with_headers)


class _EventStream(StreamingResponse):
    """The events of a job, a JSON value per line; who leaves ends the job."""

    def __init__(self, job: Job, events: AsyncIterator[Event]):
        self._job = job
        super().__init__(_lines(events), media_type="application/x-ndjson")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _lines(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for event in events:
        yield json.dumps(event) + "\n"


class _Handlers:
    """What each path does; everything that touches the model is a job of the worker."""

    def __init__(self, answers: Answers, model: Model, pictures: Pictures, worker: Worker):
        self._answers, self._model, self._pictures = answers, model, pictures
        self._worker = worker

    async def file(self, request: Request) -> Response:
        name, kind = _FILES[request.url.path.rpartition("/")[2]]
        return Response((_HERE / name).read_bytes(), media_type=kind)

    async def report_css(self, _: Request) -> Response:
        scale = f".scale{{background:linear-gradient(90deg,{gradient_css()})}}"
        return Response(f"{part('page.css')}\n{scale}\n", media_type="text/css")

    async def state(self, _: Request) -> Response:
        vlm = self._answers.vlm
        return JSONResponse(
            {
                "model": self._model.name,
                "fingerprint": vlm.fingerprint,
                "sites": self._answers.sites,
                "where": WHERE,
                "largest": LARGEST,
                "prepared": not self._worker.has_spare_work,
                # The worker's thread may add one meanwhile.
                "items": [_described(item) for item in list(self._answers.items.values())],
            }
        )

    async def prepared(self, _: Request) -> Response:
        """Answers once the programs are compiled, or soon: no request outlives the server."""
        for _attempt in range(5):
            if not self._worker.has_spare_work:
                break
            await asyncio.sleep(0.1)
        return JSONResponse({"prepared": not self._worker.has_spare_work})

    async def concept_picture(self, request: Request) -> Response:
        content = await self._of_concept_picture(request, _thumbnail)
        return Response(content, media_type="image/jpeg")

    async def use_concept_picture(self, request: Request) -> Response:
        """Makes a picture that shows a concept one to ask about."""

        def add(path: str) -> Picture:
            return self._pictures.add(Path(path).read_bytes(), Path(path).name)

        picture = await self._of_concept_picture(request, add)
        return JSONResponse({"id": picture.id, "name": picture.name})

    async def _of_concept_picture(self, request: Request, read: Callable[[str], Value]) -> Value:
        pictures = self._item(request.path_params["item"]).pictures
        number = request.path_params["number"]
        if number >= len(pictures):
            raise HTTPException(404, f"there is no picture {number} of this concept")
        try:
            return await run_in_threadpool(read, pictures[number])
        except (OSError, ValueError) as error:
            raise HTTPException(404, str(error)) from None

    async def add_picture(self, request: Request) -> Response:
        name, content = _name(request, "picture"), await _body(request)
        try:
            picture = await run_in_threadpool(self._pictures.add, content, name)
        except ValueError as error:
            raise HTTPException(415, str(error)) from None
        return JSONResponse({"id": picture.id, "name": picture.name})

    async def picture(self, request: Request) -> Response:
        return FileResponse(self._picture(request.path_params["key"]).path, media_type="image/png")

    async def upload(self, request: Request) -> Response:
        """Returns the file as it was uploaded: as PNG it could be larger than the page takes."""
        path = self._picture(request.path_params["key"]).upload
        return FileResponse(path, media_type="application/octet-stream")

    async def add_vector(self, request: Request) -> Response:
        name, content = _name(request, "vector"), await _body(request)

        def add() -> Event:
            # Kept, so that the program that the page shows can read it.
            path = self._pictures.folder / "vectors" / str(len(self._answers.items)) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            try:
                return _described(self._answers.add_item(read_vector(self._answers.vlm, path)))
            except ValueError as error:
                path.unlink()
                raise ValueError(str(error).replace(str(path), name)) from None

        return JSONResponse(await self._done(add))

    async def answer(self, request: Request) -> Response:
        settings = await self._settings(request)
        picture = self._picture(settings.picture)
        return await self._streamed(lambda: self._answers.answer(settings, picture))

    async def map(self, request: Request) -> Response:
        data = await _json(request)
        item = self._item(str(data.get("item")) if isinstance(data, dict) else "")
        settings = _read(data)
        picture = self._picture(settings.picture)
        found = await self._done(lambda: self._answers.map_of(item, picture, settings.question))
        return JSONResponse(found)

    async def python(self, request: Request) -> Response:
        settings = await self._settings(request)
        picture = self._picture(settings.picture)

        def write() -> Event:
            found = settings_of(self._answers.vlm, self._answers.items, settings.sliders)
            asked = (picture.name, settings.question, found, self._answers.max_new_tokens)
            return {"code": as_python(*self._model, *asked, self._pictures.folder)}

        return JSONResponse(await self._done(write))

    async def vector(self, request: Request) -> Response:
        settings = await self._settings(request)

        def save() -> bytes:
            vlm, items = self._answers.vlm, self._answers.items
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "vector.safetensors"
                summed(vlm, settings_of(vlm, items, settings.sliders)).save(path)
                return path.read_bytes()

        return Response(await self._done(save), media_type="application/octet-stream")

    async def _settings(self, request: Request) -> Settings:
        return _read(await _json(request))

    def _item(self, key: str) -> Item:
        item = self._answers.items.get(key)
        if item is None:
            raise HTTPException(404, f"there is no concept or vector {key!r} here; reload the page")
        return item

    def _picture(self, key: str) -> Any:
        try:
            return self._pictures.get(key)
        except LookupError as error:
            raise HTTPException(404, error.args[0]) from None

    async def _streamed(self, work: Work) -> Response:
        job, events = self._submit(work)

        async def told() -> AsyncIterator[Event]:
            yield {"ahead": job.ahead}
            async for event in events:
                yield event

        return _EventStream(job, told())

    def _submit(self, work: Work) -> tuple[Job, AsyncIterator[Event]]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Event | None] = asyncio.Queue()

        def deliver(event: Event | None) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, event)

        job = self._worker.submit(work, deliver)

        async def events() -> AsyncIterator[Event]:
            while (event := await arrived.get()) is not None:
                yield event

        return job, events()

    async def _done(self, call: Callable[[], Value]) -> Value:
        """Returns what a call on the worker's thread returns; its errors become HTTP's."""

        def work() -> Iterator[Event]:
            try:
                yield {"value": call()}
            except LookupError as error:
                yield {"status": 404, "detail": str(error.args[0])}
            except (ValueError, OSError) as error:
                yield {"status": 422, "detail": " ".join(str(error).split())}

        job, events = self._submit(work)
        try:
            async for event in events:
                if "value" in event:
                    return event["value"]
                raise HTTPException(
                    event.get("status", 500), event.get("detail", event.get("error"))
                )
        finally:
            job.cancel()
        raise HTTPException(503, "the server is closing")


def _described(item: Item) -> dict[str, Any]:
    return {
        "id": item.id,
        "name": item.name,
        "group": item.group,
        "site": item.site,
        "where": item.where if isinstance(item.where, str) else None,
        "words": item.words,
        "pictures": len(item.pictures),
        "is_vector": item.is_vector,
    }


def _thumbnail(path: str) -> bytes:
    image = read_image(path)
    image.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def _name(request: Request, what: str) -> str:
    name = Path(request.query_params.get("name", "").replace("\\", "/")).name
    name = "".join(c for c in name if c.isprintable())[-200:]
    return what if name in ("", ".", "..") else name


async def _body(request: Request) -> bytes:
    """Returns a request's body; raises a status 413 as soon as it is too large."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST:
            raise HTTPException(
                413, f"the file is larger than {LARGEST // 2**20} MB; choose a smaller one"
            )
    return bytes(content)


async def _json(request: Request) -> Any:
    try:
        return json.loads(await _body(request))
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"expected JSON ({error})") from None


def _read(data: Any) -> Settings:
    try:
        return read_settings(data)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None

"""OpenAI's completions API over HTTP, on this machine only: one thread writes, for all requests together.

Limits keep it answering: the size of a body, how much may wait, how long a text may be. A client that goes away takes
its request with it. Only hosts that name this machine and bodies that say they are JSON are answered, so that a web
page somewhere cannot use the server through a browser here.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import jax
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from MaxText.inference import api, generate
from MaxText.inference.batcher import Batcher, Completion
from MaxText.inference.runs import LoadedModel

_LOG = logging.getLogger("MaxText")
HOST = "127.0.0.1"
MAX_BODY_BYTES = 1_000_000
SECONDS_TO_FINISH = 5  # for answers under way when the server is asked to end


class Writer:
    """The thread that advances a batcher whenever there is something to do."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher
        self.failure: Exception | None = None
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Call it after something was submitted or cancelled."""
        self._wake.set()

    def close(self) -> None:
        """Ends the thread after the steps under way."""
        self._ending = True
        self.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            with jax.set_mesh(self.batcher.program.mesh):
                while not self._ending:
                    if self.batcher.is_idle:
                        self._wake.wait()
                        self._wake.clear()
                    else:
                        self.batcher.advance()
        except Exception as error:  # told by /health and to everyone who waits
            _LOG.exception("the writing thread ended")
            self.failure = error
            self.batcher.fail()


class Server:
    """The application around one model."""

    def __init__(self, loaded: LoadedModel, batcher: Batcher, name: str):
        self.config, self.tokenizer, self.name = loaded.config, loaded.tokenizer, name
        self.step, self.batcher = loaded.step, batcher
        self.writer = Writer(batcher)
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
        ]
        handlers = dict.fromkeys((api.Refused, HTTPException, Exception), _refuse)
        self.app = Starlette(routes=routes, middleware=[Middleware(_OwnHostOnly)], exception_handlers=handlers)

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        if http.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise api.Refused("the content type must be application/json", None, 415)
        content = await self._body(http)
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise api.Refused(f"the body is not JSON: {error}", None) from error
        asked = api.parse(body, self.config, self.tokenizer, self.name)
        answers = api.Answers.to(asked, self.name, self.tokenizer)
        pieces = self._submit(asked)
        if asked.stream:
            return StreamingResponse(self._stream(answers, pieces), media_type="text/event-stream")
        return await self._whole(answers, pieces, http)

    async def models(self, _: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/NAME."""
        if http.path_params["name"] != self.name:
            raise api.Refused(f"the model {http.path_params['name']!r} is not here", "model", 404)
        return JSONResponse(self._model())

    async def health(self, _: HttpRequest) -> Response:
        """GET /health: 503 when nothing can be written any more."""
        failure = self.writer.failure
        state = {"status": "ok" if failure is None else f"failed: {failure}", "model": self.name, "step": self.step}
        return JSONResponse(state | {"waiting": self.batcher.num_waiting}, 200 if failure is None else 503)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "local", "step": self.step}

    async def _body(self, http: HttpRequest) -> bytes:
        body = bytearray()
        async for chunk in http.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise api.Refused(f"the body is longer than {MAX_BODY_BYTES:,} bytes", None, 413)
        return bytes(body)

    def _submit(self, asked: api.Asked) -> "asyncio.Queue[api.Piece]":
        """Puts all requests into the queue, or none; what they write arrives in the queue returned."""
        if self.writer.failure is not None:
            raise self._failed()
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[api.Piece] = asyncio.Queue()
        completions = [completion for request in asked.requests for completion in request.completions]
        if self.batcher.num_waiting + len(completions) > self.config.serve_max_queue:
            raise api.Refused(f"{self.batcher.num_waiting} completions are waiting already; try again later", None, 429)
        for index, completion in enumerate(completions):

            def tell(piece: str, completion: Completion, index: int = index) -> None:
                # What it is now: the writer may have gone on when this is told.
                news = api.Piece(index, completion, piece, len(completion.tokens), completion.finish_reason)
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(pieces.put_nowait, news)

            completion.on_text = tell
        try:
            for request in asked.requests:
                self.batcher.check(request)
        except ValueError as error:
            raise api.Refused(str(error), "max_tokens") from error
        for request in asked.requests:
            self.batcher.submit(request)
        self.writer.wake()
        return pieces

    def _failed(self) -> api.Refused:
        return api.Refused(f"nothing can be written any more: {self.writer.failure}", None, 503)

    def _cancel(self, asked: api.Asked) -> None:
        for request in asked.requests:
            self.batcher.cancel(request)
        self.writer.wake()

    async def _whole(self, answers: api.Answers, pieces: asyncio.Queue, http: HttpRequest) -> Response:
        """The answer when all is written; nothing if the client has gone before."""

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        async def all_written() -> None:
            left = sum(len(request.completions) for request in answers.asked.requests)
            while left:
                left -= bool((await pieces.get()).finish_reason)

        tasks = [asyncio.ensure_future(gone()), asyncio.ensure_future(all_written())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[1].done():
                return Response(status_code=499)
            if self.writer.failure is not None:
                raise self._failed()
            return JSONResponse(answers.whole())
        finally:
            for task in tasks:
                task.cancel()
            self._cancel(answers.asked)

    async def _stream(self, answers: api.Answers, pieces: asyncio.Queue) -> AsyncIterator[str]:
        left = sum(len(request.completions) for request in answers.asked.requests)
        told: dict[int, int] = {}
        try:
            while left:
                piece = await pieces.get()
                if piece.finish_reason == "cancelled":  # not by the client, which still listens: the writer failed
                    yield _event(self._failed().body())
                    return
                left -= bool(piece.finish_reason)
                yield _event(answers.part(piece, told.get(piece.index, 0)))
                told[piece.index] = piece.num_tokens
            if answers.asked.with_usage:
                yield _event(answers.only_usage())
            yield "data: [DONE]\n\n"
        finally:
            self._cancel(answers.asked)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


class _OwnHostOnly:
    """Answers only requests for this machine."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "").split(":")[0]
        if host in (HOST, "localhost"):
            await self._app(scope, receive, send)
        else:
            await _answer(api.Refused(f"requests must be for {HOST} or localhost", None))(scope, receive, send)


def _answer(error: api.Refused) -> Response:
    """In ASCII, as what it tells of the body may be no text."""
    return Response(json.dumps(error.body()), error.status, media_type="application/json")


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such path, or not by this method
        error = api.Refused(error.detail, None, error.status_code)
    return _answer(error if isinstance(error, api.Refused) else api.Refused("a defect of the server", None, 500))


def serve(loaded: LoadedModel, name: str, emit: Callable[[str], None]) -> None:
    """Serves until it is asked to end by SIGINT or SIGTERM.

    Raises:
        KeyboardInterrupt: it was.
        OSError: the port is taken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to which uvicorn, when it has ended, gives the signal
    batcher = generate.make_batcher(loaded, loaded.config.decode_rows)
    with socket.create_server((HOST, loaded.config.serve_port)) as listener:
        port = listener.getsockname()[1]
        emit(f"compiling for {batcher.num_rows} rows and lengths {', '.join(map(str, batcher.buckets))}")
        batcher.warm_up()
        server = Server(loaded, batcher, name)
        options = {"log_level": "warning", "timeout_graceful_shutdown": SECONDS_TO_FINISH, "lifespan": "off"}
        emit(f"{name} on http://{HOST}:{port}/v1/completions; Ctrl-C ends")
        try:
            uvicorn.Server(uvicorn.Config(server.app, **options)).run(sockets=[listener])
        finally:
            server.writer.close()

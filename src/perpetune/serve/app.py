"""The routes of a service."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from torch import Tensor

from perpetune._version import __version__
from perpetune.data.names import printable, several
from perpetune.data.pictures.read import TooLarge
from perpetune.errors import DataError, StateError, UsageError
from perpetune.runtime import Progress
from perpetune.serve import metrics as counted
from perpetune.serve.batches import Answered, Asked, Batcher
from perpetune.serve.limits import Door, Refused, refusal
from perpetune.serve.models import Models, Served, Watcher
from perpetune.serve.settings import Settings

LOG = logging.getLogger("perpetune.serve")
FIELDS = ("files", "file")
"""Names of the form's field that holds pictures."""
MOST_NAMES = 1000
MOST_FIELDS = 16  # other fields of the form, which are refused
Tell = Callable[..., None]
"""Is called with the name of an event and its facts: `taken`, `behind`."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Class(BaseModel):
    name: str
    probability: float


class Picture(BaseModel):
    image: str = Field(description="The name of the file, as the client gave it.")
    classes: list[Class] = Field(description="The likeliest first.")


class Predictions(BaseModel):
    state: int = Field(description="How many tasks the model has learned that answered all pictures of the request.")
    task: str | None = Field(description="The name of the last of these tasks.")
    predictions: list[Picture]


class Fault(BaseModel):
    detail: str = Field(description="One line that says what is wrong.")


class Health(BaseModel):
    status: str = Field(description="ok; empty: nothing is learned yet; stopped: no answers come any more.")
    name: str
    state: int
    task: str | None
    classes: int = Field(description="The number of classes that it can answer.")
    since: str = Field(description="Since when this state answers, in UTC.")
    behind: str | None = Field(description="Why the newest commit of the state does not answer, if it does not.")
    version: str


FORM: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["files"],
                "properties": {
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "One picture or several, each in a field of this name.",
                    }
                },
            }
        }
    },
}


class Service:
    """The parts of a service that live as long as it runs.

    Args:
        folder: the state folder.
        tell: gets the events.
        progress: gets the notes of loading.
    """

    def __init__(self, folder: Path, settings: Settings, tell: Tell, progress: Progress | None = None):
        self.settings, self.tell, self.metrics = settings, tell, counted.Metrics()
        self.models = Models(folder, settings.device, progress)
        most = settings.batch or self.models.current.trained.recipe.evaluate.batch_size
        self.batcher = Batcher(self.models, most, settings.wait, self.metrics.passed)
        self.watcher = Watcher(self.models, settings.poll, self._taken, self._failed)
        self.readers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "pictures")
        self.metrics.state.set(self.models.current.number)

    def start(self) -> None:
        self.batcher.start()
        self.watcher.start()

    def stop(self) -> None:
        """End the threads, once what was asked is answered."""
        self.watcher.stop()
        self.readers.shutdown()
        self.batcher.stop()

    def _taken(self, served: Served) -> None:
        self.metrics.state.set(served.number)
        self.metrics.taken.inc()
        self.tell("taken", state=served.number, task=served.task)

    def _failed(self, line: str) -> None:
        self.metrics.behind.set(bool(line))
        if line:
            self.tell("behind", message=line)

    async def pictures(self, files: Sequence[tuple[str, UploadFile]]) -> Tensor:
        """The pixels of the files, uint8 `(N, 3, S, S)`.

        Raises:
            Refused: a file is no picture, or has too many pixels; the line names each such file.
        """
        loop = asyncio.get_running_loop()
        reading = [loop.run_in_executor(self.readers, self._read, name, file) for name, file in files]
        found = await asyncio.gather(*reading)
        faults = [one for one in found if isinstance(one, DataError)]
        if faults:
            large = any(isinstance(one, TooLarge) for one in faults)
            raise Refused(413 if large else 422, several([str(one) for one in faults]))
        return torch.stack([one for one in found if isinstance(one, Tensor)])

    def _read(self, name: str, file: UploadFile) -> Tensor | DataError:
        try:
            return self.models.view.decode(file.file.read(), name, self.settings.max_pixels)
        except DataError as error:
            return error

    async def answer(self, asked: Asked, request: Request) -> Answered:
        """The answer of the batches; if the client goes away first, nothing is computed for it.

        Raises:
            Refused: there is no answer; the line says why.
        """
        answer = asyncio.wrap_future(self.batcher.put(asked))
        left = asyncio.ensure_future(request.receive())  # the body is read, so the next message is that it went away
        try:
            await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.metrics.gone.inc()
                raise Refused(499, "the client went away")
            return answer.result()
        except StateError:
            raise Refused(503, "nothing is learned yet: try again when a task is") from None
        except UsageError as error:
            raise Refused(400, str(error)) from None
        except (Refused, asyncio.CancelledError):
            raise
        except Exception:
            LOG.exception("perpetune serve: the model could not answer")
            raise Refused(500, "the model could not answer: the log of the service says why") from None
        finally:
            left.cancel()
            answer.cancel()

    def health(self) -> Health:
        served, watcher = self.models.current, self.watcher
        status = "ok" if served.number else "empty"
        return Health(
            status=status if self.batcher.alive and watcher.alive else "stopped",
            name=served.trained.recipe.name,
            state=served.number,
            task=served.task,
            classes=len(served.trained.method.classes),
            since=served.since.isoformat(timespec="seconds"),
            behind=watcher.behind or None,
            version=__version__,
        )


def application(
    folder: str | Path,
    settings: Settings | None = None,
    *,
    tell: Tell = lambda event, **facts: None,
    progress: Progress | None = None,
) -> FastAPI:
    """The service of a state, as an ASGI application. Its threads start and end with its lifespan.

    Args:
        folder: the state folder. Other processes may go on with it.
        settings: the bounds.
        tell: is called with `taken` (`state`, `task`) when a commit answers, and with `behind` (`message`) when the
            newest one cannot be read.
        progress: gets the notes of loading.

    Raises:
        UsageError: the state's model does not answer for pictures.
        StateError: the folder is no state, or it is damaged.
    """
    settings = settings or Settings()
    service = Service(Path(folder), settings, tell, progress)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(
        title=f"perpetune: {service.models.current.trained.recipe.name}",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Door, settings=settings, metrics=service.metrics)
    app.state.service = service
    page = (resources.files("perpetune.serve") / "page.html").read_text(encoding="utf-8")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return refusal(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.post(
        "/predict",
        response_model=Predictions,
        openapi_extra={"requestBody": FORM},
        responses={code: {"model": Fault} for code in (400, 413, 422, 503)},
        summary="Names and probabilities for pictures",
    )
    async def predict(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="Names for each picture.")] = 5,
        names: Annotated[
            str | None,
            Query(description="Classes to choose among, with commas between them; for heads that know names alone."),
        ] = None,
    ) -> Predictions:
        chosen = _chosen(names)
        async with request.form(max_files=settings.max_files, max_fields=MOST_FIELDS) as form:
            files = _files(form.multi_items())
            pixels = await service.pictures(files)
        found = await service.answer(Asked(pixels, top, chosen), request)
        return Predictions(
            state=found.served.number,
            task=found.served.task,
            predictions=[
                Picture(image=name, classes=[Class(name=n, probability=p) for n, p in classes])
                for (name, _), classes in zip(files, found.classes, strict=True)
            ],
        )

    @app.get("/health", response_model=Health, responses={503: {"model": Health}}, summary="Whether it answers")
    async def health() -> JSONResponse:
        told = service.health()
        return JSONResponse(told.model_dump(), 200 if told.status == "ok" else 503)

    @app.get("/metrics", response_class=Response, summary="Counters for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=counted.CONTENT_TYPE)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def front() -> HTMLResponse:
        safe = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(page, headers=safe)

    return app


def _chosen(names: str | None) -> tuple[str, ...] | None:
    """The names in a request, in their order."""
    if names is None:
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    if len(chosen) > MOST_NAMES:
        raise Refused(400, f"names: {len(chosen)} are given, and {MOST_NAMES} are the most")
    return chosen


def _files(fields: Sequence[tuple[str, UploadFile | str]]) -> list[tuple[str, UploadFile]]:
    """The pictures of a form, each with the name that stands for it.

    Raises:
        Refused: there is none, or a field is not one of pictures.
    """
    files: list[tuple[str, UploadFile]] = []
    for field, value in fields:
        if field not in FIELDS or isinstance(value, str):
            what = "holds no file" if field in FIELDS else "is none that is known"
            raise Refused(400, f"the field '{printable(field)}' {what}: send pictures as files in fields `files`")
        files.append((printable(value.filename or f"picture {len(files) + 1}")[:200], value))
    if not files:
        raise Refused(400, "there is no picture: send multipart/form-data with pictures in fields `files`")
    return files

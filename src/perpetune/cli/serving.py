"""The verb that answers over the network: serve."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from perpetune.cli.options import Device, JsonLines, StateFolder

EXTRA = {"fastapi", "starlette", "uvicorn", "prometheus_client", "anyio", "multipart", "python_multipart"}
"""Modules that the extra `serve` brings."""


def serve(
    state: StateFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen at. There is no authentication: whoever reaches it can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8080,
    device: Device = None,
    max_bytes: Annotated[int, typer.Option(metavar="N", min=1, help="Most bytes of the body of one request.")] = 32
    * 2**20,
    max_pixels: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most pixels of one picture, before it is made smaller.")
    ] = 50_000_000,
    max_files: Annotated[int, typer.Option(metavar="N", min=1, help="Most pictures of one request.")] = 64,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Pictures that are answered together; default evaluate.batch_size."),
    ] = None,
    queue: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most requests that wait at once; further ones get the code 503.")
    ] = 256,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="A request without an answer by then gets the code 503.")
    ] = 30.0,
    poll: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.05, help="Time between two looks for a new commit of the state.")
    ] = 1.0,
    json: JsonLines = False,
) -> None:
    """Answer for pictures over HTTP, while other processes go on with the state.

    A new commit is taken up without dropping a request. SIGTERM and Ctrl-C end it when every request is answered.

    Example: perpetune serve birds --port 8080, then curl -F files=@photo.jpg http://127.0.0.1:8080/predict
    """
    from perpetune.cli.lines import lines
    from perpetune.cli.notes import Notes
    from perpetune.errors import MissingExtra

    try:
        from perpetune.serve.server import serve as answer
        from perpetune.serve.settings import Settings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise MissingExtra("perpetune serve", "serve") from None
    out = lines(json)

    def tell(event: str, **facts: Any) -> None:
        if out is not None:
            out.emit("done" if event == "stopped" else event, **facts)
        elif event == "serving":
            print(f"serving {state} ({_about(**facts)}) at {facts['url']}", flush=True)
        else:
            said = {"taken": "answers with {about} now", "behind": "goes on as it is: {message}", "stopped": "stopped"}
            about = _about(**facts) if event == "taken" else ""
            print(f"perpetune: {state} {said[event].format(about=about, **facts)}", file=sys.stderr)

    settings = Settings(
        device=device,
        max_bytes=max_bytes,
        max_pixels=max_pixels,
        max_files=max_files,
        batch=batch,
        held=queue,
        timeout=timeout,
        poll=poll,
    )
    answer(state, settings, host=host, port=port, tell=tell, progress=Notes())


def _about(state: int, task: str | None, **more: Any) -> str:
    if task is None:
        return "nothing learned yet"
    return f"{state} task{'s' if state != 1 else ''}, the last one {task}"


VERBS = (serve,)

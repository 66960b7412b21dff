"""`chunkq view`."""

from __future__ import annotations

import json
import os
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from chunkq.access import DEFAULT_ACCESS
from chunkq.errors import ChunkqError, ErrorCode, StoreError
from chunkq.paths import is_url, without_secret
from chunkq.system.standard_output import print_line, print_text
from chunkq_producer.commands.options import job_at, json_option, output_argument

if TYPE_CHECKING:
    from chunkq_producer.view.served import Served

PAGE = "neuroglancer"
"""Name below which a local page is served."""


@click.command()
@output_argument
@click.option("--port", type=click.IntRange(1, 65535), help="Port (default: a free one).")
@click.option("--no-open", is_flag=True, help="Print the link, do not open a browser.")
@click.option(
    "--page",
    help="Page of Neuroglancer: a URL, or the folder of a built page (default: the public page).",
)
@click.option("--napari", is_flag=True, help="Start napari instead, if it is installed.")
@json_option
def view(
    output: str, port: int | None, no_open: bool, page: str | None, napari: bool, as_json: bool
) -> None:
    """Show OUTPUT, such as labels.zarr, and its input in Neuroglancer.

    The data are served to this machine only, below a random path, until Ctrl-C.
    """
    job = job_at(output)
    if job.record.job.is_image:
        path = without_secret(job.folder.output)
        raise StoreError(
            f"output: {path} is a table; open it with a program for tables, such as pandas",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    if job.record.file_name is not None:
        path = without_secret(job.folder.output)
        raise StoreError(
            f"output: {path} is not a Zarr output; open it in a program for its format, or convert "
            "it with chunkq convert",
            code=ErrorCode.STORE_UNSUPPORTED,
        )
    if napari:
        from chunkq_producer.view.napari_viewer import show

        show(job)
        return
    from chunkq_producer.view.layers import PUBLIC_PAGE, dimensions_of, layers_of, link
    from chunkq_producer.view.served import ServedFolder
    from chunkq_producer.view.server import HOST, application, listen, new_token, serve

    folder = None if page is None else _page_folder(page)
    layers = layers_of(job)
    served: dict[str, Served] = {str(n): layer.served for n, layer in enumerate(layers)}
    if folder is not None:
        served[PAGE] = ServedFolder(str(folder), DEFAULT_ACCESS)
    token = new_token()
    app = application(token, served)
    try:
        listening = listen(port or 0)
    except OSError as error:
        raise ChunkqError(f"--port: {port} cannot be used: {error.strerror}; use another") from None
    base = f"http://{HOST}:{listening.getsockname()[1]}/{token}"
    states = [layer.as_state(f"{base}/{number}/") for number, layer in enumerate(layers)]
    where = f"{base}/{PAGE}/index.html" if folder is not None else page or PUBLIC_PAGE
    url = link(where, states, dimensions_of(job))
    if as_json:
        print_line(json.dumps({"url": url, "page": where, "layers": states}))
    else:
        for layer in layers:
            print_text(f"{layer.type}: {layer.name}")
        print_line(url)
        print_text("Ctrl-C ends the server")
    if not no_open:
        webbrowser.open(url)
    serve(app, listening)


def _page_folder(page: str) -> Path | None:
    """Return the folder of a page, or None for a URL. Raises ChunkqError."""
    if is_url(page):
        return None
    folder = Path(os.path.expanduser(page)).absolute()
    if not (folder / "index.html").is_file():
        raise ChunkqError(f"--page: {folder} has no index.html; use the folder of a built page")
    return folder

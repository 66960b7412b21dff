"""A page of the Dask dashboard that shows the chunks of the queue, which are no tasks of Dask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from html import escape
from typing import Any

import dask
from tornado.web import RequestHandler

from chunkq.queue.backends.hosted.queue_host import QueueHost

PAGE, JSON_PAGE = "/chunkq", "/json/chunkq.json"
REFRESH_SECONDS = 2
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta http-equiv="refresh" content="{seconds}"><title>chunkq</title>
<style>
body {{ font-family: sans-serif; margin: 1em 2em; }}
table {{ border-collapse: collapse; margin-bottom: 2em; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3em 1em; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
progress {{ width: 12em; }}
</style>
</head>
<body>
<h1>chunkq</h1>
<p>Chunks on the queue of this scheduler. <a href="status">Dask dashboard</a></p>
{jobs}
<h2>Running chunks</h2>
{running}
</body>
</html>
"""
JOB_COLUMNS = ("output", "progress", "done", "running", "queued", "waiting", "failed")
RUNNING_COLUMNS = ("chunk", "worker", "for")


def add_pages(scheduler: Any, host: QueueHost) -> None:
    """Add the pages to the web server of a scheduler, unless its site has no pages."""
    if dask.config.get("distributed.scheduler.http.routes"):
        pages = [(PAGE, _Page, {"host": host}), (JSON_PAGE, _JsonPage, {"host": host})]
        scheduler.http_application.add_handlers(".*$", pages)
        _add_link(scheduler.http_application.applications)


def _add_link(sites: Iterable[Any]) -> None:
    """Add the page to the navigation of Dask's pages with plots, if bokeh is installed.

    All these pages share one list of names, which Dask passes to the function of each page.
    """
    # Names of bokeh and Dask without a promise: without them there is no link.
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        for context in [each for site in sites for each in site._applications.values()]:
            for handler in context.application.handlers:
                _, variables = handler._func.args
                if (name := PAGE[1:]) not in variables["pages"]:
                    variables["pages"].append(name)


class _JsonPage(RequestHandler):
    """The state of the queue as JSON."""

    def initialize(self, host: QueueHost) -> None:
        self.host = host

    def get(self) -> None:
        running = [
            {"chunk": chunk, "worker": worker, "seconds": seconds}
            for chunk, worker, seconds in self.host.running()
        ]
        self.write({"jobs": [asdict(job) for job in self.host.progress()], "running": running})


class _Page(_JsonPage):
    """The state of the queue as tables."""

    def get(self) -> None:
        jobs = []
        for job in self.host.progress():
            total = job.done + job.running + job.queued + job.waiting + job.failed
            bar = f'<progress value="{job.done}" max="{total}"></progress>'
            counts = (job.done, job.running, job.queued, job.waiting, job.failed)
            jobs.append([escape(job.output), bar, *map(str, counts)])
        running = [
            [escape(chunk), escape(worker), f"{seconds:.0f} s"]
            for chunk, worker, seconds in self.host.running()
        ]
        tables = {
            "jobs": _table(JOB_COLUMNS, jobs, "No job is on the queue."),
            "running": _table(RUNNING_COLUMNS, running, "No chunk is running."),
        }
        self.write(HTML.format(seconds=REFRESH_SECONDS, **tables))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> str:
    """Return a table, or a sentence if it has no rows. Cells are HTML."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    if not body:
        return f"<p>{empty}</p>"
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table>\n<tr>{head}</tr>\n{body}</table>"

"""Show a run on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from chunkq.job.events import Event
from chunkq.progress_bar import ProgressDisplay, is_live

if TYPE_CHECKING:
    from rich.live import Live

    from chunkq_producer.job_status import StatusPoller

STAGE = "computing chunks"


class RunDisplay(ProgressDisplay):
    """Show the status of the job while its workers run: live on a terminal, otherwise as lines."""

    def __init__(self) -> None:
        super().__init__()
        self._live: Live | None = None

    @override
    def __call__(self, event: Event) -> None:
        from chunkq_producer.job_status import WorkersRunning  # after the workers have started

        match event:
            case WorkersRunning(poller):
                self._show(poller)
            case _:
                super().__call__(event)

    def _show(self, poller: StatusPoller) -> None:
        from rich.live import Live

        from chunkq_producer.job_status import status_line, status_screen

        begins, console = self.begin(STAGE), self.console
        if not is_live(console):
            if self.is_line_due():
                self.print(status_line(poller(), with_next_step=False))
            return
        if begins or self._live is None:
            live = Live(console=console, auto_refresh=False, transient=True)
            self._live = self.show(live)
        screen = status_screen(poller(), console.width, with_next_step=False)
        self._live.update(screen, refresh=True)

"""`PixelBudget`: how many pixels of decoded images this process holds at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from chunkq.images.decoding import Reserve


class PixelBudget:
    """Limits the pixels that threads hold. Thread-safe.

    Images wait in the order in which they come. One that is larger than the limit is held alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._waiting: deque[object] = deque()
        self._changed = Condition()

    @property
    def waiting(self) -> int:
        """Number of images that wait."""
        return len(self._waiting)

    @contextmanager
    def image(self) -> Iterator[Reserve]:
        """Yield a function that waits until pixels of one image may be held, once.

        They are held until the end of the `with` block.
        """
        held = 0

        def reserve(pixels: int) -> None:
            nonlocal held
            self._take(pixels)
            held = pixels

        try:
            yield reserve
        finally:
            with self._changed:
                self._held -= held
                self._changed.notify_all()

    def _take(self, pixels: int) -> None:
        place = object()

        def is_next() -> bool:
            fits = not self._held or self._held + pixels <= self._limit
            return fits and self._waiting[0] is place

        with self._changed:
            self._waiting.append(place)
            self._changed.wait_for(is_next)
            self._waiting.popleft()
            self._held += pixels
            self._changed.notify_all()


BUDGET = PixelBudget(1 << 27)
"""The pixels of all chunks of this process, 3 bytes each in RGB, and 12 as float32."""

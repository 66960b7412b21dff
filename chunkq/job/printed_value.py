"""Values of a job file as texts for messages: short, and without passwords."""

from __future__ import annotations

from reprlib import Repr

from chunkq.paths import without_secret


def printed_value(value: object) -> str:
    """Return a value for a message: shortened, with the password of a URL masked."""
    if isinstance(value, tuple):
        value = list(value)
    return VALUES.repr(without_secret(value) if isinstance(value, str) else value)


class _ShortRepr(Repr):
    """Representation of a value with at most 8 entries per list and 3 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 8
        self.maxlevel, self.maxstring, self.maxlong = 3, 120, 60

    def repr_int(self, x: int, level: int) -> str:
        """Format an integer. Python cannot format one of more than 4300 digits."""
        return super().repr_int(x, level) if abs(x) < 10**1000 else "a number of over 1000 digits"


VALUES = _ShortRepr()

"""Neural-network inference on volumes that are larger than one machine's memory."""

import sys
from types import ModuleType
from typing import Any

from chunkq.lazy_imports import API
from chunkq.lazy_imports import load as _load

__version__ = "0.1.0"
__all__ = list(API)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in API:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = self.__dict__[name] = _load(API[name])
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module chunkq.finalize must not replace the function chunkq.finalize.
        if name not in API or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*API, *(name for name in super().__dir__() if name.startswith("__"))})


sys.modules[__name__].__class__ = _Package

"""Neural-network inference on volumes that are larger than one machine's memory."""

import sys
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

__version__ = "0.1.0"

API: MappingProxyType[str, str] = MappingProxyType(
    {
        "Predictor": "chunkq_worker.predictor:Predictor",
        "Prediction": "chunkq.prediction:Prediction",
        "run": "chunkq_producer.api:run",
        "produce": "chunkq_producer.api:produce",
        "status": "chunkq_producer.api:status",
        "finalize": "chunkq_producer.api:finalize",
        "ChunkqError": "chunkq.errors:ChunkqError",
        "JobError": "chunkq.errors:JobError",
        "ModelError": "chunkq.errors:ModelError",
        "IncompleteError": "chunkq.errors:IncompleteError",
    }
)
"""Public name -> `module:attribute`, imported on first use. `__init__.pyi` has the types."""


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in API:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, _, attribute = API[name].partition(":")
        value = self.__dict__[name] = getattr(import_module(module), attribute)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module chunkq.finalize must not replace the function chunkq.finalize.
        if name not in API or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *API})


sys.modules[__name__].__class__ = _Package

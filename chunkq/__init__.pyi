# Types of the public API. Keep in step with `API` in __init__.py.
from collections.abc import Mapping

from chunkq_producer.api import finalize as finalize
from chunkq_producer.api import plan as plan
from chunkq_producer.api import produce as produce
from chunkq_producer.api import report as report
from chunkq_producer.api import run as run
from chunkq_producer.api import status as status
from chunkq_producer.api import verify as verify
from chunkq_worker.predictor import Predictor as Predictor

from chunkq.blend.prediction import Prediction as Prediction
from chunkq.errors import ChunkqError as ChunkqError
from chunkq.errors import IncompleteError as IncompleteError
from chunkq.errors import JobError as JobError
from chunkq.errors import ModelError as ModelError
from chunkq.errors import PredictionWarning as PredictionWarning

__version__: str
API: Mapping[str, str]

"""Stands in a job for a network or steps that are objects of one Python process.

Jobs name this file where only the process of a `Predictor` has the code. Loading it fails.
"""

from chunkq.errors import ModelError

raise ModelError(
    "the network or a step of this job is an object of a Python process, which no other process "
    "has; repeat the call of Predictor.predict_to_store there, or save the network to a file"
)

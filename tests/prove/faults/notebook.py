"""Faults in inference from Python: objects of the caller, their state, and their regions."""

from tests.prove.fault import Fault, named

NETWORKS, INPUTS = (
    "tests/integration/test_notebook_networks.py",
    "tests/integration/test_notebook_inputs.py",
)

FAULTS = (
    Fault(
        "a-module-stays-in-evaluation-mode",
        "worker/chunkq_worker/runtimes/torch_objects.py",
        "        module.train(was_training)  # a module can do more here than set the flags\n",
        "        return\n",
        "the caller trains a network whose dropout is off",
        (NETWORKS,),
    ),
    Fault(
        "a-copy-keeps-its-first-weights",
        "worker/chunkq_worker/runtimes/torch_objects.py",
        "tensor.copy_(present[name])",
        "pass",
        "a network that was trained since predicts with its old weights",
        (NETWORKS,),
    ),
    Fault(
        "weights-do-not-identify-an-object",
        "worker/chunkq_worker/network_objects.py",
        "            digest.update(content)\n",
        "",
        "a job continues with other weights",
        (NETWORKS,),
    ),
    Fault(
        "an-interrupted-chunk-runs-to-its-end",
        "worker/chunkq_worker/batching.py",
        "            check_stopped()\n",
        "",
        "the call after Ctrl-C waits for the chunk of the last one",
        (NETWORKS,),
    ),
    Fault(
        "an-input-is-read-with-its-result",
        "worker/chunkq_worker/predictor.py",
        "request.read() if is_read else Unread(request.read)",
        "request.read()",
        "a dask array is computed twice, the second time in one piece",
        (INPUTS,),
    ),
    Fault(
        "axes-of-objects-are-forgotten",
        "worker/chunkq_worker/input_objects.py",
        "array_axes = plain_axes(array.shape) if axes is None else tuple(axes)",
        "array_axes = plain_axes(array.shape)",
        "the channels that an object names are predicted as a spatial axis",
        (INPUTS,),
    ),
    Fault(
        "falling-positions-rise",
        "worker/chunkq_worker/input_objects.py",
        "return _Place(step, float(positions[0]), unit)",
        "return _Place(abs(step), float(positions.min()), unit)",
        "the stored image is mirrored",
        named(INPUTS, "falling_coordinates"),
    ),
    Fault(
        "a-predictor-does-not-warn",
        "worker/chunkq_worker/predictor.py",
        "value_watch = watch.of(item.item.number, chunk)",
        "value_watch = None",
        "logits are compared with a half, without a word",
        ("tests/integration/test_prediction_warnings.py",),
    ),
)

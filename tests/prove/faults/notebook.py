"""Faults in inference from Python: objects of the caller, their state, and their regions."""

from tests.prove.fault import Fault

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
        "read() if is_read else Unread(read)",
        "read()",
        "a dask array is computed twice, the second time in one piece",
        (INPUTS,),
    ),
    Fault(
        "axes-of-objects-are-forgotten",
        "worker/chunkq_worker/inputs.py",
        "described = opened.axes or plain_axes",
        "described = plain_axes",
        "the channels that an object names are predicted as a spatial axis",
        (INPUTS,),
    ),
)

"""Faults in the choice of settings by `chunkq tune`."""

from tests.prove.fault import Fault, named

TURNS, SEARCH = "tests/unit/test_tune_turns.py", "tests/unit/test_tune_search.py"

FAULTS = (
    Fault(
        "speed-of-the-machine-does-not-cancel",
        "worker/chunkq_worker/tune/turns.py",
        "last.rate / sqrt(before.rate * after.rate)",
        "last.rate / self._rate",
        "a machine that becomes slower changes the choice",
        (TURNS,),
    ),
    Fault(
        "one-ratio-decides",
        "worker/chunkq_worker/tune/turns.py",
        "self._rate * median(ratios)",
        "self._rate * min(ratios)",
        "one disturbed turn changes the choice",
        (TURNS,),
    ),
    Fault(
        "a-precision-needs-no-request",
        "worker/chunkq_worker/tune/search.py",
        "return ALLOWED_CHANGE",
        "return inf",
        "a precision that changes results is chosen without a request",
        (SEARCH,),
    ),
    Fault(
        "the-best-head-decides",
        "worker/chunkq_worker/tune/accuracy.py",
        "Accuracy(max(differences), min(agreements))",
        "Accuracy(min(differences), max(agreements))",
        "a setting that changes one of several heads is chosen",
        named("tests/unit/test_tune_accuracy.py", "worst_head"),
    ),
)

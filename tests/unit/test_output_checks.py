"""Differences between two runs on one batch, and outputs that hold labels."""

from typing import Any

import numpy as np
import pytest
from chunkq_worker.label_outputs import MAX_BATCHES, LabelDetector
from chunkq_worker.output_checks import relative_difference

from chunkq.errors import ModelError
from chunkq.plan.outputs import OutputSpec

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ([0, 10], [0, 10], 0),
        ([0, 10], [0, 9], 0.1),
        ([100, 110], [100, 109], 0.1),
        ([5, 5], [5, 5], 0),
        ([5, 5], [5, 4], 0.2),
        ([0, 0], [0, 1e-9], 1),
        ([NAN, 10, 0], [NAN, 10, 1], 0.1),
        ([NAN, INF], [NAN, INF], 0),
        ([NAN, 1], [1, NAN], INF),
        ([INF, 1], [-INF, 1], INF),
        ([1, 2], [NAN, 2], INF),
        ([-3e38, 3e38], [3e38, 3e38], 1),
    ],
)
def test_a_difference_is_a_fraction_of_the_range_of_the_first_run(
    first: Any, second: Any, difference: float
) -> None:
    arrays = np.array(first, np.float32), np.array(second, np.float32)
    assert relative_difference(*arrays) == pytest.approx(difference)


def detector(combine: Any, channels: int = 1, **options: Any) -> LabelDetector:
    return LabelDetector(OutputSpec("", channels, False, "none", combine, **options))


def examine(subject: LabelDetector, values: Any, inputs: Any = range(64)) -> str | None:
    return subject.examine(np.array(values, np.float32), [np.array(inputs)])


@pytest.mark.parametrize("values", [[0.5, 3], [-1, 4], [NAN, 0.25], [INF, -2]])
@pytest.mark.parametrize("combine", ["soft", "weighted_avg"])
def test_one_batch_decides_that_outputs_are_no_labels(values: Any, combine: str) -> None:
    subject = detector(combine)
    assert examine(subject, values) is None
    assert subject.is_done


@pytest.mark.parametrize("values", [[0, 1], [0, 0], [1, NAN]])
def test_zeros_and_ones_do_not_decide(values: Any) -> None:
    subject = detector("hard")
    for _ in range(MAX_BATCHES - 1):
        assert examine(subject, values) is None
        assert not subject.is_done
    with pytest.raises(ModelError):
        examine(subject, [0, 2])


def test_later_batches_are_not_read_where_all_were_zeros_and_ones() -> None:
    subject = detector("hard")
    for _ in range(MAX_BATCHES):
        examine(subject, [0, 1])
    assert subject.is_done


@pytest.mark.parametrize(
    ("values", "inputs", "warns"),
    [
        ([0, 1, 2], range(64), True),
        ([0, 1, 2], [0, 1, 2], False),
        (range(300), range(1000), False),
        (range(33), range(64), False),
    ],
)
def test_averaged_whole_numbers_are_a_warning_if_they_are_fewer_than_those_of_the_input(
    values: Any, inputs: Any, warns: bool
) -> None:
    assert (examine(detector("weighted_avg"), values, inputs) is not None) is warns


def test_several_channels_and_declared_classes_are_not_examined() -> None:
    assert detector("soft", 3).is_done
    assert detector("soft", 3, from_labels=True).is_done

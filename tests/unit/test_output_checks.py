"""Differences between two runs on one batch, and outputs that hold labels."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from chunkq_worker.label_outputs import MAX_BATCHES, LabelDetector, _distinct
from chunkq_worker.output_checks import OutputChecks, relative_difference
from chunkq_worker.random_state import random_states

from chunkq.errors import ErrorCode, ModelError
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


BATCH = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
DRAWS: list[Callable[[], Any]] = [random.random, np.random.rand, lambda: torch.rand(1)]


def begun() -> OutputChecks:
    checks = OutputChecks([OutputSpec("", 1, False, "none", "soft")], is_stochastic=False)
    checks.begin()
    return checks


def unused() -> Any:
    raise AssertionError


@pytest.mark.parametrize("draw", DRAWS, ids=["Python", "NumPy", "torch"])
def test_a_batch_is_repeated_as_a_whole_if_it_drew_random_numbers(draw: Any) -> None:
    checks = begun()
    draw()
    with pytest.raises(ModelError) as caught:
        checks.compare([BATCH], lambda: [BATCH[::-1]], lambda: [BATCH[:1]])
    assert caught.value.code is ErrorCode.MODEL_RANDOM


def test_the_first_patch_of_a_batch_is_enough_if_nothing_was_drawn() -> None:
    checks = begun()
    checks.compare([BATCH], unused, lambda: [BATCH[:1]])
    assert checks.is_repeated


def test_a_batch_of_a_repeatable_network_is_repeated_only_if_it_drew_random_numbers() -> None:
    checks = begun()
    checks.compare([BATCH], unused, unused, is_repeatable=True)
    assert checks.is_repeated
    checks = begun()
    torch.rand(1)
    with pytest.raises(ModelError):
        checks.compare([BATCH], lambda: [BATCH[::-1]], unused, is_repeatable=True)


def test_generators_of_numpy_are_not_imported_to_compare_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generators = np.random
    monkeypatch.delattr(np, "random")
    before = random_states()
    assert "random" not in vars(np)
    assert random_states() == before
    vars(np)["random"] = generators
    assert random_states() != before  # numbers may have been drawn


def test_a_patch_that_differs_alone_is_compared_in_its_batch() -> None:
    checks = begun()
    checks.compare([BATCH], lambda: [BATCH], lambda: [BATCH[1:2]])
    assert checks.is_repeated
    with pytest.raises(ModelError):
        begun().compare([BATCH], lambda: [BATCH[::-1]], lambda: [BATCH[1:2]])


def test_a_constant_first_patch_does_not_stand_for_its_batch() -> None:
    checks = begun()
    with pytest.raises(ModelError):
        checks.examine([BATCH], [0 * BATCH[0], *BATCH[1:]], lambda: [BATCH[::-1]], unused)


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
def test_distinct_values_are_counted_like_numpy_counts_them(dtype: str) -> None:
    values = np.random.default_rng(1).integers(0, 40, 1001)
    for samples in (values, values[:1], values[:0]):
        array = samples.astype(dtype)
        assert _distinct(array) == len(np.unique(array))
    values_with_nan = np.where(values % 3 == 0, np.nan, values)
    assert _distinct(values_with_nan) == len(np.unique(values_with_nan))


def test_several_channels_and_declared_classes_are_not_examined() -> None:
    assert detector("soft", 3).is_done
    assert detector("soft", 3, from_labels=True).is_done

"""Copies beside the computing: every wait is there, and each is needed."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.runtimes.staging import GraphReplay, SentBatch, StagedFeed, as_signed, fetch

from tests.simulated_device import OnDevice, SimulatedDevice

SIZE, ITEM = 4, (3, 2)
DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"]
DTYPES += ["float16", "float32", "float64"]


@pytest.fixture(params=[False, True], ids=["copies late", "copies early"])
def device(request: pytest.FixtureRequest) -> SimulatedDevice:
    return SimulatedDevice(early=request.param)


def staged(device: SimulatedDevice, dtype: str = "float32") -> StagedFeed:
    return StagedFeed(device, device.stream(), (SIZE, *ITEM), dtype)


def batches(count: int, dtype: str = "float32") -> list[npt.NDArray[Any]]:
    drawn = np.random.default_rng(3).integers(
        0, 2 if dtype == "bool" else 100, (count, SIZE, *ITEM)
    )
    return list(drawn.astype(dtype))


def write(feed: StagedFeed, batch: npt.NDArray[Any]) -> Any:
    array = feed.buffer()
    array[: len(batch)] = batch
    return feed.send(array[: len(batch)])


def through(feed: StagedFeed, given: list[npt.NDArray[Any]]) -> Iterator[torch.Tensor]:
    """As batches go: each is written while the one before it is still to be computed."""
    sent = write(feed, given[0])
    for following in [*given[1:], None]:
        taken = sent.take(torch.float64)
        if following is not None:
            sent = write(feed, following)
        yield taken * 2


def on_host(tensors: list[torch.Tensor]) -> list[Any]:
    return [tensor.cpu().numpy() for tensor in tensors]


def assert_all_equal(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------- the device itself


def test_the_simulated_device_computes_nothing_before_the_host_looks() -> None:
    device = SimulatedDevice()
    host = torch.ones(3)
    there = device.empty((3,), torch.float32)
    device.copy(there, host, device.current())
    twice = there * 2
    host[:] = 5  # too early
    assert isinstance(twice, OnDevice)
    assert twice.cpu().tolist() == [10, 10, 10]


def test_memory_of_the_simulated_device_is_given_out_again_at_once() -> None:
    device = SimulatedDevice()
    first = device.empty((3,), torch.float32).fill_(7)
    later = first + 1
    del first
    device.empty((3,), torch.float32).fill_(0)
    assert later.cpu().tolist() == [8, 8, 8]  # in order, on one stream
    aside = device.stream()
    device.copy(device.empty((3,), torch.float32), torch.zeros(3), aside)
    again = device.empty((3,), torch.float32)
    device.wait(device.record(aside))
    assert again.cpu().tolist() != [0, 0, 0]  # kept for the copy


@pytest.mark.parametrize("forget", ["hold", "wait"])
def test_a_device_on_which_nobody_waits_gives_wrong_batches(forget: str) -> None:
    given = batches(8)
    device = SimulatedDevice(forget=forget)
    found = on_host(list(through(staged(device), given)))
    assert not all(np.array_equal(f, g * 2.0) for f, g in zip(found, given, strict=True))


@pytest.mark.parametrize(("forget", "early"), [("hold", True), ("wait", False)])
def test_a_device_on_which_nobody_waits_gives_wrong_results(forget: str, early: bool) -> None:
    device = SimulatedDevice(forget=forget, early=early)
    total = device.to_device(torch.ones(5)) * 3
    [found] = fetch(device, device.stream(), [total])()
    assert found.tolist() != [3] * 5


# ------------------------------------------------------------------------------- batches in


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_arrive_with_their_values_however_late_they_are_computed(
    device: SimulatedDevice, dtype: str
) -> None:
    given = batches(9, dtype)
    found = on_host(list(through(staged(device, dtype), given)))
    assert_all_equal(found, [batch * 2.0 for batch in given])


def test_batches_arrive_when_each_is_looked_at_before_the_next(device: SimulatedDevice) -> None:
    given = batches(9)
    found = [on_host([taken])[0] for taken in through(staged(device), given)]
    assert_all_equal(found, [batch * 2.0 for batch in given])


def test_a_batch_may_have_fewer_items(device: SimulatedDevice) -> None:
    given = [*batches(3), batches(1)[0][:2]]
    found = on_host(list(through(staged(device), given)))
    assert_all_equal(found, [batch * 2.0 for batch in given])


def test_what_steps_made_of_a_batch_is_sent_from_memory_of_its_own(
    device: SimulatedDevice,
) -> None:
    feed, found, given = staged(device, "uint8"), [], batches(9, "uint8")
    reused = np.zeros((SIZE, 2), np.float32)  # as a step may do

    for batch in given:
        array = feed.buffer()
        array[...] = batch
        reused[...] = array.reshape(SIZE, -1)[:, :2] / 4
        sent = feed.send(reused)
        assert isinstance(sent, SentBatch)
        found.append(sent.take(torch.float64))
    expected = [batch.reshape(SIZE, -1)[:, :2] / 4 for batch in given]
    assert_all_equal(on_host(found), expected)


def test_a_view_of_the_array_to_be_written_is_not_taken_for_its_beginning(
    device: SimulatedDevice,
) -> None:
    feed, [batch] = staged(device), batches(1)
    array = feed.buffer()
    array[...] = batch
    sent = feed.send(array[:, ::-1])
    assert_all_equal(on_host([sent.take(torch.float32)]), [batch[:, ::-1]])


@pytest.mark.parametrize("dtype", ["uint64", ">f4"])
def test_what_has_no_tensor_is_left_to_the_runtime_as_it_was(
    device: SimulatedDevice, dtype: str
) -> None:
    given = np.ones((SIZE, 2), dtype)
    sent = staged(device).send(given)
    given[...] = 9
    assert isinstance(sent, np.ndarray)
    assert sent.tolist() == [[1, 1]] * SIZE


def test_a_feed_waits_for_what_had_its_memory_before(device: SimulatedDevice) -> None:
    before = [device.empty((SIZE, *ITEM), torch.float32).fill_(7) for _ in range(4)]
    kept = [memory + 1 for memory in before]
    del before  # its memory is free, its last uses are still to come
    given = batches(2)
    found = list(through(staged(device), given))
    assert_all_equal(on_host(kept), [np.full((SIZE, *ITEM), 8)] * 4)
    assert_all_equal(on_host(found), [batch * 2.0 for batch in given])


def test_a_host_array_is_free_once_it_is_placed(device: SimulatedDevice) -> None:
    host = torch.ones(3)
    placed = device.to_device(host)
    host[:] = 5
    assert placed.cpu().tolist() == [1, 1, 1]


def test_wide_unsigned_values_keep_their_values() -> None:
    for dtype, top in ((torch.uint16, 65535), (torch.uint32, 4294967295)):
        assert as_signed(torch.tensor([0, 1, top], dtype=dtype)).tolist() == [0, 1, top]


# ------------------------------------------------------------------------------ results out


def test_results_arrive_while_the_device_goes_on(device: SimulatedDevice) -> None:
    way_out, waiting = device.stream(), []
    for number in range(6):
        total = device.empty((4, 4), torch.float32).zero_()
        total[1:3] += number
        total.addcmul_(device.to_device(torch.ones(4, 4)), total)
        waiting.append(fetch(device, way_out, [total, total[1:3, 1:3]]))
        del total  # as when the chunk is done: the next one's sums get this memory
    for number, fetched in enumerate(waiting):
        whole, part = fetched()
        assert part.tolist() == [[2 * number] * 2] * 2
        assert whole.sum() == 8 * 2 * number


def test_another_thread_may_wait_for_results(device: SimulatedDevice) -> None:
    fetched = fetch(device, device.stream(), [device.to_device(torch.ones(3)) + 1])
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(fetched()))
    thread.start()
    thread.join()
    assert_all_equal(found, [np.full(3, 2, np.float32)])


# -------------------------------------------------------------------------- captured networks


def test_a_captured_network_is_called_once_for_each_shape(device: SimulatedDevice) -> None:
    called: list[tuple[int, ...]] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        called.append(tuple(x.shape))
        return x.add_(1).mul_(2)  # in place, as some do

    replayed, found, given = GraphReplay(device, network), [], batches(5)
    for batch in given:
        found += [replayed(device.to_device(torch.from_numpy(part))) for part in (batch, batch[:2])]
    assert called == [(SIZE, *ITEM), (2, *ITEM)]
    expected = [(part + 1) * 2 for batch in given for part in (batch, batch[:2])]
    assert_all_equal(on_host(found), expected)


def test_a_network_that_waits_for_the_device_cannot_be_captured(device: SimulatedDevice) -> None:
    replayed = GraphReplay(device, lambda x: x * 2 if bool(x.sum() > 0) else x)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        replayed(device.to_device(torch.ones(3)))


def test_a_captured_network_that_returns_no_tensor_is_left_to_the_runtime(
    device: SimulatedDevice,
) -> None:
    assert isinstance(GraphReplay(device, lambda x: [x])(device.to_device(torch.ones(3))), list)

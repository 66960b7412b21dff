"""Asynchronous copies to and from a device: all synchronization exists, and all of it is needed."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from chunkq_worker.runtimes.staging import GraphReplay, SentBatch, StagedFeed, as_signed, fetch

from tests.simulated_device import DeviceTensor, SimulatedDevice

SIZE, ITEM = 4, (3, 2)
DTYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"]
DTYPES += ["float16", "float32", "float64"]


@pytest.fixture(params=[False, True], ids=["copies late", "copies early"])
def device(request: pytest.FixtureRequest) -> SimulatedDevice:
    return SimulatedDevice(early=request.param)


def staged(device: SimulatedDevice, dtype: str = "float32") -> StagedFeed:
    return StagedFeed(device, device.stream(), (SIZE, *ITEM), dtype)


def random_batches(count: int, dtype: str = "float32") -> list[npt.NDArray[Any]]:
    values = np.random.default_rng(3).integers(
        0, 2 if dtype == "bool" else 100, (count, SIZE, *ITEM)
    )
    return list(values.astype(dtype))


def write(feed: StagedFeed, batch: npt.NDArray[Any]) -> Any:
    array = feed.buffer()
    array[: len(batch)] = batch
    return feed.send(array[: len(batch)])


def compute_doubled(feed: StagedFeed, batches: list[npt.NDArray[Any]]) -> Iterator[torch.Tensor]:
    """Yield 2 * batch for each. Each batch is written before the previous one is computed."""
    sent = write(feed, batches[0])
    for next_batch in [*batches[1:], None]:
        tensor = sent.take(torch.float64)
        if next_batch is not None:
            sent = write(feed, next_batch)
        yield tensor * 2


def to_numpy(tensors: list[torch.Tensor]) -> list[Any]:
    return [tensor.cpu().numpy() for tensor in tensors]


def assert_all_equal(arrays: list[Any], expected: list[Any]) -> None:
    for array, other in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, other)


# -------------------------------------------------------------------------- simulated device


def test_the_simulated_device_computes_only_when_the_host_reads_values() -> None:
    device = SimulatedDevice()
    host = torch.ones(3)
    on_device = device.empty((3,), torch.float32)
    device.copy(on_device, host, device.current())
    doubled = on_device * 2
    host[:] = 5  # before the copy has run
    assert isinstance(doubled, DeviceTensor)
    assert doubled.cpu().tolist() == [10, 10, 10]


def test_the_simulated_device_reuses_freed_memory_at_once() -> None:
    device = SimulatedDevice()
    first = device.empty((3,), torch.float32).fill_(7)
    second = first + 1
    del first
    device.empty((3,), torch.float32).fill_(0)
    assert second.cpu().tolist() == [8, 8, 8]  # operations of one stream run in order
    copy_stream = device.stream()
    device.copy(device.empty((3,), torch.float32), torch.zeros(3), copy_stream)
    third = device.empty((3,), torch.float32)
    device.wait(device.record(copy_stream))
    assert third.cpu().tolist() != [0, 0, 0]  # the copy still owned its memory


@pytest.mark.parametrize("ignore", ["wait_on_stream", "wait"])
def test_batches_are_wrong_on_a_device_that_ignores_synchronization(ignore: str) -> None:
    batches = random_batches(8)
    device = SimulatedDevice(ignore=ignore)
    outputs = to_numpy(list(compute_doubled(staged(device), batches)))
    assert not all(np.array_equal(o, b * 2.0) for o, b in zip(outputs, batches, strict=True))


@pytest.mark.parametrize(("ignore", "early"), [("wait_on_stream", True), ("wait", False)])
def test_results_are_wrong_on_a_device_that_ignores_synchronization(
    ignore: str, early: bool
) -> None:
    device = SimulatedDevice(ignore=ignore, early=early)
    total = device.to_device(torch.ones(5)) * 3
    [result] = fetch(device, device.stream(), [total]).wait()
    assert result.tolist() != [3] * 5


# --------------------------------------------------------------------------- copying batches


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_keep_their_values_however_late_they_are_computed(
    device: SimulatedDevice, dtype: str
) -> None:
    batches = random_batches(9, dtype)
    outputs = to_numpy(list(compute_doubled(staged(device, dtype), batches)))
    assert_all_equal(outputs, [batch * 2.0 for batch in batches])


def test_batches_keep_their_values_when_each_output_is_read_before_the_next(
    device: SimulatedDevice,
) -> None:
    batches = random_batches(9)
    outputs = [to_numpy([tensor])[0] for tensor in compute_doubled(staged(device), batches)]
    assert_all_equal(outputs, [batch * 2.0 for batch in batches])


def test_a_batch_can_have_fewer_items_than_the_buffer(device: SimulatedDevice) -> None:
    batches = [*random_batches(3), random_batches(1)[0][:2]]
    outputs = to_numpy(list(compute_doubled(staged(device), batches)))
    assert_all_equal(outputs, [batch * 2.0 for batch in batches])


def test_an_array_that_a_step_returns_is_copied_before_it_is_sent(
    device: SimulatedDevice,
) -> None:
    feed, outputs, batches = staged(device, "uint8"), [], random_batches(9, "uint8")
    reused = np.zeros((SIZE, 2), np.float32)  # a step can reuse its output array

    for batch in batches:
        array = feed.buffer()
        array[...] = batch
        reused[...] = array.reshape(SIZE, -1)[:, :2] / 4
        sent = feed.send(reused)
        assert isinstance(sent, SentBatch)
        outputs.append(sent.take(torch.float64))
    expected = [batch.reshape(SIZE, -1)[:, :2] / 4 for batch in batches]
    assert_all_equal(to_numpy(outputs), expected)


def test_a_reversed_view_of_the_buffer_keeps_its_order(device: SimulatedDevice) -> None:
    feed, [batch] = staged(device), random_batches(1)
    array = feed.buffer()
    array[...] = batch
    sent = feed.send(array[:, ::-1])
    assert_all_equal(to_numpy([sent.take(torch.float32)]), [batch[:, ::-1]])


@pytest.mark.parametrize("dtype", ["uint64", ">f4"])
def test_a_batch_of_a_dtype_unsupported_by_torch_is_sent_as_a_numpy_copy(
    device: SimulatedDevice, dtype: str
) -> None:
    batch = np.ones((SIZE, 2), dtype)
    sent = staged(device).send(batch)
    batch[...] = 9
    assert isinstance(sent, np.ndarray)
    assert sent.tolist() == [[1, 1]] * SIZE


def test_a_feed_waits_for_the_previous_users_of_its_memory(device: SimulatedDevice) -> None:
    previous = [device.empty((SIZE, *ITEM), torch.float32).fill_(7) for _ in range(4)]
    results = [memory + 1 for memory in previous]
    del previous  # the memory is free, but its last uses have not run yet
    batches = random_batches(2)
    outputs = list(compute_doubled(staged(device), batches))
    assert_all_equal(to_numpy(results), [np.full((SIZE, *ITEM), 8)] * 4)
    assert_all_equal(to_numpy(outputs), [batch * 2.0 for batch in batches])


def test_a_host_array_can_be_reused_after_to_device(device: SimulatedDevice) -> None:
    host = torch.ones(3)
    tensor = device.to_device(host)
    host[:] = 5
    assert tensor.cpu().tolist() == [1, 1, 1]


def test_wide_unsigned_dtypes_keep_their_values() -> None:
    for dtype, top in ((torch.uint16, 65535), (torch.uint32, 4294967295)):
        assert as_signed(torch.tensor([0, 1, top], dtype=dtype)).tolist() == [0, 1, top]


# --------------------------------------------------------------------------- copying results


def test_results_are_correct_while_the_device_computes_the_next(
    device: SimulatedDevice,
) -> None:
    download_stream, pending = device.stream(), []
    for number in range(6):
        total = device.empty((4, 4), torch.float32).zero_()
        total[1:3] += number
        total.addcmul_(device.to_device(torch.ones(4, 4)), total)
        pending.append(fetch(device, download_stream, [total, total[1:3, 1:3]]))
        del total  # the sums of the next chunk reuse this memory
    for number, results in enumerate(pending):
        full, part = results.wait()
        assert part.tolist() == [[2 * number] * 2] * 2
        assert full.sum() == 8 * 2 * number


def test_another_thread_can_wait_for_results(device: SimulatedDevice) -> None:
    pending = fetch(device, device.stream(), [device.to_device(torch.ones(3)) + 1])
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(pending.wait()))
    thread.start()
    thread.join()
    assert_all_equal(results, [np.full(3, 2, np.float32)])


# -------------------------------------------------------------------------- captured networks


def test_a_captured_network_is_called_once_for_each_shape(device: SimulatedDevice) -> None:
    shapes: list[tuple[int, ...]] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return x.add_(1).mul_(2)  # some networks work in place

    replay, outputs, batches = GraphReplay(device, network), [], random_batches(5)
    for batch in batches:
        outputs += [replay(device.to_device(torch.from_numpy(b))) for b in (batch, batch[:2])]
    assert shapes == [(SIZE, *ITEM), (2, *ITEM)]
    expected = [(part + 1) * 2 for batch in batches for part in (batch, batch[:2])]
    assert_all_equal(to_numpy(outputs), expected)


def test_a_network_that_waits_for_the_device_cannot_be_captured(device: SimulatedDevice) -> None:
    replay = GraphReplay(device, lambda x: x * 2 if bool(x.sum() > 0) else x)
    with pytest.raises(RuntimeError, match="stream is capturing"):
        replay(device.to_device(torch.ones(3)))


def test_a_captured_network_returns_an_output_that_is_not_a_tensor_unchanged(
    device: SimulatedDevice,
) -> None:
    assert isinstance(GraphReplay(device, lambda x: [x])(device.to_device(torch.ones(3))), list)

"""Run the patches of a chunk through the network in batches.

The batches depend only on the plan and the batch size, not on the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import (
    Array,
    activate,
    as_float,
    as_float32,
    is_finite,
    label_votes,
    namespace,
    pick_channels,
    to_numpy,
    to_votes,
)
from chunkq.casts import Cast, cast_kind, misfit, proposed_dtype
from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.geometry.box import Box
from chunkq.job.model_config import ModelConfig
from chunkq.plan.outputs import OutputSpec
from chunkq.plan.plan import Patch, Plan
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.cancellation import check_stopped
from chunkq_worker.label_outputs import check_output_dtype, invalid_labels
from chunkq_worker.output_checks import OutputChecks
from chunkq_worker.resolution_check import check_resolution
from chunkq_worker.runtimes.base import BatchFeed, Runtime, not_real, real_numbers
from chunkq_worker.runtimes.item_shapes import output_shapes
from chunkq_worker.shape_texts import ShapeTexts
from chunkq_worker.steps import KEY, Steps
from chunkq_worker.user_errors import source_of
from chunkq_worker.value_watch import ValueWatch

if TYPE_CHECKING:
    from chunkq_worker.runtimes.device_chunk import DeviceInput, FiniteFlag

Halos = Sequence[npt.NDArray[Any]]
"""For each input, the array ([C,] *S) that a chunk's patches read; all have one shape."""
MESSAGE_LENGTH = 300
"""Characters of a framework's message in an error of chunkq."""
log = logging.getLogger("chunkq.worker")
_ceilings: dict[Hashable, int] = {}
"""Network -> batch size, for networks that ran out of memory in this process."""


class Batcher:
    """Run the patches of one chunk at a time in batches of at most `size` items.

    The last batch of a chunk is smaller. If the runtime is prepared for one size, it is padded
    with its last patch. A batch never mixes chunks, so a prediction does not depend on the other
    chunks that a worker computes. If the runtime's feed allows it, the next batch is written and
    sent while the current one is computed.

    If a batch runs out of memory, the size is halved. Later batchers of the same `network` in
    this process start with the smaller size; `network` is any hashable that identifies the
    network, or None to not remember it. First `release_memory` is called. If it returns True, it
    has released memory of the device, and the batch is tried again in the same size.
    `patches_run` counts the patches that were computed, and `checks` examine the first batches.
    `has_run` says whether the network has computed a batch. `model` has its shapes with channels
    first; messages show them as in `written`, the keys of the job.
    """

    def __init__(
        self,
        plan: Plan,
        model: ModelConfig,
        runtime: Runtime,
        steps: Steps,
        network: Hashable = None,
        checks: OutputChecks | None = None,
        written: ModelConfig | None = None,
    ) -> None:
        self.model, self.checks = model, checks
        self._plan, self._runtime, self._steps = plan, runtime, steps
        self._layout = BatchLayout.of(model, plan.volume.inputs)
        self._declared_shapes = output_shapes(model, plan.rank)
        self._texts = ShapeTexts(
            written or model, plan, self._layout.item, self._declared_shapes, steps
        )
        self._network = network
        largest = _ceilings.get(network, model.max_batch_size)
        self._resize(min(largest, model.max_batch_size))
        self._feed: BatchFeed | None
        self.patches_run = 0
        self.release_memory: Callable[[], bool] = lambda: False
        self.has_run = False
        self._watch: ValueWatch | None = None
        self._output_dtype = ""

    @property
    def is_resident(self) -> bool:
        """Return whether batches can be cut on the device, where no step needs NumPy arrays."""
        runtime, steps = self._runtime, self._steps
        has_host_step = steps.preprocessing is not None or steps.postprocessing is not None
        return runtime.accelerator is not None and runtime.reads_device_memory and not has_host_step

    @property
    def size(self) -> int:
        """Return the maximum number of items in a batch."""
        return self._size

    def of_size(self, size: int) -> Batcher:
        """Return a batcher for the same network with another batch size."""
        other = copy(self)
        other._resize(size)
        return other

    @contextmanager
    def watched_by(self, watch: ValueWatch) -> Iterator[None]:
        """Report the values of batches of patches to `watch` inside a `with` block."""
        self._watch = watch
        try:
            with self._runtime.watched_by(watch):
                yield
        finally:
            self._watch = None

    def warm_up(self) -> None:
        """Run one batch of zeros; raise ModelError if the network fails or returns other shapes."""
        if (error := self.try_zeros()) is not None:
            raise error

    def try_zeros(self) -> ModelError | None:
        """Run one batch of zeros, which prepares the runtime for its batch size.

        Return the error if the network fails, which it may do for zeros only. Raise ModelError if
        it returns other shapes.
        """
        try:
            while self._attempt((), (), (), None, self._zeros_on_device()) is None:
                pass
        except ModelError:
            raise
        except Exception as error:
            return self._failed(error, "a batch of zeros")
        self.has_run = True
        return None

    def _failed(self, error: Exception, batch: str) -> ModelError:
        """Return the error for a network that fails; its cause is `error`."""
        failed = ModelError(
            f"{source_of(error)} raised {type(error).__name__} on {batch}: "
            f"{_end_of(str(error))}; {self._texts.wrong_input(self.size, error)}"
        )
        failed.__cause__ = error
        return failed

    def predictions(
        self,
        patches: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        uploaded: DeviceInput | None = None,
        flag: FiniteFlag | None = None,
    ) -> Iterator[tuple[Sequence[Patch], tuple[Array, ...]]]:
        """Yield each batch with its predictions after activation and voting, one per output.

        The predictions of an output are (n, C, *output patch), with its own channels and patch.

        `halos` contain the inputs from voxel `origin` on, `uploaded` the same on the device.
        Predictions are on the device and valid until the next ones are requested. They are float32
        without a `flag`. With a flag, which the caller reads at the end, nothing waits for the
        device, values that are not finite raise no error, and predictions have any dtype that is
        promoted to float32.
        """
        done, sent = 0, None
        while done < len(patches):
            check_stopped()
            batch = patches[done : done + self.size]
            checks = None if self.checks is None or self.checks.are_done else self.checks
            if checks is not None:
                checks.begin()
            outputs = self._outputs(batch, halos, origin, uploaded, sent)
            sent = None
            if outputs is None:
                continue
            if checks is not None:
                self._examine(checks, outputs, batch, halos, origin, uploaded)
            done += len(batch)
            if uploaded is None:  # the checks below can wait for the device
                sent = self._send_ahead(patches[done : done + self.size], halos, origin)
            if flag is not None:
                predictions = self._to_unchecked_predictions(outputs, flag)
            else:
                predictions = self._to_predictions(outputs, batch, halos, origin)
            self.patches_run += len(batch)
            yield batch, predictions
        if patches and self.checks is not None and not self.checks.is_resolution_checked:
            self.checks.is_resolution_checked = True  # last, since noise replaces the predictions
            check_resolution(self.raw, self._plan, patches[0], halos)

    def check_input(
        self, halos: Halos, origin: Sequence[int], patches: Sequence[Patch] | None = None
    ) -> None:
        """Raise PredictionError if the network's dtype cannot hold the inputs from `origin` on.

        With `patches`, only the voxels that they read are checked. Values are read only if the
        dtypes do not decide. What `preprocessing` returns is checked batch by batch.
        """
        if self._steps.preprocessing is not None:
            return
        for number, halo in enumerate(halos):
            if cast_kind(halo.dtype, self.model.dtype) in (Cast.EXACT, Cast.ROUNDED):
                continue
            name = f"input {number}" if len(halos) > 1 else "the input"
            shape = halo.shape[-len(origin) :]
            whole = Box(tuple(origin), tuple(o + n for o, n in zip(origin, shape, strict=True)))
            for box in [whole] if patches is None else [patch.source for patch in patches]:
                values = halo[box.index(origin)]
                _check_cast(values, self.model.dtype, f"{name} ({halo.dtype}), {_format_box(box)}")

    def raw(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> npt.NDArray[Any] | None:
        """Return the network's raw output for one batch as NumPy (n, C, *Q).

        Q is the output patch. Return None if batches have to be smaller.
        """
        outputs = self._attempt(batch, halos, origin, None)
        return None if outputs is None else np.array(to_numpy(as_float(outputs)))

    def raw_alone(self, patch: Patch, halos: Halos, origin: Sequence[int]) -> Array | None:
        """Return the raw output for a batch of one patch, without using the feed's buffer.

        Results in host memory can share the memory of that buffer.
        """
        buffer = np.zeros_like(self._open_feed().buffer()[:1])
        return self._attempt([patch], halos, origin, None, buffer=buffer)

    @property
    def can_sample(self) -> bool:
        """Whether one patch of a batch tells if the outputs of all are random.

        The runtime draws from known random states only, and small batches cost less.
        """
        runtime = self._runtime
        is_known = runtime.draws_from_known_states and runtime.accelerator is None
        return is_known and runtime.any_batch

    def _fill(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        buffer: npt.NDArray[Any] | None = None,
    ) -> npt.NDArray[Any]:
        """Copy patches into a buffer, by default the feed's; return its items, unprocessed."""
        if buffer is None:
            buffer = self._open_feed().buffer()
        items = buffer[: self._count(len(batch))]
        for row, patch in zip(items, batch, strict=False):
            for number, halo in enumerate(halos):
                part = halo[patch.source.index(origin)].reshape(self._layout.part)
                row[self._layout.index(number)] = part
        items[len(batch) :] = items[len(batch) - 1] if batch else 0
        return items

    def _zeros_on_device(self) -> Array | None:
        """Return a batch of zeros on the device; None if batches are cut on the host.

        The buffers of a feed are not needed in the first case.
        """
        accelerator = self._runtime.accelerator
        if accelerator is None or not self.is_resident:
            return None
        return accelerator.zeros((self._count(0), *self._layout.item))

    def _count(self, used: int) -> int:
        return used if used and self._runtime.any_batch else self.size

    def _outputs(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        uploaded: DeviceInput | None,
        sent: Any,
    ) -> Array | None:
        try:
            outputs = self._attempt(batch, halos, origin, uploaded, sent)
        except ModelError:
            raise
        except Exception as error:
            unusable = None if self.has_run else self.try_zeros()
            if unusable is None:
                raise
            if str(unusable.__cause__) != str(error):  # zeros fail for a reason of their own
                unusable = self._failed(error, "a batch of patches")
            raise unusable from error
        self.has_run |= outputs is not None
        return outputs

    def _examine(
        self,
        checks: OutputChecks,
        outputs: Array,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        uploaded: DeviceInput | None,
    ) -> None:
        windows = [patch.source.index(origin) for patch in batch]
        inputs = [halo[window] for window in windows for halo in halos]
        checks.examine(
            outputs,
            inputs,
            lambda: self._attempt(batch, halos, origin, uploaded),
            (lambda: self.raw_alone(batch[0], halos, origin)) if self.can_sample else None,
        )

    def _send(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        buffer: npt.NDArray[Any] | None = None,
    ) -> Any:
        items, step = self._fill(batch, halos, origin, buffer), self._steps.preprocessing
        if step is not None:
            items = self._checked(np.asarray(step(items)), batch)
        return self._open_feed().send(items)

    def _checked(self, result: npt.NDArray[Any], batch: Sequence[Patch]) -> npt.NDArray[Any]:
        """Return what `preprocessing` returned, in a dtype that every runtime can cast.

        Raise PredictionError if the network's dtype cannot hold it.
        """
        if cast_kind(result.dtype, self.model.dtype) is Cast.REFUSED:
            raise not_real(f"{KEY}: preprocessing", result.dtype)
        for patch, values in zip(batch, result, strict=False):
            _check_cast(
                values,
                self.model.dtype,
                f"the result of preprocessing ({result.dtype}) for the patch that reads "
                f"{_format_box(patch.source)}",
            )
        return _castable(result, self.model.dtype)

    def _send_ahead(self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]) -> Any:
        """Send the next batch; return None if it cannot be sent before the current one is done."""
        if not batch or not self._open_feed().double_buffered:
            return None
        try:
            return self._send(batch, halos, origin)
        except Exception:
            return None  # it fails again in its turn, after errors of the current batch

    def _to_predictions(
        self, outputs: Array, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> tuple[Array, ...]:
        """Return activated predictions; raise PredictionError if the job requires finite ones."""
        predictions = []
        for output in self._plan.outputs:
            raw = pick_channels(outputs, output.picks)
            xp, values, finite = namespace(raw), as_float32(raw), None
            if not is_finite(values):
                finite = xp.isfinite(values)
                self._check_overflow(xp.isfinite(raw) & ~finite, raw, batch)
                if output.nan == "fail" and not bool(xp.all(finite)):
                    self._raise_nonfinite(finite, batch, halos, origin)
            if output.from_labels:
                self._check_labels(values, finite, batch, output.channels)
            predictions.append(_activated(values, finite, output))
        return tuple(predictions)

    def _to_unchecked_predictions(self, outputs: Array, flag: FiniteFlag) -> tuple[Array, ...]:
        """Return activated predictions without waiting for the device; see `predictions`."""
        return tuple(
            _unchecked(pick_channels(outputs, output.picks), output, flag)
            for output in self._plan.outputs
        )

    def _attempt(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        uploaded: DeviceInput | None,
        sent: Any = None,
        buffer: npt.NDArray[Any] | None = None,
    ) -> Array | None:
        """Run a batch and return its raw output (n, C, *Q), or None if it does not fit.

        The batch is sent first unless `sent` is what the feed returned for it. Without patches
        it contains zeros. If it runs out of memory, the batch size is halved.
        """
        used, count = len(batch), self._count(len(batch))
        try:
            if uploaded is not None:
                sent = uploaded.batch(batch, count)
            if self._watch is not None:
                self._watch.start(used)
            if sent is None:
                sent = self._send(batch, halos, origin, buffer)
            outputs = self._run(sent)
        except ModelError:
            raise
        except Exception as error:
            if not self._runtime.is_out_of_memory(error):
                raise
            if not self.release_memory():
                self.halve(error)
            return None
        shape = tuple(outputs.shape)
        expected = {(count, *declared) for declared in self._declared_shapes}
        if shape not in expected:
            raise ModelError(self._texts.wrong_output(count, shape))
        for output in self._plan.outputs:
            check_output_dtype(self._output_dtype, output)
        (head,) = self._plan.heads
        result = outputs.reshape((count, head.channels, *head.patch))[:used]
        if self._watch is not None and used:
            self._watch.send(result)
        return result

    def _run(self, sent: Any) -> Array:
        outputs, step = self._runtime(sent), self._steps.postprocessing
        self._output_dtype = self._runtime.output_dtype
        if step is None:
            return outputs
        returned = np.asarray(step(to_numpy(outputs)))
        self._output_dtype = returned.dtype.name
        result = real_numbers(returned, f"{KEY}: postprocessing")
        return self._runtime.to_device(np.ascontiguousarray(result))

    def halve(self, error: Exception) -> None:
        """Use half of the batch size from here on; raise ModelError if it is 1."""
        if self.size == 1:
            raise ModelError(
                "the network runs out of memory with a batch of one patch; use smaller patches or "
                f"chunks, or a larger device: {str(error).partition(chr(10))[0][:200]}"
            ) from error
        self._resize(self.size // 2)
        if self._network is not None:
            _ceilings[self._network] = self.size
        log.warning("out of memory: batches have %d patches from here on", self.size)

    def _check_overflow(self, overflow: Array, raw: Array, batch: Sequence[Patch]) -> None:
        """Raise PredictionError for the first patch with finite values that float32 cannot hold."""
        row = next((row for row, part in enumerate(overflow) if bool(part.any())), None)
        if row is None:
            return
        values = to_numpy(raw[row])
        raise PredictionError(
            f"the output of the network ({values.dtype}) has "
            f"{misfit(values, 'float32')} for the patch that reads "
            f"{_format_box(batch[row].source)}, beyond the range of dtype float32, in which "
            "predictions are combined; return smaller values",
            code=ErrorCode.DTYPE_UNSUITABLE,
        )

    def _check_labels(
        self, labels: Array, finite: Array | None, batch: Sequence[Patch], classes: int
    ) -> None:
        """Raise PredictionError for the first patch with values that are no labels."""
        invalid = invalid_labels(labels, classes)
        if finite is not None:
            invalid &= finite
        row = next((row for row, part in enumerate(invalid) if bool(part.any())), None)
        if row is None:
            return
        value = to_numpy(labels[row])[to_numpy(invalid[row])][0]
        raise PredictionError(
            f"the network returned {value:.6g} for the patch that reads "
            f"{_format_box(batch[row].source)}; expected labels from 0 to {classes - 1}, because "
            f"classes is {classes}; fix classes, or remove it if the output has no labels",
            code=ErrorCode.OUTPUT_IS_LABELS,
        )

    def _raise_nonfinite(
        self, finite: Array, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> None:
        """Raise PredictionError for the first patch that is not finite."""
        row = next(row for row, good in enumerate(finite) if not bool(good.all()))
        items = self._fill(batch, halos, origin)  # read again: a step may work in place
        raise PredictionError(
            f"{self._first_nonfinite(row, items)} NaN or infinity for the patch that reads "
            f"{_format_box(batch[row].source)}; fix it, or set nan: zero"
        )

    def _first_nonfinite(self, row: int, items: npt.NDArray[Any]) -> str:
        """Return the first stage whose values for one item are not finite, with a verb.

        `items` are a batch before any preprocessing.
        """
        steps = self._steps
        is_input_finite = bool(np.isfinite(items[row]).all())
        if steps.preprocessing is not None:
            items = np.asarray(steps.preprocessing(items))
        if not np.isfinite(items[row]).all():
            return f"{KEY}: preprocessing returned" if is_input_finite else "the input has"
        if steps.postprocessing is not None:
            raw = to_numpy(self._runtime(items))
            if np.isfinite(raw[row]).all():
                return f"{KEY}: postprocessing returned"
        protected = (steps.preprocessing_protected, steps.postprocessing_protected)
        network = "the network" + ("" if protected == (None, None) else " with its protected steps")
        return f"{network} returned"

    def _resize(self, size: int) -> None:
        self._size, self._feed = size, None

    def _open_feed(self) -> BatchFeed:
        """Return the feed; its buffers are allocated at the first call."""
        if self._feed is None:
            dtype = np.dtype(self._plan.volume.dtype).newbyteorder("=")
            self._feed = self._runtime.feed((self._size, *self._layout.item), dtype)
        return self._feed


def _activated(values: Array, finite: Array | None, output: OutputSpec) -> Array:
    """Return activated predictions of an output, or votes (n, C, *Q).

    `values` are what the network returned for the output. Predictions are zero where `finite` is
    not None and False.
    """
    xp = namespace(values)
    if finite is not None:
        values = xp.where(finite, values, xp.zeros_like(values))
    if output.from_labels:
        votes = label_votes(as_float32(values), output.channels)
        return votes if finite is None else votes * xp.astype(finite, votes.dtype)
    predictions = activate(values, output.activation)
    if finite is not None:
        predictions = xp.where(finite, predictions, xp.zeros_like(predictions))
    if output.combine == "hard":
        predictions = to_votes(predictions)
    return predictions


def _unchecked(values: Array, output: OutputSpec, flag: FiniteFlag) -> Array:
    """Return activated predictions of an output without waiting for the device.

    The flag is set if the job requires that values are finite, or labels, and some are not.
    """
    xp = namespace(values)
    if output.nan == "zero":
        finite = xp.isfinite(values)
        if values.dtype == xp.float64:
            values = as_float32(xp.where(finite, values, xp.zeros_like(values)))
            flag.add(values)  # the conversion can overflow
        _flag_invalid(values, finite, output, flag)
        return _activated(as_float32(values), finite, output)
    if values.dtype == xp.float64:
        values = as_float32(values)  # the conversion can overflow
    flag.add(values)
    _flag_invalid(values, None, output, flag)
    return _activated(values, None, output)


def _flag_invalid(
    values: Array, finite: Array | None, output: OutputSpec, flag: FiniteFlag
) -> None:
    """Set the flag if the job expects labels and some finite values are none."""
    if not output.from_labels:
        return
    xp, labels = namespace(values), as_float32(values)
    invalid = invalid_labels(labels, output.channels)
    if finite is not None:
        invalid = invalid & finite
    flag.add(xp.where(invalid, xp.full_like(labels, xp.nan), xp.zeros_like(labels)))


def _check_cast(values: npt.NDArray[Any], dtype: str, source: str) -> None:
    """Raise PredictionError if a dtype cannot hold the values of `source`."""
    if (problem := misfit(values, dtype)) is not None:
        raise PredictionError(
            f"model_config.dtype: {dtype} cannot hold {problem} of {source}; set dtype: "
            f"{proposed_dtype(values, dtype)}, or convert the values in preprocessing of {KEY}",
            code=ErrorCode.DTYPE_UNSUITABLE,
        )


def _castable(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return values that fit a dtype in a dtype that every runtime supports."""
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float64)
    if values.dtype == np.uint64:
        return values.astype(np.int64 if dtype.startswith("int") else np.float64)
    return values


def _end_of(text: str) -> str:
    """Return the last words of a long message; frameworks name the cause at the end."""
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LENGTH else f"… {text[-MESSAGE_LENGTH:].partition(' ')[2]}"


def _format_box(box: Box) -> str:
    return f"voxels {list(box.start)} to {list(box.stop)}"

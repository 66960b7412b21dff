"""Run the patches of a chunk through the network in batches.

The batches depend only on the plan and the batch size, not on the worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chunkq.blend.combine import Array, as_float, to_numpy
from chunkq.casts import Cast, cast_kind, misfit, proposed_dtype
from chunkq.errors import ErrorCode, ModelError, PredictionError
from chunkq.geometry.box import Box
from chunkq.job.model_config import ModelConfig
from chunkq.plan.chunk import Patch
from chunkq.plan.outputs import OutputSpec
from chunkq.plan.plan import Plan
from chunkq_worker.batch_layout import BatchLayout
from chunkq_worker.cancellation import check_stopped
from chunkq_worker.checked_batch import CheckedBatch
from chunkq_worker.network_heads import head_names, head_of, network_heads, source_of_output
from chunkq_worker.output_checks import OutputChecks
from chunkq_worker.output_predictions import OutputPredictions, format_box
from chunkq_worker.resolution_check import check_resolution
from chunkq_worker.runtimes.base import BatchFeed, Runtime, not_real, real_numbers
from chunkq_worker.steps import KEY, Steps, after_step
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
        self._heads = network_heads(plan, model, written or model, self._layout.item, steps)
        self._predictions = OutputPredictions(plan.outputs)
        self._network = network
        largest = _ceilings.get(network, model.max_batch_size)
        self._resize(min(largest, model.max_batch_size))
        self._feed: BatchFeed | None
        self.patches_run = 0
        self.release_memory: Callable[[], bool] = lambda: False
        self.has_run = False
        self._watch: ValueWatch | None = None
        self._output_dtypes: tuple[str, ...] = ()
        self._keeps_batch = False
        self._checked_batch: CheckedBatch | None = None

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

    @contextmanager
    def keeping_batch(self) -> Iterator[None]:
        """Keep the outputs of a batch that is computed in host memory inside a `with` block.

        The first chunk afterwards uses them if the patches of its first batch read the same voxels.
        Then they are released. Nothing is kept of a network whose outputs may differ.
        """
        self._keeps_batch = self._runtime.accelerator is None and not self.model.stochastic
        try:
            yield
        finally:
            self._keeps_batch = False

    def warm_up(self) -> None:
        """Run one batch of zeros; raise ModelError if the network fails or returns other shapes."""
        if (error := self.try_zeros()) is not None:
            raise error

    def prepare(self) -> None:
        """Run a batch of zeros unless a batch has run; an error can be one for zeros only."""
        if not self.has_run:
            self.try_zeros()

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
            f"{_end_of(str(error))}; {self._heads[0].texts.wrong_input(self.size, error)}"
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
        """Yield each batch with its predictions after activation and voting.

        Batches follow each other in the order of `patches`. Predictions are one array (n, C,
        *output patch) for each output of the plan. Outputs with the same predictions share one.
        `halos` contain the inputs from voxel `origin` on, `uploaded` the same on the device.
        Predictions are on the device and valid until the next ones are requested. They are float32
        without a `flag`. With a flag, which the caller reads at the end, nothing waits for the
        device, values that are not finite raise no error, and predictions have any dtype that is
        promoted to float32.
        """
        done, sent = 0, None
        checked, self._checked_batch = self._checked_batch, None
        while done < len(patches):
            check_stopped()
            batch = patches[done : done + self.size]
            checks = None if self.checks is None or self.checks.are_done else self.checks
            if checks is not None:
                checks.begin()
            outputs = None if checked is None else checked.outputs_of(batch, halos, origin)
            checked = None
            if outputs is None:
                outputs = self._outputs(batch, halos, origin, uploaded, sent)
            sent = None
            if outputs is None:
                continue
            if checks is not None:
                self._examine(checks, outputs, batch, halos, origin, uploaded)
            if self._keeps_batch:
                self._checked_batch = CheckedBatch.of(batch, halos, origin, outputs)
            done += len(batch)
            if uploaded is None:  # the checks below can wait for the device
                sent = self._send_ahead(patches[done : done + self.size], halos, origin)
            if flag is not None:
                predictions = self._predictions.unchecked(outputs, flag)
            else:
                explain = partial(self._explain, batch, halos, origin)
                predictions = self._predictions.checked(outputs, batch, explain)
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
                _check_cast(values, self.model.dtype, f"{name} ({halo.dtype}), {format_box(box)}")

    def raw(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> tuple[npt.NDArray[Any], ...] | None:
        """Return the network's raw output for one batch as NumPy (n, C, *Q), one per head.

        Q is the output patch. Return None if batches have to be smaller.
        """
        outputs = self._attempt(batch, halos, origin, None)
        if outputs is None:
            return None
        return tuple(np.array(to_numpy(as_float(output))) for output in outputs)

    def raw_alone(
        self, patch: Patch, halos: Halos, origin: Sequence[int]
    ) -> tuple[Array, ...] | None:
        """Return the raw outputs for a batch of one patch, without using the feed's buffer.

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

    @property
    def is_repeatable(self) -> bool:
        """Whether a batch gives the same outputs again; see `Runtime.is_repeatable`."""
        has_step = self._steps.preprocessing is not None or self._steps.postprocessing is not None
        return self._runtime.is_repeatable and not has_step

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
        shape, places = self._layout.part, list(map(self._layout.index, range(len(halos))))
        for row, patch in zip(items, batch, strict=False):
            window = patch.source.index(origin)
            for place, halo in zip(places, halos, strict=True):
                row[place] = halo[window].reshape(shape)
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
    ) -> tuple[Array, ...] | None:
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
        outputs: tuple[Array, ...],
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
            is_repeatable=self.is_repeatable,
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
                f"{format_box(patch.source)}",
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

    def _attempt(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        uploaded: DeviceInput | None,
        sent: Any = None,
        buffer: npt.NDArray[Any] | None = None,
    ) -> tuple[Array, ...] | None:
        """Run a batch and return its raw outputs (n, C, *Q), one per head; None if it does not fit.

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
        heads = zip(self._heads, outputs, self._output_dtypes, strict=True)
        results = tuple(head.items(values, dtype, count, used) for head, values, dtype in heads)
        if self._watch is not None and used:
            self._watch.send(results)
        return results

    def _run(self, sent: Any) -> tuple[Array, ...]:
        outputs, step = self._runtime(sent), self._steps.postprocessing
        self._output_dtypes = self._runtime.output_dtypes
        if step is None:
            return outputs
        names = [head.name for head in self._heads]
        returned = after_step(step, names, [to_numpy(output) for output in outputs])
        self._output_dtypes = tuple(array.dtype.name for array in returned)
        results = (real_numbers(array, f"{KEY}: postprocessing") for array in returned)
        return tuple(self._runtime.to_device(np.ascontiguousarray(array)) for array in results)

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

    def _explain(
        self,
        batch: Sequence[Patch],
        halos: Halos,
        origin: Sequence[int],
        output: OutputSpec,
        row: int,
    ) -> str:
        """Return the first stage whose values for an item are not finite, with a verb."""
        items = self._fill(batch, halos, origin)  # read again: a step may work in place
        return self._first_nonfinite(row, items, output)

    def _first_nonfinite(self, row: int, items: npt.NDArray[Any], output: OutputSpec) -> str:
        """Return the first stage whose values of an output are not finite for one item.

        A verb follows. `items` are a batch before any preprocessing.
        """
        steps = self._steps
        is_input_finite = bool(np.isfinite(items[row]).all())
        if steps.preprocessing is not None:
            items = np.asarray(steps.preprocessing(items))
        if not np.isfinite(items[row]).all():
            return f"{KEY}: preprocessing returned" if is_input_finite else "the input has"
        if steps.postprocessing is not None:
            raw = to_numpy(head_of(output, self._runtime(items), head_names(self._plan.outputs)))
            if np.isfinite(raw[row]).all():
                return f"{KEY}: postprocessing returned"
        protected = (steps.preprocessing_protected, steps.postprocessing_protected)
        network = source_of_output(output)
        if protected != (None, None):
            network = network.replace("the network", "the network with its protected steps", 1)
        return f"{network} returned"

    def _resize(self, size: int) -> None:
        self._size, self._feed = size, None

    def _open_feed(self) -> BatchFeed:
        """Return the feed; its buffers are allocated at the first call."""
        if self._feed is None:
            dtype = np.dtype(self._plan.volume.dtype).newbyteorder("=")
            self._feed = self._runtime.feed((self._size, *self._layout.item), dtype)
        return self._feed


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

"""Patches through the network in batches, the same ones whoever runs them."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from chunkq.box import Box
from chunkq.combine import Array, activate, is_finite, namespace, to_numpy, to_votes
from chunkq.errors import ModelError, PredictionError
from chunkq.plan import Patch, Plan
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.steps import KEY, Steps

Halos = Sequence[npt.NDArray[Any]]
"""What a chunk's patches read, of each input: arrays of one shape."""
log = logging.getLogger("chunkq.worker")
_ceilings: dict[Hashable, int] = {}
"""The largest batch of those networks that ran out of memory in this process with a larger one."""


class Batcher:
    """Runs patches of one chunk at a time; the last batch has what is left.

    Where the runtime is prepared for one size, that one is filled up with zeros. A batch never
    mixes chunks, so a patch's prediction does not depend on which other chunks a worker happens
    to run. Where the runtime's feed allows it, a batch is written and sent while the one before
    it is computed. Running out of memory halves
    the size for good, also for later ones of the same `network`, whatever stands for that; None
    for one that is not remembered. `patches_run` counts the patches that went through it.
    """

    def __init__(
        self, plan: Plan, runtime: Runtime, steps: Steps, network: Hashable = None
    ) -> None:
        model = plan.job.model
        self._plan, self._runtime, self._steps = plan, runtime, steps
        self._slot = model.model_input_shape
        self._item, self._join = list(self._slot), None
        if model.join_dim is not None:
            self._join = model.join_dim - 1
            self._item[self._join] = len(plan.job.input)
        self._declared = _declared(plan)
        self._network = network
        most = _ceilings.get(network, model.max_batch_size)
        self._resize(min(most, model.max_batch_size))
        self.patches_run = 0
        self._has_run = False

    @property
    def size(self) -> int:
        """Items in a batch, at most."""
        return self._size

    def of_size(self, size: int) -> Batcher:
        """Return one for the same network with batches of another size."""
        other = copy(self)
        other._resize(size)
        return other

    def warm_up(self) -> None:
        """Run one batch of zeros; raises ModelError if the network cannot do it as declared."""
        try:
            while self._attempt((), (), ()) is None:
                pass
        except ModelError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[-300:]
            raise ModelError(
                f"the network raised {type(error).__name__} on a batch of zeros: {text}"
            ) from error
        self._has_run = True

    def predictions(
        self, patches: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> Iterator[tuple[Patch, Array]]:
        """Yield each patch with its prediction (C, *output patch), activated and voted.

        `halos` hold the inputs from `origin` on. Predictions are float32 on the device, and good
        until the next one is asked for.
        """
        done, sent = 0, None
        while done < len(patches):
            batch = patches[done : done + self.size]
            outputs = self._outputs(batch, halos, origin, sent)
            sent = None
            if outputs is None:
                continue
            done += len(batch)
            # What comes now waits for the device; the next batch is better on its way by then.
            sent = self._send_ahead(patches[done : done + self.size], halos, origin)
            outputs = self._checked(outputs, batch, halos, origin)
            self.patches_run += len(batch)
            yield from zip(batch, outputs, strict=True)

    def raw(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> npt.NDArray[Any] | None:
        """Return what the network gives for one batch, on the host, as it is: (n, C, *Q)."""
        outputs = self._attempt(batch, halos, origin)
        return None if outputs is None else np.array(to_numpy(outputs))

    def _fill(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> npt.NDArray[Any]:
        """Return the items that the runtime is to run for these patches, as they were read."""
        items = self._feed.buffer()[: self._count(len(batch))]
        for row, patch in zip(items, batch, strict=False):
            for number, halo in enumerate(halos):
                place: Any = ...
                if self._join is not None:
                    place = (*(slice(None),) * self._join, slice(number, number + 1))
                row[place] = halo[patch.source.slices(origin)].reshape(self._slot)
        items[len(batch) :] = 0
        return items

    def _count(self, used: int) -> int:
        return used if used and self._runtime.any_batch else self.size

    def _outputs(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int], sent: Any
    ) -> Array | None:
        try:
            outputs = self._attempt(batch, halos, origin, sent)
        except Exception:
            if not self._has_run:
                self.warm_up()  # a network that can do nothing at all is not the patches' fault
            raise
        self._has_run |= outputs is not None
        return outputs

    def _send(self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]) -> Any:
        items, step = self._fill(batch, halos, origin), self._steps.preprocessing
        return self._feed.send(items if step is None else np.asarray(step(items)))

    def _send_ahead(self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]) -> Any:
        """Send the batch after the one that is computed; None if it has to be sent in its turn."""
        if not batch or not self._feed.ahead:
            return None
        try:
            return self._send(batch, halos, origin)
        except Exception:
            return None  # which fails again, after whatever is wrong with the batch before it

    def _checked(
        self, outputs: Array, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> Array:
        """Return predictions as they are combined; raises PredictionError if not all are finite."""
        xp = namespace(outputs)
        outputs = xp.astype(outputs, xp.float32, copy=False)
        finite = None
        if not is_finite(outputs):
            finite = xp.isfinite(outputs)
            if self._plan.job.nan == "fail" and not bool(xp.all(finite)):
                self._refuse(finite, batch, halos, origin)
        return self._usable(outputs, finite)

    def _attempt(
        self, batch: Sequence[Patch], halos: Halos, origin: Sequence[int], sent: Any = None
    ) -> Array | None:
        """Run a batch, if it is not `sent` yet, and return what it gives (n, C, *Q).

        Without patches it is one of zeros. Returns None if batches have to be smaller.
        """
        used, count = len(batch), self._count(len(batch))
        try:
            outputs = self._run(self._send(batch, halos, origin) if sent is None else sent)
        except ModelError:
            raise
        except Exception as error:
            if not self._runtime.is_out_of_memory(error):
                raise
            self._halve(error)
            return None
        given = tuple(outputs.shape)
        allowed = {(count, *declared) for declared in self._declared}
        if given not in allowed:
            steps = "" if self._steps == Steps() else " with its processing_steps"
            remedy = "correct model_output_shape or the network"
            if given[:1] + given[-1:] + given[1:-1] in allowed:
                remedy = f"move its last axis first in postprocessing_protected of {KEY}"
            raise ModelError(
                f"the network{steps} returned shape {list(given)} for a batch of "
                f"{[count, *self._item]}, but model_config.model_output_shape declares "
                f"{[count, *self._declared[0]]}; {remedy}"
            )
        shape = (count, self._plan.channels, *self._plan.output_patch)
        return outputs.reshape(shape)[:used]

    def _run(self, sent: Any) -> Array:
        outputs, step = self._runtime(sent), self._steps.postprocessing
        if step is None:
            return outputs
        changed = np.asarray(step(to_numpy(outputs)))
        return self._runtime.to_device(np.ascontiguousarray(changed, dtype=np.float32))

    def _halve(self, error: Exception) -> None:
        if self.size == 1:
            raise ModelError(
                "the network runs out of memory with a batch of one patch; use smaller patches "
                f"or a larger device: {str(error).partition(chr(10))[0][:200]}"
            ) from error
        self._resize(self.size // 2)
        if self._network is not None:
            _ceilings[self._network] = self.size
        log.warning("out of memory: batches have %d patches from here on", self.size)

    def _usable(self, outputs: Array, finite: Array | None) -> Array:
        """Return predictions as they are combined; zeros for what is not `finite`, if given."""
        job, xp = self._plan.job, namespace(outputs)
        if finite is not None:
            outputs = xp.where(finite, outputs, xp.zeros_like(outputs))
        predictions = activate(outputs, job.activation)
        if finite is not None:
            predictions = xp.where(finite, predictions, xp.zeros_like(predictions))
        if job.combine == "hard":
            predictions = to_votes(predictions)
        return predictions

    def _refuse(
        self, finite: Array, batch: Sequence[Patch], halos: Halos, origin: Sequence[int]
    ) -> None:
        """Raise PredictionError for the first patch that is not finite."""
        row = next(row for row, good in enumerate(finite) if not bool(good.all()))
        given = self._fill(batch, halos, origin)  # a step may have worked in place
        raise PredictionError(
            f"{self._first_nonfinite(row, given)} NaN or infinity for the patch that reads "
            f"{_show(batch[row].source)}; mend it, or set nan: zero"
        )

    def _first_nonfinite(self, row: int, given: npt.NDArray[Any]) -> str:
        """Return who was the first to have NaN or infinity in an item of a batch as read."""
        steps = self._steps
        read = bool(np.isfinite(given[row]).all())
        if steps.preprocessing is not None:
            given = np.asarray(steps.preprocessing(given))
        if not np.isfinite(given[row]).all():
            return f"{KEY}: preprocessing gave" if read else "the input has"
        if steps.postprocessing is not None:
            raw = to_numpy(self._runtime(given))
            if np.isfinite(raw[row]).all():
                return f"{KEY}: postprocessing gave"
        inside = (steps.preprocessing_protected, steps.postprocessing_protected)
        return f"the network{'' if inside == (None, None) else ' with its protected steps'} gave"

    def _resize(self, size: int) -> None:
        dtype = np.dtype(self._plan.volume.dtype).newbyteorder("=")
        self._size, self._feed = size, self._runtime.feed((size, *self._item), dtype)


def _declared(plan: Plan) -> list[tuple[int, ...]]:
    """Return the shapes that an item of the output may have: as declared, or without lost_dim."""
    model = plan.job.model
    declared = model.model_output_shape or model.model_input_shape
    if model.lost_dim is None:
        return [declared]
    channels = declared[: -plan.rank]
    whole = (*channels, *plan.output_patch)
    axis = model.lost_dim - len(model.model_input_shape) + plan.rank + len(channels)
    return [whole, whole[:axis] + whole[axis + 1 :]]


def _show(box: Box) -> str:
    return f"voxels {list(box.start)} to {list(box.stop)}"

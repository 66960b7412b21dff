"""The sleap runtime: networks of sleap-nn, whose layers find keypoints and animals themselves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import sleap_nn.inference
import torch
from loguru import logger
from sleap_nn.data.normalization import convert_to_grayscale, convert_to_rgb
from typing_extensions import override

from chunkq.blend.combine import Array
from chunkq.errors import ErrorCode, ModelError
from chunkq.images.poses import Poses
from chunkq.images.sleap_package import CHECKPOINT, GRAPH, KEY, SleapPackage, read_package
from chunkq.job.image_config import PeaksConfig
from chunkq.job.model_config import ModelConfig
from chunkq.job.onnx_external import external_files
from chunkq_worker.images.instances import stack_poses
from chunkq_worker.runtimes.base import Runtime
from chunkq_worker.runtimes.torch_tf32 import tf32
from chunkq_worker.runtimes.untrusted import untrusted

Pixels = npt.NDArray[np.uint8]
"""Frames (n, height, width, channels)."""


class SleapRuntime(Runtime):
    """A predictor of sleap-nn. A batch has frames (n, 3, h, w) with values from 0 to 255.

    Its results are those of `stack_poses`, in pixels of the frames. Frames whose colors are equal
    have one channel, as in the videos that sleap-nn reads.
    """

    any_batch = True

    def __init__(self, package: SleapPackage, predictor: Any, model: ModelConfig) -> None:
        self.device, self._allows_tf32 = model.device, model.allows_tf32
        self._keypoints = len(package.skeleton.names)
        self._predictor = predictor
        self._channels = _exported_channels(package)
        self._threads: int | None = None

    def limit_threads(self, threads: int | None) -> None:
        """Let torch use so many threads in each batch; None for its default."""
        self._threads = threads

    @override
    def __call__(self, batch: Any) -> tuple[Array, ...]:
        if self._predictor is None:
            raise ModelError("the network is closed")
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        frames = _pixels(np.asarray(batch))
        is_gray = (frames[..., 0] == frames[..., -1]).all(axis=(1, 2))
        poses: list[Poses | None] = [None] * len(frames)
        for numbers in (np.flatnonzero(is_gray), np.flatnonzero(~is_gray)):
            if len(numbers):
                part = frames[numbers]
                predicted = self._predict(part[..., :1] if is_gray[numbers[0]] else part)
                for number, one in zip(numbers, predicted, strict=True):
                    poses[number] = one
        return stack_poses([one for one in poses if one is not None], self._keypoints)

    def _predict(self, frames: Pixels) -> list[Poses]:
        """Return the poses in frames, through the layers and filters of the predictor."""
        images: Any = np.ascontiguousarray(frames)
        if self._channels is not None and self._channels != images.shape[-1]:
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
            convert = convert_to_grayscale if self._channels == 1 else convert_to_rgb
            images = convert(tensor).permute(0, 2, 3, 1).contiguous().numpy()
        with tf32(allowed=self._allows_tf32), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = self._predictor.filter_pipeline(self._predictor.layer.predict(images))
        skeleton = self._predictor.skeleton
        return [
            _poses(outputs.to_instances(skeleton, batch_index=number), self._keypoints)
            for number in range(len(frames))
        ]

    @override
    def zeros(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return np.zeros(shape, dtype)

    @override
    def to_device(self, array: npt.NDArray[Any]) -> Array:
        return array

    @override
    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, (MemoryError, torch.OutOfMemoryError))

    @override
    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    @override
    def close(self) -> None:
        self._predictor = None
        if self.device == "cuda":
            torch.cuda.empty_cache()


def load(model: ModelConfig, peaks: PeaksConfig | None, threads: int | None) -> Runtime:
    """Load the network in the folders of a job; raise ModelError or JobError.

    `threads` limits those of torch. An export uses all cores, and ignores `peaks`.
    """
    package = read_package(model.package or ())
    if model.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model_config.device: no CUDA device is available; use device: cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictor = _predictor(package, model, peaks or PeaksConfig())
    except ModelError:
        raise
    except Exception as error:  # of any class if a file is damaged
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{KEY}: sleap-nn cannot load {', '.join(package.folders)} ({type(error).__name__}: "
            f"{reason}); copy the folder again, or train or export the model again"
        ) from error
    if predictor.skeleton is None or len(predictor.skeleton.nodes) != len(package.skeleton.names):
        raise ModelError(f"{KEY}: sleap-nn finds another skeleton; export the model again")
    runtime = SleapRuntime(package, predictor, model)
    runtime.limit_threads(threads)
    return runtime


def _predictor(package: SleapPackage, model: ModelConfig, peaks: PeaksConfig) -> Any:
    logger.disable("sleap_nn")  # its lines are not those of a worker
    options: dict[str, Any] = {"device": model.device, "batch_size": model.max_batch_size}
    if package.is_export:
        _check_graph(f"{package.folders[0]}/{GRAPH}")
        return sleap_nn.inference.Predictor.from_export_dir(
            package.folders[0], runtime="onnx", **options
        )
    if not model.trusted:
        for folder in package.folders:
            _check_weights(f"{folder}/{CHECKPOINT}")
    return sleap_nn.inference.Predictor.from_model_paths(
        list(package.folders),
        peak_threshold=peaks.threshold,
        integral_refinement=peaks.refinement,
        **options,
    )


def _check_weights(path: str) -> None:
    """Raise ModelError if a checkpoint has more than weights: sleap-nn would run its code."""
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        if "GLOBAL" in str(error):
            raise untrusted(path, "can run code when sleap-nn loads it") from error
        raise ModelError(
            f"{KEY}: {path} is damaged ({type(error).__name__}); copy it again",
            code=ErrorCode.MODEL_UNUSABLE,
        ) from error


def _check_graph(path: str) -> None:
    """Raise ModelError for a graph whose weights are in other files, which have no hash."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        names = external_files(content)
    except ValueError:
        raise ModelError(f"{KEY}: {path} is damaged; export the model again") from None
    if names:
        raise ModelError(
            f"{KEY}: {path} keeps weights in another file, {names[0]!r}; export the model again",
            code=ErrorCode.MODEL_UNTRUSTED,
        )


def _exported_channels(package: SleapPackage) -> int | None:
    """Return the channels that an export takes; trained models convert frames themselves."""
    return package.channels if package.is_export else None


def _pixels(batch: npt.NDArray[Any]) -> Pixels:
    """Return the frames of a batch. Raise ModelError for pixels that have no 8 bits."""
    pixels = batch.clip(0, 255).astype(np.uint8)
    if not np.array_equal(pixels, batch):
        raise ModelError("sleap-nn takes frames of 8 bits; convert the images")
    return np.moveaxis(pixels, 1, -1)


def _poses(instances: Sequence[Any], keypoints: int) -> Poses:
    """Return the poses of instances of sleap-io, in their order."""
    points = np.full((len(instances), keypoints, 2), np.nan, np.float32)
    point_scores = np.full((len(instances), keypoints), np.nan, np.float32)
    for number, instance in enumerate(instances):
        points[number] = instance.numpy()
        point_scores[number] = instance.points["score"]
    point_scores[np.isnan(points).any(axis=2)] = np.nan
    scores = np.array([instance.score for instance in instances], np.float32)
    return Poses(points, point_scores, scores)

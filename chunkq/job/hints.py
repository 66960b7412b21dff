"""What a user may have meant by a key or a value that a job file cannot have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from types import MappingProxyType

from chunkq.errors import folded, nearest
from chunkq.geometry.axes import LETTERS


def _by_word(words: Mapping[str, str]) -> Mapping[str, str]:
    return {word: legal for legal, text in words.items() for word in text.split()}


_DTYPES = {
    "float16": "fp16 half f16 f2",
    "bfloat16": "bf16 bfloat",
    "float32": "fp32 float single f32 f4",
    "float64": "fp64 double f64 f8",
    "int8": "byte char bool",
    "int16": "uint8 short",
    "int32": "uint16 int integer",
    "int64": "uint32 uint64 long",
}
VALUE_WORDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        key: _by_word(words)
        for key, words in {
            "activation": {
                "none": "null no off false identity linear",
                "sigmoid": "logistic expit",
                "softmax": "logsoftmax",
            },
            "cluster": {
                "local": "none localhost single",
                "slurm": "sbatch srun hpc",
                "running": "existing remote external",
            },
            "combine": {
                "weighted_avg": "avg average mean weighted gaussian blend sum probabilities",
                "soft": "argmax label labels softmax softvoting",
                "hard": "vote votes voting majority mode hardvoting",
                "std": "sd stdev stddev deviation variance var uncertainty disagreement",
            },
            "device": {"cuda": "gpu gpus nvidia 0 1"},
            "dtype": _DTYPES,
            "edge": {"shift": "move clamp inside snap", "pad": "extend outside padding"},
            "executor": {
                "sqlite": "local file none default",
                "inprocess": "thread memory",
                "rq": "redis",
            },
            "hardware": {"gpu": "cuda gpus nvidia", "cpu_only": "cpu none"},
            "inference_type": {
                "sliding_window": "sliding window overlap overlapping strided",
                "patch": "patches tile tiles tiled block blocks",
                "crop_margin": "margin crop cropping centercrop valid",
                "image": "images whole classification classify classifier photos pictures",
            },
            "keep": {"logits": "scores raw outputs", "features": "embeddings embedding"},
            "mode": {
                "L": "gray grey grayscale greyscale 1",
                "RGB": "color colour colors rgb888 3",
                "RGBA": "alpha 4",
            },
            "nan": {
                "zero": "0 zeros ignore skip nantonum",
                "fail": "error raise abort stop",
            },
            "output_dtype": {
                "float16": "fp16 half f16 f2 bfloat16",
                "float32": "fp32 float single f32 f4 float64 double",
                "uint8": "u8 u1 byte",
                "uint16": "u16 u2 ushort",
                "int8": "i8 i1",
                "int16": "i16 i2 short",
            },
            "pad_mode": {
                "constant": "zero zeros fill 0",
                "reflect": "mirror reflection",
                "edge": "replicate replication nearest clamp border",
            },
            "precision": {
                "float16": "fp16 half f16 amp mixed autocast 16 16mixed",
                "bfloat16": "bf16 bfloat bf16mixed",
                "float32": "fp32 float single full highest float64 32",
                "tf32": "tensorfloat tensorfloat32 high",
            },
            "protocol": {"tls": "ssl", "ucx": "ucxx"},
            "provider": {
                "cuda": "gpu cudaexecutionprovider",
                "tensorrt": "trt tensorrtexecutionprovider",
            },
            "runtime": {
                "torch": "pytorch libtorch torchscript jit monai",
                "tensorflow": "tf keras tensorflow2 savedmodel",
                "onnx": "ort onnxruntime",
                "numpy": "np python function",
            },
            "type": {
                "class": "python module function code nnmodule",
                "file": "model savedmodel keras onnx h5 pb modelfile",
                "torchscript": "jit script scripted traced ts",
                "exported": "export pt2 exportedprogram",
                "json": "kerasjson",
            },
            "weight_function": {
                "weight_uniform": "constant none flat ones average",
                "weight_hann": "cosine hanning hamming",
                "weight_linear": "triangular triangle pyramid bartlett",
            },
            "zarr_format": {"2": "v2 04 zarr2", "3": "v3 05 zarr3"},
        }.items()
    }
)
"""Key, or long option -> folded words of other libraries -> the value with this meaning."""
KEY_WORDS: Mapping[str, str] = MappingProxyType(
    _by_word(
        {
            "chunksize": "chunk chunks chunkshape",
            "classes": "labels nclasses numclasses numberofclasses",
            "image": "transform imageconfig imagetransform",
            "image.crop": "centercrop cropsize",
            "image.resize": "imgsize imagesize size",
            "image.scale": "rescale divide",
            "input": "data images inputpath inputs raw volume",
            "max_errors": "maxfailures errorlimit",
            "model_config": "net network modelconfig",
            "model_config.checkpoint": "checkpointfile checkpointpath ckpt modelweights statedict "
            "weight weights weightsfile",
            "model_config.device": "gpu",
            "model_config.max_batch_size": "batch batchsize swbatchsize",
            "model_config.model_input_shape": "inputshape patch patchshape patchsize roisize "
            "tileshape tilesize windowsize",
            "model_config.model_output_shape": "outputshape outputpatch",
            "model_config.precision": "amp autocast fp16 half mixedprecision",
            "model_config.processing_steps": "preprocessing postprocessing processing steps "
            "transforms",
            "model_config.runtime": "framework backend",
            "output": "destination outputpath outputs result results",
            "pad_mode": "paddingmode",
            "pad_width": "pad padding",
            "price": "cost costs hourlyprice",
            "strides": "overlap step stepsize stride",
            "top_k": "topn top",
            "truth": "groundtruth target targets label",
            "weight_function": "blend blending importance windowfunction",
        }
    )
)
"""Folded words of other libraries -> path of the key with this meaning."""
_INTEGERS = re.compile(r"u?int(32|64)?|bool|labels?")
_TRUE, _FALSE = (
    frozenset({"yes", "on", "true", "1", "y"}),
    frozenset({"no", "off", "false", "0", "n"}),
)
_LENGTHS = re.compile(r"[\[(]?\s*(\d+(?:\s*[x×*,; ]\s*\d+)*)\s*[\])]?")
_SPAN = re.compile(r"(\d+)\s*(?:-|–|\.\.)\s*(\d+)")


def value_hint(key: str, value: object, legal: Sequence[object]) -> str:
    """Return `; did you mean 'x'?` for the legal value closest to an invalid one, or ''.

    `key` is the last part of the key's path.
    """
    texts = {str(one): one for one in legal}
    word = "none" if value is None else str(value)
    match = VALUE_WORDS.get(key, {}).get(folded(word)) or nearest(word, list(texts))
    if key == "output_dtype" and _INTEGERS.fullmatch(word):
        return "; use a narrower integer with range, or remove it, labels get an integer dtype"
    if match in texts:
        return f"; did you mean {texts[match]!r}?"
    return "; set one, or remove the key" if value is None else ""


def flag_hint(value: object) -> str:
    """Return `; use true` or `; use false` for a value that means one of them, or ''."""
    word = folded(str(value))
    return "; use true" if word in _TRUE else "; use false" if word in _FALSE else ""


def number_hint(value: str | float, *, is_integer: bool) -> str:
    """Return the number that a text or a float means, as what to use, or ''."""
    try:
        number = float(value)
    except ValueError:
        return ""
    if number.is_integer():
        return f"; use {int(number)}"
    if is_integer:
        return ""
    return f"; use {value}" if isfinite(number) else "; use .nan or .inf"


def list_hint(value: object) -> str:
    """Return the list of integers that a number or a text means, as what to use, or ''."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"; use one entry per axis, such as {[value] * 3}"
    text = _LENGTHS.fullmatch(value.strip()) if isinstance(value, str) else None
    lengths = [] if text is None else [int(one) for one in re.findall(r"\d+", text[1])]
    return f"; use {lengths}" if len(lengths) > 1 else ""


def meant_key(
    name: str, section: str, names: Mapping[str, Sequence[str]], *, exact: bool = False
) -> tuple[str, str] | None:
    """Return the section and the name of the key that an unknown key of a section may mean.

    `names` are the keys of each section; the section of the top level is ''. If `exact`, keys that
    only resemble the name do not count.
    """
    paths = {_path(one, key): (one, key) for one, keys in names.items() for key in keys}
    equal = [path for path, (_, key) in paths.items() if folded(key) == folded(name)]
    same = [path for path in equal if paths[path][0] == section]
    choices = [*same, KEY_WORDS.get(folded(name), ""), *equal]
    if not exact:
        sections = (section, *(one for one in names if one != section))
        choices += [
            _path(one, match) for one in sections if (match := nearest(name, names.get(one, ())))
        ]
    return next((paths[path] for path in choices if path in paths), None)


def key_hint(name: str, section: str, names: Mapping[str, Sequence[str]]) -> str:
    """Return what to do about an unknown key of a section: its message after `unknown key`.

    The arguments are those of `meant_key`.
    """
    meant = meant_key(name, section, names)
    if meant is None:
        return "; run `chunkq explain` to list all keys"
    other, key = meant
    if other == section:
        return f"; did you mean {key!r}?"
    if key == name:
        return f"; move it {f'into {other}' if other else f'out of {section}'}"
    return f"; did you mean {_path(other, key)!r}?"


def picks_hint(value: object, *, has_labels: bool) -> str:
    """Return what to do about a value that selects no positions of an axis, or ''."""
    if not isinstance(value, str):
        return ""
    if value.strip().lower() in ("all", ":", "*"):
        return "; remove the key, all is the default"
    if span := _SPAN.fullmatch(value.strip()):
        first, last = map(int, span.groups())
        return f"; use '{first}:{last + 1}' for {first} to {last}"
    parts = [part.strip() for part in value.split(",") if part.strip()]
    picks = [int(part) if part.isdecimal() else part for part in parts]
    if not picks or ":" in value or not (has_labels or all(isinstance(p, int) for p in picks)):
        return ""
    return f"; use {picks}"


def letters_hint(value: object) -> str:
    """Return the letters of axes that a text in another form means, as what to use, or ''."""
    text = "".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    letters = re.sub(r"[\s,;_-]", "", text.lower())
    is_valid = letters and len(letters) == len(set(letters)) and set(letters) <= set(LETTERS)
    return f"; use {letters}" if is_valid else ""


def _path(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key

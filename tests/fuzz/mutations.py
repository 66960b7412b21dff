"""Mutate the values and the text of a valid job file with one random generator."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

Values = dict[str, Any]
Key = tuple[str | int, ...]

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 5, 7, 255, 256, 2**31, 2**53 + 1, 2**63, 2**64, 10**18, 10**30, 10**400,
    -(2**63), -(10**18), 0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, -1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
STRINGS: tuple[str, ...] = (
    "", " ", "\t", "0", "1", "none", "null", "true", "cpu", "cuda", "uint8", "*", "%s", "{}", "{0}",
    "[red]", "a\nb", "a\rb", "a\x00b", "\x1b[31m", "\x7f", "é", "\u202e", "\ufeff", "😀", "\ud800",
    "weight_gaussian", "net.py", "__import__('os')", "'; DROP TABLE tasks; --", "a" * 300,
    "a/" * 600, "x" * 20_000, "x.chunkq", ".chunkq",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
    {"": None},
    [None],
    [""],
)
PATHS: tuple[str, ...] = (
    ".", "..", "/", "/dev/null", "/dev/zero", "/dev/full", "/dev/fd/99", "/proc/self/mem",
    "missing",
    "missing/a.zarr", "~", "~nobody-at-all/x", "folder", "fifo", "loop", "dangling", "secret",
    "garbage.bin", "empty", "in.npy", "cut.npy", "wide.npy", "objects.npy", "in1.zarr", "in2.zarr",
    "in3.zarr", "in4.zarr", "strings.zarr", "void.zarr", "broken.zarr", "net.py", "bad.py",
    "job.yaml",
    "in3.zarr/0", "in3.zarr/../in3.zarr", "out.zarr/", "file:///missing", "file://in3.zarr",
    "memory://a/b.zarr", "foo://bar", "://", "s3:", "http://127.0.0.1:9/a.zarr", "http://[::1/a",
    "zip://a::b", "zip://", "dir://a", "reference://a", "ftp://127.0.0.1:9/a.zarr", "tar://a::b",
    "simplecache::memory://x", "local://in3.zarr", "git://x", "github://a",
    "webhdfs://127.0.0.1:9/x", "hf://x", "cached://x", "memory://", "a::b",
    "http://user:secret@127.0.0.1:9/a.zarr",
)  # fmt: skip
"""Paths in the lab (tests/fuzz/job_files.py) and on the machine, and URLs without a server."""
UNKNOWN_KEYS = (
    "stride",
    "pad_with",
    "xyzzy",
    "model",
    "a\nb",
    "",
    "input ",
    "😀",
    "x" * 5000,
    "1",
    "<<",
)
FRAGMENTS: tuple[bytes, ...] = (
    b"!!python/object/apply:os.system ['true']", b"!!python/name:os.system", b"!!binary |\n aGk=",
    b"!!timestamp 2001-99-99", b"2001-99-99", b"2001-12-14", b"12:30:45", b"0x", b"0o17", b"0b12",
    b"1_000", b"~", b"!!set {a, b}", b"!!omap [a: 1]", b"!!pairs [a: 1]", b"? [a]\n: b", b"{a: b",
    b"&a [*a]", b"*missing", b"&a a", b"<<: *a", b"<<: [1]", b"---", b"...", b"--- a\n--- b",
    b"%YAML 9.9",
    b"%TAG ! x", b"\t", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\x85", b"\xe2\x80\xa8",
    b": ", b"- ",
    b"NaN", b".nan", b"-.inf", b"Infinity", b"1e999", b"=", b"'", b'"', b'"\\ud800"', b"[" * 3000,
    b"{a: " * 400, b"9" * 5000, b"!!int 'x'", b"!!float 'x'", b"!!bool 'x'", b"!!null 'x'",
    b"!!str [a]",
)  # fmt: skip
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
"""The billion laughs attack: a few lines of YAML that expand to 10^11 values."""


def mutated_values(rng: Random, values: Values) -> Values:
    """Return a copy of a job's values with one to three mutations."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(VALUE_MUTATIONS)(rng, values)
    return values


def encode(rng: Random, values: Values, suffix: str) -> bytes:
    """Return the text of a job file: JSON for `.json`, otherwise YAML or JSON, which is YAML."""
    if suffix == ".json" or rng.random() < 0.2:
        return json.dumps(values, indent=rng.choice((None, 1))).encode()
    text: str = yaml.safe_dump(values, default_flow_style=rng.choice((None, None, True)))
    return text.encode(errors="surrogatepass")


def mutated_text(rng: Random, text: bytes) -> bytes:
    """Return a job file's text with one or two mutations."""
    for _ in range(rng.choice((1, 1, 2))):
        text = rng.choice(TEXT_MUTATIONS)(rng, text)
    return text


# ------------------------------------------------------------------------------------ values


def _keys(value: Any, prefix: Key = ()) -> list[Key]:
    """Return the path of every value below a mapping or a list, up to six levels deep."""
    items: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:50]))
    keys = []
    if len(prefix) < 6:
        for key, item in items:
            keys += [(*prefix, key), *_keys(item, (*prefix, key))]
    return keys


def _get(values: Any, key: Key) -> Any:
    for part in key:
        values = values[part]
    return values


def _set(values: Any, key: Key, value: Any) -> None:
    _get(values, key[:-1])[key[-1]] = value


def _key(rng: Random, values: Values) -> Key | None:
    keys = _keys(values)
    return rng.choice(keys) if keys else None


def _replace(rng: Random, values: Values) -> None:
    if key := _key(rng, values):
        _set(values, key, copy.deepcopy(rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS, PATHS)))))


def _replace_number(rng: Random, values: Values) -> None:
    keys = [key for key in _keys(values) if isinstance(_get(values, key), int | float)]
    if keys:
        key = rng.choice(keys)
        old = _get(values, key)
        near = (
            old + 1,
            old - 1,
            -old,
            old * 2,
            old * 1000,
            old + 0.5 if abs(old) < 1e9 else old,
            [old],
            bool(old),
        )
        near = (*near, repr(near[0])) if abs(old) < 10**9 else near
        _set(values, key, rng.choice((*near, *NUMBERS)))


def _replace_path(rng: Random, values: Values) -> None:
    names = ("input", "output", "checkpoint", "class_file", "kwargs_file", "model_file", "ts_file",
             "json_file", "processing_steps", "queue", "weight_function")  # fmt: skip
    keys = [key for key in _keys(values) if set(map(str, key)) & set(names)]
    path = rng.choice(PATHS)
    if keys and rng.random() < 0.9:
        key = rng.choice(keys)
        old = _get(values, key)
        _set(values, key, [path, *old[1:]] if isinstance(old, list) and old else path)
    elif isinstance(values.get("model_config"), dict):
        values["model_config"][rng.choice(names[2:-2])] = path


def _delete(rng: Random, values: Values) -> None:
    if key := _key(rng, values):
        del _get(values, key[:-1])[key[-1]]


def _swap(rng: Random, values: Values) -> None:
    one, other = _key(rng, values), _key(rng, values)
    if one and other and one[: len(other)] != other and other[: len(one)] != one:
        a, b = _get(values, one), _get(values, other)
        _set(values, one, b)
        _set(values, other, a)


def _add_key(rng: Random, values: Values) -> None:
    targets = [values, *(v for v in values.values() if isinstance(v, dict))]
    value = rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS)))
    rng.choice(targets)[rng.choice(UNKNOWN_KEYS)] = copy.deepcopy(value)


def _add_known_key(rng: Random, values: Values) -> None:
    """Set a key that the base job file does not have."""
    top_level: dict[str, tuple[Any, ...]] = {
        "pad_value": (0, -1, 255, 256, 0.5, 1e300, float("nan"), float("inf")),
        "pad_mode": ("reflect", "edge", "wrap"),
        "pad_width": ([0], [1, 1], [10**9] * 3, [10**18] * 3, [2**62] * 2),
        "offsets": ([[1, 1, 1]], [[-(10**18)] * 3], [[1]], [1], [[2, 2]] * 2000),
        "strides": ([1, 1, 1], [1, 1], [10**18] * 3, [3, 3, 3]),
        "margin": ([1, 1, 1], [0, 0], [4, 4, 4], [10**12] * 3),
        "chunksize": ([1, 1, 1], [10**18] * 3, [8, 8, 8], [24], [7, 13, 11]),
        "storage_chunks": ([1, 1, 1], [10**18] * 3, [5, 5, 5], [6], [10**9] * 2),
        "edge": ("shift", "pad", "spread"),
        "nan": ("zero", "fail", float("nan")),
        "output_dtype": ("float16", "float32", "float64"),
        "zarr_format": (2, 3, 2.0, "3"),
        "threads": (1, 10**9, 2**70),
        "activation": ("softmax", "sigmoid", "relu"),
        "combine": ("hard", "soft", "weighted_avg", "std"),
        "inference_type": ("patch", "sliding_window", "crop_margin"),
        "weight_function": (["weight_bump"], "weight_hann", ["net.py", "weights"], ["bad.py", "x"]),
        "roi": (None, [[0, 1]], "x", [[2, 9], None, [-5, None]], [[0, 10**9]] * 3, [[5, 5]] * 3),
        "cluster": ("local", "slurm", "running"),
        "queue": ("sqlite:///q.db", "redis://:secret@h", "inprocess://", "x"),
        "dask_config": ({}, {"address": "x"}, [], {"n_workers": 0}),
        "ray_config": ({}, {"port": 10**9}, None),
    }
    model: dict[str, tuple[Any, ...]] = {
        "lost_dim": (0, 1, 2, 9, 10**18),
        "join_dim": (0, 1, 2, 9, 10**18),
        "dtype": ("float16", "bfloat16", "int8", "uint8"),
        "device": ("cpu", "cuda"),
        "runtime": ("torch", "numpy", "onnx", "tensorflow", "jax"),
        "type": ("class", "file", "torchscript", "exported", "json"),
        "max_batch_size": (1, 10**18),
        "model_input_shape": ([8, 8, 8], [1, 10**9, 10**9, 10**9], [1], [10**18] * 3, [2, 8, 8, 8]),
        "model_output_shape": ([1, 1, 1], [10**9, 8, 8, 8], [8, 8, 8], [2, 6, 6, 6], [10**18]),
        "precision": ("float32", "tf32", "float16", "int8"),
        "compile": (True, 1),
        "provider": ("cuda", "tensorrt", "cpu"),
        "cuda_graph": (True,),
        "channels_last": (True,),
        "trusted": (True, "yes"),
    }
    section = values.get("model_config")
    if isinstance(section, dict) and rng.random() < 0.5:
        name = rng.choice(list(model))
        section[name] = copy.deepcopy(rng.choice(model[name]))
    else:
        name = rng.choice(list(top_level))
        values[name] = copy.deepcopy(rng.choice(top_level[name]))


def _nest(rng: Random, values: Values) -> None:
    if key := _key(rng, values):
        value = _get(values, key)
        for _ in range(rng.choice((1, 1, 2, 5, 80))):
            value = [value] if rng.random() < 0.7 else {"a": value}
        _set(values, key, value)


def _change_list(rng: Random, values: Values) -> None:
    keys = [key for key in _keys(values) if isinstance(_get(values, key), list)]
    if keys:
        key = rng.choice(keys)
        old = _get(values, key)
        extra = copy.deepcopy(rng.choice(rng.choice((NUMBERS, STRINGS, OTHERS))))
        changed = [old[:-1], old[1:], [*old, extra], old * 2, [], old[::-1], tuple(old) and old[:1]]
        _set(values, key, rng.choice([*changed, old * 700, (old or [1]) * 9000]))


def _change_text(rng: Random, values: Values) -> None:
    keys = [key for key in _keys(values) if isinstance(_get(values, key), str)]
    if keys:
        key = rng.choice(keys)
        old = _get(values, key)
        odd = rng.choice(STRINGS)
        changed = [old + odd, odd + old, old[:-1], old.upper(), old + " ", old + "/", "/" + old]
        _set(values, key, rng.choice(changed))


VALUE_MUTATIONS: tuple[Callable[[Random, Values], None], ...] = (
    _replace, _replace, _replace_number, _replace_number, _replace_path, _replace_path, _delete,
    _swap, _add_key, _add_known_key, _add_known_key, _add_known_key, _nest, _change_list,
    _change_text,
)  # fmt: skip


# -------------------------------------------------------------------------------------- text


def _cut(rng: Random, text: bytes) -> bytes:
    return text[: rng.randrange(len(text) + 1)]


def _flip(rng: Random, text: bytes) -> bytes:
    content = bytearray(text)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def _insert(rng: Random, text: bytes) -> bytes:
    position = rng.randrange(len(text) + 1)
    return text[:position] + rng.choice(FRAGMENTS) + text[position:]


def _insert_line(rng: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    position = rng.randrange(len(lines) + 1)
    key = rng.choice((b"", b"roi: ", b"input: ", b"offsets: ", b"threads: ", b"xyzzy: "))
    return b"\n".join([*lines[:position], key + rng.choice(FRAGMENTS), *lines[position:]])


def _repeat_line(rng: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"\n".join(lines)


def _delete_line(rng: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    del lines[rng.randrange(len(lines))]
    return b"\n".join(lines)


def _indent(rng: Random, text: bytes) -> bytes:
    lines = text.split(b"\n")
    position = rng.randrange(len(lines))
    lines[position] = rng.choice((b" ", b"\t", b"    ", b"- ")) + lines[position]
    return b"\n".join(lines)


def _garbage(rng: Random, text: bytes) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 16, 300, 20_000)))


def _recode(rng: Random, text: bytes) -> bytes:
    name = rng.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1", "utf-7"))
    return text.decode("latin-1").encode(name, errors="replace")


def _laugh(rng: Random, text: bytes) -> bytes:
    key = rng.choice(("input", "roi", "offsets", "pad_width", "xyzzy", "model_config", "queue"))
    return LAUGHS.encode() + text + f"\n{key}: *a{rng.choice((3, 7, 11))}\n".encode()


def _loop(rng: Random, text: bytes) -> bytes:
    key = rng.choice(("input", "roi", "offsets", "pad_width", "xyzzy", "model_config", "queue"))
    return text + b"\n" + key.encode() + rng.choice((b": &b [*b]", b": &b {a: *b}")) + b"\n"


def _deepen(rng: Random, text: bytes) -> bytes:
    depth = rng.choice((50, 900, 5000, 50_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"- ", b""), (b"? ", b"")))
    value = opening * depth + b"1" + closing * depth
    return rng.choice((value, text + b"\nroi: " + value, text.replace(b"1", value, 1)))


def _repeat(rng: Random, text: bytes) -> bytes:
    return text * rng.choice((0, 2, 20))


TEXT_MUTATIONS: tuple[Callable[[Random, bytes], bytes], ...] = (
    _cut, _flip, _flip, _insert, _insert, _insert_line, _insert_line, _repeat_line, _delete_line,
    _indent, _garbage, _recode, _laugh, _loop, _deepen, _repeat,
)  # fmt: skip


def odd_file(rng: Random, lab: Path) -> Path:
    """Return the path of something that is not a job file."""
    names = ("missing.yaml", "folder", "loop", "dangling", "garbage.bin", "empty", "in3.zarr")
    devices = ("/dev/null", "/dev/zero", "/dev/full", "/", "/proc/self/mem", "/dev/fd/99")
    path = rng.choice((*names, *devices, "a" * 300, "a\0b", ""))
    return lab / path

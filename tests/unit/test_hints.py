"""Messages about keys and values that users of other tools write."""

from typing import Any

import pytest
from chunkq_producer.engine import ENGINES
from chunkq_worker.predictor import Predictor

from chunkq.errors import JobError, folded, nearest
from chunkq.job.hints import KEY_WORDS, VALUE_WORDS
from chunkq.job.job_file import job_schema
from chunkq.job.job_reading import load_job
from chunkq.job.key_reference import find_key
from tests.strategies import job_values

NONE = ""
"""No value has this meaning, so none is proposed."""
SPELLINGS: dict[str, dict[str, dict[Any, str]]] = {
    "": {
        "activation": {
            "Softmax": "'softmax'",
            "soft_max": "'softmax'",
            "logistic": "'sigmoid'",
            None: "'none'",
            False: "'none'",
            "argmax": NONE,
            "relu": NONE,
        },
        "allow_empty": {"yes": "true", "True": "true", 1: "true", "off": "false", "maybe": NONE},
        "chunksize": {
            64: "[64, 64, 64]",
            "64,64,64": "[64, 64, 64]",
            "64x64x32": "[64, 64, 32]",
            "(64, 64)": "[64, 64]",
            "auto": "[256, 256, 256]",
        },
        "classes": {"3": "3", 3.0: "3", 1: "5", "auto": "5", -2: "5"},
        "cluster": {
            "SLURM": "'slurm'",
            "sbatch": "'slurm'",
            "none": "'local'",
            "localhost": "'local'",
            "existing": "'running'",
        },
        "combine": {
            "average": "'weighted_avg'",
            "mean": "'weighted_avg'",
            "weighted-avg": "'weighted_avg'",
            "argmax": "'soft'",
            "vote": "'hard'",
            "max": NONE,
        },
        "edge": {
            "Shift": "'shift'",
            "clamp": "'shift'",
            "extend": "'pad'",
            "padding": "'pad'",
            "reflect": NONE,
        },
        "hardware": {
            "cpu": "'cpu_only'",
            "CPU": "'cpu_only'",
            "cuda": "'gpu'",
            "GPU": "'gpu'",
            "none": "'cpu_only'",
        },
        "inference_type": {
            "sliding": "'sliding_window'",
            "SlidingWindow": "'sliding_window'",
            "overlap": "'sliding_window'",
            "margin": "'crop_margin'",
            "tiles": "'patch'",
        },
        "margin": {8: "[8, 8, 8]", "8": "[8, 8, 8]", "8,8": "[8, 8]", "auto": "[8, 8, 8]"},
        "nan": {
            "ignore": "'zero'",
            0: "'zero'",
            "zeros": "'zero'",
            "error": "'fail'",
            "mean": NONE,
        },
        "output_dtype": {
            "float": "'float32'",
            "half": "'float16'",
            "Float16": "'float16'",
            "double": "'float32'",
            "uint32": "remove it",
            "labels": "remove it",
            "u8": "'uint8'",
        },
        "pad_mode": {
            "zeros": "'constant'",
            "mirror": "'reflect'",
            "replicate": "'edge'",
            "nearest": "'edge'",
            "wrap": NONE,
        },
        "pad_value": {
            "nan": ".nan",
            "0": "0",
            "-1000": "-1000",
            "1.5": "1.5",
            "zero": "-1000",
            None: "-1000",
        },
        "pad_width": {16: "[16, 16, 16]", "16,16": "[16, 16]", "same": "[16, 16, 16]"},
        "queue": {5: "redis://", True: "redis://"},
        "strides": {32: "[32, 32, 32]", "32 32 32": "[32, 32, 32]", "half": "[32, 32, 32]"},
        "storage_chunks": {64: "[64, 64, 64]", "64,64": "[64, 64]", True: "[64, 64, 64]"},
        "threads": {"4": "4", 4.0: "4", "auto": "4", 0: "4", -1: "4"},
        "weight_function": {
            "hann": "'weight_hann'",
            "hanning": "'weight_hann'",
            "gauss": "'weight_gaussian'",
            "Gaussian": "'weight_gaussian'",
            "none": "'weight_uniform'",
            "w.py": "[w.py, FUNCTION]",
            5: "weight_gaussian",
        },
        "zarr_format": {"3": "3", "v3": "3", "zarr2": "2", "0.4": "2", 1: NONE},
    },
    "input": {
        "anonymous": {"yes": "true", 0: "false", "false": "false", None: "remove the key"},
        "axes": {"ZYX": "zyx", "z,y,x": "zyx", "z y x": "zyx", "zyq": "tczyx", 3: "tczyx"},
        "channels": {
            "GFP,DAPI": "['GFP', 'DAPI']",
            "0,1": "[0, 1]",
            "0-2": "'0:3'",
            "0..2": "'0:3'",
            "all": "remove the key",
            -1: "DAPI",
        },
        "level": {"": "1", -1: "1", 1.5: "1"},
        "order": {"ZYX": "zyx", "z-y-x": "zyx", "zzy": "zyx"},
        "time": {"0-10": "'0:11'", "1,5": "[1, 5]", "all": "remove the key", "first": "0:10"},
    },
    "model_config": {
        "channels_last": {"yes": "true", 1: "true", "no": "false"},
        "device": {
            "gpu": "'cuda'",
            "GPU": "'cuda'",
            "cuda:0": "'cuda'",
            0: "'cuda'",
            "CPU": "'cpu'",
            "mps": NONE,
        },
        "dtype": {
            "fp16": "'float16'",
            "half": "'float16'",
            "float": "'float32'",
            "Float32": "'float32'",
            "uint8": "'int16'",
            "bf16": "'bfloat16'",
        },
        "join_dim": {"1": "1", 1.0: "1", -1: "1", "c": "1"},
        "max_batch_size": {"4": "4", 4.0: "4", 0: "4", "auto": "4", None: "4"},
        "model_input_shape": {64: "[64, 64, 64]", "1,64,64": "[1, 64, 64]", "1x8x8": "[1, 8, 8]"},
        "precision": {
            "fp16": "'float16'",
            "amp": "'float16'",
            "bf16": "'bfloat16'",
            "fp32": "'float32'",
            "TF32": "'tf32'",
            16: "'float16'",
        },
        "provider": {
            "gpu": "'cuda'",
            "CUDAExecutionProvider": "'cuda'",
            "trt": "'tensorrt'",
            "TensorRT": "'tensorrt'",
            "cpu": NONE,
        },
        "runtime": {
            "pytorch": "'torch'",
            "Torch": "'torch'",
            "tf": "'tensorflow'",
            "keras": "'tensorflow'",
            "onnxruntime": "'onnx'",
        },
        "type": {
            "jit": "'torchscript'",
            "script": "'torchscript'",
            "saved_model": "'file'",
            "Class": "'class'",
            "export": "'exported'",
        },
    },
}
"""Section -> key -> wrong value -> what the end of the message proposes."""


def only_line(change: dict[str, Any], section: str) -> str:
    values = job_values((4, 4), model=change if section == "model_config" else {})
    if section == "input":
        values["input"] = {"path": "/in.zarr", **change}
    elif not section:
        values |= change
        if "margin" in change:
            values["inference_type"] = "crop_margin"
        if "strides" in change:
            values["inference_type"] = "sliding_window"
    with pytest.raises(JobError) as caught:
        load_job(values)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize(
    ("section", "key", "value", "proposal"),
    [
        (section, key, value, proposal)
        for section, keys in SPELLINGS.items()
        for key, spellings in keys.items()
        for value, proposal in spellings.items()
    ],
)
def test_a_wrong_spelling_is_one_line_with_the_key_the_value_and_a_proposal(
    section: str, key: str, value: Any, proposal: str
) -> None:
    line = only_line({key: value}, section)
    path = f"{section}.{key}" if section else key
    where, _, rest = line.partition(": ")
    assert where == path
    assert (str(value) if value is not None else "value") in rest
    if proposal == NONE:
        assert "did you mean" not in rest
    else:
        assert proposal in rest.rpartition("; ")[2]


def test_a_list_with_one_name_is_like_the_name() -> None:
    assert only_line({"weight_function": ["hann"]}, "").endswith("did you mean 'weight_hann'?")


def test_two_built_in_weights_are_not_taken_for_a_file_and_a_function() -> None:
    line = only_line({"weight_function": ["weight_hann", "weight_linear"]}, "")
    assert line.startswith("weight_function: expected [name] or ")


def paths() -> dict[str, Any]:
    """Return the schema of each key by its path."""
    schema = job_schema()
    found = dict(schema["properties"])
    sections = {"model_config": "ModelConfig", "input": "InputConfig", "image": "ImageConfig"}
    for section, name in sections.items():
        inner = schema["$defs"][name]["properties"]
        found |= {f"{section}.{key}": value for key, value in inner.items()}
    inner = schema["$defs"]["DaskConfig"]["properties"]
    return found | {f"dask_config.{key}": value for key, value in inner.items()}


def test_words_of_other_tools_stand_for_keys_and_values_that_exist() -> None:
    keys = paths()
    assert set(KEY_WORDS.values()) <= keys.keys()
    for key, words in VALUE_WORDS.items():
        if key == "executor":
            assert set(words.values()) <= ENGINES.keys()
            continue
        matching = [value for path, value in keys.items() if path.rpartition(".")[2] == key]
        texts = str(matching)
        assert matching, key
        assert all(value in texts for value in words.values()), key
    for word in (*KEY_WORDS, *(word for words in VALUE_WORDS.values() for word in words)):
        assert folded(word) == word


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("patch_size", "model_config.model_input_shape"),
        ("gpu", "model_config.device"),
        ("Strides", "strides"),
        ("model_config.strides", "strides"),
        ("batchSize", "model_config.max_batch_size"),
    ],
)
def test_explain_knows_the_names_of_other_tools_and_keys_of_other_sections(
    name: str, path: str
) -> None:
    with pytest.raises(JobError) as caught:
        find_key(name)
    assert str(caught.value) == f"{name}: unknown key; did you mean {path}?"


@pytest.mark.parametrize(
    ("keyword", "hint"),
    [
        ({"batch_size": 2}, "model_config.batch_size: unknown key; did you mean 'max_batch_size'?"),
        ({"overlap": 1}, "overlap: unknown key; did you mean 'strides'?"),
        ({"patch_size": 1}, "model_config.patch_size: unknown key; did you mean 'model_input_s"),
        ({"device": "gpu"}, "model_config.device: invalid value 'gpu'"),
    ],
)
def test_a_predictor_names_the_section_of_a_misspelt_keyword(
    keyword: dict[str, Any], hint: str
) -> None:
    with pytest.raises(JobError) as caught:
        Predictor.from_model(lambda batch: batch, model_input_shape=[4, 4], **keyword)
    assert str(caught.value).startswith(hint)


@pytest.mark.parametrize(
    ("word", "legal", "match"),
    [
        ("Chunk-Size", ["chunksize", "size"], "chunksize"),
        ("fina", ["run", "finalize"], "finalize"),
        ("hann", ["weight_uniform", "weight_hann"], "weight_hann"),
        ("torchscripted", ["torch", "torchscript"], "torchscript"),
        ("strid", ["strides"], "strides"),
        ("zz", ["fizz"], "fizz"),
        ("zz", ["strides"], ""),
        ("", ["a"], ""),
    ],
)
def test_the_nearest_name_is_equal_or_begins_contains_or_resembles(
    word: str, legal: list[str], match: str
) -> None:
    assert nearest(word, legal) == match

"""Keys of jobs over images: what is refused, and what follows from others."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from chunkq_producer.commands import init

from chunkq.errors import JobError
from chunkq.job.job_file import Job
from chunkq.job.job_reading import load_job

MODEL: dict[str, Any] = {
    "runtime": "numpy", "type": "class", "class_file": "/net.py", "class_name": "net",
}  # fmt: skip


def values(**keys: Any) -> dict[str, Any]:
    return {
        "input": "/photos",
        "output": "/out.parquet",
        "inference_type": "image",
        "image": {"resize": 32, "crop": [24, 20]},
        "model_config": MODEL,
    } | keys


def problems(**keys: Any) -> set[str]:
    """Return the keys to which the problems of a job belong."""
    with pytest.raises(JobError) as caught:
        load_job(values(**keys))
    return {line.partition(":")[0] for line in caught.value.problems}


def test_the_input_shape_follows_from_the_size_and_the_mode_of_images() -> None:
    assert load_job(values()).model.model_input_shape == (3, 24, 20)
    gray = load_job(values(image={"mode": "L", "resize": [7, 9]}))
    assert gray.model.model_input_shape == (1, 7, 9)


def test_a_stored_job_is_the_same_job() -> None:
    job = load_job(values(truth={"column": "label"}, top_k=3, keep="logits", price=1.5))
    assert Job.model_validate(job.as_dict()) == job


def test_scores_are_those_of_softmax_unless_the_job_names_another_activation() -> None:
    assert load_job(values()).activation == "softmax"
    assert load_job(values(activation="none")).activation == "none"


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"image": {"resize": 8, "crop": 9}}, {"image.crop"}),
        ({"image": {"resize": [8, 9], "crop": [8, 10]}}, {"image.crop"}),
        ({"image": {"crop": 8, "mean": [1, 2]}}, {"image.mean"}),
        ({"image": {"crop": 8, "std": [1, 0, 1]}}, {"image.std"}),
        ({"truth": {}}, {"truth"}),
        ({"truth": {"regex": "a", "column": "b"}}, {"truth"}),
        ({"truth": {"regex": "("}}, {"truth.regex"}),
        ({"truth": {"regex": "label"}}, {"truth.regex"}),
        ({"chunksize": [4, 4]}, {"chunksize"}),
        ({"output": "/out.zarr"}, {"output"}),
        ({"output": "/.csv"}, {"output"}),
        ({"keep": "features", "classes": 3}, {"classes"}),
        ({"max_errors": -1}, {"max_errors"}),
        ({"price": -0.5}, {"price"}),
        ({"strides": [4], "mask": "/m.zarr"}, {"strides", "mask"}),
        ({"combine": "soft", "roi": [[0, 4]]}, {"combine", "roi"}),
        ({"input": {"path": "/photos", "level": 2}}, {"input.level"}),
        ({"input": ["s3://a/b", {"path": "s3://a/c", "anonymous": True}]}, {"input"}),
        ({"model_config": MODEL | {"lost_dim": 0}}, {"model_config.lost_dim"}),
        (
            {"model_config": MODEL | {"model_input_shape": [3, 8, 8]}},
            {"model_config.model_input_shape"},
        ),
        (
            {"model_config": MODEL | {"model_input_shape": [1, 24, 20]}},
            {"model_config.model_input_shape"},
        ),
        ({"image": {"resize": 8}}, {"model_config.model_input_shape"}),
        ({"inference_type": "images"}, {"inference_type"}),
        ({"classes": ["cat"]}, {"classes"}),
        ({"input": {"path": "/a.mp4", "frames": "0:9:0"}}, {"input.frames"}),
        (
            {"image": None, "model_config": {"package": ["/a", "/b", "/c"]}},
            {"model_config.package"},
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(keys: dict[str, Any], wrong: set[str]) -> None:
    assert problems(**keys) == wrong


def test_a_misspelled_key_of_peaks_is_named() -> None:
    with pytest.raises(JobError, match="'threshold'"):
        load_job(values(peaks={"treshold": 0.5}))


def test_a_single_keypoint_has_a_name() -> None:
    job = load_job(values(peaks={}, classes=["nose"], output="/out.slp"))
    assert job.classes == ("nose",)


@pytest.mark.parametrize(
    "keys",
    [
        {"image": {"crop": 8}},
        {"truth": {"column": "a"}},
        {"top_k": 2},
        {"keep": "logits"},
        {"max_errors": 0},
    ],
)
def test_a_job_over_volumes_has_no_keys_of_images(keys: dict[str, Any]) -> None:
    volume = {
        "input": "/in.zarr",
        "output": "/out.zarr",
        "model_config": MODEL | {"model_input_shape": [8, 8]},
    }
    assert load_job(volume).inference_type == "patch"
    with pytest.raises(JobError) as caught:
        load_job(volume | keys)
    assert {line.partition(":")[0] for line in caught.value.problems} == {*keys}


def test_every_job_can_have_a_price() -> None:
    model = MODEL | {"model_input_shape": [8, 8]}
    volume = {"input": "/in.zarr", "output": "/out.zarr", "model_config": model}
    assert load_job(volume | {"price": 2}).price == 2


def test_the_template_is_a_job(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "job.yaml").write_text(init.IMAGES_TEMPLATE)
    job = load_job(tmp_path / "job.yaml")
    assert job.is_image
    assert job.classes == ("cat", "dog")
    assert yaml.safe_load(init.IMAGES_TEMPLATE)["input"] == "photos/"

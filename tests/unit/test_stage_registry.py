"""Stages of other packages: their order, and those that cannot be used."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.stages import registry
from chunkq.stages.finalize import FinalizeStage
from chunkq.stages.infer import InferStage
from tests.harness.packages import install_package

Install = Callable[..., None]


class EarlyStage(InferStage):
    kind: ClassVar[str] = "early"
    after: ClassVar[str | None] = "late"


class LateStage(InferStage):
    kind: ClassVar[str] = "late"
    after: ClassVar[str | None] = "middle"


class MiddleStage(InferStage):
    kind: ClassVar[str] = "middle"


class FirstStage(InferStage):
    kind: ClassVar[str] = "first"
    after: ClassVar[str | None] = "second"


class SecondStage(InferStage):
    kind: ClassVar[str] = "second"
    after: ClassVar[str | None] = "first"


class BrokenStage(InferStage):
    kind: ClassVar[str] = "broken"

    def __init__(self) -> None:
        raise OSError("no licence\nfound")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages, each with stages: name of the entry point -> class of this module."""
    with monkeypatch.context() as patch:

        def install(*packages: dict[str, str]) -> None:
            for number, stages in enumerate(packages):
                lines = [f"{name} = {__name__}:{stage}" for name, stage in stages.items()]
                text = "\n".join(["[chunkq.stages]", *lines, ""])
                install_package(tmp_path, f"package{number}", text)
            patch.syspath_prepend(tmp_path)
            registry._by_kind.cache_clear()

        yield install
    registry._by_kind.cache_clear()


def test_a_stage_of_chunkq_is_found_without_a_search_of_all_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find() -> None:
        raise AssertionError("packages were searched")

    monkeypatch.setattr(registry, "_by_kind", find)
    assert isinstance(registry.stage_of("infer"), InferStage)
    assert isinstance(registry.stage_of("finalize"), FinalizeStage)


def test_a_stage_comes_behind_the_one_that_it_follows(install: Install) -> None:
    install({"early": "EarlyStage", "late": "LateStage"}, {"middle": "MiddleStage"})
    kinds = [stage.kind for stage in registry.stages()]
    assert kinds == [
        "ingest",
        "infer",
        "finalize",
        "downsample",
        "middle",
        "late",
        "early",
        "export",
    ]


@pytest.mark.parametrize(
    ("packages", "named"),
    [
        ([{"infer": "InferStage"}], "package0"),
        ([{"middle": "MiddleStage"}, {"middle": "MiddleStage"}], "package1"),
        ([{"middle": "LateStage"}], "'late'"),
        ([{"late": "LateStage"}], "'middle'"),
        ([{"first": "FirstStage"}, {"second": "SecondStage"}], "first, second, first"),
        ([{"broken": "BrokenStage"}], "no licence found"),
        ([{"missing": "MissingStage"}], "MissingStage"),
        ([{"name": "pytest"}], "not a subclass of Stage"),
    ],
)
def test_a_stage_that_cannot_be_used_is_one_line(
    install: Install, packages: list[dict[str, str]], named: str
) -> None:
    install(*packages)
    with pytest.raises(JobError) as error:
        registry.stages()
    assert named in str(error.value)
    assert "package" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_error_of_a_stage_that_cannot_be_loaded_has_a_code(install: Install) -> None:
    install({"broken": "BrokenStage"})
    with pytest.raises(JobError) as error:
        registry.stages()
    assert error.value.code is ErrorCode.PACKAGE_MISSING

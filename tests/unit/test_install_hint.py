"""The command that installs an extra names what chunkq was installed from."""

import json
import shlex
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from chunkq.install_hint import install_command, package_hint, remote_hint


def install_from(monkeypatch: pytest.MonkeyPatch, record: dict[str, object] | None) -> None:
    """Let pip have recorded `record` (PEP 610), or nothing, as after an index."""
    text = None if record is None else json.dumps(record)
    installed = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)


def test_a_checkout_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    install_from(monkeypatch, {"url": folder.as_uri(), "dir_info": {}})
    assert shlex.split(install_command("redis")) == ["pip", "install", f"{folder}[redis]"]
    install_from(monkeypatch, {"url": folder.as_uri(), "dir_info": {"editable": True}})
    assert shlex.split(install_command("redis"))[2:] == ["-e", f"{folder}[redis]"]
    assert "'.[dask]'" in remote_hint("dask", "there")


@pytest.mark.parametrize("record", [None, {"url": "file:///nowhere/chunkq.whl"}])
def test_a_release_is_named_by_its_name_in_quotes(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, object] | None
) -> None:
    install_from(monkeypatch, record)
    assert install_command("redis") == "pip install 'chunkq[redis]'"  # zsh expands bare brackets
    assert install_command() == "pip install chunkq"
    assert "'chunkq[dask]'" in remote_hint("dask", "there")


def test_a_source_tree_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    root = Path(__file__).parents[2]
    assert shlex.split(install_command("s3")) == ["pip", "install", "-e", f"{root}[s3]"]


def test_only_packages_of_an_extra_have_a_hint() -> None:
    assert install_command("redis") in str(package_hint(ModuleNotFoundError("", name="rq.job")))
    assert package_hint(ModuleNotFoundError("", name="unknown")) is None

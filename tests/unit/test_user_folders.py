"""The folders of a user, also of one without a home folder."""

import pwd
from pathlib import Path

import pytest

from chunkq.errors import JobError
from chunkq.queue.backends import credentials
from chunkq.queue.registry import default_url
from chunkq.system import user_folders


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("call", "variable"),
    [
        (user_folders.home_folder, "HOME"),
        (user_folders.state_folder, "XDG_STATE_HOME"),
        (user_folders.data_folder, "XDG_DATA_HOME"),
        (user_folders.cache_folder, "XDG_CACHE_HOME"),
        (default_url, "XDG_STATE_HOME"),
    ],
)
@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_an_error_of_one_line(call: object, variable: str) -> None:
    with pytest.raises(JobError) as caught:
        call()  # type: ignore[operator]
    assert variable in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_stored_no_passwords() -> None:
    assert credentials.find_secret("redis", "localhost", 6379) is None
    credentials.remove_secret("redis", "localhost", 6379)


@pytest.mark.usefixtures("homeless")
def test_a_folder_in_the_environment_replaces_the_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert user_folders.state_folder() == tmp_path / "chunkq"
    assert default_url() == f"sqlite:///{tmp_path}/chunkq/queue.db"

"""Worker settings: defaults, overrides in the environment, invalid values."""

import json
import os

import pytest

from chunkq.errors import ErrorCode, JobError
from chunkq.queue.contract.settings import SETTINGS_VARIABLE, WorkerSettings, override_settings


def test_the_environment_overrides_settings_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)
    assert WorkerSettings.from_environment() == WorkerSettings()
    monkeypatch.setenv(SETTINGS_VARIABLE, '{"lease": 5, "early_deaths": 2}')
    assert WorkerSettings.from_environment() == WorkerSettings(lease=5, early_deaths=2)


def test_an_override_keeps_earlier_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, '{"lease": 5, "server_answer": 1}')
    override_settings(lease=7.5)
    assert json.loads(os.environ[SETTINGS_VARIABLE]) == {"lease": 7.5, "server_answer": 1}


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("lease=5", (SETTINGS_VARIABLE,)),
        ("[5]", (SETTINGS_VARIABLE,)),
        ('{"leese": 5}', ("'leese'",)),
        ('{"lease": "5"}', ("lease: ", "'5'")),
        ('{"lease": -1}', ("lease: ", "-1")),
        ('{"lease": true}', ("lease: ", "True")),
        ('{"lease": NaN}', ("lease: ", "nan")),
    ],
)
def test_an_invalid_setting_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, text: str, fragments: tuple[str, ...]
) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, text)
    with pytest.raises(JobError) as error:
        WorkerSettings.from_environment()
    assert error.value.code is ErrorCode.JOB_INVALID
    for fragment in fragments:
        assert fragment in str(error.value)
    assert len(str(error.value).splitlines()) == 1

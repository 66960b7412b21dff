"""The CPU cores that a process may use, with the quotas of control groups."""

from pathlib import Path

import pytest

from chunkq.system import cores


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "mount"


def test_the_quota_of_a_container_is_read(groups: Path, mount: Path) -> None:
    groups.write_text("0::/\n")
    write(mount, cpu__max="150000 100000\n")
    assert list(cores.cpu_quotas(mount, groups)) == [1.5]


def test_quotas_of_all_groups_above_a_process_are_read(groups: Path, mount: Path) -> None:
    groups.write_text("0::/slurm/job_7/step_0\n")
    write(mount / "slurm", cpu__max="max 100000\n")
    write(mount / "slurm" / "job_7", cpu__max="400000 100000\n")
    write(mount / "slurm" / "job_7" / "step_0", cpu__max="200000 50000\n")
    write(mount / "other", cpu__max="100000 100000\n")
    assert list(cores.cpu_quotas(mount, groups)) == [4.0, 4.0]


def test_a_group_outside_of_the_container_counts_as_its_root(groups: Path, mount: Path) -> None:
    groups.write_text("0::/../../docker\n")
    write(mount, cpu__max="300000 100000\n")
    assert list(cores.cpu_quotas(mount, groups)) == [3.0]


@pytest.mark.parametrize("name", cores.MOUNTS)
def test_quotas_of_version_1_are_read(groups: Path, mount: Path, name: str) -> None:
    groups.write_text(f"9:memory:/a\n4:{name}:/docker/1a2b\n")
    write(mount / name, cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    write(
        mount / name / "docker" / "1a2b", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000"
    )
    assert list(cores.cpu_quotas(mount, groups)) == [2.5]


@pytest.mark.parametrize("text", ["max 100000\n", "", "100000\n", "a b\n", "0 100000\n"])
def test_a_group_without_a_quota_has_none(groups: Path, mount: Path, text: str) -> None:
    groups.write_text("0::/\n")
    write(mount, cpu__max=text)
    assert list(cores.cpu_quotas(mount, groups)) == []


def test_systems_without_control_groups_have_no_quota(groups: Path, mount: Path) -> None:
    assert list(cores.cpu_quotas(mount, groups)) == []


@pytest.mark.parametrize(
    ("quotas", "expected"), [([], 8), ([2.5], 3), ([0.2], 1), ([16.0], 8), ([6.0, 3.0], 3)]
)
def test_the_least_of_affinity_and_quotas_counts(
    monkeypatch: pytest.MonkeyPatch, quotas: list[float], expected: int
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "cpu_quotas", lambda: quotas)
    assert cores.available_cores() == expected

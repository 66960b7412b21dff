"""Tests of the configuration in deploy/compose, as parsed by Docker Compose without an engine."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.harness.compose import DEPLOY, Stack, make_stack

PROFILES = {"cpu": "worker-cpu", "gpu": "worker"}
CHUNKQ_SERVICES = ("producer", "worker", "worker-cpu", "finalizer")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return make_stack(tmp_path)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_valid_and_has_its_own_worker(profile: str, stack: Stack) -> None:
    result = stack.call(profile, "config", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert set(stack.services(profile)) == {"redis", "producer", PROFILES[profile], "finalizer"}


@pytest.mark.parametrize("missing", ["CHUNKQ_DATA", "CHUNKQ_JOB", "CHUNKQ_OUTPUT"])
def test_the_error_for_a_missing_setting_names_it(missing: str, stack: Stack) -> None:
    del stack.settings[missing]
    result = stack.call("cpu", "config", "--quiet")
    assert result.returncode != 0
    assert missing in result.stderr
    assert "in .env" in result.stderr


def test_the_example_contains_all_required_settings_and_the_defaults(stack: Stack) -> None:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    stack.settings.clear()
    stack.settings.update(line.split("=", 1) for line in lines if line and line[0] != "#")
    assert stack.call("gpu", "config", "--quiet").returncode == 0
    # The commented settings are the defaults.
    before = [stack.services(profile) for profile in PROFILES]
    defaults = [line[1:] for line in lines if line.startswith("#") and line[1:2].isupper()]
    stack.settings.update(line.split("=", 1) for line in defaults)
    assert len(defaults) >= 8
    assert [stack.services(profile) for profile in PROFILES] == before


@pytest.mark.parametrize("profile", PROFILES)
def test_the_password_is_in_the_secret_only(profile: str, stack: Stack) -> None:
    services = stack.services(profile)
    for service in services.values():
        (secret,) = service["secrets"]
        assert (secret["source"], secret["target"]) == (
            "redis_password",
            "/run/secrets/redis_password",
        )
    for name in set(CHUNKQ_SERVICES) & set(services):
        environment = services[name]["environment"]
        assert environment["CHUNKQ_QUEUE"] == "redis://redis:6379/0"
        assert environment["CHUNKQ_QUEUE_PASSWORD_FILE"] == "/run/secrets/redis_password"
    assert not services["redis"].get("environment")
    assert "s3cr3t" not in stack.call(profile, "config").stdout
    # The health check runs a script that does not put the password into a command line.
    assert services["redis"]["healthcheck"]["test"] == ["CMD", "sh", "/etc/chunkq/redis.sh", "ping"]


@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_runs_as_root_and_files_belong_to_the_user(profile: str, stack: Stack) -> None:
    for name, service in stack.services(profile).items():
        assert service["user"] == ("redis" if name == "redis" else "1234:4321")
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert not service.get("privileged")
    for name in ("Dockerfile.producer", "Dockerfile.worker"):
        lines = (DEPLOY / name).read_text().splitlines()
        assert "USER 1000:1000" in lines
        assert "ARG PYTHON_IMAGE=python:3.11-slim-bookworm" in lines


@pytest.mark.parametrize("profile", PROFILES)
def test_data_has_the_same_path_in_containers_and_the_queue_has_a_volume(
    profile: str, stack: Stack
) -> None:
    services, data = stack.services(profile), stack.settings["CHUNKQ_DATA"]
    for name in set(CHUNKQ_SERVICES) & set(services):
        (mount,) = services[name]["volumes"]
        assert (mount["type"], mount["source"], mount["target"]) == ("bind", data, data)
        assert services[name]["working_dir"] == data
    mounts = {mount["target"]: mount for mount in services["redis"]["volumes"]}
    assert mounts["/data"]["type"] == "volume"
    assert mounts["/etc/chunkq/redis.conf"]["read_only"] is True
    settings = Path(mounts["/etc/chunkq/redis.conf"]["source"])
    assert "appendonly yes" in settings.read_text()


def test_only_this_machine_can_connect_to_the_queue(stack: Stack) -> None:
    services = stack.services("cpu")
    assert {name for name, service in services.items() if service.get("ports")} == {"redis"}
    (port,) = services["redis"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "6379", 6379)


def test_gpu_workers_reserve_gpus_and_cpu_workers_do_not(stack: Stack) -> None:
    worker = stack.services("gpu")["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"]) == ("nvidia", -1)
    assert "gpu" in device["capabilities"]
    assert "utility" in device["capabilities"]  # provides nvidia-smi, which lists the GPUs
    assert worker["command"][-2:] == ["--gpus", "all"]
    assert not worker["build"]["args"].get("TORCH_INDEX")
    cpu = stack.services("cpu")["worker-cpu"]
    assert "deploy" not in cpu
    assert "none" in cpu["command"]
    assert not cpu["build"]["args"].get("TORCH_INDEX")


@pytest.mark.parametrize("profile", PROFILES)
def test_each_step_waits_for_the_previous_one(profile: str, stack: Stack) -> None:
    services, worker = stack.services(profile), PROFILES[profile]
    assert "--burst" in services[worker]["command"]
    assert services[worker]["stop_grace_period"] == "10m0s"

    def dependencies(name: str) -> dict[str, str]:
        return {on: rule["condition"] for on, rule in services[name]["depends_on"].items()}

    completed = "service_completed_successfully"
    assert dependencies("producer") == {"redis": "service_healthy"}
    assert dependencies(worker) == {"redis": "service_healthy", "producer": completed}
    assert dependencies("finalizer")[worker] == completed


@pytest.mark.parametrize("extras", [("redis", "s3"), ("torch", "redis", "s3")])
def test_an_image_installs_the_requirements_of_the_package(extras: tuple[str, ...]) -> None:
    project = DEPLOY.parents[1] / "pyproject.toml"
    result = subprocess.run(
        [sys.executable, str(DEPLOY / "requirements.py"), str(project), *extras],
        capture_output=True,
        text=True,
        check=True,
    )
    values = tomllib.loads(project.read_text())["project"]
    expected = [*values["dependencies"]]
    for extra in extras:
        expected += values["optional-dependencies"][extra]
    requirements = result.stdout.splitlines()
    assert requirements == expected
    assert any(line.startswith("torch>=") for line in requirements) == ("torch" in extras)

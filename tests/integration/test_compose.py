"""deploy/compose as Docker Compose reads it; no engine is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.compose import DEPLOY, Stack, make_stack

PROFILES = {"cpu": "worker-cpu", "gpu": "worker"}
OURS = ("producer", "worker", "worker-cpu", "finalizer")


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return make_stack(tmp_path)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_is_valid_and_has_its_own_worker(profile: str, stack: Stack) -> None:
    done = stack.call(profile, "config", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(stack.services(profile)) == {"redis", "producer", PROFILES[profile], "finalizer"}


@pytest.mark.parametrize("missing", ["CHUNKQ_DATA", "CHUNKQ_JOB", "CHUNKQ_OUTPUT"])
def test_a_setting_that_is_missing_is_named(missing: str, stack: Stack) -> None:
    del stack.settings[missing]
    done = stack.call("cpu", "config", "--quiet")
    assert done.returncode != 0
    assert missing in done.stderr
    assert "in .env" in done.stderr


def test_the_example_settings_are_all_that_must_be_set(stack: Stack) -> None:
    lines = (DEPLOY / ".env.example").read_text().splitlines()
    stack.settings.clear()
    stack.settings.update(line.split("=", 1) for line in lines if line and line[0] != "#")
    assert stack.call("gpu", "config", "--quiet").returncode == 0
    # What is shown there as the default is the default.
    before = [stack.services(profile) for profile in PROFILES]
    shown = [line[1:] for line in lines if line.startswith("#") and line[1:2].isupper()]
    stack.settings.update(line.split("=", 1) for line in shown)
    assert len(shown) >= 8
    assert [stack.services(profile) for profile in PROFILES] == before


@pytest.mark.parametrize("profile", PROFILES)
def test_the_password_is_a_secret_and_nothing_else_holds_it(profile: str, stack: Stack) -> None:
    services = stack.services(profile)
    for service in services.values():
        (secret,) = service["secrets"]
        assert (secret["source"], secret["target"]) == (
            "redis_password",
            "/run/secrets/redis_password",
        )
    for name in set(OURS) & set(services):
        environment = services[name]["environment"]
        assert environment["CHUNKQ_QUEUE"] == "redis://redis:6379/0"
        assert environment["CHUNKQ_QUEUE_PASSWORD_FILE"] == "/run/secrets/redis_password"
    assert not services["redis"].get("environment")
    assert "s3cr3t" not in stack.call(profile, "config").stdout
    # The health check names a script, which hands the password over without a command line.
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
def test_data_has_the_same_path_inside_and_the_queue_a_volume(profile: str, stack: Stack) -> None:
    services, data = stack.services(profile), stack.settings["CHUNKQ_DATA"]
    for name in set(OURS) & set(services):
        (mount,) = services[name]["volumes"]
        assert (mount["type"], mount["source"], mount["target"]) == ("bind", data, data)
        assert services[name]["working_dir"] == data
    mounts = {mount["target"]: mount for mount in services["redis"]["volumes"]}
    assert mounts["/data"]["type"] == "volume"
    assert mounts["/etc/chunkq/redis.conf"]["read_only"] is True
    settings = Path(mounts["/etc/chunkq/redis.conf"]["source"])
    assert "appendonly yes" in settings.read_text()


def test_only_this_machine_reaches_the_queue(stack: Stack) -> None:
    services = stack.services("cpu")
    assert {name for name, service in services.items() if service.get("ports")} == {"redis"}
    (port,) = services["redis"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "6379", 6379)


def test_gpu_workers_reserve_gpus_and_cpu_workers_want_none(stack: Stack) -> None:
    worker = stack.services("gpu")["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"]) == ("nvidia", -1)
    assert "gpu" in device["capabilities"]
    assert "utility" in device["capabilities"]  # without nvidia-smi no GPU is found
    assert worker["command"][-2:] == ["--gpus", "all"]
    assert not worker["build"]["args"].get("TORCH_INDEX")
    cpu = stack.services("cpu")["worker-cpu"]
    assert "deploy" not in cpu
    assert "none" in cpu["command"]
    assert not cpu["build"]["args"].get("TORCH_INDEX")


@pytest.mark.parametrize("profile", PROFILES)
def test_each_step_waits_for_the_one_before(profile: str, stack: Stack) -> None:
    services, worker = stack.services(profile), PROFILES[profile]
    assert "--burst" in services[worker]["command"]
    assert services[worker]["stop_grace_period"] == "10m0s"

    def waits(name: str) -> dict[str, str]:
        return {on: rule["condition"] for on, rule in services[name]["depends_on"].items()}

    finished = "service_completed_successfully"
    assert waits("producer") == {"redis": "service_healthy"}
    assert waits(worker) == {"redis": "service_healthy", "producer": finished}
    assert waits("finalizer")[worker] == finished


@pytest.mark.parametrize("extras", [("redis", "s3"), ("torch", "redis", "s3")])
def test_an_image_gets_what_the_package_says_it_needs(extras: tuple[str, ...]) -> None:
    project = DEPLOY.parents[1] / "pyproject.toml"
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "requirements.py"), str(project), *extras],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = done.stdout.splitlines()
    assert {"zarr>=3.0.8", "redis>=5", "rq==2.12.*", "s3fs>=2024.12"} < set(wanted)
    assert any(line.startswith("torch>=") for line in wanted) == ("torch" in extras)

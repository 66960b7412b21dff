"""Docker Compose v2, from this machine or from Debian's package in a cache folder."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import pytest

DEPLOY = Path(__file__).parents[2] / "deploy" / "compose"
PASSWORD = 's3cr3t"\\$x y'
"""A password with characters that a shell, a Redis configuration or a URL must quote."""
RUN_SECONDS = 300
OLDEST = (2, 24)
"""The first version that supports an optional `env_file`."""
SUITE = "trixie"
"""The first Debian release whose package docker-compose is Compose v2."""
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PROGRAM = Path("usr/libexec/docker/cli-plugins/docker-compose")
DOWNLOAD_SECONDS = 300


class NoComposeError(Exception):
    """Docker Compose is missing and cannot be downloaded."""


def compose() -> list[str]:
    """Return the Compose command; without one, skip the test, or fail it in CI."""
    try:
        return find_compose()
    except NoComposeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def find_compose() -> list[str]:
    """Return the command of an installed Compose, or of one downloaded for these tests."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if is_new_enough(command):
            return command
    program = platformdirs.user_cache_path("chunkq-tests") / f"compose-{SUITE}" / PROGRAM
    if not program.exists():
        fetch(program.parents[len(PROGRAM.parts) - 1])
    if not is_new_enough([str(program)]):
        raise NoComposeError(f"Debian's Compose does not run on this machine: {program}")
    return [str(program)]


def is_new_enough(command: list[str]) -> bool:
    """Return whether a Compose command runs and its version is at least `OLDEST`."""
    try:
        result = subprocess.run(
            [*command, "version", "--short"], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    version = re.match(r"v?(\d+)\.(\d+)", result.stdout)
    if result.returncode != 0 or version is None:
        return False
    return tuple(map(int, version.groups())) >= OLDEST


def fetch(folder: Path) -> None:
    """Unpack Debian's package into a folder, without installing it or changing apt's settings."""
    if shutil.which("apt-get") is None or not KEYS.exists():
        raise NoComposeError("Docker Compose 2.24 is missing; install docker's Compose plugin")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        (work / "sources.list").write_text(f"deb [signed-by={KEYS}] {archive()} {SUITE} main\n")
        for part in ("lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True)
        private = {
            "Dir::Etc::SourceList": work / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": work / "lists",
            "Dir::Cache": work / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",  # apt's own user has no access to this folder
        }
        apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in private.items())]
        run([*apt, "update"], work)
        run([*apt, "download", "docker-compose"], work)
        (package,) = work.glob("docker-compose_*.deb")
        run(["dpkg-deb", "-x", str(package), "unpacked"], work)
        if not folder.exists():
            (work / "unpacked").rename(folder)


def archive() -> str:
    """Return the address of the Debian archive that this machine installs from."""
    columns = "$(ORIGIN) $(CODENAME) $(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", columns, "Created-By: Packages"]
    for line in run(command, Path.cwd()).splitlines():
        origin, codename, address = line.split(" ", 2)
        if origin == "Debian" and "security" not in codename:
            return address
    raise NoComposeError(
        "apt has no Debian archive on this machine; install docker's Compose plugin"
    )


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder and return its stdout; raise NoComposeError if it fails."""
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoComposeError(f"{command[0]} timed out after {DOWNLOAD_SECONDS} s") from None
    if result.returncode:
        raise NoComposeError(f"Docker Compose cannot be downloaded: {result.stderr.strip()}")
    return result.stdout


@dataclass(frozen=True)
class Stack:
    """The project's compose file with a test's settings and secret."""

    folder: Path
    settings: dict[str, str]

    def call(self, profile: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` with these settings; do not check its exit code."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ", "COMPOSE"))}
        (self.folder / "env").write_text("".join(f"{k}={v}\n" for k, v in self.settings.items()))
        return subprocess.run(
            [
                *compose(),
                *("--project-name", f"chunkq-test-{os.getpid()}"),
                *("--env-file", str(self.folder / "env")),
                *("--file", str(DEPLOY / "compose.yaml")),
                *("--profile", profile),
                *arguments,
            ],
            env=env,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    def services(self, profile: str) -> dict[str, Any]:
        """Return the services of a profile, as Compose resolves them."""
        result = self.call(profile, "config", "--format", "json")
        assert result.returncode == 0, result.stderr
        services: dict[str, Any] = json.loads(result.stdout)["services"]
        return services


def make_stack(folder: Path) -> Stack:
    """Write settings, a data folder and a secret into an empty folder."""
    data = folder / "data"
    data.mkdir()
    secret = folder / "secret"
    secret.write_text(PASSWORD + "\n")
    settings = {
        "CHUNKQ_DATA": str(data),
        "CHUNKQ_JOB": "job.json",
        "CHUNKQ_OUTPUT": "out.zarr",
        "CHUNKQ_SECRET": str(secret),
        "CHUNKQ_UID": "1234",
        "CHUNKQ_GID": "4321",
    }
    return Stack(folder, settings)

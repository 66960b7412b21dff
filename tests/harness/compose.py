"""Docker Compose v2: one on this machine, or Debian's package unpacked into a cache folder."""

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
"""Whatever a shell, a Redis configuration or an address could trip over."""
RUN_SECONDS = 300
OLDEST = (2, 24)
"""The first with an `env_file` that may be missing."""
SUITE = "trixie"
"""The first Debian whose package docker-compose is Compose v2."""
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PROGRAM = Path("usr/libexec/docker/cli-plugins/docker-compose")
DOWNLOAD_SECONDS = 300


class NoComposeError(Exception):
    """There is no Compose, and none can be had."""


def compose() -> list[str]:
    """The command that Compose is; without one a laptop skips, CI fails."""
    try:
        return find_compose()
    except NoComposeError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def find_compose() -> list[str]:
    """Return the command of a Compose on this machine, or of one fetched for these tests."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if is_new_enough(command):
            return command
    kept = platformdirs.user_cache_path("chunkq") / f"compose-{SUITE}" / PROGRAM
    if not kept.exists():
        fetch(kept.parents[len(PROGRAM.parts) - 1])
    if not is_new_enough([str(kept)]):
        raise NoComposeError(f"Debian's Compose does not run here: {kept}")
    return [str(kept)]


def is_new_enough(command: list[str]) -> bool:
    try:
        said = subprocess.run(
            [*command, "version", "--short"], capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    found = re.match(r"v?(\d+)\.(\d+)", said.stdout)
    return said.returncode == 0 and found is not None and tuple(map(int, found.groups())) >= OLDEST


def fetch(folder: Path) -> None:
    """Unpack Debian's package into a folder; nothing is installed, no setting of apt changes."""
    if shutil.which("apt-get") is None or not KEYS.exists():
        raise NoComposeError("there is no Docker Compose 2.24 here; install the plugin of docker")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        place = Path(name)
        (place / "sources.list").write_text(f"deb [signed-by={KEYS}] {archive()} {SUITE} main\n")
        for part in ("lists/partial", "cache/archives/partial"):
            (place / part).mkdir(parents=True)
        private = {
            "Dir::Etc::SourceList": place / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": place / "lists",
            "Dir::Cache": place / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",  # apt's own user may not write here
        }
        apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in private.items())]
        run([*apt, "update"], place)
        run([*apt, "download", "docker-compose"], place)
        (package,) = place.glob("docker-compose_*.deb")
        run(["dpkg-deb", "-x", str(package), "unpacked"], place)
        if not folder.exists():
            (place / "unpacked").rename(folder)


def archive() -> str:
    """Return the address of the Debian archive that this machine installs from."""
    columns = "$(ORIGIN) $(CODENAME) $(REPO_URI)"
    asked = ["apt-get", "indextargets", "--format", columns, "Created-By: Packages"]
    for line in run(asked, Path.cwd()).splitlines():
        origin, codename, address = line.split(" ", 2)
        if origin == "Debian" and "security" not in codename:
            return address
    raise NoComposeError("apt knows no Debian archive here; install docker's Compose plugin")


def run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NoComposeError(f"{command[0]} takes too long: {error}") from None
    if done.returncode:
        raise NoComposeError(f"Docker Compose cannot be fetched: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Stack:
    """The shipped compose file with settings and a secret of a test's own."""

    folder: Path
    settings: dict[str, str]

    def call(self, profile: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CHUNKQ", "COMPOSE"))}
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
            env=kept,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )

    def services(self, profile: str) -> dict[str, Any]:
        done = self.call(profile, "config", "--format", "json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)["services"]
        return found


def make_stack(folder: Path) -> Stack:
    """Settings, a data folder and a secret in an empty folder."""
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

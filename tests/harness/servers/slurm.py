"""A real SLURM for tests: controller and two nodes on this host, on free loopback ports."""

import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import psutil
import pytest

from tests.harness.servers.redis import free_port
from tests.harness.waiting import TIMEOUT, wait_until

NODES = ("n1", "n2")
GPUS = 2
"""Emulated GPUs per node: device nodes that SLURM grants, and no CUDA behind them."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "TIMEOUT",
}  # fmt: skip
FOREIGN = ("CHUNKQ_", "CUDA_", "NET_", "SBATCH_", "SLURM", "SRUN_")
"""Variables of whoever runs the tests, perhaps inside a SLURM job, which no job must see."""

# What each key is for:
# - loopback only, in a network namespace too: the addresses and CommunicationParameters;
# - no privileges but root's: linuxproc, task/none, no accounting, no MPI;
# - small machines: config_overrides, since the nodes claim more than there is;
# - no idle waiting: the scheduler's intervals, KillWait, and cred_expire, which is also how long a
#   requeued job waits (120 s by default; less than 5 is ignored).
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
KillWait=5
ReturnToService=2
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} {has}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {has}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
HAS = f"CPUs=64 RealMemory=512000 Gres=gpu:{GPUS}"


@dataclass(frozen=True)
class JobState:
    """What SLURM says of one job, or of one task of an array, by scontrol's names."""

    values: dict[str, str]

    @property
    def state(self) -> str:
        return self.values["JobState"]

    @property
    def exit_code(self) -> int:
        return int(self.values["ExitCode"].partition(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.values["Restarts"])

    @property
    def log(self) -> str:
        path = Path(self.values["StdOut"])
        return path.read_text() if path.exists() else ""


@dataclass
class SlurmCluster:
    """Two nodes, `NODES`, which share this host's name; `SLURMD_NODENAME` tells them apart."""

    folder: Path
    programs: dict[str, str]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need, without anything of the tests' own surroundings."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, program: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands, or another program beside it, to its end."""
        return subprocess.run(
            [self.programs.get(program, program), *arguments],
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def ask(self, program: str, *arguments: str) -> str:
        """Run a command that must succeed; returns what it prints."""
        ended = self.run(program, *arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        **environment: str,
    ) -> str:
        """Submit a script from the folder `cwd`, where its logs go; returns the job's id."""
        command = ("--parsable", *options, str(script), *arguments)
        ended = self.run("sbatch", *command, cwd=cwd or script.parent, **environment)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    def states(self, job: str) -> list[JobState]:
        """What SLURM says of a job, or of each task of an array, in their order."""
        lines = self.ask("scontrol", "--oneliner", "show", "job", job).splitlines()
        found = [dict(re.findall(r"(?:^| )(\w+)=(.*?)(?= \w+=|$)", line)) for line in lines]
        # Tasks that have not started yet are one entry, `0-3`.
        order = [int(re.findall(r"\d+", values.get("ArrayTaskId", "0"))[0]) for values in found]
        return [
            JobState(values)
            for _, values in sorted(zip(order, found, strict=True), key=itemgetter(0))
        ]

    def wait(self, job: str, patience: float = TIMEOUT) -> list[JobState]:
        """Wait until a job has ended, all tasks of it, requeued ones included."""
        limit = time.monotonic() + patience
        while any(one.state not in ENDED for one in self.states(job)):
            if time.monotonic() > limit:
                raise AssertionError(f"waited in vain for job {job}\n{self.told(job)}")
            time.sleep(0.1)
        return self.states(job)

    def succeeded(self, job: str, patience: float = TIMEOUT) -> list[JobState]:
        """Wait until a job has ended, and as it should."""
        states = self.wait(job, patience)
        if any(one.state != "COMPLETED" for one in states):
            raise AssertionError(self.told(job))
        return states

    def empty(self) -> None:
        """Cancel every job and wait until none of their processes is left."""
        self.run("scancel", "--full", "--user", "root")
        wait_until(lambda: not self.ask("squeue", "--noheader"), "SLURM has no job")

    def told(self, job: str) -> str:
        """All that is known of a job, for a failed test's message."""
        return "\n".join(f"{one.values}\n{one.log}" for one in self.states(job))

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        folder, host = self.folder, socket.gethostname()
        (folder / "state").mkdir()
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
        for number in range(GPUS):
            os.mknod(folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        gpus = f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]"
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} {gpus}\n")
        (folder / "key").write_bytes(os.urandom(64))
        (folder / "key").chmod(0o400)
        ports = [free_port() for _ in NODES]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host, folder=folder, nodes=NODES, ports=ports, controller=free_port(), has=HAS
            )
        )
        self._switch_cgroups_off(folder)
        # Forced, since it would have the socket's folder open to other users.
        files = {"socket": "munge", "key": "key", "pid": "pid", "seed": "seed", "log": "munge.log"}
        plural = {"key": "key-file", "pid": "pid-file", "seed": "seed-file", "log": "log-file"}
        options = (f"--{plural.get(k, k)}={folder / name}" for k, name in files.items())
        self._start("munged", "--foreground", "--force", *options)
        self._until((folder / "munge").is_socket, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self._until(self._is_ready, "slurmctld")

    def _switch_cgroups_off(self, folder: Path) -> None:
        """Have SLURM run where no cgroup file system is mounted, which it wants since 23.11."""
        command = [self.programs["slurmd"], "-V"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        version = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
        if version >= (23, 11):
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _is_ready(self) -> bool:
        states = self.run("scontrol", "--oneliner", "show", "node").stdout
        return len(re.findall(r" State=IDLE ", states)) == len(NODES)

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.said").open("ab") as said:
            process = subprocess.Popen(
                [self.programs[program], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=self.environment,
                start_new_session=True,
            )
        self._daemons.append(process)

    def _until(self, is_true: Callable[[], bool], program: str) -> None:
        limit = time.monotonic() + TIMEOUT
        while not is_true():
            said = "\n".join(path.read_text() for path in self.folder.glob("*.said"))
            assert all(daemon.poll() is None for daemon in self._daemons), said
            assert time.monotonic() < limit, f"{program} is not ready\n{said}"
            time.sleep(0.1)

    def stop(self) -> None:
        """End everything that was started in it, the jobs' own processes included."""
        if all(daemon.poll() is None for daemon in self._daemons):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.empty()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Every living process that belongs to this SLURM, told by its environment."""
        mine = f"SLURM_CONF={self.folder}".encode()
        found = []
        for process in psutil.process_iter():
            # As bytes: slurmstepd writes its title over the start of its environment.
            with suppress(OSError):
                if mine in Path(f"/proc/{process.pid}/environ").read_bytes():
                    found.append(process)
        return found

    def job_processes(self) -> list[psutil.Process]:
        """Every living process that a job has started; daemons and their helpers are none of it."""
        daemons = {daemon.pid for daemon in self._daemons}
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if not daemons & {process.pid, process.ppid()}:
                    found.append(process)
        return found


def programs() -> dict[str, str]:
    """SLURM's programs by name; without them, or without root, a laptop skips, CI fails."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = {name: shutil.which(name, path=path) for name in PROGRAMS}
    missing = [name for name, place in found.items() if place is None]
    reason = ""
    if missing:
        reason = (
            f"no {', '.join(missing)} on this machine: apt-get install munge slurm-client "
            "slurmctld slurmd"
        )
    elif os.geteuid() != 0:
        reason = "SLURM's daemons need root, as do the device nodes that stand for GPUs"
    elif not _host_is_local():
        reason = (
            f"this host's name, {socket.gethostname()}, is no address of its own: SLURM needs it"
        )
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    return {name: place for name, place in found.items() if place is not None}


def _host_is_local() -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind((socket.gethostname(), 0))
        return True
    return False


@contextmanager
def resolvable_loopback() -> Iterator[None]:
    """Let SLURM resolve 127.0.0.1 where only `lo` is up, as in a fresh network namespace.

    It asks glibc for addresses of configured kinds only, and 127.0.0.1 alone counts as none.
    """
    try:
        socket.getaddrinfo("127.0.0.1", 1, socket.AF_INET, flags=socket.AI_ADDRCONFIG)
        also: list[str] = []
    except socket.gaierror:
        also = ["127.0.0.2/8", "dev", "lo"]
        subprocess.run(["ip", "address", "add", *also], check=True, timeout=TIMEOUT)
    try:
        yield
    finally:
        if also:
            subprocess.run(["ip", "address", "del", *also], check=True, timeout=TIMEOUT)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A running SLURM in a folder of its own; nothing of it is left at the end."""
    found = programs()
    # Not pytest's folder: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, resolvable_loopback():
        cluster = SlurmCluster(Path(folder), found)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()

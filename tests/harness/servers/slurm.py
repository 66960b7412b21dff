"""A SLURM cluster for tests: controller and two nodes on this host, on free loopback ports."""

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
"""Emulated GPUs per node: device nodes that SLURM allocates, without CUDA."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "TIMEOUT",
}  # fmt: skip
FOREIGN = ("CHUNKQ_", "CUDA_", "NET_", "SBATCH_", "SLURM", "SRUN_")
"""Prefixes of environment variables that no job may inherit; tests may run in a SLURM job."""

# Purpose of the keys:
# - loopback only, also in a network namespace: the addresses and CommunicationParameters;
# - no privileges other than root's: linuxproc, task/none, no accounting, no MPI;
# - small machines: config_overrides, because the nodes declare more resources than exist;
# - no idle waiting: the scheduler's intervals, KillWait and cred_expire. The last is also the
#   delay of a requeued job (120 s by default; SLURM ignores less than 5), and longer than KillWait
#   (30 s by default): a node that was set to down kills the job's steps again then, also new ones;
# - jobs of the partition `spare` are requeued for those of `main`; KillWait is their grace.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=9
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
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} {resources}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {resources}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=2
PartitionName=spare Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
"""
RESOURCES = f"CPUs=64 RealMemory=512000 Gres=gpu:{GPUS}"


@dataclass(frozen=True)
class JobState:
    """State of one job, or of one task of an array, under the names that scontrol prints."""

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
    """A cluster of two nodes, `NODES`, on this host; `SLURMD_NODENAME` identifies a node."""

    folder: Path
    programs: dict[str, str]
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of SLURM's commands, without the variables in `FOREIGN`."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self, program: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command or another program in the cluster's environment."""
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

    def check_output(self, program: str, *arguments: str) -> str:
        """Run a command, assert exit code 0 and return its stdout."""
        result = self.run(program, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def sbatch(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        **environment: str,
    ) -> str:
        """Submit a script from the folder `cwd`, where its logs go; return the job's id."""
        command = ("--parsable", *options, str(script), *arguments)
        result = self.run("sbatch", *command, cwd=cwd or script.parent, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def states(self, job: str) -> list[JobState]:
        """Return the state of a job, or of each task of an array, in task order."""
        lines = self.check_output("scontrol", "--oneliner", "show", "job", job).splitlines()
        tasks = [dict(re.findall(r"(?:^| )(\w+)=(.*?)(?= \w+=|$)", line)) for line in lines]
        # Tasks that have not started yet are one entry, `0-3`.
        order = [int(re.findall(r"\d+", values.get("ArrayTaskId", "0"))[0]) for values in tasks]
        return [
            JobState(values)
            for _, values in sorted(zip(order, tasks, strict=True), key=itemgetter(0))
        ]

    def wait(self, job: str, timeout: float = TIMEOUT) -> list[JobState]:
        """Wait until a job and all its tasks have ended; requeued ones run again first."""
        limit = time.monotonic() + timeout
        while any(one.state not in ENDED for one in self.states(job)):
            if time.monotonic() > limit:
                raise AssertionError(f"timed out waiting for job {job}\n{self._describe(job)}")
            time.sleep(0.1)
        return self.states(job)

    def wait_for_success(self, job: str, timeout: float = TIMEOUT) -> list[JobState]:
        """Wait until a job has ended; assert that it completed."""
        states = self.wait(job, timeout)
        if any(one.state != "COMPLETED" for one in states):
            raise AssertionError(self._describe(job))
        return states

    def cancel_all(self) -> None:
        """Cancel every job and wait until the queue is empty."""
        self.run("scancel", "--full", "--user", "root")
        wait_until(lambda: not self.check_output("squeue", "--noheader"), "SLURM has no job")

    def _describe(self, job: str) -> str:
        """Return all state and logs of a job, for the message of a failed test."""
        return "\n".join(f"{one.values}\n{one.log}" for one in self.states(job))

    def start(self) -> None:
        """Start the daemons and wait until both nodes accept jobs."""
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
                host=host,
                folder=folder,
                nodes=NODES,
                ports=ports,
                controller=free_port(),
                resources=RESOURCES,
            )
        )
        self._disable_cgroups(folder)
        # --force, because munged otherwise requires that other users can read the socket's folder.
        files = {"socket": "munge", "key": "key", "pid": "pid", "seed": "seed", "log": "munge.log"}
        plural = {"key": "key-file", "pid": "pid-file", "seed": "seed-file", "log": "log-file"}
        options = (f"--{plural.get(k, k)}={folder / name}" for k, name in files.items())
        self._start("munged", "--foreground", "--force", *options)
        self._until((folder / "munge").is_socket, "munged")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self._until(self._is_ready, "slurmctld")

    def _disable_cgroups(self, folder: Path) -> None:
        """Disable cgroups, which SLURM 23.11 and later require otherwise."""
        command = [self.programs["slurmd"], "-V"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        version = tuple(int(part) for part in re.findall(r"\d+", output)[:2])
        if version >= (23, 11):
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _is_ready(self) -> bool:
        states = self.run("scontrol", "--oneliner", "show", "node").stdout
        return len(re.findall(r" State=IDLE ", states)) == len(NODES)

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as output:
            process = subprocess.Popen(
                [self.programs[program], *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
                start_new_session=True,
            )
        self._daemons.append(process)

    def _until(self, is_true: Callable[[], bool], program: str) -> None:
        limit = time.monotonic() + TIMEOUT
        while not is_true():
            output = "\n".join(path.read_text() for path in self.folder.glob("*.out"))
            assert all(daemon.poll() is None for daemon in self._daemons), output
            assert time.monotonic() < limit, f"{program} is not ready\n{output}"
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop the daemons and kill every process of the cluster and its jobs."""
        if all(daemon.poll() is None for daemon in self._daemons):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.cancel_all()
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
        """Return every process with this cluster's SLURM_CONF in its environment."""
        variable = f"SLURM_CONF={self.folder}".encode()
        processes = []
        for process in psutil.process_iter():
            # As bytes: slurmstepd writes its title over the start of its environment.
            with suppress(OSError):
                if variable in Path(f"/proc/{process.pid}/environ").read_bytes():
                    processes.append(process)
        return processes

    def job_processes(self) -> list[psutil.Process]:
        """Return every process that a job started, without the daemons and their children."""
        daemons = {daemon.pid for daemon in self._daemons}
        processes = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if not daemons & {process.pid, process.ppid()}:
                    processes.append(process)
        return processes


def programs() -> dict[str, str]:
    """Return the paths of SLURM's programs; without them or root, skip the test, or fail in CI."""
    search_path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    paths = {name: shutil.which(name, path=search_path) for name in PROGRAMS}
    missing = [name for name, path in paths.items() if path is None]
    reason = ""
    if missing:
        reason = (
            f"{', '.join(missing)} missing; run apt-get install munge slurm-client slurmctld slurmd"
        )
    elif os.geteuid() != 0:
        reason = "SLURM's daemons and the GPU device nodes need root; run the tests as root"
    elif not _host_is_local():
        name = socket.gethostname()
        reason = f"host name {name} is not an address of this machine; add it to /etc/hosts"
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    return {name: path for name, path in paths.items() if path is not None}


def _host_is_local() -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind((socket.gethostname(), 0))
        return True
    return False


@contextmanager
def resolvable_loopback() -> Iterator[None]:
    """Let SLURM resolve 127.0.0.1 where only `lo` is up, as in a new network namespace.

    SLURM calls getaddrinfo with AI_ADDRCONFIG, which does not count 127.0.0.1 as configured.
    """
    try:
        socket.getaddrinfo("127.0.0.1", 1, socket.AF_INET, flags=socket.AI_ADDRCONFIG)
        address: list[str] = []
    except socket.gaierror:
        address = ["127.0.0.2/8", "dev", "lo"]
        subprocess.run(["ip", "address", "add", *address], check=True, timeout=TIMEOUT)
    try:
        yield
    finally:
        if address:
            subprocess.run(["ip", "address", "del", *address], check=True, timeout=TIMEOUT)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Run a SLURM cluster in a new folder; stop it and all its processes at the end."""
    paths = programs()
    # Not pytest's folder: a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, resolvable_loopback():
        cluster = SlurmCluster(Path(folder), paths)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()

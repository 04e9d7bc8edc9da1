"""What the tests of launchers share: a launcher as a process, waiting for what it does, and a Slurm of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from research.files import read_json

_DEADLINE = 240.0


@pytest.fixture
def launcher(commands):
    """`(name, *words, **options) -> Popen` of `python -m launch.NAME`; what is left of them is killed at the end."""
    started = []

    def start(name, *words, **options):
        command = [sys.executable, "-m", f"launch.{name}", *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes, **({"env": commands.environment} | options)))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def sweep(launcher, commands, tmp_path):
    """`(*flags, launcher="local") -> Popen` of a launcher of the depth ablation in the folder `work` here."""

    def start(*flags, name="local", **options):
        cache = f"--compilation_cache={commands.cache}"
        return launcher(name, "depth_ablation", *flags, f"--workdir={tmp_path / 'work'}", cache, **options)

    return start


@pytest.fixture(scope="session")
def wait_for():
    """`(question) -> its first answer that is true`, asked again and again."""
    return _wait_for


def _wait_for(question: Callable[[], object]) -> object:
    deadline = time.monotonic() + _DEADLINE
    while not (answer := question()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return answer


@pytest.fixture
def digest():
    """`(run folder) -> SHA-256 of the final state` of a finished run."""
    return lambda folder: read_json(folder / "result.json")["final_state_sha256"]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`(name, body) -> None`: puts a shell script of that name before all other programs."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name, body):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return write


# Slurm

_DAEMONS = ("munged", "slurmctld", "slurmd")
# The lines that matter: `cred_expire` lets a requeued job start again after 6 s (the default: 121 s), NoInAddrAny binds
# the loopback address alone, linuxproc needs no cgroups, and config_overrides lets nodes claim CPUs that are not there.
_CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmdTimeout=5
KillWait=20
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=cpu Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """A running Slurm of two nodes, `n1` and `n2`, of two CPUs each; partitions `cpu` and `urgent`, which preempts.

    Attributes:
      variables: what the environment of a Slurm command needs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        for name in ("state", "spool/n1", "spool/n2", "log", "munge"):
            (self.folder / name).mkdir(parents=True)
        munge = self.folder / "munge"
        for path in (self.folder, munge):
            path.chmod(0o755)
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "slurm.conf").write_text(_CONF.format(folder=self.folder, ports=_free_ports(3)))
        files = [f"--{name}={munge / name}" for name in ("pid-file", "log-file", "seed-file", "socket")]
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *files)
        _wait_for((munge / "socket").exists)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        for node in ("n1", "n2"):
            _wait_for(lambda node=node: "idle" in self.ask("sinfo", "-h", "-n", node, "-o", "%T"))

    @property
    def nodes(self) -> list[str]:
        return [name for name in self._daemons if name.startswith("n")]

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-c", "-N", node, _TEST_NODE=node)

    def kill_node(self, node: str) -> None:
        """Kills the node's daemon and all that it started, as when a machine loses its power."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for variable in ("_TEST_NODE", "SLURMD_NODENAME"):
            self._kill_all(f"{variable}={node}")

    def ask(self, *command: object) -> str:
        """What a Slurm command prints."""
        words, environment = list(map(str, command)), os.environ | self.variables
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()

    def processes(self, *variables: str) -> list[int]:
        """Ids of this Slurm's processes that have these variables, written `name=value`, in their environment."""
        wanted = {f"SLURM_CONF={self.variables['SLURM_CONF']}".encode(), *(each.encode() for each in variables)}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
        return found

    def stop(self) -> None:
        """Ends every daemon and every job; whatever state they are in."""
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        self._kill_all()

    def _kill_all(self, *variables: str) -> None:
        # Again until none is left: a process may start another while the list is made.
        def none_left():
            found = [process for process in self.processes(*variables) if process != os.getpid()]
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return not found

        _wait_for(none_left)

    def _daemon(self, name: str, *command: str, **variables: str) -> None:
        environment = os.environ | self.variables | variables
        with open(self.folder / "log" / f"{name}.out", "ab") as output:
            # The kernel ends them too where the tests' process is killed.
            words = ["setpriv", "--pdeathsig", "KILL", *command]
            self._daemons[name] = subprocess.Popen(words, env=environment, stdout=output, stderr=output)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm of the tests' own; they skip where its programs are not installed or this is not root."""
    missing = [name for name in (*_DAEMONS, "sbatch", "setpriv") if not shutil.which(name)]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root here")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

"""One run over several processes: the network of one process, whoever dies on the way, on one machine and on two."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch import hosts
from research.errors import UsageError
from research.files import read_json
from research.training import checkpoint, run_folder

ENDS_WITHIN = 30  # seconds, as README says
LOST = "another process of this run was lost; start all of them again with the same commands, they go on from the last"


def free_port(host="127.0.0.1"):
    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]


class Hosts:
    """Starts all processes of a run; what is left of them at the end is killed."""

    def __init__(self, commands, folder):
        self._commands, self._folder, self._left = commands, folder, []

    def start(self, *flags, of_each=((), ()), prefixes=((), ()), host="127.0.0.1", **environment):
        """Processes that write to files: `.out`, `.err`."""
        coordinator, processes = f"--coordinator={host}:{free_port()}", []
        own = [coordinator, f"--num_processes={len(of_each)}"]
        for process, (further, prefix) in enumerate(zip(of_each, prefixes, strict=True)):
            line = [*prefix, sys.executable, "-m", "launch.hosts", "depth_ablation", *own, f"--process_id={process}"]
            line += [f"--compilation_cache={self._commands.cache}", *self._commands.tiny, *flags, *further]
            files = [self._folder / f"{len(self._left)}.{name}" for name in ("out", "err")]
            with open(files[0], "w") as out, open(files[1], "w") as err:
                options = {"env": self._commands.environment | environment, "cwd": Path(hosts.__file__).parents[1]}
                started = subprocess.Popen(list(map(str, line)), stdout=out, stderr=err, **options)
            started.out, started.err = (path.read_text for path in files)
            self._left.append(started)
            processes.append(started)
        return processes

    def stop(self):
        for process in self._left:
            for pid in (*children(process), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def children(process):
    with contextlib.suppress(OSError):
        return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    return []


@pytest.fixture(scope="module")
def module_hosts(commands, tmp_path_factory):
    started = Hosts(commands, tmp_path_factory.mktemp("output"))
    yield started
    started.stop()


@pytest.fixture
def start(commands, tmp_path):
    started = Hosts(commands, tmp_path)
    yield started.start
    started.stop()


def end(processes, codes, timeout=300):
    """Waits for all; they end with these codes."""
    deadline = time.monotonic() + timeout
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    told = "\n".join(f"--- process {number}:\n{each.err()[-3000:]}" for number, each in enumerate(processes))
    assert [process.poll() for process in processes] == codes, told
    return told


def steps_taken(workdir):
    return max((int(path.stem[5:]) for path in workdir.glob("runs/*/checkpoints/step_*")), default=-1)


def wait_for_step(workdir, step, processes):
    deadline = time.monotonic() + 240
    while steps_taken(workdir) < step:
        assert time.monotonic() < deadline and all(each.poll() is None for each in processes), end(processes, None, 1)
        time.sleep(0.01)


def state_and_metrics(workdir):
    [folder] = workdir.glob("runs/*")
    return checkpoint.latest(folder / "checkpoints").arrays, run_folder.read_metrics(folder), folder


FLAGS = ("--steps=40", "--evaluations=40", "--steps_per_call=1", "--devices=2", "--parallel=pmap")


@pytest.fixture(scope="module")
def uninterrupted(module_hosts, tmp_path_factory):
    """The working folder of a run over two processes that nothing befell; the second one may not write there."""
    workdir, other = tmp_path_factory.mktemp("whole") / "work", tmp_path_factory.mktemp("other") / "work"
    processes = module_hosts.start(*FLAGS, of_each=((f"--workdir={workdir}",), (f"--workdir={other}",)))
    end(processes, [0, 0])
    assert not other.exists()
    assert "residual" in processes[0].out() and "written:" in processes[0].out()
    assert processes[1].out() == "" and "done;" not in processes[1].err()
    return workdir


def test_two_processes_end_with_the_network_of_one(uninterrupted, commands, tmp_path):
    alone = commands.run(*commands.tiny, *FLAGS, f"--workdir={tmp_path}")
    assert alone.returncode == 0, alone.stderr
    (state, metrics, folder), (other_state, other_metrics, other) = map(state_and_metrics, (tmp_path, uninterrupted))
    assert state.keys() == other_state.keys() and state["step"] == 40
    for name, array in state.items():
        np.testing.assert_allclose(other_state[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert len(metrics) == len(other_metrics) == 80
    for one, two in zip(metrics, other_metrics, strict=True):
        np.testing.assert_allclose([two[name] for name in one], list(one.values()), rtol=0, atol=1e-6)
    environment, of_one = (read_json(each / "environment.json") for each in (other, folder))
    assert (environment["processes"], of_one["processes"]) == (2, 1)
    assert environment["devices"] == of_one["devices"] and environment["devices"]["count"] == 2
    assert environment["command"] == of_one["command"] and "launch.host_process" in environment["argv"]


def test_whoever_is_lost_the_others_end_and_all_go_on_from_the_last_checkpoint(uninterrupted, start, tmp_path):
    work = tmp_path / "work"
    reached = 0
    # Which process, what befalls it, how it ends, how the other one ends.
    for victim, number, code, other_code in (
        (1, signal.SIGKILL, 137, 76),
        (0, signal.SIGKILL, 137, 76),
        (1, signal.SIGSTOP, None, 76),
        (1, signal.SIGTERM, 75, 75),
    ):
        processes = start(*FLAGS, f"--workdir={work}")
        wait_for_step(work, reached + random.randint(1, 5), processes)
        if number == signal.SIGTERM:
            processes[victim].terminate()  # handed on to the child, and told to the other
        else:
            [child] = children(processes[victim])
            os.kill(child, number)
        other, since = processes[1 - victim], time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(ENDS_WITHIN)
        print(f"{number.name} to process {victim}: the other one ended after {time.monotonic() - since:.1f} s")
        assert other.poll() == other_code, f"{number.name} to {victim}: {other.poll()}\n{other.err()[-3000:]}"
        assert f"error: process {1 - victim} of 2: {LOST}" in other.err() or other_code == 75
        if code is None:  # it stands still for good
            os.kill(child, signal.SIGKILL)
            code = 137
        end([processes[victim]], [code], 60)
        if code == 137:
            assert f"error: process {victim} of 2 was ended by SIGKILL" in processes[victim].err()
        reached = steps_taken(work)
        assert reached < 40, "it was done before anything befell it"
    assert "stopped at step" in processes[0].err() and "process 1 of 2, with the others" in processes[1].err()
    processes = start(*FLAGS, f"--workdir={work}")
    end(processes, [0, 0])
    assert f"going on from step {reached}" in processes[0].err()
    whole, again = (read_json(next(each.glob("runs/*")) / "result.json") for each in (uninterrupted, work))
    assert again["final_state_sha256"] == whole["final_state_sha256"]
    assert state_and_metrics(work)[1] == state_and_metrics(uninterrupted)[1]


def test_a_failure_keeps_its_code_and_its_line(start, tmp_path):
    folder = tmp_path / "work" / "runs" / "residual-8-w4-seed0"
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")
    processes = start("--steps=4", f"--workdir={tmp_path / 'work'}")
    end(processes, [1, 76], ENDS_WITHIN + 120)
    assert "has checkpoints but no config.json" in processes[0].err() and LOST not in processes[0].err()
    assert LOST in processes[1].err()


def test_processes_that_were_asked_for_different_things_are_told(start, tmp_path):
    processes = start(f"--workdir={tmp_path / 'work'}", of_each=(("--steps=4",), ("--steps=5",)))
    end(processes, [76, 2], ENDS_WITHIN + 120)
    assert "process 1 has another cells than process 0" in processes[1].err()


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_waits_in_vain_says_for_what(start, tmp_path, process):
    own = (f"--process_id={process}", "--num_processes=2", "--start_timeout=2")  # the last of two flags counts
    [process] = start(f"--workdir={tmp_path}", *own, of_each=((),), prefixes=((),))
    end([process], [76], ENDS_WITHIN + 120)
    assert "not all processes came together at 127.0.0.1:" in process.err() and "Traceback" not in process.err()


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "3", "SLURM_PROCID": "2", "SLURM_JOB_NODELIST": "n[01-3,7],m"}


def place(*words, **environment):
    own = hosts.own_flags()
    own(["hosts", *words])
    return tuple(hosts.place_of(own, environment))


def test_slurm_says_where_and_who(monkeypatch):
    assert place(**SLURM) == ("n01:61441", 3, 2)
    assert place(**SLURM, SLURM_STEP_NODELIST="m[5-9]") == ("m5:61441", 3, 2)
    assert place("--coordinator=10.0.0.1:99", "--process_id=1", **SLURM) == ("10.0.0.1:99", 3, 1)  # flags count more


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[3,5]", "n3"), ("r[1-2]n[007-010].x,z", "r1n007.x"), ("gpu-a-1,gpu-a-2", "gpu-a-1")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert hosts.first_node(nodes) == first


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "--coordinator and --num_processes and --process_id missing: give .* by srun"),
        (("--coordinator=a:1", "--num_processes=2"), "--process_id missing"),
        (("--coordinator=a", "--num_processes=2", "--process_id=0"), "give HOST:PORT"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "of 2 processes the last is 1"),
    ],
)
def test_a_place_that_is_none_is_refused(words, reason):
    with pytest.raises(UsageError, match=reason):
        place(*words)


def test_what_cannot_be_spread_is_refused(commands):
    def refused(*words, experiment="depth_ablation", **environment):
        line = [sys.executable, "-m", "launch.hosts", experiment, "--coordinator=a:1", "--num_processes=2", *words]
        done = subprocess.run(
            [*line, "--process_id=0"], env=commands.environment | environment, capture_output=True, text=True
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    assert "--devices=3 do not divide by 2 processes" in refused("--devices=3", "--batch_size=12")
    assert "NPROC=2 threads are too few for 2 devices a process" in refused("--devices=4", NPROC="2")
    assert "memory trains nothing over several devices" in refused(experiment="memory")


@pytest.fixture
def network():
    """Two network namespaces, as two machines with a cable: prefixes of commands in them, and the cable's address."""
    names, etc = [f"carousel{os.getpid()}{side}" for side in "ab"], Path("/etc/netns")
    had_etc = etc.exists()

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"ip netns add: {made.stderr.strip()}")
        cable = ip(
            "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]
        )
        if cable.returncode:
            pytest.skip(f"ip link add: {cable.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            # Gloo tells the others the address that the host's name stands for: `ip netns exec` puts this in its place.
            (etc / name).mkdir(parents=True)
            lines = f"127.0.0.1 localhost\n10.213.7.{number} {socket.gethostname()}\n"
            (etc / name / "hosts").write_text(lines)
            for words in (
                ("addr", "add", f"10.213.7.{number}/24", "dev", "cable"),
                ("link", "set", "cable", "up"),
                ("link", "set", "lo", "up"),
            ):
                assert ip("-n", name, *words).returncode == 0
        yield (
            [("ip", "netns", "exec", name) for name in names],
            "10.213.7.1",
            lambda: ip("-n", names[1], "link", "set", "cable", "down"),
        )
    finally:
        for name in names:
            ip("netns", "del", name)
            shutil.rmtree(etc / name, ignore_errors=True)
        if not had_etc and etc.exists():
            etc.rmdir()


def test_two_machines_train_one_network_and_both_end_when_the_cable_is_cut(uninterrupted, network, start, tmp_path):
    prefixes, host, cut = network
    work = tmp_path / "work"
    processes = start(*FLAGS, f"--workdir={work}", prefixes=prefixes, host=host)
    wait_for_step(work, 3, processes)
    assert cut().returncode == 0
    end(processes, [76, 76], ENDS_WITHIN)
    assert all(LOST in process.err() for process in processes)
    assert steps_taken(work) < 40
    # Here again, on one machine, from where the two of them were.
    end(start(*FLAGS, f"--workdir={work}"), [0, 0])
    assert (
        read_json(next(work.glob("runs/*")) / "result.json")["final_state_sha256"]
        == read_json(next(uninterrupted.glob("runs/*")) / "result.json")["final_state_sha256"]
    )

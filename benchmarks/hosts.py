"""Several hosts on one machine, joined by a real, slow network, for tests and measurements across nodes.

    with Hosts(2, rate="1gbit") as hosts:
        done = hosts.mpirun(2, "program.py", timeout_s=60)      # 2 ranks on each of the 2 hosts

A host is a Linux network namespace with one interface, ``eth0``; a bridge in a further namespace joins them, and token
buckets (``tc tbf``) at both ends of each link give it the bandwidth that was asked for. Processes of a host also have a
``/dev/shm`` and a host name of their own. So ranks of one host share memory, and ranks of different hosts have the
network alone, as MPI finds too: ``Split_type(COMM_TYPE_SHARED)`` gives one node a host.

MPICH's launcher starts the ranks (Open MPI's does not start reliably here). Needs Linux, root, ``ip``, ``tc``,
``unshare``, and a Python with the ``mpich`` wheel; :func:`missing` says what is not there.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

__all__ = ["Hosts", "missing"]

_PREFIX = "dpoptim"
_SWITCH = "switch"

# Called as `launch ADDRESS COMMAND`, by hydra as `launch -x ADDRESS COMMAND...`: runs a shell command on that host.
_LAUNCHER = """#!/bin/sh
[ "$1" = -x ] && shift
address=$1; shift
number=$((${{address##*.}} - 1))
exec ip netns exec {prefix}-$number unshare --uts --mount sh -c \\
    "hostname host$number; mount -t tmpfs tmpfs /dev/shm; exec $*"
"""


def missing() -> str | None:
    """Return why hosts cannot be made here, or None if they can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    for tool in ("ip", "tc", "unshare", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: iproute2, util-linux)"
    if not _launcher_path().exists():
        return f"no MPICH beside this Python: {_launcher_path()} does not exist"
    probe = f"{_PREFIX}-{os.getpid()}-probe"
    try:
        _run("ip", "netns", "add", probe)
        try:
            _run("ip", "-n", probe, "link", "add", "name", "eth0", "type", "veth", "peer", "name", "eth1")
            _run("tc", "-n", probe, "qdisc", "add", "dev", "eth0", "root", *_shape("1gbit"))
        finally:
            _run("ip", "netns", "del", probe)
    except RuntimeError as error:
        return f"this machine lets root make no shaped network namespaces: {error}"
    return None


class Hosts:
    """Network namespaces that act as hosts, from ``__enter__`` to ``__exit__``.

    Parameters
    ----------
    num_hosts : int
        How many, 1 to 250.
    rate : str, optional
        Bandwidth of each host's link in each direction, as ``tc`` writes it: ``"1gbit"``, ``"100mbit"``. By default
        as fast as the machine is.
    delay : str, optional
        Latency added in each direction of each link: ``"100us"``; needs the kernel's ``netem``.

    Attributes
    ----------
    addresses : list of str
        The hosts' IP addresses; the first is also where the launcher runs.
    """

    def __init__(self, num_hosts: int, *, rate: str | None = None, delay: str | None = None) -> None:
        if not 1 <= num_hosts <= 250:
            raise ValueError(f"num_hosts must be 1 to 250, got {num_hosts}")
        self.num_hosts = num_hosts
        self.rate = rate
        self.delay = delay
        self.addresses = [f"10.77.0.{number + 1}" for number in range(num_hosts)]
        self._prefix = f"{_PREFIX}-{os.getpid()}-{id(self) & 0xFFFFFF:x}"
        self._made: list[str] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Hosts":
        """Make the hosts; those that a killed process has left behind are removed first."""
        _remove_abandoned()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts and remove them; a second call does nothing."""
        for name in self._made:
            _remove(name)
        self._made.clear()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def mpirun(
        self,
        ranks_per_host: int | Sequence[int],
        *args: str,
        timeout_s: float = 60,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python program on all hosts and return what became of it.

        Parameters
        ----------
        ranks_per_host : int or sequence of int
            For every host, or for each in turn. Ranks are numbered host by host.
        *args : str
            What follows ``python`` on the command line.
        timeout_s : float
            After so long every process on the hosts is killed, and ``subprocess.TimeoutExpired`` is raised with what
            they had written.
        env : dict, optional
            Further environment variables of the ranks.
        cwd : Path, optional
            Directory to run in.
        """
        assert self._directory is not None, "mpirun works within the with statement"
        ranks = [ranks_per_host] * self.num_hosts if isinstance(ranks_per_host, int) else list(ranks_per_host)
        if len(ranks) != self.num_hosts or min(ranks) < 1:
            raise ValueError(f"ranks_per_host must have a number >= 1 for each of {self.num_hosts} hosts, got {ranks}")
        places = ",".join(f"{address}:{count}" for address, count in zip(self.addresses, ranks, strict=True))
        launch = str(Path(self._directory.name, "launch"))
        mpiexec = [
            *(str(_launcher_path()), "-launcher", "ssh", "-launcher-exec", launch),
            *("-hosts", places, "-iface", "eth0", "-n", str(sum(ranks)), sys.executable, *args),
        ]
        command = [launch, self.addresses[0], shlex.join(mpiexec)]  # starts the first host's ranks itself
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **_USE_THE_NETWORK, **(env or {})}
        # The launcher's own session: a Ctrl-C comes to this process alone, which then ends the rest in order.
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            errors="replace",  # a character may be cut where ranks write at once
            env=environment,
            cwd=cwd,
            start_new_session=True,
        ) as job:
            try:
                output, errors = job.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as late:
                self._end_processes(job)
                late.stdout, late.stderr = job.communicate()
                raise
            except BaseException:
                self._end_processes(job)
                raise
        self._end_processes(job)  # a rank that outlived the launcher
        return subprocess.CompletedProcess(command, job.returncode, output, errors)

    # ---------------------------------------------------------------- how

    def _namespace(self, host: int | str) -> str:
        return f"{self._prefix}-{host}"

    def _make(self) -> None:
        switch = self._add_namespace(_SWITCH)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, address in enumerate(self.addresses):
            host, port = self._add_namespace(number), f"port{number}"
            _run("ip", "-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
            for namespace, interface in ((host, "lo"), (host, "eth0"), (switch, port)):
                _run("ip", "-n", namespace, "link", "set", interface, "up")
            for namespace, interface in ((host, "eth0"), (switch, port)):
                self._shape_link(namespace, interface)
        self._directory = tempfile.TemporaryDirectory(prefix=_PREFIX)
        launcher = Path(self._directory.name, "launch")
        launcher.write_text(_LAUNCHER.format(prefix=self._prefix))
        launcher.chmod(0o700)

    def _add_namespace(self, host: int | str) -> str:
        name = self._namespace(host)
        _run("ip", "netns", "add", name)
        self._made.append(name)
        return name

    def _shape_link(self, namespace: str, interface: str) -> None:
        command = ("tc", "-n", namespace, "qdisc", "add", "dev", interface)
        if self.rate is not None:
            _run(*command, "root", "handle", "1:", *_shape(self.rate))
        if self.delay is not None:
            parent = ("root",) if self.rate is None else ("parent", "1:")
            _run(*command, *parent, "netem", "delay", self.delay)

    def _end_processes(self, job: "subprocess.Popen[str]") -> None:
        for name in self._made:
            _kill_processes(name)
        if job.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


# MPICH would find the memory below the namespaces and cheat.
_USE_THE_NETWORK = {
    "FI_PROVIDER": "tcp",
    "FI_TCP_IFACE": "eth0",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "eth0",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def _launcher_path() -> Path:
    return Path(sys.executable).parent / "mpiexec.hydra"


def _shape(rate: str) -> tuple[str, ...]:
    """Return the token bucket: bursts of 256 KiB, so that its timer's granularity costs no bandwidth."""
    return ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _kill_processes(namespace: str) -> None:
    with contextlib.suppress(RuntimeError):  # the namespace is gone
        for pid in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _remove(namespace: str) -> None:
    _kill_processes(namespace)
    with contextlib.suppress(RuntimeError):
        _run("ip", "netns", "del", namespace)


def _remove_abandoned() -> None:
    """Remove the hosts of processes that are no more, which were killed before they could do it themselves."""
    for line in _run("ip", "netns", "list").splitlines():
        parts = line.split()[0].split("-")
        if len(parts) == 4 and parts[0] == _PREFIX and parts[1].isdigit() and not Path("/proc", parts[1]).exists():
            _remove("-".join(parts))

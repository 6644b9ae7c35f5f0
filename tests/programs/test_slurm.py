"""The batch scripts on a real SLURM: a throw-away cluster of two nodes on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import ENVIRONMENT, OPEN_MPI_DIRECTORY, QUICK_START

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "runuser")
SEARCH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd-%n.pid
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool-%n
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=10
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF MaxTime=10
"""


def _why_not():
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]
    if missing:
        return f"SLURM can't be started here: {', '.join(missing)} not installed (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "SLURM can't be started here: its daemons need root"
    return None


pytestmark = [pytest.mark.skipif(_why_not() is not None, reason=str(_why_not())), pytest.mark.timeout(400)]


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _until(condition, what, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.3)
    return result


class Cluster:
    """Two nodes; every daemon is a child of this process."""

    def __init__(self, path, munge):
        self.path, self.munge = path, munge
        self.daemons = []
        self.environment = {key: value for key, value in os.environ.items() if key[:6] not in ("SLURM_", "OMPI_C")}
        self.environment |= {"SLURM_CONF": str(path / "slurm.conf"), "PATH": SEARCH}
        self.environment |= {**ENVIRONMENT, **QUICK_START, OPEN_MPI_DIRECTORY: str(path)}

    def start(self):
        text = CONFIGURATION.format(host=socket.gethostname(), path=self.path, munge=self.munge, ports=_free_ports(3))
        (self.path / "slurm.conf").write_text(text)
        (self.path / "state").mkdir()
        (self.munge / "key").write_bytes(os.urandom(128))
        for file in (self.munge, self.munge / "key"):
            shutil.chown(file, "munge", "munge")
        (self.munge / "key").chmod(0o400)
        self.munge.chmod(0o755)
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._run(
            "runuser", "-u", "munge", "--", "munged", "-F", *(f"--{o}={self.munge}/{f}" for o, f in options.items())
        )
        _until((self.munge / "socket").exists, "munged did not start", 20)
        self._run("slurmctld", "-D", "-i", "-f", str(self.path / "slurm.conf"))
        for node in ("n1", "n2"):
            (self.path / f"spool-{node}").mkdir()
            self._run("slurmd", "-D", "-N", node, "-f", str(self.path / "slurm.conf"))
        _until(lambda: self.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2", self.state, 60)

    def _run(self, *command):
        self.daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def call(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout + done.stderr if done.returncode else done.stdout

    def submit(self, *command):
        output = self.call("sbatch", "--parsable", *command)
        assert output.strip().isdigit(), output
        return output.strip()

    def job(self, number):
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self):
        return self.call("sinfo") + self.call("squeue", "-l") + (self.path / "slurmctld.log").read_text()[-3000:]

    def stop(self):
        self.call("scancel", "--full", "-u", "root")
        time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    path, munge = tmp_path_factory.mktemp("slurm"), Path("/run") / f"dpoptim-munge-{os.getpid()}"
    munge.mkdir()
    one = Cluster(path, munge)
    try:
        one.start()
        yield one
    finally:
        one.stop()
        shutil.rmtree(munge, ignore_errors=True)


def _mpi():
    text = subprocess.run(
        ["mpirun", "--version"], env={"PATH": SEARCH}, capture_output=True, text=True, check=False
    ).stdout
    return "mpich" if "HYDRA" in text.upper() else "openmpi"


def test_a_preempted_job_resumes_and_ends_like_one_that_was_not(cluster, tmp_path):
    options = ["--steps", "300", "--eval-every", "100", "--batch-size", "8", "--context", "32"]
    command = [sys.executable, str(ROOT / "examples/train_gpt.py"), *options, "--output"]
    log = tmp_path / "log"
    script = ["--cpus-per-task=1", "--ntasks-per-node=1", "--nodes=2", "-t", "8", f"--chdir={ROOT}"]
    number = cluster.submit("-o", str(log), *script, "slurm/preemptible.sbatch", *command, str(tmp_path / "preempted"))

    def output():
        return log.read_text(errors="replace")  # the writing of one rank may cut a character of another's progress bar

    def what():
        return cluster.state() + (output() if log.exists() else "no output")

    _until((tmp_path / "preempted" / "checkpoint-00000001").exists, what)
    assert cluster.job(number)["NodeList"] == "n[1-2]"
    high = cluster.submit("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    _until(lambda: cluster.job(number)["Restarts"] == "1", what)
    assert "saved, back into the queue" in output()
    _until(lambda: cluster.job(high)["JobState"] == "COMPLETED", what)
    cluster.call("scontrol", "update", f"JobId={number}", "StartTime=now")  # SLURM holds it back for two minutes
    _until(lambda: cluster.job(number)["JobState"] == "COMPLETED", what)
    text = output()
    print(text)
    assert "stopped by a signal, saved step" in text
    assert "resumed at step" in text

    number = cluster.submit("-o", str(log), *script, "slurm/cpu.sbatch", *command, str(tmp_path / "whole"))
    _until(lambda: cluster.job(number)["JobState"] == "COMPLETED", what)
    resumed, whole = (json.loads((tmp_path / run / "history.json").read_text()) for run in ("preempted", "whole"))
    assert resumed == whole, "bit for bit: the same number of ranks, the same order of data"

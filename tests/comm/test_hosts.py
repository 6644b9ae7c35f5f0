"""Hosts made of network namespaces: what MPI sees there, how fast the link is, what is left behind."""

import json
import os
import subprocess
import time

import hosts as harness
import pytest
from hosts import Hosts

REASON = harness.missing()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=f"no hosts to be had: {REASON}")


def _namespaces():
    """Return those that this process has made; other programs on this machine may have theirs."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if f"-{os.getpid()}-" in name]


@needs_hosts
def test_ranks_of_a_host_are_a_node_of_their_own():
    program = """
import json, os, socket
from dpoptim.comm.communicator import Communicator
communicator = Communicator()
topology = communicator.topology
open(f"/dev/shm/{communicator.rank}", "w").close()
communicator.barrier()
seen = sorted(name for name in os.listdir("/dev/shm") if name.isdigit())
everybody = communicator.all_gather_object((socket.gethostname(), seen))
if communicator.rank == 0:
    print(json.dumps([topology.nodes, everybody]))
"""
    with Hosts(2) as hosts:
        done = hosts.mpirun([2, 1], "-c", program)
    assert (done.returncode, done.stderr) == (0, "")
    nodes, everybody = json.loads(done.stdout)
    assert nodes == [[0, 1], [2]]
    assert everybody == [["host0", ["0", "1"]], ["host0", ["0", "1"]], ["host1", ["2"]]]


@needs_hosts
def test_the_link_has_the_bandwidth_asked_for():
    program = """
import time, torch
from dpoptim.comm.communicator import Communicator
communicator = Communicator()
tensor = torch.ones(500_000)
communicator.all_reduce(tensor)
start_s = time.perf_counter()
communicator.all_reduce(tensor)
if communicator.rank == 0:
    print(time.perf_counter() - start_s)
"""
    with Hosts(2, rate="100mbit") as hosts:
        done = hosts.mpirun(1, "-c", program)
    assert done.returncode == 0, done.stderr
    wire_s = 2e6 * 8 / 100e6  # two ranks: each sends and receives 2 MB in all, in both directions at once
    assert 0.5 * wire_s < float(done.stdout) < 10 * wire_s  # a burst is free; the machine may be busy


@needs_hosts
def test_nothing_is_left_after_an_error_or_a_program_that_hangs():
    before = _namespaces()
    start_s = time.monotonic()
    with Hosts(2) as hosts:
        with pytest.raises(subprocess.TimeoutExpired) as late:
            hosts.mpirun(1, "-c", "import time; print('here', flush=True); time.sleep(600)", timeout_s=5)
        assert "here" in late.value.stdout
        done = hosts.mpirun(1, "-c", "raise SystemExit(3)")
        assert done.returncode == 3
    assert time.monotonic() - start_s < 60
    assert _namespaces() == before
    with pytest.raises(ZeroDivisionError), Hosts(2):
        assert 1 / (_namespaces() == before)
    assert _namespaces() == before


@pytest.mark.parametrize("number", [0, 251])
def test_an_impossible_number_of_hosts_is_an_error(number):
    with pytest.raises(ValueError, match=f"num_hosts must be 1 to 250, got {number}"):
        Hosts(number)


@needs_hosts
def test_a_rank_count_that_fits_no_host_is_an_error():
    with Hosts(2) as hosts, pytest.raises(ValueError, match="a number >= 1 for each of 2 hosts"):
        hosts.mpirun([1], "-c", "")

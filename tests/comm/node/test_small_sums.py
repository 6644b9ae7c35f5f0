"""Sums of a few numbers: the same with memory that ranks share and without; nobody is kept from what MPI owes it."""

import time

import pytest

import dpoptim.comm.router
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.sleeping_barrier import SleepingBarrier

parallel = pytest.mark.parallel


@pytest.fixture(params=["messages", "shared memory"])
def communicator(request, world, monkeypatch):
    shares = request.param == "shared memory"
    if shares and (world.size == 1 or not SleepingBarrier.is_here()):
        pytest.skip("one rank shares a core with nobody, or there is no futex on this system")
    cores = {0} if shares else set(range(world.size))
    monkeypatch.setattr(dpoptim.comm.router, "available_cores", lambda: cores)
    made = Communicator(world)
    assert (made._router._number_sums is not None) == shares
    yield made
    made.free()


@parallel
def test_sums_in_turns(communicator):
    size, wrong = communicator.world_size, []
    for turn in range(50):
        numbers = [communicator.rank + place + turn / 4 for place in range(1 + turn % 20)]  # too many for a slot, too
        found = communicator.start_sum(numbers).wait()
        expected = [size * (place + turn / 4) + size * (size - 1) / 2 for place in range(1 + turn % 20)]
        if found != expected:
            wrong.append((turn, found))
    assert not wrong


@parallel
def test_a_sum_is_tested_without_waiting(communicator):
    world_size = communicator.world_size
    if communicator.rank == world_size - 1:
        time.sleep(0.3)
    pending = communicator.start_sum([1.0])
    early = pending.test()
    while not pending.test():
        time.sleep(1e-3)
    total = pending.wait()
    communicator.barrier()
    assert total == [world_size]
    assert world_size == 1 or communicator.rank == world_size - 1 or not early


PROGRAM = """
import sys, torch, dpoptim.comm.router
from mpi4py import MPI
dpoptim.comm.router.available_cores = lambda: {0}
from dpoptim.comm.communicator import Communicator
communicator = Communicator()
assert communicator._router._number_sums is not None
assert communicator.why_no_node_memory() is None
rank, size = communicator.rank, communicator.world_size
sent, received = torch.full((1 << 22,), float(rank)), torch.empty(1 << 22)
if rank == 0:
    requests = [MPI.COMM_WORLD.Isend(sent.numpy(), other) for other in range(1, size)]
else:
    MPI.COMM_WORLD.Recv(received.numpy(), 0)
if sys.argv[1] == "few":
    assert communicator.start_sum([1.0]).wait() == [size]
else:
    tensor = torch.ones(3)
    communicator.all_reduce(tensor)
    assert tensor[0] == size
if rank == 0:
    MPI.Request.Waitall(requests)
print("came", flush=True)
"""


@pytest.mark.once  # with Open MPI: MPICH's sends go on without their sender
@pytest.mark.skipif(not SleepingBarrier.is_here(), reason="no futex on this system")
@pytest.mark.parametrize("sum_of", ["few", "a tensor"])
def test_what_others_wait_for_goes_on_meanwhile(mpirun, monkeypatch, sum_of):
    """A send needs its sender's MPI, which waits in the sum for those that receive; TCP, where no other can do it."""
    for name, value in (("OMPI_MCA_btl", "self,tcp"), ("OMPI_MCA_pml", "ob1"), ("UCX_TLS", "tcp,self")):
        monkeypatch.setenv(name, value)
    done = mpirun(3, "-c", PROGRAM, sum_of)
    assert done.stdout.count("came") == 3, done.stderr

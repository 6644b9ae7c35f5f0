"""Batches: their two meetings, where ranks read each other's memory and where they do not."""

import pytest
import torch

from dpoptim.comm.batch import MeetingFirst
from dpoptim.comm.communicator import Communicator
from dpoptim.comm.node.peer_batch import MAX_COLLECTIVES, PeerBatch


def test_ranks_meet_before_anything_starts_and_numbers_are_read_last():
    happened = []

    class Waited:
        def wait(self):
            happened.append("wait")

    def meet():
        happened.append("meet")
        return 4.0

    def sum_numbers(numbers):
        happened.append(f"sum {numbers}")
        return [7.0]

    batch = MeetingFirst(sum_numbers)
    batch.open(lambda divisor: happened.append(f"start {divisor}"), meet)
    assert batch.close([Waited(), Waited()], lambda: happened.append("read") or [1.0]) == [7.0]
    assert happened == ["meet", "start 4.0", "wait", "wait", "read", "sum [1.0]"]
    assert not batch.is_deferred


@pytest.fixture
def communicator(world):
    made = Communicator(world)
    made.why_no_node_memory()  # sets it up
    yield made
    made.free()


@pytest.mark.parallel
def test_a_batch_divides_sums_by_what_the_meeting_returns(communicator):
    tensors = [torch.full((5,), float(communicator.rank + number)) for number in range(3)]
    works, order = [], []

    def start(divisor):
        order.append("start")
        works.extend(communicator.all_reduce(tensor, scale=3.0 / divisor, async_op=True) for tensor in tensors)

    def meet():
        order.append("meet")
        communicator.barrier()
        return 4.0

    batch = communicator.batch(len(tensors), {torch.float32})
    batch.open(start, meet)
    found = batch.close(works, lambda: [float(tensors[0][0]), 1.0])
    size = communicator.world_size
    sums = [0.75 * sum(rank + number for rank in range(size)) for number in range(3)]
    assert [tensor.tolist() for tensor in tensors] == [[total] * 5 for total in sums]
    assert found == [size * sums[0], size]
    assert order == (["start", "meet"] if batch.is_deferred else ["meet", "start"])


@pytest.mark.parallel
def test_what_can_not_be_deferred_starts_when_all_have_met(communicator):
    reads = communicator.why_no_peer_memory() is None
    assert isinstance(communicator.batch(1, {torch.float32, torch.bfloat16, torch.complex64}), PeerBatch) == reads
    for number, dtypes in ((None, ()), (0, ()), (MAX_COLLECTIVES, ()), (1, {torch.uint16})):
        assert isinstance(communicator.batch(number, dtypes), MeetingFirst)


@pytest.mark.parallel
def test_a_meeting_that_fails_leaves_nothing_to_do(communicator):
    tensor, works = torch.ones(5), []

    def fail():
        raise LookupError("a rank is elsewhere")

    def start(_):
        works.append(communicator.all_reduce(tensor, async_op=True))

    with pytest.raises(LookupError):
        communicator.batch(1, {torch.float32}).open(start, fail)
    for work in works:
        work.wait()
    assert tensor.tolist() == [1.0] * 5
    communicator.all_reduce(tensor)
    assert tensor.tolist() == [float(communicator.world_size)] * 5

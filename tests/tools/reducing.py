"""A reducer's parts in one process: what stands for the other ranks, of which a test says what they tell and have."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpoptim.comm.batch import MeetingFirst
from dpoptim.gradients.backward_state import BackwardState
from dpoptim.gradients.homes import Homes
from dpoptim.gradients.parameters import Parameters
from dpoptim.gradients.parts import Parts
from dpoptim.gradients.plan import Plan
from dpoptim.gradients.presence import Presence
from dpoptim.gradients.sparse import SparseGradients
from dpoptim.gradients.sums import Sums


class FakeCommunicator:
    """Rank 0's communicator of two ranks.

    ``others`` makes what rank 1 tells out of what rank 0 does; ``other_numbers`` rank 1 adds to sums of numbers.
    """

    world_size, rank, is_polled, scales_for_free = 2, 0, False, False

    def __init__(self, others: Callable[[Any], Any] = lambda own: own, *, overlap: bool = False) -> None:
        self.others, self.overlap = others, overlap
        self.other_numbers: list[float] = []
        self.allocated_bytes: list[int] = []
        self.batches: list[tuple[int | None, set[torch.dtype]]] = []
        self.num_exchanges = self.num_polls = self.num_drops = 0

    def all_gather_object(self, own: Any) -> list[Any]:
        self.num_exchanges += 1
        return [own, self.others(own)]

    def batch(self, num_collectives: int | None, dtypes: Iterable[torch.dtype] = ()) -> MeetingFirst:
        self.batches.append((num_collectives, set(dtypes)))
        return MeetingFirst(self.sum_numbers)

    def sum_numbers(self, own: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(own, self.other_numbers or [0.0] * len(own), strict=True)]

    def drop(self) -> None:
        self.num_drops += 1

    def poll(self) -> None:
        self.num_polls += 1

    def has_memory(self) -> bool:
        return False

    def allocate(self, num_bytes: int) -> None:
        self.allocated_bytes.append(num_bytes)


class FakeRollCall:
    """The roll call of two ranks; ``errors`` are raised one after another by its next meetings."""

    def __init__(self, communicator: FakeCommunicator) -> None:
        self.communicator = communicator
        self.places: list[str] = []
        self.notes: list[str] = []
        self.errors: list[Exception] = []
        self.num_enrolled = 0

    def enroll(self) -> int:
        self.num_enrolled += 1
        return 0

    def dismiss(self) -> None:
        self.num_enrolled -= 1

    def check_in(self, place: str, weight: float, alike: object = None, note: str = "") -> float:
        self.places.append(place)
        self.notes.append(note)
        if self.errors:
            raise self.errors.pop(0)
        return 2 * weight


class Done:
    """Work that is done when it is waited for."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def wait(self) -> None:
        self._act()


def twice(_: FakeCommunicator, bucket: Any) -> Done:
    """Sum a bucket with an equal one of rank 1: a communication hook."""
    return Done(lambda: bucket.flat.mul_(2))


def parameters_of(*tensors: Tensor, names: Sequence[str] = "abcdefgh") -> Parameters:
    parameters = Parameters()
    parameters.add(tensors, names[: len(tensors)], [0] * len(tensors))
    return parameters


def parts_of(*tensors: Tensor, communicator: Any = None, accumulate: int = 1, comm_hook: Any = twice) -> Parts:
    """Return the parts of a reducer of these parameters, that are not planned yet."""
    parameters, plan = parameters_of(*tensors), Plan(1 << 20)
    return Parts(
        parameters=parameters,
        plan=plan,
        presence=Presence(parameters, plan),
        sparse=SparseGradients(parameters),
        homes=Homes(),
        backward=BackwardState(),
        sums=Sums(communicator or FakeCommunicator(), comm_hook, parameters),
        accumulate=accumulate,
    )


def made(*shapes: Sequence[int], grads: Sequence[float | None] = ()) -> list[nn.Parameter]:
    """Return parameters of these shapes, with gradients of these values."""
    tensors = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
    for tensor, value in zip(tensors, grads, strict=False):
        tensor.grad = None if value is None else torch.full_like(tensor, value)
    return tensors

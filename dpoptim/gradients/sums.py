"""Sums: the sums of buckets over ranks that one reducer starts and waits for."""

from collections.abc import Callable, Sequence

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.transport import Batch
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.comm_hook import CommHook, allreduce
from dpoptim.gradients.parameters import Parameters

__all__ = ["Sums"]


class Sums:
    """Starts the sums of buckets of gradients, and waits for them.

    Parameters
    ----------
    communicator : Communicator
        Used by this object alone.
    comm_hook : callable
        See :mod:`dpoptim.comm_hooks`.
    parameters : Parameters
        The reducer's.

    Attributes
    ----------
    communicator : Communicator
        The next reduction may have another.
    scale : float or None
        This rank's share of the mean, from the meeting on with which a reduction begins until it has ended.
    launched : list of (Bucket, Work)
        What was started, in order.
    has_misfit : bool
        Whether a gradient does not fit its bucket, or is not what it was reduced to.
    has_raised : bool
        Whether the backward has raised whose gradients are reduced.
    """

    def __init__(self, communicator: Communicator, comm_hook: CommHook, parameters: Parameters) -> None:
        self._parameters = parameters
        self.move_to(communicator, comm_hook)
        self.scale: float | None = None
        self.launched: list[tuple[Bucket, Work]] = []
        self.has_misfit = False
        self.has_raised = False

    def move_to(self, communicator: Communicator, comm_hook: CommHook) -> None:
        """Sum over these ranks, by this hook, from the next reduction on; local."""
        self.communicator = communicator
        self._comm_hook, self._is_plain = comm_hook, comm_hook is allreduce

    def launch(self, bucket: Bucket, scale: float | None) -> None:
        """Start the sum of a bucket with the gradients as they are; collective. Under ``no_grad``."""
        assert scale is not None
        scaled = not (self._is_plain and self.communicator.scales_for_free)
        if not bucket.pack(self._parameters.gradients_of(bucket.indices), scale, scaled=scaled):
            self.has_misfit = True
        self.launched.append((bucket, self._comm_hook(self.communicator, bucket)))

    def batch(self, buckets: Sequence[Bucket]) -> Batch:
        """Return the batch of these buckets' sums; local. Whatever a hook does starts when all ranks have met."""
        if not self._is_plain or any(bucket.device.type != "cpu" for bucket in buckets):
            return self.communicator.batch(None)
        return self.communicator.batch(len(buckets), {bucket.dtype for bucket in buckets})

    def finish(self, launched: Sequence[tuple[Bucket, Work]], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait until these buckets are reduced, then sum numbers over all ranks; collective."""
        return self.batch([bucket for bucket, _ in launched]).close([work for _, work in launched], numbers)

    def sum_now(self, bucket: Bucket) -> None:
        """Sum a bucket that is packed, and in no plan; collective, blocks."""
        self._comm_hook(self.communicator, bucket).wait()

    def drop(self) -> None:
        """Forget sums that have not begun, after an error that all ranks have; local."""
        self.communicator.drop()

    def release(self, buckets: Sequence[Bucket]) -> None:
        """Let go of gradients that were reduced, or are not after all; local."""
        for bucket in buckets:
            bucket.num_pending = len(bucket.indices)
            bucket.release()
        self.launched.clear()
        self.has_misfit = False

    def end(self) -> None:
        """Take note that the reduction has ended; local."""
        self.scale = None
        self.has_raised = False

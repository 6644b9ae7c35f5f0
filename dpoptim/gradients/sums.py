"""Sums: the sums of buckets over ranks that one reducer starts and waits for."""

from collections.abc import Callable, Sequence

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.work import Work
from dpoptim.gradients.bucket import Bucket
from dpoptim.gradients.comm_hook import CommHook
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
        self.communicator = communicator
        self._comm_hook = comm_hook
        self._parameters = parameters
        self.scale: float | None = None
        self.launched: list[tuple[Bucket, Work]] = []
        self.has_misfit = False
        self.has_raised = False

    def launch(self, bucket: Bucket, scale: float | None) -> None:
        """Start the sum of a bucket with the gradients as they are; collective. Under ``no_grad``."""
        assert scale is not None
        scaled = not getattr(self._comm_hook, "scales", False) or not self.communicator.scales_for_free
        if not bucket.pack(self._parameters.gradients_of(bucket.indices), scale, scaled=scaled):
            self.has_misfit = True
        self.launched.append((bucket, self._comm_hook(self.communicator, bucket)))

    def can_announce(self, buckets: Sequence[Bucket]) -> bool:
        """Whether the roll call can serve as the meeting at which the ranks of a node tell where gradients are."""
        return (
            self._hook_defers
            and all(bucket.device.type == "cpu" for bucket in buckets)
            and self.communicator.defers(len(buckets), {bucket.dtype for bucket in buckets})
        )

    def announce(self, meet: Callable[[], float]) -> None:
        """Tell where gradients are by a meeting, which returns what their scales are divided by; collective."""
        self.communicator.divide_deferred(self.communicator.announce_by(meet))

    def finish(self, launched: Sequence[tuple[Bucket, Work]], numbers: Callable[[], Sequence[float]]) -> list[float]:
        """Wait until these buckets are reduced, then sum numbers over all ranks; collective."""
        works = [work for _, work in launched]
        if not self._hook_defers:  # it may write to what others still read, so that it ends with meetings of its own
            for work in works:
                work.wait()
            works = []
        return self.communicator.finish(works, numbers)

    def sum_now(self, bucket: Bucket) -> None:
        """Sum a bucket that is packed, and in no plan; collective, blocks."""
        self._comm_hook(self.communicator, bucket).wait()

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

    @property
    def _hook_defers(self) -> bool:
        """Whether the hook does nothing but start sums of the communicator's."""
        return getattr(self._comm_hook, "scales", False) and getattr(self._comm_hook, "defers", False)

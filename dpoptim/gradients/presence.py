"""Presence: which parameters had a gradient the last time, on this rank and on any; and how ranks tell each other.

Note [Who had a gradient]
-------------------------
A parameter without a gradient counts as zero. Whether *any* rank had one matters: if not, ``p.grad`` stays None, and
the optimizer skips it as torch does. Each rank remembers which of its parameters had one the last time. A reduction
ends with the sum of one number: how many ranks see a change. Only if it is not zero do the ranks exchange the
details. The same exchange finds late-unfrozen, frozen, sparse and moved parameters, and rebuilds the buckets.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.gradients.parameters import Parameters, in_layout_of, is_taken_away
from dpoptim.gradients.plan import Plan

__all__ = ["Presence", "Report", "why_taken_away"]


@dataclass(frozen=True)
class Report:
    """What one rank tells the others when something has changed (Note [Who had a gradient])."""

    had_gradient: bytes
    trainable: bytes
    sparse_dims: dict[int, int]
    misfits: dict[int, str]
    order: list[int]
    has_raised: bool
    rewritten: str | None


class Presence:
    """Which parameters of one reducer had a gradient the last time (Note [Who had a gradient]).

    Parameters
    ----------
    parameters : Parameters
        The reducer's.
    plan : Plan
        Says which bucket a gradient must fit.

    Attributes
    ----------
    had_gradient : bytes or None
        Which had one on this rank in the last reduction, by number; None if that counts no more.
    had_anywhere : list of int
        Which had one on any rank.
    """

    def __init__(self, parameters: Parameters, plan: Plan) -> None:
        self._parameters, self._plan = parameters, plan
        self.had_gradient: bytes | None = None
        self.had_anywhere: list[int] = []

    def now(self) -> bytes:
        """Return which parameters have a gradient on this rank, as in :attr:`had_gradient`; local."""
        return bytes([parameter.grad is not None for parameter in self._parameters.tensors])

    def forget(self) -> None:
        """Count on nothing that other ranks have said; local."""
        self.had_gradient = None
        self.had_anywhere = []

    def are_cleared(self) -> bool:
        """Whether all gradients are gone that the last reduction has left; local."""
        tensors, had = self._parameters.tensors, self.had_anywhere
        if not had or tensors[had[0]].grad is not None:
            return False
        return all(parameter.grad is None for parameter in tensors)

    def report(
        self,
        now: bytes,
        arrived: Sequence[int],
        *,
        rank: int,
        misfits: Mapping[int, str],
        has_raised: bool,
        rewritten: str | None,
    ) -> Report:
        """Return what this rank has to tell; local.

        Parameters
        ----------
        now : bytes
            What :meth:`now` has returned.
        arrived : sequence of int
            The parameters whose gradients have arrived, in this order.
        rank : int
            This rank.
        misfits : mapping of int to str
            What else is wrong with gradients, by parameter.
        has_raised : bool
            Whether a backward has raised.
        rewritten : str or None
            The name of a parameter whose gradient was changed before it was reduced.
        """
        tensors = self._parameters.tensors
        gradients = {i: p.grad for i, p in enumerate(tensors) if p.grad is not None}
        return Report(
            had_gradient=now,
            trainable=bytes([parameter.requires_grad for parameter in tensors]),
            sparse_dims={i: g.sparse_dim() for i, g in gradients.items() if g.is_sparse},
            misfits={**self._taken_away(arrived), **self._not_fitting(gradients, rank), **misfits},
            order=list(dict.fromkeys(arrived)) if rank == 0 else [],
            has_raised=has_raised,
            rewritten=rewritten,
        )

    def exchange(self, communicator: Communicator, own: Report) -> list[Report]:
        """Tell all ranks what this one has seen, and raise on all what is an error on one; collective.

        Returns the reports of all, equal on all ranks.
        """
        reports: list[Report] = communicator.all_gather_object(own)
        raised = [rank for rank, report in enumerate(reports) if report.has_raised]
        if 0 < len(raised) < len(reports):
            raise raised_on_all_ranks(
                RuntimeError(
                    f"a backward raised an error on ranks {', '.join(map(str, raised))} and was caught there, while "
                    "others went on: leave out a batch on all ranks, or end the program"
                )
            )
        for report in reports:
            for misfit in report.misfits.values():
                raise raised_on_all_ranks(RuntimeError(misfit))
        rewritten = [(rank, report.rewritten) for rank, report in enumerate(reports) if report.rewritten is not None]
        if rewritten:
            rank, name = rewritten[0]
            warnings.warn(
                f"the gradient of parameter '{name}' was changed on rank {rank} between a backward in no_sync() and "
                "its reduction in step(). Torch's clip_grad_norm_ sees this rank's gradients alone there: call "
                "opt.clip_grad_norm_, which reduces them first",
                stacklevel=2,
            )
        self.had_anywhere = [
            index for index in range(len(self._parameters)) if any(report.had_gradient[index] for report in reports)
        ]
        return reports

    def give_gradients(self) -> None:
        """Set the gradients of parameters that had one on other ranks only, from their buckets; local."""
        for index in self.had_anywhere:
            parameter = self._parameters.tensors[index]
            if parameter.grad is None and index in self._plan.positions:
                bucket, position = self._plan.positions[index]
                parameter.grad = in_layout_of(parameter, bucket.reduced(position))

    def _taken_away(self, arrived: Sequence[int]) -> dict[int, str]:
        tensors = self._parameters.tensors
        return {
            index: why_taken_away(self._parameters.describe(index))
            for index in arrived
            if is_taken_away(tensors[index])
        }

    def _not_fitting(self, gradients: Mapping[int, Tensor], rank: int) -> dict[int, str]:
        return {
            index: f"{self._parameters.describe(index)} is {gradient.dtype} on {gradient.device}, but was "
            f"{bucket.dtype} on {bucket.device} when the optimizer was constructed (on rank {rank}): move or convert "
            "the model first, then construct the optimizer"
            for index, (bucket, _) in sorted(self._plan.positions.items(), key=lambda item: item[0])
            if (gradient := gradients.get(index)) is not None and not gradient.is_sparse and not bucket.fits(gradient)
        }


def why_taken_away(parameter: str) -> str:
    """Return what is wrong where a user's hook has taken away the gradient of the parameter that is called so."""
    return (
        f"the gradient of {parameter} was taken away before it could be reduced, by a hook of "
        "register_post_accumulate_grad_hook, as optimizers that step within backward() do: each rank would "
        "step with its own gradient. Use an optimizer that steps in step()"
    )

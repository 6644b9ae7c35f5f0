"""Sparse gradients: which parameters have them, on any rank; and their sums, all ranks' indices and values together."""

from collections.abc import Container, Iterable, Sequence

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator
from dpoptim.gradients.parameters import Parameters
from dpoptim.gradients.presence import Report

__all__ = ["SparseGradients", "sum_sparse"]


class SparseGradients:
    """Which parameters of one reducer have sparse gradients, equal on all ranks.

    Parameters
    ----------
    parameters : Parameters
        The reducer's.

    Attributes
    ----------
    dims : dict of int to int
        How many dimensions are sparse, by the numbers of the parameters that have a sparse gradient on some rank.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self.dims: dict[int, int] = {}

    def have_changed(self) -> bool:
        """Whether a gradient is dense on this rank that is known to be sparse; local."""
        return any((g := self._parameters.tensors[i].grad) is not None and not g.is_sparse for i in self.dims)

    def learn(self, reports: Sequence[Report]) -> None:
        """Take note of gradients that are sparse on any rank; local."""
        for report in reports:
            self.dims |= report.sparse_dims

    def dense_somewhere(self, reports: Sequence[Report]) -> set[int]:
        """Return which of these parameters have a dense gradient on some rank; local."""
        return {
            index
            for index in self.dims
            if any(report.had_gradient[index] and index not in report.sparse_dims for report in reports)
        }

    def forget_dense(self, dense_somewhere: Iterable[int], reports: Sequence[Report]) -> None:
        """Take those of them as dense from now on that are sparse nowhere; local."""
        for index in dense_somewhere:
            if not any(index in report.sparse_dims for report in reports):
                del self.dims[index]

    def reduce(
        self, communicator: Communicator, had_anywhere: Sequence[int], scale: float, *, but: Container[int]
    ) -> None:
        """Make those that any rank has the mean over ranks; collective.

        Parameters
        ----------
        had_anywhere : sequence of int
            The parameters that have a gradient on any rank.
        scale : float
            This rank's share of the mean.
        but : container of int
            What to leave out, since it is dense on some rank.
        """
        for index, sparse_dim in self.dims.items():
            if index in had_anywhere and index not in but:
                parameter = self._parameters.tensors[index]
                parameter.grad = sum_sparse(communicator, parameter, sparse_dim, scale)


@torch.no_grad()
def sum_sparse(communicator: Communicator, parameter: Tensor, sparse_dim: int, scale: float) -> Tensor:
    """Return the sum of one parameter's gradients, times each rank's ``scale``, as a sparse tensor; collective.

    Parameters
    ----------
    parameter : Tensor
        Its gradient may be sparse in any dimensions, dense, or None.
    sparse_dim : int
        How many dimensions of the sum are sparse, the same on all ranks.
    """
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(parameter).to_sparse(sparse_dim)
    if not gradient.is_sparse or gradient.sparse_dim() != sparse_dim:
        gradient = gradient.to_dense().to_sparse(sparse_dim)
    gradient = gradient.coalesce()
    indices, values = gradient.indices(), gradient.values() * scale
    num_entries = communicator.all_gather_object(indices.shape[1])
    all_indices = _gather_rows(communicator, indices.t(), num_entries).t()
    all_values = _gather_rows(communicator, values, num_entries)
    with torch.sparse.check_sparse_tensor_invariants():  # said explicitly, or some versions of torch warn
        gathered = torch.sparse_coo_tensor(all_indices, all_values, parameter.shape, device=parameter.device)
    return gathered.coalesce()


def _gather_rows(communicator: Communicator, rows: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Put every rank's rows below one another; collective."""
    gathered = rows.new_empty(sum(num_rows), *rows.shape[1:])
    row_numel = rows.shape[1:].numel()
    communicator.all_gather(gathered, rows.contiguous(), counts=[count * row_numel for count in num_rows])
    return gathered

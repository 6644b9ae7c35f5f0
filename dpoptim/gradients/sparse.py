"""Sums of sparse gradients: all ranks' indices and values, one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpoptim.comm.communicator import Communicator

__all__ = ["sum_sparse"]


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

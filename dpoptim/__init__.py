"""dpoptim: data-parallel optimizers for PyTorch over MPI.

Importing this package starts nothing: MPI is initialised when the first ``DataParallelOptimizer`` is made. Names that
are not here are looked for in ``torch.optim``, so that its functions, and what a newer torch adds, are found as well.
"""

from typing import TYPE_CHECKING

import torch.optim
from torch.optim import Optimizer

from dpoptim import comm_hooks, lr_scheduler, swa_utils, torch_optim, utils
from dpoptim.daso import DASO
from dpoptim.fall_through import fall_through
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.torch_optim import *  # noqa: F403  its __all__ holds every optimizer of the installed torch
from dpoptim.version import __version__

if not TYPE_CHECKING:  # a checker would take every name for one of ours
    __getattr__, __dir__ = fall_through(__name__, torch.optim)

__all__ = [  # noqa: PLE0604
    "DASO",
    "DataParallelOptimizer",
    "Optimizer",
    "__version__",
    "comm_hooks",
    "lr_scheduler",
    "swa_utils",
    "utils",
    *torch_optim.__all__,
]
__all__ += [name for name in torch.optim.__all__ if name not in __all__]

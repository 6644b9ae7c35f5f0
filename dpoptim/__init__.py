"""dpoptim: data-parallel optimizers for PyTorch over MPI.

Importing this package starts nothing: MPI is initialised when the first ``DataParallelOptimizer`` is made.
"""

from dpoptim import comm_hooks, lr_scheduler, swa_utils, torch_optim, utils
from dpoptim.daso import DASO
from dpoptim.optimizer import DataParallelOptimizer
from dpoptim.torch_optim import *  # noqa: F403  its __all__ holds every optimizer of the installed torch
from dpoptim.version import __version__

__all__ = [  # noqa: PLE0604
    "DASO",
    "DataParallelOptimizer",
    "__version__",
    "comm_hooks",
    "lr_scheduler",
    "swa_utils",
    "utils",
    *torch_optim.__all__,
]

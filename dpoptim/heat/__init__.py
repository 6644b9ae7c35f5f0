"""Drop-in names of Heat's ``ht.optim`` and ``ht.nn``, for Heat programs: change the import and leave the rest.

    import heat.optim as optim                       ->  import dpoptim.heat as optim
    from heat.nn import DataParallel                 ->  from dpoptim.heat import DataParallel
    from heat.optim.lr_scheduler import StepLR       ->  from dpoptim.heat.lr_scheduler import StepLR
    from heat.optim.utils import DetectMetricPlateau ->  from dpoptim.heat.utils import DetectMetricPlateau

Classes take Heat's arguments. Besides there are all optimizers of torch, and functions that take DNDarrays to batches
of local tensors (:func:`local_part`, :func:`batches`) and parameters to DNDarrays (:func:`parameters`,
:func:`gradients`). As in Heat, other names are those of ``torch.optim``. Importing this imports Heat, which initialises
MPI.
"""

from typing import TYPE_CHECKING

import torch.optim
from torch.optim import Optimizer

from dpoptim import swa_utils, torch_optim
from dpoptim.fall_through import fall_through
from dpoptim.heat.requirement import require_heat

require_heat()

from dpoptim.heat import dp_optimizer, lr_scheduler, utils  # noqa: E402  after the check, whose error is clearer
from dpoptim.heat.arrays import LocalPart, batches, gradients, local_part, parameters  # noqa: E402
from dpoptim.heat.data_parallel import DataParallel, DataParallelMultiGPU  # noqa: E402
from dpoptim.heat.dp_optimizer import DASO, DataParallelOptimizer  # noqa: E402
from dpoptim.heat.lr_scheduler import *  # noqa: E402, F403  ht.optim has them as well
from dpoptim.torch_optim import *  # noqa: E402, F403  its __all__ holds every optimizer of the installed torch

if not TYPE_CHECKING:
    __getattr__, __dir__ = fall_through(__name__, torch.optim)

__all__ = [  # noqa: PLE0604
    "DASO",
    "DataParallel",
    "DataParallelMultiGPU",
    "DataParallelOptimizer",
    "LocalPart",
    "Optimizer",
    "batches",
    "dp_optimizer",
    "gradients",
    "local_part",
    "lr_scheduler",
    "parameters",
    "swa_utils",
    "utils",
    *lr_scheduler.__all__,
    *torch_optim.__all__,
]
__all__ += [name for name in torch.optim.__all__ if name not in __all__]

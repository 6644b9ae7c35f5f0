"""Drop-in names of Heat's ``ht.optim`` and ``ht.nn``, for Heat programs: change the import and leave the rest.

    import heat.optim as optim                       ->  import dpoptim.heat as optim
    from heat.nn import DataParallel                 ->  from dpoptim.heat import DataParallel
    from heat.optim.lr_scheduler import StepLR       ->  from dpoptim.heat.lr_scheduler import StepLR
    from heat.optim.utils import DetectMetricPlateau ->  from dpoptim.heat.utils import DetectMetricPlateau

Classes take Heat's arguments. Besides there are all optimizers of torch, and functions that take DNDarrays to batches
of local tensors (:func:`local_part`, :func:`batches`) and parameters to DNDarrays (:func:`parameters`,
:func:`gradients`). Importing this imports Heat, which initialises MPI.
"""

from dpoptim import torch_optim
from dpoptim.heat.requirement import require_heat

require_heat()

from dpoptim.heat import lr_scheduler, utils  # noqa: E402  after the check, whose error is the clearer one
from dpoptim.heat.arrays import LocalPart, batches, gradients, local_part, parameters  # noqa: E402
from dpoptim.heat.daso import DASO, DataParallelMultiGPU  # noqa: E402
from dpoptim.heat.data_parallel import DataParallel, DataParallelOptimizer  # noqa: E402
from dpoptim.torch_optim import *  # noqa: E402, F403  its __all__ holds every optimizer of the installed torch

__all__ = [  # noqa: PLE0604
    "DASO",
    "DataParallel",
    "DataParallelMultiGPU",
    "DataParallelOptimizer",
    "LocalPart",
    "batches",
    "gradients",
    "local_part",
    "lr_scheduler",
    "parameters",
    "utils",
    *torch_optim.__all__,
]

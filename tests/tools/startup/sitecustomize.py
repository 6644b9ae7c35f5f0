"""Python runs this first in the programs that tests start, hundreds of times, to leave out what they do not need.

The first optimizer imports torch's compiler, which none of them uses; and at its end Python looks for garbage among
all the objects that torch has made.
"""

import atexit
import gc
import sys
import types

sys.modules["torch._dynamo"] = types.SimpleNamespace(
    disable=lambda function, *args, **kwargs: function, graph_break=lambda: None
)
atexit.register(gc.freeze)

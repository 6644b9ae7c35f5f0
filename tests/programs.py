"""What the programs share that tests start on the ranks of an mpirun of their own."""

__all__ = ["WITHOUT_COMPILER"]

# The first optimizer imports torch's compiler, for nothing here: half of the time that a rank takes to start.
WITHOUT_COMPILER = """
import sys, types
sys.modules["torch._dynamo"] = types.SimpleNamespace(
    disable=lambda function, *args, **kwargs: function, graph_break=lambda: None
)
"""

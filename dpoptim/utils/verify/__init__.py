"""Does my program train on N ranks as one process would? One step of it, and the reason if it does not."""

from dpoptim.utils.verify.check import verify_step
from dpoptim.utils.verify.verdict import Verdict

__all__ = ["Verdict", "verify_step"]

"""Verdict: what a comparison of steps has found.

Tests: ``tests/utils/test_verify.py``.
"""

from dataclasses import dataclass

__all__ = ["Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What :func:`~dpoptim.utils.verify_step` has found, the same on all ranks; true if the steps are equal.

    ``str(verdict)`` says it all.

    Attributes
    ----------
    equal : bool
        Whether every parameter and gradient is equal to rounding, and ranks hold the same bits.
    parameter : str or None
        The name of the parameter that is furthest off, relative to its tolerance; None if all are equal.
    what : str
        What of it is off: ``"parameter"`` or ``"gradient"``.
    difference, tolerance : float
        By how much, and what rounding explains there; of the largest difference if all are equal.
    step : int
        The first step that differs, or the number of steps.
    world_size : int
        The number of ranks.
    mode : str
        The wrapper's.
    notes : tuple of str
        The likely reasons, and what was left out.
    """

    equal: bool
    parameter: str | None
    what: str
    difference: float
    tolerance: float
    step: int
    world_size: int
    mode: str
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        where = f"{self.world_size} rank{'s' * (self.world_size != 1)} ({self.mode})"
        numbers = f"{self.difference:.1e} (rounding explains {self.tolerance:.1e})"
        if self.equal:
            steps = f"{self.step} step{'s' * (self.step != 1)}"
            text = f"equal: {steps} of {where} as of one process on the joined batch, to at most {numbers}"
        else:
            text = f"DIFFERS in step {self.step}: {self.what} '{self.parameter}' on {where} is off by {numbers}"
        return "\n  ".join([text, *self.notes])

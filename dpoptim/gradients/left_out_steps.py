"""LeftOutSteps: a program that looks at gradients in part finds them infinite, and may leave out every step. Local."""

import warnings

__all__ = ["LeftOutSteps"]

# Gradients that are thrown away now and then, as those of the other network of a GAN, are nothing to warn of.
_MAX_IN_TURN = 3


class LeftOutSteps:
    """Counts the steps of one optimizer that were left out in turn, and warns once of what may be the reason.

    Gradients without which no step is expected, such as infinite ones, are not counted.
    """

    def __init__(self) -> None:
        self._is_step_due = self._has_warned = False
        self._num_in_turn = 0

    def note_reduction(self, *, is_step_due: bool) -> None:
        """Take note of reduced gradients, with which a step is to be made or need not be."""
        self._is_step_due = is_step_due

    def note_step(self) -> None:
        """Take note that a step is made."""
        self._is_step_due, self._num_in_turn = False, 0

    def note_gone(self) -> None:
        """Take note that gradients are gone with which no step was made."""
        if self._is_step_due:
            self._is_step_due = False
            self._num_in_turn += 1
            if self._num_in_turn == _MAX_IN_TURN:
                self.warn(f"no step was made with the gradients of {_MAX_IN_TURN} backward passes in turn")

    def warn(self, what: str) -> None:
        """Warn of looking at gradients in part, once, of which this is a sign."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{what}. If the program has looked at them first: each rank has the mean of its own part alone, and "
                "an infinite element stands in the rest, so that no gradient seems finite. Ask opt.clip_grad_norm_("
                "float('inf')), which is the global norm, or leave out shard and node_shared",
                stacklevel=2,
            )

"""Notice when a metric has stopped improving."""

import math
from collections.abc import Mapping
from typing import Any, SupportsFloat

__all__ = ["DetectMetricPlateau"]

_STATE = (
    "patience",
    "cooldown",
    "cooldown_counter",
    "mode",
    "threshold",
    "threshold_mode",
    "best",
    "num_bad_epochs",
    "mode_worse",
    "last_epoch",
)


class DetectMetricPlateau:
    """Say when a metric has not improved for more than ``patience`` epochs.

    The decision of ``torch.optim.lr_scheduler.ReduceLROnPlateau`` without the learning rate, with the interface of
    Heat's class of this name. It decides alone and communicates nothing: for ranks to decide alike, give every rank the
    same metric, for example ``opt.mean(loss)`` of a :class:`~dpoptim.DataParallelOptimizer`.

    Parameters
    ----------
    mode : "min" or "max"
        Whether a smaller or a larger metric is better.
    patience : int
        How many epochs in a row may fail to improve; one more is a plateau.
    threshold : float
        By how much a metric must beat the best one to count as better.
    threshold_mode : "rel" or "abs"
        Whether ``threshold`` is a fraction of the best metric or in the metric's own unit.
    cooldown : int
        For how many epochs after a plateau none is counted against the patience.

    Attributes
    ----------
    best : float
        The best metric since construction or :meth:`reset`; ``mode_worse`` before there was one.
    mode_worse : float
        What every metric is better than: infinity for ``"min"``, minus infinity for ``"max"``.
    num_bad_epochs : int
        Epochs in a row without improvement.
    cooldown_counter : int
        Epochs of the cooldown that are left.
    last_epoch : int
        How many metrics were tested; :meth:`reset` leaves it.
    mode, patience, threshold, threshold_mode, cooldown
        As given.

    Raises
    ------
    ValueError
        ``mode`` or ``threshold_mode`` is none of the two.

    Notes
    -----
    A relative threshold is meant for positive metrics. Where the best one is negative, ``"min"`` still asks for a
    smaller metric by the fraction, unlike torch's class, and ``"max"`` counts metrics as better that are worse by less
    than the fraction, like torch's. Heat does the same in both.
    """

    def __init__(
        self,
        mode: str = "min",
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
    ) -> None:
        _check_modes(mode, threshold_mode)
        self.mode = mode
        self.patience = patience
        self.threshold = threshold
        self.threshold_mode = threshold_mode
        self.cooldown = cooldown
        self.mode_worse = math.inf if mode == "min" else -math.inf
        self.last_epoch = 0
        self.reset()

    def reset(self) -> None:
        """Forget the best metric and start counting anew, without a cooldown."""
        self.best = self.mode_worse
        self.num_bad_epochs = 0
        self.cooldown_counter = 0

    def get_state(self) -> dict[str, Any]:
        """Return everything that :meth:`set_state` needs to go on from here: numbers and strings only."""
        return {name: getattr(self, name) for name in _STATE}

    def set_state(self, dic: Mapping[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned, its constructor arguments included.

        Raises
        ------
        ValueError
            An entry is missing or names an unknown mode; nothing is changed then.
        """
        missing = [name for name in _STATE if name not in dic]
        if missing:
            raise ValueError(
                f"dic must hold all of get_state(), but has no {', '.join(missing)}: it has {sorted(map(str, dic))}"
            )
        _check_modes(dic["mode"], dic["threshold_mode"])
        for name in _STATE:
            setattr(self, name, dic[name])

    def test_if_improving(self, metrics: SupportsFloat) -> bool:
        """Take the metric of one more epoch and say whether this is a plateau.

        Parameters
        ----------
        metrics : float or Tensor of one element
            The same on all ranks.

        Returns
        -------
        bool
            True when there is a plateau, and the counting starts anew; False as long as there is none. The name is
            Heat's and says the opposite.
        """
        metric = float(metrics)
        self.last_epoch += 1
        if self.is_better(metric, self.best):
            self.best = metric
            self.num_bad_epochs = 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        is_plateau = self.num_bad_epochs > self.patience
        if is_plateau:
            self.cooldown_counter = self.cooldown
            self.num_bad_epochs = 0
        return is_plateau

    def is_better(self, a: float, best: float) -> bool:
        """Return whether ``a`` beats ``best`` by more than the threshold; NaN beats nothing."""
        is_relative = self.threshold_mode == "rel"
        margin = -self.threshold if self.mode == "min" else self.threshold
        if is_relative and self.mode == "min" and best < 0:
            margin = self.threshold
        to_beat = best * (1.0 + margin) if is_relative else best + margin
        return a < to_beat if self.mode == "min" else a > to_beat

    @property
    def in_cooldown(self) -> bool:
        """Whether a plateau was found less than ``cooldown`` epochs ago."""
        return self.cooldown_counter > 0


def _check_modes(mode: object, threshold_mode: object) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    if threshold_mode not in ("rel", "abs"):
        raise ValueError(f"threshold_mode must be 'rel' or 'abs', got {threshold_mode!r}")

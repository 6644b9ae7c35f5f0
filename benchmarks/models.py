"""The models of the benchmarks, each with its batch: few large tensors, many small ones, a CNN, a transformer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Task", "tiny"]


@dataclass(frozen=True)
class Task:
    """What one rank computes in a step: the mean square of the model's output for the batch."""

    model: nn.Module
    batch: Tensor


def _mlp() -> Task:
    width = 1620
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    return Task(nn.Sequential(*layers[:-1]), torch.randn(8, width))


def _transformer() -> Task:
    layer = nn.TransformerEncoderLayer(384, 6, 1152, dropout=0.0, batch_first=True)
    return Task(nn.TransformerEncoder(layer, 5, enable_nested_tensor=False), torch.randn(2, 32, 384))


def _cnn() -> Task:
    def block(channels_in: int, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )

    body = [block(3, 64), block(64, 128), nn.MaxPool2d(2), block(128, 256), nn.MaxPool2d(2), block(256, 512)]
    return Task(nn.Sequential(*body, nn.Flatten(), nn.Linear(512 * 16, 100)), torch.randn(4, 3, 16, 16))


def _many_small() -> Task:
    return Task(nn.Sequential(*(nn.Linear(36, 36) for _ in range(300)), nn.PReLU()), torch.randn(8, 36))


def tiny() -> Task:
    """Return a model too small to measure, for what is set up once."""
    return Task(nn.Sequential(nn.Linear(4, 4), nn.PReLU()), torch.randn(2, 4))


MODELS: dict[str, Callable[[], Task]] = {
    "MLP 10.5 M": _mlp,
    "transformer 7.4 M": _transformer,
    "CNN 2.4 M": _cnn,
    "601 small tensors, 0.4 M": _many_small,
}

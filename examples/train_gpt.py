"""Train a character-level GPT on the documentation that every Python carries, to a learning curve and a sample.

    python examples/train_gpt.py                 # one process
    mpirun -n 2 python examples/train_gpt.py     # two ranks share the batch: the same loss curve in less time

Started again, it resumes from its last checkpoint, on any number of ranks.
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI
from pydoc_data.topics import topics
from torch import Tensor, nn
from tqdm import tqdm

import dpoptim


def load_text() -> Tensor:
    """Return the documentation as ASCII codes, every paragraph once: its topics repeat each other."""
    paragraphs = dict.fromkeys(paragraph for key in sorted(topics) for paragraph in topics[key].split("\n\n"))
    text = "\n\n".join(paragraphs).translate(str.maketrans("‘’“”–—", "''\"\"--"))
    return torch.tensor(list(text.encode("ascii", "ignore")))


class Block(nn.Module):
    """Causal self-attention, then a feed-forward network."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.projection(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer over the 128 ASCII codes."""

    def __init__(self, context: int, width: int, num_layers: int, num_heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128))

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits (batch, length, 128) of the characters that follow codes (batch, length)."""
        return self.head(self.blocks(self.token(codes) + self.position.weight[: codes.shape[1]]))

    def loss(self, codes: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross entropy in nats a character; targets of -100 do not count."""
        return F.cross_entropy(self(codes).flatten(0, 1), targets.flatten(), reduction=reduction)

    @torch.no_grad()
    def sample(self, length: int, seed: int, temperature: float = 0.8) -> str:
        """Return `length` characters that the model makes up after an empty line."""
        generator, codes = torch.Generator().manual_seed(seed), torch.tensor([[ord("\n")]])
        for _ in range(length):
            logits = self(codes[:, -len(self.position.weight) :])[:, -1] / temperature
            codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        return bytes(codes[0].tolist()).decode()


@torch.no_grad()
def evaluate(model: GPT, text: Tensor, context: int, comm: MPI.Comm) -> float:
    """Return the mean loss over the whole text. Collective; equal on all ranks, each of which does its part."""
    padding = -(len(text) - 1) % context
    codes = F.pad(text[:-1], (0, padding)).view(-1, context)[comm.rank :: comm.size]
    targets = F.pad(text[1:], (0, padding), value=-100).view(-1, context)[comm.rank :: comm.size]
    return comm.allreduce(model.loss(codes, targets, reduction="sum").item()) / (len(text) - 1)


def main() -> None:
    """Train, or go on with training."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, help_text in [
        ("steps", 1500, "optimizer steps"),
        ("eval-every", 250, "steps between two validations, each with a checkpoint"),
        ("batch-size", 32, "windows of text in a step, of all ranks together"),
        ("context", 64, "characters in a window"),
    ]:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help_text)


if __name__ == "__main__":
    main()

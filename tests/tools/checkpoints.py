"""What the tests of checkpoints share."""

import contextlib
from typing import Any

import torch
from meeting import meet
from oracle import MODES, joined_batch, local_part, model_for, seeded, train
from torch import nn

import dpoptim

__all__ = ["MODES", "SIZES", "Run", "agreed", "sub_communicators"]

# Samples of each rank; the same joined batch of twelve whatever the number of ranks.
SIZES = {1: [12], 2: [5, 7], 3: [4, 1, 7], 4: [3, 2, 6, 1]}
_known: dict[int, dict[int, Any]] = {}


def sub_communicators(world):
    """Return communicators of the first 1, 2, ... ranks; None on ranks that are not among them. Collective once."""
    if world.size not in _known:
        _known[world.size] = {
            n: comm if world.rank < n else None
            for n in range(1, world.size + 1)
            for comm in [world.Split(0 if world.rank < n else 1)]
        }
    return _known[world.size]


@contextlib.contextmanager
def agreed(world):
    """Let assertions that fail on one rank fail on all; collective."""
    error = None
    try:
        yield
    except BaseException as caught:  # raised again below
        error = caught
    meet(world)
    failed = world.allgather(error is not None)
    if error is not None:
        raise error
    assert not any(failed), f"failed on rank {failed.index(True)}"


class Own(nn.Module):
    """Remembers the data of this rank, which differs from the others', and passes it on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x):
        self.seen = 0.9 * self.seen + x.detach().mean(0)
        return x


class Run:
    """A model in training on some ranks, with a scheduler and an average of the weights."""

    def __init__(self, comm, name, options, seed=0, mode="replicated", **more):
        self.comm = comm
        self.model = seeded(lambda: nn.Sequential(Own(), model_for(name)()), seed)
        groups = self._groups(name)
        inner = getattr(dpoptim, name)(groups, **options)
        self.opt = dpoptim.DataParallelOptimizer(inner, comm, module=self.model, **MODES[mode], **more)
        self.scheduler = dpoptim.lr_scheduler.MultiStepLR(self.opt, [2, 5, 7], 0.5)
        self.ema = dpoptim.swa_utils.AveragedModel(
            self.model, multi_avg_fn=dpoptim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        self.step = 0

    def _groups(self, name):
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if name == "LBFGS" or len(named) < 4:
            return named
        return [{"params": named[:3], "lr": 0.02}, {"params": named[3:]}]

    def train(self, num_steps):
        for _ in range(num_steps):
            sizes = SIZES[self.comm.size]
            batch = local_part(joined_batch(self.step, [12]), sizes, self.comm.rank)
            self.opt.batch_weight = len(batch)
            train(self.opt, self.model, batch)
            self.scheduler.step()
            self.ema.update_parameters(self.model)
            self.step += 1
        return self

    @property
    def parts(self):
        return {"model": self.model, "optimizer": self.opt, "scheduler": self.scheduler, "ema": self.ema}

    def end(self):
        self.opt.detach()

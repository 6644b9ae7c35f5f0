"""Train a character-level GPT on Python's own documentation, plot the learning curve and print some made-up text.

    python examples/train_gpt.py                 # one process
    mpirun -n 2 python examples/train_gpt.py     # two ranks share each batch: the same curve in less time

Started again it resumes, on any number of ranks. SIGTERM or SIGUSR1 to a rank: all save and leave with 75, see slurm/.
"""

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from matplotlib.figure import Figure
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import dpoptim
from dpoptim.utils import checkpoint, preemption


class GPT(nn.Module):
    """A decoder-only transformer over the 128 ASCII codes."""

    def __init__(self, context: int, width: int = 128, num_heads: int = 4, num_layers: int = 3) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(128, width), nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits (batch, length, 128) of the characters that follow codes (batch, length)."""
        x = self.token(codes) + self.position.weight[: codes.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1])
        return self.head(self.layers(x, mask, is_causal=True))


@torch.no_grad()
def evaluate(model: GPT, text: Tensor, context: int, comm: MPI.Comm) -> float:
    """Return the mean loss over all of a text, of which each rank does a part. Collective; equal on all ranks."""
    windows = pad(text, (0, -(len(text) - 1) % context), value=-100).unfold(0, context + 1, context)
    codes, targets = windows[comm.rank :: comm.size, :-1].clamp(min=0), windows[comm.rank :: comm.size, 1:]
    loss = cross_entropy(model(codes).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    return comm.allreduce(loss.item()) / (len(text) - 1)


@torch.no_grad()
def sample(model: GPT, context: int, length: int = 300, temperature: float = 0.7) -> str:
    """Return text that the model makes up."""
    codes, generator = torch.tensor([[ord("\n")]]), torch.Generator().manual_seed(0)
    for _ in range(length):
        probabilities = (model(codes[:, -context:])[:, -1] / temperature).softmax(dim=-1)
        codes = torch.cat([codes, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return bytes(codes.flatten().tolist()).decode()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1200)
parser.add_argument("--eval-every", type=int, default=200, help="steps from one validation and checkpoint to the next")
parser.add_argument("--batch-size", type=int, default=32, help="windows of text in a step, of all ranks together")
parser.add_argument("--context", type=int, default=64, help="characters in a window")
parser.add_argument("--seed", type=int, default=0, help="of the weights and of the batches")
parser.add_argument("--output", type=Path, default=Path("runs/gpt"), help="directory; a run found there is resumed")
args = parser.parse_args()

comm = MPI.COMM_WORLD
paragraphs = dict.fromkeys(part for key in sorted(topics) for part in topics[key].split("\n\n"))  # some come twice
text = "\n\n".join(paragraphs).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").encode("ascii", "ignore")
train, validation = torch.tensor(list(text)).tensor_split([len(text) * 9 // 10])
torch.manual_seed(args.seed)
model = GPT(args.context)
optimizer = dpoptim.DataParallelOptimizer(dpoptim.AdamW(model.named_parameters(), lr=4e-3, weight_decay=0.1))
scheduler = dpoptim.lr_scheduler.OneCycleLR(optimizer, 4e-3, args.steps, pct_start=0.15, cycle_momentum=False)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
saved = checkpoint.load(args.output, **parts, missing_ok=True)
done, history = (saved["step"], saved["history"]) if saved else (0, {"train": [], "validation": []})
stop = preemption.StopSignal(optimizer)

steps = range(done + 1, args.steps + 1)
progress = tqdm(steps, unit=" tokens", unit_scale=args.batch_size * args.context, disable=comm.rank > 0 or not steps)
say = progress.write if comm.rank == 0 else lambda _: None
if done:
    say(f"{args.output}: {'resumed' if steps else 'finished already'} at step {done}")
for step in progress:
    starts = np.random.default_rng((args.seed, step)).integers(len(train) - args.context, size=args.batch_size)
    windows = train[torch.from_numpy(starts)[comm.rank :: comm.size, None] + torch.arange(args.context + 1)]
    optimizer.batch_weight = len(windows)  # some ranks have one more where their number doesn't divide the batch
    optimizer.zero_grad()
    loss = cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 10 == 0:
        history["train"].append((step, comm.allreduce(loss.item() * len(windows)) / args.batch_size))
        progress.set_postfix(loss=history["train"][-1][1], lr=scheduler.get_last_lr()[0])
    if step % args.eval_every == 0 or step == args.steps:
        history["validation"].append((step, evaluate(model, validation, args.context, comm)))
        say(f"step {step}: validation loss {history['validation'][-1][1]:.4f}")
    if step % args.eval_every == 0 or step == args.steps or stop.should_stop:
        checkpoint.save(args.output, **parts, step=step, history=history, keep=2)
    if stop.should_stop and step < args.steps:
        say(f"{args.output}: stopped by a signal, saved step {step}")
        sys.exit(preemption.EXIT_CODE)

if comm.rank == 0:
    (args.output / "history.json").write_text(json.dumps(history))
    axes = Figure().subplots()
    for name, points in history.items():
        axes.plot(*np.transpose(points), label=name)
    axes.set(xlabel="step", ylabel="loss, nats a character")
    axes.legend()
    axes.figure.savefig(args.output / "train.png")
    print(sample(model, args.context))

"""DASO against the plain replicated mode and against torch's DDP, on hosts joined by a slow network.

    python benchmarks/daso.py --hosts 2 --rate 100mbit        # as root, with the mpich wheel

Starts ranks on network namespaces (`hosts.py`), which train a character-level GPT on Python's documentation: the same
model, batches and learning rates by each contender, one after another. Prints the median time of a step, the whole
training time (without validation), the validation loss at the end and the time until it first reached the target: 2 %
above the best loss of the plain mode.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCHS, BATCHES, CONTEXT, RATE = 10, 20, 64, 3e-3


def work(modes: list[str], epochs: int) -> None:
    """Train by each contender on this rank; rank 0 prints one line of JSON for each. Collective."""
    from pydoc_data.topics import topics

    import torch
    import torch.distributed as dist
    from mpi4py import MPI
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    import dpoptim
    from dpoptim.comm_hooks import bf16_compress

    comm = MPI.COMM_WORLD
    torch.set_num_threads(1)
    text = torch.tensor(list("".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore")))
    train, validation = text.tensor_split([len(text) * 9 // 10])
    per_rank = 24 // comm.size

    class GPT(torch.nn.Module):
        def __init__(self, width: int = 128) -> None:
            super().__init__()
            self.token, self.position = torch.nn.Embedding(128, width), torch.nn.Embedding(CONTEXT, width)
            layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", True, norm_first=True)
            self.layers = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = torch.nn.Linear(width, 128)

        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            mask = torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT)
            return self.head(self.layers(self.token(codes) + self.position.weight, mask, is_causal=True))

    def windows(starts: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return source[starts[:, None] + torch.arange(CONTEXT + 1)]

    def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def validate(model: torch.nn.Module) -> float:
        starts = torch.arange(0, 96 * CONTEXT, CONTEXT)[comm.rank :: comm.size]
        return comm.allreduce(loss_of(model, windows(starts, validation)).item()) / comm.size

    def contender(mode: str, model: torch.nn.Module) -> tuple[torch.nn.Module, Any]:
        inner = dpoptim.AdamW(model.parameters(), lr=RATE)
        hook = bf16_compress if mode.endswith("bf16") else None
        if mode.startswith("DDP"):
            parallel = DistributedDataParallel(model)
            if hook is not None:
                parallel.register_comm_hook(None, bf16_compress_hook)
            return parallel, inner
        if mode.startswith("DASO"):
            return model, dpoptim.DASO(inner, total_epochs=epochs, warmup_epochs=1, cooldown_epochs=1, comm_hook=hook)
        return model, dpoptim.DataParallelOptimizer(inner, comm_hook=hook)

    if any(mode.startswith("DDP") for mode in modes):
        address = f"tcp://{os.environ['DPOPTIM_FIRST_HOST']}:29511"
        dist.init_process_group("gloo", init_method=address, rank=comm.rank, world_size=comm.size)
    for mode in modes:
        torch.manual_seed(0)
        model, optimizer = contender(mode, GPT())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * BATCHES, cycle_momentum=False)
        times_s: list[float] = []
        curve: list[tuple[float, float]] = []
        for epoch in range(epochs):
            for number in range(BATCHES):
                generator = torch.Generator().manual_seed(epoch * BATCHES + number)
                starts = torch.randint(len(train) - CONTEXT, (24,), generator=generator)
                batch = windows(starts[comm.rank * per_rank : (comm.rank + 1) * per_rank], train)
                start_s = time.perf_counter()
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                schedule.step()
                if number == BATCHES - 1:
                    if isinstance(optimizer, dpoptim.DASO):
                        optimizer.end_epoch(loss)
                    comm.Barrier()
                times_s.append(time.perf_counter() - start_s)
            curve.append((sum(times_s), validate(model)))
        if comm.rank == 0:
            print(json.dumps({"mode": mode, "step_s": times_s, "curve": curve}), flush=True)
        if isinstance(optimizer, dpoptim.DataParallelOptimizer):
            optimizer.detach()
    if dist.is_initialized():
        dist.destroy_process_group()


def report(lines: list[dict[str, Any]], write: Callable[[str], object] = print) -> None:
    """Print the table."""
    plain = next((line for line in lines if line["mode"] == "replicated"), lines[0])
    best = min(loss for _, loss in plain["curve"])
    write(f"target: validation loss {1.02 * best:.4f}, 2 % above the best of {plain['mode']}\n")
    write("| mode | median step, ms | mean step, ms | training, s | last validation loss | s to target |")
    write("|---|---|---|---|---|---|")
    for line in lines:
        reached = next((f"{at:.1f}" for at, loss in line["curve"] if loss <= 1.02 * best), "not reached")
        median, mean = statistics.median(line["step_s"]) * 1e3, statistics.mean(line["step_s"]) * 1e3
        (total_s, loss) = line["curve"][-1]
        share = f"{loss:.4f} ({(loss / plain['curve'][-1][1] - 1) * 100:+.1f} %)"
        write(f"| {line['mode']} | {median:.0f} | {mean:.0f} | {total_s:.1f} | {share} | {reached} |")


def main() -> None:
    """Start the hosts and print the table, or be one of their ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("--rate", default="1gbit", help="bandwidth of a host's link")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of {BATCHES} batches")
    parser.add_argument("--modes", default="DDP,DDP bf16,replicated,replicated bf16,DASO,DASO bf16")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for all contenders together")
    parser.add_argument("--json", type=Path, help="write every step's time here")
    args = parser.parse_args()
    if "PMI_RANK" in os.environ:
        work(args.modes.split(","), args.epochs)
        return
    from hosts import Hosts, missing

    reason = missing()
    if reason is not None:
        sys.exit(f"no hosts to be had: {reason}")
    with Hosts(args.hosts, rate=args.rate) as hosts:
        command = (__file__, "--modes", args.modes, "--epochs", str(args.epochs))
        first = {"DPOPTIM_FIRST_HOST": hosts.addresses[0]}
        try:
            done = hosts.mpirun(args.ranks, *command, timeout_s=args.timeout, env=first)
            output, errors = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as late:  # what is finished is worth reporting
            output, errors = str(late.stdout), f"stopped after {args.timeout:g} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    print(errors, file=sys.stderr)
    if not lines:
        sys.exit(1)
    print(f"{args.hosts} hosts of {args.ranks} ranks, {args.rate}, {args.epochs} epochs of {BATCHES} batches")
    report(lines)
    if args.json:
        args.json.write_text(json.dumps({**{k: str(v) for k, v in vars(args).items()}, "contenders": lines}))


if __name__ == "__main__":
    main()

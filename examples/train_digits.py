"""Train a small convolutional network with batch normalisation on scikit-learn's handwritten digits, in seconds.

    python examples/train_digits.py                 # one process
    mpirun -n 2 python examples/train_digits.py     # two ranks share every batch
"""

import argparse

import torch
import torch.nn.functional as F
from mpi4py import MPI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dpoptim


def main() -> None:
    """Train on four fifths of the digits and print the accuracy on the others."""
    parser = argparse.ArgumentParser(description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training digits")
    parser.add_argument("--batch-size", type=int, default=64, help="digits in a step, of all ranks together")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="the highest of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order of the digits")
    args = parser.parse_args()

    comm = MPI.COMM_WORLD
    torch.manual_seed(args.seed)

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, torch.tensor(labels), test_size=0.2, random_state=args.seed, stratify=labels
    )
    train = TensorDataset(train_images, train_labels)
    sampler = DistributedSampler(train, num_replicas=comm.size, rank=comm.rank, seed=args.seed)
    loader = DataLoader(train, batch_size=args.batch_size // comm.size, sampler=sampler)

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )
    sgd = dpoptim.SGD(model.named_parameters(), lr=args.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    optimizer = dpoptim.DataParallelOptimizer(sgd, module=model)
    scheduler = dpoptim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.learning_rate, total_steps=args.epochs * len(loader)
    )

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()

        optimizer.average_buffers()  # each rank has seen its own part of the data: one set of statistics for all
        model.eval()
        with torch.no_grad():
            predictions = model(test_images[comm.rank :: comm.size]).argmax(dim=1)
        num_correct = comm.allreduce((predictions == test_labels[comm.rank :: comm.size]).sum().item())
        if comm.rank == 0:
            print(f"epoch {epoch + 1}: accuracy {num_correct / len(test_labels):.2%} on {len(test_labels)} digits")


if __name__ == "__main__":
    main()

"""Train a small convolutional network with batch normalisation on scikit-learn's handwritten digits, in seconds.

    python examples/train_digits.py                 # one process
    mpirun -n 2 python examples/train_digits.py     # two ranks share each batch

The ranks divide the digits of every epoch with torch's DistributedSampler.
"""

import argparse

import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dpoptim


def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a convolution with batch normalisation that halves the size of the image."""
    layer = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--batch-size", type=int, default=64, help="digits in a step, of all ranks together")
parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the order of the digits")
args = parser.parse_args()

comm = MPI.COMM_WORLD
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
train, test = (digits[part] for part in train_test_split(range(len(labels)), stratify=labels, random_state=args.seed))
sampler = DistributedSampler(TensorDataset(*train), num_replicas=comm.size, rank=comm.rank, seed=args.seed)
loader = DataLoader(sampler.dataset, batch_size=args.batch_size // comm.size, sampler=sampler)
test_images, test_labels = (part[comm.rank :: comm.size] for part in test)  # each digit on one rank, once

torch.manual_seed(args.seed)
model = nn.Sequential(convolution(1, 32), convolution(32, 64), nn.Flatten(), nn.Linear(256, 10))
sgd = dpoptim.SGD(model.named_parameters(), lr=0.1, nesterov=True, momentum=0.9, weight_decay=5e-3)
optimizer = dpoptim.DataParallelOptimizer(sgd, module=model)
scheduler = dpoptim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, epochs=args.epochs, steps_per_epoch=len(loader))

for epoch in range(args.epochs):
    sampler.set_epoch(epoch)
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()

    optimizer.average_buffers()  # each rank's batch statistics are of the digits it has seen
    model.eval()
    with torch.no_grad():
        num_correct = (model(test_images).argmax(dim=1) == test_labels).sum().item()
    accuracy = comm.allreduce(num_correct) / comm.allreduce(len(test_labels))
    if comm.rank == 0:
        print(f"epoch {epoch + 1}: accuracy {accuracy:.2%}")

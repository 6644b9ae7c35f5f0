"""Recognise handwritten digits: load, standardise and evaluate with Heat, train with dpoptim, in one MPI job.

    mpirun -n 3 python examples/heat_classify.py

The images do not divide evenly among three ranks: each goes through its own rows, in as many batches as the others,
and `batch_weight` makes every step that of the joined batch.
"""

import argparse

import heat as ht
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import dpoptim.heat as optim

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=60, help="digits in a step, of all ranks together")
parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the digits")
args = parser.parse_args()

# Heat: every rank holds its part of the rows.
images, labels = load_digits(return_X_y=True)
num_train = 1400
train_x, test_x = (ht.array(part, dtype=ht.float32, split=0) for part in (images[:num_train], images[num_train:]))
train_y, test_y = (ht.array(part, dtype=ht.int64, split=0) for part in (labels[:num_train], labels[num_train:]))
mean, std = ht.mean(train_x, axis=0), ht.std(train_x, axis=0) + 1e-6
train_x, test_x = (train_x - mean) / std, (test_x - mean) / std

torch.manual_seed(args.seed)
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 10))
optimizer = optim.DataParallelOptimizer(optim.AdamW(model.parameters(), lr=3e-3))
scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)
network = optim.DataParallel(model, train_x.comm, optimizer)

for epoch in range(args.epochs):
    for x, y in optim.batches(train_x, train_y, batch_size=args.batch_size, seed=args.seed + epoch):
        optimizer.batch_weight = len(x)  # the parts of a batch differ in size
        optimizer.zero_grad()
        loss = cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
    scheduler.step()
    loss = optimizer.mean(loss.item())
    if train_x.comm.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss:.4f}")

# Heat again: the predictions of every rank's rows are one DNDarray.
with torch.no_grad():
    predictions = ht.array(network(test_x.larray).argmax(dim=1), is_split=0)
accuracy = ht.mean((predictions == test_y).astype(ht.float32)).item()
confused = ht.unique(test_y[predictions != test_y], sorted=True).numpy()
norm = ht.norm(ht.concatenate([value.flatten() for value in optim.parameters(model).values()])).item()
if train_x.comm.rank == 0:
    print(f"accuracy {accuracy:.2%}; digits that were ever mistaken: {confused.tolist()}; norm of weights {norm:.2f}")

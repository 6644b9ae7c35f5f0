"""Small optimizers that do what classes from outside of torch do: each stands for a kind."""

import collections

import torch
from torch import Tensor

__all__ = [
    "AdamOfGroups",
    "Containers",
    "CountsInItself",
    "Coupled",
    "GivesMemory",
    "GivesMemoryByElement",
    "KeepsGradients",
    "KnowsItsParameters",
    "Lookahead",
    "OwnLoading",
    "Perturbs",
    "Random",
    "SecondOrder",
    "SharesAList",
    "Slow",
    "StateFromTheStart",
    "StateOfNobody",
    "StepsAllThatItKnows",
    "Switched",
    "Takes",
    "TrustRatio",
    "Wrapper",
]


class _Plain(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, {"lr": lr, **options})

    def _trained(self):
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]


class AdamOfGroups(_Plain):
    """Counts its steps in its groups, and keeps a sum there."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["sum"] = group.get("sum", 0.0) + group["lr"] ** 2
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                state["m"].lerp_(p.grad, 0.1)
                state["v"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                rate = group["sum"] ** 0.5 / group["step"]
                p.addcdiv_(state["m"], state["v"].sqrt() + 1e-8, value=-rate)


class CountsInItself(_Plain):
    """Counts its steps in an attribute."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group, p in self._trained():
            p.sub_(p.grad, alpha=group["lr"] / self.count)


class StateOfNobody(_Plain):
    """Keeps a number in ``state`` that is no parameter's, as MADGRAD does."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.state["k"] = torch.zeros(1, dtype=torch.long)

    @torch.no_grad()
    def step(self, closure=None):
        self.state["k"] += 1
        for group, p in self._trained():
            p.sub_(p.grad, alpha=group["lr"] / self.state["k"].item())


class StateFromTheStart(_Plain):
    """Makes its state in the constructor."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 0.1)

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            self.state[p]["sum"].addcmul_(p.grad, p.grad)
            p.addcdiv_(p.grad, self.state[p]["sum"].sqrt(), value=-group["lr"])


class TrustRatio(_Plain):
    """Sees each parameter as a whole."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            p.sub_(p.grad, alpha=float(group["lr"] * p.norm() / (p.grad.norm() + 1e-6)))


class OwnLoading(TrustRatio):
    """Has its own way of loading a state, and counts in its groups."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        for group, p in self._trained():
            state = self.state[p]
            state["seen"] = state.get("seen", torch.zeros((), dtype=torch.int64)) + 1
            state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad
            p.sub_(state["sum"], alpha=float(group["lr"] / state["seen"] / group["step"]))

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    self.state[p]["seen"] = state_dict["state"][key]["seen"].clone()


class Coupled(_Plain):
    """Steps all parameters by a norm of all."""

    @torch.no_grad()
    def step(self, closure=None):
        trained = self._trained()
        total = torch.stack([p.grad.norm() for _, p in trained]).norm()
        for group, p in trained:
            p.sub_(p.grad, alpha=float(group["lr"] / (total + 1e-6)))


class Random(_Plain):
    """Draws random numbers in its step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            p.sub_(p.grad + 0.1 * torch.randn_like(p), alpha=group["lr"])


class SecondOrder(_Plain):
    """Differentiates the gradients once more."""

    def step(self, closure=None):
        trained = self._trained()
        ones = [torch.ones_like(p.grad) for _, p in trained]
        products = torch.autograd.grad([p.grad for _, p in trained], [p for _, p in trained], ones)
        with torch.no_grad():
            for (group, p), product in zip(trained, products, strict=True):
                p.sub_(p.grad / (product.abs() + 1), alpha=group["lr"])


class Slow(AdamOfGroups):
    """Has a mode for training and one for evaluating, as schedule-free classes have."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, train_mode=False)
        self.temperature = 1.0

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                group["train_mode"] = True
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.sub_(self.state[p]["z"])

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                group["train_mode"] = False
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.add_(self.state[p]["z"])

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            if not group["train_mode"]:
                raise RuntimeError("call train() first")
            z = self.state[p].setdefault("z", torch.zeros_like(p))
            z.lerp_(p.grad, 0.5)
            p.sub_(p.grad, alpha=group["lr"] * self.temperature)


class Takes(_Plain):
    """Takes no closure, but a tensor, in its step."""

    @torch.no_grad()
    def step(self, *, factor=None):
        for group, p in self._trained():
            p.sub_(p.grad, alpha=group["lr"] * (1.0 if factor is None else float(factor)))


class Perturbs(_Plain):
    """Steps with a closure, whose default is None, and another optimizer within, as the SAM family does."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure is needed")
        closure = torch.enable_grad()(closure)
        loss = closure()
        trained = self._trained()
        for _, p in trained:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        closure()
        for _, p in trained:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        return loss


class Wrapper(torch.optim.Optimizer):
    """Wraps another optimizer, whose groups and state it shows, without torch's constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.defaults = optimizer.defaults

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):
        return self.optimizer.step()


class Lookahead(Wrapper):
    """Averages weights every two steps."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.count = 0
        self.slow: dict[Tensor, Tensor] = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.data.copy_(slow)


class GivesMemory(_Plain):
    """Gives parameters other memory instead of writing to it."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            if p.dim() == 2:
                p.data = p.detach() - group["lr"] * p.grad
            elif p.numel() % 2:
                p.set_(p.detach() - group["lr"] * p.grad)
            else:
                torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() - group["lr"] * p.grad))


class GivesMemoryByElement(GivesMemory):
    """Does so, and may be divided by element."""

    is_elementwise = True


class KnowsItsParameters(_Plain):
    """Treats parameters otherwise that it knows from its construction, by themselves or by an attribute."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.some = {id(p) for group in self.param_groups for p in group["params"][::2]}
        self.names = {p: number for group in self.param_groups for number, p in enumerate(group["params"])}

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            rate = group["lr"] * (0.1 if id(p) in self.some else 1.0) * getattr(p, "factor", 1.0)
            p.sub_(p.grad, alpha=rate * (1 + self.names[p]))


class StepsAllThatItKnows(_Plain):
    """Does not ask its groups what to step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.all = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.all:
            if p.grad is not None:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


class KeepsGradients(_Plain):
    """Keeps the gradient that it was given, not a copy."""

    @torch.no_grad()
    def step(self, closure=None):
        for group, p in self._trained():
            before = self.state[p].get("before")
            p.sub_(p.grad if before is None else p.grad + 0.5 * before, alpha=group["lr"])
            self.state[p]["before"] = p.grad


class Containers(_Plain):
    """Counts in attributes of other classes than torch's checkpoints know."""

    __slots__ = ("num_steps",)

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.num_steps = 0
        self.counts = collections.defaultdict(int)
        self.last = collections.deque(maxlen=3)

    @torch.no_grad()
    def step(self, closure=None):
        self.num_steps += 1
        self.counts[f"of {self.num_steps % 4}"] += 1
        self.last.append(self.num_steps)
        factor = 1 / (self.num_steps + sum(self.last) + self.counts["of 1"])
        for group, p in self._trained():
            p.sub_(p.grad, alpha=group["lr"] * factor)


class SharesAList(_Plain):
    """Remembers in a list that all groups have in common."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr, memory=[])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["memory"].append(group["lr"])
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=sum(group["memory"]) / len(group["memory"]))


class Switched(_Plain):
    """Couples parameters where an option of the group says so."""

    def __init__(self, params, lr=0.1, clip=0.0):
        super().__init__(params, lr, clip=clip)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in members]).norm() if group["clip"] and members else 1.0
            for p in members:
                p.sub_(p.grad / norm, alpha=group["lr"])

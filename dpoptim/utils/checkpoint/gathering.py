"""What goes into a checkpoint, agreed on by all ranks: the index but for the files, and what each rank writes."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpoptim.comm.errors import raised_on_all_ranks
from dpoptim.utils.checkpoint.files import Source
from dpoptim.utils.checkpoint.index import DTYPES, Index
from dpoptim.utils.checkpoint.parts import (
    ModuleState,
    OptimizerState,
    collect_form,
    collect_module,
    collect_object,
    collect_optimizer,
    kind_of,
)
from dpoptim.utils.checkpoint.plan import Holding, Intervals, divide_held, divide_whole, holdings
from dpoptim.utils.checkpoint.ranks import Ranks, attempt, together
from dpoptim.utils.checkpoint.rng import get_rng
from dpoptim.utils.checkpoint.tree import encode, tensor_names
from dpoptim.utils.state_dict import NamedState
from dpoptim.version import __version__

__all__ = ["Contents", "gather", "gather_converted"]


@dataclass
class Contents:
    """What this rank writes, and on rank 0 the index without files and tensors."""

    sources: list[Source]
    index: Index | None


@dataclass
class _Local:
    """What this rank has collected."""

    modules: dict[str, ModuleState]
    optimizers: dict[str, OptimizerState]
    trees: dict[str, dict[str, Any]]
    rng: Any
    tensors: dict[str, Tensor]


def gather(ranks: Ranks, path: Path, parts: Mapping[str, Any]) -> Contents:
    """Collect the parts on every rank and agree on who writes what; collective."""
    local, error = attempt(lambda: _collect(ranks, parts))
    together(ranks, error)
    assert local is not None
    kinds = {name: kind_of(part) for name, part in parts.items()}
    digests = {name: module.digest() for name, module in local.modules.items()} if ranks.world_size > 1 else {}
    metas = {name: [o.about, o.held, o.state, o.sliced] for name, o in local.optimizers.items()}
    fingerprint = hashlib.sha256(json.dumps(metas, sort_keys=True).encode()).digest()
    everybody = ranks.all_gather_object((str(path), kinds, digests, fingerprint, local.rng))
    together(ranks, _difference(everybody))
    is_replicated = all(other[3] == fingerprint for other in everybody)
    all_metas = None if is_replicated else ranks.all_gather_object(metas)

    sources: list[Source] = []
    loads = [0] * ranks.world_size
    plans = {
        name: _OptimizerPlan(name, optimizer, [m[name] for m in all_metas] if all_metas else None, ranks.world_size)
        for name, optimizer in local.optimizers.items()
    }
    for plan in plans.values():
        plan.divide(loads, alone=True)
    _add_modules(sources, local, ranks.rank, loads)
    for plan in plans.values():
        plan.divide(loads, alone=False)
        plan.add_sources(sources, ranks.rank)
    buffers = _add_own_buffers(sources, local, ranks.rank, [other[2] for other in everybody])
    sources += [_whole(name, tensor) for name, tensor in local.tensors.items()]
    _, error = attempt(lambda: _check(sources))
    together(ranks, error)
    if ranks.rank != 0:
        return Contents(sources, None)
    index = Index(
        about=_about(ranks.world_size),
        parts={**local.trees, **{name: plan.described() for name, plan in plans.items()}},
        ranks=[{"rng": other[4], "buffers": buffers[rank]} for rank, other in enumerate(everybody)],
    )
    return Contents(sources, index)


def gather_converted(
    modules: Mapping[str, Mapping[str, Any]], optimizers: Mapping[str, NamedState], values: Mapping[str, Any]
) -> Contents:
    """Return a checkpoint of one process, of what another format held; local."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Any]] = {}
    sources: list[Source] = []
    for name, state in modules.items():
        own = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
        others = {key: encode(value, f"{name}.{key}", tensors) for key, value in state.items() if key not in own}
        parts[name] = {"kind": "module", "names": list(own), "others": others}
        sources += [_whole(f"{name}.{key}", value) for key, value in own.items()]
    for name, form in optimizers.items():
        plan = _OptimizerPlan(name, collect_form(name, form, None, {}), None, 1)
        plan.divide([0], alone=True)
        plan.add_sources(sources, 0)
        parts[name] = plan.described()
    for name, value in values.items():
        parts[name] = {"kind": "value", "tree": encode(value, name, tensors)}
    sources += [_whole(name, tensor) for name, tensor in tensors.items()]
    _check(sources)
    return Contents(sources, Index(about=_about(1), parts=parts))


def _about(world_size: int) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": world_size,
        "dpoptim": __version__,
        "torch": str(torch.__version__),
    }


def _collect(ranks: Ranks, parts: Mapping[str, Any]) -> _Local:
    local = _Local({}, {}, {}, None, {})
    model = parts.get("model")
    model = model if kind_of(model) == "module" else None
    for name, part in parts.items():
        kind = kind_of(part)
        if kind == "optimizer":
            local.optimizers[name] = collect_optimizer(name, part, model)
            continue
        tensors: dict[str, Tensor] = {}
        if kind == "module":
            module = local.modules[name] = collect_module(part)
            tree = {
                "names": [*module.parameters, *module.buffers],
                "others": {key: encode(value, f"{name}.{key}", tensors) for key, value in module.others.items()},
            }
        else:
            tree = {"tree": collect_object(name, part, tensors)}
        local.trees[name] = {"kind": kind, **tree}
        if ranks.rank == 0:
            local.tensors |= tensors
    local.rng = encode(get_rng(), f"rank-{ranks.rank}.rng", local.tensors)
    return local


def _difference(everybody: list[Any]) -> Exception | None:
    """Say in what the ranks' arguments differ, if they do."""
    (path, kinds, *_), *_ = everybody
    for rank, (other_path, other_kinds, *_) in enumerate(everybody):
        if other_path != path:
            return ValueError(
                f"path must be the same on all ranks, got {path} on rank 0 but {other_path} on rank {rank}"
            )
        if other_kinds != kinds:
            name = min(set(kinds.items()) ^ set(other_kinds.items()))[0]
            here, there = kinds.get(name, "absent"), other_kinds.get(name, "absent")
            return ValueError(f"'{name}' must be alike on all ranks, got {here} on rank 0 but {there} on rank {rank}")
    return None


def _add_modules(sources: list[Source], local: _Local, rank: int, loads: list[int]) -> None:
    """Divide whole parameters among all ranks; buffers are rank 0's."""
    for part, module in local.modules.items():
        writers = divide_whole({name: p.nbytes for name, p in module.parameters.items()}, loads)
        own = {name: p for name, p in module.parameters.items() if writers[name] == rank}
        own |= module.buffers if rank == 0 else {}
        sources += [_whole(f"{part}.{name}", tensor) for name, tensor in own.items()]


def _add_own_buffers(
    sources: list[Source], local: _Local, rank: int, digests: list[dict[str, dict[str, bytes]]]
) -> list[dict[str, list[str]]]:
    """Let ranks whose buffers differ from rank 0's write their own; return which, for every rank."""
    buffers = [
        {
            part: [name for name, bits in module.items() if bits != digests[0][part].get(name)]
            for part, module in other.items()
        }
        for other in digests
    ]
    for part, names in buffers[rank].items():
        sources += [_whole(f"rank-{rank}.{part}.{name}", local.modules[part].buffers[name]) for name in names]
    return buffers


class _OptimizerPlan:
    """Who writes which slice of an optimizer's state; the same on all ranks."""

    def __init__(self, part: str, state: OptimizerState, metas: list[Any] | None, world_size: int) -> None:
        self._part, self._state, self._world_size = part, state, world_size
        self._metas = metas
        self._writes: list[Intervals] = [{} for _ in range(world_size)]
        self._bytes: dict[str, int] = {}
        for _, _, _, sliced in metas or [self._own_meta()]:
            for name, dtypes in sliced.items():
                self._bytes[name] = sum(getattr(torch, dtype).itemsize for dtype in dtypes.values())
        self._holdings: Holding
        if metas is None:
            everyone = tuple(range(world_size))
            self._holdings = {everyone: [(n, a, b) for n, (a, b) in state.held.items() if a < b and self._bytes[n]]}
        else:
            if torn := _torn(metas):
                raise raised_on_all_ranks(
                    RuntimeError(
                        f"of parameter {', '.join(map(repr, torn))} some ranks have stepped their part and others not, "
                        "since a step has failed: load the last checkpoint"
                    )
                )
            has_slices = [{n: i for n, i in held.items() if sliced.get(n)} for _, held, _, sliced in metas]
            self._holdings = holdings(has_slices)

    def divide(self, loads: list[int], *, alone: bool) -> None:
        """Give out what one rank alone holds, or what several do (Note [Writers])."""
        for ranks, intervals in self._holdings.items():
            if (len(ranks) == 1) == alone:
                for rank, own in divide_held(ranks, intervals, self._bytes, loads).items():
                    for name, pieces in own.items():
                        self._writes[rank].setdefault(name, []).extend(pieces)

    def add_sources(self, sources: list[Source], rank: int) -> None:
        """Add what this rank writes."""
        state, part = self._state, self._part
        writers = self._writers()
        names = tensor_names([state.about["param_groups"], state.about["others"]]) if rank == 0 else []
        for name, entry in state.state.items():
            shape = tuple(state.about["shapes"][name])
            pieces = sorted(self._writes[rank].get(name, []))
            if writers[name] == rank:
                sliced = {tree["$tensor"] for key, tree in entry.items() if key in state.sliced[name]}
                names += [n for n in tensor_names(list(entry.values())) if n not in sliced]
                pieces = pieces or ([(0, 0)] if math.prod(shape) == 0 else [])
            begin, _ = state.held[name]
            for key in state.sliced[name]:
                for start, stop in pieces:
                    values = state.slices[name, key][start - begin : stop - begin]
                    values = values.view(shape) if (start, stop) == (0, math.prod(shape)) else values
                    sources.append(Source(f"{part}.{name}.{key}", shape, start, stop, values))
        sources += [_whole(name, state.whole[name]) for name in names]

    def described(self) -> dict[str, Any]:
        """Return the part's entry in the index."""
        metas = self._metas or [self._own_meta()]
        about, state, sliced = self._state.about, {}, {}
        for name, writer in self._writers().items():
            _, _, trees, keys = metas[writer if self._metas else 0]
            state[name], sliced[name] = trees[name], sorted(keys[name])
        return {"kind": "optimizer", **about, "state": state, "sliced": sliced}

    def _own_meta(self) -> list[Any]:
        return [self._state.about, self._state.held, self._state.state, self._state.sliced]

    def _writers(self) -> dict[str, int]:
        """Return who writes what is not divided: the writer of the first element, else the first that has the state."""
        writers: dict[str, int] = {}
        for rank, (_, _, trees, _) in enumerate(self._metas or [self._own_meta()]):
            for name in trees:
                writers.setdefault(name, rank)
        first: dict[str, int] = {}
        for rank, intervals in enumerate(self._writes):
            for name, pieces in intervals.items():
                begin = min(pieces)[0]
                if name not in first or begin < first[name]:
                    first[name], writers[name] = begin, rank
        order = self._state.about["shapes"]
        return {name: writers[name] for name in order if name in writers}


def _whole(name: str, tensor: Tensor) -> Source:
    return Source(name, tuple(tensor.shape), 0, tensor.numel(), tensor)


def _check(sources: list[Source]) -> None:
    seen = set()
    for source in sources:
        if source.values.dtype not in DTYPES:
            raise TypeError(f"'{source.name}' has dtype {source.values.dtype}, which safetensors has not: convert it")
        source_start = (source.name, source.start)
        if source_start in seen:
            raise ValueError(f"two tensors would have the name '{source.name}' in the checkpoint: rename one")
        seen.add(source_start)


def _torn(metas: Sequence[Any]) -> list[str]:
    """Return the parameters of whose state the ranks together have not all elements, or not the same keys."""
    shapes, torn = metas[0][0]["shapes"], []
    for name, shape in shapes.items():
        parts = [(held[name], sliced[name]) for _, held, _, sliced in metas if sliced.get(name)]
        reached = 0
        for start, stop in sorted(interval for interval, _ in parts):
            reached = max(reached, stop) if start <= reached else reached
        if parts and (reached < math.prod(shape) or len({tuple(sorted(keys)) for _, keys in parts}) > 1):
            torn.append(name)
    return torn

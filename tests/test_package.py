"""The structure: levels, public names, and an import that starts nothing."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dpoptim

ROOT = Path(dpoptim.__file__).parent
LEVELS = {
    "version": 0,
    "errors": 0,
    "fall_through": 0,
    "partition": 0,
    "gradient_home": 0,
    "hyper_parameters": 0,
    "normal_tensors": 0,
    "layers": 0,
    "backward_passes": 0,
    "sparse_gradients": 6,
    "bucket": 1,
    "canaries": 2,
    "torch_calls": 1,
    "device_memory": 0,
    "sleeping_barrier": 0,
    "huge_pages": 0,
    "topology": 0,
    "in_flight": 0,
    "step_hooks": 0,
    "divided_state": 0,
    "divisibility": 0,
    "kept_attributes": 2,
    "inner_step": 1,
    "compiled_step": 1,
    "implementations": 1,
    "step_blocks": 1,
    "step_plan": 2,
    "flat_step": 3,
    "sharding": 2,
    "sharded_step": 4,
    "messages": 1,
    "shared_memory": 1,
    "staging_area": 2,
    "lent_memory": 2,
    "polled_messages": 2,
    "peer_memory": 3,
    "small_sums": 2,
    "exchange": 4,
    "communicator": 5,
    "roll_call": 6,
    "node_shared": 6,
    "overlap": 6,
    "step_numbers": 6,
    "comm_hooks": 6,
    "utils": 7,
    "reducer": 7,
    "divided_reducer": 8,
    "node_average": 8,
    "signature": 8,
    "preconditions": 8,
    "sharded_state": 8,
    "divided": 9,
    "optimizer": 10,
    "daso": 11,
    "torch_optim": 11,
    "lr_scheduler": 11,
    "swa_utils": 11,
    "heat": 12,
    "class_check": 12,
    "diagnostics": 12,
    "bench": 12,
    "__main__": 13,
    "__init__": 13,
}
FILES = sorted(ROOT.rglob("*.py"))
MODULES = sorted(".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES)


def _place(dotted):
    """Return the name in LEVELS of a module such as ``dpoptim.utils.consistency``."""
    parts = dotted.split(".")[1:]
    return parts[0] if parts else "__init__"


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "dpoptim":
                known = (f"dpoptim.{alias.name}" for alias in node.names)
                yield from (name if _place(name) in LEVELS else "dpoptim" for name in known)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_levels(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[0]
    assert own in LEVELS, f"give {own} a level here and in docs/architecture.md"
    for name in _imports(path):
        if name.split(".")[0] != "dpoptim":
            continue
        other = _place(name)
        if other == own and len(parts) > 1:
            continue  # within a package
        assert LEVELS[other] < LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"


def test_one_file_calls_mpi():
    users = [path.name for path in FILES if any(name.startswith("mpi4py") for name in _imports(path))]
    assert users == ["messages.py"]


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in MODULES])
def test_every_module_lists_its_names(name):
    if name.endswith("__main__"):
        return
    if name.startswith("dpoptim.heat"):
        pytest.importorskip("heat", reason="Heat is not installed in this environment")
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public), f"{name}.{public}"
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{public} has no docstring"


def test_public_names_are_pinned():
    assert set(dpoptim.__all__) - set(dpoptim.torch_optim.__all__) - set(torch.optim.__all__) == {
        "DASO",
        "DataParallelOptimizer",
        "__version__",
        "comm_hooks",
        "utils",
    }
    assert {"Optimizer", "lr_scheduler", "swa_utils"} <= set(dpoptim.__all__)


def test_every_optimizer_of_torch_is_here():
    theirs = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    for name in theirs:
        assert issubclass(getattr(dpoptim, name), getattr(torch.optim, name))
        assert name in dpoptim.__all__


def test_every_scheduler_of_torch_is_here():
    for name in torch.optim.lr_scheduler.__all__:
        assert issubclass(getattr(dpoptim.lr_scheduler, name), getattr(torch.optim.lr_scheduler, name))
        assert name in dpoptim.lr_scheduler.__all__


STANDS_IN_FOR = {
    dpoptim: torch.optim,
    dpoptim.lr_scheduler: torch.optim.lr_scheduler,
    dpoptim.swa_utils: torch.optim.swa_utils,
}


@pytest.mark.parametrize(("ours", "theirs"), STANDS_IN_FOR.items(), ids=lambda module: module.__name__)
def test_every_public_name_of_torch_is_here(ours, theirs):
    for name in theirs.__all__:
        assert hasattr(ours, name), name
        assert name in dir(ours), name
    public = {name for name in vars(theirs) if not name.startswith("_")}
    for name in public:
        if not isinstance(getattr(theirs, name), types.ModuleType):
            assert hasattr(ours, name), name
    assert {name for name in vars(ours) if not name.startswith("_")} <= set(dir(ours))


@pytest.mark.parametrize(("ours", "theirs"), STANDS_IN_FOR.items(), ids=lambda module: module.__name__)
def test_what_a_newer_torch_adds_is_torchs(ours, theirs, monkeypatch):
    class Newest(torch.optim.SGD):
        pass

    with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute 'Newest'"):
        _ = ours.Newest
    monkeypatch.setattr(theirs, "Newest", Newest, raising=False)
    assert ours.Newest is Newest
    namespace = {}
    exec(f"from {ours.__name__} import Newest", namespace)
    assert namespace["Newest"] is Newest


def test_names_of_ours_are_never_torchs(monkeypatch):
    import torch.optim.optimizer as torch_module

    monkeypatch.setattr(torch.optim, "optimizer", torch_module, raising=False)
    monkeypatch.setattr(torch.optim, "sgd", torch_module, raising=False)
    monkeypatch.setattr(torch.optim, "diagnostics", torch_module, raising=False)
    assert dpoptim.optimizer.__name__ == "dpoptim.optimizer"
    from dpoptim import diagnostics

    assert diagnostics.__name__ == "dpoptim.diagnostics"
    for name in ("sgd", "Sgd", "__wrapped__", "__path_"):
        assert not hasattr(dpoptim, name)
    assert hasattr(dpoptim, "__path__")
    assert not hasattr(dpoptim.lr_scheduler, "math")  # what torch's module imports
    assert dpoptim.lr_scheduler._LRScheduler is torch.optim.lr_scheduler._LRScheduler
    with pytest.raises(ImportError, match="cannot import name 'Sgd'"):
        exec("from dpoptim import Sgd")


def test_importing_starts_nothing():
    program = """
import logging, sys, warnings
import torch
before = (torch.random.get_rng_state().tolist(), torch.get_default_dtype(), sys.excepthook, list(warnings.filters),
          list(logging.root.handlers), torch.get_num_threads())
import dpoptim, dpoptim.swa_utils, dpoptim.lr_scheduler, dpoptim.utils
assert "mpi4py.MPI" not in sys.modules
assert "heat" not in sys.modules
assert before == (torch.random.get_rng_state().tolist(), torch.get_default_dtype(), sys.excepthook,
                  list(warnings.filters), list(logging.root.handlers), torch.get_num_threads())
assert not logging.getLogger("dpoptim").handlers
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr

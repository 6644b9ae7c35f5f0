"""The structure: levels, public names, and an import that starts nothing."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dpoptim

ROOT = Path(dpoptim.__file__).parent
# The one list of folders, from the lowest on: the first column of the table in docs/architecture.md.
PAGE = (ROOT.parent / "docs/architecture.md").read_text()
ORDER = re.findall(r"^\| `([\w.]+)/?` \|", PAGE.partition("## Folders")[2].partition("\n## ")[0], re.MULTILINE)
FILES = sorted(ROOT.rglob("*.py"))
MODULES = sorted(".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES)


def _place(dotted):
    """Return the folder, or the file beside the folders, of a module such as ``dpoptim.utils.consistency``."""
    parts = dotted.split(".")[1:]
    name = parts[0] if parts else "__init__"
    return name if (ROOT / name).is_dir() else f"{name}.py"


def _imports(path):
    """Yield the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = name in MODULES or f"{name}.__init__" in MODULES
                yield name if is_module else node.module


def test_every_folder_and_file_has_its_place():
    there = {_place(name) for name in MODULES}
    assert sorted(ORDER) == sorted(there), "docs/architecture.md has a row for each folder and file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_folders(path):
    own = path.relative_to(ROOT).parts[0]
    for name in _imports(path):
        if name.split(".")[0] == "dpoptim" and (other := _place(name)) != own:
            assert ORDER.index(other) < ORDER.index(own), f"{own} imports {name}, which lies above it"


def test_no_circle_of_imports():
    known = {name: {n for n in _imports(path) if n.startswith("dpoptim")} for name, path in _paths().items()}
    waiting = {name: others & known.keys() for name, others in known.items()}
    while ready := {name for name, others in waiting.items() if not others}:
        waiting = {name: others - ready for name, others in waiting.items() if name not in ready}
    assert not waiting, "a file here imports another one that imports it"


def _paths():
    dotted = (path.relative_to(ROOT.parent).with_suffix("").parts for path in FILES)
    return {".".join(parts).removesuffix(".__init__"): path for parts, path in zip(dotted, FILES, strict=True)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_has_a_file_of_tests(path):
    if path.name in ("__init__.py", "__main__.py"):
        return
    found = re.findall(r"^Tests: ``(tests/\S+)``\.$", ast.get_docstring(ast.parse(path.read_text())), re.MULTILINE)
    inside = path.relative_to(ROOT)
    of_its_name = ROOT.parent / "tests" / inside.parent / f"test_{path.name}"
    assert len(found) == (not of_its_name.exists()), (
        f"{inside} has tests/{inside.parent}/test_{path.name}, or says which"
    )
    assert all((ROOT.parent / name).exists() for name in found)


# What a folder, or a file, must not know, whatever the order allows.
NEVER = [
    ("comm", r"dpoptim\.(?!comm\b|partition\b|tuning\b)"),
    ("comm/node", r"mpi4py|dpoptim\.comm\.mpi"),
    ("gradients", r"dpoptim\.(step|modes|checks|optimizer)\b"),
    ("step", r"dpoptim\.(modes|checks|optimizer|comm\.(?!errors\b))"),
    ("utils/state_dict.py", r"dpoptim\.comm\b|mpi4py"),
]


@pytest.mark.parametrize(("where", "what"), NEVER, ids=[where for where, _ in NEVER])
def test_what_must_not_be_known(where, what):
    for path in [ROOT / where] if where.endswith(".py") else sorted((ROOT / where).rglob("*.py")):
        for name in _imports(path):
            assert not re.match(what, name), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("library", "folder"), [("mpi4py", "comm/mpi"), ("heat", "heat")])
def test_one_folder_knows_a_library(library, folder):
    users = [path for path in FILES if any(name.split(".")[0] == library for name in _imports(path))]
    assert users
    for path in users:
        assert path.is_relative_to(ROOT / folder), path


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
    monkeypatch.setattr(torch.optim, "commands", torch_module, raising=False)
    assert dpoptim.optimizer.__name__ == "dpoptim.optimizer"
    from dpoptim import commands

    assert commands.__name__ == "dpoptim.commands"
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

"""``python -m dpoptim checkpoint``: to other formats and back, and nothing unpickled that is not plain."""

import io
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch
from oracle import Net, assert_same, joined_batch, seeded, train
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from dpoptim.__main__ import main
from dpoptim.utils import checkpoint
from dpoptim.utils.checkpoint.convert import _MetadataUnpickler


def _net(named=True):
    model = seeded(Net)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": parameters[:3], "lr": 0.1}, {"params": parameters[3:]}]
    if not named:
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    opt = torch.optim.Adam(groups)
    return model, opt, torch.optim.lr_scheduler.StepLR(opt, 2)


@pytest.fixture
def run(tmp_path):
    model, opt, scheduler = _net()
    train(opt, model, joined_batch(0, [3]))
    scheduler.step()
    path = tmp_path / "run"
    checkpoint.save(path, model=model, optimizer=opt, scheduler=scheduler, step=3, history=[(1, 2.5)])
    return path, model, opt, scheduler


def _assert_loads(path, model, opt, scheduler):
    other = _net()
    for group in other[1].param_groups:
        group["lr"] = 7.0
    values = checkpoint.load(path, model=other[0], optimizer=other[1], scheduler=other[2])
    assert (values["step"], values["history"]) == (3, [(1, 2.5)])
    assert_same(dict(other[0].state_dict()), dict(model.state_dict()))
    assert_same(other[1].state_dict(), opt.state_dict())
    assert_same(other[2].state_dict(), scheduler.state_dict())


@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_a_round_trip_through_another_format(run, tmp_path, kind):
    path, model, opt, scheduler = run
    assert main(["checkpoint", "export", str(path), str(tmp_path / "other"), "--format", kind]) == 0
    assert main(["checkpoint", "import", str(tmp_path / "other"), str(tmp_path / "back")]) == 0
    _assert_loads(tmp_path / "back", model, opt, scheduler)


def test_torch_alone_loads_what_was_exported_and_exports_what_is_imported(run, tmp_path):
    path, model, opt, scheduler = run
    assert main(["checkpoint", "export", str(path), str(tmp_path / "x.pt")]) == 0
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    other = _net(named=False)
    for part, name in zip(other, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(loaded[name])
    assert_same(other[1].state_dict()["state"], opt.state_dict()["state"])
    plain = {"model": model.state_dict(), "optimizer": other[1].state_dict(), "scheduler": scheduler.state_dict()}
    torch.save({**plain, "step": 3, "history": [(1, 2.5)]}, tmp_path / "plain.pt")
    assert main(["checkpoint", "import", str(tmp_path / "plain.pt"), str(tmp_path / "back")]) == 0
    _assert_loads(tmp_path / "back", model, opt, scheduler)
    assert main(["checkpoint", "export", str(path), str(tmp_path / "w.safetensors"), "--format", "safetensors"]) == 0
    assert_same(safetensors.torch.load_file(tmp_path / "w.safetensors"), dict(model.state_dict()))
    assert main(["checkpoint", "import", str(tmp_path / "w.safetensors"), str(tmp_path / "weights")]) == 0
    checkpoint.load(tmp_path / "weights", model=_net()[0])


def test_info_and_verify(run, capsys):
    path, *_ = run
    assert main(["checkpoint", "info", str(path)]) == 0
    assert "optimizer: optimizer Adam, 7 parameters, 5 with state" in (text := capsys.readouterr().out), text
    assert main(["checkpoint", "verify", str(path)]) == 0
    file = path / "checkpoint-00000001" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert "is damaged: tensor" in capsys.readouterr().out
    shutil.rmtree(path)
    assert main(["checkpoint", "info", str(path)]) == 1
    assert "does not exist" in capsys.readouterr().err


class Evil:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return (os.system, (f"touch {self.trap}",))


def test_importing_runs_no_code(run, tmp_path, capsys):
    path, *_ = run
    trap = tmp_path / "sprung"
    torch.save({"model": Evil(trap)}, tmp_path / "evil.pt")
    assert main(["checkpoint", "import", str(tmp_path / "evil.pt"), str(tmp_path / "back")]) == 1
    assert main(["checkpoint", "export", str(path), str(tmp_path / "dcp"), "--format", "dcp"]) == 0
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil(trap)))
    assert main(["checkpoint", "import", str(tmp_path / "dcp"), str(tmp_path / "back")]) == 1
    assert "its metadata holds a posix.system" in capsys.readouterr().err
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(ByGetattr(torch.Size, "numel")))
    assert main(["checkpoint", "import", str(tmp_path / "dcp"), str(tmp_path / "back")]) == 1
    assert "its metadata holds an attribute numel of <class 'torch.Size'>" in capsys.readouterr().err
    assert not trap.exists()


class ByGetattr:
    """Pickled as the first versions of Python 3.11 pickle a member of an Enum."""

    def __init__(self, holder, name):
        self.holder, self.name = holder, name

    def __reduce__(self):
        return (getattr, (self.holder, self.name))


def test_members_of_an_enum_are_read_as_any_python_pickles_them():
    text = pickle.dumps(ByGetattr(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))
    assert _MetadataUnpickler(io.BytesIO(text)).load() is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for name in ("__class__", "mro"):
        with pytest.raises(pickle.UnpicklingError, match=f"an attribute {name} of"):
            _MetadataUnpickler(io.BytesIO(pickle.dumps(ByGetattr(_MEM_FORMAT_ENCODING, name)))).load()

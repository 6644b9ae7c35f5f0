"""``python -m dpoptim checkpoint info | verify | export | import``.

Tests: ``tests/utils/test_checkpoint.py``.
"""

import argparse
import sys
from pathlib import Path

from dpoptim.utils.checkpoint.error import CheckpointError
from dpoptim.utils.checkpoint.loading import open_checkpoint

__all__ = ["add_commands", "run"]


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments to a parser."""
    commands = parser.add_subparsers(dest="action", required=True)
    info = commands.add_parser("info", help="say what a checkpoint holds")
    verify = commands.add_parser("verify", help="read all of a checkpoint and compare every checksum")
    export = commands.add_parser("export", help="write a checkpoint in another format, in one process")
    load = commands.add_parser(
        "import",
        help="make a checkpoint of a torch.save file, a .safetensors file or a "
        "directory of torch.distributed.checkpoint",
    )
    for command in (info, verify, export):
        command.add_argument("path", type=Path, help="a checkpoint, or the directory that was saved to")
    export.add_argument("target", type=Path, help="a new file, or directory for dcp")
    export.add_argument(
        "--format", choices=("torch", "safetensors", "dcp"), default="torch", help="safetensors holds the model alone"
    )
    load.add_argument("source", type=Path)
    load.add_argument("path", type=Path, help="directory to save to")


def run(arguments: argparse.Namespace) -> int:
    """Run one command in this process alone; return the exit status."""
    try:
        if arguments.action == "export":
            from dpoptim.utils.checkpoint.convert import export_checkpoint  # imports much of torch.distributed

            export_checkpoint(arguments.path, arguments.target, arguments.format)
        elif arguments.action == "import":
            from dpoptim.utils.checkpoint.convert import import_checkpoint

            import_checkpoint(arguments.source, arguments.path)
        elif arguments.action == "verify":
            return _verify(arguments.path)
        else:
            _info(arguments.path)
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _info(path: Path) -> None:
    directory, index, _ = open_checkpoint(path)
    size_bytes = sum(file.size_bytes for file in index.files)
    print(f"{directory}: {size_bytes / 1e6:.1f} MB in {len(index.files)} files")
    print(", ".join(f"{name} {value}" for name, value in index.about.items()))
    for name, part in index.parts.items():
        if part["kind"] == "module":
            numel = sum(index.tensors[f"{name}.{key}"].numel for key in part["names"])
            print(f"{name}: module, {len(part['names'])} tensors, {numel} elements")
        elif part["kind"] == "optimizer":
            print(
                f"{name}: optimizer {part['class']}, {len(part['shapes'])} parameters, {len(part['state'])} with state"
            )
        else:
            text = str(part["tree"])
            print(f"{name}: {part['kind']} {text if len(text) < 60 else text[:57] + '...'}")


def _verify(path: Path) -> int:
    directory, index, reader = open_checkpoint(path)
    num_bad = 0
    with reader:
        for number, file in enumerate(index.files):
            try:
                reader.verify(number)
            except CheckpointError as error:
                num_bad += 1
                print(error)
            else:
                print(f"{directory / file.name}: ok, {file.size_bytes} bytes")
    return min(1, num_bad)

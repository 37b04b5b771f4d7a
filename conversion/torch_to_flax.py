"""Published checkpoints to jaxdg's `.safetensors`, and back.

    python conversion/torch_to_flax.py --list
    python conversion/torch_to_flax.py --model augreg_ti16 --checkpoint vit_tiny.safetensors --out augreg_ti16.safetensors
    python conversion/torch_to_flax.py --model augreg_ti16 --checkpoint augreg_ti16.safetensors --out back.pth --reverse

The source file may be `.safetensors` or `.npz`, or with torch installed `.pth`, `.pt` or `.bin`. Every tensor of it is converted or
left out for a stated reason, every parameter of the model is filled, or nothing is written and all offenders are named.
"""

import argparse
import hashlib
import math
import os
from pathlib import Path
import re
import sys

if not __package__:  # run as a script: the repository is not on the path yet, and this folder's module names must not be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from flax import nnx
import numpy as np

from conversion import checkpoint, clip, eva02, mapping, torchscript, vit
import jaxdg
from jaxdg import backbones, weights


def layouts(name: str) -> tuple[mapping.Layout, ...]:
    """The layouts in which checkpoints of the encoder called `name` are published; the first is the one torch users have.

    Raises:
        ValueError: an unknown name, or an encoder without published weights.
    """
    entry = backbones.entry(name)
    if not entry.source:
        raise ValueError(f"{name} is trained from scratch and has no published weights; --list shows the encoders that have")
    match entry.config:
        case backbones.Eva02Config():
            return eva02.layouts(entry.config)
        case backbones.ClipVitConfig():
            return clip.layouts()
    return vit.layouts(entry.config)


def convert(name: str, source: Path, out: Path) -> str:
    """Converts the published checkpoint `source` of the encoder called `name` to `out`.

    Returns:
        A report for a person: what was mapped, what was left out and why.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit; all offenders are named and nothing is written.
    """
    known = layouts(name)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    config = backbones.entry(name).config
    activation = config.activation if isinstance(config, backbones.ClipVitConfig) else None
    with checkpoint.opened(source) as file:
        if activation == "gelu" and torchscript.recognised(source):
            raise ValueError(f"{source} is an archive as OpenAI publishes, trained with quick_gelu; --list shows the encoders for it")
        try:
            converted = mapping.to_flax(abstract(name), known, file.names, file.read)
        except mapping.Misfit as error:
            raise ValueError(f"{source} is no checkpoint of {name}: {error}") from error
        total = len(file.names)
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        about = {
            "model": name,
            "source": source.name,
            "sha256": digest,
            "layout": converted.layout.name,
            "left_out": converted.left_out,
            "jaxdg": jaxdg.__version__,
        }
        if activation:  # no tensor tells it, so the file does, and loading compares
            about["activation"] = activation
        weights.save(converted.tensors, out, about)
        grids = [f"  {key}: {_grid(converted.tensors[key])}" for key in converted.tensors if key.endswith("pos_embed")]

    lines = [f"{name} from {source.name}: {total - len(converted.left_out)} of {total} tensors mapped (layout: {converted.layout.name})"]
    for reason in dict.fromkeys(converted.left_out.values()):
        kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", key) for key, why in converted.left_out.items() if why == reason)
        lines.append(f"  left out: {', '.join(kinds)} ({reason})")
    lines += grids
    if activation:
        lines.append(
            f"  activation: {activation}, because {name} has it; the tensors do not tell, so see --list that the source is for {name}"
        )
    return "\n".join([*lines, f"  wrote {out}: {len(converted.tensors)} tensors, {out.stat().st_size} bytes"])


def reverse(name: str, source: Path, out: Path) -> str:
    """Converts the jaxdg file `source` of the encoder called `name` back to its publisher's names and axes.

    Args:
        name: of the zoo.
        source: a `.safetensors` file of jaxdg.
        out: `.npz` for the AugReg layout, `.safetensors`, `.pth`, `.pt` or `.bin` for timm's.

    Returns:
        A report for a person.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit; all offenders are named and nothing is written.
    """
    known = layouts(name)
    if out.suffix not in checkpoint.SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {' '.join(checkpoint.SUFFIXES)}")
    about = weights.metadata(source)
    if about.get("model", name) != name:
        raise ValueError(f"{source} holds the weights of {about['model']}, not of {name}")
    layout = known[-1] if out.suffix == ".npz" else known[0]
    try:
        tensors = mapping.from_flax(abstract(name), layout, weights.read(source))
    except mapping.Misfit as error:
        raise ValueError(f"{source} is no file of {name}: {error}") from error
    checkpoint.save(tensors, out, {"model": name, "source": source.name, "jaxdg": jaxdg.__version__})
    return f"{name} to {out}: {len(tensors)} tensors, {out.stat().st_size} bytes (layout: {layout.name})"


def abstract(name: str) -> nnx.Module:
    """The encoder called `name` at full depth, shapes without numbers."""
    return nnx.eval_shape(lambda: backbones.create(name))


def _grid(positions: np.ndarray) -> str:
    """Learned positions [1, prefix + side * side, c] in words."""
    side = math.isqrt(positions.shape[1])
    return f"{side}x{side} positions and {positions.shape[1] - side * side} for tokens without one, stored as they are; load resizes them"


def listing() -> str:
    """Every encoder with published weights: name, megabytes, licence, where to get it."""
    rows = [(name, f"{entry.megabytes} MB", entry.licence, entry.source) for name, entry in backbones.ZOO.items() if entry.source]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="torch_to_flax.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="encoder, a name that --list shows")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="file to convert")
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write; .safetensors unless --reverse")
    parser.add_argument("--reverse", action="store_true", help="from jaxdg's names back to the publisher's; --out chooses the kind of file")
    parser.add_argument("--list", action="store_true", help="show the encoders, where their weights are, licence and size")
    args = parser.parse_args(arguments)
    if args.list:
        print(listing())
        return 0
    if not (args.model and args.checkpoint and args.out):
        parser.error("--model, --checkpoint and --out are all needed (or --list)")
    try:
        print((reverse if args.reverse else convert)(args.model, args.checkpoint, args.out))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

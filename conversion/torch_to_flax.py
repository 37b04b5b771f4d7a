"""Published checkpoints to jaxdg's `.safetensors`, and back.

    python conversion/torch_to_flax.py --list
    python conversion/torch_to_flax.py --model augreg_ti16 --checkpoint vit_tiny.safetensors --out augreg_ti16.safetensors
    python conversion/torch_to_flax.py --model augreg_ti16 --checkpoint augreg_ti16.safetensors --out back.pth --reverse
    python conversion/torch_to_flax.py --model mask2former --checkpoint model_final.pkl --out head.safetensors
    python conversion/torch_to_flax.py --model vltseg --checkpoint vltseg_checkpoint_gta_1.pth --out runs/vltseg_gta
    python conversion/torch_to_flax.py --model vitdet --checkpoint model_final_61ccd1.pkl --out runs/vitdet_b
    python conversion/torch_to_flax.py --model vitdet --checkpoint runs/vitdet_b --out back.pth --reverse

The source file may be `.safetensors`, `.npz` or `.pkl`, or with torch installed `.pth` (also `.pth.tar`), `.pt` or `.bin`. Every tensor of
it is converted or left out for a stated reason, every parameter of the model is filled, or nothing is written and all offenders are named.
A model is an encoder, the text tower beside one, or `mask2former` or `faster_rcnn` for what follows the encoder, of the sizes that its
file has. `vltseg` and `vitdet` are whole models: their jaxdg side is a workdir.
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

import numpy as np

from conversion import checkpoint, mapping, models, torchscript, vitdet, vltseg
import jaxdg
from jaxdg import backbones, paths, weights
from jaxdg import config as config_lib
from jaxdg.tasks import locate, stored_tensors


def convert(name: str, source: Path, out: Path) -> str:
    """Converts the published checkpoint `source` of the model called `name` to `out`.

    Returns:
        A report for a person: what was mapped, what was left out and why.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit; all offenders are named and nothing is written.
    """
    known = models.layouts(name)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    head = models.HEADS.get(name)
    config = None if head else backbones.TEXT_TOWERS.get(name) or backbones.entry(name).config
    activation = config.activation if isinstance(config, backbones.ClipVitConfig | backbones.ClipTextConfig) else None
    with checkpoint.opened(source) as file:
        if activation == "gelu" and torchscript.recognised(source):
            raise ValueError(f"{source} is an archive as OpenAI publishes, trained with quick_gelu; --list shows the encoders for it")
        try:
            sizes = head.of_checkpoint(file.names, file.read) if head else ()
            module = head.abstract(*sizes) if head else models.abstract(name)
            converted = mapping.to_flax(module, known, file.names, file.read)
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
        if head:
            about |= head.about(*sizes)
        weights.save(converted.tensors, out, about)
        grids = [f"  {key}: {_grid(converted.tensors[key])}" for key in converted.tensors if key.endswith("pos_embed")]

    lines = _mapped(name, source, total, converted) + grids
    if head:
        lines.append(f"  sizes, by its tensors: {head.described(*sizes)}")
    if activation:
        lines.append(
            f"  activation: {activation}, because {name} has it; the tensors do not tell, so see --list that the source is for {name}"
        )
    return "\n".join([*lines, f"  wrote {out}: {len(converted.tensors)} tensors, {out.stat().st_size} bytes"])


def convert_whole(name: str, source: Path, out: Path) -> str:
    """Converts the published checkpoint `source` of the whole model called `name` to the workdir `out`; returns and raises as `convert`."""
    family = models.WHOLE[name]
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {out} is there already; {name} is written to a new folder, the workdir of a finished run")
    with checkpoint.opened(source) as file:
        try:
            config = family.of_checkpoint(file)
            model = vltseg.abstract(config)
            layout = vltseg.layout() if family is vltseg else vitdet.of_workdir(config)
            converted = mapping.to_flax(model, (layout,), file.names, file.read)
        except mapping.Misfit as error:
            raise ValueError(f"{source} is no checkpoint of {name}: {error}") from error
        vltseg.write(config, model, converted.tensors, out)
        lines = _mapped(name, source, len(file.names), converted)
    return "\n".join([*lines, f"  {family.described(config)}", f"  wrote {out}: {len(converted.tensors)} tensors, step {config.steps}"])


def _mapped(name: str, source: Path, total: int, converted: mapping.Converted) -> list[str]:
    """How many tensors of a file were mapped, and which were left out for what reason."""
    lines = [f"{name} from {source.name}: {total - len(converted.left_out)} of {total} tensors mapped (layout: {converted.layout.name})"]
    for reason in dict.fromkeys(converted.left_out.values()):
        kinds = dict.fromkeys(
            re.sub(r"(?<=\.)\d+(?=\.)|(?<=encoderblock_)\d+", "*", key) for key, why in converted.left_out.items() if why == reason
        )
        lines.append(f"  left out: {', '.join(kinds)} ({reason})")
    return lines


def reverse(name: str, source: Path, out: Path, chosen: str | None = None) -> str:
    """Converts the jaxdg file `source` of the model called `name` back to its publisher's names and axes.

    Args:
        name: of the zoo, `mask2former` or `faster_rcnn`.
        source: a `.safetensors` file of jaxdg.
        out: `.npz`, `.safetensors`, `.pth`, `.pt` or `.bin`.
        chosen: name of a layout; None for the one torch users have, or in `.npz` that of its Flax files if there are any.

    Returns:
        A report for a person.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit; all offenders are named and nothing is written.
    """
    known = models.layouts(name)
    if out.suffix not in checkpoint.SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {' '.join(checkpoint.SUFFIXES)}")
    about = weights.metadata(source)
    if about.get("model", name) != name:
        raise ValueError(f"{source} holds the weights of {about['model']}, not of {name}")
    names = [layout.name for layout in known]
    if chosen is not None and chosen not in names:
        raise ValueError(f"--layout {chosen} is none of {name}; allowed: {', '.join(names)}")
    head = models.HEADS.get(name)
    flax = [layout for layout in known if out.suffix == ".npz" and any("/" in row.source[0] for row in layout.rows)]
    layout = known[names.index(chosen)] if chosen else (flax[-1] if flax else known[0])
    stored = weights.read(source)
    try:
        module = head.abstract(*head.of_tensors(stored)) if head else models.abstract(name)
        tensors = mapping.from_flax(module, layout, stored)
    except mapping.Misfit as error:
        raise ValueError(f"{source} is no file of {name}: {error}") from error
    versions = head.VERSIONS if head else None
    checkpoint.save(tensors, out, {"model": name, "source": source.name, "jaxdg": jaxdg.__version__}, versions)
    return _written(name, out, len(tensors), layout)


def reverse_whole(source: Path, out: Path) -> str:
    """Converts a workdir, or one step in it, of a ViTDet back to detectron2's names and axes; returns and raises as `reverse`."""
    if out.suffix not in checkpoint.SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {' '.join(checkpoint.SUFFIXES)}")
    config = config_lib.load(locate(source)[0])
    layout = vitdet.of_workdir(config)
    tensors = mapping.from_flax(vltseg.abstract(config), layout, stored_tensors(source))
    checkpoint.save(tensors, out, {"model": vitdet.NAME, "source": source.name, "jaxdg": jaxdg.__version__})
    return _written(vitdet.NAME, out, len(tensors), layout)


def _written(name: str, out: Path, tensors: int, layout: mapping.Layout) -> str:
    note = f"; {layout.note}" if layout.note else ""
    return f"{name} to {out}: {tensors} tensors, {out.stat().st_size} bytes (layout: {layout.name}{note})"


def model_of(source: Path, ours: bool) -> str:
    """The model that a file is of: by the tensors of a published one, by the metadata of one of `ours`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not tell; the message says between what.
    """
    if ours:
        about = weights.metadata(source)
        if "model" not in about:
            raise ValueError(f"{source} does not say what model it is of; say it with --model")
        return about["model"]
    with checkpoint.opened(source) as file:
        try:
            return models.identified(file, openai=source.suffix in checkpoint.TORCH and torchscript.recognised(source))
        except ValueError as error:
            raise ValueError(f"what {source} holds cannot be told: {error}") from error


def _grid(positions: np.ndarray) -> str:
    """Learned positions [1, prefix + side * side, c] or [1, rows, columns, c] in words."""
    if positions.ndim == 4:
        return f"{positions.shape[1]}x{positions.shape[2]} positions, stored as they are; load resizes them"
    side = math.isqrt(positions.shape[1])
    return f"{side}x{side} positions and {positions.shape[1] - side * side} for tokens without one, stored as they are; load resizes them"


def _path(text: str) -> Path:
    try:
        return Path(paths.given(text, "the file"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="torch_to_flax.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="a name that --list shows; needed where the file does not tell")
    parser.add_argument("--checkpoint", metavar="FILE", type=_path, help="file to convert")
    parser.add_argument(
        "--out", metavar="FILE", type=_path, help="file to write; .safetensors unless --reverse; a folder for vltseg and vitdet"
    )
    parser.add_argument("--reverse", action="store_true", help="from jaxdg's names back to the publisher's; --out chooses the kind of file")
    parser.add_argument("--layout", metavar="NAME", help="with --reverse, whose names to write; a wrong one lists those there are")
    parser.add_argument("--list", action="store_true", help="show the models, where their weights are, licence and size")
    args = parser.parse_args(arguments)
    if args.list:
        print(models.listing())
        return 0
    if not (args.checkpoint and args.out):
        parser.error("--checkpoint and --out are both needed (or --list)")
    if args.layout and not args.reverse:
        parser.error("--layout is for --reverse; the layout of a published file is recognised by its names")
    if args.model == vltseg.NAME and args.reverse:
        parser.error("--reverse does not write vltseg")
    try:
        files = args.checkpoint, args.out
        args.model = args.model or model_of(args.checkpoint, args.reverse)
        if args.reverse:
            print(reverse_whole(*files) if args.model == vitdet.NAME else reverse(args.model, *files, args.layout))
        else:
            print(convert_whole(args.model, *files) if args.model in models.WHOLE else convert(args.model, *files))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

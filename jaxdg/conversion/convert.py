"""Published checkpoints to jaxdg's `.safetensors`, and back.

    jaxdg convert --list
    jaxdg convert --model augreg_ti16 --checkpoint vit_tiny.bin --out augreg_ti16.safetensors
    jaxdg convert --model augreg_ti16 --checkpoint augreg_ti16.safetensors --out back.pth --reverse
    jaxdg convert --model mask2former --checkpoint model_final.pkl --out head.safetensors
    jaxdg convert --model vltseg --checkpoint vltseg_checkpoint_gta_1.pth --out runs/vltseg_gta
    jaxdg convert --model tqdm --checkpoint tqdm-eva02-clip-vit-l-gta.pth --out runs/tqdm_gta
    jaxdg convert --model rein --checkpoint iter_40000_published.pth \
        --encoder dinov2_vitl14_pretrain.pth --out runs/rein_gta
    jaxdg convert --model vitdet --checkpoint model_final_61ccd1.pkl --out runs/vitdet_b
    jaxdg convert --model vitdet --checkpoint runs/vitdet_b --out back.pth --reverse
    jaxdg convert --model clip_the_gap --checkpoint model_best.pth --out runs/clip_the_gap

The source may be `.safetensors`, `.npz`, `.pth` (also `.pth.tar`), `.pt`, `.ckpt`, `.bin` or
`.pkl`, the `.index.json` of a model in several files, or a folder as it is downloaded; only writing
torch's files needs torch. Every tensor is converted or left out for a stated reason, every
parameter of the model is filled, or nothing is written and the offenders are named. Of a file that
holds the trained weights and their average over the training, --weights ema or --weights raw says
which. A model is an encoder, the text tower beside one, or `mask2former` or `faster_rcnn` for what
follows the encoder, of the sizes that its file has. `vltseg`, `vitdet`, `clip_the_gap`, `tqdm`,
`vfmnet`, `mgrnet`, `rein` and `soma` are whole models: their jaxdg side is a workdir. Files of
`rein` and `soma` hold adapter and head alone, so --encoder names the file of the encoder that they
were trained on.
"""

import argparse
import math
from pathlib import Path
import sys

import numpy as np

import jaxdg
from jaxdg import backbones, weights
from jaxdg.config import paths
from jaxdg.conversion import (
    adapted,
    checkpoint,
    mapping,
    models,
    report,
    vitdet,
    workdirs,
)


def convert(name: str, source: Path, out: Path, wanted: str | None = None) -> str:
    """Converts the published checkpoint `source` of the model called `name` to `out`.

    Args:
        name: of the zoo, a text tower's, `mask2former` or `faster_rcnn`.
        source: a file, the index of several, or a folder as it is downloaded.
        out: the file to write; one that jaxdg did not write is not replaced.
        wanted: of several sets of weights in it, "ema", "raw" or what leads to one.

    Returns:
        A report for a person: what was taken and mapped, what was left out and why.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit, with the offenders named by kind;
            nothing is written.
    """
    models.layouts(name)  # says what is wrong with the name
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    report.free(out, source, name)
    head = models.HEADS.get(name)
    config = None if head else backbones.TEXT_TOWERS.get(name) or backbones.entry(name).config
    activation = (
        config.activation
        if isinstance(config, backbones.ClipVitConfig | backbones.ClipTextConfig)
        else None
    )
    with checkpoint.opened(source, wanted) as file:
        if activation == "gelu" and file.scripted:
            raise ValueError(
                f"{source} is an archive as OpenAI publishes, trained with quick_gelu; --list shows"
                " the encoders for it"
            )
        with report.telling(name, source, file):
            view, known = models.viewed(file, name)
            if view.names != file.names:
                models.check_names(file, name)
            models.check_config(file, name)
            sizes = head.of_checkpoint(view.names, view.read) if head else ()
            module = head.abstract(*sizes) if head else models.abstract(name)
            converted = mapping.to_flax(module, known, view.names, view.read)
            if isinstance(config, backbones.LatentDiffusionConfig):
                # Computed now, so that a text tower that does not fit is told before anything else.
                _ = converted.tensors["context"]
        left_out = report.left_out_of(converted, view)
        about = {
            "model": name,
            "source": source.name,
            "sha256": file.digest(),
            "layout": converted.layout.name,
            "left_out": left_out,
            "jaxdg": jaxdg.__version__,
        }
        if view.notes:
            about["taken"] = "; ".join(view.notes)
        if activation:  # no tensor tells it, so the file does, and loading compares
            about["activation"] = activation
        if head:
            about |= head.about(*sizes)
        weights.save(converted.tensors, out, about)
        grids = [
            f"  {key}: {_grid(converted.tensors[key])}"
            for key in converted.tensors
            if key.endswith("pos_embed")
        ]

    lines = report.mapped(name, source, view, converted.layout, left_out) + grids
    if head:
        lines.append(f"  sizes, by its tensors: {head.described(*sizes)}")
    if activation:
        lines.append(
            f"  activation: {activation}, because {name} has it; the tensors do not tell, so see"
            f" --list that the source is for {name}"
        )
    return "\n".join(
        [*lines, f"  wrote {out}: {len(converted.tensors)} tensors, {out.stat().st_size} bytes"]
    )


def reverse(name: str, source: Path, out: Path, chosen: str | None = None) -> str:
    """Converts the jaxdg file `source` of the model called `name` back to its publisher's names and
    axes.

    Args:
        name: of the zoo, `mask2former` or `faster_rcnn`.
        source: a `.safetensors` file of jaxdg.
        out: `.npz`, `.safetensors`, `.pth`, `.pt` or `.bin`.
        chosen: name of a layout; None for the one torch users have, or in `.npz` that of its Flax
            files if there are any.

    Returns:
        A report for a person.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not fit, with the offenders named by kind;
            nothing is written.
    """
    known = models.layouts(name)
    if out.suffix not in checkpoint.SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {' '.join(checkpoint.SUFFIXES)}")
    report.free(out, source, name)
    about = weights.metadata(source)
    if about.get("model", name) != name:
        raise ValueError(f"{source} holds the weights of {about['model']}, not of {name}")
    names = [layout.name for layout in known]
    if chosen is not None and chosen not in names:
        raise ValueError(f"--layout {chosen} is none of {name}; allowed: {', '.join(names)}")
    head = models.HEADS.get(name)
    flax = [
        layout
        for layout in known
        if out.suffix == ".npz" and any("/" in row.source[0] for row in layout.rows)
    ]
    layout = known[names.index(chosen)] if chosen else (flax[-1] if flax else known[0])
    stored = weights.read(source)
    try:
        module = head.abstract(*head.of_tensors(stored)) if head else models.abstract(name)
        tensors = mapping.from_flax(module, layout, stored)
    except mapping.Misfit as error:
        foreign = (
            ""
            if "jaxdg" in about
            else (
                "; nothing tells that jaxdg wrote it: a published file is converted without"
                " --reverse"
            )
        )
        raise ValueError(f"{source} is no file of {name}: {error}{foreign}") from error
    versions = head.VERSIONS if head else None
    checkpoint.save(
        tensors, out, {"model": name, "source": source.name, "jaxdg": jaxdg.__version__}, versions
    )
    return report.written(name, out, len(tensors), layout)


def model_of(source: Path, ours: bool, wanted: str | None = None) -> str:
    """The model that a file is of: by the tensors of a published one (which of them is `wanted`),
    by the metadata of one of `ours`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not tell; the message says between what.
    """
    if ours:
        about = weights.metadata(source)
        if "model" not in about:
            raise ValueError(f"{source} does not say what model it is of; say it with --model")
        return about["model"]
    with checkpoint.opened(source, wanted) as file:
        try:
            return models.identified(file)
        except ValueError as error:
            raise ValueError(f"what {source} holds cannot be told: {error}") from error


def _grid(positions: np.ndarray) -> str:
    """Learned positions [1, prefix + side * side, c] or [1, rows, columns, c] in words."""
    if positions.ndim == 4:
        return (
            f"{positions.shape[1]}x{positions.shape[2]} positions, stored as they are; load resizes"
            " them"
        )
    side = math.isqrt(positions.shape[1])
    return (
        f"{side}x{side} positions and {positions.shape[1] - side * side} for tokens without one,"
        " stored as they are; load resizes them"
    )


def _path(text: str) -> Path:
    try:
        return Path(paths.given(text, "the file"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _converted(args: argparse.Namespace) -> str:
    """What the command does without `--reverse`."""
    crop = args.crop or adapted.CROPS[0]
    training = adapted.Training(crop, args.source or "gta5")
    given = args.model, args.checkpoint, args.out, args.weights
    if args.model not in models.ADAPTED:
        if args.encoder or args.crop:
            raise ValueError(
                f"--encoder and --crop are for {' and '.join(models.ADAPTED)}, not for {args.model}"
            )
        if args.model in models.SOURCED:
            return workdirs.convert_whole(*given, trained_on=training.source)
        if args.source:
            raise ValueError(
                f"--source is for {', '.join(models.ADAPTED | models.SOURCED)}, not for"
                f" {args.model}"
            )
        return (workdirs.convert_whole if args.model in models.WHOLE else convert)(*given)
    if not args.encoder:
        raise ValueError(
            f"a file of {args.model} holds adapter and head alone; give the published file of the"
            " encoder with --encoder"
        )
    if crop not in adapted.CROPS:
        raise ValueError(
            f"--crop is {crop}; allowed: {' or '.join(map(str, adapted.CROPS))}, of the models that"
            " were released"
        )
    return workdirs.convert_adapted(
        args.model, args.checkpoint, args.encoder, args.out, args.weights, training
    )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="jaxdg convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a name that --list shows; needed where the file does not tell",
    )
    parser.add_argument("--checkpoint", metavar="FILE", type=_path, help="file to convert")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=_path,
        help=(
            "file to write; .safetensors unless --reverse; a folder for whole models (vltseg,"
            " vitdet, clip_the_gap, tqdm, vfmnet, mgrnet, rein, soma)"
        ),
    )
    parser.add_argument(
        "--encoder",
        metavar="FILE",
        type=_path,
        help="with rein and soma, the file of the encoder, as published",
    )
    parser.add_argument(
        "--crop",
        metavar="PIXELS",
        type=int,
        help=(
            "with rein and soma, side of the images that the model was trained on, which no tensor"
            " tells: 512 (default), or 1024"
        ),
    )
    parser.add_argument(
        "--source",
        metavar="NAME",
        help=(
            "with tqdm, vfmnet, mgrnet, rein and soma, what the model was trained on, which no"
            " tensor tells either: gta5 (default), synthia, gta5+synthia or cityscapes"
        ),
    )
    parser.add_argument(
        "--weights",
        metavar="ema|raw|NAME",
        help=(
            "which of several sets of weights in a file: the average over the training, or as"
            " trained"
        ),
    )
    parser.add_argument(
        "--reverse",
        action="store_true",
        help="from jaxdg's names back to the publisher's; --out chooses the kind of file",
    )
    parser.add_argument(
        "--layout",
        metavar="NAME",
        help="with --reverse, whose names to write; a wrong one lists those there are",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="show the models, where their weights are, licence and size",
    )
    args = parser.parse_args(arguments)
    if args.list:
        print(models.listing())
        return 0
    if not (args.checkpoint and args.out):
        parser.error("--checkpoint and --out are both needed (or --list)")
    if args.layout and not args.reverse:
        parser.error(
            "--layout is for --reverse; the layout of a published file is recognised by its names"
        )
    if args.reverse and (args.encoder or args.crop or args.source):
        parser.error("--encoder, --crop and --source are for published files, not for --reverse")
    if args.weights and args.reverse:
        parser.error("--weights is for published files; one of jaxdg holds one set")
    if args.reverse and args.model in {*models.WHOLE, *models.ADAPTED} - {vitdet.NAME}:
        parser.error(f"--reverse does not write {args.model}")
    try:
        files = args.checkpoint, args.out
        if not args.model:
            report.free(args.out, args.checkpoint, None)
            args.model = model_of(args.checkpoint, args.reverse, args.weights)
        if args.reverse:
            print(
                workdirs.reverse_whole(*files)
                if args.model == vitdet.NAME
                else reverse(args.model, *files, args.layout)
            )
        else:
            print(_converted(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

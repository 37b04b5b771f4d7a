"""Published files of whole models to workdirs, and ViTDet's back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxdg
from jaxdg.conversion import (
    adapted,
    checkpoint,
    clip_the_gap,
    mapping,
    models,
    report,
    tqdm,
    vitdet,
    vltseg,
    wrappers,
)
from jaxdg.tasks.run_state import opened

# What is computed from a file's tensors, beside them.
PREPARED = {family.NAME: family.prepared for family in (tqdm, clip_the_gap)}


def convert_whole(
    name: str, source: Path, out: Path, wanted: str | None = None, trained_on: str = "gta5"
) -> str:
    """Converts the published checkpoint `source` of the whole model called `name` to the workdir
    `out`; else as `convert.convert`. Of `models.SOURCED`, `trained_on` is what no tensor tells.
    """
    family = models.WHOLE[name]
    told = {"source": trained_on} if name in models.SOURCED else {}
    _new_folder(out, name)
    with checkpoint.opened(source, wanted) as file:
        with report.telling(name, source, file):
            view = wrappers.unwrapped(file, family.layouts())
            config = family.of_checkpoint(view, **told)
            model = vltseg.abstract(config)
            layout = family.of_run(config, view)
            whole = PREPARED[name](view, config) if name in PREPARED else view
            converted = mapping.to_flax(model, (layout,), whole.names, whole.read)
        left_out = report.left_out_of(converted, view)
        about = _about(name, {source.name: file}, layout.name, left_out)
        vltseg.write(config, model, converted.tensors, out, about)
        lines = report.mapped(name, source, view, layout, left_out)
    return "\n".join(
        [
            *lines,
            f"  {family.described(config)}",
            f"  wrote {out}: {len(converted.tensors)} tensors, step {config.steps}",
        ]
    )


def convert_adapted(
    name: str,
    source: Path,
    encoder: Path,
    out: Path,
    wanted: str | None,
    training: adapted.Training,
) -> str:
    """Converts a released adapter with its head, and the file of its encoder, to the workdir `out`.

    Args:
        name: one of `models.ADAPTED`.
        source: what was released.
        encoder: the file of the frozen encoder, as published or as the authors convert it.
        out: the workdir.
        wanted: as of `convert.convert`.
        training: what no tensor tells of it.

    Returns:
        A report for a person.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as of `convert.convert`.
    """
    family = models.ADAPTED[name]
    _new_folder(out, name)
    with checkpoint.opened(source, wanted) as file, checkpoint.opened(encoder) as beside:
        with report.telling(name, source, file):
            view = wrappers.unwrapped(file, family.layouts())
            names = family.encoders(view)
        with report.telling(" or ".join(names), encoder, beside):
            frozen = adapted.frozen(beside, names, training.crop)
        with report.telling(name, source, file):
            config = family.of_checkpoint(view, frozen, training)
            layout = family.layout(view, frozen)
            model = vltseg.abstract(config)
            both = adapted.joined(view, frozen, layout)
            converted = mapping.to_flax(model, (layout,), both.names, both.read)
            family.check(view, frozen)
        left_out = report.left_out_of(converted, view)
        unread = report.left_out_of(frozen.converted, frozen.view)
        about = _about(
            name, {source.name: file, encoder.name: beside}, layout.name, left_out | unread
        )
        vltseg.write(config, model, converted.tensors, out, about)
        lines = report.mapped(name, source, view, layout, left_out)
        lines += report.mapped(frozen.name, encoder, frozen.view, frozen.converted.layout, unread)
    return "\n".join(
        [
            *lines,
            f"  {vltseg.described(config)}",
            f"  wrote {out}: {len(converted.tensors)} tensors, step {config.steps}",
        ]
    )


def _new_folder(out: Path, name: str) -> None:
    """Refuses a workdir that holds something."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"--out {out} is there already; {name} is written to a new folder, the workdir of a"
            " finished run"
        )


def _about(
    name: str,
    files: Mapping[str, checkpoint.Checkpoint],
    layout: str,
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """What a workdir says of the files that it was converted from."""
    return {
        "model": name,
        "sources": {source: file.digest() for source, file in files.items()},
        "layout": layout,
        "left_out": dict(left_out),
        "jaxdg": jaxdg.__version__,
    }


def reverse_whole(source: Path, out: Path) -> str:
    """Converts a workdir, or one step in it, of a ViTDet back to detectron2's names and axes;
    returns and raises as `convert.reverse`.
    """
    if out.suffix not in checkpoint.SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {' '.join(checkpoint.SUFFIXES)}")
    report.free(out, source, vitdet.NAME)
    trained = opened(source)
    layout = vitdet.of_workdir(trained.config)
    tensors = mapping.from_flax(vltseg.abstract(trained.config), layout, trained.tensors())
    checkpoint.save(
        tensors, out, {"model": vitdet.NAME, "source": source.name, "jaxdg": jaxdg.__version__}
    )
    return report.written(vitdet.NAME, out, len(tensors), layout)

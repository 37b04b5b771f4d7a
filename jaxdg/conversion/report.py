"""What a conversion may write over, and what it says: of which file an error is, and what became of
its tensors.
"""

from collections.abc import Iterator, Mapping
import contextlib
from pathlib import Path

from jaxdg import weights
from jaxdg.conversion import checkpoint, mapping, models, sets, wrappers


def free(out: Path, source: Path, name: str | None) -> None:
    """Refuses to write over the checkpoint, and over a file that jaxdg did not write for the same
    model.

    Raises:
        ValueError: what stands there, and what to do.
    """
    if not out.exists():
        return
    if source.exists() and out.samefile(source):
        raise ValueError(
            f"--out {out} is --checkpoint {source}, which would be lost; name another file"
        )
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it")
    about = {}
    if out.suffix == ".safetensors":
        with contextlib.suppress(ValueError):
            about = weights.metadata(out)
    if "jaxdg" not in about:
        raise ValueError(
            f"--out {out} is there already, and nothing tells that jaxdg wrote it; name another"
            " file, or remove it"
        )
    if name not in (None, about.get("model")):
        raise ValueError(
            f"--out {out} is there already, with the weights of {about.get('model')}; name another"
            " file, or remove it"
        )


@contextlib.contextmanager
def telling(name: str, source: Path, file: checkpoint.Checkpoint) -> Iterator[None]:
    """Says of which file an error is, and what else the file may be."""
    try:
        yield
    except wrappers.Undecided as error:
        raise ValueError(f"{source} is not clear: {error}") from error
    except mapping.Misfit as error:
        raise ValueError(
            f"{source} is no checkpoint of {name}{models.likely(file, name)}: {error}"
        ) from error


def left_out_of(converted: mapping.Converted, view: checkpoint.Checkpoint) -> dict[str, str]:
    """What of a file was not mapped, by its names there, with the reasons."""
    return {view.was.get(name, name): why for name, why in converted.left_out.items()} | dict(
        view.outside
    )


def mapped(
    name: str,
    source: Path,
    view: checkpoint.Checkpoint,
    layout: mapping.Layout,
    left_out: Mapping[str, str],
) -> list[str]:
    """Which tensors were taken, how many were mapped, and which were left out for what reason."""
    total = len(view.names) + len(view.outside)
    lines = [
        f"{name} from {source.name}: {total - len(left_out)} of {total} tensors mapped (layout:"
        f" {layout.name})"
    ]
    lines += [f"  {note}" for note in view.notes]
    for reason in dict.fromkeys(left_out.values()):
        kinds = dict.fromkeys(
            weights.NUMBER.sub("*", key) for key, why in left_out.items() if why == reason
        )
        lines.append(f"  left out: {sets.shortened([*kinds], most=20)} ({reason})")
    return lines


def written(name: str, out: Path, tensors: int, layout: mapping.Layout) -> str:
    """The line about a file in the publisher's names."""
    note = f"; {layout.note}" if layout.note else ""
    return (
        f"{name} to {out}: {tensors} tensors, {out.stat().st_size} bytes (layout:"
        f" {layout.name}{note})"
    )

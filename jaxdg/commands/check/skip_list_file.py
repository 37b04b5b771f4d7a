"""The list of broken files that `jaxdg check` writes and the configuration's `data.skip` reads."""

from collections.abc import Iterable
import os
from pathlib import Path

from jaxdg.data.index import Defect
from jaxdg.data.skip import HEADER


def is_replaceable(file: Path) -> bool:
    """Whether a file is such a list, or empty."""
    content = file.read_bytes() if file.is_file() else None
    return content is not None and content.startswith(HEADER.encode()[: len(content)])


def write(file: Path, broken: Iterable[Defect], root: str) -> int:
    """Writes the list: each broken file below a comment that gives its defects.

    Args:
        file: is replaced if it is such a list.
        broken: the defects; those that are of no single image or annotation are left out.
        root: data root.

    Returns:
        Number of files.
    """
    reasons: dict[str, list[str]] = {}
    for path, text in broken:
        # Lists of images (.txt) and COCO's files (.json) hold many images.
        if path and not path.lower().endswith((".txt", ".json")):
            line = os.path.relpath(path, root)
            line = f"./{line}" if line.startswith("#") else line  # or it would be a comment
            reasons.setdefault(line, []).append(f"# {' '.join(text.lstrip(':').split())}\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (line for path, why in reasons.items() for line in (*why, f"{path}\n"))
    file.write_text("".join((HEADER, *lines)), encoding="utf-8", errors="surrogateescape")
    return len(reasons)

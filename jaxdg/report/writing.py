"""Writes a report in all its forms."""

from pathlib import Path
import re

from jaxdg import files
from jaxdg.report import html, latex, markdown
from jaxdg.report.document import Document

PAGE = "report.html"
PICTURES = "report_pictures"  # beside report.md
_OURS = re.compile(r"(study|run)\d+_.*\.(svg|png|jpg)")


def write(document: Document, out: Path) -> list[Path]:
    """Writes `report.html`, `report.md` with its pictures, and `tables.tex`.

    Args:
        document: the report.
        out: folder; an earlier report there is replaced, with its pictures.

    Returns:
        The written texts.
    """
    text, pictures = markdown.text_and_pictures(document, PICTURES)
    shown = out / PICTURES
    shown.mkdir(parents=True, exist_ok=True)
    for old in shown.iterdir():
        if _OURS.fullmatch(old.name) and old.name not in pictures:
            old.unlink()
    for name, data in pictures.items():
        (shown / name).write_bytes(data)
    written = {PAGE: html.page(document), "report.md": text, "tables.tex": latex.tables(document)}
    for name, content in written.items():
        files.write(out / name, content)
    return [out / name for name in written]

"""Writes a report as Markdown, with its pictures in files beside it."""

from collections.abc import Callable, Iterable
import re
from urllib.parse import quote

from jaxdg.report import plots
from jaxdg.report.document import (
    Block,
    Cell,
    Commands,
    Document,
    Facts,
    Pictures,
    Plots,
    References,
    Table,
    Text,
)


def text_and_pictures(document: Document, folder: str) -> tuple[str, dict[str, bytes]]:
    """The report as Markdown, and the pictures that it shows.

    Args:
        document: the report.
        folder: of the pictures, relative to the text.

    Returns:
        The text, and the content of each picture by its name in `folder`.
    """
    files: dict[str, bytes] = {}

    def keep(name: str, data: bytes, alt: str) -> str:
        files[name] = data
        return f"![{escaped(alt)}]({quote(f'{folder}/{name}')})"

    parts = [
        f"# {escaped(document.title)}",
        *(escaped(block.text) for block in document.introduction),
    ]
    parts.append(
        "\n".join(f"- [{escaped(s.title)}](#{_anchor(s.title)})" for s in document.sections)
    )
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_block(block, section.key, keep) for block in section.blocks]
    return "\n\n".join(parts) + "\n", files


def _block(block: Block, key: str, keep: Callable[[str, bytes, str], str]) -> str:
    match block:
        case Text(text):
            return escaped(text)
        case Table(caption, columns, rows, note, _):
            lines = [_row(map(escaped, columns)), _row(["---", *["---:"] * (len(columns) - 1)])]
            for row in rows:
                cite = "" if row.cite is None else f" \\[{row.cite}\\]"
                lines.append(_row([escaped(row.head) + cite, *map(_cell, row.cells)]))
            note = f"\n\n*{escaped(note)}*" if note else ""
            return f"**{escaped(caption)}**\n\n" + "\n".join(lines) + note
        case Plots(drawn, caption):
            pictures = [
                keep(f"{key}_{name}.svg", plots.file(svg).encode(), name.replace("_", " "))
                for name, svg in drawn
            ]
            return "\n".join(pictures) + f"\n\n*{escaped(caption)}*"
        case Pictures(name, rows, caption, legend):
            width = max(map(len, rows))
            lines = [_row([""] * width), _row(["---"] * width)]
            for i, row in enumerate(rows):
                shown = [
                    keep(f"{key}_{name}_{i}_{j}.{tile.ending}", tile.data, tile.caption)
                    for j, tile in enumerate(row)
                ]
                captions = [escaped(tile.caption) for tile in row]
                empty = [""] * (width - len(row))
                lines += [_row([*shown, *empty]), _row([*captions, *empty])]
            colors = "; ".join(f"{name} #{r:02x}{g:02x}{b:02x}" for name, (r, g, b) in legend)
            colors = f"\n\nColours: {escaped(colors)}." if colors else ""
            return f"**{escaped(caption)}**\n\n" + "\n".join(lines) + colors
        case Facts(facts, code):
            return "\n".join(
                f"- {escaped(term)}: {_code(text) if term in code else escaped(text)}"
                for term, text in facts
            )
        case Commands(caption, shell):
            fence = "`" * max(3, 1 + _ticks("\n".join(shell)))
            return "\n".join([escaped(caption), "", fence, *shell, fence])
        case References(sources):
            return "\n".join(
                f"{i}. {escaped(text)}{f' <{url}>' if url else ''}"
                for i, (text, url) in enumerate(sources, 1)
            )


def escaped(text: str) -> str:
    """Text that Markdown shows unchanged.

    On some hosts `$` begins mathematics, `~` a deletion, `&..;` a letter and `:..:` a picture.
    """
    return re.sub(r"([\\`*_\[\]<>|#$~]|&(?=#?\w+;)|:(?=[\w+-]+:))", r"\\\1", text)


def _code(text: str) -> str:
    """Text as code, between more backticks than it holds."""
    ticks = "`" * (1 + _ticks(text))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _ticks(text: str) -> int:
    """The length of the longest run of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
    return f"{text} {escaped(cell.detail)}".strip()


def _anchor(title: str) -> str:
    """The anchor that hosts of Markdown give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")

"""What a report consists of: sections of blocks, such as text, tables, plots and pictures.

`html`, `markdown` and `latex` write the same blocks, so that the figures are the same in each.
"""

import dataclasses

MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: printed in full size.
        detail: printed smaller behind the text, such as a spread.
        best: printed bold.
        competes: False if the figure is not a score.
        shade: how dark the cell is, from 0 to 1; what it says must stand in the text too.
    """

    text: str
    detail: str = ""
    best: bool = False
    competes: bool = True
    shade: float = 0.0

    @property
    def ranked(self) -> bool:
        """Whether it is a score that may be the best."""
        return self.competes and self.text[:1].isdigit()


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table; `cite` is the number of its source if the row is published."""

    head: str
    cells: tuple[Cell, ...]
    cite: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first of `columns` stands above the heads of the rows.

    `narrow` writes the heads of columns upwards where there are many of them.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""
    narrow: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Plots:
    """Plots side by side, each as name and SVG."""

    plots: tuple[tuple[str, str], ...]
    caption: str


@dataclasses.dataclass(frozen=True)
class Tile:
    """A small picture: the content of a file and its ending, png or jpg."""

    caption: str
    data: bytes
    ending: str


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rows of small pictures; `legend` gives the RGB colour of each class."""

    name: str
    rows: tuple[tuple[Tile, ...], ...]
    caption: str
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """Terms and their values; values of the terms in `code` are written as typed."""

    facts: tuple[tuple[str, str], ...]
    code: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Commands:
    """Shell lines, as typed."""

    caption: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class References:
    """Numbered sources: text and address, if there is one."""

    sources: tuple[tuple[str, str | None], ...]


Block = Text | Table | Plots | Pictures | Facts | Commands | References


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report with a heading; `key` names it in links and files."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    introduction: tuple[Text, ...]
    sections: tuple[Section, ...]

"""What a report is made of, and how it is written: one HTML page, Markdown with pictures beside it,
and LaTeX tables.

A report is sections of blocks: text, tables, plots, pictures, commands. Each block is written three
ways from the same content, so that the figures of a report are the same wherever they are read. The
page needs nothing but itself: plots are inline, pictures are data URIs.
"""

import base64
from collections.abc import Callable, Iterable
import dataclasses
from html import escape
import re
import unicodedata
from urllib.parse import quote

from jaxdg.studies.report import plots

MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        detail: smaller, behind it, such as a spread.
        best: printed bold.
        competes: False where a figure is no score.
    """

    text: str
    detail: str = ""
    best: bool = False
    competes: bool = True

    @property
    def ranked(self) -> bool:
        """Whether it is a score that may be the best."""
        return self.competes and self.text[:1].isdigit()


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of a table: its head, its cells, and the number of its source where others have
    published it.
    """

    head: str
    cells: tuple[Cell, ...]
    cite: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `columns` are the heads, the one above the rows' heads first."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Plots:
    """SVG side by side, by name, and what they show."""

    plots: tuple[tuple[str, str], ...]
    caption: str


@dataclasses.dataclass(frozen=True)
class Tile:
    """A small picture: what stands below it, the file's contents, and their ending, png or jpg."""

    caption: str
    data: bytes
    ending: str


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Rows of small pictures, by name, and what they show; `legend`: name and RGB of what colours
    mean.
    """

    name: str
    rows: tuple[tuple[Tile, ...], ...]
    caption: str
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Facts:
    """Pairs of a term and what is said about it; what is `code` is written as typed."""

    facts: tuple[tuple[str, str], ...]
    code: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Commands:
    """Shell lines, exactly as to be typed."""

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


# --- HTML -----------------------------------------------------------------------------------------

_STYLE = (
    plots.STYLE
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 "Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2.5rem) 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 .8rem;padding-top:1rem;border-top:2px solid var(--ink)}
p,nav,dl,.references{max-width:46rem}
a{color:var(--c0)}
nav ol{padding-left:1.4rem}
figure{margin:1.8rem 0}
figcaption{font-size:.92rem;padding:.5rem 0 0;max-width:46rem}
figcaption.above{padding:0 0 .5rem;font-weight:600}
.note{font-size:.85rem;color:var(--muted);margin:.4rem 0 0;max-width:46rem}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums lining-nums}
thead th{vertical-align:bottom;border-bottom:1px solid var(--ink);border-top:2px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:2px solid var(--ink)}
th,td{padding:.28rem .55rem;text-align:left;font-weight:400}
th:first-child{padding-left:0;min-width:8rem;max-width:19rem}
td.number{white-space:nowrap}
.number{text-align:right}
td small{color:var(--muted);font-size:.8em}
td b{font-weight:700}
.published th,.published td{color:var(--muted)}
.published b{color:var(--ink)}
.missing{font-style:italic;color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.5rem 2rem;align-items:start}
svg.plot{display:block;max-width:100%;height:auto}
.tiles{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);gap:.6rem;margin:0 0 1.4rem}
.tiles figure{margin:0}
.tiles img{display:block;width:100%;height:auto;border:1px solid var(--line)}
.tiles figcaption{font-size:.8rem;line-height:1.3;padding:.2rem 0 0}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.4rem 0;list-style:none;font-size:.85rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;border:1px solid var(--muted);vertical-align:-.08rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;margin:2rem 0;font-size:.92rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.82rem/1.5 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem .9rem;margin:.3rem 0 1.5rem}
.commands p{margin-bottom:0}
.references{overflow-wrap:anywhere}
@media(max-width:40rem){
body{font-size:15px}
thead th:first-child,tbody th{position:sticky;left:0;background:var(--paper);min-width:6.5rem;max-width:9rem}
thead th:first-child{z-index:1}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:.5rem}
.tiles{grid-auto-flow:row;grid-template-columns:repeat(2,1fr)}
}
@media print{
@page{size:A4;margin:14mm 13mm}
html{font-size:9.5pt}
body{font-size:1rem}
main{max-width:none;padding:0}
h2{break-after:avoid}
section+section{break-before:page}
section+section h2{border-top:0;margin-top:0;padding-top:0}
tr,svg,.tiles,.tiles figure,dl{break-inside:avoid}
figcaption.above,.commands p{break-after:avoid}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
thead{display:table-header-group}
.scroll{overflow:visible}
table{font-size:.85rem}
th,td{padding:.15rem .4rem}
.panels{grid-template-columns:1fr 1fr}
.tiles{gap:.3rem}
a{color:inherit}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""
)


def html(document: Document) -> str:
    """The report as one page that needs no other file."""
    contents = "".join(
        f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in document.sections
    )
    sections = "".join(
        "<section"
        f' id="{s.key}"><h2>{escape(s.title)}</h2>{"".join(map(_html_block, s.blocks))}</section>'
        for s in document.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta'
        f' charset="utf-8"><title>{escape(document.title)}</title>'
        '<meta name="viewport" content="width=device-width,'
        f' initial-scale=1"><style>{_STYLE}</style></head>\n<body><main>'
        f"<h1>{escape(document.title)}</h1>{''.join(map(_html_block, document.introduction))}"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n{sections}</main></body></html>\n'
    )


def _html_block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>\n"
        case Table():
            return _html_table(block)
        case Plots(drawn, caption):
            return (
                "<figure><div"
                f' class="panels">{"".join(svg for _, svg in drawn)}</div><figcaption>{escape(caption)}</figcaption></figure>\n'
            )
        case Pictures(_, rows, caption, legend):
            tiles = "".join(
                f'<div class="tiles">{"".join(map(_html_tile, row))}</div>' for row in rows
            )
            swatches = "".join(
                f'<li><i style="background:rgb{color}"></i>{escape(name)}</li>'
                for name, color in legend
            )
            return (
                f'<figure><figcaption class="above">{escape(caption)}</figcaption>{tiles}<ul'
                f' class="legend">{swatches}</ul></figure>\n'
            )
        case Facts(facts, code):

            def said(term, text):
                return f"<code>{escape(text)}</code>" if term in code else escape(text)

            return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{said(term, text)}</dd>' for term, text in facts)}</dl>\n"
        case Commands(caption, shell):
            typed = escape("\n".join(shell))
            return (
                f'<div class="commands"><p>{escape(caption)}</p><pre'
                f' tabindex="0">{typed}</pre></div>\n'
            )
        case References(sources):

            def link(text, url):
                return escape(text) + (f' <a href="{escape(url)}">{escape(url)}</a>' if url else "")

            items = "".join(
                f'<li id="source{i}">{link(*source)}</li>' for i, source in enumerate(sources, 1)
            )
            return f'<ol class="references">{items}</ol>\n'


def _html_table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_classes(number=i > 0)}>{escape(name)}</th>'
        for i, name in enumerate(table.columns)
    )
    rows = "".join(
        f"<tr{_classes(published=row.cite is not None)}><th"
        f' scope="row">{escape(row.head)}{_html_cite(row.cite)}</th>'
        f"{''.join(map(_html_cell, row.cells))}</tr>\n"
        for row in table.rows
    )
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<figure><figcaption class="above">{escape(table.caption)}</figcaption>'
        '<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{escape(table.caption)}"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}</figure>\n"
    )


def _html_cell(cell: Cell) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td{_classes(number=True, missing=cell.text == MISSING)}>{text}{detail}</td>"


def _html_cite(cite: int | None) -> str:
    return "" if cite is None else f' <a href="#source{cite}">[{cite}]</a>'


def _html_tile(tile: Tile) -> str:
    kind = {"png": "png", "jpg": "jpeg"}[tile.ending]
    data = base64.b64encode(tile.data).decode()
    caption = escape(tile.caption)
    return (
        f'<figure><img src="data:image/{kind};base64,{data}"'
        f' alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _classes(**named: bool) -> str:
    used = " ".join(name for name, on in named.items() if on)
    return f' class="{used}"' if used else ""


# --- Markdown -------------------------------------------------------------------------------------


def markdown(document: Document, folder: str) -> tuple[str, dict[str, bytes]]:
    """The report in Markdown, and the pictures it shows.

    Args:
        document: the report.
        folder: of the pictures, relative to the text.

    Returns:
        The text, and the contents of every picture by its name in `folder`.
    """
    files: dict[str, bytes] = {}

    def keep(name: str, data: bytes, alt: str) -> str:
        files[name] = data
        return f"![{_md(alt)}]({quote(f'{folder}/{name}')})"

    parts = [f"# {_md(document.title)}", *(_md(block.text) for block in document.introduction)]
    parts.append("\n".join(f"- [{_md(s.title)}](#{_anchor(s.title)})" for s in document.sections))
    for section in document.sections:
        parts.append(f"## {_md(section.title)}")
        parts += [_md_block(block, section.key, keep) for block in section.blocks]
    return "\n\n".join(parts) + "\n", files


def _md_block(block: Block, key: str, keep: Callable[[str, bytes, str], str]) -> str:
    match block:
        case Text(text):
            return _md(text)
        case Table(caption, columns, rows, note):
            lines = [_md_row(map(_md, columns)), _md_row(["---", *["---:"] * (len(columns) - 1)])]
            for row in rows:
                cite = "" if row.cite is None else f" \\[{row.cite}\\]"
                lines.append(_md_row([_md(row.head) + cite, *map(_md_cell, row.cells)]))
            return "\n\n".join(
                [f"**{_md(caption)}**", "\n".join(lines)] + ([f"*{_md(note)}*"] if note else [])
            )
        case Plots(drawn, caption):
            pictures = [
                keep(f"{key}_{name}.svg", plots.file(svg).encode(), name.replace("_", " "))
                for name, svg in drawn
            ]
            return "\n".join(pictures) + f"\n\n*{_md(caption)}*"
        case Pictures(name, rows, caption, legend):
            wide = max(map(len, rows))
            lines = [_md_row([""] * wide), _md_row(["---"] * wide)]
            for i, row in enumerate(rows):
                shown = [
                    keep(f"{key}_{name}_{i}_{j}.{tile.ending}", tile.data, tile.caption)
                    for j, tile in enumerate(row)
                ]
                lines += [
                    _md_row([*shown, *[""] * (wide - len(row))]),
                    _md_row([*(_md(t.caption) for t in row), *[""] * (wide - len(row))]),
                ]
            colors = "; ".join(f"{name} #{r:02x}{g:02x}{b:02x}" for name, (r, g, b) in legend)
            return (
                f"**{_md(caption)}**\n\n"
                + "\n".join(lines)
                + (f"\n\nColours: {_md(colors)}." if colors else "")
            )
        case Facts(facts, code):
            return "\n".join(
                f"- {_md(term)}: {_md_code(text) if term in code else _md(text)}"
                for term, text in facts
            )
        case Commands(caption, shell):
            fence = "`" * max(3, 1 + _ticks("\n".join(shell)))
            return "\n".join([_md(caption), "", fence, *shell, fence])
        case References(sources):
            return "\n".join(
                f"{i}. {_md(text)}{f' <{url}>' if url else ''}"
                for i, (text, url) in enumerate(sources, 1)
            )


def _md(text: str) -> str:
    """Text as Markdown shows it unchanged; `$` begins mathematics, `~` a deletion, `&..;` a letter
    and `:..:` a picture on some hosts.
    """
    return re.sub(r"([\\`*_\[\]<>|#$~]|&(?=#?\w+;)|:(?=[\w+-]+:))", r"\\\1", text)


def _md_code(text: str) -> str:
    """Text as typed, between more backticks than it holds."""
    ticks = "`" * (1 + _ticks(text))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _ticks(text: str) -> int:
    """The most backticks that follow each other in a text."""
    return max(map(len, re.findall("`+", text)), default=0)


def _md_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _md_cell(cell: Cell) -> str:
    text = f"**{_md(cell.text)}**" if cell.best else _md(cell.text)
    return f"{text} {_md(cell.detail)}".strip()


def _anchor(title: str) -> str:
    """Where hosts of Markdown put a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# --- LaTeX ----------------------------------------------------------------------------------------


def latex(document: Document) -> str:
    """The tables of the report, to be read into a document that uses the packages booktabs and
    graphicx.
    """
    parts = [f"% {document.title}", "% Needs \\usepackage{booktabs,graphicx} in the preamble."]
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(_tex_table(block, section.title))
            if isinstance(block, References):
                sources = [_tex(text + (f" {url}" if url else "")) for text, url in block.sources]
                lines = [f"\\item[{{[{i}]}}] {source}" for i, source in enumerate(sources, 1)]
                parts.append(
                    "\n".join(["\\begin{description}\\raggedright", *lines, "\\end{description}"])
                )
    return "\n\n".join(parts) + "\n"


def _tex_table(table: Table, title: str) -> str:
    def cite(row):
        return "" if row.cite is None else f" [{row.cite}]"

    body = [
        " & ".join([_tex(row.head + cite(row)), *map(_tex_cell, row.cells)]) + r" \tabularnewline"
        for row in table.rows
    ]
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\small",
            rf"\caption{{{_tex(f'{title}. {table.caption}')}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(table.columns) - 1)}@{{}}}}",
            r"\toprule",
            " & ".join(map(_tex, table.columns)) + r" \tabularnewline",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *([rf"\par\smallskip\footnotesize {_tex(table.note)}"] if table.note else []),
            r"\end{table}",
        ]
    )


def _tex_cell(cell: Cell) -> str:
    text = (
        rf"\textbf{{{_tex(cell.text)}}}"
        if cell.best
        else rf"\emph{{{MISSING}}}"
        if cell.text == MISSING
        else _tex(cell.text)
    )
    return text + (rf" {{\scriptsize {_tex(cell.detail)}}}" if cell.detail else "")


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_{}"},
}
_TEX |= {
    "±": r"$\pm$",
    "→": r"$\to$",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "Ø": r"\O{}",
    "ø": r"\o{}",
    "°": r"$^\circ$",
}
_TEX |= {"`": r"\textasciigrave{}", '"': "''"}
_TEX |= {
    "–": "--",
    "×": r"$\times$",
    "“": "``",
    "”": "''",
    "[": "{[}",
    "]": "{]}",
    "†": r"$\dagger$",
}


def _tex(text: str) -> str:
    """Text as LaTeX prints it unchanged; letters that plain LaTeX may lack lose their accents, or
    stay if nothing of them would be left.
    """
    plain = "".join(
        _TEX.get(c) or _ascii(c) or c for c in text.replace("--", "-\0-").replace("--", "-\0-")
    )
    plain = plain.replace("\0", "{}")  # two hyphens are a dash
    return (
        f"{{*}}{plain[1:]}" if plain.startswith("*") else plain
    )  # which a row must not begin with


def _ascii(text: str) -> str:
    return "".join(
        c if c.isascii() else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        for c in text
    )

"""Writes a report as one HTML page, which holds its plots and pictures."""

import base64
from collections.abc import Iterable
from html import escape

from jaxdg.report import plots
from jaxdg.report.document import (
    MISSING,
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
    Tile,
)

_STYLE = (
    plots.STYLE
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 "Helvetica Neue",Helvetica,Arial,"Liberation Sans",sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2.5rem) 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.4rem;line-height:1.25;margin:3rem 0 .8rem;padding-top:1rem;
border-top:2px solid var(--ink)}
p,nav,dl,.references{max-width:46rem}
a{color:var(--c0)}
nav ol{padding-left:1.4rem}
figure{margin:1.8rem 0}
figcaption{font-size:.92rem;padding:.5rem 0 0;max-width:46rem}
figcaption.above{padding:0 0 .5rem;font-weight:600}
.note{font-size:.85rem;color:var(--muted);margin:.4rem 0 0;max-width:46rem}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;
font-variant-numeric:tabular-nums lining-nums}
thead th{vertical-align:bottom;border-bottom:1px solid var(--ink);border-top:2px solid var(--ink)}
tbody tr+tr>*{border-top:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:2px solid var(--ink)}
th,td{padding:.28rem .55rem;text-align:left;font-weight:400}
th:first-child{padding-left:0;min-width:8rem;max-width:19rem}
td.number{white-space:nowrap}
.number{text-align:right}
td small{color:var(--muted);font-size:.8em}
td b{font-weight:700}
td[style]{background:color-mix(in srgb,var(--c0) calc(var(--shade)*45%),transparent)}
.narrow thead th+th{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;
padding:.55rem .2rem;border-width:0 0 2px}
.narrow td{min-width:2.1rem}
.published th,.published td{color:var(--muted)}
.published b{color:var(--ink)}
.missing{font-style:italic;color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));
gap:1.5rem 2rem;align-items:start}
svg.plot{display:block;max-width:100%;height:auto}
.tiles{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(0,1fr);gap:.6rem;
margin:0 0 1.4rem}
.tiles figure{margin:0}
.tiles img{display:block;width:100%;height:auto;border:1px solid var(--line)}
.tiles figcaption{font-size:.8rem;line-height:1.3;padding:.2rem 0 0}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.4rem 0;list-style:none;
font-size:.85rem}
.legend i{display:inline-block;width:.8rem;height:.8rem;margin-right:.35rem;
border:1px solid var(--muted);vertical-align:-.08rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;margin:2rem 0;
font-size:.92rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
code,pre{font:.82rem/1.5 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace}
pre{overflow-x:auto;border:1px solid var(--line);padding:.7rem .9rem;margin:.3rem 0 1.5rem}
.commands p{margin-bottom:0}
.references{overflow-wrap:anywhere}
@media(max-width:40rem){
body{font-size:15px}
thead th:first-child,tbody th{position:sticky;left:0;background:var(--paper);min-width:6.5rem;
max-width:9rem}
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


def page(document: Document) -> str:
    """The report as one page."""
    contents = "".join(
        f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in document.sections
    )
    sections = "".join(
        f'<section id="{s.key}"><h2>{escape(s.title)}</h2>{_blocks(s.blocks)}</section>'
        for s in document.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(document.title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><main>"
        f"<h1>{escape(document.title)}</h1>{_blocks(document.introduction)}"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n{sections}</main></body></html>\n'
    )


def _blocks(blocks: Iterable[Block]) -> str:
    return "".join(map(_block, blocks))


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>\n"
        case Table():
            return _table(block)
        case Plots(drawn, caption):
            panels = "".join(svg for _, svg in drawn)
            return (
                f'<figure><div class="panels">{panels}</div>'
                f"<figcaption>{escape(caption)}</figcaption></figure>\n"
            )
        case Pictures(_, rows, caption, legend):
            tiles = "".join(f'<div class="tiles">{"".join(map(_tile, row))}</div>' for row in rows)
            swatches = "".join(
                f'<li><i style="background:rgb{color}"></i>{escape(name)}</li>'
                for name, color in legend
            )
            return (
                f'<figure><figcaption class="above">{escape(caption)}</figcaption>{tiles}'
                f'<ul class="legend">{swatches}</ul></figure>\n'
            )
        case Facts(facts, code):
            items = ""
            for term, text in facts:
                value = f"<code>{escape(text)}</code>" if term in code else escape(text)
                items += f"<dt>{escape(term)}</dt><dd>{value}</dd>"
            return f"<dl>{items}</dl>\n"
        case Commands(caption, shell):
            typed = escape("\n".join(shell))
            return (
                f'<div class="commands"><p>{escape(caption)}</p>'
                f'<pre tabindex="0">{typed}</pre></div>\n'
            )
        case References(sources):
            items = ""
            for i, (text, url) in enumerate(sources, 1):
                link = f' <a href="{escape(url)}">{escape(url)}</a>' if url else ""
                items += f'<li id="source{i}">{escape(text)}{link}</li>'
            return f'<ol class="references">{items}</ol>\n'


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class_attribute(number=i > 0)}>{escape(name)}</th>'
        for i, name in enumerate(table.columns)
    )
    rows = ""
    for row in table.rows:
        published = _class_attribute(published=row.cite is not None)
        head = f'<th scope="row">{escape(row.head)}{_cite(row.cite)}</th>'
        rows += f"<tr{published}>{head}{''.join(map(_cell, row.cells))}</tr>\n"
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    caption = escape(table.caption)
    return (
        f'<figure><figcaption class="above">{caption}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f"<table{_class_attribute(narrow=table.narrow)}>"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>{note}</figure>\n"
    )


def _cell(cell: Cell) -> str:
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
    look = _class_attribute(number=True, missing=cell.text == MISSING)
    if cell.shade:
        look += f' style="--shade:{cell.shade:.2f}"'
    return f"<td{look}>{text}{detail}</td>"


def _cite(cite: int | None) -> str:
    return "" if cite is None else f' <a href="#source{cite}">[{cite}]</a>'


def _tile(tile: Tile) -> str:
    kind = {"png": "png", "jpg": "jpeg"}[tile.ending]
    data = base64.b64encode(tile.data).decode()
    caption = escape(tile.caption)
    return (
        f'<figure><img src="data:image/{kind};base64,{data}"'
        f' alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _class_attribute(**named: bool) -> str:
    used = " ".join(name for name, on in named.items() if on)
    return f' class="{used}"' if used else ""

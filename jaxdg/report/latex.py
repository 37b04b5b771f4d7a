"""Writes the tables of a report as LaTeX."""

import unicodedata

from jaxdg.report.document import MISSING, Cell, Document, References, Table


def tables(document: Document) -> str:
    """The tables of the report, for a document that uses the packages booktabs and graphicx."""
    parts = [f"% {document.title}", "% Needs \\usepackage{booktabs,graphicx} in the preamble."]
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(_table(block, section.title))
            if isinstance(block, References):
                sources = [
                    escaped(text + (f" {url}" if url else "")) for text, url in block.sources
                ]
                lines = [f"\\item[{{[{i}]}}] {source}" for i, source in enumerate(sources, 1)]
                parts.append(
                    "\n".join(["\\begin{description}\\raggedright", *lines, "\\end{description}"])
                )
    return "\n\n".join(parts) + "\n"


def _table(table: Table, title: str) -> str:
    body = []
    for row in table.rows:
        head = row.head if row.cite is None else f"{row.head} [{row.cite}]"
        body.append(" & ".join([escaped(head), *map(_cell, row.cells)]) + r" \tabularnewline")
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\small",
            rf"\caption{{{escaped(f'{title}. {table.caption}')}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{@{{}}l{'r' * (len(table.columns) - 1)}@{{}}}}",
            r"\toprule",
            " & ".join(map(escaped, table.columns)) + r" \tabularnewline",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *([rf"\par\smallskip\footnotesize {escaped(table.note)}"] if table.note else []),
            r"\end{table}",
        ]
    )


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    if cell.best:
        text = rf"\textbf{{{text}}}"
    elif cell.text == MISSING:
        text = rf"\emph{{{MISSING}}}"
    return text + (rf" {{\scriptsize {escaped(cell.detail)}}}" if cell.detail else "")


_ESCAPES = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    "[": "{[}",
    "]": "{]}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "→": r"$\to$",
    "−": "$-$",
    "×": r"$\times$",
    "†": r"$\dagger$",
    "°": r"$^\circ$",
    "–": "--",
    "“": "``",
    "”": "''",
    "Ø": r"\O{}",
    "ø": r"\o{}",
}


def escaped(text: str) -> str:
    """Text that LaTeX prints unchanged.

    Letters that plain LaTeX may lack lose their accents; those that are no letter without stay.
    """
    # LaTeX makes a dash of two hyphens. Two passes, as `replace` does not see overlapping pairs.
    text = text.replace("--", "-\0-").replace("--", "-\0-")
    escaped = "".join(_ESCAPES.get(c) or _ascii(c) or c for c in text).replace("\0", "{}")
    # A row of a table must not begin with an asterisk.
    return f"{{*}}{escaped[1:]}" if escaped.startswith("*") else escaped


def _ascii(text: str) -> str:
    return "".join(
        c if c.isascii() else unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode()
        for c in text
    )

"""What the site takes from the code when it is built: fields, commands and flags; and links to
files that are no pages.

MkDocs calls `on_page_markdown` and `on_files`. A page holds a line such as `<!-- fields -->`, which
its generated part replaces, so that pages can be read in the repository too. `python
docs/generate.py` prints every command's flags as JSON, which `tests/test_docs.py` reads.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
from pathlib import Path
import re
import runpy
import subprocess
import sys
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.generate")


# Configuration


def _shown(value: Any) -> str:
    """A default; of a long tuple each entry by itself, so that lines break between them."""
    whole = repr(value)
    entries = map(repr, value) if len(whole) > 30 and isinstance(value, tuple) else (whole,)
    return ", ".join(f"`{entry}`" for entry in entries).replace("|", "\\|")


def _section(part: Any) -> list[str]:
    """The heading and the table of a part of the configuration."""
    rows = []
    for field in part.fields:
        shown = _shown(field.value)
        if field.part is not None:
            link = f"[fields](#{field.name.replace('.', '')})"
            shown = f"`None`, or {link}" if field.value is None else link
        # The default has a column of its own.
        words = field.words.replace("|", "\\|")
        rows.append(f"| `{field.name}` | {shown} | {words} |")
    heading = ["", f"## {part.name}", "", part.summary, ""] if part.name else []
    return [*heading, "| field | default | what |", "|---|---|---|", *rows]


def fields() -> str:
    """Every field of the configuration, in Markdown."""
    from jaxdg.config import Config
    from jaxdg.config.listing import parts

    os.environ.pop("JAXDG_DATA", None)  # the default that is shown is that of everybody
    return _wide_first([line for part in parts(Config, Config()) for line in _section(part)])


def _wide_first(lines: list[str]) -> str:
    """Lines of Markdown in whose tables the first column is not broken (`site.css`)."""
    return "\n".join(['<div class="fields" markdown>', "", *lines, "", "</div>"])


# Commands


def flags_of(module: str, libraries: set[str]) -> dict[str, str]:
    """The flags of a command, which is started in this process as far as its help.

    Args:
        module: that runs as a program, or the path of a script below the repository.
        libraries: flags that are there without it.
    """
    from absl import flags

    for name in set(flags.FLAGS) - libraries:
        delattr(flags.FLAGS, name)
    sys.argv = [module, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if module.endswith(".py"):
            runpy.run_path(str(ROOT / module), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    found = {name: flags.FLAGS[name].help or "" for name in set(flags.FLAGS) - libraries}
    # argparse: names and what is said of them, as they are printed
    for entry in re.split(r"\n  (?=-)", printed.getvalue().partition("options:")[2]):
        if name := re.search(r"--(\w+)", entry):
            found[name[1]] = re.split(r"\s{2,}|\n", entry.strip(), maxsplit=1)[-1]
    return {name: " ".join(words.split()) for name, words in found.items() if name != "help"}


def _has_flags(script: Path) -> bool:
    return "ArgumentParser" in script.read_text()


def all_flags() -> dict[str, dict[str, str]]:
    """The flags of every command and script that has any, by module or path."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from absl import app, flags

    from jaxdg.commands import COMMANDS
    import jaxdg.commands.prepare
    import jaxdg.evaluate
    import jaxdg.train  # noqa: F401  the libraries that these import define flags

    app.define_help_flags()
    libraries = set(flags.FLAGS)

    def there(module):
        return importlib.util.find_spec(module.rpartition(".")[0]) is not None

    programs = [module for module, _ in COMMANDS.values() if there(module)]
    programs.append("conversion/torch_to_flax.py")
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    programs += [f"scripts/{p.name}" for p in scripts if _has_flags(p)]
    return {program: flags_of(program, libraries) for program in programs}


def commands() -> str:
    """The table of commands and the flags of each, in Markdown."""
    from jaxdg.commands import COMMANDS

    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    lines = ["| command | what it does | the same as |", "|---|---|---|"]
    lines += [f"| `jaxdg {n}` | {what} | `python -m {m}` |" for n, (m, what) in COMMANDS.items()]
    for name, (module, what) in COMMANDS.items():
        if not found.get(module):
            continue
        lines += ["", f"### jaxdg {name}", "", f"{what[0].upper()}{what[1:]}.", ""]
        lines += ["| flag | what |", "|---|---|"]
        for flag, words in sorted(found[module].items()):
            lines.append(f"| `--{flag}` | {words.replace('|', chr(92) + '|')} |")
    return _wide_first(lines)


# The hooks


def on_files(files: Any, config: Any) -> Any:
    """Takes in the pictures that lie beside the measurements."""
    from mkdocs.structure.files import File

    for picture in (ROOT / "benchmarks").glob("*.svg"):
        there = f"explanation/{picture.name}"
        files.append(File.generated(config, there, abs_src_path=str(picture)))
    return files


def _include(found: re.Match[str]) -> str:
    text = (ROOT / found[1]).read_text()
    return re.sub(r"^# .*\n", "", text, count=1).replace("](../docs/", "](../")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in what is generated; a link to a file of the repository that is no page becomes its
    name.
    """
    markdown = re.sub(r"<!-- include (\S+) -->", _include, markdown)
    if "<!-- fields -->" in markdown:
        markdown = markdown.replace("<!-- fields -->", fields())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    here = (ROOT / "docs" / page.file.src_uri).parent

    def outside(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(here / found[2]))
        if target.is_relative_to(ROOT / "docs"):
            return found[0]
        if not target.exists():
            log.warning("%s links to %s, which is not there", page.file.src_uri, found[2])
        return found[1] if "`" in found[1] else f"{found[1]} (`{target.relative_to(ROOT)}`)"

    return LINK.sub(outside, markdown)


if __name__ == "__main__":
    print(json.dumps(all_flags()))

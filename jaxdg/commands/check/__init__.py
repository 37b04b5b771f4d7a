"""`jaxdg check`: what it prints about datasets, and in which order."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jaxdg.commands.check import contact_sheet, rewritten, skip_list_file, tables
from jaxdg.commands.check.decoding import SAMPLE, decode, open_splits, seen_classes
from jaxdg.commands.check.selection import KNOWN, Subject, dataset_folders, subjects
from jaxdg.commands.check.stored_records import check_records
from jaxdg.data import class_check
from jaxdg.data.datasets import Files
from jaxdg.data.index import Defect
from jaxdg.evaluation.overlap import Images


def main(
    names: Sequence[str],
    *,
    root: str,
    out: Path,
    everything: bool,
    workers: int,
    skip_list: Path | None,
    console: Console,
    **options: Any,
) -> bool:
    """Checks datasets and records below a data root; see the flags in `__main__`.

    Returns:
        Whether nothing is broken.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data root {os.path.abspath(root)} does not exist; set JAXDG_DATA or --data_root"
        )
    if skip_list and skip_list.exists() and not skip_list_file.is_replaceable(skip_list):
        raise ValueError(
            f"{skip_list} is there and is no list that --write_skip_list wrote; move it, or name"
            " another file"
        )
    root = os.path.normpath(root)
    if not console.is_terminal:
        console.width = 240  # a log file: no table is cut off
    recorded = check_records(names, root, console, everything)
    present, unknown = dataset_folders(root)
    checked = subjects(names or present, root=root, recorded=recorded, **options)
    if not checked and not recorded:
        raise FileNotFoundError(
            f"{os.path.abspath(root)} has no folder of a known dataset ({', '.join(KNOWN)}), only"
            f" {', '.join(unknown) or 'none'}"
        )
    broken = [defect for defects in recorded.values() for defect in defects]
    warnings: list[str] = []
    splits: dict[str, Files] = {}
    for subject in checked:
        defects, more = check(
            subject, everything=everything, workers=workers, console=console, out=out, splits=splits
        )
        broken += defects
        warnings += more
    shared = shared_images(splits, root)
    _warn(shared, console)
    warnings += shared
    recorded_folders = {domain.split("/")[0] for domain in recorded}
    unchecked = [folder for folder in unknown if folder not in recorded_folders]
    if unchecked and not names:
        folders = ", ".join(unchecked)
        console.print(Text(f"not checked, as these are folders of no known dataset: {folders}"))
    if skip_list:
        count = skip_list_file.write(skip_list, broken, root)
        use = f"train with --config.data.skip={skip_list}"
        console.print(Text(f"{skip_list} lists {count} files to leave out; {use}"))
    plural = "" if len(warnings) == 1 else "s"
    decoded = "every file was" if everything else f"up to {SAMPLE} images a split were"
    summary = f"{len(broken)} broken, {len(warnings)} warning{plural}; {decoded} decoded"
    console.print(Text(summary, style="red" if broken else "green"))
    return not broken


def check(
    subject: Subject,
    *,
    everything: bool,
    workers: int,
    console: Console,
    out: Path,
    splits: dict[str, Files],
) -> tuple[list[Defect], list[str]]:
    """Checks a dataset and prints the findings.

    Args:
        subject: the dataset.
        everything: decode every image instead of `SAMPLE` a split.
        workers: processes that decode; 0 for threads of this process.
        console: where to print.
        out: folder for the contact sheet.
        splits: receives every split that could be opened, by its name.

    Returns:
        The defects, each once, without a path where the defect is of no single file; and the
        warnings.
    """
    opened, broken, warnings = open_splits(subject, console)
    splits.update({o.split.name: o.dataset for o in opened})
    decode(subject.name, opened, everything, workers, console)
    shown = seen_classes(subject, opened, console)
    absent: list[str] = []
    lines: list[tuple[str, bool]] = []
    if shown:
        absent, lines = class_check.findings(
            shown, own=subject.own, judged_only=subject.judged_only
        )
    warnings += [line for line, is_warning in lines if is_warning]
    warnings += [
        f"all {o.flagged[0]} boxes in {len(o.intact)} images of {o.split.name} are difficult, of"
        " which VOC's AP counts none"
        for o in opened
        if 0 < o.counts.sum() == o.flagged[0]
    ]
    if os.path.basename(subject.folder) == "diverse_weather":
        warnings += rewritten.warnings(opened, everything)
    broken += [defect for o in opened for defect in o.broken]
    broken += [Defect("", line) for line in absent]
    broken = list(dict.fromkeys(broken))
    console.print(Text.assemble((subject.name, "bold"), f"  {subject.folder}"))
    if opened:
        console.print(tables.of_files(opened))
        console.print()
    if any(o.counts.any() for o in opened):
        console.print(tables.of_classes(opened))
        console.print()
    for split in shown if subject.own else ():
        console.print(Text(class_check.ids_seen(split)))
    if any(o.intact for o in opened):
        console.print(Text(contact_sheet.save(subject.name, opened, out)))
    for note in dict.fromkeys(note for o in opened for note in o.dataset.pairs.notes):
        console.print(Text(note))
    for line in (line for line, is_warning in lines if not is_warning):
        console.print(Text(line))
    _warn(warnings, console)
    tables.list_broken(broken, console)
    console.print()
    return broken, warnings


def _warn(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))


def shared_images(splits: Mapping[str, Files], root: str) -> list[str]:
    """A warning for each two splits that hold the same images, by path or by content.

    Args:
        splits: the opened splits, by name.
        root: data root.
    """
    images = {name: Images.of(dataset, root) for name, dataset in splits.items()}
    lines = []
    for one, other in itertools.combinations(images, 2):
        if count := int(images[one].among(images[other]).sum()):
            lines.append(
                f"{count} of the {len(images[one])} images of {one} are images of {other}; a model"
                " that is trained on one of the two has seen the other"
            )
    return lines

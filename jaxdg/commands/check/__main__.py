"""Looks at datasets as downloaded: what is there, what is missing, what is broken.

    jaxdg check --data_root data
    jaxdg check --data_root data --all --write_skip_list skip.txt gta5 acdc/night

The command pairs files and reads their headers and ends, as training does when it starts. Then it
decodes images and labels: some of every split, or with --all every one. It lists every broken file
with its path; if there is one, the exit code is 1. It warns about a split that is missing or whose
number of images differs from the published one. It compares records with the digests taken when
they were written. A contact sheet of each dataset shows what breaks no rule, such as labels mapped
by the wrong table.
"""

import os
from pathlib import Path
import sys

from absl import flags

from jaxdg.commands import check
from jaxdg.commands import command_line as cli
from jaxdg.config.data import DataConfig

_ROOT = cli.define_path(
    "data_root", "Folder of the datasets; $JAXDG_DATA, else `data`, if left out."
)
_ALL = flags.DEFINE_bool(
    "all", False, f"Decode every image and label instead of {check.SAMPLE} a split."
)
_OUT = cli.define_path("out", "Folder for the contact sheets.", default="check")
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that decode, 0 for threads; all cores with --all if left out.",
    lower_bound=0,
)
_SKIP = cli.define_path(
    "write_skip_list",
    "File to write the broken files to, as the configuration's data.skip reads it.",
)
_CONFIG = cli.define_config()  # for data.folder, data.boxes and data.mapillary_labels


def _main(arguments: list[str]) -> None:
    config = _CONFIG.value
    data = config.data if config else DataConfig()
    judged = set(config.evaluation.domains) - set(data.source.split("+")) if config else set()
    workers = _WORKERS.value
    if workers is None:
        workers = os.cpu_count() or 1 if _ALL.value else 0
    sound = check.main(
        arguments[1:],
        root=_ROOT.value or data.root,
        out=Path(_OUT.value),
        everything=_ALL.value,
        workers=workers,
        skip_list=Path(_SKIP.value) if _SKIP.value else None,
        console=cli.console(),
        folder=data.folder,
        boxes=data.boxes,
        mapillary_labels=data.mapillary_labels,
        judged_only=judged,
    )
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    cli.run(_main)

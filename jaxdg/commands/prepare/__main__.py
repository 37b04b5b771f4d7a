"""Writes datasets as records: few large files, read several times faster than PNG files.

    jaxdg prepare --data_root data --out records gta5 acdc/night
    jaxdg train --config gta5_eva02 --config.data.root=records --workdir runs/gta5

Labels are mapped as they are written. Without --resize the samples equal those of the files bit for
bit, in the same order. The same command continues a run that was stopped: a shard appears under its
name once it is complete, and its bytes depend on the images and options alone.
"""

import os

from absl import flags

from jaxdg.commands import command_line as cli
from jaxdg.commands import prepare
from jaxdg.config.data import DataConfig

_ROOT = cli.define_path(
    "data_root", "Folder of the datasets; $JAXDG_DATA, else `data`, if left out."
)
_OUT = cli.define_path(
    "out", "Folder or URL that becomes a data root of records.", required=True, urls=True
)
_SPLITS = flags.DEFINE_multi_enum(
    "split", None, ["train", "val"], "What to write; all that the dataset has if left out."
)
_RESIZE = flags.DEFINE_string(
    "resize",
    None,
    "HEIGHTxWIDTH, short:N or long:N in pixels; images keep their sizes if left out.",
)
_BOXES = flags.DEFINE_bool("boxes", False, "Boxes instead of label maps.")
_PROCESSES = flags.DEFINE_integer(
    "processes", os.cpu_count(), "Processes that read and write; 0 for threads.", lower_bound=0
)
_BEAM = flags.DEFINE_string(
    "beam",
    None,
    'Run on Apache Beam with these options, such as "--runner=DataflowRunner --project=P".',
)
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare the records in --out with the digests taken when they were written."
)
_CONFIG = cli.define_config()  # for data.folder, data.boxes, data.skip and data.mapillary_labels


def _main(arguments: list[str]) -> None:
    prepare.main(
        arguments[1:],
        root=_ROOT.value or DataConfig().root,
        out=_OUT.value,
        splits=_SPLITS.value,
        boxes=_BOXES.value,
        verify=_VERIFY.value,
        data=_CONFIG.value.data if _CONFIG.value else DataConfig(),
        resize=_RESIZE.value,
        processes=_PROCESSES.value,
        beam=_BEAM.value,
    )


if __name__ == "__main__":
    cli.run(_main)

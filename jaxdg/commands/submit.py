"""Writes predictions of the unlabelled test images for the servers of Cityscapes and ACDC.

    jaxdg submit --checkpoint runs/test_server --benchmark cityscapes --data_root DATA --out OUT

Both servers take a zip archive with a grey 8-bit PNG of each image, at the image's size.
- Cityscapes (cityscapesscripts, evalPixelLevelSemanticLabeling.py): pixels are the class ids of its
  label files (road is 7), not train ids. A file's name begins with the city, sequence and frame of
  its image, and no two files may begin alike. The folder does not matter.
- ACDC: pixels are train ids (road is 0), at 1920x1080, in a folder `labelTrainIds`. A file is named
  as its image. The publishers' own projects (github.com/brdav/cma, github.com/lhoyer/MIC) write
  these; the server publishes no program that checks.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import io
import os
from pathlib import Path, PurePosixPath
import zipfile

from absl import flags
import numpy as np
from PIL import Image

from jaxdg import config as config_lib
from jaxdg.commands import command_line as cli
from jaxdg.commands import process as runtime
from jaxdg.data import images, published
from jaxdg.data.datasets import Dataset
from jaxdg.data.labels import CITYSCAPES, CITYSCAPES_IDS
from jaxdg.data.pipeline import eval_batches
from jaxdg.data.storage import is_hidden
from jaxdg.evaluation.protocols import AUGMENTED, NAMES
from jaxdg.tasks.run_state import Trained, opened
from jaxdg.tasks.segmentation import Segmentation
from jaxdg.training import sharding


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What a server expects.

    Attributes:
        domain: of the test images.
        ids: written for each train id.
        folder: of the files in the archive, below which they lie; "" for the archive itself.
        image_suffix: end of an image's file name that the prediction's does not share.
        suffix: what it has instead.
        count: images.
    """

    domain: str
    ids: tuple[int, ...]
    folder: str
    image_suffix: str
    suffix: str
    count: int

    def file(self, image: str) -> str:
        """Where the prediction of an image goes, below the folder of the submission."""
        name = PurePosixPath(image).name.removesuffix(self.image_suffix) + self.suffix
        return str(PurePosixPath(self.folder, name))


def _count(dataset: published.Published) -> int:
    return sum(part.count for part in dataset.parts if part.split == "test")


TRAIN_TO_ID = tuple(id for id, train in sorted(CITYSCAPES_IDS.items(), key=lambda item: item[1]))
BENCHMARKS = {
    "cityscapes": Benchmark(
        "cityscapes/test",
        TRAIN_TO_ID,
        "",
        "leftImg8bit.png",
        "pred_labelIds.png",
        _count(published.CITYSCAPES_DATASET),
    ),
    "acdc": Benchmark(
        "acdc/test", tuple(range(19)), "labelTrainIds", ".png", ".png", _count(published.ACDC)
    ),
}


def expected(benchmark: Benchmark, dataset: Dataset) -> dict[str, tuple[int, int]]:
    """The files of a submission and the height and width of each; ValueError where two images would
    have one file.
    """
    images: dict[str, str] = {}
    for name in map(dataset.name, range(len(dataset))):
        if (other := images.setdefault(benchmark.file(name), name)) != name:
            raise ValueError(
                f"{other} and {name} would both be submitted as {benchmark.file(name)}; keep one of"
                " them"
            )
    return {benchmark.file(dataset.name(i)): dataset.size(i) for i in range(len(dataset))}


def write(file: Path, label: np.ndarray, benchmark: Benchmark) -> None:
    """Writes a label map of train ids uint8 [h, w], whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    Image.fromarray(np.array(benchmark.ids, np.uint8)[label]).save(partial, "PNG")
    os.replace(partial, file)


def check(folder: Path, files: Mapping[str, tuple[int, int]], benchmark: Benchmark) -> list[str]:
    """What a server would refuse or count wrong.

    Args:
        folder: of the submission.
        files: see `expected`.
        benchmark: whose.

    Returns:
        One line for every offender; empty if all is well.
    """
    found = _files(folder)
    wrong = [f"{name}: missing" for name in sorted(files.keys() - found)]
    wrong += [f"{name}: belongs to no test image" for name in sorted(found - files.keys())]
    if len(files) != benchmark.count:
        wrong.append(
            f"{benchmark.domain}: {len(files)} images; the server expects {benchmark.count}"
        )
    for name in sorted(found & files.keys()):
        data = (folder / name).read_bytes()
        try:
            with Image.open(io.BytesIO(data)) as image:
                kind = (image.format, image.mode)
                label = np.asarray(image)
        except Exception as error:  # Pillow raises whatever its format plugins meet
            wrong.append(f"{name}: damaged ({error})")
            continue
        h, w = files[name]
        outside = sorted(set(np.unique(label).tolist()) - set(benchmark.ids))
        if kind != ("PNG", "L"):
            wrong.append(f"{name}: {' '.join(map(str, kind))}; it must be a grey 8-bit PNG")
        elif cut := images.truncated(io.BytesIO(data)):
            wrong.append(f"{name}: {cut}")
        elif label.shape != (h, w):
            wrong.append(f"{name}: {label.shape[1]}x{label.shape[0]}; its image is {w}x{h}")
        elif outside:
            wrong.append(
                f"{name}: ids {', '.join(map(str, outside))} are no classes of the benchmark"
            )
    return wrong


def check_out(folder: Path, files: Collection[str], archive: Path) -> None:
    """Makes sure, before anything is predicted, that all in a folder is of a submission and that
    the archive replaces no other.

    Args:
        folder: of the submission.
        files: of a submission.
        archive: that will be written.

    Raises:
        ValueError: the folder or the archive holds something else; names it.
    """
    if foreign := sorted(_files(folder) - set(files)):
        raise ValueError(
            f"{folder} holds {foreign[0]}, which is no prediction of a test image; give another"
            " --out, or move it"
        )
    if not archive.exists():
        return
    try:
        with zipfile.ZipFile(archive) as packed:
            foreign = sorted(set(packed.namelist()) - set(files))
    except (OSError, zipfile.BadZipFile) as error:
        foreign = [str(error)]
    if foreign:
        raise ValueError(
            f"{archive} is there and is no submission ({foreign[0]}); give another --out, or"
            " move it"
        )


def _files(folder: Path) -> set[str]:
    """What lies below a folder, hidden and system files aside."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not any(map(is_hidden, path.parts))}


def pack(folder: Path, files: Sequence[str], archive: Path) -> None:
    """Writes the archive, whole or not at all."""
    partial = archive.with_suffix(".partial")
    with zipfile.ZipFile(
        partial, "w", zipfile.ZIP_STORED
    ) as packed:  # PNG files are compressed already
        for name in sorted(files):
            packed.write(folder / name, name)
    os.replace(partial, archive)


def main(arguments: Sequence[str]) -> None:
    """Predicts, checks and packs the test images that the flags name."""
    if len(arguments) > 1:
        raise ValueError(f"unexpected argument {arguments[1]!r}; see --help")
    if _CHECKPOINT.value is None and not _CHECK.value:
        raise ValueError(
            "--checkpoint DIR is needed to predict; --check alone looks at what --out holds"
        )
    benchmark = BENCHMARKS[_BENCHMARK.value]
    console = cli.console()
    trained = None if _CHECK.value else opened(_CHECKPOINT.value or "")
    config = config_lib.Config() if trained is None else trained.config
    config.data.root = _DATA_ROOT.value or os.environ.get("JAXDG_DATA") or config.data.root
    dataset = Segmentation(config).open(benchmark.domain, train=False)
    folder = Path(_OUT.value, _BENCHMARK.value)
    files = expected(benchmark, dataset)
    archive = folder.with_suffix(".zip")
    if trained is not None:
        check_out(folder, files, archive)
        runtime.set_up()
        config.mesh = config_lib.MeshConfig()
        config.evaluation.protocol = _PROTOCOL.value or f"{_BENCHMARK.value}_test"
        config.evaluation.tta &= config.evaluation.protocol not in AUGMENTED
        config.evaluation.batch_size = _BATCH_SIZE.value
        config.data.workers = config.data.workers if _WORKERS.value is None else _WORKERS.value
        predict(config_lib.validated(config), trained, dataset, folder, benchmark)
    if wrong := check(folder, files, benchmark):
        console.print("\n".join(wrong))
        raise ValueError(
            f"{folder} would not be accepted: {len(wrong)} offenders, listed above; nothing was"
            " packed"
        )
    check_out(folder, files, archive)
    pack(folder, list(files), archive)
    console.print(f"{archive}: {len(files)} images, {archive.stat().st_size / 1e6:.1f} MB")


def predict(
    config: config_lib.Config,
    trained: Trained,
    dataset: Dataset,
    folder: Path,
    benchmark: Benchmark,
) -> None:
    """Writes the prediction of every image below `folder`."""
    task = trained.task(config)
    mesh = sharding.make_mesh(config.mesh)
    console = cli.console()
    if not isinstance(task, Segmentation) or task.labels.names != CITYSCAPES.names:
        raise ValueError(
            f"{trained} was not trained on the 19 classes of Cityscapes, which the benchmark is"
            " about"
        )
    plan, state, at = trained.restore(task, mesh)
    console.print(
        f"step {at}, protocol {config.evaluation.label}, {len(dataset)} images of"
        f" {benchmark.domain}"
    )
    label_maps = task.labelling(plan.graph)
    protocol = task.protocol(benchmark.domain)
    done = 0
    batch_size = -(-config.evaluation.batch_size // mesh.size) * mesh.size
    for batch in eval_batches(
        dataset, batch_size=batch_size, protocol=protocol, workers=config.data.workers
    ):
        places = batch.pop("index")
        labels = np.asarray(label_maps(state, sharding.to_devices(batch, mesh), protocol))
        for i, label, (h, w) in zip(places, labels, batch["label_size"], strict=True):
            if i >= 0:
                write(folder / benchmark.file(dataset.name(int(i))), label[:h, :w], benchmark)
        done += int(batch["mask"].sum())
        if console.is_terminal:
            console.print(f"{done}/{len(dataset)}", end="\r")


if __name__ == "__main__":
    _CHECKPOINT = cli.define_checkpoint(required=False)
    _BENCHMARK = flags.DEFINE_enum(
        "benchmark", None, list(BENCHMARKS), "Whose test images.", required=True
    )
    _DATA_ROOT = cli.define_path(
        "data_root", "Folder of the datasets; $JAXDG_DATA, else the run's, if left out.", urls=True
    )
    _OUT = cli.define_path("out", "Folder for the predictions and the archive.", required=True)
    _PROTOCOL = flags.DEFINE_enum(
        "protocol", None, list(NAMES), "BENCHMARK_test, with test-time augmentation, if left out."
    )
    _CHECK = flags.DEFINE_bool(
        "check", False, "Predict nothing: check the predictions that --out holds, and pack them."
    )
    _BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", 1, "Images a step, over all devices.", lower_bound=1
    )
    _WORKERS = flags.DEFINE_integer("workers", None, "Processes that read images.", lower_bound=0)
    cli.run(main)

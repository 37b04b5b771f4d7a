"""The images and videos that `predict` is given: which they are, what they are called, and whether
files of others would be replaced.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import os
from pathlib import Path
import re
import sys

from jaxdg.commands import outputs
from jaxdg.data import storage, video
from jaxdg.data.index import IMAGE_SUFFIXES

FRAME = re.compile(r"\d{6,}(_scores|_confidence)?\.(png|json|npz)")  # a file of a video's frame
NAMED = 5  # a line about files names at most so many
Say = Callable[[str], None]


def find_images(paths: Iterable[str], say: Say = lambda line: None) -> list[tuple[Path, Path]]:
    """The images of these paths, each once and in order: (file, name below --out without suffix).

    Args:
        paths: of images and folders.
        say: receives a line about each kind of file that is skipped.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds no images.
    """
    found: dict[str, tuple[Path, Path]] = {}  # by real path
    written: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = _in_folder(path, written, say)
        elif path.is_file():
            files = [(path, Path(path.stem))]
            if os.path.realpath(path) in outputs.written_above(os.path.dirname(path) or "."):
                written.append(str(path))
                continue
        else:
            raise FileNotFoundError(f"{path} does not exist")
        for file, name in files:
            found.setdefault(os.path.realpath(file), (file, name))
    if written:
        say(f"passed over, as predict wrote them: {_some(sorted(written))}")
    if not found:
        raise ValueError("no image is left to predict; name others")
    return list(
        zip((file for file, _ in found.values()), _distinct([*found.values()]), strict=True)
    )


def _in_folder(path: Path, written: list[str], say: Say) -> list[tuple[Path, Path]]:
    """The images below a folder and their names; adds files that predict wrote to `written`."""
    skipped = storage.SkippedEntries()
    files = []
    others = []
    mine = outputs.written_above(str(path))
    before = len(written)
    for parent, names in storage.walk(str(path), skipped):
        real = os.path.realpath(parent)
        mine |= {os.path.join(real, name) for name in outputs.Outputs(Path(parent)).digests}
        for name in names:
            file = os.path.join(parent, name)
            if os.path.join(real, name) in mine:
                written.append(file)
            else:
                (files if name.lower().endswith(IMAGE_SUFFIXES) else others).append(file)
    for line in skipped.notes():
        say(line)
    if videos := sorted(filter(video.is_video, others)):
        say(f"passed over, as a video is predicted only if it is named itself: {_some(videos)}")
    if others := sorted({*others} - {*videos}):
        say(f"passed over, as their types are not read: {_some(others)}")
    if not files and len(written) == before:
        raise ValueError(f"{path} holds no images ({' '.join(IMAGE_SUFFIXES)})")
    return [(file, file.relative_to(path).with_suffix("")) for file in sorted(map(Path, files))]


def _some(names: Sequence[str]) -> str:
    more = f", .. ({len(names)} files)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _distinct(found: Sequence[tuple[Path, Path]]) -> list[Path]:
    """A distinct name for each image: its own if no other image has it."""
    groups: dict[Path, list[int]] = {}
    for i, (_, name) in enumerate(found):
        groups.setdefault(name, []).append(i)
    names = [name for _, name in found]
    taken = {name for name, members in groups.items() if len(members) == 1}
    for members in (members for members in groups.values() if len(members) > 1):
        proposals = next(
            made
            for made in _proposals([found[i] for i in members])
            if len({*made}) == len(made) and taken.isdisjoint(made)
        )
        taken |= {*proposals}
        for i, name in zip(members, proposals, strict=True):
            names[i] = name
    return names


def _proposals(group: Sequence[tuple[Path, Path]]) -> Iterator[list[Path]]:
    """Proposes names for images of one name: with extensions, with folders above, with both."""
    above = [Path(os.path.abspath(file)).parts[1 : -len(name.parts)] for file, name in group]
    for depth in range(max(map(len, above)) + 1):
        names = [
            Path(*parts[len(parts) - min(depth, len(parts)) :], name)
            for parts, (_, name) in zip(above, group, strict=True)
        ]
        if depth:
            yield names
        yield [
            Path(f"{name}_{file.suffix[1:]}") for name, (file, _) in zip(names, group, strict=True)
        ]
    for number in range(1, sys.maxsize):  # an image is called as another would be
        yield [
            Path(f"{name}_{number}_{file.suffix[1:]}")
            for name, (file, _) in zip(names, group, strict=True)
        ]


def check_outputs(
    out: outputs.Outputs,
    images: Sequence[tuple[Path, Path]],
    suffixes: Sequence[str],
    videos: Sequence[tuple[str, Path]] = (),
    frames: bool = False,
) -> None:
    """Checks that predicting these images and videos replaces no file that predict did not write.

    Args:
        out: the folder to write to.
        images: from `find_images`.
        suffixes: of the files of an image.
        videos: sources and names likewise.
        frames: whether files of every frame of a video are written, too.

    Raises:
        ValueError: names a file that would be replaced, or a folder that would mix images and
            predictions.
    """
    real = functools.cache(os.path.realpath)
    files = [*images, *((Path(source), name) for source, name in videos)]
    folders = {real(file.parent): file for file, _ in files if file.exists()}
    targets = [out.folder / f"{name}{suffix}" for _, name in images for suffix in suffixes]
    targets += [out.folder / f"{name}_overlay.mp4" for _, name in videos]
    for _, name in videos if frames else ():
        targets += frame_files(out.folder / name)
    for target in targets:
        if image := folders.get(real(target.parent)):
            raise ValueError(
                f"--out would put predictions into {target.parent}, the folder of the"
                f" {'video' if video.is_video(image) else 'image'} {image}; give another folder"
            )
        if not out.may_write(target):
            raise ValueError(
                f"{target} is there and is not what predict wrote there"
                f" ({out.folder / outputs.NAME} lists that); give another --out, or move the"
                " file"
            )
    if len({*targets}) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise ValueError(f"two of what is given would be written to {twice}; give one at a time")


def frame_files(folder: Path) -> list[Path]:
    """The files of frames that an earlier run may have written below a video's name."""
    return sorted(file for file in folder.glob("*") if FRAME.fullmatch(file.name))

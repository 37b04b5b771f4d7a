"""Records which files of a folder a command wrote, so that it replaces no others.

The folder holds `.jaxdg_predictions.json`: one JSON object a line, with the path of a file below
the folder and the SHA-256 of its content. The line is added before the file appears, so that the
next command knows every file of one that was killed. A file that was changed since,
such as a label map corrected by hand, is not replaced.
"""

from collections.abc import Iterator
import contextlib
import json
import os
from pathlib import Path

from jaxdg import files

NAME = ".jaxdg_predictions.json"


class Outputs:
    """The files that were written into a folder.

    Attributes:
        folder: it need not exist yet.
        digests: of all contents ever written, by path below the folder.
    """

    def __init__(self, folder: Path):
        """Reads the records of earlier commands.

        Args:
            folder: of the files.
        """
        self.folder = folder
        self.digests: dict[str, set[str]] = {}
        try:
            lines = (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                self.digests.setdefault(entry["file"], set()).add(entry["sha256"])
            except (ValueError, KeyError, TypeError):
                continue  # empty, or cut by a crash before its file appeared

    def may_write(self, file: Path) -> bool:
        """Whether the file does not exist, or still has a content that was written here.

        Args:
            file: in the folder or below.
        """
        if not os.path.lexists(file):
            return True
        known = self.digests.get(self._key(file))
        return bool(known) and file.is_file() and files.sha256(file) in known

    def write(self, file: Path, content: bytes) -> None:
        """Writes a file in one step and records it.

        Args:
            file: in the folder or below; folders are made.
            content: of the file.
        """
        with files.naming(file), self.writing(file) as partial:
            partial.write_bytes(content)

    @contextlib.contextmanager
    def writing(self, file: Path) -> Iterator[Path]:
        """A path for the content of a file, which takes its place in the end and is recorded.

        After an error, or if nothing was written there, the file stays as it was.

        Args:
            file: as for `write`.
        """
        partial = file.with_name(f".{os.getpid()}.partial.{file.name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if partial.exists():
                key = self._key(file)
                digest = files.sha256(partial)
                if digest not in self.digests.get(key, ()):
                    self._note(key, digest)
                os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def _note(self, key: str, digest: str) -> None:
        self.digests.setdefault(key, set()).add(digest)
        line = json.dumps({"file": key, "sha256": digest})
        with open(self.folder / NAME, "ab") as records:
            # One write, as several processes may add lines. It begins with a newline, as a crash
            # may have cut the line before.
            records.write(f"\n{line}\n".encode())

    def _key(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def written_above(folder: str) -> set[str]:
    """The real paths of the recorded files of an existing folder and of the folders above it."""
    place = os.path.realpath(folder)
    return {
        os.path.join(above, name)
        for above in (Path(place), *Path(place).parents)
        for name in Outputs(above).digests
    }

"""Folders that know which of their files a command wrote, so that it replaces no others.

Beside the files lies `.jaxdg_predictions.json`: one JSON object a line, the path of a file below
the folder and the SHA-256 of what was written. A line is added before its file appears, and a file
appears whole, so that a run that is killed leaves nothing behind that the next one does not know. A
file that was changed since, such as a label map corrected by hand, is its owner's.
"""

import hashlib
import json
import os
from pathlib import Path

from jaxdg import files

NAME = ".jaxdg_predictions.json"


class Outputs:
    """The files that were written into a folder.

    Attributes:
        folder: it need not exist yet.
        digests: of what was ever written, by path below the folder.
    """

    def __init__(self, folder: Path):
        """Reads what earlier runs noted.

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
                continue  # empty, or cut by a crash: of a file that did not appear

    def may_write(self, file: Path) -> bool:
        """Whether there is no such file, or it is as it was written here.

        Args:
            file: in the folder or below.
        """
        if not os.path.lexists(file):
            return True
        known = self.digests.get(self._key(file))
        return (
            bool(known)
            and file.is_file()
            and hashlib.sha256(file.read_bytes()).hexdigest() in known
        )

    def write(self, file: Path, content: bytes) -> None:
        """Writes a file whole or not at all.

        Args:
            file: in the folder or below; folders are made.
            content: of the file.
        """
        key = self._key(file)
        digest = hashlib.sha256(content).hexdigest()
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with files.naming(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if digest not in self.digests.get(key, ()):
                self._note(key, digest)
            try:
                partial.write_bytes(content)
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

    def _note(self, key: str, digest: str) -> None:
        self.digests.setdefault(key, set()).add(digest)
        line = json.dumps({"file": key, "sha256": digest})
        with open(
            self.folder / NAME, "ab"
        ) as noted:  # in one write, as several processes may add to it
            noted.write(f"\n{line}\n".encode())  # of its own even behind one that a crash has cut

    def _key(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()


def written_above(folder: str) -> set[str]:
    """The real paths of what was written into a folder and the folders that it is in, as far as
    noted there.

    Args:
        folder: that exists.
    """
    place = os.path.realpath(folder)
    return {
        os.path.join(above, name)
        for above in (Path(place), *Path(place).parents)
        for name in Outputs(above).digests
    }

"""Lists of files that a run leaves out."""

import os


def skip_list(file: str, root: str) -> frozenset[str]:
    """The paths in a list of files to leave out.

    Args:
        file: a text file with one path a line, relative to the data root or absolute; empty lines and lines that begin with # do not count.
        root: the data root.

    Returns:
        The paths as the datasets below `root` name them.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"data.skip names {os.path.abspath(file)}, which does not exist")
    with open(file, encoding="utf-8") as text:
        lines = [line.strip() for line in text]
    above = os.path.abspath(root)
    relative = (os.path.relpath(os.path.join(above, line), above) for line in lines if line and not line.startswith("#"))
    return frozenset(os.path.join(root, path) for path in relative)

"""Lets experiment files import others beside them, as `from configs import gta5_eva02`, wherever a
command is run.

Only the folder itself gets a name, its own, and only where Python finds nothing else by that name.
A folder on `sys.path` would do more: it makes everything in it a module, and the recipes that come
with this package lie in the package, beside `files`, `data` and `config`.
"""

import importlib.abc
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
# Where the recipes are: of the installed package, or of a checkout.
RECIPES = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)


class _Neighbours(importlib.abc.MetaPathFinder):
    """Finds `NAME` and `NAME.module` in the folders of that name; Python asks it last."""

    def __init__(self):
        self._folders: dict[str, list[str]] = {"configs": [str(RECIPES)]}

    def add(self, folder: Path) -> None:
        """Lets the folder be imported by its name, before others of the same name."""
        folders = self._folders.setdefault(folder.name, [])
        self._folders[folder.name] = [
            str(folder),
            *(other for other in folders if other != str(folder)),
        ]

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        folders = self._folders.get(package)
        if folders is None or "." in module:
            return None
        if module:
            return PathFinder.find_spec(fullname, folders)
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = folders
        return spec


_neighbours = _Neighbours()
sys.meta_path.append(_neighbours)


def let_import(path: str | Path) -> None:
    """Lets an experiment file import those beside it by the name of their folder."""
    _neighbours.add(Path(path).resolve().parent)

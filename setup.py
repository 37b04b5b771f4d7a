"""What pyproject.toml cannot say: the recipes of configs/ lie in the wheel as jaxdg/configs, where
the commands find them by name.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes too; an editable install reads those of the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "jaxdg" / "configs"
            self.mkpath(str(folder))
            for recipe in sorted(Path("configs").glob("*.py")):
                self.copy_file(str(recipe), str(folder / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})

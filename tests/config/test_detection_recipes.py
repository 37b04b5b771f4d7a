"""The shipped recipes of detection, shrunk, with random weights, from files to results."""

import pytest

from configs import vltdet_clip_rn101
from tests import small_recipes

RECIPES = {"vltdet_clip_rn101:c4_text": lambda: vltdet_clip_rn101.get_config("c4_text")}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data and weights, the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        yield small_recipes.prepare(tmp_path_factory.mktemp("weather"), patch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_files_to_results(here, name):
    """Twenty steps: finite losses, a resumed run that is the same to the last bit, scores of five
    domains.
    """
    small_recipes.check(small_recipes.shrunk(RECIPES[name]()), here / name.replace(":", "_"))

"""The shipped recipes of detection, shrunk, with random weights, from files to results."""

import math

import jax
import pytest

from configs import divalign, gnas, pddoc, sdgod, vltdet_clip_rn101, weather_dinov2
from jaxdg import methods
from jaxdg.config import validated
from jaxdg.detection.rcnn.genotype import drawn
from jaxdg.studies.study import configured
from jaxdg.tasks import run_state as tasks
from tests import small_recipes


def small_cells(choice):
    """A recipe of cells, of fewer channels; to train them anew, with a genotype drawn at random."""
    c = gnas.get_config(choice)
    c.model.cell_rcnn.roi.hidden = 64
    c.model.cell_rcnn.roi.channels = 16
    if c.model.cell_rcnn.genotype is not None:
        c.model.cell_rcnn.genotype = drawn(0)
    return c


RECIPES = {
    "pddoc": pddoc.get_config,
    "pddoc:released": lambda: pddoc.get_config("released"),
    "vltdet_clip_rn101:c4_text": lambda: vltdet_clip_rn101.get_config("c4_text"),
    "vltdet_clip_rn101:clip_the_gap": lambda: vltdet_clip_rn101.get_config("clip_the_gap"),
    "gnas:search": lambda: small_cells("search"),
    "gnas:augment": lambda: small_cells("augment"),
    "sdgod": sdgod.get_config,
    "divalign": divalign.get_config,
}


def test_the_variants_of_clips_resnet_are_valid_experiments():
    """Every name behind the colon; the two sizes of CLIP the Gap differ in the size alone; a wrong
    name is told the right ones.
    """
    configs = {name: vltdet_clip_rn101.get_config(name) for name in vltdet_clip_rn101.VARIANTS}
    for c in configs.values():
        validated(c)
    own, common = configs["clip_the_gap"], configs["clip_the_gap_720"]
    assert (own.data.crop, common.data.crop) == ((600, 1067), (720, 1280))
    common.data = own.data
    assert own == common
    with pytest.raises(ValueError, match="allowed behind the colon: c4, c4_text, fpn, clip_the_ga"):
        vltdet_clip_rn101.get_config("clip_the_gap_600")


def test_the_choices_of_gates_are_valid_experiments():
    """Each with its own gates; a wrong name is told the right ones."""
    configs = {name: validated(pddoc.get_config(name)) for name in pddoc.CHOICES}
    decoders = [c.model.decoder for c in configs.values()]
    assert decoders == ["gated_c4", "gated_c4", "gated_rcnn"]
    intended, released = (configs[name].model.gated_c4 for name in ("intended", "released"))
    assert (len(set(intended.scenes)), len(set(released.scenes))) == (15, 1)
    assert (intended.first_mask, released.first_mask) == (True, False)
    assert configs["carla"].data.source == "carla"
    with pytest.raises(ValueError, match="allowed behind the colon: intended, released, carla"):
        pddoc.get_config("both")


def test_the_study_of_clips_resnet_has_two_sizes():
    """Its own, and that of the data, so that a report shows both beside the published rows."""
    found = [
        validated(configured(vltdet_clip_rn101.get_config("clip_the_gap"), settings)).data.crop
        for settings in vltdet_clip_rn101.get_study().encoders.values()
    ]
    assert found == [(600, 1067), (720, 1280)]


def test_the_variants_of_dinov2_are_valid_experiments():
    """Every METHOD and HEAD; adapters train what SoMA's paper counts of the encoder, 4 866 048, and
    a frozen encoder trains nothing; a wrong name is told the right ones.
    """
    for method in weather_dinov2.METHODS:
        for head in weather_dinov2.HEADS:
            c = validated(weather_dinov2.get_config(f"{method},{head}"))
            assert (c.model.decoder, c.low_rank.on) == (head, method == "soma")
    for method, count in (("soma", 4_866_048), ("frozen", 0)):
        c = validated(weather_dinov2.get_config(method))
        task = tasks.make_task(c, methods.active(c))
        trained, _, _ = tasks.Blueprint.of(task, c.model.freeze).abstract
        encoder = trained.get("backbone", {})
        assert sum(leaf.size for leaf in jax.tree.leaves(encoder)) == count, method
    with pytest.raises(ValueError, match=r"weather_dinov2:lora; allowed: METHOD\[,HEAD\]"):
        weather_dinov2.get_config("lora")


def test_clip_the_gap_trains_what_its_code_trains():
    """By shapes: third and last stage, attention pool, proposals and box regressor, 64 368 231
    numbers in its code, of which the scales and biases of BatchNorm are none here.
    """
    c = validated(vltdet_clip_rn101.get_config("clip_the_gap"))
    trained, frozen, _ = tasks.Blueprint.of(tasks.make_task(c), c.model.freeze).abstract

    def size(state):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))

    # Channels that BatchNorm scales and shifts, in blocks of (256, 256, 1024), (512, 512, 2048).
    norms = 2 * (23 * (256 + 256 + 1024) + 1024 + 3 * (512 + 512 + 2048) + 2048)
    assert size(trained) == 64_368_231 - norms
    # Stem, layer1 and layer2 hold 28 768 + 215 808 + 1 219 584 numbers there.
    norms = 2 * (32 + 32 + 64 + 3 * (64 + 64 + 256) + 256 + 4 * (128 + 128 + 512) + 512)
    assert size(frozen) == 28_768 + 215_808 + 1_219_584 - norms


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


def test_every_choice_of_gnas_is_a_run():
    """12 epochs of 16 images on Diverse Weather; on CARLA its own steps. The comparison has no
    cells and no penalty; the head that is trained anew has a genotype.
    """
    for phase in gnas.PHASES:
        for data in gnas.DATA:
            c = gnas.get_config(f"{phase},{data}")
            assert c.steps == (400 if data == "carla" else 14_546)
            assert (c.model.cell_rcnn.genotype == "genotype.json") == (phase == "augment")
            if phase == "augment":
                c.model.cell_rcnn.genotype = drawn(0)
            m = validated(c).model
            head = getattr(m, m.decoder)
            assert (m.decoder == "cell_rcnn") == (phase != "fc")
            assert (head.roi.logit_penalty, head.roi.fcs, len(head.roi.stages)) == (
                0.5 * (phase != "fc"),
                2,
                1,
            )
    for wrong in ("retrain", "search,town05", "search,carla,2"):
        with pytest.raises(ValueError, match=rf"gnas:{wrong}; allowed: PHASE"):
            gnas.get_config(wrong)

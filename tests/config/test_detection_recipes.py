"""The shipped recipes of detection, shrunk, with random weights, from files to results."""

import dataclasses
import math
from pathlib import Path

from flax import nnx
import jax
import pytest

from configs import (
    clip_the_gap,
    divalign,
    gnas,
    pddoc,
    poda_detection,
    sdgod,
    vltdet_clip_rn101,
    weather_dinov2,
    weather_methods,
)
from jaxdg import backbones, methods, weights
from jaxdg.commands import command_line as cli
from jaxdg.commands import mine
from jaxdg.config import validated
from jaxdg.detection.rcnn.genotype import drawn
from jaxdg.studies.study import configured
from jaxdg.tasks import run_state as tasks
from tests import small_recipes
from tests.small_recipes import DOMAINS


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


def test_every_method_of_the_table_has_two_sizes():
    """Its own, which is the recipe that the header names, and a common one, which changes size and
    protocol alone; a wrong name is told the right ones.
    """
    for method in weather_methods.METHODS:
        own, common = (weather_methods.get_config(method + size) for size in ("", ",common"))
        assert own == weather_methods.METHODS[method]()
        assert (common.data.crop, common.data.resize) == ((720, 1280), (720, 1280))
        assert common.evaluation.protocol == "voc07"
        assert common.evaluation.domains == DOMAINS
        if method == "gnas":
            own.model.cell_rcnn.genotype = common.model.cell_rcnn.genotype = drawn(0)
        validated(own)
        validated(common)
        common.data.crop, common.data.resize = own.data.crop, own.data.resize
        common.evaluation.protocol = own.evaluation.protocol
        assert common == own
    for wrong in ("srcd", "pddoc,600", "pddoc,common,1"):
        with pytest.raises(ValueError, match=rf"weather_methods:{wrong}; allowed: METHOD"):
            weather_methods.get_config(wrong)


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
    """A folder with data and weights of CLIP's RN101 in its own size, the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        yield small_recipes.prepare(tmp_path_factory.mktemp("weather"), patch, full=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_from_files_to_results(here, name):
    """Twenty steps: finite losses, a resumed run that is the same to the last bit, scores of five
    domains.
    """
    small_recipes.check(small_recipes.shrunk(RECIPES[name]()), here / name.replace(":", "_"))


def mined(c):
    """A shrunk recipe, whose edits were mined into its file."""
    mine.mine(c, Path(c.edits.file), cli.console(), cli.Interrupt())
    return c


@pytest.mark.slow
def test_clip_the_gap_mines_and_trains(here):
    """From files to offsets, and from offsets to results, as above."""
    c = mined(small_recipes.shrunk(clip_the_gap.get_config()))
    small_recipes.check(c, here / "clip_the_gap")


@pytest.mark.slow
def test_the_phases_of_poda_follow_one_another(here):
    """The detector, the encoder's last stages, styles: each from the model of the one before."""
    start = None
    for phase in ("1", "2", "night_rainy"):
        c = small_recipes.shrunk(poda_detection.get_config(phase), model__start=start)
        if c.edits.on:
            c = mined(c)
        small_recipes.check(c, here / f"poda_{phase}")
        start = str(here / f"poda_{phase}" / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["soma", "frozen", "frozen,faster_rcnn"])
def test_the_recipes_of_dinov2_run(here, choice, monkeypatch):
    """As above, with a DINOv2 of the small size and random weights in place of the large one."""
    large, small = (backbones.entry(f"dinov2_{size}14") for size in "ls")
    monkeypatch.setitem(
        backbones.ZOO, "dinov2_l14", dataclasses.replace(large, config=small.config)
    )
    encoder = backbones.create("dinov2_l14", rngs=nnx.Rngs(0))
    file = Path("weights/dinov2_l14.safetensors")
    weights.save(weights.tensors(encoder), file, {"model": "dinov2_l14"})
    c = small_recipes.shrunk(weather_dinov2.get_config(choice), data__scale=(0.5, 2.0))
    small_recipes.check(c, here / f"dinov2_{choice}")


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

"""The shipped experiments, shrunk, on small trees of the datasets that they are for: from archives
to results and submissions.
"""

import dataclasses
import functools
import io
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest

from configs import cityscapes_eva02, cityscapes_test_server, gta5_eva02, gta5_ldm, gta5_methods
import jaxdg
from jaxdg import methods, train
from jaxdg.commands import command_line as cli
from jaxdg.commands import prepare, submit
from jaxdg.config import Config, DataConfig, validated
from jaxdg.config.workdir import differences
from jaxdg.studies.study import configured
from jaxdg.tasks import run_state as tasks
from jaxdg.training.metrics import read_metrics
from tests.data import trees

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("cityscapes", "bdd100k", "mapillary", "acdc")
ACDC = ("acdc/fog", "acdc/night", "acdc/rain", "acdc/snow")
# The ids of Cityscapes' label files that are evaluated, and the classes they are, as the publisher
# lists them.
CITYSCAPES_NAMES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
    19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle",
    33: "bicycle",
}  # fmt: skip

MASK2FORMER = {
    "encoder": "scratch_eva02_ti8", "weights": None, "taps": (0, 1, 2, 3), "patch_size": 32,
    "mask2former.hidden": 32, "mask2former.queries": 20, "mask2former.heads": 1,
    "mask2former.pixel_layers": 1, "mask2former.pixel_ffn": 32, "mask2former.layers": 1,
    "mask2former.ffn": 32, "mask2former.points": 64,
}  # fmt: skip
LINEAR = {
    "encoder": "scratch_ti8",
    "weights": None,
    "taps": (3,),
    "pyramid": "none",
    "decoder": "linear",
}


def small(c: Config, root: Path, model: dict = LINEAR, **fields) -> Config:
    """The experiment with a small model and as little to do as `fields` say."""
    values = {f"model.{name}": value for name, value in model.items()}
    values |= {
        "batch_size": 2,
        "log_every": 1,
        "data.root": str(root),
        "data.workers": 0,
        "data.crop": (64, 64),
    }
    values |= {
        "evaluation.stride": (64, 64),
        "evaluation.batch_size": 1,
        "model.patch_size": 8,
        "optimizer.encoder_factor": 1.0,
    }
    for field, value in (
        values | {name.replace("__", "."): value for name, value in fields.items()}
    ).items():
        *path, last = field.split(".")
        setattr(functools.reduce(getattr, path, c), last, value)
    return validated(c)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `data`: trees of all datasets, of different image sizes, some in archives;
    compiled programs are kept in `cache`.
    """
    folder = tmp_path_factory.mktemp("published")
    rng = np.random.default_rng(0)
    for name, zipped, size in (
        ("gta5", True, (53, 96)),
        ("synthia", False, (38, 64)),
        ("cityscapes", True, (512, 1024)),
        ("bdd100k", False, (40, 80)),
        ("mapillary", True, (50, 100)),
        ("acdc", False, (54, 96)),
    ):
        trees.make(
            name,
            folder / "data",
            rng,
            zipped=zipped,
            size=size,
            count=3 if name in ("gta5", "synthia") else 1,
        )
    return folder


def environment(folder: Path, devices: int) -> dict[str, str]:
    """Of a process with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu", "JAXDG_CACHE": str(folder / "index")}
    return os.environ | own | {"XLA_FLAGS": flags}


@pytest.fixture(scope="module")
def gta5(folder):
    """A finished `python -m jaxdg.train --config configs/gta5_eva02.py` with a small encoder and
    Mask2Former, and what it printed.
    """
    values = {f"model.{name}": value for name, value in MASK2FORMER.items()} | {
        "steps": 3,
        "batch_size": 2,
        "log_every": 1,
    }
    values |= {
        "data.root": folder / "data",
        "data.workers": 0,
        "evaluation.batch_size": 1,
        "evaluation.stride": (426, 426),
    }
    values |= {"optimizer.learning_rate": 0.01}  # so that three steps tell classes apart

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else value

    overrides = [f"--config.{field}={text(value)}" for field, value in values.items()]
    command = [
        sys.executable,
        "-m",
        "jaxdg.train",
        "--config",
        str(ROOT / "configs/gta5_eva02.py"),
        "--workdir",
        str(folder / "gta5"),
    ]
    done = subprocess.run(
        [*command, *overrides],
        env=environment(folder, 1),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder / "gta5", done.stdout


@pytest.fixture
def here(folder, monkeypatch):
    """Runs in this process: on one device, quickly compiled, with `folder` as the working
    directory.
    """
    monkeypatch.setenv("JAXDG_CACHE", str(folder / "index"))
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.chdir(folder)
    return lambda c, workdir: train.train(c, Path(workdir), cli.console(), cli.Interrupt())


def losses(workdir: str | Path) -> list[float]:
    """Of every step."""
    return [row["loss"] for row in read_metrics(Path(workdir)) if "loss" in row]


def test_every_source_is_a_valid_experiment():
    """The variants behind a colon, which differ in their source alone, and in ACDC's images being
    smaller; the chain fits together.
    """
    for experiment, sources in (
        (gta5_eva02, ("gta5", "synthia")),
        (cityscapes_eva02, ("cityscapes", "bdd100k", "mapillary", "acdc")),
    ):
        base = validated(experiment.get_config())
        for source in sources:
            c = validated(experiment.get_config(source))
            changed = {phrase.split(":")[0] for phrase in differences(base, c)}
            assert changed <= {"data.source", "data.resize"}
            assert (c.data.source, c.data.resize != base.data.resize) == (source, source == "acdc")
    first = cityscapes_eva02.get_config("mapillary")
    second = cityscapes_test_server.get_config()
    assert {phrase.split(":")[0] for phrase in differences(first, second)} == {
        "steps", "data.source", "model.weights", "model.start", "evaluation.domains",
    }  # fmt: skip


def test_every_latent_diffusion_encoder_is_a_valid_experiment():
    """The encoders behind the colon, frozen and tuned, differ from the main recipe in the model
    alone; the row of the study of pre-trainings has the same encoder.
    """
    base = validated(gta5_eva02.get_config())
    for encoder in gta5_ldm.ENCODERS:
        for freeze in ("all", "none"):
            c = gta5_ldm.get_config(encoder)
            c.model.freeze = freeze
            changed = {phrase.split(":")[0] for phrase in differences(base, validated(c))}
            assert {field.split(".")[0] for field in changed} == {"model"}
    with pytest.raises(ValueError, match=r"gta5_ldm\.py:sd3; allowed behind the colon: sd15_vpd"):
        gta5_ldm.get_config("sd3")
    row = gta5_eva02.get_study().encoders["LDM"]
    frozen = configured(gta5_eva02.get_config(), {**row, "model.freeze": "all"})
    assert frozen == validated(gta5_ldm.get_config())


def test_every_method_source_and_encoder_is_a_valid_experiment():
    """Every choice behind the colon of `configs/gta5_methods.py`, and the figures in which the
    papers' recipes differ.
    """
    encoders = ("dinov2_l14", "eva02_l14", "clip_l14", "sam_h16", "dinov3_l16", "siglip2_l16")
    for source in gta5_methods.TARGETS:
        for method in gta5_methods.METHODS:
            for encoder in ("", "clip_l14") if method == "tqdm" else encoders:
                c = validated(gta5_methods.get_config(f"{method},{encoder},{source}"))
                assert c.evaluation.domains == gta5_methods.TARGETS[source]
                if method != "tqdm":
                    taps = (7, 15, 23, 31) if "h16" in encoder else (7, 11, 15, 23)
                    assert c.model.taps == taps
    rein, soma, vfmnet = (
        gta5_methods.get_config(choice) for choice in ("rein", "soma,,cityscapes", "vfmnet")
    )
    assert (rein.batch_size, soma.batch_size, vfmnet.batch_size) == (4, 8, 2)
    assert (rein.optimizer.encoder_factor, soma.optimizer.encoder_factor) == (1.0, 0.5)
    assert (soma.average.start, soma.average.momentum) == (20_000, 0.0002)
    assert (soma.optimizer.final_weight_decay, soma.optimizer.warmup_factor) == (1e-5, 0.01)
    assert (vfmnet.low_rank.rank, vfmnet.low_rank.dropout) == (32, 0.1)
    assert gta5_methods.get_config("rein,,cityscapes_1024").optimizer.learning_rate == 6e-5
    mgrnet, tqdm = (gta5_methods.get_config(choice) for choice in ("mgrnet", "tqdm,,cityscapes"))
    assert (mgrnet.data.crop, mgrnet.data.resize) == ((1024, 1024), (1440, 2560))
    assert (tqdm.optimizer.learning_rate, tqdm.optimizer.weight_decay) == (1e-4, 1e-5)
    for wrong in ("ren", "rein,dinov2_l14,gta", "rein,dinov2_l14,gta5,7"):
        with pytest.raises(ValueError, match=f"gta5_methods:{wrong}; allowed: METHOD"):
            gta5_methods.get_config(wrong)


def test_the_methods_train_as_many_parameters_as_published():
    """Of the encoder, by shapes, whatever the decoder: Rein 2 990 081 less its link's 459 264, SoMA
    4 866 048, LoRA 786 432 and VFMNet 3 145 728 on DINOv2-L; LoRA on EVA-02-L 1 179 648.
    """
    for choice, count in (
        ("rein", 2_990_081 - 459_264),
        ("soma", 4_866_048),
        ("lora", 786_432),
        ("lora,eva02_l14", 1_179_648),
        ("vfmnet", 3_145_728),
    ):
        c = gta5_methods.get_config(choice)
        c.model.mask2former.layers = c.model.mask2former.pixel_layers = 1
        c = validated(c)
        task = tasks.make_task(c, methods.active(c))
        trained, _, _ = tasks.Blueprint.of(task, c.model.freeze).abstract
        assert sum(leaf.size for leaf in jax.tree.leaves(trained["backbone"])) == count, choice


def test_gta5_to_the_four_targets(gta5):
    """`configs/gta5_eva02.py`, its Mask2Former and its crops of 512: trained on GTA5's archives,
    judged by vltseg on four trees.
    """
    workdir, printed = gta5
    assert "3 images of gta5" in printed
    assert "protocol vltseg" in printed
    assert len(losses(workdir)) == 3
    results = json.loads((workdir / "results.json").read_text())
    domains = results["domains"]
    assert (results["source"], results["protocol"], results["step"], results["rPD"]) == (
        "gta5",
        "vltseg",
        3,
        None,
    )
    assert list(domains) == [*TARGETS, *ACDC]
    assert [entry["part_of"] for entry in domains.values()] == [None] * 4 + ["acdc"] * 4
    assert [entry["images"] for entry in domains.values()] == [1, 1, 1, 4, 1, 1, 1, 1]
    assert not any(entry["seen"] or entry["subsets"] for entry in domains.values())
    for entry in domains.values():
        assert entry["mIoU"] == pytest.approx(
            np.mean([value for value in entry["IoU"].values() if value is not None])
        )
    assert results["mean_unseen"] == pytest.approx(
        np.mean([domains[name]["mIoU"] for name in TARGETS])
    )


def test_results_equal_a_count_by_hand(gta5, folder, here):
    """IoU of the loaded model's label maps of the raw archive; its images have the size that vltseg
    predicts Cityscapes at.
    """
    model = jaxdg.load(gta5[0])
    ids = list(CITYSCAPES_NAMES)
    confusion = np.zeros((19, 19), np.int64)
    archives = [
        zipfile.ZipFile(folder / "data/cityscapes" / f"{name}_trainvaltest.zip")
        for name in ("leftImg8bit", "gtFine")
    ]

    def opened(archive, name):
        return np.asarray(Image.open(io.BytesIO(archive.read(name))))

    for name in (name for name in archives[0].namelist() if "/val/" in name):
        label = opened(
            archives[1],
            name.replace("leftImg8bit", "gtFine").replace("_gtFine.png", "_gtFine_labelIds.png"),
        )
        prediction = model.predict(opened(archives[0], name))
        for truth in range(19):
            for guess in range(19):
                confusion[truth, guess] += ((label == ids[truth]) & (prediction == guess)).sum()
    assert (confusion.sum(axis=0) > 0).sum() > 1
    iou = (
        100
        * confusion.diagonal()
        / (confusion.sum(axis=0) + confusion.sum(axis=1) - confusion.diagonal())
    )
    entry = json.loads((gta5[0] / "results.json").read_text())["domains"]["cityscapes"]
    # Two programs may part a tie in two ways; a pixel is some 0.003 %.
    assert entry["IoU"] == pytest.approx(
        dict(zip(CITYSCAPES_NAMES.values(), iou, strict=True)), abs=0.02
    )
    assert entry["mIoU"] == pytest.approx(np.mean(iou), abs=0.02)


@pytest.mark.slow
def test_synthia_gives_its_subsets(folder, here):
    """`:synthia` also gives the means over the 16 and 13 classes that SYNTHIA has."""
    here(
        small(
            gta5_eva02.get_config("synthia"),
            folder / "data",
            steps=1,
            evaluation__domains=("bdd100k",),
        ),
        "synthia",
    )
    entry = json.loads(Path("synthia/results.json").read_text())["domains"]["bdd100k"]
    missing = {"terrain", "truck", "train"}
    for name, out in (("16", missing), ("13", missing | {"wall", "fence", "pole"})):
        assert entry["subsets"][name] == pytest.approx(
            np.mean([v for n, v in entry["IoU"].items() if n not in out])
        )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cityscapes", "bdd100k", "acdc"])
def test_real_sources_start(folder, here, source):
    """`configs/cityscapes_eva02.py` from each of its sources makes a step from the tree (Mapillary:
    below).
    """
    here(small(cityscapes_eva02.get_config(source), folder / "data", steps=1, eval_every=0), source)
    assert np.isfinite(losses(source)).all()


@pytest.mark.slow
def test_mapillary_then_cityscapes_then_the_servers(folder, here, tmp_path, monkeypatch):
    """The chain of `configs/cityscapes_test_server.py`: the second run starts from the first one's
    model, and both submissions pass.
    """
    monkeypatch.chdir(tmp_path)
    trees.make("cityscapes", tmp_path / "data", np.random.default_rng(1), size=(32, 64))
    trees.make(
        "acdc", tmp_path / "data", np.random.default_rng(2), zipped=True, size=(27, 48), count=1
    )
    here(
        small(
            cityscapes_eva02.get_config("mapillary"),
            folder / "data",
            MASK2FORMER,
            steps=1,
            eval_every=0,
        ),
        "runs/mapillary",
    )
    c = small(
        cityscapes_test_server.get_config(),
        tmp_path / "data",
        MASK2FORMER,
        steps=1,
        eval_every=0,
        seed=1,
    )
    here(c, "runs/test_server")
    first, second = (tasks.stored_tensors(run) for run in ("runs/mapillary", "runs/test_server"))
    assert first.keys() == second.keys()
    for (
        name,
        value,
    ) in (
        first.items()
    ):  # one step moves no parameter far, while random ones of another seed would differ
        if not name.endswith((".mean", ".var")):
            np.testing.assert_allclose(second[name], value, atol=1e-3)
    for name, images in (("cityscapes", 2), ("acdc", 4)):
        c.evaluation.protocol = f"{name}_test"
        dataset = tasks.make_task(c).open(f"{name}/test", train=False)
        benchmark = dataclasses.replace(submit.BENCHMARKS[name], count=images)
        submit.predict(c, Path("runs/test_server"), None, dataset, tmp_path / name, benchmark)
        files = submit.expected(benchmark, dataset)
        assert len(files) == images
        assert submit.check(tmp_path / name, files, benchmark) == []


def test_mixed_rare_skipped_and_from_records(folder, here):
    """GTA5 and SYNTHIA by weight, rare classes first, a truncated file left out: the same losses
    from files and from records.
    """
    root = folder / "broken"
    items = trees.make("gta5", root, np.random.default_rng(3), size=(53, 96), count=4)
    trees.make("synthia", root, np.random.default_rng(4), size=(38, 64), count=3)
    broken = Path(items[1].image)
    broken.write_bytes(broken.read_bytes()[:-20])
    skip = folder / "skip.txt"
    skip.write_text(f"{broken.relative_to(root)}\n")

    def run(root: Path, workdir: str, skip: Path | None) -> list[float]:
        fields = {
            "steps": 2,
            "batch_size": 4,
            "eval_every": 0,
            "data__source": "gta5+synthia",
            "data__source_weights": (3.0, 1.0),
        }
        fields |= {
            "data__rare_class_temperature": 0.01,
            "data__rare_class_min_pixels": 50,
            "data__skip": skip and str(skip),
        }
        fields |= {"evaluation__stride": (43, 43)}
        here(small(gta5_eva02.get_config(), root, **fields), workdir)
        return losses(workdir)

    with pytest.raises(ValueError, match=r"images/00002\.png: truncated"):
        run(root, "refused", None)
    expected = run(root, "files", skip)
    options = {
        "splits": ["train"],
        "boxes": False,
        "verify": False,
        "resize": None,
        "processes": 0,
        "beam": None,
    }
    prepare.main(
        ["gta5", "synthia"],
        root=str(root),
        out=str(folder / "records"),
        data=DataConfig(skip=str(skip)),
        **options,
    )
    assert len(expected) == 2
    assert run(folder / "records", "records", None) == expected


HOST = """
import sys
import jax
host, hosts, port, data, workdir = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
if __name__ == "__main__":
    if hosts > 1:
        jax.distributed.initialize(f"localhost:{port}", hosts, host)
    from pathlib import Path
    from jaxdg import config, train
    from jaxdg.commands import command_line as cli
    c = config.Config(steps=3, batch_size=2, log_every=1, eval_every=3)
    c.data.source, c.data.root, c.data.workers = "gta5", data, 4
    c.data.crop = c.evaluation.stride = (32, 32)
    c.model.pyramid, c.evaluation.domains, c.evaluation.batch_size = "none", ("acdc", "synthia"), 2
    train.train(config.validated(c), Path(workdir), cli.console(), cli.Interrupt())
"""


@pytest.mark.slow
def test_two_processes_of_four_workers_are_one(folder):
    """Real processes that share a batch and an odd number of images give the losses and IoUs of one
    process with two devices.
    """
    (folder / "host.py").write_text(HOST)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for hosts in (1, 2):

        def command(host, hosts=hosts):
            return [sys.executable, "host.py", str(host), str(hosts), port, "data", f"hosts{hosts}"]

        started = [
            subprocess.Popen(command(host), cwd=folder, env=environment(folder, 2 // hosts))
            for host in range(hosts)
        ]
        assert [process.wait(timeout=600) for process in started] == [0] * hosts
    assert losses(folder / "hosts2") == pytest.approx(losses(folder / "hosts1"), rel=1e-5)
    one, two = (
        json.loads((folder / f"hosts{hosts}" / "results.json").read_text())["domains"]
        for hosts in (1, 2)
    )
    assert [entry["images"] for entry in one.values()] == [
        4,
        1,
        1,
        1,
        1,
        3,
    ]  # acdc and its conditions, synthia
    for name, entry in one.items():
        assert two[name]["IoU"] == pytest.approx(entry["IoU"], abs=0.05)  # a pixel of a tie

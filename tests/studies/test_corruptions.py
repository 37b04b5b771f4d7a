"""The corruptions study: cells against predictions counted by hand, and the same end whether
interrupted or not.
"""

import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

import jaxdg
from jaxdg import config, evaluate
from jaxdg.backbones import VitConfig, zoo
from jaxdg.commands import command_line as cli
from jaxdg.config import Config, MeshConfig, validated
from jaxdg.config import workdir as workdir_lib
from jaxdg.data.augment.corruptions import KINDS, Corrupted
from jaxdg.evaluation.overlap import TrainedOn
from jaxdg.studies import corruptions
from jaxdg.studies.corruptions import Trained, judge, summary
from jaxdg.studies.study import StudyOptions
from jaxdg.tasks import run_state as tasks
from jaxdg.training import sharding
from jaxdg.training.checkpoint import Checkpoints

OPTIONS = StudyOptions(kinds=("fog", "pixelate"), severities=(1, 3))


class StopAfter(cli.Interrupt):
    """Asks to stop at the n-th look."""

    def __init__(self, looks: int = 10**6):
        self.left = looks

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def tiny(task: str) -> Config:
    """Streets of 48x96 pixels, judged on two domains of three images."""
    c = Config(steps=2, batch_size=8, log_every=1, eval_every=2, checkpoint_every=2, task=task)
    c.model.encoder = "tiny8"
    c.data.crop = c.data.streets.size = (48, 96)
    c.data.streets.images = 12
    c.data.streets.val_images = 3
    if task == "detection":
        c.model.decoder = "fcos"
        c.model.fcos.channels = 8
        c.model.fcos.groups = 2
        c.model.fcos.convs = 1
        c.model.fcos.levels = (1, 2)
    else:
        c.model.pyramid = "none"
        c.evaluation.stride = (48, 96)
    c.optimizer.learning_rate = 1e-2
    c.optimizer.clip = 1.0
    c.evaluation.domains = ("clear", "fog")
    return validated(c)


def finish(c: Config, workdir: Path) -> None:
    """The workdir of a finished run, as training leaves it, of random parameters."""
    workdir_lib.claim(c, workdir)
    task = tasks.make_task(c)
    mesh = sharding.make_mesh(MeshConfig())
    plan = tasks.Blueprint.of(task, "none")
    like, _ = tasks.abstract_state(plan, c, mesh)
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), like)
    drawn.step = np.int32(c.steps)
    state = jax.device_put(drawn, jax.tree.map(lambda leaf: leaf.sharding, like))
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state)
    checkpoints.close()
    model = state.trained, state.frozen, state.statistics
    domains = evaluate.open_domains(task)
    standing = evaluate.standings(task, domains, TrainedOn(("clear",)), print)
    results = evaluate.evaluate_domains(
        task.evaluator(plan.graph, mesh), model, domains, standing, lambda *_: None
    )
    evaluate.write_results(evaluate.summary(task, c, c.steps, results), results, workdir)


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """A checkpoint of arrays on eight devices compiles the cutting of each array eight times."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: first)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device):
    """The folder of a run of each task; what one compiles serves the next."""
    zoo.ZOO["tiny8"] = zoo.Entry(VitConfig(width=16, depth=2, heads=2, patch_size=8, taps=(1,)))
    folder = tmp_path_factory.mktemp("runs")
    for task in ("segmentation", "detection"):
        finish(tiny(task), folder / f"{task}_seed0")
    yield folder
    del zoo.ZOO["tiny8"]


def study_of(folder: Path, *workdirs: Path, options: StudyOptions = OPTIONS, **given) -> Trained:
    """The study of finished runs."""
    file = "configs/study_tiny.py"
    return Trained(
        list(map(str, workdirs)),
        "corruptions",
        corruptions.plan,
        file=file,
        given=given,
        base=None,
        options=options,
        folder=folder,
    )


def copied(trained: Path, task: str, folder: Path) -> Path:
    """A copy of a run without any cells."""
    return Path(
        shutil.copytree(
            trained / f"{task}_seed0",
            folder / f"{task}_seed0",
            ignore=shutil.ignore_patterns("corruptions_*"),
        )
    )


def document(study: Trained) -> bytes:
    """study.json of what there is."""
    study.collect(lambda run: corruptions.entry(study, run))
    return (study.folder / "study.json").read_bytes()


def test_cells_hold_the_scores_of_corrupted_images(trained, tmp_path):
    """A cell's mIoU is that of `jaxdg.load(..).predict` on the images of `Corrupted`, counted by
    hand; the clean one that of the run.
    """
    workdir = copied(trained, "segmentation", tmp_path)
    study = study_of(tmp_path / "study", workdir)
    judge(study, study.runs, cli.console(), StopAfter())
    results = json.loads((workdir / "results.json").read_text())
    model = jaxdg.load(workdir)
    for domain, dataset in evaluate.open_domains(tasks.make_task(config.load(workdir))).items():
        scores = study.scores(study.runs[0], domain)
        assert scores["clean"] == results["domains"][domain]["mIoU"]
        assert set(scores) == {"clean", "fog", "pixelate"}
        assert len({scores["clean"], scores["fog"][0], scores["fog"][2]}) == 3
        for kind in ("fog", "pixelate"):
            assert scores[kind][1] is None  # not asked for
            for severity in (1, 3):
                hit, either = np.zeros((2, 19))
                for i in range(3):
                    sample = Corrupted(dataset, kind, severity)[i]
                    truth = sample["label"]
                    seen = model.predict(sample["image"])
                    seen = np.where(truth == 255, 255, seen)
                    for k in range(19):
                        hit[k] += ((truth == k) & (seen == k)).sum()
                        either[k] += ((truth == k) | (seen == k)).sum()
                by_hand = 100 * np.mean((hit / np.maximum(either, 1))[either > 0])
                assert scores[kind][severity - 1] == pytest.approx(
                    by_hand, abs=0.3
                )  # ties fall either way
        cell = json.loads((workdir / "corruptions_2" / domain / "fog_3.json").read_text())
        assert (cell["score"], cell["images"], set(cell["IoU"])) == (
            scores["fog"][2],
            3,
            set(model.labels.names),
        )


def test_detection_is_judged_too(trained, tmp_path):
    """A cell's mAP50 is that of the task's evaluator on corrupted images, and the corruption
    changes it or its boxes' scores.
    """
    workdir = copied(trained, "detection", tmp_path)
    study = study_of(
        tmp_path / "study", workdir, options=StudyOptions(kinds=("contrast",), severities=(5,))
    )
    judge(study, study.runs, cli.console(), StopAfter())
    c = config.load(workdir)
    task = tasks.make_task(c)
    mesh = sharding.make_mesh(MeshConfig())
    plan, state, _ = tasks.Workdir(workdir, 2).restore(task, mesh)
    judged = task.evaluator(plan.graph, mesh)(
        state, Corrupted(task.open("fog", train=False), "contrast", 5), lambda: None
    )
    assert study.scores(study.runs[0], "fog")["contrast"] == [None, None, None, None, judged.score]
    cell = json.loads((workdir / "corruptions_2" / "fog" / "contrast_5.json").read_text())
    assert cell["AP50"] == judged.metrics["AP50"]
    written = json.loads(document(study))
    assert (written["score"], written["runs"][0]["severities"]) == ("mAP50", [5])


def test_kinds_trained_under_are_told(trained, tmp_path, capsys):
    """Of a run whose method showed it some of the judged kinds, in study.json and under the table;
    and of one that started from that run. A run without corrupted copies has none.
    """
    plain = copied(trained, "detection", tmp_path)
    config_file = json.loads((plain / "config.json").read_text())

    def variant(name, changes):
        workdir = tmp_path / f"{name}_seed0"
        shutil.copytree(plain, workdir)
        stored = json.loads(json.dumps(config_file))
        for part, values in changes.items():
            stored[part].update(values)
        (workdir / "config.json").write_text(json.dumps(stored))
        return workdir

    shown = variant("shown", {"divalign": {"on": True, "corruptions": ["pixelate", "saturate"]}})
    later = variant("later", {"model": {"start": str(shown)}})
    study = study_of(tmp_path / "study", plain, shown, later)
    found = [study.trained_under(run) for run in study.runs]
    assert found == [[], ["pixelate"], ["pixelate"]]
    assert corruptions.entry(study, study.runs[1])["trained_under"] == ["pixelate"]
    corruptions.show(study, study.runs, cli.console())
    said = capsys.readouterr().out
    assert "shown_seed0 was trained under pixelate: not unseen kinds" in said
    assert said.count("was trained under") == 2


def test_a_stopped_study_comes_to_the_same_end(trained, tmp_path):
    """Stopped after some batches it keeps whole cells, judges no cell twice, and its study.json is
    that of one left alone, to the byte.
    """
    whole = study_of(tmp_path / "study", copied(trained, "segmentation", tmp_path))
    judge(whole, whole.runs, cli.console(), StopAfter())
    expected = document(whole)
    other = tmp_path / "other"
    study = study_of(other / "study", copied(trained, "segmentation", other))
    with pytest.raises(cli.Stop):
        judge(study, study.runs, cli.console(), StopAfter(3))
    cells = sorted(study.workdir(study.runs[0]).glob("corruptions_2/*/*"))
    assert [cell.name for cell in cells] == ["clean.json", "fog_1.json", "fog_3.json"]
    part = json.loads(document(study))["runs"][0]["corruptions"]
    assert part["fog"] == {"clean": None, "fog": [None] * 3, "pixelate": [None] * 3}
    for cell in cells:  # would be seen if judged again
        content = json.loads(cell.read_text())
        cell.write_text(json.dumps(content | {"score": -1.0}))
    judge(study, study.runs, cli.console(), StopAfter())
    assert study.scores(study.runs[0], "clear")["fog"] == [-1.0, None, -1.0]
    for cell in cells:
        cell.unlink()
    judge(study, study.runs, cli.console(), StopAfter(3))  # three missing cells of one batch
    assert document(study) == expected
    assert json.loads(expected)["runs"][0]["status"] == "finished"


def test_fewer_images_are_other_cells(trained, tmp_path):
    """With `max_images` what was judged on all images does not count, and the other way round; the
    run's own setting counts likewise.
    """
    study = study_of(
        tmp_path / "study",
        copied(trained, "segmentation", tmp_path),
        options=StudyOptions(kinds=("fog",), severities=(5,)),
    )
    run = study.runs[0]
    study.max_images = 2
    judge(study, study.runs, cli.console(), StopAfter())
    assert json.loads(study.cell(run, "clear", "fog", 5).read_text())["images"] == 2
    assert study.score(run, "clear", "fog", 5) is not None
    study.max_images = None
    assert study.score(run, "clear", "fog", 5) is None
    same = study_of(
        tmp_path / "study",
        study.workdir(run),
        options=study.options,
        **{"evaluation.max_images": 2},
    )
    assert same.score(same.runs[0], "clear", "fog", 5) is not None


def test_summary_fills_no_gaps():
    """Means over kinds and severities by hand; one missing cell takes every mean away that it is
    part of.
    """
    scores = {"clean": 50.0, "fog": [40.0, None, 20.0], "snow": [30.0, None, 10.0]}
    assert summary(scores, (1, 3)) == {
        "clean": 50.0,
        "severity": {1: 35.0, 3: 15.0},
        "mean": 25.0,
        "relative": 50.0,
    }
    scores["snow"][2] = None
    assert summary(scores, (1, 3)) == {
        "clean": 50.0,
        "severity": {1: 35.0, 3: None},
        "mean": None,
        "relative": None,
    }
    assert summary({**scores, "clean": None}, (1,))["relative"] is None


def test_what_cannot_be_judged_is_refused(trained, tmp_path):
    """A folder without a run, a run that has not come to its end, two of one name, two tasks, and
    unknown kinds, each in one line.
    """
    done = trained / "segmentation_seed0"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        study_of(tmp_path, tmp_path / "nowhere")
    half = copied(trained, "segmentation", tmp_path)
    (half / "results.json").unlink()
    with pytest.raises(
        ValueError,
        match="segmentation_seed0 holds no run that was trained and evaluated to its end",
    ):
        study_of(tmp_path, half)
    with pytest.raises(ValueError, match="names two runs segmentation_seed0"):
        study_of(tmp_path, done, done)
    with pytest.raises(ValueError, match="detection voc07 and segmentation native"):
        study_of(tmp_path, done, trained / "detection_seed0")
    with pytest.raises(ValueError, match="unknown kinds of corruption rain"):
        study_of(tmp_path, done, options=StudyOptions(kinds=("rain",))).check()
    with pytest.raises(ValueError, match=r"severities is \(0, 1\); allowed: some of 1 to 5"):
        study_of(tmp_path, done, options=StudyOptions(severities=(0, 1))).check()
    study = study_of(tmp_path, done, options=StudyOptions())
    assert len(study.cells()) == 1 + 15 * 5
    assert study.kinds == KINDS
    assert (study.runs[0].group, study.runs[0].seed) == ("segmentation", 0)

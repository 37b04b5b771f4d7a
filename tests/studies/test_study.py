"""Studies: what they plan, that they go on after any end, and that what they collect is what the
runs say.
"""

from contextlib import suppress
import json
import os
from pathlib import Path
import re
import shutil
import signal
import subprocess
import sys
import time

from flax import nnx
import numpy as np
import pytest

import jaxdg
from jaxdg import config as config_lib
from jaxdg import weights
from jaxdg.backbones import Pyramid
from jaxdg.commands import command_line as cli
from jaxdg.config import Config, overrides
from jaxdg.config import workdir as workdir_lib
from jaxdg.data.datasets import Subset
from jaxdg.data.domains import open_domain
from jaxdg.studies import corruptions, freezing, methods, pretraining, seeds, study, transfer
from jaxdg.studies.study import Study, StudyOptions
from jaxdg.studies.summary import mean_and_spread, summary
from jaxdg.training.metrics import read_metrics
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PLANS = {
    module.__name__.rpartition(".")[2]: module.plan
    for module in (pretraining, freezing, methods, corruptions, transfer, seeds)
}
CONFIG = """
from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions
def get_config():
    c = Config(steps=4, batch_size=2, log_every=1, eval_every=4, checkpoint_every=1)
    c.evaluation.domains = ("clear", "night")
    return c
def get_study():
    return StudyOptions(repeat=(0, 1), sources={SOURCES})
"""


def made(
    name: str, options: StudyOptions, base: Config | None = None, folder: str = "runs/none", **given
) -> Study:
    base = study.configured(base or Config(), given)
    return Study(
        name,
        PLANS[name],
        file="configs/x.py",
        given=given,
        base=base,
        options=options,
        folder=Path(folder),
    )


def plan_of(name: str, options: StudyOptions, base: Config | None = None) -> dict:
    return {run.name: dict(run.settings) for run in made(name, options, base).runs}


class Studies:
    """Starts the command of a study with a stand-in for training, in a folder of its own."""

    def __init__(self, folder: Path, sources: str):
        self.folder = folder
        (folder / "tiny.py").write_text(CONFIG.replace("{SOURCES}", sources))

    def start(self, *arguments: str, seconds: float = 0.0) -> subprocess.Popen:
        command = [
            sys.executable,
            str(ROOT / "tests/studies/stand_in.py"),
            "--config=tiny.py",
            "--workdir=study",
            *arguments,
        ]
        environment = os.environ | {
            "SECONDS_A_STEP": str(seconds),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int = 0) -> str:
        """What it prints."""
        program = str(ROOT / "tests/studies/stand_in.py")
        own = os.environ | {"SECONDS_A_STEP": "0", "PYTHONPATH": str(ROOT)}
        given = ("--config=tiny.py", "--workdir=study", *arguments)
        done = forked.run(program, *given, folder=self.folder, environment=own)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def wait_for(self, run: str, step: int) -> None:
        end = time.monotonic() + 30
        while not (self.folder / f"study/runs/{run}/checkpoints/{step}").exists():
            assert time.monotonic() < end
            time.sleep(0.005)

    def starts(self) -> dict[str, int]:
        """How often each run was begun or gone on with."""
        return {
            path.parent.name: len(path.read_text().split())
            for path in sorted(self.folder.glob("study/runs/*/starts"))
        }

    @property
    def collected(self) -> bytes:
        return (self.folder / "study/study.json").read_bytes()


def test_the_plans_are_the_papers():
    """Encoders tuned and frozen but none from scratch; first and last blocks; every source; every
    seed; models; seeds of all.
    """
    weights = study.configured(Config(), {"model.weights": "a.safetensors"})
    assert plan_of("pretraining", StudyOptions(), weights) == {
        "scratch_ti8_tuned_seed0": {"model.freeze": "none"},
        "scratch_ti8_frozen_seed0": {"model.freeze": "all"},
        "from_scratch_tuned_seed0": {
            "model.weights": None,
            "model.start": None,
            "model.freeze": "none",
        },
    }
    clip = {"model.encoder": "clip_b16", "model.weights": "b.safetensors"}
    assert plan_of(
        "pretraining", StudyOptions(encoders={"CLIP B/16": clip, "none": {}}, repeat=(3, 5))
    ) == {
        **{f"CLIP_B_16_tuned_seed{seed}": {**clip, "model.freeze": "none"} for seed in (3, 5)},
        **{f"CLIP_B_16_frozen_seed{seed}": {**clip, "model.freeze": "all"} for seed in (3, 5)},
        **{f"none_tuned_seed{seed}": {"model.freeze": "none"} for seed in (3, 5)},
    }
    assert plan_of("freezing", StudyOptions(freeze_first=(2, 4), freeze_last=(1,))) == {
        f"{name}_frozen_seed0": {"model.freeze": name.replace("_", " ")}
        for name in ("none", "first_2", "first_4", "last_1")
    }
    assert len(plan_of("freezing", StudyOptions())) == 1 + 12 + 12
    domains = Config().evaluation.domains
    assert plan_of("transfer", StudyOptions()) == {
        f"from_{domain}_seed0": {"data.source": domain} for domain in domains
    }
    only = {
        "settings": {"transfer": {"evaluation.domains": ("fog",), "steps": 7}},
        "sources": {"fog": {"steps": 9}},
    }
    assert plan_of("transfer", StudyOptions(**only)) == {
        "from_fog_seed0": {"evaluation.domains": ("fog",), "steps": 9, "data.source": "fog"}
    }
    assert list(plan_of("seeds", StudyOptions(repeat=(7,)))) == [
        "scratch_ti8_seed0",
        "scratch_ti8_seed1",
        "scratch_ti8_seed2",
    ]
    assert list(plan_of("methods", StudyOptions())) == [
        f"{name}_seed0" for name in ("tuned", "frozen", "average", "LoRA", "SoMA", "Rein")
    ]
    switches = {"plain": {}, "frozen": {"model.freeze": "all"}}
    assert plan_of("methods", StudyOptions(encoders={"CLIP": clip}, methods=switches)) == {
        "CLIP_plain_seed0": clip,
        "CLIP_frozen_seed0": {**clip, "model.freeze": "all"},
    }
    pixmix = {"data.pixmix": (4, 4.0)}
    assert plan_of("corruptions", StudyOptions(models={"a": {}, "b": pixmix})) == {
        "a_seed0": {},
        "b_seed0": pixmix,
    }


FILES = [
    path
    for path in sorted((ROOT / "configs").glob("*.py"))
    if hasattr(config_lib.experiment(path), "get_study")
]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_command_of_a_run_is_its_configuration(path, name):
    """Of every run that a shipped experiment plans: the flag parser makes of the command what the
    study compares folders with.
    """
    options = config_lib.experiment(path).get_study()
    planned = 0
    given = {
        "data.root": "/data",
        "optimizer.learning_rate_factors": ((r"^a\.", 0.5),),
        "data.workers": 3,
    }
    base = study.configured(config_lib.from_file(path), given)
    planning = Study(
        name,
        PLANS[name],
        file=str(path),
        given=given,
        base=base,
        options=options,
        folder=Path("none"),
    )
    for run in planning.runs:
        command = planning.command(run)
        rest, changes = overrides.take(command)
        assert rest == [
            "-m",
            "jaxdg.train",
            "--config",
            str(path),
            "--workdir",
            f"none/runs/{run.name}",
        ]
        parsed = config_lib.validated(overrides.applied(config_lib.from_file(path), changes))
        assert parsed == planning.config(run)
        assert parsed.seed == run.seed
        planned += 1
    assert planned


def test_shipped_studies_are_found():
    """The parametrisation above has them all."""
    shipped = {"carla_methods", "cityscapes_eva02", "gta5_eva02", "study_tiny", "vltdet_clip_rn101"}
    assert {path.stem for path in FILES} == shipped


def test_methods_are_told_with_what_they_cost(tmp_path):
    """Parameters and bytes are those of the plan, counted once for all seeds; the time is the
    median over the rows of the run but the first. A frozen encoder trains the decoder alone.
    """
    base = Config()
    base.data.crop = base.evaluation.stride = (32, 32)
    base.model.weights = "a.safetensors"
    options = StudyOptions(methods={"frozen": {"model.freeze": "all"}}, repeat=(0, 1))
    made_here = made("methods", options, base, folder=str(tmp_path))
    for run in made_here.runs:
        workdir = made_here.workdir(run)
        workdir.mkdir(parents=True)
        rows = [{"step": i, "loss": 1.0, "seconds_per_step": s} for i, s in enumerate((9, 2, 3, 4))]
        rows.insert(2, {"step": 2, "domain": "night", "mIoU": 5.0})
        (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert methods.cost(made_here, made_here.runs[0]) is None
    methods.judge(made_here, made_here.runs, cli.console(), cli.Interrupt())
    found = [methods.cost(made_here, run) for run in made_here.runs]
    assert found[0] == found[1]
    assert found[0]["seconds_per_step"] == 3
    width, classes, levels = 128, 19, 4
    head = levels * (2 * width + (width + 1) * classes)
    pyramid = sum(
        int(np.prod(shape))
        for shape in weights.shapes(
            nnx.eval_shape(lambda: Pyramid(width, "layer", dtype="float32", rngs=nnx.Rngs(0)))
        ).values()
    )
    assert found[0]["parameters"] == head + pyramid
    assert found[0]["bytes"] > 4 * 3 * found[0]["parameters"]


def test_figures_of_a_group_are_numpys():
    """Mean and sample deviation of what there is: of three, of one, of none; a domain that a run
    lacks, and an undefined rPD.
    """
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 100, (3, 2))
    entries = [
        {"domains": {"a": {"mAP50": a}, "b": {"mAP50": b}}, "mean_unseen": b, "rPD": 100 * b / a}
        for a, b in scores.tolist()
    ]
    del entries[2]["domains"]["b"]
    entries[1]["rPD"] = None
    found = summary([{"results": entry} for entry in (*entries, None)], "mAP50")
    assert (found["n"], found["of"]) == (3, 4)
    expected = {"a": scores[:, 0], "b": scores[:2, 1]}
    for name, values in expected.items():
        figure = found["domains"][name]
        assert figure == {
            "mean": pytest.approx(values.mean()),
            "spread": pytest.approx(values.std(ddof=1)),
            "n": len(values),
        }
    assert found["mean_unseen"]["mean"] == pytest.approx(scores[:, 1].mean())
    assert (found["rPD"]["n"], found["rPD"]["mean"]) == (
        2,
        pytest.approx((100 * scores[:, 1] / scores[:, 0])[[0, 2]].mean()),
    )
    assert mean_and_spread([None, 5.0]) == {"mean": 5.0, "spread": None, "n": 1}
    nothing = {"mean": None, "spread": None, "n": 0}
    summarised = summary([{"results": None}], "mIoU")
    assert summarised == {
        "n": 0, "of": 1, "domains": {}, "mean_unseen": nothing, "rPD": nothing
    }  # fmt: skip


def test_a_study_ended_in_any_way_goes_on_to_the_same_bytes(tmp_path):
    """By kill -9, while its training goes on alone, and by SIGTERM.

    Finished runs are left alone; of a deleted one that one is redone.
    """
    for name in ("whole", "other"):
        (tmp_path / name).mkdir()
    whole, other = (
        Studies(tmp_path / name, '{"clear": {}, "night": {}}') for name in ("whole", "other")
    )
    printed = whole.run()
    assert "run 4 of 4: from_night_seed1, missing" in printed
    assert whole.starts() == dict.fromkeys(
        ("from_clear_seed0", "from_clear_seed1", "from_night_seed0", "from_night_seed1"), 1
    )

    first = other.start(
        seconds=0.25
    )  # killed, but its training is not: the next study waits for it
    other.wait_for("from_clear_seed0", 1)
    training = int((other.folder / "study/runs/from_clear_seed0/starts").read_text())
    os.kill(training, signal.SIGSTOP)
    assert json.loads(other.collected)["runs"][0]["status"] == "missing"
    first.kill()
    first.wait()
    second = other.start(seconds=0.25)
    assert second.stdout is not None
    while "waits" not in (line := second.stdout.readline()):
        assert line
    assert line == "from_clear_seed0: waits for another process that trains it\n"
    os.kill(training, signal.SIGCONT)
    other.wait_for("from_night_seed0", 2)
    second.terminate()
    out, err = second.communicate(timeout=30)
    first.communicate()
    assert (second.returncode, err) == (0, "")
    assert out.rstrip().endswith("stopped; run the same command to go on")
    listed = re.findall(r"^\d  (\w+)  (.*)$", other.run("--list"), re.MULTILINE)
    assert listed[:2] == [("from_clear_seed0", "finished"), ("from_clear_seed1", "finished")]
    assert re.fullmatch(r"interrupted at step [23]", dict(listed)["from_night_seed0"])
    assert dict(listed)["from_night_seed1"] == "missing"
    assert other.starts() == {"from_clear_seed0": 1, "from_clear_seed1": 1, "from_night_seed0": 1}
    printed = other.run()
    assert "run 1 of 4: from_clear_seed0, finished" in printed
    assert other.starts() == {
        "from_clear_seed0": 1,
        "from_clear_seed1": 1,
        "from_night_seed0": 2,
        "from_night_seed1": 1,
    }
    assert other.collected == whole.collected

    shutil.rmtree(other.folder / "study/runs/from_clear_seed1")
    other.run()
    assert other.starts() == {
        "from_clear_seed0": 1,
        "from_clear_seed1": 1,
        "from_night_seed0": 2,
        "from_night_seed1": 1,
    }
    assert other.collected == whole.collected
    assert str(tmp_path) not in whole.collected.decode()


def test_a_run_that_fails_is_missing_and_the_others_are_made(tmp_path):
    """Its error is shown when it fails and at the end, the exit code is 1, nothing is filled in;
    single runs and --collect agree.
    """
    studies = Studies(
        tmp_path, '{"broken": {}, "dumb": {}, "night": {"steps": 3, "eval_every": 3}}'
    )
    printed = studies.run(code=1)
    assert "from_broken_seed0 did not come to its end: no images of broken" in printed
    assert (
        "from_dumb_seed1 did not come to its end: it ended with exit code -9 and without a word"
        in printed
    )
    assert (
        "error: 4 of 6 runs are missing: from_broken_seed0 (failed: no images of broken), "
        in printed
    )
    assert "a library's last words" not in printed
    found = json.loads(studies.collected)
    assert [run["status"] for run in found["runs"]] == 4 * ["missing"] + 2 * ["finished"]
    assert [(run["step"], run["results"]) for run in found["runs"][:4]] == 4 * [(None, None)]
    assert [(group["group"], group["n"], group["of"]) for group in found["groups"]] == [
        ("from broken", 0, 2), ("from dumb", 0, 2), ("from night", 2, 2)
    ]  # fmt: skip
    assert found["groups"][0]["mean_unseen"] == {"mean": None, "spread": None, "n": 0}
    assert found["groups"][2]["domains"]["clear"] == {
        "mean": pytest.approx(50.6),
        "spread": pytest.approx(0.5**0.5),
        "n": 2,
    }
    assert re.search(r"from broken +│ +missing │", printed)
    assert re.search(r"from night +│ +50\.6 ± 0\.7 │", printed)
    night = found["runs"][4]
    assert (
        night["command"]
        == "python -m jaxdg.train --config tiny.py --workdir study/runs/from_night_seed0"
        " --config.data.source=night --config.steps=3 --config.eval_every=3 --config.seed=0"
    )
    assert (night["settings"], night["source"]) == (
        {"data.source": "night", "steps": 3, "eval_every": 3},
        "night",
    )
    assert night["results"] == json.loads(
        (tmp_path / "study/runs/from_night_seed0/results.json").read_text()
    )
    assert (found["study"], found["score"], found["protocol"], found["source"]) == (
        "transfer",
        "mIoU",
        "native",
        "clear",
    )
    assert found["command"] == "python -m jaxdg.studies.transfer --config=tiny.py --workdir=study"
    assert found["versions"]["jaxdg"] == jaxdg.__version__

    before = studies.collected
    assert "failed: no images of broken" in studies.run("--list")
    assert "error: 1 of 1 runs are missing: from_broken_seed1" in studies.run("--run=1", code=1)
    assert studies.starts() == {
        "from_broken_seed0": 1, "from_broken_seed1": 2, "from_dumb_seed0": 1,
        "from_dumb_seed1": 1, "from_night_seed0": 1, "from_night_seed1": 1,
    }  # fmt: skip
    (tmp_path / "study/study.json").unlink()
    shutil.rmtree(tmp_path / "study/runs/from_night_seed1")
    studies.run("--run=5")
    assert not (
        tmp_path / "study/study.json"
    ).exists()  # jobs beside one another would write it at once
    studies.run("--collect")
    assert studies.collected == before
    assert "error: --run is 6; allowed: 0 to 5" in studies.run("--run=6", code=1)


def test_other_runs_and_wrong_plans_are_refused(tmp_path):
    """Before anything is trained, in one line: the difference, the study a folder belongs to, a
    misspelt field, a value, a name twice.
    """
    folder = str(tmp_path / "study")
    planned = made("transfer", StudyOptions(sources={"fog": {}}), folder=folder)
    workdir_lib.claim(planned.config(planned.runs[0]), planned.workdir(planned.runs[0]))
    made(
        "transfer", StudyOptions(sources={"fog": {}}), folder=folder, steps=9
    )  # nothing was saved that could be lost
    (planned.workdir(planned.runs[0]) / "checkpoints/1").mkdir(parents=True)
    made(
        "transfer",
        StudyOptions(sources={"fog": {}, "night": {}}),
        folder=folder,
        **{"data.workers": 2},
    )  # a longer study, other workers
    with pytest.raises(
        ValueError,
        match=(
            r"study/runs/from_fog_seed0 holds another run: steps: 1000 -> 9; give its settings or"
            r" another"
        ),
    ):
        made("transfer", StudyOptions(sources={"fog": {}}), folder=folder, steps=9)
    planned.collect()
    with pytest.raises(ValueError, match=r"study holds the study transfer; give another --workdir"):
        made("seeds", StudyOptions(), folder=folder)
    with pytest.raises(
        ValueError, match=r"unknown field model\.freez; did you mean model\.freeze\?"
    ):
        made("corruptions", StudyOptions(models={"a": {"model.freez": "all"}}))
    with pytest.raises(ValueError, match=r"batch_size is 0; allowed: greater than or equal to 1"):
        made("corruptions", StudyOptions(models={"a": {"batch_size": 0}}))
    with pytest.raises(ValueError, match=r"eval_every is 0; allowed: at least 1 in a study"):
        made("seeds", StudyOptions(), eval_every=0)
    with pytest.raises(ValueError, match=r"plans several runs called a_b_seed0; give"):
        made("corruptions", StudyOptions(models={"a b": {}, "a/b": {}}))


def test_published_paths_are_relative(tmp_path, monkeypatch):
    """Nothing of this machine is in study.json: paths below the folder the command runs in are cut
    to it, others to their last part.
    """
    monkeypatch.chdir(tmp_path)
    planned = made(
        "seeds",
        StudyOptions(),
        folder=str(tmp_path / "a/b"),
        **{"data.root": "/somewhere/data", "model.weights": "/x/w.st"},
    )
    found = planned.collect()
    command = found["runs"][0]["command"]
    assert (
        "--workdir a/b/runs/scratch_ti8_seed0 --config.data.root=data --config.model.weights=w.st"
        " --config.seed=0" in command
    )
    assert "somewhere" not in json.dumps(found)
    assert "--config.data.root=/somewhere/data" in planned.command(planned.runs[0])


def test_a_preempted_slurm_job_saves_and_is_queued_again(tmp_path):
    """The script hands its arguments and the number of its task to the study, passes SIGTERM on,
    waits, and asks for the job again.
    """
    notes = tmp_path / "notes"
    programs = {
        "python": (
            f'trap "echo saved >> {notes}; exit" TERM\necho "$@" >> {notes}\nfor i in $(seq 200);'
            " do sleep 0.05; done\nexit 1"
        ),
        "scontrol": f'echo "$@" >> {notes}',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_JOB_ID": "70",
    }
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts/slurm_array.sh"), "seeds", "--config", "a b.py"],
        env=environment,
    )
    end = time.monotonic() + 20
    while not notes.exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 0
    assert notes.read_text().splitlines() == [
        "-m jaxdg.studies.seeds --config a b.py --run 3",
        "saved",
        "requeue 70_3",
    ]


REAL = """
from jaxdg.config import Config
from jaxdg.studies.study import StudyOptions
def get_config():
    c = Config(steps=60, batch_size=2, log_every=1, eval_every=60, checkpoint_every=30)
    c.model.taps = (3,)
    c.data.crop = (32, 32)
    c.data.streets.size, c.data.streets.images, c.data.streets.val_images = (48, 96), 12, 6
    c.model.pyramid = "none"
    c.evaluation.domains = ("clear", "fog")
    c.evaluation.stride = (32, 32)
    c.evaluation.max_images = 3
    return c
def get_study():
    return StudyOptions(seeds=(4,))
"""


def test_a_real_run_stops_with_its_study_and_goes_on(tmp_path):
    """The command as users give it: SIGTERM reaches the training, which saves; the next call
    resumes; the pictures are the model's.
    """
    (tmp_path / "tiny.py").write_text(REAL)
    command = [
        sys.executable,
        "-m",
        "jaxdg.studies.seeds",
        "--config",
        "tiny.py",
        "--workdir",
        "study",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run = tmp_path / "study/runs/scratch_ti8_seed4"
    rows: list = []
    while process.poll() is None and len(rows) < 3:
        with suppress(FileNotFoundError):
            rows = read_metrics(run)
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.rstrip().endswith("stopped; run the same command to go on")
    assert re.search(r"stopped at step \d+; run the same command to go on", out)
    assert not (run / "results.json").exists()
    assert json.loads((tmp_path / "study/study.json").read_text())["groups"][0]["n"] == 0

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from step" in done.stdout
    found = json.loads((tmp_path / "study/study.json").read_text())["runs"][0]
    assert (found["status"], found["step"], found["seed"]) == ("finished", 60, 4)
    assert found["results"] == json.loads((run / "results.json").read_text())
    assert found["results"]["max_images"] == found["results"]["domains"]["fog"]["images"] == 3

    model = jaxdg.load(run)
    c = config_lib.load(run)
    fog = Subset(open_domain("fog", root=".", train=False, streets=c.data.streets, folder=None), 3)
    for i, image in enumerate((0, 2)):
        kept = np.load(run / f"qualitative/fog_{i}.npz")
        np.testing.assert_array_equal(kept["image"], fog[image]["image"])
        np.testing.assert_array_equal(kept["truth"], fog[image]["label"])
        assert (kept["prediction"] == model.predict(fog[image]["image"])).mean() > 0.999

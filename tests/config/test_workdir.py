"""A workdir belongs to one run: what may change, who works there, and what a crash or a failed
start leaves behind.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxdg import config as config_lib
from jaxdg.config import Config, workdir
from jaxdg.data.boxes import BoxOptions
from jaxdg.data.datasets import FolderOptions


def other(value):
    """A value of the same kind that differs, for any field of the default configuration."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1])) if value else (1,)
    return "x"


def leaves(tree, prefix=""):
    """Dotted names of all fields that hold no dataclass."""
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_exactly_the_free_fields_may_change():
    """Each field is changed alone: every change makes another run, but for where and how it runs
    and what it writes down.
    """
    free = set()
    old = Config()
    objects = {"data.folder": FolderOptions(), "data.boxes": BoxOptions()}
    for field in leaves(old):
        new = Config()
        holder = config_lib.get(new, field.rpartition(".")[0]) if "." in field else new
        setattr(
            holder,
            field.rpartition(".")[2],
            objects[field] if field in objects else other(config_lib.get(new, field)),
        )
        changed = workdir.differences(old, new)
        assert len(changed) <= 1 or field in objects, changed
        assert all(phrase.startswith(field) and " -> " in phrase for phrase in changed)
        if not changed:
            free.add(field)
    where = {
        "mesh.data",
        "mesh.fsdp",
        "data.workers",
        "data.root",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "loggers",
    }
    # `other` names a list where there was none, which leaves more out.
    recorded = {
        "keep_checkpoints",
        "model.remat",
        "model.unroll",
        "model.mask2former.unroll",
        "model.tqdm.unroll",
        "optimizer.accumulate",
        "evaluation.batch_size",
        "evaluation.windows_per_call",
        "data.skip",
    }
    assert free == where | recorded


def config(**changes) -> Config:
    """The default configuration with dotted fields changed."""
    made = Config()
    for field, value in changes.items():
        holder, _, name = field.replace("__", ".").rpartition(".")
        setattr(config_lib.get(made, holder) if holder else made, name, value)
    return config_lib.validated(made)


def with_checkpoint(folder: Path) -> Path:
    """A workdir that holds something to lose."""
    (folder / "checkpoints" / "5").mkdir(parents=True)
    return folder


def test_a_workdir_keeps_its_run(tmp_path):
    """A changed configuration is refused with the differences and the stored one kept; free fields
    are taken over.
    """
    run = tmp_path / "new" / "run"
    workdir.claim(config(), run)
    assert config_lib.load(run) == config()
    with_checkpoint(run)

    with pytest.raises(
        ValueError,
        match=(
            r"run holds another run: optimizer\.clip: 0\.01 -> 2\.0; seed: 0 -> 1; give another"
            r" --workdir"
        ),
    ):
        workdir.claim(config(seed=1, optimizer__clip=2.0), run)
    assert config_lib.load(run) == config()

    moved = config(log_every=1, mesh__data=1)
    workdir.claim(moved, run)
    assert config_lib.load(run) == moved
    assert not (run / "changes.jsonl").exists()


def test_a_run_that_saved_nothing_can_be_corrected(tmp_path):
    """Where there is no checkpoint nothing is lost: other settings begin anew in the same folder,
    and this is said.
    """
    workdir.claim(config(), tmp_path)
    said = []
    workdir.claim(config(batch_size=4), tmp_path, say=said.append)
    assert config_lib.load(tmp_path) == config(batch_size=4)
    assert said == [
        f"{tmp_path} held a run that had saved nothing; it begins anew, with batch_size: 8 -> 4"
    ]


def test_what_may_change_is_recorded(tmp_path):
    """How images are judged at once, parts of a batch, recomputing, checkpoints kept and domains
    added: taken over, a line each.
    """
    run = with_checkpoint(tmp_path)
    workdir.claim(config(evaluation__domains=("clear",)), run)
    new = {
        "evaluation__batch_size": 2,
        "evaluation__windows_per_call": 1,
        "optimizer__accumulate": 2,
        "model__remat": True,
    }
    changed = config(evaluation__domains=("night", "clear"), keep_checkpoints=5, **new)
    said = []
    workdir.claim(changed, run, step=40, say=said.append)
    assert config_lib.load(run) == changed
    rows = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert {row["field"]: (row["step"], row["old"], row["new"]) for row in rows} == {
        "evaluation.batch_size": (40, 4, 2),
        "evaluation.domains": (40, ["clear"], ["night", "clear"]),
        "evaluation.windows_per_call": (40, 8, 1),
        "keep_checkpoints": (40, 2, 5),
        "model.remat": (40, False, True),
        "optimizer.accumulate": (40, 1, 2),
    }
    assert "changed from step 40 on: keep_checkpoints: 2 -> 5" in said
    workdir.claim(changed, run, step=50, say=pytest.fail)  # nothing more to tell
    assert len((run / "changes.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation__domains": ("night",)},
        {"evaluation__protocol": "rein"},
        {"evaluation__max_images": 9},
        {"evaluation__stride": (32, 32)},
        {"steps": 9},
    ],
    ids=str,
)
def test_what_results_mean_may_not_change(tmp_path, change):
    """A lost domain, another protocol or stride, fewer images, more steps: another run."""
    run = with_checkpoint(tmp_path)
    workdir.claim(config(evaluation__domains=("clear", "fog")), run)
    with pytest.raises(
        ValueError, match=f"holds another run: {next(iter(change)).replace('__', '[.]')}: "
    ):
        workdir.claim(config(**{"evaluation__domains": ("clear", "fog")} | change), run)


def test_a_skip_list_may_grow(tmp_path):
    """One more image left out, in the same file or in another, is recorded by name; one less is
    another run, and so is no list.
    """
    run = with_checkpoint(tmp_path / "run")
    one = tmp_path / "one.txt"
    two = tmp_path / "two.txt"
    (tmp_path / "a").mkdir()
    for i in range(1, 4):
        (tmp_path / f"a/{i}.png").touch()

    def listed(file):
        return config(data__skip=str(file), data__root=str(tmp_path))

    one.write_text("a/1.png\n")
    workdir.claim(listed(one), run)
    assert (run / "skip.txt").read_text() == "a/1.png\n"
    workdir.claim(listed(one), run, say=pytest.fail)
    one.write_text("# found later\na/1.png\na/2.png\n")
    workdir.claim(listed(one), run, step=3)
    two.write_text("a/3.png\na/2.png\na/1.png\n")
    workdir.claim(listed(two), run, step=7)
    rows = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [(row["step"], row["field"], row["added"]) for row in rows] == [
        (3, "data.skip", ["a/2.png"]),
        (7, "data.skip", ["a/3.png"]),
    ]
    assert (run / "skip.txt").read_text() == "a/1.png\na/2.png\na/3.png\n"
    with pytest.raises(
        ValueError,
        match=r"holds another run: data\.skip: .*one\.txt no longer lists a/3\.png; give another",
    ):
        workdir.claim(listed(one), run)
    with pytest.raises(ValueError, match=r"holds another run: data\.skip: '.*two\.txt' -> None"):
        workdir.claim(config(), run)
    (tmp_path / "a/3.png").unlink()
    workdir.claim(listed(one), run)  # what is deleted need not be listed
    one.write_text('"old\\root\\a\\1.png"\n/old/root/a/2.png\n')
    workdir.claim(listed(one), run)  # other ways to write the same


def test_a_run_without_a_skip_list_may_get_one(tmp_path):
    """A damaged image met in the middle of a run is left out, and the run goes on."""
    run = with_checkpoint(tmp_path / "run")
    one = tmp_path / "one.txt"
    workdir.claim(config(), run)
    one.write_text("a/1.png\n")
    workdir.claim(config(data__skip=str(one)), run, step=2)
    (row,) = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert row == {
        "step": 2,
        "field": "data.skip",
        "old": None,
        "new": str(one),
        "added": ["a/1.png"],
    }


def test_a_folder_that_appears_in_the_configuration_is_a_difference():
    """From no folder to one, and from no id map to one, are other runs."""
    old = Config()
    new = Config()
    new.data.folder = FolderOptions()
    assert any(phrase.startswith("data.folder.") for phrase in workdir.differences(old, new))
    mapped = Config()
    mapped.data.folder = FolderOptions(id_map={7: 0})
    assert workdir.differences(new, mapped) == ["data.folder.id_map.7: None -> 0"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"\0" * 40, b'{"steps": 4', b"\xff\xfe{}", b"[1]"],
    ids=["empty", "zeros", "cut", "bytes", "list"],
)
def test_a_broken_configuration_is_written_anew(tmp_path, damage):
    """Reading names the file and what to do; the training command keeps the broken file aside and
    writes it anew.
    """
    run = with_checkpoint(tmp_path)
    (run / "config.json").write_bytes(damage)
    with pytest.raises(
        ValueError,
        match=(
            r"config\.json: broken \(.*\); run the command that trains it again, .*keeps the"
            r" checkpoints$"
        ),
    ):
        config_lib.load(run)
    workdir.check(config(), run)  # nothing to compare with
    said = []
    workdir.claim(config(), run, say=said.append)
    assert len(said) == 1
    assert (
        "it is kept as config.json.broken; written anew from the settings of this command"
        in said[0]
    )
    assert (run / "config.json.broken").read_bytes() == damage
    assert config_lib.load(run) == config()

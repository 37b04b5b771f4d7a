"""metrics.jsonl reads as if a run had never stopped; TensorBoard's file holds the same numbers."""

import errno
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from jaxdg.training.metrics import read_metrics
from jaxdg.training.writer import Writer


@pytest.fixture
def open_writer(tmp_path):
    """Opens writers on one workdir and closes them."""
    opened = []

    def open_one(resume_step=0, say=pytest.fail):
        opened.append(Writer(tmp_path, resume_step, say=say))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close()


def row(step, **more):
    return {"step": step, "loss": 1 / step, **more}


def test_rows_are_on_disk_at_once(open_writer, tmp_path):
    """A row can be read by another handle as soon as `rows` returns, so a killed run loses none;
    floats come back exactly.
    """
    writer = open_writer()
    for step in (1, 2, 3):
        writer.rows(row(step))
        lines = (tmp_path / "metrics.jsonl").read_text()
        assert lines.endswith("\n")
        assert [json.loads(line) for line in lines.splitlines()] == [
            row(i) for i in range(1, step + 1)
        ]


def test_rows_that_belong_together_are_one_write(open_writer, tmp_path, monkeypatch):
    """Rows given together reach the file in one write, so a kill leaves all of them or none."""
    writer = open_writer()
    writes = []
    monkeypatch.setattr(
        writer,
        "_file",
        SimpleNamespace(
            write=writes.append, flush=lambda: writes.append("flush"), close=lambda: None
        ),
    )
    domains = [{"step": 3, "domain": name, "mIoU": 1.5} for name in ("clear", "night")]
    writer.rows(*domains)
    assert writes == ["".join(json.dumps(one) + "\n" for one in domains), "flush"]


@pytest.mark.parametrize("half", ["", '{"step": 5, "lo', '{"step": 5, "loss": 0.2}', "\n\n", "{"])
def test_resuming_drops_later_rows_and_a_half_line(open_writer, tmp_path, half):
    """Killed at step 5, gone on with from step 3: the file is byte for byte that of a run that
    never stopped.
    """
    writer = open_writer()
    rows = [row(1), row(2), row(3), {"step": 3, "domain": "night", "mIoU": 12.5}, row(4)]
    for one in rows:
        writer.rows(one)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(half)
    again = open_writer(3)
    assert read_metrics(tmp_path) == rows[:4]
    for one in (row(4), row(5)):
        again.rows(one)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(
        json.dumps(one) + "\n" for one in [*rows, row(5)]
    )
    assert not list(tmp_path.glob("*.partial"))


GARBAGE = (
    b"\0\0\0\0",
    b"\xff\xfe\xfa",
    b'{"step": 2, "lo',
    b"[2]",
    b'{"step": "2"}',
    b'{"loss": 1.0}',
    b'{"step": true}',
    b"7",
)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_broken_lines_are_named_and_dropped(open_writer, tmp_path, garbage):
    """Whatever a crash left in the middle or at the end: the lines are named, the file kept as it
    was, all other rows are there.
    """
    good = [json.dumps(row(step)).encode() for step in (1, 2, 3)]
    content = b"\n".join([good[0], garbage, *good[1:], garbage]) + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_metrics(tmp_path) == [row(1), row(2), row(3)]
    said = []
    open_writer(3, said.append).rows(row(4))
    assert said == [
        (
            f"{tmp_path}/metrics.jsonl: broken at line 2, 5; it is kept as metrics.jsonl.broken and"
            " goes on without these lines"
        ),
    ]
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == content
    assert read_metrics(tmp_path) == [row(1), row(2), row(3), row(4)]


@pytest.mark.parametrize("content", [b"", b"\0" * 300])
def test_an_emptied_file_begins_anew(open_writer, tmp_path, content):
    """A file that a crash left without length, or full of zeros, is no error."""
    (tmp_path / "metrics.jsonl").write_bytes(content)
    open_writer(5, lambda line: None).rows(row(6))
    assert read_metrics(tmp_path) == [row(6)]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("stream", "file"), [("_file", "metrics.jsonl"), ("_events", "tensorboard/events.out.tfevents")]
)
def test_a_disk_that_fills_is_one_line(open_writer, tmp_path, monkeypatch, stream, file):
    """The error of the row that did not fit names the file and what to do; closing does not wait
    for a thread that is gone.
    """
    writer = open_writer()
    writer.rows(row(1))
    target = writer if stream == "_file" else writer._events
    monkeypatch.setattr(target, "_file", SimpleNamespace(write=full, flush=full, close=full))
    with pytest.raises(
        OSError,
        match=(
            rf"^disk full: {tmp_path}/{file}\S* cannot be written .*what was saved before is whole;"
            r" free"
        ),
    ) as error:
        writer.rows(row(2))
    assert "\n" not in str(error.value)
    monkeypatch.undo()


@pytest.mark.parametrize(
    "name",
    ["a[1]", "a*", "q?", "back\\slash", "sp ace", "#%41", "quo'te\"", "unié", "-lead", "gs:"],
)
def test_any_folder_will_do(tmp_path, name):
    """Characters that mean something elsewhere mean nothing in a workdir's path: rows and events
    lie where they should.
    """
    folder = tmp_path / name
    folder.mkdir()
    writer = Writer(folder, 0)
    writer.rows(row(1))
    writer.close()
    assert read_metrics(folder) == [row(1)]
    assert events(folder / "tensorboard")[0] == {("training/loss", 1): 1.0}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_new_run_drops_what_an_unsaved_one_wrote(open_writer, tmp_path):
    """From step 0 nothing is kept: no checkpoint had been reached."""
    writer = open_writer()
    writer.rows(row(1))
    writer.close()
    open_writer(0)
    assert read_metrics(tmp_path) == []


def records(path):
    """The payloads of a TFRecord file: length, its checksum, payload, its checksum."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        yield data[at + 12 : at + 12 + length]
        at += 16 + length
    assert at == len(data)


def fields(message):
    """Fields of a protocol buffer as (number, value): varint, 8 bytes, 4 bytes or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        size = {0: 0, 1: 8, 5: 4}.get(tag & 7)
        if size == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if size is None else size
        yield tag >> 3, message[at : at + size]
        at += size


def events(folder):
    """Scalars {(tag, step): value}, images {(tag, step): (h, w)} and the steps from which earlier
    events are hidden.
    """
    scalars = {}
    images = {}
    purged = []
    for path in sorted(folder.iterdir()):
        for record in records(path):
            event = dict(fields(record))  # 2: step, 5: summary, 7: session log
            if 7 in event:
                assert dict(fields(event[7]))[1] == 1  # START
                purged.append(event.get(2, 0))
            for _, value in fields(event.get(5, b"")):
                value = dict(fields(value))  # 1: tag, 2: simple value, 4: image
                key = value[1].decode(), event.get(2, 0)
                if 2 in value:
                    (scalars[key],) = struct.unpack("<f", value[2])
                if 4 in value:
                    image = dict(fields(value[4]))
                    images[key] = image[1], image[2]
    return scalars, images, purged


def test_tensorboard_holds_the_same_numbers(open_writer, tmp_path):
    """Read back by a parser written here from the format: scalars by group, a picture, and where a
    resumed run starts.
    """
    writer = open_writer()
    writer.rows(row(1, note="text is no scalar"))
    writer.rows({"step": 4, "domain": "night", "mIoU": 12.5})
    writer.picture("night/0", np.zeros((6, 9, 3), np.uint8), 4)
    names = ("a b", "a_b", "[red] 50 %, é", "/abs")  # as they are: two must not become one
    for i, name in enumerate(names):
        writer.rows({"step": 5, "domain": name, "mIoU": i + 0.5})
        writer.picture(f"{name}/0", np.zeros((6, 9, 3), np.uint8), 5)
    writer.close()
    scalars, images, _ = events(tmp_path / "tensorboard")
    for i, name in enumerate(names):
        assert scalars.pop((f"evaluation/{name}/mIoU", 5)) == i + 0.5
        assert images.pop((f"{name}/0", 5)) == (6, 9)
    assert scalars == {("training/loss", 1): 1.0, ("evaluation/night/mIoU", 4): 12.5}
    assert images == {("night/0", 4): (6, 9)}
    again = open_writer(2)
    again.rows(row(3))
    again.close()
    scalars, _, purged = events(tmp_path / "tensorboard")
    assert scalars["training/loss", 3] == pytest.approx(1 / 3)
    assert purged[-1] == 3  # step 2 was kept, what came after it is hidden

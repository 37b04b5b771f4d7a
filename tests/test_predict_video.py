"""`predict` on video files, cameras and streams: what is written, where it ends, and that it holds
few frames at a time.
"""

import http.server
import itertools
import os
from pathlib import Path
import re
import signal
import threading
import time

import cv2
import numpy as np
from PIL import Image
import pytest

from jaxdg import predict
from jaxdg.commands.threads import Behind, read_ahead
from jaxdg.data import video
from jaxdg.data.labels import CITYSCAPES
from jaxdg.drawing.films import Film
from jaxdg.drawing.overlays import draw_boxes, tint
from tests import stand_in
from tests.stand_in import classes_of

FRAMES = 20
SIZE = (34, 48)


def film(path: Path, count: int = FRAMES, codec: str = "MJPG", rate: float = 10) -> Path:
    """A film of a bright bar that moves over a grey wall."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fourcc = cv2.VideoWriter.fourcc(*codec)
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, fourcc, rate, SIZE[::-1])
    assert writer.isOpened()
    for i in range(count):
        frame = np.full((*SIZE, 3), 75, np.uint8)
        frame[8:24, 2 * (i % 16) : 2 * (i % 16) + 12] = 165
        writer.write(frame)
    writer.release()
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    """All frames of a file, RGB."""
    return [frame.image for frame in video.Video(str(path)).frames()]


def cut(path: Path, share: float) -> Path:
    """The first bytes of a file, beside it."""
    short = path.with_name(f"cut_{path.name}")
    short.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return short


@pytest.fixture
def run(monkeypatch):
    """The command with a stand-in for the model; signals are handled as before in the end."""
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {kind: signal.getsignal(kind) for kind in kinds}
    yield stand_in.command(monkeypatch, "segmentation")
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


def checked_film(path: Path, source: list[np.ndarray], rate: float) -> None:
    """A film of overlays shows every frame tinted, above a legend that never changes."""
    opened = video.Video(str(path))
    assert opened.rate == pytest.approx(rate, rel=1e-3)
    shown = [frame.image for frame in opened.frames()]
    assert len(shown) == len(source)
    h, w = source[0].shape[:2]
    left = (shown[0].shape[1] - w) // 2
    for picture, frame in zip(shown, source, strict=True):
        tinted = tint(frame, classes_of(frame), CITYSCAPES.colors)
        got = picture[:h, left : left + w].astype(float)
        assert np.median(np.abs(got - tinted)) < 8  # the codec loses something
        assert np.abs(picture[h:].astype(float) - shown[0][h:]).max() < 40
        assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
        assert picture.shape[0] > h + 20


@pytest.mark.parametrize("codec", ["avi MJPG", "mp4 mp4v", "mkv FFV1", "webm VP80", "mov mp4v"])
def test_a_video_gives_a_film_of_overlays(run, tmp_path, capsys, codec):
    """Every frame once, at the video's rate; what the command says is what the frames hold."""
    ending, kind = codec.split()
    source = frames_of(film(tmp_path / f"drive.{ending}", codec=kind))
    run(tmp_path / "out", tmp_path / f"drive.{ending}")
    checked_film(tmp_path / "out/drive_overlay.mp4", source, 10)
    labels = [classes_of(frame) for frame in source]
    changed = 100 * np.mean([a != b for a, b in itertools.pairwise(labels)])
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path}/out/drive_overlay.mp4  {FRAMES} frames, ")
    assert f"; {changed:.1f} % of pixels change class from one frame to the next; " in line
    assert 3 < changed < 30
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "drive_overlay.mp4",
        ".jaxdg_predictions.json",
    }


@pytest.mark.parametrize("batch_size", [1, 8])
def test_label_maps_and_scores_of_every_frame(run, tmp_path, batch_size):
    """They are what an image gives; a second run replaces those of a longer video, and nobody
    else's; what was written is no input.
    """
    path = film(tmp_path / "in/drive.avi")
    source = frames_of(path)
    out = tmp_path / "out"
    run(out, path, _BATCH_SIZE=batch_size, _LABEL_MAPS=True, _SCORES=True)
    for i, frame in enumerate(source):
        label = np.asarray(Image.open(out / f"drive/{i:06d}.png"))
        np.testing.assert_array_equal(label, classes_of(frame))
        with np.load(out / f"drive/{i:06d}_scores.npz") as stored:
            np.testing.assert_array_equal(stored["scores"].argmax(-1), label)
    film(path, 7)
    run(out, path, _BATCH_SIZE=batch_size, _LABEL_MAPS=True)
    assert sorted(p.name for p in (out / "drive").iterdir()) == [f"{i:06d}.png" for i in range(7)]
    assert len(frames_of(out / "drive_overlay.mp4")) == 7
    with pytest.raises(ValueError, match="no image is left to predict"):
        run(out, out / "drive_overlay.mp4")
    (out / "drive/000003.png").write_bytes(b"corrected")
    with pytest.raises(ValueError, match=r"drive/000003\.png is there and is not what predict"):
        run(out, path, _LABEL_MAPS=True)
    with pytest.raises(ValueError, match="folder of the video"):
        run(path.parent, path)


def test_boxes_are_drawn_and_written(tmp_path, monkeypatch, run):
    """Detection frames its boxes in every frame and writes them as an image's."""
    detect = stand_in.command(monkeypatch, "detection")
    path = film(tmp_path / "drive.avi", 3)
    detect(tmp_path / "out", path, _LABEL_MAPS=True)
    boxes = np.array([[1, 1, 5, 5]], np.float32), np.array([7], np.int32)
    looks = CITYSCAPES.colors, CITYSCAPES.names
    scores = np.array([0.9], np.float32)
    for before, frame in zip(
        frames_of(path), frames_of(tmp_path / "out/drive_overlay.mp4"), strict=True
    ):
        left = (frame.shape[1] - SIZE[1]) // 2
        got = frame[: SIZE[0], left : left + SIZE[1]].astype(float)
        drawn = draw_boxes(before, *boxes, *looks, scores)
        near = np.s_[:6, :6]  # the box
        assert np.abs(got - drawn)[near].mean() < 0.6 * np.abs(got - before)[near].mean()
    names = sorted(p.name for p in (tmp_path / "out/drive").iterdir())
    assert names == ["000000.json", "000001.json", "000002.json"]
    assert '"category_id": 8' in (tmp_path / "out/drive/000000.json").read_text()


def test_a_truncated_video_ends_with_what_was_read(run, tmp_path, capfd):
    """One line says how many frames of how many there were; a file without its index, an empty one
    and one that is no video are named. FFmpeg says nothing between.
    """
    short = cut(film(tmp_path / "drive.avi"), 0.6)
    kept = len(frames_of(short))
    assert 0 < kept < FRAMES
    target = tmp_path / "out/cut_drive_overlay.mp4"
    with pytest.raises(
        ValueError,
        match=rf"^{short}: cut short or damaged, {kept} of the {FRAMES} frames that its header"
        rf" states could be read; {target} holds these$",
    ):
        run(tmp_path / "out", short)
    assert len(frames_of(target)) == kept
    lost = cut(film(tmp_path / "drive.mp4", codec="mp4v"), 0.6)
    with pytest.raises(ValueError, match="cannot be read as a video; an mp4 or mov file that was"):
        run(tmp_path / "out", lost)
    (tmp_path / "empty.mkv").touch()
    whole = film(tmp_path / "whole.avi", 3)
    with pytest.raises(ValueError, match="3 of 4 images and videos could not be predicted and are"):
        run(tmp_path / "all", short, tmp_path / "empty.mkv", whole, lost)
    said = capfd.readouterr().err
    assert [line.split(": ")[:2] for line in said.splitlines()] == [
        ["failed", str(path)] for path in (short, tmp_path / "empty.mkv", lost)
    ]
    assert len(frames_of(tmp_path / "all/whole_overlay.mp4")) == 3


def test_an_interrupt_keeps_what_was_written(run, tmp_path, monkeypatch):
    """Ctrl-C ends a video after the frames in work; the film can be played, and one line says how
    far it came.
    """
    path = film(tmp_path / "drive.avi", 200)
    original = stand_in.Stand.start

    def start(self, *arguments, **options):
        if len(self.batches) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(stand_in.Stand, "start", start)
    with pytest.raises(ValueError, match=r"avi: stopped after 10 of 200 frames; .* holds these"):
        run(tmp_path / "out", path)
    assert len(frames_of(tmp_path / "out/drive_overlay.mp4")) == 10


class Camera:
    """In place of OpenCV's capture: a camera at 50 frames a second, or one that is not there."""

    def __init__(self, source):
        self.source = source
        self.begun = time.monotonic()
        self.count = 0

    def isOpened(self):
        return self.source in (0, "rtsp://user:secret@host/street")

    def get(self, what):
        return {cv2.CAP_PROP_FPS: 50.0}.get(what, -1.0)

    def read(self):
        self.count += 1
        time.sleep(max(0, self.begun + self.count / 50 - time.monotonic()))
        return True, np.full((*SIZE, 3), 75, np.uint8)

    def release(self):
        pass


def test_a_camera_is_read_until_the_interrupt(run, tmp_path, monkeypatch, capsys):
    """A model slower than the camera gets the newest frame; the film keeps the pace of the clock.
    Neither files nor messages name a password.
    """
    open_file = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    original = stand_in.Stand.start

    def start(self, *arguments, **options):
        time.sleep(0.1)
        if len(self.batches) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(stand_in.Stand, "start", start)
    for source, name in (("camera:0", "camera_0"), ("rtsp://user:secret@host/street", None)):
        name = name or "host_street"
        run(tmp_path / "out", source)
        assert f"{name}_overlay.mp4  8 frames, " in capsys.readouterr().out
        capture = open_file(str(tmp_path / f"out/{name}_overlay.mp4"))
        assert capture.get(cv2.CAP_PROP_FPS) == 50
        assert 20 < capture.get(cv2.CAP_PROP_FRAME_COUNT) < 100  # 0.7 seconds at least
        capture.release()
    with pytest.raises(ValueError, match=r"^camera:3: cannot be opened; is it there, and does"):
        run(tmp_path / "out", "camera:3")
    with pytest.raises(ValueError, match=r"^rtsp://host/other: cannot be opened") as error:
        run(tmp_path / "out", "rtsp://user:secret@host/other")
    assert "secret" not in str(error.value)


class Pictures(http.server.BaseHTTPRequestHandler):
    """A network camera's page: one JPEG after another."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for i in range(40):
            picture = cv2.imencode(".jpg", np.full((*SIZE, 3), 2 * i, np.uint8))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            self.wfile.write(head.encode() + picture + b"\r\n")
            time.sleep(0.01)

    def log_message(self, format, *args):
        pass


def test_a_stream_over_http_ends_when_it_ends(run, tmp_path, capsys):
    """What a network camera sends until it stops is no error, though no length is known."""
    with http.server.HTTPServer(("127.0.0.1", 0), Pictures) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        run(tmp_path / "out", f"http://me:secret@127.0.0.1:{server.server_port}/cam")
        thread.join()
        name = f"127.0.0.1_{server.server_port}_cam_overlay.mp4"
    assert re.search(rf"{name}  \d+ frames, ", capsys.readouterr().out)
    assert len(frames_of(tmp_path / "out" / name)) >= 1


def test_films_of_a_real_drive(run, tmp_path, data_path):
    """CamVid's frames, which are a film: the label maps are those of the decoded frames."""
    images = sorted(data_path("camvid").glob("test/0001TP_*"))[:6]
    pictures = [cv2.resize(cv2.imread(str(image)), (240, 180)) for image in images]
    path = tmp_path / "camvid.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (240, 180))
    for picture in pictures:
        writer.write(picture)
    writer.release()
    source = frames_of(path)
    assert np.abs(np.array(source)[..., ::-1].astype(int) - np.array(pictures)).mean() < 8
    run(tmp_path / "out", path, _LABEL_MAPS=True, _BATCH_SIZE=4)
    for i, frame in enumerate(source):
        label = np.asarray(Image.open(tmp_path / f"out/camvid/{i:06d}.png"))
        np.testing.assert_array_equal(label, classes_of(frame))
    checked_film(tmp_path / "out/camvid_overlay.mp4", source, 30)


def test_videos_in_folders_are_named(tmp_path):
    """Only a video that is named itself is predicted, as it may be long."""
    film(tmp_path / "drive.avi", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    said = []
    assert [file.name for file, _ in predict.find_images([str(tmp_path)], said.append)] == ["a.png"]
    assert said == [
        f"passed over, as a video is predicted only if it is named itself: {tmp_path}/drive.avi"
    ]


def test_a_frame_of_another_size_is_an_error(tmp_path):
    """A film has one size; numbers left out repeat the picture, old ones are dropped."""
    picture = np.full((*SIZE, 3), 90, np.uint8)
    labels = CITYSCAPES
    with Film(tmp_path / "a.mp4", 10.0, labels.colors, labels.names) as made:
        for number in (0, 3, 3, 4):
            made.write(picture, number)
        assert made.written == 5
        with pytest.raises(ValueError, match="frame 5 is 34x48 pixels, the first was 48x34"):
            made.write(picture.swapaxes(0, 1), 5)
    assert len(frames_of(tmp_path / "a.mp4")) == 5


def test_reading_ahead_is_bounded_and_ends():
    """At most so many items wait, in order; errors come after what was before them; the source is
    closed by its thread, also when the caller leaves early.
    """
    taken, closed = [], []

    def source(fails=False):
        try:
            for i in range(30):
                taken.append(i)
                yield i
            if fails:
                raise OSError("broken")
        finally:
            closed.append(threading.current_thread())

    for expected, got in enumerate(read_ahead(source(), 3)):
        assert got == expected
        assert len(taken) <= got + 6  # 3 wait, one is offered, one is in hand, one is counted
    assert expected == 29
    with pytest.raises(OSError, match="broken"):
        for _ in read_ahead(source(fails=True), 3):
            pass
    taken.clear()
    reader = read_ahead(source(), 3)
    assert next(reader) == 0
    reader.close()
    assert len(taken) < 30
    assert list(read_ahead(source(), 3, stop=lambda: True)) == []
    assert len(closed) == 4
    assert threading.main_thread() not in closed


def test_the_newest_item_waits():
    """With `newest` a slow caller gets late items, and none twice."""

    def source():
        for i in range(20):
            time.sleep(0.01)
            yield i

    got = []
    for i in read_ahead(source(), 1, newest=True):
        got.append(i)
        time.sleep(0.05)
    assert got == sorted(set(got))
    assert len(got) < 12
    assert got[-1] == 19


def test_work_behind_is_bounded_and_in_order():
    """So many calls wait; the error of one is raised once, and ends the rest."""
    done = []
    gate = threading.Event()

    def call(i):
        gate.wait(5)
        done.append(i)

    with Behind(2) as behind:
        behind(call, 0)
        behind(call, 1)
        assert not done
        threading.Timer(0.05, gate.set).start()
        behind(call, 2)
        assert done[0] == 0
    assert done == [0, 1, 2]
    with pytest.raises(ZeroDivisionError), Behind(2) as behind:
        behind(lambda: 1 / 0)

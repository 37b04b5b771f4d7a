"""What `predict` takes for images, how it names what it writes, and what it never replaces."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from jaxdg import predict
from jaxdg.commands import outputs
from tests import stand_in


def picture(file: Path, shade: int = 90) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade, shade, shade)).save(file)
    return file


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["segmentation", "detection"])
def command(request, monkeypatch):
    """The command with a stand-in for the model, for both tasks; and the extension of what it
    writes.
    """
    end = {"segmentation": ".png", "detection": ".json"}[request.param]
    return stand_in.command(monkeypatch, request.param), end


def test_a_folder_is_predicted_twice_alike(command, tmp_path):
    """Label maps or boxes and overlays below --out; a second run replaces its own and takes no
    output for an image.
    """
    run, end = command
    for i, name in enumerate(("a.png", "day/b.JPG", "day/c.tif")):
        picture(tmp_path / "images" / name, 30 * i)
    inputs = bytes_below(tmp_path / "images")
    run(tmp_path / "out", tmp_path / "images")
    first = bytes_below(tmp_path / "out")
    assert {name for name in first if name != outputs.NAME} == {
        f"{name}{suffix}" for name in ("a", "day/b", "day/c") for suffix in (end, "_overlay.jpg")
    }
    run(tmp_path / "out", tmp_path / "images")
    assert bytes_below(tmp_path / "out") == first
    assert bytes_below(tmp_path / "images") == inputs
    if end == ".png":
        assert (np.asarray(Image.open(tmp_path / "out/day/c.png")) == 6).all()


def test_the_folder_of_the_images_is_refused_as_out(command, tmp_path):
    """As it is, through a link, below a link, and for a single image; before the model is looked
    at, and nothing changes.
    """
    run, _ = command
    images = tmp_path / "images"
    for name in ("a.png", "sub/b.jpg"):
        picture(images / name)
    (tmp_path / "link").symlink_to(images)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(images / "sub")
    before = bytes_below(tmp_path)
    for out in (images, images / "../images", tmp_path / "link", tmp_path / "out"):
        with pytest.raises(
            ValueError,
            match=(
                r"--out would put predictions into .*, the folder of the image .*; give another"
                r" folder"
            ),
        ):
            run(out, images)
    with pytest.raises(ValueError, match=r"the folder of the image .*/a\.png"):
        run(images, images / "a.png")
    assert bytes_below(tmp_path) == before


@pytest.mark.parametrize("kind", ["foreign", "corrected", "folder", "link"])
def test_files_of_others_are_never_replaced(command, tmp_path, kind):
    """A file of the user's, a prediction that was corrected by hand, a folder, a link to a
    photograph: named before anything is done.
    """
    run, end = command
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png")
    out = tmp_path / "out"
    target = tmp_path / f"out/b{end}"
    out.mkdir()
    if kind == "corrected":
        run(out, tmp_path / "images")
        target.write_bytes(b"corrected")
    elif kind == "folder":
        target.mkdir()
    elif kind == "link":
        target.symlink_to(picture(tmp_path / "photo.png"))
    else:
        target.write_bytes(b"mine")
    before = bytes_below(tmp_path)
    with pytest.raises(
        ValueError,
        match=(
            rf"/out/b\{end} is there and is not what predict wrote there .*; give another --out, or"
            r" move"
        ),
    ):
        run(out, tmp_path / "images")
    assert bytes_below(tmp_path) == before


def test_what_predict_wrote_is_no_image(command, tmp_path, capsys):
    """A folder of outputs among the images, its files given by name, a folder in it: passed over
    and said.
    """
    run, _ = command
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/day/b.png")
    out = tmp_path / "images/predicted"
    for _ in range(2):
        run(out, tmp_path / "images")
    written = bytes_below(out)
    assert len(written) == 5
    assert f"passed over, as predict wrote them: {out}/" in capsys.readouterr().err
    assert bytes_below(out) == written
    said = []
    assert [
        file.name
        for file, _ in predict.find_images(
            map(str, (*out.glob("*.jpg"), tmp_path / "images/a.png")), said.append
        )
    ] == ["a.png"]
    for path in (out, out / "day", out / "a_overlay.jpg"):
        with pytest.raises(ValueError, match="no image is left to predict"):
            predict.find_images([str(path)])


def test_a_broken_image_does_not_end_the_rest(command, tmp_path, capsys):
    """It is named, the others are predicted, and the error at the end counts."""
    run, end = command
    for name in ("a.png", "c.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "images/b.png").write_bytes((tmp_path / "images/a.png").read_bytes()[:-20])
    (tmp_path / "images/d.jpg").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"2 of 4 images could not be predicted and are named above; the others are in .*/out",
    ):
        run(tmp_path / "out", tmp_path / "images")
    said = capsys.readouterr().err
    assert f"failed: {tmp_path}/images/b.png: " in said
    assert f"failed: {tmp_path}/images/d.jpg: empty (0 bytes)\n" in said
    assert "data.skip" not in said
    assert {path.name for path in (tmp_path / "out").glob(f"*{end}")} == {
        f"a{end}",
        f"c{end}",
        *([outputs.NAME] if end == ".json" else []),
    }


def test_hidden_files_and_other_types_are_passed_over_and_said(tmp_path):
    """Hidden ones are counted, files of other types named, up to five; a folder without images is
    an error.
    """
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "@eaDir/a.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "images/loop").symlink_to(".")
    for i in range(7):
        (tmp_path / f"images/{i}.heic").touch()
    said: list[str] = []
    assert predict.find_images([str(tmp_path / "images")], said.append) == [
        (tmp_path / "images/a.png", Path("a"))
    ]
    assert said[0].startswith(f"3 hidden or system entries skipped, such as {tmp_path}/images/")
    assert said[1].startswith("1 link skipped")
    named = ", ".join(f"{tmp_path}/images/{i}.heic" for i in range(5))
    assert said[2:] == [f"passed over, as their types are not read: {named}, .. (7 files)"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"/empty holds no images \(\.png"):
        predict.find_images([str(tmp_path / "images"), str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        predict.find_images(["nowhere"])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["f"], {"f/a.png": "a_png", "f/a.jpg": "a_jpg", "f/b.png": "b"}),
        (["x/a.png", "y/a.png", "x/b.png"], {"x/a.png": "x/a", "y/a.png": "y/a", "x/b.png": "b"}),
        (
            ["x", "y"],
            {
                "x/a.png": "x/a",
                "x/b.png": "x/b",
                "x/c.png": "c",
                "y/a.png": "y/a",
                "y/b.png": "y/b",
            },
        ),
        (
            ["x/a.png", "y/a.png", "y/a.jpg"],
            {"x/a.png": "x/a_png", "y/a.png": "y/a_png", "y/a.jpg": "y/a_jpg"},
        ),
        (["p/s/a.png", "q/s/a.png"], {"p/s/a.png": "p/s/a", "q/s/a.png": "q/s/a"}),
        (["g"], {"g/a.png": "g/a_png", "g/a.jpg": "g/a_jpg", "g/a_png.png": "a_png"}),
        (
            ["h"],
            {
                "h/a.png": "a",
                "h/a_overlay.png": "a_overlay",
                "h/a_overlay_overlay.jpg": "a_overlay_overlay",
            },
        ),
        (["x", "x/a.png", "./x/../x/b.png"], {"x/a.png": "a", "x/b.png": "b", "x/c.png": "c"}),
        (["s/d.a.png", "s/d.b.png"], {"s/d.a.png": "d.a", "s/d.b.png": "d.b"}),
    ],
)
def test_names_are_distinct_and_stay_where_no_two_meet(tmp_path, monkeypatch, given, names):
    """Extensions or folders part images of one name; no two write one file, whatever the task; the
    same image twice is one.
    """
    monkeypatch.chdir(tmp_path)
    for file in {*names, "x/a.png", "x/b.png", "x/c.png", "y/a.png", "y/b.png"}:
        picture(Path(file))
    found = predict.find_images(given)
    assert {os.path.normpath(file): str(name) for file, name in found} == names
    for end in (".png", ".json"):
        targets = [f"{name}{suffix}" for _, name in found for suffix in (end, "_overlay.jpg")]
        assert len(set(targets)) == len(targets)
    assert predict.find_images(given) == found


def test_a_killed_run_leaves_no_half_file(tmp_path, monkeypatch):
    """What it noted and did not write is no hindrance to the next; nor is a line of the notes that
    was cut.
    """
    out = outputs.Outputs(tmp_path / "out")
    out.write(tmp_path / "out/a.png", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        for name in ("a.png", "b.png"):
            with pytest.raises(KeyboardInterrupt):
                out.write(tmp_path / "out" / name, b"second")
    assert bytes_below(tmp_path / "out").keys() == {"a.png", outputs.NAME}
    with open(tmp_path / "out" / outputs.NAME, "a") as notes:
        notes.write('{"file": "c.p')
    again = outputs.Outputs(tmp_path / "out")
    assert again.may_write(tmp_path / "out/a.png")
    assert again.may_write(tmp_path / "out/b.png")
    again.write(tmp_path / "out/a.png", b"third")
    assert outputs.Outputs(tmp_path / "out").may_write(tmp_path / "out/a.png")
    assert (tmp_path / "out/a.png").read_bytes() == b"third"
    (tmp_path / "out/a.png").write_bytes(b"other")
    assert not outputs.Outputs(tmp_path / "out").may_write(tmp_path / "out/a.png")
    lines = (tmp_path / "out" / outputs.NAME).read_text().split("\n")
    assert json.loads(lines[1]).keys() == {"file", "sha256"}


def test_pictures_are_upright_and_read_by_their_content(command, tmp_path, capsys):
    """A photo that asks to be turned is predicted and drawn as viewers show it; what cannot be
    meant is named.
    """
    run, suffix = command
    pixels = np.repeat(np.repeat(np.arange(3, dtype=np.uint8)[:, None] * 60, 16, 0), 64, 1)[
        ..., None
    ].repeat(3, 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = tmp_path / "photos" / "photo.jpg"
    photo.parent.mkdir()
    Image.fromarray(pixels).save(photo, "PNG", exif=exif)
    photo.write_bytes(photo.read_bytes() + b"\0\0\0\x18ftypmp42" + bytes(5000))
    deep = tmp_path / "photos" / "deep.png"
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(deep)
    with pytest.raises(ValueError, match="1 of 2 images could not be predicted"):
        run(tmp_path / "out", tmp_path / "photos")
    assert (
        f"failed: {deep}: a 16-bit image of which no value uses more than 12 bits"
        in capsys.readouterr().err
    )
    with Image.open(tmp_path / "out" / "photo_overlay.jpg") as overlay:
        assert overlay.height > overlay.width  # the stored pixels are wider than high
    if suffix == ".png":
        ids = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
        np.testing.assert_array_equal(ids, np.rot90(pixels[..., 0], -1) // 10 % 19)


def test_batches_are_of_neighbours_of_one_size_and_change_nothing(tmp_path, monkeypatch, capsys):
    """Files of any --batch_size are the same bytes and lines in one order; a batch that is not full
    is filled up, so that all have one shape.
    """
    run = stand_in.command(monkeypatch, "segmentation")
    sizes = [(12, 8), (16, 16), (9, 9), (16, 8), (40, 8), (40, 8), (12, 8)]
    for i, (w, h) in enumerate(sizes):
        path = tmp_path / f"images/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (w, h), (30 * i, 0, 0)).save(path)
    (tmp_path / "images/2b.png").write_bytes(b"broken")
    written, lines = [], []
    for batch_size in (1, 3):
        out = tmp_path / f"out{batch_size}"
        with pytest.raises(ValueError, match="1 of 8 images could not be predicted"):
            run(out, tmp_path / "images", _BATCH_SIZE=batch_size)
        lines.append(capsys.readouterr().out.replace(str(out), ""))
        written.append(bytes_below(out))
    assert written[0] == written[1]
    assert lines[0] == lines[1]
    assert lines[0].count("\n") == 7
    (tmp_path / "images/2b.png").unlink()
    stand = run(tmp_path / "again", tmp_path / "images", _BATCH_SIZE=3)
    assert stand.batches == [
        [(8, 12), (16, 16), (9, 9)],
        [(8, 16)] * 3,
        [(8, 40)] * 3,
        [(8, 12)] * 3,
    ]


def test_scores_are_written_beside_the_label_map(tmp_path, monkeypatch):
    """Probabilities in float16 with the classes' names, and the highest in 0..255; detection has
    none; two inputs that would share a file are named before anything is written.
    """
    run = stand_in.command(monkeypatch, "segmentation")
    picture(tmp_path / "a.png", 70)
    run(tmp_path / "out", tmp_path / "a.png", _SCORES=True)
    with np.load(tmp_path / "out/a_scores.npz") as stored:
        assert stored["scores"].dtype == np.float16
        assert stored["scores"].shape == (8, 12, 19)
        np.testing.assert_allclose(stored["scores"].sum(-1, dtype=np.float64), 1, atol=2e-3)
        np.testing.assert_array_equal(stored["scores"].argmax(-1), 7)
        assert list(stored["classes"]) == list(stand_in.CITYSCAPES.names)
    confidence = np.asarray(Image.open(tmp_path / "out/a_confidence.png"))
    assert confidence.dtype == np.uint8
    np.testing.assert_array_equal(confidence, 140)  # 0.55 * 255 = 140.25
    picture(tmp_path / "a_confidence.png")
    both = tmp_path / "a.png", tmp_path / "a_confidence.png"
    with pytest.raises(ValueError, match=r"two of what .* written to .*/new/a_confidence\.png"):
        run(tmp_path / "new", *both, _SCORES=True)
    assert not (tmp_path / "new").exists()
    run(tmp_path / "new", *both)
    detect = stand_in.command(monkeypatch, "detection")
    with pytest.raises(ValueError, match="--scores is of segmentation; the model in run detects"):
        detect(tmp_path / "boxes", tmp_path / "a.png", _SCORES=True)

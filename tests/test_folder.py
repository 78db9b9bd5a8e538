"""A user's own pictures: what is read, what is skipped and why, and the teacher that is trained on them."""

import csv
import json
import os

import numpy
import pytest
import torch
from PIL import Image

from sds3d.data import folder
from sds3d.networks.unet import UNetConfig
from sds3d.students.image import ImageConfig, ImageStudent
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.drawing import sample
from sds3d.teachers.load import load_teacher
from sds3d.teachers.training import fit, sources
from sds3d.teachers.training.settings import FitConfig

LONGEST = 18
RED, BLUE = (200, 20, 30), (10, 40, 220)


def picture(path, colour=RED, size=(40, 30), mode="RGB", caption=None, **saved):
    """Write an image of one colour, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **saved)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def read(path, size=8):
    return folder.read(path, size, LONGEST)


def colours(found: folder.Folder) -> list[tuple[int, ...]]:
    """The colour in the middle of each image."""
    side = found.pictures.size // 2
    return [tuple(image[:, side, side].tolist()) for image in found.pictures.images]


def test_a_txt_beside_each_image_holds_its_captions_one_a_line(tmp_path):
    picture(tmp_path / "a.png", RED, caption="a red wall\n\n  the wall, red  \n...\n")
    picture(tmp_path / "deeper" / "still" / "b.JPEG", BLUE, caption="\ufeffa blue wall", quality=95)
    found = read(tmp_path)
    assert found.pictures.captions == [("a red wall", "the wall, red"), ("a blue wall",)]
    assert found.skipped == [] and found.pictures.images.shape == (2, 3, 8, 8)
    assert found.pictures.vocabulary() == ("a", "blue", "red", "the", "wall")
    assert colours(found)[0] == RED
    assert max(abs(a - b) for a, b in zip(colours(found)[1], BLUE)) <= 4  # JPEG is not exact


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_names_files_and_captions(tmp_path, kind):
    for name in ("a.png", "in/b.png", "c.png"):
        picture(tmp_path / name, caption="the table wins" if name == "a.png" else None)
    rows = [("a.png", "a wall"), ("./in/b.png", 'say "two", or\nmore'), ("a.png", "one more"), ("gone.png", "nothing")]
    rows += [("c.png", "")]
    with (tmp_path / f"captions.{kind}").open("w", encoding="utf-8-sig", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("file", "caption"), *rows])
        else:
            file.writelines(json.dumps({"file": name, "caption": text}) + "\n\n" for name, text in rows)
    found = read(tmp_path)
    assert found.pictures.captions == [("a wall", "one more"), ('say "two", or\nmore',)]
    assert found.skipped == [
        f"captions.{kind}, {'row 5' if kind == 'csv' else 'line 9'}: it needs file and caption",
        "c.png: no caption",
        "gone.png: it has a caption, and the file is missing",
    ]


def table(path, rows):
    """Write a table, as its name ends: the first row names the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows(rows)
        else:
            file.writelines(json.dumps(dict(zip(rows[0], row))) + "\n" for row in rows[1:])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("columns", [("file_name", "text"), ("File", "Caption"), ("FILENAME", " Text ")])
def test_folders_as_libraries_of_datasets_lay_them_out(tmp_path, kind, columns):
    """A table named metadata, in a folder of each split, whose names count from there."""
    for name in ("train/a.png", "train/images/b.png", "test/a.png", "test/c.png"):
        picture(tmp_path / name)
    table(tmp_path / "train" / f"metadata.{kind}", [columns, ("a.png", "digit 3"), ("images\\b.png", "digit 7")])
    table(tmp_path / "test" / f"Metadata.{kind}", [columns, ("./a.png", "красная 4"), ("..\\test\\c.png", "红色")])
    found = read(tmp_path)
    assert found.skipped == []
    assert found.pictures.captions == [("красная 4",), ("红色",), ("digit 3",), ("digit 7",)]
    assert found.pictures.vocabulary() == ("3", "4", "7", "digit", "красная", "红", "色")


def test_a_name_in_a_table_is_the_file_that_it_means(tmp_path):
    picture(tmp_path / "odd\\name.png")
    picture(tmp_path / "caf\xe9.png")  # composed, where a Mac writes it in two characters
    table(tmp_path / "captions.csv", [("file", "caption"), ("odd\\name.png", "a"), ("cafe\u0301.png", "b")])
    found = read(tmp_path)
    assert found.skipped == [] and found.pictures.captions == [("b",), ("a",)]


def test_rows_that_cannot_be_used_say_why(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("file,caption\na.png,a wall, red\na.png,a wall\n")
    rows = [{"file": "a.png", "caption": ["one", "two"]}, {"file": "a.png", "caption": {"x": 1}}, {"caption": "c"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "metadata.csv").write_text("id,label\n1,2\n")  # about something else
    found = read(tmp_path)
    assert found.pictures.captions == [("a wall", "one", "two")]
    *others, last = found.skipped
    assert others == [
        "captions.csv, row 1: more values than the header has names; put a caption with commas in quotes",
        "captions.jsonl, line 2: it needs file and caption",
        "captions.jsonl, line 3: it needs file and caption",
    ]
    assert last.startswith("metadata.csv: cannot read") and "its header is 'id,label'" in last


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_bad_line_of_a_table_costs_no_other(tmp_path, name):
    picture(tmp_path / "a.png")
    good = json.dumps({"file": "a.png", "caption": "a\u2028wall"}, ensure_ascii=False)
    far = json.dumps({"file": "x" * 5000, "caption": "nowhere"})
    lines = [good, "[1]", "", '"text"', '{"file": ', "[" * 200 + "]" * 200, "[" * 10**5, good, far]
    (tmp_path / name).write_text("\r\n".join(lines), encoding="utf-8", newline="")
    found = read(tmp_path)
    assert found.pictures.captions == [("a\u2028wall", "a\u2028wall")]
    assert found.skipped == [
        f"{name}, line 2: it must be an object with file and caption",
        f"{name}, line 4: it must be an object with file and caption",
        f"{name}, line 5: it is no JSON (Expecting value, column 10)",
        f"{name}, line 6: it is nested too deeply",
        f"{name}, line 7: it is nested too deeply",
        f"{'x' * 5000}: it has a caption, and the file is missing",
    ]


def test_what_is_no_regular_file_is_listed(tmp_path):
    whole = picture(tmp_path / "whole.png", caption="a wall")
    for name in ("pipe.png", "told.txt", "metadata.csv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "gone.png").symlink_to("nowhere")
    whole.with_name("told.png").write_bytes(whole.read_bytes())
    for name in ("pipe", "gone"):
        (tmp_path / name).with_suffix(".txt").write_text("a wall")
    (tmp_path / "folder.png").mkdir()
    found = read(tmp_path)
    assert found.pictures.captions == [("a wall",)]
    assert found.skipped == [
        f"metadata.csv: cannot read {tmp_path / 'metadata.csv'}: it is no regular file",
        "gone.png: there is no such file",
        "pipe.png: it is no regular file",
        f"told.png: cannot read {tmp_path / 'told.txt'}: it is no regular file",
    ]
    os.mkfifo(tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match="cannot read .*captions.jsonl: it is no regular file"):
        read(tmp_path)


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    whole = picture(tmp_path / "whole.png", caption="a wall").read_bytes()
    for name, data in (("cut.png", whole[: len(whole) // 2]), ("empty.png", b""), ("text.jpg", b"no image")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text("a wall")
    picture(tmp_path / "bare.png")
    picture(tmp_path / "points.png", caption="... !")
    picture(tmp_path / "latin.png").with_suffix(".txt").write_bytes("für".encode("latin-1"))
    picture(tmp_path / "long.png", caption="word " * 19)
    picture(tmp_path / "mixed.png", caption="word " * 18 + "\n" + "word " * 40)
    found = read(tmp_path)
    assert found.skipped == [
        "bare.png: no caption",
        "cut.png: it cannot be read (OSError)",
        "empty.png: it cannot be read (UnidentifiedImageError)",
        f"latin.png: cannot read {tmp_path / 'latin.txt'}: it is not UTF-8: save it as UTF-8",
        "long.png: a caption of 19 words, at most 18 are read",
        "mixed.png: a caption of 40 words, at most 18 are read",
        "points.png: no caption",
        "text.jpg: it cannot be read (UnidentifiedImageError)",
    ]
    assert found.pictures.captions == [(("word " * 18).strip(),), ("a wall",)]


def test_every_kind_of_image_becomes_what_a_viewer_shows(tmp_path):
    half = numpy.zeros((8, 8, 4), numpy.uint8)
    half[:, :4] = (*RED, 255)  # the right half is transparent black
    Image.fromarray(half).save(tmp_path / "alpha.png")
    picture(tmp_path / "cmyk.jpg", (0, 0, 0, 255), (8, 8), "CMYK")
    picture(tmp_path / "grey.png", 77, (8, 8), "L")
    picture(tmp_path / "grey-alpha.png", (0, 51), (8, 8), "LA")
    Image.fromarray(numpy.full((8, 8), 30000, numpy.uint16)).save(tmp_path / "grey16.png")
    picture(tmp_path / "palette.gif", 1, (8, 8), "P")
    turned = numpy.zeros((8, 8, 3), numpy.uint8)
    turned[:4] = BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise: its top is the viewer's right
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    for path in tmp_path.iterdir():
        path.with_suffix(".txt").write_text("a thing")
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "two.png", save_all=True, append_images=frames[1:])
    (tmp_path / "two.txt").write_text("a thing")
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([*RED, *BLUE])
    clear.save(tmp_path / "x-clear.png", transparency=0)
    (tmp_path / "x-clear.txt").write_text("a thing")
    found = read(tmp_path)
    assert found.skipped == [] and len(found.pictures) == 9
    for path, shown in zip(sorted(p for p in tmp_path.iterdir() if p.suffix != ".txt"), found.pictures.images):
        start = ImageStudent(ImageConfig(1, 8, str(path), 0.0), "a thing", torch.Generator()).images()[0]
        assert torch.equal((start * 255).round().to(torch.uint8), shown), path  # the other reader of pictures
    alpha, cmyk, grey_alpha, grey, grey16, _, turned, two, clear = found.pictures.images
    assert two[:, 4, 4].tolist() == list(RED) and clear.unique().tolist() == [255]
    assert alpha[:, 4, 1].tolist() == list(RED) and alpha[:, 4, 6].tolist() == [255] * 3
    assert int(cmyk.max()) < 10
    assert grey.unique().tolist() == [77] and grey_alpha.unique().tolist() == [204]  # a fifth of black on white
    assert grey16.unique().tolist() == [round(30000 / 257 - 0.5)]
    assert turned[:, 4, 6].tolist() == list(BLUE) and turned[:, 4, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)], ids=["wide", "high"])
def test_the_middle_square_is_taken(tmp_path, shape):
    image = Image.new("RGB", shape, BLUE)
    image.paste(RED, (20, 0, 40, 20) if shape[0] > shape[1] else (0, 20, 20, 40))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a square")
    assert read(tmp_path, 20).pictures.images.flatten(2).amin(-1).tolist() == [list(RED)]
    assert read(tmp_path, 32).pictures.size == 32


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "there is no folder .*pictures; give one of images with captions"),
        ({}, r"holds no image \(.png, .jpg"),
        ({"a.txt": b"a wall", "notes.md": b""}, "holds no image"),
        ({"a.png": b"junk", "a.txt": b"a wall"}, r"none of the 1 images .* \(a.png: it cannot be read"),
        ({"a.png": b"", "b.png": b""}, r"none of the 2 images .* \(a.png: no caption; b.png: no caption\); put a .txt"),
        (
            {"a.png": b"", "captions.csv": "für".encode("latin-1")},
            "^cannot read [^:]*captions.csv: it is not UTF-8: save it as UTF-8$",
        ),
        ({"a.png": b"", "captions.csv": "file,caption".encode("utf-16")}, "captions.csv: it is not UTF-8: save it as"),
        (
            {"a.png": b"", "captions.csv": b"id,label\n1,2"},
            "^cannot read [^:]*: its header is 'id,label'; give it the columns file ",
        ),
        (
            {"a.png": b"", "captions.csv": b'file,caption\na.png,"' + b"a" * 131_073 + b'"\n'},
            r"^cannot read [^:]*: the row that begins on line 2 is broken \(field larger than field limit \(131072",
        ),
        (
            {"a.png": b"", "captions.csv": b'file,caption\na.png,mug\n\na.png,"a mug\nb.png,a ball\n'},
            r"^cannot read [^:]*: the row that begins on line 4 is broken .*; is a quote never closed",
        ),
        (
            {"a.png": b"", "captions.jsonl": b'{"file": '},
            r"\(captions.jsonl, line 1: it is no JSON \(Expecting value, ",
        ),
        ({"a.png": b"", "captions.jsonl": b"[1, 2]"}, "line 1: it must be an object with file and caption"),
    ],
)
def test_a_folder_nobody_can_learn_from_is_refused(tmp_path, files, words):
    place = tmp_path / "pictures"
    if files is not None:
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        read(place)
    if files is not None:
        with pytest.raises(ValueError, match="size is 48; give 8, 32, 64"):
            sources.build_source(str(place), 48)


@pytest.fixture
def walls(in_folder, monkeypatch):
    """Five small pictures to train on and two that cannot be, and a network of seconds."""
    network = UNetConfig(widths=(8, 16), blocks=(1,), condition=16, text=16, heads=2, fold=2, dropout=0.1)
    monkeypatch.setattr(sources, "NETWORKS", {32: network, 64: network})
    for i, (name, colour) in enumerate((("red", RED), ("blue", BLUE), ("green", (9, 150, 9)), ("red", RED))):
        picture(in_folder / "walls" / f"{i}.png", colour, caption=f"a {name} wall\n{name}")
    picture(in_folder / "walls" / "odd" / "4.jpg", BLUE, caption="a wall")
    (in_folder / "walls" / "5.png").write_bytes(b"junk")
    (in_folder / "walls" / "5.txt").write_text("a wall")
    picture(in_folder / "walls" / "6.png")
    return in_folder / "walls"


@pytest.mark.slow
@pytest.mark.network
def test_a_folder_becomes_a_teacher_that_draws(call, walls, in_folder):
    quick = ("size=32", "steps=4", "batch=2", "save_every=9")
    code, out, err = call("teacher", "train", "walls/", *quick)
    assert code == 0, err
    assert out.split() == ["outputs/walls-teacher/teacher.safetensors"]
    assert err.splitlines()[:3] == [
        "skipped: 5.png: it cannot be read (UnidentifiedImageError)",
        "skipped: 6.png: no caption",
        "2 skipped",
    ]
    made = in_folder / "outputs" / "walls-teacher"
    assert sorted(p.name for p in made.iterdir()) == sorted(
        ".lock fit.json grid-000004.png loss.png state.pt teacher.safetensors".split()
    )
    teacher = load_teacher(TeacherConfig(str(made)))
    assert teacher.vocabulary == ("a", "blue", "green", "red", "wall")
    assert teacher.prompts == ("a red wall", "a blue wall", "a green wall", "a wall")
    assert (teacher.shape, teacher.image_size, teacher.views) == ((3, 32, 32), 32, "words")
    code, out, err = call(
        "teacher", "sample", "a red wall", "--teacher", str(made), "--sampler", "heun", "--steps", "2", "-n", "3"
    )
    assert (code, out.split()) == (0, ["grid.png"]), err
    shown = torch.from_numpy(numpy.array(Image.open("grid.png"))).permute(2, 0, 1)
    drawn = sample(teacher, ["a red wall"] * 3, steps=2, sampler="heun")
    assert torch.equal(shown[:, :, :32], (drawn[0] * 255).round().to(torch.uint8))
    code, _, err = call("teacher", "sample", "a red roof", "--teacher", str(made))
    assert code == 2 and "does not know 'roof'" in err
    code, _, err = call("teacher", "sample", "a red wall", "--teacher", str(made), "--orbit")
    assert code == 2 and "takes no camera" in err


@pytest.mark.network
def test_a_training_on_a_folder_resumes_bit_for_bit(call, walls, in_folder, monkeypatch):
    monkeypatch.setattr(fit, "save_grid", lambda teacher, prompts, path: None)
    quick = ("size=32", "steps=4", "batch=2", "save_every=9")
    assert call("teacher", "train", "walls", "-o", "whole", *quick)[0] == 0
    config = FitConfig(str(walls), size=32, steps=4, batch=2, save_every=9, coarse=0, decay=0.5)
    stopped = fit.train(in_folder / "parts", config, sources.build_source(str(walls), 32)[0])
    assert [next(stopped).step, next(stopped).step] == [1, 2]
    stopped.close()
    monkeypatch.chdir(walls)
    assert call("teacher", "train", ".", "-o", "../parts", "--resume")[0] == 0  # the same folder, from elsewhere
    whole, parts = (torch.load(in_folder / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert len(whole["losses"]) == 4 and torch.equal(whole["losses"], parts["losses"])
    for kind in ("nets", "ema"):
        assert all(torch.equal(value, parts[kind][key]) for key, value in whole[kind].items())


def test_a_training_is_not_resumed_with_other_data(call, walls, in_folder, monkeypatch):
    monkeypatch.setattr(fit, "save_grid", lambda teacher, prompts, path: None)
    assert call("teacher", "train", "walls", "-o", "t", "size=32", "steps=1", "batch=2")[0] == 0
    before = (in_folder / "t" / "state.pt").read_bytes()
    picture(in_folder / "others" / "a.png", caption="a wall")

    def refused(*arguments):
        code, _, err = call("teacher", "train", *arguments, "-o", "t", "--resume", "steps=2")
        assert (code, err.count("error: ")) == (2, 1)
        assert (in_folder / "t" / "state.pt").read_bytes() == before
        return err

    assert f"t was trained on {walls}, not on {in_folder / 'others'}" in refused("others")
    assert "was trained on 32 pixels a side and 5 words, not on 64 and 5 (new: none" in refused("walls", "size=64")
    (walls / "2.txt").write_text("a grey wall\ngrey")  # as many words, of which one means another thing
    assert "32 and 5 (new: grey; gone: green)" in refused("walls")


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(call, walls, in_folder):
    code, _, err = call("teacher", "train", "walls", "size=32", "batch=6")
    assert code == 2
    assert err.splitlines()[-1] == "error: batch is 6 and there are 5 images; give batch=5 or more images"
    assert not (in_folder / "outputs").exists()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_white_are_refused(tmp_path, mode):
    Image.fromarray(numpy.full((8, 8), 70000, numpy.float32 if mode == "F" else numpy.int32)).save(tmp_path / "a.tif")
    (tmp_path / "a.txt").write_text("a wall")
    picture(tmp_path / "b.png", caption="a wall")
    found = read(tmp_path)
    assert found.skipped == [f"a.tif: its numbers are neither of 8 nor of 16 bits (mode {mode}); save it as a PNG"]
    with pytest.raises(ValueError, match="image.start .*a.tif is no picture that can be read: its numbers are neither"):
        ImageStudent(ImageConfig(1, 8, str(tmp_path / "a.tif")), "a wall", torch.Generator())


@pytest.mark.parametrize("data", [None, b"", b"no picture"])
def test_a_start_that_is_no_picture(tmp_path, data):
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png is no picture that can be read: (there is no such file|it cannot)"):
        ImageStudent(ImageConfig(1, 8, str(tmp_path / "a.png")), "a wall", torch.Generator())

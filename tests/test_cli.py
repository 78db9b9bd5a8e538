"""The command line as a user meets it: in this process with a teacher that knows a ball, and as a program."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import PATIENCE, settings, started

import sds3d
from sds3d.cli.scenes import MeshOptions
from sds3d.export.settings import MeshConfig

ROOT = Path(__file__).parents[1]


SCRIPT = """
import os, signal, sys
root, after, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [root, f"{root}/tests"]
from conftest import BallTeacher
from sds3d.cli import main

ball = BallTeacher()

def predict(*given, **named):
    if len(ball.asked) == int(after):
        os.kill(os.getpid(), signal.SIGINT)
    return BallTeacher.predict(ball, *given, **named)

ball.predict = predict
main(teacher=ball)
"""


def program(*arguments: str, cwd: Path, interrupted_after: int = -1) -> tuple[int, str, str]:
    """The command line with the ball teacher, as a process of its own; Ctrl-C comes after so many of its answers.
    Gives exit code, stdout, stderr."""
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(interrupted_after), *arguments]
    with started(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def test_generate_leaves_everything_in_the_run_folder(call, tiny, in_folder):
    code, out, err = call("generate", "a red ball", *tiny)
    run = in_folder / "outputs" / "00001-a-red-ball"
    assert code == 0, err
    assert out.split() == [
        f"outputs/{run.name}/{f}" for f in ("preview.png", "turntable.mp4", "mesh.glb", "index.html")
    ]
    kept = ".lock checkpoint.safetensors config.yaml metrics.jsonl progress"
    made = "index.html mesh.glb mesh.json preview.png turntable.mp4"
    assert sorted(p.name for p in run.iterdir()) == sorted(f"{kept} {made}".split())
    assert sorted(p.name for p in (run / "progress").iterdir()) == ["00003.png", "00006.png", "strip.png"]
    assert [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    import trimesh

    mesh = trimesh.load(run / "mesh.glb", force="mesh")
    mesh.merge_vertices(merge_tex=True, merge_norm=True)  # a texture's seams double them
    assert mesh.is_watertight and mesh.volume > 0
    assert mesh.bounds[:, 1].tolist() == pytest.approx([0, 1])  # it stands on the ground and is one high
    told = json.loads((run / "mesh.json").read_text())
    assert told["prompt"] == "a red ball" and told["light_baked"] and told["files"]["mesh.glb"]["iou"] > 0.9
    for said in ("torch (requested)", "step 6/6", "opacity", "|g|", "done in", "sds3d export", "sds3d resume"):
        assert said in err


@pytest.mark.slow
def test_a_terminal_gets_a_bar_figures_and_thumbnails(call, tiny, monkeypatch):
    from io import StringIO

    class Terminal(StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    code, out, _ = call("generate", "a ball", *tiny)
    shown = terminal.getvalue()
    assert code == 0, shown
    assert len(out.splitlines()) == 4
    for said in (
        "6/6",
        "steps/s",
        "opacity",
        "|g|",
        "left",
        "\u2580",
        "wrote outputs/00001-a-ball/mesh.glb",
        "done in",
    ):
        assert said in shown


def test_a_thumbnail_has_the_colours_of_the_views():
    from sds3d.runs.progress import THUMBNAIL, thumbnail

    views = torch.zeros(2, 3, 64, 64)
    views[0, 0, :32] = 1  # red above black, beside black
    text = thumbnail(views)
    lines = text.plain.splitlines()
    assert [len(line) for line in lines] == [2 * THUMBNAIL] * (THUMBNAIL // 2)
    styles = [str(span.style) for span in text.spans]
    assert styles[0] == "rgb(255,0,0) on rgb(255,0,0)"
    assert styles[-1] == styles[THUMBNAIL] == "rgb(0,0,0) on rgb(0,0,0)"


@pytest.mark.slow
def test_json_is_one_object_and_quiet_is_quiet(call, tiny, made):
    code, out, err = call("generate", "a ball", *tiny, "--quiet")
    assert (code, err) == (0, "")
    assert out.split() == [
        f"outputs/00002-a-ball/{f}" for f in ("preview.png", "turntable.mp4", "mesh.glb", "index.html")
    ]
    code, out, err = call("resume", made, "steps=7", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["run"], told["steps"]) == (made, 7)
    assert [Path(f).name for f in told["files"]] == ["preview.png", "turntable.mp4", "mesh.glb", "index.html"]
    assert told["seconds"] > 0


def test_dry_run_prints_the_settings_and_makes_nothing(call_packaged, in_folder):
    code, out, _ = call_packaged(
        "generate", "a blue ball", "--method", "sds", "--seed", "3", "--teacher-views", "words", "--backend", "torch",
        "--out", "elsewhere", "steps=800", "render.resolution=48", "--dry-run",
    )  # fmt: skip
    assert code == 0
    for line in ("prompt: a blue ball", "seed: 3", "steps: 800", "resolution: 48", "name: sds", "views: words",
                 "backend: torch", "out: elsewhere"):  # fmt: skip
        assert line in out
    assert not list(in_folder.iterdir())
    (in_folder / "again.yaml").write_text(out)
    assert call_packaged("generate", "a blue ball", "--config", "again.yaml", "--dry-run")[1] == out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "paint"])
@pytest.mark.parametrize("negative", ["[deformed], a ball", "ball #1 ${steps}: no"])
def test_a_negative_prompt_is_a_flag_and_a_setting_and_taken_as_written(call, in_folder, command, negative):
    import yaml

    for given in (("--negative", negative), (f"negative={negative}",)):
        code, out, err = call(command, "a ball", *given, "--dry-run")
        assert code == 0, err
        assert yaml.safe_load(out)["negative"].replace("\\${", "${") == negative


MISTAKES = {
    "an empty prompt": (("generate", " "), "the prompt is empty"),
    "a word it does not know": (("generate", "a unicorn"), "nearest: ball"),
    "a forgotten quote": (("generate", "a", "red", "ball"), "'red' is no key=value"),
    "an unknown key": (("generate", "a ball", "stepz=3"), "did you mean steps?"),
    "an unknown method": (("generate", "a ball", "--method", "sdss"), "did you mean sds?"),
    "an impossible size": (("generate", "a ball", "render.resolution=0"), "render.resolution is 0"),
    "an unknown backend": (("generate", "a ball", "--backend", "cuda"), "backend is 'cuda'"),
    "a bad mode": (("generate", "a ball", "--teacher-views", "both"), "give camera or words"),
    "a config that is not there": (("generate", "a ball", "--config", "no.yaml"), "cannot read no.yaml"),
    "an unwritable folder": (("generate", "a ball", "-o", "/proc/x"), "cannot write /proc/x"),
    "no run to resume": (("resume", "outputs/00009-x"), "there is no run folder"),
    "no run to export": (("export", "nowhere"), "there is no run folder"),
    "no run to judge": (("eval", "nowhere"), "there is no run folder"),
    "a folder that is no run": (("export", "."), "is not a run folder"),
    "a training setting": (("teacher", "train", "t", "bach=3"), "did you mean batch?"),
    "a teacher that is not there": (("teacher", "sample", "a ball", "--teacher", "smal"), "neither packaged"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_exit_code_2_and_nothing_written(call, in_folder, name):
    arguments, message = MISTAKES[name]
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(in_folder.iterdir())


def test_unknown_options_and_a_missing_prompt_are_code_2_too(call):
    assert call("generate")[0] == 2
    assert call("generate", "a ball", "--sed", "3")[0] == 2
    assert call("nonsense")[0] == 2


def test_a_full_disk_in_the_middle_keeps_the_last_checkpoint(call, tiny, monkeypatch, in_folder):
    import errno

    from sds3d.runs.folder import Run

    write = Run.save_picture

    def sometimes_full(self, step, views):
        if step > 4:
            raise ValueError(f"cannot write x: {os.strerror(errno.ENOSPC)}; make room")
        write(self, step, views)

    monkeypatch.setattr(Run, "save_picture", sometimes_full)
    code, _, err = call("generate", "a ball", *tiny)
    assert code == 2
    assert err.splitlines()[-1] == "error: cannot write x: No space left on device; make room"
    monkeypatch.undo()
    run = Run.open(in_folder / "outputs" / "00001-a-ball")
    assert run.load_checkpoint()["step"] == 4


def test_a_run_that_diverges_ends_with_code_1(call, tiny, ball_teacher):
    ball_teacher.colour = (float("nan"),) * 3
    code, _, err = call("generate", "a ball", *tiny)
    assert code == 1
    assert "SDS: non-finite gradient at step 0" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_resume_finishes_a_finished_run_and_goes_on_when_asked(call, made):
    (Path(made) / "mesh.glb").unlink()
    code, _, err = call("resume", made, "export.frames=3")
    assert code == 0 and "all 6 steps were done" in err
    assert (Path(made) / "mesh.glb").is_file()  # a run that was stopped while it wrote its files ends whole
    code, _, err = call("resume", made, "steps=5")
    assert code == 2 and "has done 6 steps; steps=5 is less" in err
    code, _, err = call("resume", made, "seed=4")
    assert code == 2
    assert "seed cannot change on resume" in err
    assert call("resume", made, "steps=9")[0] == 0
    rows = (Path(made) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(1, 10))
    assert "steps: 9" in (Path(made) / "config.yaml").read_text()


def test_a_damaged_checkpoint_is_named(call, made):
    (Path(made) / "checkpoint.safetensors").write_bytes(b"junk")
    for command in ("resume", "export", "eval"):
        code, _, err = call(command, made)
        assert code == 2
        assert "checkpoint.safetensors is damaged" in err


def test_a_config_that_was_edited_is_named(call, made):
    with (Path(made) / "config.yaml").open("a") as file:
        file.write("stepz: 3\n")
    for command in ("resume", "export", "eval"):
        code, _, err = call(command, made)
        assert code == 2
        assert f"{made}/config.yaml cannot be used" in err
        assert "did you mean steps?" in err


@pytest.mark.slow
def test_export_writes_every_format(call, made, in_folder):
    import trimesh

    code, out, err = call("export", made, "--format", "obj,ply, .GLB,stl,mp4,png", "-o", "there", "--resolution", "20")
    assert code == 0
    for said in ("density ...", "check ...", "mesh.stl: ", " faces, level ", "IoU ", "PSNR ", "seconds: surface "):
        assert said in err
    assert [Path(line).name for line in out.splitlines()] == [
        "mesh.obj", "mesh.ply", "mesh.glb", "mesh.stl", "turntable.mp4", "preview.png",
    ]  # fmt: skip
    sizes = {len(trimesh.load(in_folder / "there" / f"mesh.{kind}", force="mesh").faces) for kind in ("obj", "ply")}
    assert len(sizes) == 1
    for bad, message in (("fbx", "format is 'fbx'; give one or more of glb, obj, ply, stl"), (" ,", "format is ''")):
        code, _, err = call("export", made, "--format", bad)
        assert code == 2
        assert message in err
    code, _, err = call("export", made, "--resolution", "4")
    assert code == 2
    assert "give 8 to 512" in err


def test_export_has_a_flag_for_each_setting_of_a_mesh():
    types = get_type_hints(MeshOptions, include_extras=True)
    for field in fields(MeshConfig):
        kind, option = get_args(types[field.name])
        assert kind == get_type_hints(MeshConfig)[field.name] | None
        assert option.help, field.name
    assert MeshOptions(faces=700, up="z").changed() == {"faces": 700}


@pytest.mark.slow
def test_eval_compares_with_the_toybox(call, made):
    code, out, err = call("eval", made)
    assert code == 0, err
    assert out.startswith("a red ball\n") and max(map(len, out.splitlines())) <= 80
    for name in ("IoU", "PSNR", "Chamfer", "F ", "F at 0.02", "normals", "depth error", "pieces", "(true 1, genus 0)"):
        assert name in out
    folder = Path(made)
    assert (folder / "eval.png").is_file()
    first = json.loads(call("eval", made, "--json")[1])
    assert 0.2 < first["iou"] <= 1
    assert json.loads((folder / "eval.json").read_text())["iou"] == first["iou"]
    assert "mean of 2" in call("eval", made, made)[1]


def test_doctor_names_versions_kernels_and_reasons(call):
    code, out, _ = call("doctor")
    assert code == 0
    for said in ("torch", "numba", "backends", "auto", "recipes", "sds"):
        assert said in out
    report = json.loads(call("doctor", "--json")[1])
    assert report["packages"]["torch"] == torch.__version__
    assert "sds" in report["recipes"]
    assert isinstance(report["problems"], list)


@pytest.mark.parametrize(
    "command", ["generate", "resume", "export", "eval", "paint", "compare", "methods", "doctor", "teacher"]
)
def test_help_teaches(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert command in out
    assert command in ("doctor", "teacher") or f"sds3d {command}" in out


@pytest.mark.slow
def test_python_makes_an_asset(in_folder, ball_teacher):
    asset = sds3d.generate("a red ball", teacher=ball_teacher, seed=2, **settings())
    assert asset.path.name == "00001-a-red-ball"
    image = asset.render(azimuth=30, elevation=15, resolution=48)
    assert (image.size, image.mode) == ((48, 48), "RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((24, 24)) != (255, 255, 255)
    assert len(asset.mesh().faces) > 20
    assert asset.export("ball.ply").is_file()
    with pytest.raises(ValueError, match=r"cannot export 'ball.fbx': the name must end in .glb"):
        asset.export("ball.fbx")
    again = sds3d.Asset.open(asset.path, backend="torch")  # the kernels it was made with: the same to the last bit
    assert again.render(30, 15, 48).tobytes() == image.tobytes()
    assert asset.config.seed == 2
    with pytest.raises(AttributeError, match="it has Asset, Generated, Painting, generate, load_generator"):
        sds3d.nonsense  # noqa: B018


@pytest.mark.slow
def test_export_says_how_a_mesh_stands(call, made, in_folder):
    import trimesh

    code, _, err = call("export", made, "-f", "stl", "--height", "80", "--resolution", "24", "-o", "print")
    told = json.loads((in_folder / "print/mesh.json").read_text())
    assert code == 0 and (told["mesh"]["up"], told["mesh"]["unit"]) == ("z", "mm"), err
    assert trimesh.load(in_folder / "print/mesh.stl").bounds[:, 2].tolist() == pytest.approx([0, 80], abs=1e-3)
    for given, said in {
        ("-f", "stl,glb", "--height", "80"): "height is 80, in mm for stl and in metres for the others",
        ("-f", "glb", "--up", "z"): "a GLB has y up by its standard",
        ("-f", "stl", "--up", "x"): "up is 'x'; give y or z",
        ("-f", "ply", "--height", "-1"): "height is -1.0; give 0.001 to 1000000",
    }.items():
        code, out, err = call("export", made, *given, "-o", "nowhere")
        assert code == 2 and out == "" and said in err and not (in_folder / "nowhere").exists(), err


def test_export_elsewhere_takes_its_report_along_and_says_at_once_where_it_cannot_write(call, made, in_folder):
    code, _, err = call("export", made, "--format", "stl", "--out", "else/where")
    told = json.loads((in_folder / "else/where/mesh.json").read_text())
    assert code == 0 and {"scale", "origin"} <= set(told["mesh"]), err
    (in_folder / "file").write_text("")
    code, out, err = call("export", made, "--format", "stl", "--out", "file/in")
    assert code == 2 and "cannot write file/in" in err and "density" not in err


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_ends_where_an_uninterrupted_run_does(tmp_path, tiny):
    settings = [text for text in tiny if not text.startswith(("steps", "log"))]
    settings += ["steps=12", "log.save_every=1000", "log.picture_every=0", "export.frames=2"]
    code, _, err = program("generate", "a ball", *settings, "--quiet", cwd=tmp_path)
    assert code == 0, err
    code, out, err = program("generate", "a ball", *settings, cwd=tmp_path, interrupted_after=5)
    folder = tmp_path / "outputs" / "00002-a-ball"
    assert code == 130 and "stopped after step 6 of 12" in err, err
    assert out == ""
    assert f"go on with: sds3d resume outputs/{folder.name}" in err
    assert not (folder / "mesh.glb").exists()
    code, _, err = program("resume", str(folder), "--quiet", cwd=tmp_path)
    assert code == 0, err

    def figures(run: Path) -> list[dict]:
        rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]

    first = tmp_path / "outputs" / "00001-a-ball"
    assert figures(first) == figures(folder)
    for name in ("mesh.glb", "preview.png"):
        assert (first / name).read_bytes() == (folder / name).read_bytes()


def test_importing_loads_what_sets_the_threads_up_and_nothing_else():
    """A count, where a time would be that of a machine with other things to do."""
    program = "import sys, sds3d; print(*sorted(m for m in sys.modules if m.partition('.')[0] in ('sds3d', 'torch')))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sds3d", "sds3d.runtime", "sds3d.runtime.threads"]


def test_methods_are_listed_with_paper_needs_and_settings(call):
    from sds3d.distill.score import METHODS

    code, out, _ = call("methods")
    assert code == 0
    for name in METHODS:
        assert re.search(rf"^{name} .*arXiv \d{{4}}\.\d{{5}}", out, re.MULTILINE), name
    assert "needs a critic" in out and "method.switch=0.572" in out
    code, out, _ = call("methods", "--json")
    assert [row["name"] for row in json.loads(out)] == list(METHODS)


def test_paint_and_resume_leave_images_and_a_strip(call, in_folder):
    quick = ("image.size=8", "log.picture_every=2")
    code, out, err = call("paint", "a ball, side view", "-n", "3", "--method", "csd", "steps=4", *quick)
    run = "outputs/00001-a-ball-side-view"
    assert code == 0, err
    assert out.split() == [f"{run}/{f}" for f in ("image.png", "images", "progress/strip.png", "index.html")]
    assert len(list((in_folder / run / "images").iterdir())) == 3 and "sds3d resume" in err
    assert call("resume", run, "steps=6")[0] == 0
    assert json.loads((in_folder / run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    code, _, err = call("export", run)
    assert code == 2 and "holds images, not a scene" in err
    code, out, _ = call("paint", "a ball", "--dry-run", "--method", "sdi", "method.scale=3")
    assert code == 0 and "name: sdi" in out and "scale: 3" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("paint", "a ball", "--method", "nfds"), "did you mean nfsd"),
        (("paint", "a ball", "--method", "nfsd", "negative="), "NFSD needs a negative prompt"),
        (("paint", "a ball", "--method", "dds"), "DDS needs a source"),
        (("paint", "a ball", "--method", "sds", "method.skale=3"), "did you mean method.scale"),
        (("paint", "a ball", "-n", "0"), "image.count is 0"),
        (("paint", "a ball", "render.views=2"), "unknown key 'render'"),
        (("generate", "a ball", "--method", "vsd", "method.particles=0"), "method.particles is 0; give 1 to 64"),
        (("generate", "a ball", "--method", "dds", "source.prompt=a ball"), "give source.run"),
        (("compare", "--methods", "sds"), "at least one prompt"),
        (("compare", "a ball", "--methods", "sds,vds"), "did you mean vsd"),
        (("compare", "a ball", "--seeds", "one"), "seeds is 'one'; give a whole number"),
        (("compare", "a ball", "--student", "sound"), "give scene or image"),
    ],
)
def test_mistakes_about_methods_leave_nothing_behind(call, in_folder, arguments, said):
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1, err
    assert not list(in_folder.iterdir())


def test_compare_writes_a_page(call, in_folder, ball_teacher):
    quick = ("steps=3", "image.size=8", "image.count=2", "-o", "c", "--seeds", "0,1", "--negative", "ball: [flat]")
    code, out, err = call("compare", "a ball", "a red ball", "--methods", "sds,csd", *quick)
    assert code == 0 and out.split() == ["c/index.html", "c/sheet.png", "c/results.json"], err
    *told, head = err[: err.index("PSNR, dB")].splitlines()
    assert "run 8/8" in told[-1] and "\n".join(told).count("csd") == 4 and head.split() == ["sds", "csd"]
    table = err[err.index(head) :].splitlines()
    assert max(map(len, table)) <= 80 and any(line.startswith("colour off ") for line in table)
    assert sum("ball: [flat]" in prompts for prompts in ball_teacher.asked) == 12  # in each step of sds
    code, out, err = call("compare", "a ball", "a red ball", "--methods", "sds,csd", *quick, "--json")
    assert code == 0 and err == "" and set(json.loads(out)["mean"]) == {"sds", "csd"}

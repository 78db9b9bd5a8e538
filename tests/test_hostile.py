"""Command lines and config files as the unlucky and the hostile write them: one line, and exit code 2."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from conftest import PATIENCE, started

from sds3d.cli import main
from sds3d.config import load as configs
from sds3d.config import plain_yaml
from sds3d.config.load import load, of_run, parse_overrides, to_yaml
from sds3d.media import picture
from sds3d.runs import generator_parts
from sds3d.runtime import files

ROOT = Path(__file__).parents[1]
DRY = ("generate", "a ball", "--dry-run")
LONG = "x" * 5000

COMMANDS = {
    "a number in a section's place": ((*DRY, "render=1"), "render is 1; give its parts"),
    "null in a section's place": ((*DRY, "render=null"), "render is None; give its parts"),
    "a number in the place of learning rates": ((*DRY, "optim.lr=3"), "optim.lr is 3; give its parts"),
    "a list as the method's name": ((*DRY, "method={name: [sds]}"), "method is ['sds']"),
    "a number as the method": ((*DRY, "method=3"), "method is 3"),
    **{f"{value} as the method": ((*DRY, f"method={value}"), "method is ") for value in ("false", "0", "0.0", "[]")},
    "no place": (("gallery", ""), "it is empty; give a path"),
    "no folder of data": (("export", "x", "-o", ""), "it is empty; give a path"),
    "no data": (("teacher", "train", ""), "it is empty; give a path"),
    "a mesh's flag for a film": (("export", "x", "-f", "png", "--height", "3"), "--height applies to meshes"),
    "a compared prompt's part": (("compare", "a ball", "--methods", "sds", "prompt.x=1"), "prompt= cannot be set"),
    "a compared seed's part": (("compare", "a ball", "--methods", "sds", "seed={a: 1}"), "seed= cannot be set"),
    "deep nesting": ((*DRY, f"steps={'[' * 3000}"), "more than 32 lists and maps"),
    "many parts": ((*DRY, f"{'a.' * 3000}b=1"), "no key has so many parts"),
    "an absurd size": ((*DRY, "field.hidden=1e30"), "field.hidden is a number of 31 digits; give 1 to 4096"),
    "a number of thousands of digits": ((*DRY, f"steps={'9' * 6000}"), "steps is "),
    "nobody's home": ((*DRY, "-o", "~nouser/x"), "there is no such user here"),
    "nobody's home as a run": (("export", "~nouser/x"), "names a user who is not here"),
    "a path of thousands": ((*DRY, "-o", LONG), "is no path here: File name too long"),
    "a run of thousands": (("export", LONG), "is no path here: File name too long"),
    "a picture of thousands": (("paint", "a ball", "--dry-run", "--start", LONG), "is no path here"),
    "a config of thousands": ((*DRY, "--config", LONG), "is no path here"),
    "NUL": ((*DRY, "out=a\0b"), "out is 'a\\x00b'"),
    "not UTF-8": ((*DRY, "out=\udcff"), "is not UTF-8"),
    "endless memory": (("doctor", "--memory", "inf"), "'--memory'"),
    "memory that is no number": (("doctor", "--memory", "nan"), "'--memory'"),
    "one format twice": (("render", "x", "-f", "mp4,mp4"), "format has mp4 twice"),
    "one layer twice": (("render", "x", "-w", "rgb,rgb"), "what has rgb twice"),
    "one mesh twice": (("export", "x", "-f", "glb,glb"), "format has glb twice"),
    "a folder that is a device": (("teacher", "train", "digits", "-o", "/dev/null"), "cannot write /dev/null"),
    "the toybox in another size": (("teacher", "train", "toybox", "size=13"), "the pictures of toybox are 64"),
    "the digits in another size": (("teacher", "train", "digits", "size=32"), "the pictures of digits are 8"),
    "other data": (("teacher", "train", "digits", "data=toybox"), "data is the first argument"),
    "no host": (("studio", "--host", ""), "--host is ''"),
    "a port": (("studio", "--port", "99999"), "--port is 99999"),
    "a device on which nothing is computed": ((*DRY, "device=meta"), "device 'meta' is not usable here"),
    "an unknown option": (("generate", "a ball", "--sed", "3"), "--sed"),
    "a seed that is none": (("generate", "a ball", "--seed", "x"), "--seed"),
    "an unknown command": (("nonsense",), "nonsense"),
    "guidance": (("teacher", "sample", "a ball", "--guidance", "nan"), "'--guidance'"),
    "a prompt twice": ((*DRY, "prompt=a red ball"), "prompt is given twice"),
    "a seed twice": ((*DRY, "--seed", "3", "seed=4"), "seed is given twice, as 3 and as seed=4"),
    "a method twice": ((*DRY, "--method", "sds", "method=vsd"), "method is given twice"),
    "a folder twice": ((*DRY, "-o", "a", "out=b"), "out is given twice"),
    "a comparison's seed": (("compare", "a ball", "seed=3"), "seed= cannot be set in a comparison"),
    "a comparison's method": (("compare", "a ball", "method=sds"), "method= cannot be set in a comparison"),
    "a comparison's folder": (("compare", "a ball", "out=x"), "out= cannot be set in a comparison"),
    "a comparison's prompt": (("compare", "a ball", "prompt=x"), "prompt= cannot be set in a comparison"),
    "a studio's prompt": (("studio", "prompt=x"), "prompt= cannot be set in the studio"),
    "pickles by a setting": ((*DRY, "teacher.hf.allow_pickle=true"), "give --allow-pickle, a flag of"),
    "the environment as a number": ((*DRY, "steps=${oc.env:HOME}"), "steps is '${oc.env:HOME}'; give a whole number"),
    "the environment as a seed": ((*DRY, "seed=${oc.env:HOME}"), "cannot resolve the settings: seed is"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hostile_command_line_is_answered_with_one_line(call, in_folder, name):
    arguments, said = COMMANDS[name]
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and said in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1100
    assert not list(in_folder.iterdir())


@pytest.mark.parametrize(("option", "value"), [("--level", "1e30"), ("--level", "nan"),
    ("--level", "-1"), ("--keep", "nan"), ("--faces", "9" * 30), ("--smooth", "-1")])  # fmt: skip
def test_a_mesh_has_ranges(call, made, option, value):
    code, out, err = call("export", made, option, value, "--format", "stl")
    assert (code, out) == (2, "") and "give" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("steps", ["x", "1e22", "null", "[1]", "1:30", "0x10", "1_000"])
def test_resume_takes_a_number_of_steps(call, made, steps):
    code, _, err = call("resume", made, f"steps={steps}")
    assert code == 2 and err.startswith("error: steps is ") and err.count("\n") == 1, err


@pytest.mark.parametrize("steps", ["x", "1e22", "null", "0x10"])
def test_a_generators_run_takes_a_number_of_steps(steps):
    with pytest.raises(ValueError, match="^steps is "):
        configs.changed(configs.DistillConfig(), parse_overrides([f"steps={steps}"]))


ODDITIES = [
    "1:30",
    "0x10",
    "1_000",
    "010",
    "yes",
    "on",
    "0o17",
    ".inf",
    ".nan",
    "2001-01-01",
    "1,000",
    "+ 1",
    "1e",
    "'8'",
]


@pytest.mark.parametrize("text", ODDITIES)
@pytest.mark.parametrize("key", ["steps", "time.mean", "method.scale", "camera.fov", "uncond_camera"])
def test_what_yaml_1_1_reads_as_something_else_is_no_number(key, text):
    with pytest.raises(ValueError, match=re.escape(key)):
        load("a ball", parse_overrides([f"{key}={text}"]))


@pytest.mark.parametrize("text", ODDITIES)
def test_and_is_text_where_text_belongs_in_a_file_too(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"negative: {text}\n")
    assert load("a ball", file=tmp_path / "c.yaml").negative == text.strip("'")


FILES = {
    "null in a section's place": ("render: null\n", "render is None; give its parts"),
    "a list in a section's place": ("optim: [1]\n", "optim is .1.; give its parts"),
    "a list as the method's name": ("method: {name: [sds]}\n", "method is"),
    "deep nesting": ("a: " + "[" * 5000, "more than 32 lists and maps"),
    "deep lines": ("".join(" " * i + "a:\n" for i in range(300)), "more than 32 lists and maps"),
    "an alias": ("a: &x [1, 2]\nb: *x\n", "an anchor or alias"),
    "a billion laughs": ("a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefg", "bcdefgh")),
                         "an anchor or alias"),
    "a tag": ("steps: !!python/object/apply:os.system [ls]\n", "a tag"),
    "a number's tag": ("steps: !!int '0x10'\n", "a tag"),
    "a merge key": ("<<: {steps: 3}\n", "unknown key '<<'"),
    "a key twice": ("steps: 3\nsteps: 4\n", "the key 'steps' is there twice"),
    "a key that is a list": ("? [1]\n: 2\n", "a key is a list"),
    "another reference": ("steps: 8\nseed: ${steps}${steps}\n", "cannot resolve the settings: seed is"),
    "more than all": ("seed: ${part:1.5}\n", "cannot resolve the settings: seed is"),
    "pickles": ("teacher: {hf: {allow_pickle: true}}\n", "give --allow-pickle"),
    "a huge file": ("#" * 2**21, "is larger than"),
    "no mapping": ("3\n", "holds no settings"),
    "latin-1": (b"negative: \xe9\n", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_answered_with_one_line(call, in_folder, name):
    content, said = FILES[name]
    (in_folder / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = call(*DRY, "--config", "c.yaml")
    assert (code, out) == (2, "") and re.search(said, err) and err.count("\n") == 1, err


def test_a_pipe_and_a_device_are_no_configs(call, in_folder):
    os.mkfifo(in_folder / "pipe")
    for path in ("pipe", "/dev/zero", "/dev/null"):
        code, _, err = call(*DRY, "--config", path)
        assert code == 2 and "no regular file" in err and err.count("\n") == 1


def test_prompts_are_read_from_a_file_that_ends(call_packaged, in_folder):
    os.mkfifo(in_folder / "pipe")
    (in_folder / "latin").write_bytes(b"drei f\xfcnfen\n")
    said = dict.fromkeys(("pipe", "/dev/zero", "/dev/null"), "it is no regular file")
    for path, reason in (said | {".": "Is a directory", "latin": "it is not UTF-8: save it as UTF-8"}).items():
        code, out, err = call_packaged("distill", "--teacher", "digits", "--prompts", path, "--dry-run")
        assert (code, out) == (2, "") and err.startswith("error: generator.prompts: cannot read "), err
        assert f": {reason}; give a text file, one prompt per line" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("~nouser/x", "'~nouser/x' names a user who is not here; give a path"),
        (LONG, "xx is no path here: File name too long"),
        ("a\0b", r"'a.x00b' is no path here: it has a NUL character"),
    ],
)
def test_a_path_that_can_be_none_is_a_value_error_in_python_too(text, said):
    from sds3d.config.load import DistillConfig
    from sds3d.data import folder

    config = load(None, {"teacher.name": "digits"}, kind=DistillConfig)
    config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, prompts=text))
    for read in (lambda: generator_parts.prompts(config, None), lambda: folder.read(text, 8, 9)):
        with pytest.raises(ValueError, match=said) as caught:
            read()
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="there is no such file"):
        picture.read(Path(text), 8)


def test_a_text_of_at_most_so_many_bytes_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert files.read_text(tmp_path / "a", 7) == "a\r\nb"
    with pytest.raises(ValueError, match="cannot read .*a: it is larger than 6 bytes"):
        files.read_text(tmp_path / "a", 6)


@pytest.mark.parametrize("text", ["a ball ${oc.env:HOME}", "a ball \\${oc.env:HOME}", "${steps} ball", "ball ${x",
                                  "\\\\${part:0.5} ball", "${oc.create:ball}"])  # fmt: skip
def test_a_prompt_means_what_it_says(tmp_path, call, text):
    """Through the command line, a file, a save, and a resume; nothing of the environment gets in."""
    code, out, err = call("generate", text, "--dry-run")
    assert code == 0 and plain_yaml.read(out)["prompt"] == text, err
    (tmp_path / "config.yaml").write_text(out)
    config = of_run(tmp_path / "config.yaml")
    assert config.prompt == text and of_run(tmp_path / "config.yaml") == load(text, file=tmp_path / "config.yaml")
    longer = configs.changed(config, {"steps": 900})
    (tmp_path / "config.yaml").write_text(to_yaml(longer))
    assert of_run(tmp_path / "config.yaml").prompt == text


def test_nothing_but_what_may_change_changes_on_resume():
    config = load("a ball")
    for layer in ({"method": {}}, {"teacher": {}}, {"render": {}}, {"seed": 3}):
        with pytest.raises(ValueError, match="cannot change on resume"):
            configs.changed(config, layer)


def test_settings_as_json_are_one_object(call):
    code, out, _ = call(*DRY, "--json", "steps=30")
    values = json.loads(out)
    assert code == 0 and values["steps"] == 30 and values["method"]["name"] == "sds"


def test_a_strangers_config_reads_nothing_of_this_machine(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "prompt: a ball ${oc.env:HOME}\nsource: {run: '${oc.env:HOME}'}\nout: ${oc.env:HOME}"
    )
    config = load(None, file=tmp_path / "c.yaml")
    assert (config.prompt, config.source.run, config.out) == (
        "a ball ${oc.env:HOME}", "${oc.env:HOME}", "${oc.env:HOME}",
    )  # fmt: skip


def test_only_the_flag_lets_pickles_be_read(tmp_path):
    allowed = load("a ball", {"teacher.hf.allow_pickle": True})  # what the flag, and Python, give
    assert allowed.teacher.hf.allow_pickle
    (tmp_path / "config.yaml").write_text(to_yaml(allowed))
    again = of_run(tmp_path / "config.yaml")
    assert not again.teacher.hf.allow_pickle  # resume wants the flag again
    assert configs.changed(again, {configs.PICKLE: True}) == allowed
    with pytest.raises(ValueError, match="give --allow-pickle"):
        load("a ball", file=tmp_path / "config.yaml")


def test_warnings_are_a_sentence_and_none_with_quiet(call, made, capsys):
    noisy = ("export", made, "--format", "png")

    def warned(*arguments):
        from sds3d.runs.scene import Asset

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Asset, "export", lambda asset, path: warnings.warn("the mesh\nis odd", stacklevel=2))
            return call(*arguments)

    code, _, err = warned(*noisy)
    assert code == 0 and "warning: the mesh is odd\n" in err and "UserWarning" not in err and ".py" not in err
    assert warned(*noisy, "-q")[2] == warned(*noisy, "--json")[2] == ""


def test_ctrl_c_anywhere_is_one_line(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    try:
        with pytest.raises(SystemExit) as end, monkeypatch.context() as patch:
            patch.setattr(configs, "load", interrupted)
            main(["generate", "a ball"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


SLOW = [pytest.param(seconds, marks=pytest.mark.slow) for seconds in (0.3, 1.0, 1.5, 2, 3, 4, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.6, 6, *SLOW])
def test_two_ctrl_c_leave_one_line_and_whole_files(tmp_path, seconds):
    """In the imports, in a step, and while a checkpoint is written."""
    command = [sys.executable, "-m", "sds3d", "generate", "a red mug", "log.save_every=1", "backend=torch", "-q",
               "render.resolution=16", "steps=1000"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with started(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(seconds)  # wherever the program is by then
        for _ in range(5):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        _, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err and process.returncode in (130, -signal.SIGINT), err
    last = [line for line in err.splitlines() if line and "once more" not in line][-1:]
    # signals that come before the first of them is handled, as in one long step, are one signal
    assert last in (["stopped"], []) or last[0].startswith("stopped after step"), err
    for run in (tmp_path / "outputs").glob("*-*") if (tmp_path / "outputs").is_dir() else ():
        from sds3d.runs.folder import Run

        if (run / "checkpoint.safetensors").is_file():
            assert Run.open(run).load_checkpoint()["step"] >= 1

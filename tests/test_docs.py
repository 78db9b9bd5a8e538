"""The documentation is short, its links are true, and every command and every block of Python that it shows runs.

Commands run with fewer steps (`documentation.shortened`). Blocks marked slow, and a few slow
commands, run under ``pytest -m slow`` only; those marked gpu or cluster do not run here.
"""

import contextlib
import doctest
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import PATIENCE, started
from documentation import GENERATOR, PAGES, ROOT, SCENE, SERVES, anchors, blocks, commands, python, shortened
from PIL import Image

import sds3d
from sds3d.config.schema import Config, DistillConfig, PaintConfig
from sds3d.config.typed import keys
from sds3d.distill.score import METHODS

BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "console", "sh", "shell")]
SHOWN = {  # command -> where it is shown first: what stands on several pages runs once
    " ".join(arguments): (block, arguments)
    for block in reversed(SHELL)
    if block.mark in ("", "exit 0 or 1")
    for arguments in commands(block)
}
PROSE = [page for page in PAGES if page.name != "notes.md"]
PATHS = r"`((?:sds3d|docs|tests|scripts|configs|examples|benchmarks)/[\w./-]*|\.ci/run|[A-Z]+(?:\.md)?)`"
NOT_YET = {"benchmarks/gpu_report.json"}  # made by scripts/gpu_report.py on a GPU
EXAMPLES = {"sds3d/distill/score/clipped.py", "configs/clipped.yaml"}  # what a reader is shown to write
EXCEPT = NOT_YET | EXAMPLES | {"NEEDS", "METHODS", "SAMPLERS", "RUN", "FOLDER"}


def pairs(settings: list[str]) -> dict:
    return {k: int(v) if v.isdigit() else v for k, v in (setting.split("=") for setting in settings)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with what the pages speak of: finished runs, a diffusers pipeline, captioned pictures, prompts."""
    folder = tmp_path_factory.mktemp("documentation")
    (folder / "my-pictures").mkdir()
    for i, (colour, name) in enumerate({"red": (220, 30, 30), "blue": (30, 30, 220)}.items()):
        Image.new("RGB", (40, 32), name).save(folder / "my-pictures" / f"{i}.png")
        (folder / "my-pictures" / f"{i}.txt").write_text(f"a {colour} card")
    (folder / "prompts.txt").write_text("a red mug\na blue mug\n")
    shutil.move(tiny_pipelines.build("sd", folder / "made"), folder / "FOLDER")
    shutil.move(tiny_pipelines.build("if", folder / "made"), folder / "OTHER")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    with contextlib.chdir(folder):
        sds3d.generate("a red mug", **pairs(SCENE))
        small = pairs(GENERATOR)
        for teacher, method in (("digits", "diffinstruct"), ("FOLDER", "vsd")):
            prompts = {"generator.prompts": "prompts.txt"} if teacher == "FOLDER" else {}
            made = sds3d.train_generator(teacher=teacher, method=method, out="elsewhere", **small, **prompts)
            shutil.move(made.path, folder / "outputs" / f"00001-{teacher}-{method}")
    return folder


@pytest.fixture
def here(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def test_the_readme_fits_a_screen_or_three():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_named_files_exist(page: Path):
    for name in re.findall(PATHS, page.read_text(encoding="utf-8")):
        assert name in EXCEPT or (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_method_has_its_section_and_its_row():
    readme, methods = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/methods.md"))
    for name in METHODS:
        assert f"\n## {name}\n" in methods and f"| [`{name}`](#{name}) |" in methods, name
        assert f"| [`{name}`](docs/methods.md#{name}) |" in readme, name


def test_the_reference_has_every_setting_and_says_what_it_means(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    reference = importlib.import_module("config_reference").reference()
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", reference, re.M)
    wanted = {key for kind in (Config, PaintConfig, DistillConfig) for key in keys(kind)}
    wanted |= {key for method in METHODS.values() for key in keys(method, "method")}
    groups = {key.rpartition(".")[0] for key in wanted}  # "render" is none itself, but for render.views and so on
    assert {row[0] for row in rows} == wanted - groups | {"method"}
    assert [row[0] for row in rows if not row[3].strip()] == []
    assert "| `seed` | integer, 0 to 2^62 - 1 | `0` | seed of every random draw. |" in reference
    assert "| `generator.half_lives` | list of: integer, 1 to 10^12 |" in reference
    assert "<!-- settings -->" in (ROOT / "docs" / "configuration.md").read_text()


def test_blocks_are_found_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- test: slow -->\n\n```bash\na \\\n  x && b 'c d'  # e\n```\ntext\n```python\nx = 1\n```\n")
    first, second = blocks(page)
    assert (first.mark, first.language, commands(first)) == ("slow", "bash", [["a", "x"], ["b", "c d"]])
    assert (second.mark, second.language, second.line) == ("", "python", 8)
    page.write_text("<!-- test: later -->\n```bash\na\n```\n")
    with pytest.raises(ValueError, match="the mark is 'later'"):
        list(blocks(page))


def marked(command: str):
    """A test's parameter; slow where the command takes more than ten seconds even when it is short, or serves a page as
    the studio does."""
    slow = command.startswith(("sds3d compare", "sds3d teacher train", "sds3d doctor --teacher", "sds3d view"))
    slow = slow or "--live" in command
    return pytest.param(command, marks=pytest.mark.slow if slow else (), id=command[:70])


@pytest.mark.parametrize("command", [marked(command) for command in SHOWN])
def test_command_runs(command: str, here: Path, capfd):
    """In this process; what serves a page until Ctrl-C, as a program that is stopped when its page is there."""
    block, (program, *arguments) = SHOWN[command]
    if program == "sds3d" and set(arguments) & set(SERVES):
        return serve(shortened(arguments), here, block.place)
    if program != "sds3d":
        known = {"python": [], "ruff": ["-m", "ruff"]}
        assert program in known, f"{block.place}: {command} can only run in a block that is marked slow"
        done = subprocess.run(
            [sys.executable, *known[program], *arguments],
            cwd=ROOT if program == "ruff" else here,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block.place}: {done.stdout}{done.stderr}"
        return None
    from sds3d.cli import main

    with pytest.raises(SystemExit) as end:
        main(shortened(arguments))
    wanted = (0, 1) if block.mark else (0,)
    assert (end.value.code or 0) in wanted, f"{block.place}: {command}\n{capfd.readouterr().err}"
    return None


def serve(arguments: list[str], folder: Path, place: str) -> None:
    """A program that serves a page, stopped by Ctrl-C once it says where the page is."""
    command, environment = [sys.executable, "-m", "sds3d", *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    with started(command, cwd=folder, env=environment, **quiet) as served:
        guard = threading.Timer(PATIENCE, served.kill)
        guard.start()
        said = ""
        for line in served.stderr:
            said += line
            if "in a browser" in line:
                served.send_signal(signal.SIGINT)
        code = served.wait()
        guard.cancel()
    assert "open http://" in said and "Traceback" not in said and code in (0, 130), f"{place}: exit {code}\n{said}"


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.language == "python"}), ids=lambda page: page.name)
def test_python_runs(page: Path, here: Path, monkeypatch):
    """The blocks of a page, one after the other; each goes on with the names of those before it."""
    before, module = dict(METHODS), types.ModuleType("documented")
    monkeypatch.setitem(sys.modules, "documented", module)  # where dataclasses look for the types of their fields
    try:
        for block in BLOCKS:
            if block.page == page and block.language == "python" and not block.mark:
                exec(python(block.text, block.place), module.__dict__)
        assert page.name != "writing-a-method.md" or "clipped" in METHODS
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_every_other_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "text", "yaml"}


def test_the_recipe_of_the_worked_example_is_one(tmp_path):
    from sds3d.config import plain_yaml

    (recipe,) = (b for b in BLOCKS if b.language == "yaml" and b.page.name == "writing-a-method.md")
    values = plain_yaml.read(recipe.text)
    known = {key.split(".")[0] for key in keys(Config)} | {"method"}
    assert set(values) <= known and values["method"]["name"] == "clipped"


def with_doctests() -> list[str]:
    """Modules of the package whose docstrings hold examples."""
    found = [path for path in sorted((ROOT / "sds3d").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


@pytest.mark.parametrize("name", with_doctests())
def test_docstring_examples_run(name: str, here: Path):
    module = importlib.import_module(name)
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_skipped_examples_say_why():
    """Above the first of them stands a comment."""
    for name in with_doctests():
        lines = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()
        for above, line in zip(lines, lines[1:], strict=False):
            if "+SKIP" in line:
                assert "+SKIP" in above or ">>> # Not run as a test: " in above, f"{name}: {line}"


def test_the_public_functions_have_examples():
    for function in (sds3d.generate, sds3d.paint, sds3d.train_generator, sds3d.load_generator):
        assert ">>> " in function.__doc__, function.__name__


@pytest.mark.slow
def test_the_example_is_short_and_paints(tmp_path, monkeypatch, capsys):
    text = (ROOT / "examples" / "sds.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    names: dict = {"__name__": "example"}
    exec(compile(text, "examples/sds.py", "exec"), names)
    images = names["paint"]("a red mug", steps=30)
    assert images.shape == (4, 3, 64, 64) and 0 <= float(images.min()) and float(images.max()) <= 1
    middle = images[:, :, 24:40, 24:40].mean((0, 2, 3))
    assert middle[0] > middle[1] + 0.1 and middle[0] > middle[2] + 0.1  # red, where the mug is


def test_the_notebook_is_valid_and_runs(here):
    path = ROOT / "examples" / "quickstart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.suppress(ImportError):
        import nbformat

        nbformat.validate(nbformat.read(path, as_version=4))
    assert notebook["nbformat"] == 4 and path.stat().st_size < 20_000
    names: dict = {"__name__": "__notebook__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(python("".join(cell["source"]), path.name), names)


def renamed(arguments: list[str], folder: Path) -> list[str]:
    """The arguments, where a run that a page calls the first of its folder is there under that name; and of a
    comparison one prompt and two methods."""
    for name in (a for a in arguments if a.startswith("outputs/00001-")):
        made = sorted((folder / "outputs").glob(f"*{name.removeprefix('outputs/00001')}"))
        if made and not (folder / name).exists():
            made[-1].rename(folder / name)
    few = {"--held-out": "a blue mug", "sds,nfsd,csd,vsd,sdi,ism,bridge": "sds,ism"}
    return [few.get(argument, argument) for argument in arguments]


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    list({b.text: b for b in SHELL if b.mark == "slow" and "pip install" not in b.text}.values()),
    ids=lambda block: block.place,
)
def test_slow_commands_run(block, here, capfd):
    """Benchmarks and long runs: each program of them starts and ends well, with few steps and images."""
    few = {
        "held_out.py": ["--prompts", "a blue mug", "--seeds", "0", "--json", "held_out.json", *SCENE],
        "teacher_accuracy.py": ["--images", "24"],
        "digits_teacher.py": ["--images", "600", "--seeds", "1", "--evaluations", "1", "2"],
        "live_cost.py": ["--steps", "2"],
        "bench.py": ["--points", "512", "--log2-table", "10", "--rounds", "1"],
        "scaling.py": ["--rounds", "1", "--out", "scaling"],
    }
    from sds3d.cli import main

    for program, *arguments in commands(block):
        if program == "sds3d":
            with pytest.raises(SystemExit) as end:
                main(shortened(renamed(arguments, here)))
            assert not end.value.code, f"{block.place}: {capfd.readouterr().err}"
        else:
            script = Path(arguments[0]).name
            done = subprocess.run(
                [sys.executable, ROOT / "scripts" / script, *few[script]],
                cwd=here,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{block.place}: {done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A copy of the tree and the variables of a new environment beside it.

    torch is in it already, as the pages advise: where there is no GPU, its newest build would be gigabytes of CUDA.
    """
    folder = tmp_path_factory.mktemp("newcomer")
    unneeded = shutil.ignore_patterns(".git", ".venv", "outputs", "build", "node_modules", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "clone", ignore=unneeded)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip, torch_here = folder / "venv" / "bin" / "pip", f"torch=={torch.__version__.split('+')[0]}"
    subprocess.run([pip, "install", "--quiet", torch_here], check=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_XDIST_WORKER")}
    return folder / "clone", kept | {"PATH": f"{pip.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({b.text for b in SHELL if b.mark == "slow" and "pip install" in b.text}), ids=lambda text: text
)
def test_install_commands_run(command: str, environment):
    """As they stand; of pytest only that it finds its tests."""
    clone, variables = environment
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=clone,
        env=variables | {"PYTEST_ADDOPTS": "--collect-only -q"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "sds3d generate" not in command or (clone / "outputs" / "00001-a-red-mug" / "mesh.glb").is_file()
    assert "pytest" not in command or "test_docs.py" in done.stdout

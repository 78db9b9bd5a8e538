"""The house rules, read from the source: who may import whom, what loads lazily, how long things are."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sds3d"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))

# A room is a module of the package or a folder of modules. Some modules are rooms of their own: the score side knows
# teachers by their interface only, and anybody may compare with the truth or read a picture. Arrows point from a room
# to what its files may import; imports for type checking count.
OWN_ROOMS = {"teachers.base", "teachers.drawing", "media.picture"} | {
    f"evaluate.{name}" for name in ("clay", "shape", "topology", "truth")
}
ARROWS = {
    "runtime": set(),
    "cameras": {"runtime"},
    "prompts": {"cameras"},
    "domains": set(),
    "media.picture": set(),
    "media": {"cameras", "runtime"},
    "pages": {"media", "runtime"},
    "diffusion": {"prompts", "runtime"},
    "networks": {"cameras", "prompts"},
    "ops": set(),
    "export": {"cameras", "runtime"},
    "evaluate.clay": {"cameras", "export"},
    "evaluate.topology": set(),
    "evaluate.shape": {"cameras", "evaluate.topology", "export"},
    "evaluate.truth": {"cameras", "evaluate.clay", "evaluate.shape"},
    "data": {"cameras", "domains", "media.picture", "prompts", "runtime"},
    "students": {"cameras", "diffusion", "domains", "media", "media.picture", "networks", "ops", "prompts", "runtime"},
    "teachers.base": {"cameras", "diffusion", "runtime"},
    "teachers.drawing": {"cameras", "diffusion", "runtime", "teachers.base"},
    "teachers": {"cameras", "data", "domains", "diffusion", "media", "networks", "prompts", "runtime"}
    | {"teachers.base", "teachers.drawing"},
    "distill": {"cameras", "diffusion", "domains", "networks", "prompts", "runtime", "students"}
    | {"teachers.base", "teachers.drawing"},
    "train": {"runtime", "students"},
    "config": {"cameras", "diffusion", "distill", "export", "ops", "runtime", "students", "teachers", "teachers.base"}
    | {"train"},
    "runs": {"cameras", "config", "data", "diffusion", "distill", "evaluate.truth", "export", "media", "media.picture"}
    | {"ops", "pages", "prompts", "runtime", "students", "teachers", "teachers.base", "train"},
    "api": {"config", "runs", "teachers.base"},
    "evaluate": {
        "api",
        "cameras",
        "config",
        "data",
        "diffusion",
        "distill",
        "domains",
        "evaluate.truth",
        "media",
        "networks",
        "pages",
        "runs",
    }
    | {"runtime", "teachers", "teachers.base", "teachers.drawing", "train"},
}
# They see the house from outside and may enter any room.
ENTRANCE = {"__init__", "__main__", "cli", "live"}
# What making a scene needs; the toybox's truth stays out of it, along whole chains of imports.
BLIND_TO_DATA = ("students", "distill", "ops", "train", "export", "diffusion")
MOST_AT_THE_TOP = 30  # files and folders in the package

LIGHT = {"torch", "numpy", "sds3d"} | set(sys.stdlib_module_names)
HOMES = {  # package -> the only files that may import it
    "yaml": {"config/plain_yaml.py"},
    "diffusers": {"teachers/hf/generator_scheduler.py", "teachers/hf/loading.py", "teachers/hf/meta_teacher.py"},
    "transformers": {"teachers/hf/loading.py", "teachers/hf/meta_teacher.py"},
    "huggingface_hub": {"teachers/hf/loading.py", "teachers/hf/meta_teacher.py"},
    "peft": {"teachers/hf/adapter.py"},
    "numba": {"ops/numba_cpu.py", "ops/numba_kernels.py"},
    "nerfacc": {"ops/nerfacc_cuda.py"},
    "tinycudann": {"ops/tcnn_cuda.py"},
    "triton": {"ops/triton_gpu.py", "ops/triton_kernels.py"},
    "xatlas": {"export/texture.py"},
    "fast_simplification": {"export/mesh.py"},
    "trimesh": {"export/formats.py", "data/toybox.py"},
    "skimage": {"export/mesh.py", "data/toybox.py"},
    "imageio_ffmpeg": {"media/video.py"},
    "matplotlib": {"media/chart.py"},
    "typer": {
        f"cli/{name}.py"
        for name in ("__init__", "generators", "live", "methods", "options", "pictures", "scenes", "shared", "teacher")
    },
    "sklearn": set(),
    "viser": {"live/stage.py"},
    "lpips": {"distill/perceptual.py"},
    "torch_fidelity": {"evaluate/inception.py"},
}
# Files that load a heavy package when they are imported, and are therefore imported lazily themselves.
EAGER = {
    "ops/numba_cpu.py": {"numba"},
    "ops/numba_kernels.py": {"numba"},
    "ops/triton_gpu.py": {"triton"},
    "ops/triton_kernels.py": {"triton"},
    **{name: {"typer"} for name in HOMES["typer"]},
}
RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
RANDOM_METHODS = {"uniform_", "normal_", "random_", "exponential_", "bernoulli_"}


def name_of(path: Path) -> str:
    """sds3d/students/scene/field.py -> students/scene/field.py"""
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """sds3d/students/scene/field.py -> scenes.field; a package's __init__ is the package, sds3d's own is __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    return module if module in OWN_ROOMS else module.split(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, top_level_only: bool = False, at_run_time: bool = False) -> set[str]:
    """Dotted names a file imports: modules, and what is taken from them."""
    found, queue = set(), list(tree_of(path).body)
    while queue:
        node = queue.pop()
        if at_run_time and is_type_checking(node):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        queue.extend(ast.iter_child_nodes(node))
    return found


def own_imports(path: Path, top_level_only: bool = False, at_run_time: bool = False) -> set[str]:
    """Modules of this package that a file imports, as `scenes.field`."""
    found = set()
    for name in imports(path, top_level_only, at_run_time):
        parts = name.split(".")
        if parts[0] == "sds3d" and len(parts) > 1:
            inner = ".".join(parts[1:])
            found.add(inner if inner in MODULES else ".".join(parts[1:-1]) or "__init__")
    return found & set(MODULES)


def definitions(path: Path):
    return (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(path: Path):
    """Every call in a file, with the dotted text of what is called."""
    return ((n, ast.unparse(n.func)) for n in ast.walk(tree_of(path)) if isinstance(n, ast.Call))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_tests_give_what_they_test_and_patch_no_name_of_the_package_as_a_string(path):
    """A fake is an argument; `setattr("sds3d.x.y", ...)` would only say that there is no such argument."""
    patched = [
        ast.unparse(call)
        for call, name in calls(path)
        if name.rsplit(".", 1)[-1] in ("setattr", "delattr", "patch") and call.args
        for first in [call.args[0]]
        if isinstance(first, ast.Constant | ast.JoinedStr) and "sds3d" in ast.unparse(first)
    ]
    assert not patched


def test_there_is_something_to_read():
    assert {"cameras", "diffusion.noise", "students.scene.field", "distill.core", "export.mesh"} <= set(MODULES)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows(path):
    room = room_of(module_of(path))
    if room in ENTRANCE:
        return
    assert room in ARROWS, f"{name_of(path)} is in a room without arrows; give '{room}' its line in ARROWS"
    strangers = {m for m in own_imports(path) if room_of(m) not in ARROWS[room] | {room}}
    assert not strangers, f"{name_of(path)} imports {sorted(strangers)}; {room} may import {sorted(ARROWS[room])}"


def test_the_arrows_themselves_have_no_circle():
    order: list[str] = []

    def visit(room: str, above: tuple[str, ...]):
        assert room not in above, f"circle: {' -> '.join((*above, room))}"
        if room not in order:
            for below in sorted(ARROWS[room]):
                visit(below, (*above, room))
            order.append(room)

    for room in ARROWS:
        visit(room, ())


def test_modules_have_no_circle():
    """Among all imports, the lazy ones too; a package counts as importing what its __init__ imports."""
    graph = {module: own_imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]):
        assert module not in above, f"circle: {' -> '.join((*above, module))}"
        if module not in done:
            for below in sorted(graph[module]):
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("room", BLIND_TO_DATA)
def test_making_a_scene_never_touches_the_truth(room):
    reached, queue = set(), [m for m in MODULES if room_of(m) == room]
    while queue:
        module = queue.pop()
        if module not in reached:
            reached.add(module)
            queue.extend(own_imports(MODULES[module]))
    assert not {m for m in reached if room_of(m) == "data"}


def test_methods_know_the_core_and_not_each_other():
    families = ("distill.score.", "distill.trajectory.", "distill.adversarial.")
    for method in (m for m in MODULES if m.startswith(families)):
        others = {m for m in own_imports(MODULES[method]) if m.startswith(families)}
        assert not others, f"{method} imports {others}"


def test_the_top_of_the_package_fits_a_screen():
    there = sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")
    assert len(there) <= MOST_AT_THE_TOP, there


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_say_what_they_hold(path):
    """No word that may stand for anything: config, settings, header, mask, fraction ... say what there is."""
    vague = {"told", "asked", "found", "apart", "share", "shares"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None)}
        names |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        assert not names & vague, f"{name_of(path)}:{getattr(node, 'lineno', '?')}: {names & vague}"


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) != "runs/kinds.py"], ids=name_of)
def test_the_kind_of_a_run_is_asked_of_its_record(path):
    kinds = {"Config", "PaintConfig", "DistillConfig", "Asset", "Painting", "Generated"}
    for node, what in calls(path):
        if what in ("isinstance", "issubclass"):
            named = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            named |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            assert not named & kinds, f"{name_of(path)}:{node.lineno}: ask runs/kinds.py what differs between runs"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_load_lazily_and_have_one_home(path):
    name = name_of(path)
    loaded = {m.split(".")[0] for m in imports(path, top_level_only=True, at_run_time=True)}
    heavy = loaded - LIGHT - EAGER.get(name, set())
    assert not heavy, f"{name} imports {sorted(heavy)} when it is imported; import inside the function that needs it"
    for package in {m.split(".")[0] for m in imports(path, at_run_time=True)} & set(HOMES):
        assert name in HOMES[package], f"{name} imports {package}, whose home is {sorted(HOMES[package])}"
    eager = {m for m in own_imports(path, top_level_only=True, at_run_time=True) if name_of(MODULES[m]) in EAGER}
    assert not eager or name in (*EAGER, "__main__.py"), f"{name} imports {sorted(eager)} at its top; make it lazy"


def test_importing_the_package_costs_torch_and_nothing_else():
    program = (
        "import sys, torch; before = set(sys.modules); import sds3d; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) - LIGHT, done.stdout


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name_of(path)} has {lines} lines; move a part of it into a file of its own"
    for node in definitions(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= 60, f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines; split it"
        if any(ast.unparse(decorator).split("(")[0] in ("njit", "triton.jit") for decorator in node.decorator_list):
            continue  # compiled loops take plain arrays, not dataclasses
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls", "ctx")])
        assert count <= 8, f"{name_of(path)}:{node.lineno}: {node.name} takes {count} parameters; make a dataclass"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path):
    empty = path.name == "__init__.py" and not tree_of(path).body
    assert empty or ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_errors_are_never_swallowed(path):
    for node in ast.walk(tree_of(path)):
        bare = isinstance(node, ast.ExceptHandler) and (
            node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        )
        assert not bare, f"{name_of(path)}:{node.lineno}: name the errors that are expected"
    for node, what in calls(path):
        assert not what.endswith("nan_to_num"), f"{name_of(path)}:{node.lineno}: nan_to_num hides the error"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "networks"], ids=name_of)
def test_chance_comes_from_a_generator_that_was_passed_in(path):
    """Networks are exempt: torch's own layers, too, draw their initial weights from the global stream. Who makes one
    may seed that stream, inside fork_rng, which puts it back."""
    forks = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.With) and "fork_rng" in ast.unparse(n.items[0])]
    inside = {id(n) for fork in forks for n in ast.walk(fork)}
    for node, what in calls(path):
        owner, _, function = what.rpartition(".")
        place = f"{name_of(path)}:{node.lineno}: {what}"
        named = {keyword.arg for keyword in node.keywords}
        if (owner == "torch" and function in RANDOM) or (owner != "nn.init" and function in RANDOM_METHODS):
            assert "generator" in named, f"{place} without a generator"
        forbidden = owner == "torch" and function in ("rand_like", "randn_like", "randint_like", "manual_seed", "seed")
        assert not forbidden or id(node) in inside, f"{place} uses the global stream"
        assert owner != "np.random" or function in ("default_rng", "Generator"), f"{place} uses a global stream"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_unpickled(path):
    for node, what in calls(path):
        safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
        bad = what in ("eval", "exec") or what.startswith("pickle.") or (what == "torch.load" and not safe)
        assert not bad, f"{name_of(path)}:{node.lineno}: {what} may run what a file says; weights are safetensors"


def test_nobody_imports_scripts_or_tests():
    for path in FILES:
        outside = {m for m in imports(path) if m.split(".")[0] in ("scripts", "tests", "benchmarks")}
        assert not outside, f"{name_of(path)} imports {outside}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_tests_are_deterministic_and_offline(path):
    networked = {"requests", "urllib", "httpx", "socket", "huggingface_hub"}
    assert not {m.split(".")[0] for m in imports(path)} & networked
    for node, what in calls(path):
        if what.removeprefix("torch.") in RANDOM and what.startswith("torch."):
            named = {keyword.arg for keyword in node.keywords}
            assert "generator" in named, f"{path.name}:{node.lineno}: {what} without a generator"

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
# teachers by their interface only, and anybody with images or figures may draw them. Arrows point from a room to what
# its files may import.
OWN_ROOMS = {"teachers.base", "teachers.drawing", "export.sheet", "export.chart"}
SCORE = {"teachers.base", "samplers", "guidance", "prompts", "noise", "times", "ramp", "cameras", "students"}
SCORE |= {"transfer", "shares", "tensor_files", "teachers.drawing", "draws", "ranges"}
ARROWS = {
    "errors": set(),
    "files": set(),
    "tensor_files": set(),
    "picture": set(),
    "plain_yaml": {"files"},
    "ranges": set(),
    "ramp": {"ranges"},
    "transfer": set(),
    "draws": {"prompts", "transfer"},
    "shares": set(),
    "memory": set(),
    "threads": set(),
    "modes": set(),
    "cameras": {"transfer", "ranges"},
    "typed": {"ramp", "ranges"},
    "noise": set(),
    "times": {"noise", "ramp", "ranges"},
    "guidance": {"ranges"},
    "prompts": {"cameras"},
    "samplers": {"noise", "transfer"},
    "students": {"cameras", "shares"},
    "networks": {"cameras", "prompts"},
    "ops": set(),
    "data": {"cameras", "files", "picture", "prompts"},
    "scenes": {"ops", "cameras", "picture", "prompts", "ramp", "ranges", "students", "transfer"},
    "generators": {"networks", "draws", "noise", "ramp", "ranges", "shares", "students", "transfer"},
    "teachers.base": {"noise", "cameras", "ranges"},
    "teachers.drawing": {"teachers.base", "draws", "samplers", "guidance", "noise", "cameras", "transfer", "modes"},
    "teachers": SCORE - {"students"} | {"networks", "data", "errors", "files", "export.sheet", "export.chart", "modes"},
    "pairs": SCORE | {"files"},
    "critics": SCORE | {"networks"},
    "adversary": SCORE | {"networks", "critics"},
    "perceptual": SCORE | {"critics"},
    "query": SCORE,
    "distill": SCORE | {"pairs", "query"},
    "runs": {"files", "picture", "ramp", "tensor_files"},
    "train": {"distill", "critics", "pairs", "scenes", "generators", "runs", "ramp", "students", "transfer", "shares"}
    | {"memory", "modes", "errors", "ranges"},
    "export.sheet": {"files", "cameras"},
    "export.chart": {"files"},
    "export": {"files", "export.sheet", "export.chart", "scenes", "cameras"},
    "metrics": {"scenes", "cameras", "networks"},
}
# They see the house from outside and may enter any room.
ENTRANCE = {"__init__", "__main__", "asset", "cli", "compare", "config", "doctor", "launch", "make", "options"}
ENTRANCE |= {"estimate", "evaluation", "generated", "live", "painting", "progress", "report", "savings", "settings"}
# What making a scene needs; the toybox's truth stays out of it, along whole chains of imports.
BLIND_TO_DATA = ("scenes", "generators", "students", "distill", "critics", "pairs", "ops", "train", "export")
BLIND_TO_DATA += ("adversary", "perceptual")

LIGHT = {"torch", "numpy", "sds3d"} | set(sys.stdlib_module_names)
HOMES = {  # package -> the only files that may import it
    "yaml": {"plain_yaml.py"},
    "diffusers": {"teachers/hf/generator.py", "teachers/hf/loading.py", "teachers/hf/sketch.py"},
    "transformers": {"teachers/hf/loading.py", "teachers/hf/sketch.py"},
    "huggingface_hub": {"teachers/hf/loading.py", "teachers/hf/sketch.py"},
    "peft": {"teachers/hf/adapter.py"},
    "numba": {"ops/numba_cpu.py", "ops/numba_kernels.py"},
    "nerfacc": {"ops/nerfacc_cuda.py"},
    "tinycudann": {"ops/tcnn_cuda.py"},
    "triton": {"ops/triton_gpu.py", "ops/triton_kernels.py"},
    "xatlas": {"export/texture.py"},
    "fast_simplification": {"export/mesh.py"},
    "trimesh": {"export/formats.py", "data/toybox.py"},
    "skimage": {"export/mesh.py", "data/toybox.py"},
    "imageio_ffmpeg": {"export/video.py"},
    "matplotlib": {"export/chart.py"},
    "typer": {
        f"cli/{name}.py"
        for name in ("__init__", "generators", "live", "methods", "pictures", "scenes", "shared", "teacher")
    },
    "sklearn": {"data/digits.py"},
    "viser": {"live/stage.py"},
    "lpips": {"perceptual.py"},
    "torch_fidelity": {"metrics/inception.py"},
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
    """sds3d/scenes/field.py -> scenes/field.py"""
    return path.relative_to(PACKAGE).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """sds3d/scenes/field.py -> scenes.field; a package's __init__ is the package, sds3d's own is __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    return module if module in OWN_ROOMS else module.split(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names a file imports at run time: modules, and what is taken from them."""
    found, queue = set(), list(tree_of(path).body)
    while queue:
        node = queue.pop()
        if is_type_checking(node) or (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        queue.extend(ast.iter_child_nodes(node))
    return found


def own_imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules of this package that a file imports, as `scenes.field`."""
    found = set()
    for name in imports(path, top_level_only):
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


def test_there_is_something_to_read():
    assert {"cameras", "noise", "scenes.field", "distill.core", "export.mesh"} <= set(MODULES)


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
    methods = [m for m in MODULES if m.startswith("distill.") and m != "distill.core"]
    for method in methods:
        others = {m for m in own_imports(MODULES[method]) if room_of(m) == "distill"} - {"distill.core"}
        assert not others, f"{method} imports {others}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_packages_load_lazily_and_have_one_home(path):
    name = name_of(path)
    heavy = {m.split(".")[0] for m in imports(path, top_level_only=True)} - LIGHT - EAGER.get(name, set())
    assert not heavy, f"{name} imports {sorted(heavy)} when it is imported; import inside the function that needs it"
    for package in {m.split(".")[0] for m in imports(path)} & set(HOMES):
        assert name in HOMES[package], f"{name} imports {package}, whose home is {sorted(HOMES[package])}"
    eager = {m for m in own_imports(path, top_level_only=True) if name_of(MODULES[m]) in EAGER}
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

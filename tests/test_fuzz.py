"""Command lines, settings and config files that nobody thought of: never a traceback, never a hang.

The cases are made from the real schema: right keys and nearly right ones, with values of every wrong kind. What is
accepted must load, print and read back as itself.
"""

import contextlib
import io
import os
from datetime import timedelta

import pytest
from conftest import PATIENCE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sds3d.cli import main
from sds3d.config import load as configs
from sds3d.config import plain_yaml
from sds3d.config.typed import keys
from sds3d.distill.score import METHODS

KINDS = {"generate": configs.Config, "paint": configs.PaintConfig, "distill": configs.DistillConfig}
KEYS = sorted(
    {key for kind in KINDS.values() for key in keys(kind)}
    | {key for method in METHODS.values() for key in keys(method, "method")}
    | {"optim.lr.grid", "optim.clip.mlp", "method.name", "prompt", "nonsense", "render.", ".", "a" * 3000}
)
WORDS = (
    "",
    "null",
    "~",
    "true",
    "no",
    "nan",
    ".nan",
    ".inf",
    "-.inf",
    "1e30",
    "-1e30",
    "1e400",
    "1:30",
    "0x10",
    "010",
    "1_000",
    "1e-30",
    "9" * 5000,
    "-1",
    "0",
    "1",
    "3.5",
    "sds",
    "vsd",
    "auto",
    "cpu",
    "meta",
    "cuda:99",
    "~nouser/x",
    "/dev/null",
    "/dev/zero",
    "x" * 5000,
    "a/" * 3000,
    "a\0b",
    "\udcff",
    "\x85",
    "\ufeff",
    "${steps}",
    "${part:0.5}",
    "${part:1e9}",
    "${oc.env:HOME}",
    "\\${steps}",
    "${",
    "[" * 2000,
    "{a: " * 500,
    "&a [*a]",
    "*a",
    "!!int 3",
    "<<: {steps: 3}",
    "!!python/name:os.system",
    "[1,2",
    "{}",
    "[]",
    "[[0,64],[9,128]]",
    "[0,1,2,3]",
    "[nan,1]",
    "2001-01-01",
    "'",
    '"',
    "# x",
    "--- a",
    "- - 1",
    "{1: 2}",
    "? [1]",
    "a=b",
    "%x",
    "\t",
    "été",
    "红色",
)
scalars = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.integers(-(10**40), 10**40).map(str),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4).map(lambda parts: f"[{', '.join(parts)}]"), max_leaves=6
) | st.builds("{{{}: {}}}".format, st.sampled_from(KEYS).map(lambda key: key[-12:]), scalars)
overrides = st.builds("{}={}".format, st.sampled_from(KEYS), values) | scalars
flags = st.builds(
    lambda name, value: [name, value],
    st.sampled_from(
        [
            "--seed",
            "--method",
            "--teacher",
            "--device",
            "-o",
            "--config",
            "--negative",
            "-n",
            "--start",
            "--backend",
            "--prompts",
            "--sampling-steps",
            "--port",
            "--host",
            "--teacher-views",
            "--nonsense",
        ]
    ),
    scalars,
)
commands = st.builds(
    lambda command, prompt, more, texts: [
        command,
        *([] if command == "distill" else [prompt]),
        *(part for flag in more for part in flag),
        *texts,
    ],
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["a ball", "", " ", "a ball ${steps}"]) | st.text(max_size=20),
    st.lists(flags, max_size=2),
    st.lists(overrides, max_size=3),
)
others = st.builds(
    lambda command, texts: [*command.split(), *texts],
    st.sampled_from(
        [
            "",
            "export",
            "render",
            "resume",
            "eval",
            "sample",
            "gallery --json",
            "view",
            "doctor --device",
            "doctor --memory",
            "methods",
            "teacher",
            "teacher words --teacher",
            "teacher train",
            "compare",
            "studio --host",
            "studio --port",
            "export x --level",
            "render x -f",
            "render x --fps",
        ]
    ),
    st.lists(scalars.filter(lambda text: text not in ("", "toybox", "digits", "/dev/zero")), min_size=1, max_size=3),
)
lines = st.builds("{}: {}".format, st.sampled_from(KEYS), values)
nested = st.builds(
    lambda section, parts: f"{section}: {{{', '.join(parts)}}}",
    st.sampled_from(sorted({key.partition(".")[0] for key in KEYS})),
    st.lists(lines.map(lambda x: x[-60:]), max_size=2),
)
files = st.one_of(
    st.lists(lines | nested, max_size=4).map("\n".join),
    st.text(max_size=60),
    st.builds("{0}: &x {1}\n{2}: *x\n".format, st.sampled_from(KEYS), values, st.sampled_from(KEYS)),
)


def ran(arguments: list[str]) -> None:
    """Run a command line in this process. It ends with a known code, and says at most one line about what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(arguments)
    code, said = end.value.code or 0, err.getvalue()
    assert code in (0, 1, 2) and "Traceback" not in said, (arguments, said)
    if code and arguments not in ([], ["teacher"]):  # which print their help
        assert said.count("\n") == 1 and said.startswith("error: ") and len(said) < 1100, (arguments, said)


def loaded(text: str, kind: type) -> None:
    """A config file is refused with one line, or what it gives reads back as itself."""
    path = "config.yaml"
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
    try:
        config = configs.load("a ball", file=path, kind=kind)
    except ValueError as error:
        assert len(str(error)) < 20_000
        return
    written = configs.to_yaml(config)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(written)
    assert configs.load(None, file=path, kind=kind) == config
    assert plain_yaml.read(written)["steps"] == config.steps


def many(count: int) -> settings:
    """How many examples; each within minutes, which only a hang takes. The same ones every time."""
    allowed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        deadline=timedelta(seconds=PATIENCE),
        suppress_health_check=allowed,
        derandomize=True,
        database=None,
    )


@pytest.fixture
def closed(in_folder, monkeypatch):
    """An empty folder, in which nothing is trained, drawn or served."""
    from sds3d.cli import live, teacher
    from sds3d.evaluate import comparison
    from sds3d.runs import launch

    def refuse(*_, **__):
        raise ValueError("nothing is made here")

    monkeypatch.setattr(launch, "check", lambda config, teacher: None)
    makers = ((launch, "start"), (launch, "prepare"), (comparison, "compare"), (live, "staging"), (teacher, "_prepare"))
    for place, name in makers:
        monkeypatch.setattr(place, name, refuse)
    return in_folder


def fuzz_runs(command):
    ran([*command, "--dry-run"])


def fuzz_others(command):
    ran(command)


def fuzz_files(kind, text):
    loaded(text, KINDS[kind])


CASES = {
    "runs": (
        fuzz_runs,
        {"command": commands},
        170,
        [
            {"command": ["generate", "a ball", text]}
            for text in (
                "render=1",
                "render=null",
                "method={name: [a]}",
                "field.hidden=1e30",
                "out=~nouser/x",
                f"out={'x' * 5000}",
                "time.mean=.nan",
                "critic.weight_decay=-.inf",
                "optim.eps=.inf",
                "field.blob_strength=1e308",
                "regularise.lambda_sparsity=-1",
                "source.run=${oc.env:HOME}",
                "steps=1:30",
                "steps=0x10",
                "device=meta",
            )
        ],
    ),
    "other commands": (
        fuzz_others,
        {"command": others},
        100,
        [
            {"command": command}
            for command in (
                ["doctor", "--memory", "inf"],
                ["resume", "x", "steps=x"],
                ["render", "x", "-f", "mp4,mp4"],
                ["teacher", "train", "digits", "-o", "/dev/null"],
                ["teacher", "train", "toybox", "size=13"],
                ["studio", "--host", ""],
                ["export", "x", "--level", "1e30"],
            )
        ],
    ),
    "files": (
        fuzz_files,
        {"kind": st.sampled_from(sorted(KINDS)), "text": files},
        230,
        [
            {"kind": "generate", "text": text}
            for text in (
                "render: null",
                "pairs: {count: 1e30}",
                "a: " + "[" * 5000,
                "a: &a [*a]",
                "source: {run: '${oc.env:HOME}'}",
            )
        ],
    ),
}


def fuzzed(case: str, times: int) -> None:
    test, strategies, count, examples = CASES[case]
    wrapped = given(**strategies)(test)
    for one in examples:
        wrapped = example(**one)(wrapped)
    many(count * times)(wrapped)()


@pytest.mark.parametrize("case", CASES)
def test_500_cases_are_answered(case, closed):
    fuzzed(case, 1)
    assert set(os.listdir(closed)) <= {"config.yaml", "outputs"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_5000_cases_are_answered(case, closed):
    fuzzed(case, 10)

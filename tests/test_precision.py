"""Half precision: what is trained learns as in float32, and an answer depends on nobody who asked before."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import TEST_DTYPE
from conftest import settings as tiny_scene
from PIL import Image
from safetensors.torch import load_file

from sds3d.config.load import DistillConfig, PaintConfig, load
from sds3d.data import digits
from sds3d.distill.adversarial.generator_loss import Adversarial
from sds3d.distill.critics import CriticConfig
from sds3d.distill.discriminators import TrainedDiscriminator
from sds3d.distill.score import METHODS
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.prompts import VIEW_WORDS
from sds3d.runs import launch
from sds3d.students.base import Draw
from sds3d.teachers import small
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.load import load_teacher

HALF = ("bfloat16", "float16")
PROMPTS = {"digits": ["digit three", "digit seven"], "sd": ["a red mug", "a blue ball"]}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny pipelines by name."""
    return {name: tiny_pipelines.build(name, tmp_path_factory.mktemp(name)) for name in ("sd", "ddpm")}


@pytest.fixture
def fresh(folders, tmp_path):
    """A teacher that has met no prompt: "digits", or a tiny pipeline, with an empty cache of its own."""

    def load(name: str, dtype: str, cache: str = "kept"):
        hf = HFConfig(cache=str(tmp_path / cache)) if name in folders else HFConfig()
        return load_teacher(TeacherConfig(str(folders.get(name, name)), "words", dtype, hf=hf), "cpu")

    return load


def adversary(teacher, prompts: list[str]) -> TrainedDiscriminator:
    """A discriminator of bright and dark images, at the README's rates."""

    def real(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
        x = 0.3 * torch.randn((count, *teacher.shape), generator=generator) + 1
        return x, [prompts[i % len(prompts)] for i in range(count)]

    return TrainedDiscriminator(teacher, CriticConfig("copy", lr=1e-4), seeded(), real, 1e-2)


def moves_of_the_head(teacher, prompts: list[str], fits: int = 15) -> torch.Tensor:
    """How far every weight of the head has gone, (N,), after so many fits to the same draws."""
    critic = adversary(teacher, prompts)
    start = [p.detach().clone() for p in critic.head.parameters()]
    for step in range(fits):
        x = 0.3 * torch.randn((8, *teacher.shape), generator=seeded(step)) - 1
        critic.fit(Draw(x, [prompts[0]] * 8, None, torch.arange(8), encoded=True), seeded(100 + step))
    ends = critic.head.parameters()
    return torch.cat([(end - first).abs().flatten() for first, end in zip(start, ends, strict=True)]).detach()


@pytest.mark.network
def test_what_is_left_to_auto_is_the_same_on_every_machine(fresh):
    assert TEST_DTYPE in ("float32", "bfloat16")
    assert {fresh(name, "auto").dtype for name in ("digits", "sd")} == {getattr(torch, TEST_DTYPE)}


# the discriminator


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [("sd", "bfloat16"), ("sd", "float16"), ("digits", "bfloat16")])
def test_a_discriminator_s_head_learns_as_in_float32(name, dtype, fresh):
    exact, found = (moves_of_the_head(fresh(name, of), PROMPTS[name]) for of in ("float32", dtype))
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert float((found > 0).float().mean()) > 0.99
    assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=0.2)


@pytest.mark.parametrize("name, dtype", [("sd", "bfloat16"), ("sd", "float16"), ("digits", "bfloat16")])
def test_a_generator_s_slope_from_a_verdict_is_that_of_float32(name, dtype, fresh):
    """Through the whole network, where float16 could lose it: nothing below 6e-8, nothing above 65,504."""
    slopes = []
    for of in ("float32", dtype):
        teacher = fresh(name, of)
        x = torch.randn((4, *teacher.shape), generator=seeded(1)).requires_grad_()
        draw = Draw(x, PROMPTS[name] * 2, None, torch.arange(4), encoded=True)
        Adversarial(adversary(teacher, PROMPTS[name]), 3e-3)(draw, 0, seeded(2)).loss.backward()
        slopes.append(x.grad.flatten())
    exact, found = slopes
    assert torch.cosine_similarity(exact, found, dim=0) > 0.99
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_features_come_in_float32(dtype, fresh):
    for name in ("digits", "sd"):
        if (name, dtype) == ("digits", "float16"):
            continue  # which is for pipelines
        teacher = fresh(name, dtype)
        x, t = torch.randn((2, *teacher.shape), generator=seeded()), torch.tensor([0.3, 0.8])
        maps = teacher.features(teacher.network, x, t, PROMPTS[name])
        assert {one.dtype for one in maps} == {torch.float32} and maps[-1].shape[1] == teacher.feature_width


def test_the_command_line_s_dmd2_runs_in_bfloat16(call_packaged):
    code, _, err = call_packaged(
        *"distill --teacher digits --method dmd2 teacher.dtype=bfloat16 steps=2 generator.batch=8".split(),
        *"critic.steps=1 log.picture_every=0 device=cpu".split(),
    )
    assert code == 0, err


# prompts


def questions(teacher, prompts: list[str]) -> dict:
    """Every way to ask a teacher, by name; each gives one tensor."""
    x, t = torch.randn((2, *teacher.shape), generator=seeded()), torch.tensor([0.3, 0.8])

    def under(dtype: torch.dtype) -> torch.Tensor:
        with torch.autocast("cpu", dtype):
            return teacher.predict(x, t, prompts).output

    def inference() -> torch.Tensor:
        with torch.inference_mode():
            return teacher.predict(x, t, prompts).output

    return {
        "predict": lambda: teacher.predict(x, t, prompts).output,
        "answer": lambda: teacher.answer(teacher.network, x, t, prompts).output.detach(),
        "features": lambda: teacher.features(teacher.network, x, t, prompts)[-1].detach(),
        "predict in inference mode": inference,
        "predict under bfloat16": lambda: under(torch.bfloat16),
        "predict under float16": lambda: under(torch.float16),
    }


def numbers(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes in a file; those of the file's own head have no fixed order."""
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype", [("digits", "float32"), ("digits", "bfloat16"), *(("sd", d) for d in ("float32", *HALF))]
)
def test_an_answer_does_not_depend_on_what_was_asked_before(name, dtype, fresh, tmp_path):
    """Each question first of all, then the others, of a teacher that has met no prompt; the disk's bytes too."""
    answers, disks = {}, []
    for first in questions(fresh(name, dtype), PROMPTS[name]):
        teacher = fresh(name, dtype, f"cache of {first}")
        asked = questions(teacher, PROMPTS[name])
        for way in (first, *(other for other in asked if other != first)):
            found = asked[way]()
            assert torch.equal(found, answers.setdefault(way, found)), f"{way}, after {first} met the prompts"
        kept = tmp_path / f"cache of {first}"
        disks.append({path.name: numbers(path) for path in kept.iterdir()} if kept.exists() else {})
        x = torch.zeros((2, *teacher.shape), requires_grad=True)  # and what was kept may be trained through
        teacher.answer(teacher.network, x, torch.tensor([0.3, 0.8]), PROMPTS[name]).output.sum().backward()
    assert all(disk == disks[0] for disk in disks) and bool(disks[0]) == (name == "sd")
    for way in ("in inference mode", "under bfloat16", "under float16"):
        assert torch.equal(answers[f"predict {way}"], answers["predict"])


# going on


FOR_GENERATORS = ("vsd", "diffinstruct", "dmd", "dmd2")
RUNS = [
    *(("scene", name) for name in METHODS if name == "vsd" or name not in FOR_GENERATORS),
    ("words", "vsd"),  # whose critic is told the camera by a network of its own
    *(("image", name) for name in ("sds", "vsd")),
    *((kind, name) for kind in ("generator", "pipeline") for name in FOR_GENERATORS),
]


@pytest.fixture(scope="module")
def tiny_teachers(folders, tmp_path_factory) -> dict[str, Path]:
    """Untrained teachers, of scenes and images, of the digits, and a pipeline; and pictures of what it draws."""
    folder, made = tmp_path_factory.mktemp("teachers"), {"pipeline": folders["sd"]}
    made["pictures"] = folder / "pictures"
    made["pictures"].mkdir()
    Image.new("RGB", (20, 20), (200, 20, 30)).save(made["pictures"] / "one.png")
    (made["pictures"] / "one.txt").write_text("a red mug")
    told = ("a", "red", "ball", "ugly", *sorted({word for view in VIEW_WORDS for word in view.split()}))
    numbers = digits.pictures().vocabulary()
    for name, channels, cameras, words in (("scene", 3, True, told), ("generator", 1, False, numbers)):
        sizes = UNetConfig((8, 8), (1,), 8, 8, heads=2, size=8, channels=channels, fold=1, cameras=cameras)
        networks, made[name] = (UNet(sizes), TextEncoder(words, 8)), folder / f"{name}.safetensors"
        for network in networks:
            for weights in network.parameters():
                weights.data = 0.3 * torch.randn(weights.shape, generator=seeded(len(made)))
        small.save(made[name], *networks, words, [f"a handwritten {number}" for number in digits.NAMES])
    return made


def run_config(kind: str, method: str, teachers: dict[str, Path], **more):
    """A run of four steps in bfloat16, of a second."""
    told = {"method": method, "steps": 4, "device": "cpu", "teacher.dtype": "bfloat16", **more}
    told["teacher.name"] = str(teachers[kind if kind in teachers else "scene"])
    told |= {"log.picture_every": 0, "log.save_every": 100}
    if kind in ("generator", "pipeline"):
        told |= {"generator.batch": 8, "pairs.count": 8, "pairs.batch": 8, "pairs.steps": 1, "critic.steps": 1}
        if kind == "pipeline":
            told |= {"prompt": "a red mug", "teacher.hf.cache": "kept"}
        if method == "dmd2":
            told["real"] = "digits" if kind == "generator" else str(teachers["pictures"])
        return load(None, told, kind=DistillConfig)
    if kind == "words":
        told["teacher.views"] = "words"
    if method in ("bridge", "nfsd"):
        told["negative"] = "ugly"
    if method == "vsd":
        told["critic.rank"] = 2  # of a network whose layers are 8 wide
    if kind == "image":
        return load("a red ball", told | {"image.size": 8}, kind=PaintConfig)
    return load("a red ball", tiny_scene() | told)


def all_tensors(state, name: str = "") -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by its place there."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for part, one in parts for key, value in all_tensors(one, f"{name}/{part}").items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), RUNS, ids=lambda value: value)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(kind, method, tiny_teachers, in_folder):
    more = {}
    if method == "dds":
        source, steps = launch.start(run_config(kind, "sds", tiny_teachers))
        list(steps)
        more = {"source.run": str(source.path), "source.prompt": "a red ball", "negative": "ugly"}
    config = run_config(kind, method, tiny_teachers, **more)
    for _ in launch.prepare(config):
        pass
    whole, steps = launch.start(config)
    assert len(list(steps)) == 4
    stopped, steps = launch.start(config)
    next(steps), next(steps)
    steps.close()
    stopped, steps = launch.resume(stopped.path)
    assert [step.step for step in steps] == [3, 4]
    ours, theirs = (all_tensors(made.run.load_checkpoint()) for made in (stopped, whole))
    assert ours.keys() == theirs.keys() and len(ours) > 3
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

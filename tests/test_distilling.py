"""Distilling the digits teacher end to end, in a few steps: files, resuming, sampling, judging, and what is refused."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import sds3d
from sds3d.config import load as configs
from sds3d.config.load import DistillConfig, load
from sds3d.config.recipes import recipes_folder
from sds3d.distill.core import Method
from sds3d.distill.score import METHODS
from sds3d.distill.score.diffinstruct import DiffInstruct
from sds3d.evaluate import generator as evaluation
from sds3d.runs import build, generator_parts, kinds, launch
from sds3d.runs import generator as generated
from sds3d.runs.folder import Run
from sds3d.runtime import tensor_files
from sds3d.students.generator import FewStepGenerator
from sds3d.teachers import small
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.load import load_teacher
from sds3d.train import train

TINY = {
    "steps": 4,
    "generator.batch": 8,
    "log.save_every": 2,
    "log.picture_every": 2,
    "pairs.count": 8,
    "pairs.batch": 4,
    "pairs.steps": 2,
    "critic.steps": 1,
}
FOR_GENERATORS = ("vsd", "diffinstruct", "dmd", "dmd2")


@pytest.fixture(scope="module")
def teacher():
    return small.load(small.packaged("digits"), "words")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("method", FOR_GENERATORS)
def test_every_method_for_generators_trains_one_that_loads(in_folder, method):
    made = sds3d.train_generator(method=method, **TINY)
    files = {path.name for path in made.path.iterdir()}
    assert {"generator.safetensors", "README.md", "grid.png", "config.yaml", "metrics.jsonl", "progress"} <= files
    card = (made.path / "README.md").read_text()
    for said in ("digits", METHODS[method].__name__, "sds3d distill --teacher digits", "load_generator"):
        assert said in card
    rows = made.run.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(math.isfinite(row["loss"]) for row in rows)
    generator = sds3d.load_generator("outputs")  # the newest run there
    images = generator(["a handwritten two"] * 3, seed=1)
    assert images.shape == (3, 3, 8, 8) and 0 <= images.min() and images.max() <= 1
    trained = made.student.means[0].module.state_dict()
    for name, weights in generator._teacher.network.state_dict().items():
        assert torch.allclose(weights, trained[name], atol=2e-3, rtol=1e-3), name  # float16 on disk


@pytest.mark.slow
@pytest.mark.network
def test_an_interrupted_distillation_ends_bit_for_bit_as_an_uninterrupted_one(in_folder):
    whole = sds3d.train_generator(method="dmd2", **TINY)
    made, steps = launch.start(load(None, {**TINY, "method": "dmd2"}, kind=DistillConfig))
    for step in steps:
        if step.step == 3:
            break
    steps.close()
    made, steps = launch.resume(made.path)
    assert [step.step for step in steps] == [4]
    for part in ("network", "means"):
        ours, theirs = (run.student.state_dict()[part] for run in (made, whole))
        ours, theirs = (x if isinstance(x, list) else [x] for x in (ours, theirs))
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_a_checkpoint_of_another_teacher_is_refused_with_both_named(in_folder, teacher):
    made = sds3d.train_generator(**TINY)
    small.save(in_folder / "other.safetensors", teacher.unet, teacher.text, teacher.vocabulary, teacher.prompts[:3])
    other = small.load(in_folder / "other.safetensors")
    text = made.run.config.read_text().replace("name: digits", f"name: {in_folder / 'other.safetensors'}")
    made.run.write_text(made.run.config, text)
    with pytest.raises(ValueError, match=f"digits {teacher.fingerprint}.*other.safetensors {other.fingerprint}"):
        launch.resume(made.path)
    with pytest.raises(ValueError, match="was distilled from digits"):
        evaluation.judge_generator(made.path, 600, 1)


@dataclass(frozen=True)
class Direct(Method):
    """A regression on pairs alone."""

    NEEDS: ClassVar[tuple[str, ...]] = ("pairs",)

    scale: float = 1.0
    regression: float = 1.0


@pytest.mark.slow
@pytest.mark.network
def test_a_method_without_a_score_or_a_critic_trains_by_its_regression_alone(in_folder, monkeypatch):
    monkeypatch.setitem(METHODS, "direct", Direct)
    monkeypatch.setattr(FewStepGenerator, "draw", lambda *_: pytest.fail("nobody needs a draw"))
    layer = {**TINY, "steps": 24, "pairs.batch": 8, "pairs.steps": 4, "distance": "pixels", "optim.lr.generator": 1e-3}
    layer |= {"log.save_every": 24, "log.picture_every": 24, "pairs.sampler": "ddim"}
    made = sds3d.train_generator(method="direct", **layer)
    rows, state = made.run.rows(), made.run.load_checkpoint()
    assert set(rows[0]) - {"memory"} == {"step", "seconds", "loss", "distance", "grad/generator"}
    distances = [row["distance"] for row in rows]
    # Seeds 0, 1 and 2 come to 0.39, 0.19 and 0.32: what seed 0 reaches and three standard deviations between them.
    assert sum(distances[-6:]) < 0.69 * sum(distances[:6]), distances
    assert state["companions"] == {}
    with pytest.raises(ValueError, match="Direct needs pairs: it trains generators"):
        build.build_critic(load("a red mug", {"method": "direct"}), None)


@pytest.mark.slow
@pytest.mark.network
def test_a_generator_that_becomes_its_own_teacher_resumes_bit_for_bit(tmp_path):
    """In the middle of its second phase, with a LoRA, which is a change to the teacher's network."""
    layer = {**TINY, "method": "vsd", "critic.kind": "lora", "generator.steps": 2, "steps": 6}
    config = load(None, layer, kind=DistillConfig)

    def begin(run, resume=False):
        teacher = build.build_teacher(config)
        student, critic = build.build_student(config, teacher), build.build_critic(config, teacher)
        goals = build.build_objectives(build.build_objective(config, teacher, critic), config, student)
        plan = replace(config.plan(), phase_steps=3, save_every=100)
        return student, train(student, goals, plan, run, resume, companions={"critic": critic})

    whole, parted = (Run.create(tmp_path, "x", "") for _ in range(2))
    straight, steps = begin(whole)
    list(steps)
    _, steps = begin(parted)
    assert [next(steps).step for _ in range(5)] == [1, 2, 3, 4, 5]
    steps.close()
    resumed, steps = begin(parted, resume=True)
    assert [step.step for step in steps] == [6]
    ours, theirs = (dict(leaves(run.load_checkpoint())) for run in (parted, whole))
    assert ours.keys() == theirs.keys() and any("teacher_network" in name for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert not torch.equal(straight.teacher.network.last.bias, build.build_teacher(config).network.last.bias)


def leaves(state, name=""):
    """The tensors of a state by their names."""
    if torch.is_tensor(state):
        yield name, state
    for key, value in enumerate(state) if isinstance(state, list) else state.items() if isinstance(state, dict) else ():
        yield from leaves(value, f"{name}.{key}")


class Denoising(DiffInstruct):
    """As if what it trains were a denoiser still."""

    DENOISER = True


@pytest.mark.slow
def test_a_generator_that_answers_as_a_denoiser_is_the_next_run_s_teacher(in_folder, monkeypatch):
    monkeypatch.setitem(METHODS, "denoising", Denoising)
    made = sds3d.train_generator(method="denoising", **TINY)
    file = str(made.path / "generator.safetensors")
    again = load_teacher(TeacherConfig(file))
    trained = made.student.means[0].module.state_dict()
    assert all(torch.allclose(again.network.state_dict()[k], v, atol=2e-3, rtol=1e-3) for k, v in trained.items())
    after = sds3d.train_generator(**TINY, **{"teacher.name": file})
    assert after.student.identity == f"generator.safetensors {again.fingerprint}" and after.student.prompts
    for name in (str(after.path / "generator.safetensors"), str(unsaid(made.path))):
        with pytest.raises(ValueError, match=f"{name} is a generator, which paints by itself"):
            load_teacher(TeacherConfig(name))
    assert sds3d.load_generator(unsaid(made.path))(["a handwritten two"]).shape == (1, 3, 8, 8)


def unsaid(folder):
    """A generator's file as older versions wrote it, without a word about denoising."""
    tensors, header = tensor_files.read(folder / "generator.safetensors")
    kept = {key: value for key, value in header.items() if key != "denoiser"}
    assert json.loads(header["denoiser"]) is True
    (folder / "older.safetensors").write_bytes(tensor_files.to_bytes(tensors, kept))
    return folder / "older.safetensors"


# what it learns from


def test_real_images_are_told_as_the_generator_is(in_folder, teacher):
    def draw(**layer):
        return generator_parts.real(load(None, {"method": "dmd2", **layer}, kind=DistillConfig), teacher)

    x, told = draw()(64, torch.Generator().manual_seed(0))
    assert set(told) == set(teacher.prompts) and x.shape == (64, 1, 8, 8)
    fours = evaluation.digits.pictures()[(evaluation.digits.labels() == 4).nonzero()[:, 0].tolist()]
    x, told = draw(prompt="four")(32, torch.Generator().manual_seed(0))
    assert set(told) == {"four"}
    known = teacher.encode(fours.rgb())
    assert bool((x[:, None] == known).flatten(2).all(-1).any(-1).all())
    with pytest.raises(ValueError, match="no real image is captioned 'digit seven'"):
        draw(prompt="digit seven")
    with pytest.raises(ValueError, match="DMD2 needs real images; give real=FOLDER"):
        draw(**{"teacher.name": "toybox"})


def test_pairs_of_other_settings_have_folders_of_their_own(teacher):
    def place(**layer):
        return generator_parts.pairs_folder(load(None, {"method": "dmd", **layer}, kind=DistillConfig), teacher)

    assert place() == place(seed=3)
    half = small.load(small.packaged("digits"), "words", dtype=torch.bfloat16)
    layer = {"method": "dmd", "teacher.dtype": "bfloat16"}
    other = generator_parts.pairs_folder(load(None, layer, kind=DistillConfig), half)
    others = [place(), place(prompt="four"), place(**{"method.scale": 2}), place(**{"pairs.steps": 9}), other]
    assert len(set(others)) == 5
    assert other != place(
        **{"teacher.dtype": "bfloat16"}
    )  # what the teacher computes in counts, not what was asked for


@pytest.mark.slow
def test_pairs_of_one_precision_are_not_used_by_a_run_in_another(in_folder):
    for dtype in ("float32", "bfloat16"):
        sds3d.train_generator(method="dmd", **{**TINY, "teacher.dtype": dtype})
    folders = sorted((in_folder / "outputs/pairs").iterdir())
    told = [json.loads((folder / "pairs.json").read_text())["dtype"] for folder in folders]
    assert sorted(told) == ["bfloat16", "float32"]
    with pytest.raises(ValueError, match="holds pairs made with dtype="):
        sds3d.train_generator(method="dmd", **{**TINY, "teacher.dtype": told[1], "pairs.folder": str(folders[0])})


def test_images_do_not_depend_on_how_many_are_drawn_at_a_time(in_folder):
    sds3d.train_generator(**{**TINY, "generator.steps": 2})
    generator = sds3d.load_generator("outputs")
    prompts = ["a handwritten one", "a handwritten two"] * 3
    assert torch.equal(generator(prompts, seed=3, batch=2), generator(prompts, seed=3))
    assert not torch.allclose(generator(prompts, seed=3), generator(prompts, seed=4), atol=1e-2)
    assert not torch.allclose(generator(prompts, seed=3, steps=1), generator(prompts, seed=3), atol=1e-3)
    with pytest.raises(ValueError, match="steps is 3; this generator paints in 2 or fewer"):
        generator(prompts, steps=3)
    with pytest.raises(ValueError, match="does not know 'sevn'.*seven"):
        generator(["a handwritten sevn"])


@pytest.mark.slow
def test_fewer_steps_are_the_first_of_its_times(in_folder):
    made = sds3d.train_generator(**{**TINY, "generator.steps": 4})
    generator, teacher = sds3d.load_generator("outputs", dtype="float32"), load_teacher(made.config.teacher)
    assert json.loads(generator._teacher.header["times"]) == made.student.times.tolist() == generator.times.tolist()
    asked, answer = [], generator._teacher.answer

    def note(network, x_t, t, prompts):
        asked.append(float(t[0]))
        return answer(network, x_t, t, prompts)

    generator._teacher.answer = note
    for steps in (1, 2, 3, 4):
        asked.clear()
        generator(["a handwritten two"], steps=steps)
        assert asked == pytest.approx(made.student.times[:steps].tolist())
    told = {key: value for key, value in generator._teacher.header.items() if key != "times"}
    assert generated.LoadedGenerator(teacher, told).times.tolist() == generator.times.tolist()  # of an older file
    for bad in ("[0.5]", "[0.1, 0.2, 0.3, 0.4]"):
        with pytest.raises(ValueError, match="not 4 decreasing numbers above 0, up to 1.; train it again"):
            generated.LoadedGenerator(teacher, {**told, "times": bad})


@pytest.mark.slow
def test_a_generator_and_a_teacher_compute_in_the_dtype_they_are_told(call_packaged, in_folder, monkeypatch):
    made = sds3d.train_generator(**{**TINY, "teacher.dtype": "float32"})
    found = {dtype: sds3d.load_generator(made.path, dtype=dtype) for dtype in ("float32", "bfloat16")}
    assert [generator.dtype for generator in found.values()] == [torch.float32, torch.bfloat16]
    assert sds3d.load_generator(made.path, dtype=torch.bfloat16).dtype == torch.bfloat16
    exact, half = (generator(["a handwritten two"] * 4, seed=1) for generator in found.values())
    assert half.dtype == torch.float32 and 1e-4 < float((exact - half).abs().max()) < 0.3
    run, two = str(made.path), ("--teacher", "digits", "a handwritten two", "--steps", "2")
    for command in (("sample", run), ("teacher", "sample", *two)):
        pictures = []
        for dtype in ("float32", "bfloat16"):
            code, _, err = call_packaged(*command, "-n", "2", "--dtype", dtype, "-o", f"{dtype}.png")
            assert code == 0, err
            pictures.append((in_folder / f"{dtype}.png").read_bytes())
        assert pictures[0] != pictures[1]
        code, _, err = call_packaged(*command, "--dtype", "float16")
        assert code == 2 and "for diffusers pipelines" in err
        code, _, err = call_packaged(*command, "--dtype", "half")
        assert code == 2 and "dtype is 'half'; give auto, float32, bfloat16 or float16" in err
    monkeypatch.setattr(evaluation, "BEST", ("ddim", 1))
    for dtype in ((), ("--dtype", "bfloat16")):
        code, _, err = call_packaged("eval", run, "-n", "600", "--seeds", "1", *dtype)
        assert code == 0, err
        stored = json.loads((made.path / "eval.json").read_text())
        assert stored["dtype"] == (dtype[1] if dtype else "float32")  # what it was trained with
        assert stored["command"].endswith(" ".join(dtype) or "--seeds 1")


# settings


@pytest.mark.parametrize("path", sorted((recipes_folder() / "distill").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_for_generators_loads_and_is_short(path, tmp_path):
    assert len(path.read_text().splitlines()) <= 30
    config = load(None, {"method": path.stem}, kind=DistillConfig)
    assert METHODS[path.stem] is type(config.method) and config.critic.kind == "copy"
    assert config.method.scale(0) == 1.0
    assert load(None, kind=DistillConfig) == load(None, {"method": "diffinstruct"}, kind=DistillConfig)
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    assert load(None, file=tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"generator.steps": 9}, "generator.steps is 9"),
        ({"generator.batch": 0}, "generator.batch is 0"),
        ({"generator.sigma_init": 0.05}, "generator.sigma_init"),
        ({"generator.half_lives": []}, "half_lives"),
        ({"pairs.count": 5}, "pairs.count is 5; give at least pairs.batch"),
        ({"pairs.sampler": "ddpm"}, "draws fresh noise each time"),
        ({"distance": "lpipz"}, "give teacher, pixels, lpips"),
        ({"method": "vsd", "method.particles": 2}, "particles"),
        ({"generatr.steps": 1}, "did you mean generator"),
        ({"method": "dmd2", "critic.kind": "lora"}, "the discriminator of DMD2 needs copy"),
        ({"method": "dmd", "negative": "a seven"}, "not used in DMD's pairs"),
        ({"source.prompt": "a handwritten two"}, "a generator edits nothing"),
        ({"critic.camera_drop": 0.5}, "a generator has none"),
        ({"method": "csd"}, "CSD does not see what the generator draws"),
    ],
)
def test_impossible_settings_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        load(None, bad, kind=DistillConfig)


def test_prompts_come_from_the_teacher_a_file_or_the_user(in_folder, teacher):
    def prompts(**layer):
        return generator_parts.prompts(load(None, layer, kind=DistillConfig), teacher)

    assert prompts() == [f"a handwritten {name}" for name in evaluation.digits.NAMES]
    assert prompts(prompt="a seven") == ["a seven"]
    file = in_folder / "mine.txt"
    file.write_text("a three\n\na four\n")
    assert prompts(**{"generator.prompts": str(file)}) == ["a three", "a four"]
    file.write_text("a thre\n")
    with pytest.raises(ValueError, match="does not know 'thre'.*three"):
        prompts(**{"generator.prompts": str(file)})
    with pytest.raises(ValueError, match="generator.prompts: cannot read .*nowhere.txt: No such file"):
        prompts(**{"generator.prompts": "nowhere.txt"})


# judging


@pytest.mark.slow
def test_judging_writes_figures_with_their_spread(in_folder, monkeypatch):
    monkeypatch.setattr(evaluation, "BEST", ("dpm++", 10))
    made = sds3d.train_generator(**TINY)
    told = []
    report = evaluation.judge_generator(made.path, 600, 2, lambda *row: told.append(row))
    assert [(who, seed) for who, seed, _ in told] == [
        ("generator", 0),
        ("generator", 1),
        ("teacher", 0),
        ("teacher", 1),
    ]
    stored = json.loads((made.path / "eval.json").read_text())
    for name in ("fd_ratio", *evaluation.FIGURES):
        assert set(stored[name]) == {"mean", "spread"} and stored[name]["mean"] == report.figures[name].mean
    ratio = [ours["fd_feat"] / theirs["fd_feat"] for (_, _, ours), (_, _, theirs) in zip(told[:2], told[2:])]
    assert stored["fd_ratio"]["mean"] == pytest.approx(sum(ratio) / 2)
    assert stored["fd_ratio"]["mean"] > 2  # four steps teach nothing
    assert stored["teacher"]["class_accuracy"]["mean"] > 0.98
    assert "fd ratio" in (made.path / "README.md").read_text() and (made.path / "eval.png").is_file()
    with pytest.warns(UserWarning, match="100 images are too few for FD-feat, .* left out: give at least 596"):
        few = evaluation.judge_generator(made.path, 100, 2)
    assert set(few.figures) == {"kid_feat", "class_accuracy", "copy_rate", "samples_per_second"}
    stored = json.loads((made.path / "eval.json").read_text())
    assert stored["images"] == 100 and stored["kid_feat"]["mean"] == few.figures["kid_feat"].mean
    with pytest.raises(ValueError, match="1 images are too few; give at least 2, and 596 for FD-feat"):
        evaluation.judge_generator(made.path, 1, 1)


def test_the_kernel_distance_of_few_real_digits_is_zero_on_average():
    """So few images do for it. Of 20 held-out digits and the other 576, drawn anew each time."""
    real, mark, found = evaluation.Digits().real, torch.Generator().manual_seed(0), []
    for _ in range(200):
        order = torch.randperm(len(real), generator=mark)
        row = evaluation._distances(real[order[:20]], real[order[20:]])
        assert set(row) == {"kid_feat"}
        found.append(row["kid_feat"])
    found = torch.tensor(found)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 200**0.5 and float(found.min()) < 0


def test_real_digits_are_their_own_floor():
    floor = evaluation.Digits().floor()
    assert floor["class_accuracy"] > 0.99 and floor["copy_rate"] == 1.0
    # 0.985 and 0.945, less three standard errors of 596 images.
    assert floor["precision"] > 0.97 and floor["recall"] > 0.917


@pytest.mark.slow
def test_true_toys_are_their_own_floor_and_blank_pictures_are_not():
    told = ("a red mug with a blue handle", "a blue chair", "a green cube on a yellow cylinder", "a pink ball")
    real = evaluation.Toys(told, 80)
    floor = real.floor()
    # 0.975, 1 and 0.8875 (a handle is hidden from behind), less three standard errors of 80 images.
    assert floor["precision"] > 0.92 and floor["recall"] > 0.96
    assert floor["class_accuracy"] > 0.8
    mug, _, _, ball = real.labels(4).tolist()
    assert real.judge.kinds[mug[0]] == "mug" and [real.judge.colours[i] for i in mug[1:]] == ["red", "blue"]
    assert ball[2] == -1  # of one colour
    blank = real.figures(torch.ones(80, 3, 64, 64), real.labels(80))
    assert blank["fd_feat"] > 10 * floor["fd_feat"] and blank["recall"] == 0
    others = real.figures(real.renders(1), real.labels(81)[1:])  # each under its neighbour's name
    assert others["fd_feat"] == floor["fd_feat"] and others["class_accuracy"] < 0.05
    with pytest.raises(ValueError, match="only generators of all ten digits, or of toys"):
        evaluation.real_for(["a handwritten two"], 600)


# the commands


@pytest.mark.slow
@pytest.mark.network
def test_distill_sample_and_eval_as_a_user_types_them(call_packaged, in_folder, monkeypatch):
    monkeypatch.setattr(evaluation, "BEST", ("ddim", 2))
    call = call_packaged
    settings = [f"{key}={value}" for key, value in TINY.items()]
    code, out, err = call("distill", "--teacher", "digits", "--method", "dmd", "-o", "toy", *settings)
    assert code == 0, err
    assert "pairs of noise and the teacher's image: 8 of 8" in err and "toy/00001-digits-dmd" in err
    assert "toy/00001-digits-dmd/generator.safetensors" in out.split()
    two = ("a handwritten two", "a handwritten one")
    code, out, err = call("sample", "toy", *two, "-n", "3", "--steps", "1", "-o", "g.png")
    assert code == 0 and out.split() == ["g.png"] and "6 images in 1 step" in err and (in_folder / "g.png").is_file()
    code, out, err = call("sample", "toy", "--json", "-n", "2")
    assert code == 0 and json.loads(out)["images"] == 20 and err == ""  # two of each of ten prompts
    code, out, err = call("eval", "toy", "-n", "600", "--seeds", "1", "--json")
    assert code == 0 and {"fd_ratio", *evaluation.FIGURES} <= set(json.loads(out)), err
    code, out, err = call("resume", "toy/00001-digits-dmd", "steps=8")
    assert code == 2 and "is 0 from step 4 on, so more steps would teach nothing; start a new run with steps=8" in err
    judged = (in_folder / "toy/00001-digits-dmd/eval.json").read_bytes()
    code, out, err = call("resume", "toy/00001-digits-dmd")  # nothing to do: what was measured stays
    assert code == 0 and (in_folder / "toy/00001-digits-dmd/eval.json").read_bytes() == judged
    assert "fd ratio" in (in_folder / "toy/00001-digits-dmd/README.md").read_text()


def test_a_generator_that_was_stopped_can_be_had_as_it_is(call_packaged, in_folder):
    told = configs.load(None, {"teacher.name": "digits", "method": "diffinstruct", **TINY}, kind=DistillConfig)
    made, steps = launch.start(told)
    next(steps), next(steps)
    steps.close()
    code, _, err = call_packaged("sample", str(made.path))
    assert code == 2 and f"let it finish: sds3d resume {made.path}, or" in err
    early = f"sds3d resume {made.path} steps=2"
    assert early in err
    code, _, err = call_packaged(*early.split()[1:])
    assert code == 0, err
    code, out, err = call_packaged("sample", str(made.path), "-n", "1", "-o", "g.png")
    assert code == 0 and (in_folder / "g.png").is_file(), err
    (in_folder / "scene").mkdir()
    (in_folder / "scene/config.yaml").write_text(configs.to_yaml(configs.load("a red mug")))
    code, _, err = call_packaged("sample", "scene")
    assert code == 2 and "it is no generator's run" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("distill", "--prompt", "a handwritten sevn"), "does not know 'sevn' (nearest: seven"),
        (("distill", "--method", "dmdd"), "did you mean dmd"),
        (("distill", "--method", "sds"), "does not see what the generator draws"),
        (("distill", "--teacher", "nowhere"), "neither packaged"),
        (("generate", "a handwritten two", "--teacher", "digits"), "knows neither cameras nor view words"),
        (("distill", "--device", "gpu"), "give auto, cpu or cuda"),
        (("distill", "--method", "dmd2", "real=nowhere"), "there is no folder nowhere"),
        (("sample", "nowhere"), "holds no generator.safetensors"),
        (("eval", "nowhere"), "nowhere"),
        (("teacher", "sample", "a handwritten two", "--teacher", "digits", "--sampler", "eulr"), "give ddim, ddpm"),
        (("teacher", "sample", "a handwritten two", "--teacher", "digits", "--orbit"), "takes no camera"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(call_packaged, in_folder, arguments, said):
    code, out, err = call_packaged(*arguments)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) == 1, err
    assert not list(in_folder.iterdir())


@pytest.mark.network
def test_a_generator_s_run_opens_as_its_last_checkpoint_has_it(in_folder):
    made = sds3d.train_generator(**TINY)
    again = kinds.open_run(made.path)
    assert isinstance(again, generated.Generated) and again.config == made.config
    before, after = made.student.state_dict()["network"], again.student.state_dict()["network"]
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    with pytest.raises(ValueError, match="trains a generator and is not finished"):
        sds3d.Asset.open(made.path)
    with pytest.raises(ValueError, match="makes a generator, not images"):
        sds3d.Painting.open(made.path)

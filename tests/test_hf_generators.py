"""One-step generators from diffusers pipelines: what they become is loaded by diffusers alone and paints the same."""

import json
from functools import cache
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from conftest import TEST_DTYPE
from PIL import Image

import sds3d
from sds3d.config.load import DistillConfig, load
from sds3d.diffusion.noise import Prediction
from sds3d.diffusion.seeded_noise import ImageNoise
from sds3d.distill.score import METHODS
from sds3d.distill.score.diffinstruct import DiffInstruct
from sds3d.runs import build, launch
from sds3d.runs.generator import Generated
from sds3d.students.generator import GeneratorConfig, generator_times, paint
from sds3d.teachers import small
from sds3d.teachers.hf import families, generator_scheduler
from sds3d.train import train

FAMILIES = tuple(tiny_pipelines.FAMILIES)
TINY = {
    "steps": 3,
    "generator.batch": 4,
    "log.save_every": 2,
    "log.picture_every": 3,
    "pairs.count": 8,
    "pairs.batch": 8,
    "pairs.steps": 1,
    "critic.steps": 1,
    "device": "cpu",
    "teacher.dtype": "float32",
}
EXACT = 1e-4  # of images in [0, 1], in float32


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folder of a family's pipeline by name, made once."""
    return cache(lambda name: tiny_pipelines.build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Prompts are kept in a folder of the test's, and everything runs in float32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(small, "fast_bf16", lambda device: False)


@pytest.fixture
def told(pipelines, in_folder):
    """A few seconds' settings for a family."""

    def make_settings(name, **more):
        own = {f"teacher.hf.{key}": value for key, value in tiny_pipelines.SETTINGS.get(name, {}).items()}
        prompt = {} if name == "ddpm" else {"prompt": "a red mug"}
        return {"teacher.name": str(pipelines(name)), **TINY, **own, **prompt, **more}

    return make_settings


@pytest.fixture
def start(told):
    """A run's config, teacher and student, before its first step."""

    def begin(name, **more):
        config = load(None, told(name, **more), kind=DistillConfig)
        teacher = build.build_teacher(config)
        return config, teacher, build.build_student(config, teacher)

    return begin


def by_diffusers(folder: Path | str, seed: int, call: str = "", **more) -> torch.Tensor:
    """What plain diffusers paints, (B, 3, H, W) in [0, 1], when it is called as the card says, but of a red mug."""
    call = call or json.loads((Path(folder) / "generator.json").read_text())["call"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    words, settings = eval(f"told({call})", {"told": lambda *words, **settings: (words, settings)})
    torch.manual_seed(seed + 1)  # a flow's scheduler draws from the global stream
    settings |= {"generator": torch.Generator().manual_seed(seed), "output_type": "pt"} | more
    images = pipe(*("a red mug" for _ in words), **settings).images
    return ((images + 1) / 2).clamp(0, 1) if isinstance(pipe, diffusers.IFPipeline) else images  # IF's are in [-1, 1]


def by_us(painter, name: str, seed: int) -> torch.Tensor:
    """The same from the same noise by our own loop."""
    shape, stream = (1, *painter._teacher.shape), torch.Generator().manual_seed(seed)
    count, packed = painter.steps, (1, shape[2] // 2 * shape[3] // 2, 4 * shape[1])

    def more() -> torch.Tensor:
        if name == "flux":
            return unpacked(torch.randn(packed, generator=world))
        return torch.randn(shape, generator=world if name == "sd3" else stream)

    def unpacked(x: torch.Tensor) -> torch.Tensor:
        height, width = (side * painter._teacher.family.cell for side in shape[2:])
        return painter._teacher.family.pipe._unpack_latents(x, height, width, painter._teacher.family.cell)

    world = torch.Generator().manual_seed(seed + 1)
    noise = [torch.randn(shape, generator=stream)] + [more() for _ in range(count - 1)]
    teacher = painter._teacher
    with torch.no_grad():
        return teacher.decode(paint(teacher, teacher.network, painter.times, noise, ["a red mug"], 1.0))


def weights(teacher) -> dict[str, torch.Tensor]:
    parts = {"network": teacher.family.network, "vae": teacher.family.vae}
    return {
        f"{n}.{k}": v.clone() for n, part in parts.items() if part is not None for k, v in part.state_dict().items()
    }


# it starts as the teacher


@pytest.mark.parametrize("name", FAMILIES)
def test_before_the_first_step_the_saved_pipeline_paints_the_teacher_s_own_x0(name, start):
    config, teacher, student = start(name)
    made = Generated(None, config, student)
    folder = made.save()
    z = torch.randn((1, *teacher.shape), generator=torch.Generator().manual_seed(3))
    x0 = teacher.predict(z, student.times.float(), ["a red mug"]).x0
    theirs, ours = by_diffusers(folder, 3), student.images(["a red mug"], 3)
    assert (theirs - teacher.decode(x0)).abs().max() < EXACT and (theirs - ours).abs().max() < EXACT
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] in ("LCMScheduler", "FlowMatchEulerDiscreteScheduler")
    assert not list(folder.rglob("*.py"))  # no code of ours


def test_stable_diffusion_begins_at_999_of_1000_and_a_flow_at_pure_noise(start):
    """With 64 latents a side, as SwiftBrush and DMD begin."""
    _, teacher, _ = start("sd")
    teacher.shape = (4, 64, 64)
    for steps, asked in {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 3: [998, 665, 332]}.items():
        when, size = generator_times(teacher, GeneratorConfig(steps=steps))
        assert (1000 * when).tolist() == pytest.approx(asked, abs=1e-9) and size == 1
        assert teacher.levels.network_timesteps(when.float()).tolist() == asked  # the network gets whole numbers
    _, teacher, _ = start("sd3")
    when, size = generator_times(teacher, GeneratorConfig(steps=4))
    sigma = teacher.schedule.alpha_sigma(when)[1]
    assert float(sigma[0]) == 1 == size and bool((when.diff() < 0).all()) and float(sigma[-1]) == pytest.approx(0.5)


@pytest.mark.parametrize(("name", "wanted"), [("sd", 3.0), ("sd_v", 10.0), ("ddpm", 1.0)])
def test_another_beginning_is_a_shorter_list_of_levels(name, wanted, start):
    config, teacher, student = start(name, **{"generator.sigma_init": wanted})
    alpha, sigma = teacher.schedule.alpha_sigma(student.times)
    assert float(sigma / alpha) == pytest.approx(wanted, rel=0.02)
    folder = Generated(None, config, student).save()
    scheduler = diffusers.DiffusionPipeline.from_pretrained(folder).scheduler
    index = round(float(student.times) * 1000)
    assert len(scheduler.alphas_cumprod) == index + 1
    theirs = teacher.family.pipe.scheduler.alphas_cumprod[: index + 1]
    assert torch.allclose(scheduler.alphas_cumprod, theirs, rtol=1e-4)


# it is trained, saved, and painted with by diffusers alone


def same_picture(made, name: str) -> None:
    """Diffusers and we paint the same from the same noise, and the seed is enough for that where it gives all noise."""
    painter = sds3d.load_generator(made.path)
    theirs, ours = by_diffusers(made.path / "pipeline", 5), by_us(painter, name, 5)
    assert theirs.shape == ours.shape and float(theirs.std()) > 0.01
    assert (theirs - ours).abs().max() < EXACT
    if painter.steps == 1 or name not in ("sd3", "flux"):  # whose schedulers draw from the global stream
        assert (theirs - painter(["a red mug"], seed=5)).abs().max() < EXACT


def captioned(folder: Path) -> Path:
    """Two pictures of the prompt."""
    folder.mkdir()
    for name, colour in (("a", (200, 20, 30)), ("b", (120, 0, 10))):
        Image.new("RGB", (20, 20), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a red mug")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vsd", "diffinstruct", "dmd", "dmd2"])
def test_every_method_ends_in_a_pipeline_that_paints_as_we_do(method, told, in_folder, pipelines):
    more = {"real": str(captioned(in_folder / "pictures"))} if method == "dmd2" else {}
    made = sds3d.train_generator(**told("sd", method=method, **more))
    files = {path.name for path in made.path.iterdir()}
    assert {"pipeline", "README.md", "grid.png", "index.html"} <= files and "generator.safetensors" not in files
    same_picture(made, "sd")
    plain = by_diffusers(pipelines("sd"), 5, '"a prompt", num_inference_steps=1, guidance_scale=1')
    assert (by_diffusers(made.path / "pipeline", 5) - plain).abs().max() > 1e-3
    trained = diffusers.UNet2DConditionModel.from_pretrained(made.path / "pipeline" / "unet").state_dict()
    mean = made.student.means[0].module.state_dict()
    assert trained.pop("time_embedding.cond_proj.weight").abs().max() == 0
    assert all(torch.equal(value, mean[key]) for key, value in trained.items()) and set(trained) == set(mean)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name in FAMILIES for steps in (1, 4)])
def test_every_family_ends_in_a_pipeline_that_paints_as_we_do(name, steps, told):
    made = sds3d.train_generator(**told(name, method="diffinstruct", steps=1, **{"generator.steps": steps}))
    same_picture(made, name)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_are_the_first_of_those_it_was_trained_with(steps, told):
    """LCM's own choice of two of four steps is the first and the third, which training never put after the first."""
    made = sds3d.train_generator(**told("sd", steps=1, **{"generator.steps": 4, "generator.sigma_init": 10}))
    painter, card = sds3d.load_generator(made.path), made.path / "pipeline" / "generator.json"
    numbers = json.loads(json.loads(card.read_text())["times"])
    assert numbers == made.student.teacher.levels.network_timesteps(made.student.times).tolist() and len(numbers) == 4
    count = painter._teacher.levels.count  # of the levels that are left of 1,000
    assert (count * painter.times).tolist() == pytest.approx(numbers)
    first = [round(number) for number in numbers[:steps]]
    theirs = by_diffusers(made.path / "pipeline", 5, '"a prompt"', timesteps=first)
    assert (theirs - painter(["a red mug"], seed=5, steps=steps)).abs().max() < EXACT
    own = by_diffusers(made.path / "pipeline", 5, f'"a prompt", num_inference_steps={steps}')
    assert ((own - theirs).abs().max() < EXACT) == (steps != 2)
    with pytest.raises(ValueError, match="paints in 4 or fewer"):
        painter(["a red mug"], steps=5)
    with pytest.raises(ValueError, match="smaller than `num_inference_steps`: 8"):
        by_diffusers(made.path / "pipeline", 5, '"a prompt", num_inference_steps=8')
    card.write_text(json.dumps({**json.loads(card.read_text()), "times": "[3.0, 2.0]"}))
    with pytest.raises(ValueError, match=r"times is '.3.0, 2.0.', not 4 decreasing numbers .*; train it again"):
        sds3d.load_generator(made.path)
    card.write_text(json.dumps({key: value for key, value in json.loads(card.read_text()).items() if key != "times"}))
    older = sds3d.load_generator(made.path)
    assert torch.allclose(older.times, painter.times, atol=1e-12)


def test_a_flow_paints_in_the_first_of_its_steps(told):
    """Its scheduler would stretch fewer steps to end at the last one's level, and cannot do so with one."""
    made = sds3d.train_generator(**told("sd3", steps=1, **{"generator.steps": 4}))
    painter = sds3d.load_generator(made.path)
    assert torch.allclose(painter.times, made.student.times, atol=1e-6) and float(painter.times[0]) == 1
    teacher = painter._teacher
    for steps in (1, 2):
        fresh = ImageNoise(5, [0], teacher.shape)
        noise = [fresh() for _ in range(steps)]
        with torch.no_grad():
            x = paint(teacher, teacher.network, made.student.times[:steps], noise, ["a red mug"], 1.0)
        assert torch.allclose(painter(["a red mug"], seed=5, steps=steps), teacher.decode(x), atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_generator_from_a_pipeline_computes_in_the_given_dtype(dtype, told):
    made = sds3d.train_generator(**told("sd", steps=1, **{"generator.steps": 2}))
    painter = sds3d.load_generator(made.path, dtype=dtype)
    assert painter.dtype == painter._teacher.network.conv_in.weight.dtype == getattr(torch, dtype)
    prompts = ["a red mug", "a blue ball", "a red ball"]
    images = painter(prompts, seed=1)
    assert images.dtype == torch.float32 and bool(images.isfinite().all())
    assert torch.equal(torch.cat([painter(prompts[:1], seed=1), painter(prompts[:2], seed=1)[1:]]), images[:2])


def test_a_network_whose_last_level_is_pure_noise_begins_near_it(start):
    """alpha is 0 there (zero terminal SNR), where eps says nothing; and LCM answers with x_t itself at level 0."""
    config, teacher, student = start("sd_v")
    betas = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **tiny_pipelines.SCALED)
    for kind in ("epsilon", "v_prediction"):
        scheduler = diffusers.DDIMScheduler.from_config(betas.config, prediction_type=kind)
        teacher.levels = families.levels(scheduler, 16)
        teacher.schedule, teacher.shape = teacher.levels.schedule, (4, 64, 64)
        when, _ = generator_times(teacher, GeneratorConfig())
        alpha, sigma = teacher.schedule.alpha_sigma(when)
        assert float(sigma / alpha) == pytest.approx(20, rel=0.1)  # 2.5 for 8 of a side
        asking = generator_scheduler.build_scheduler(teacher.family, teacher.levels, float(when), 1)
        asking.set_timesteps(1)
        x_t, output = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        ours = Prediction(output, x_t, alpha.float(), sigma.float(), teacher.levels.kind).x0
        theirs = asking.step(output, asking.timesteps[0], x_t).prev_sample
        assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()
    when = generator_scheduler.scheduler_times(
        teacher.family, teacher.levels, generator_scheduler.build_scheduler(teacher.family, teacher.levels, 0.001, 8), 8
    )
    assert (1000 * when).tolist() == pytest.approx([15, 13, 11, 9, 7, 5, 3, 1])


@pytest.mark.slow
def test_one_pass_whatever_the_guidance_scale_is(told):
    """The default of 7.5 would ask twice, and spoil a generator that was trained without."""
    made = sds3d.train_generator(**told("sd", steps=1))
    default, high = (by_diffusers(made.path / "pipeline", 2, **more) for more in ({}, {"guidance_scale": 12.0}))
    assert torch.equal(default, high)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_the_teacher_stays_as_it_was_and_only_its_network_is_copied(kind, start, in_folder):
    config, teacher, student = start("sd", **{"critic.kind": kind, "method": "vsd", "teacher.dtype": TEST_DTYPE})
    before, critic = weights(teacher), build.build_critic(config, teacher)
    own = {id(p) for p in student.network.parameters()} | {id(p) for m in student.means for p in m.module.parameters()}
    assert not own & {id(p) for p in (*teacher.family.network.parameters(), *teacher.family.vae.parameters())}
    count = sum(p.numel() for p in teacher.family.network.parameters())
    assert sum(p.numel() for p in student.network.parameters()) == count
    goals = {"score": build.build_objective(config, teacher, critic)}
    steps = train(student, goals, config.plan(), companions={"critic": critic})
    assert len(list(steps)) == 3
    Generated(None, config, student).save()
    assert all(torch.equal(value, before[key]) for key, value in weights(teacher).items())
    moved = [not torch.equal(p, q) for p, q in zip(student.network.parameters(), teacher.network.parameters())]
    assert any(moved) or kind == "lora"


@pytest.mark.slow
@pytest.mark.network
def test_an_interrupted_run_ends_as_an_uninterrupted_one(told, in_folder):
    settings = told("sd", method="vsd", **{"teacher.dtype": TEST_DTYPE})
    whole = sds3d.train_generator(**settings)
    made, steps = launch.start(load(None, settings, kind=DistillConfig))
    for step in steps:
        if step.step == 2:
            break
    steps.close()
    made, steps = launch.resume(made.path)
    assert [step.step for step in steps] == [3]
    assert [path.name for path in made.finish()][0] == "pipeline"
    ours, theirs = (
        (run.path / "pipeline/unet/diffusion_pytorch_model.safetensors").read_bytes() for run in (made, whole)
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_student_of_a_teacher_in_half_precision_learns_in_float32(start):
    config, teacher, student = start("sd", **{"teacher.dtype": "bfloat16"})
    assert {p.dtype for p in student.network.parameters()} == {torch.float32}
    x = student.draw(0, torch.Generator().manual_seed(0)).images
    x.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in student.network.parameters() if p.grad is not None)
    folder = Generated(None, config, student).save()
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.bfloat16)
    same = {key: value.to(torch.bfloat16) for key, value in student.network.state_dict().items()}
    assert all(torch.equal(value, same[key]) for key, value in unet.state_dict().items() if key in same)
    for told in ({}, {"dtype": torch.bfloat16}):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **told)
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {told.get("dtype", torch.float32)}
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a red mug", num_inference_steps=1, output_type="pt").images.isfinite().all()


# as a user types it


class Denoising(DiffInstruct):
    """As if what it trains were a denoiser still."""

    DENOISER = True


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_pipeline_that_answers_as_a_denoiser_is_the_next_run_s_teacher(name, told, in_folder, monkeypatch):
    monkeypatch.setitem(METHODS, "denoising", Denoising)
    settings = told(name, method="denoising", **{"teacher.dtype": TEST_DTYPE})
    made = sds3d.train_generator(**settings)
    config = load(None, settings, {"teacher.name": str(made.path / "pipeline")}, kind=DistillConfig)
    first, teacher, network = made.student.teacher, build.build_teacher(config), made.student.means[0].module
    x = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.7]) * float(made.student.times[0])  # a pipeline has no levels above its generator's first
    again = t if first.levels.flow else t * first.levels.count / teacher.levels.count
    levels = zip(teacher.schedule.alpha_sigma(again), first.schedule.alpha_sigma(t))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in levels)
    with torch.no_grad():
        ours = first.answer(network, x, t, ["a red mug"] * 2).x0
    atol = EXACT if TEST_DTYPE == "float32" else 0.1
    assert torch.allclose(teacher.predict(x, again, ["a red mug"] * 2).x0, ours, atol=atol)


@pytest.mark.slow
def test_distill_and_sample_as_a_user_types_them(call_packaged, told, in_folder):
    (in_folder / "prompts.txt").write_text("a red mug\na blue ball\n")
    settings = [f"{key}={value}" for key, value in told("sd").items() if key not in ("prompt", "teacher.name")]
    teacher = told("sd")["teacher.name"]
    code, out, err = call_packaged(
        *("distill", "--teacher", teacher, "--prompts", "prompts.txt", "--method", "dmd", "-o", "toy", *settings)
    )
    assert code == 0, err
    run = "toy/00001-pipeline-dmd"
    assert f"{run}/pipeline" in out.split() and f"sds3d sample {run}" in err and "sds3d eval" not in err
    card = (in_folder / run / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card and 'pipe("a prompt", num_inference_steps=1)' in card
    code, out, err = call_packaged("sample", "toy", "-n", "2", "-o", "g.png")
    assert code == 0 and "4 images in 1 step" in err and (in_folder / "g.png").is_file()
    assert sds3d.load_generator(in_folder / run / "pipeline").prompts == ("a red mug", "a blue ball")
    code, out, err = call_packaged("eval", run)
    assert code == 2 and "only generators of all ten digits, or of toys, can be judged so far" in err
    code, out, err = call_packaged("generate", "a red mug", "--teacher", f"{run}/pipeline")
    assert code == 2 and "is a generator, which paints by itself" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer", "said"),
    [
        ("sd", {"prompt": ""}, "--prompts FILE"),
        ("sd", {"prompt": "", "method": "dmd"}, "--prompts FILE"),
        ("sd", {"teacher.hf.offload": True}, "offload"),
        ("sd", {"generator.sigma_init": 1000.0}, "outside this schedule's range"),
        ("sd3", {"generator.sigma_init": 3.0}, "pipeline can start in 1 step.* is inf"),
        ("sd3", {"method": "dmd"}, "distance=pixels"),
        ("sd3", {"method": "dmd2", "real": "pictures"}, "a teacher with a U-Net"),
        ("sd", {"method": "dmd2"}, "give real=FOLDER"),
    ],
)
def test_what_stands_in_the_way_is_said_and_leaves_nothing_behind(name, layer, said, told, in_folder):
    with pytest.raises(ValueError, match=said):
        sds3d.train_generator(**told(name, **layer))
    assert not (in_folder / "outputs").exists()


@pytest.mark.slow
def test_images_of_another_size_are_the_pipeline_s_default(told):
    made = sds3d.train_generator(**told("sd", steps=1, **{"teacher.hf.size": 32}))
    assert by_diffusers(made.path / "pipeline", 5).shape == (1, 3, 32, 32)
    same_picture(made, "sd")


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_written_leaves_the_old_one(start, monkeypatch):
    config, teacher, student = start("sd")
    made = Generated(None, config, student)
    before = {path: path.read_bytes() for path in made.save().rglob("*") if path.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "save_pretrained", full)
    with pytest.raises(ValueError, match="No space left"):
        made.save()
    assert before == {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    assert [path.name for path in Path("outputs").iterdir()] == ["pipeline"]


@pytest.mark.slow
def test_features_are_what_the_u_net_hands_down(start):
    """Of the way down what the skip connections carry at its end, of the middle what the way up begins with."""
    _, teacher, student = start("sd")
    x, t = torch.randn((2, *teacher.shape), generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    maps = teacher.features(student.network, x, t, ["a red mug", ""])
    assert [tuple(m.shape) for m in maps] == [(2, 8, 4, 4), (2, 16, 4, 4), (2, 16, 4, 4)]
    assert maps[-1].shape[1] == teacher.feature_width
    seen = []
    hook = student.network.up_blocks[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    teacher.answer(student.network, x, t, ["a red mug", ""])
    hook.remove()
    assert torch.equal(seen[0], maps[-1]) and maps[-1].requires_grad

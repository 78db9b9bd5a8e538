"""Diffusers pipelines as teachers, against diffusers' own pipelines and schedulers; tiny ones, built on the spot."""

import copy
import gc
import importlib
import inspect
import json
import shutil
import warnings
from functools import cache, partial
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from conftest import TEST_DTYPE, TINY
from transformers import PreTrainedModel

from sds3d.cameras import Cameras, orbit
from sds3d.config import load as config
from sds3d.diffusion.guidance import Guidance, cfg
from sds3d.diffusion.noise import noised
from sds3d.diffusion.samplers.ddim import ddim
from sds3d.distill.critics import CriticConfig, TrainedCritic
from sds3d.distill.query import Query
from sds3d.prompts import VIEW_WORDS, with_view
from sds3d.runs import build, kinds
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.drawing import sample
from sds3d.teachers.hf.prompt_embedder import _related_prompts
from sds3d.teachers.load import load_teacher
from sds3d.train import make_optimiser, train

FAMILIES = tuple(tiny_pipelines.FAMILIES)
TEXT = tuple(name for name in FAMILIES if name != "ddpm")
LATENT = tuple(name for name in FAMILIES if name not in ("ddpm", "if"))
every_family = pytest.mark.parametrize("name", FAMILIES)
PROMPTS = ["a red mug", "a blue ball, side view", ""]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Folder of a family's pipeline by name, made once."""
    return cache(lambda name: tiny_pipelines.build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def settings(pipelines, tmp_path_factory):
    """What loads a family's teacher: the names of TeacherConfig, and those of HFConfig."""
    kept = tmp_path_factory.mktemp("prompts")

    def make_settings(name, views="words", dtype="float32", **told):
        told = {"cache": str(kept)} | tiny_pipelines.SETTINGS.get(name, {}) | told
        return TeacherConfig(str(pipelines(name)), views, dtype, hf=HFConfig(**told))

    return make_settings


@pytest.fixture(scope="session")
def load(settings):
    """A family's teacher in float32, with view words, loaded as a hub id's would be once it is downloaded."""
    return cache(lambda name, **told: load_teacher(settings(name, **told), "cpu"))


def weights(teacher) -> dict[str, torch.Tensor]:
    parts = {"network": teacher.family.network, "vae": teacher.family.vae}
    return {
        f"{n}.{k}": v.clone() for n, part in parts.items() if part is not None for k, v in part.state_dict().items()
    }


def sigma_told(teacher, t: torch.Tensor) -> float:
    return float(teacher.schedule.alpha_sigma(t.double())[1][0])


# what the network is asked, against diffusers' own pipelines


@every_family
def test_the_network_answers_as_in_its_own_pipeline(name, pipelines, load):
    """Every call that diffusers' pipeline makes of its network while it draws, made again by ours."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines(name))
    pipe.set_progress_bar_config(disable=True)
    network, calls = getattr(pipe, "unet", None) or pipe.transformer, []

    def remember(module, args, kwargs, output):
        told = inspect.signature(type(network).forward).bind(module, *args, **kwargs).arguments
        calls.append((told.get("sample", told.get("hidden_states")), told["timestep"], output[0]))

    network.register_forward_hook(remember, with_kwargs=True)
    teacher, generator = load(name), torch.Generator().manual_seed(0)
    told = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"}
    if name != "ddpm":
        told |= {"prompt": "a red mug", "height": 16, "width": 16}
    if name == "flux":
        told |= {"negative_prompt": "", "true_cfg_scale": 2.0, "guidance_scale": 1.0}
    elif name != "ddpm":
        told |= {"guidance_scale": 4.0}
    pipe(**told)
    assert len(calls) >= 3
    for asked, time, output in calls:
        if name == "flux":  # one call for each branch
            asked, output = (pipe._unpack_latents(x, 16, 16, 2) for x in (asked, output))
        time = torch.as_tensor(time).reshape(-1)[:1].float() * (1000 if name == "flux" else 1)
        t = time / 1000
        if teacher.levels.flow:
            t = teacher.schedule.t_of_ratio(t / (1 - t))
        prompts = ["a red mug"] if len(asked) == 1 else ["", "a red mug"]
        candidates = [["a red mug"], [""]] if name == "flux" else [prompts]
        wanted = output[:, : teacher.shape[0]]
        ours = [teacher.predict(asked, t.expand(len(asked)), told).output for told in candidates]
        assert min((one - wanted).abs().max() for one in ours) < 1e-5 * wanted.abs().max()


# what its answer means, against diffusers' own schedulers


@every_family
@pytest.mark.parametrize("index", [20, 350, 660, 980])
def test_eps_x0_and_v_are_the_schedulers(name, index, load):
    teacher, t = load(name), torch.full((1,), index / 1000)
    x_t = randn(1, *teacher.shape)
    found, scheduler = teacher.predict(x_t, t, ["a red mug"]), teacher.family.pipe.scheduler
    out = found.output
    if teacher.levels.flow:
        sigma = sigma_told(teacher, t)
        x0, eps = (_euler(scheduler, out, x_t, sigma, to) for to in (0.0, 1.0))  # straight to either end
        assert torch.equal(found.flow, out)
    else:
        ours = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)
        ours.set_timesteps(1000)
        x0 = ours.step(out, index, x_t).pred_original_sample
        alpha_bar = scheduler.alphas_cumprod[index]
        eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        v = ours.get_velocity(x0, eps, torch.tensor([index]))
        assert (found.v - v).abs().max() < 1e-5 * v.abs().max()
        assert (
            noised(x0, eps, found.alpha, found.sigma) - ours.add_noise(x0, eps, torch.tensor([index]))
        ).abs().max() < 1e-5
    assert (found.x0 - x0).abs().max() < 1e-5 * x0.abs().max()
    assert (found.eps - eps).abs().max() < 1e-5 * eps.abs().max()


def _euler(scheduler, output: torch.Tensor, x_t: torch.Tensor, sigma: float, to: float) -> torch.Tensor:
    """One step of a flow scheduler of this kind from one sigma to another."""
    fresh = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, use_dynamic_shifting=False)
    fresh.set_timesteps(sigmas=[sigma])
    fresh.sigmas = torch.tensor([sigma, to])
    return fresh.step(output, fresh.timesteps[0], x_t).prev_sample


@every_family
def test_a_step_is_the_schedulers_step(name, load):
    """DDIM, which for a flow is Euler's, from the sixth of ten times to the seventh."""
    teacher = load(name)
    x_t, scheduler = randn(1, *teacher.shape), copy.deepcopy(teacher.family.pipe.scheduler)
    if teacher.levels.flow:
        shift = {"mu": 0.5 + 0.65 * (16 - 4) / (64 - 4)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)], **shift)
        start, end = torch.tensor([0.5]), torch.tensor([0.4])  # the schedule's own t, before the shift
    else:
        plain = {"clip_sample": False, "thresholding": False, "steps_offset": 0, "timestep_spacing": "leading"}
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, **plain)
        scheduler.set_timesteps(10)
        start, end = torch.tensor([0.4]), torch.tensor([0.3])
    time, prompts = scheduler.timesteps[5], ["a red mug"]
    assert float(teacher.levels.network_timesteps(start)) == pytest.approx(float(time), rel=1e-5)
    ask = partial(teacher.predict, prompts=prompts)
    *_, (_, _, ours) = ddim(ask, x_t, teacher.schedule, 1, t_start=start, t_end=end)
    theirs = scheduler.step(ask(x_t, start).output, time, x_t).prev_sample
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


# latents


@pytest.mark.parametrize("name", LATENT)
def test_latents_are_what_the_pipeline_decodes(name, pipelines, load):
    """The pipeline's own way back, from our latents to pixels: with its own scale and shift."""
    teacher, images = load(name), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x, vae = teacher.encode(images), teacher.family.vae
    config = vae.config
    mean = vae.encode(2 * images - 1).latent_dist.mean
    assert torch.allclose(x / config.scaling_factor + (config.shift_factor or 0), mean, atol=1e-5)
    shown = diffusers.image_processor.VaeImageProcessor().postprocess(vae.decode(mean).sample, output_type="pt")
    assert torch.allclose(teacher.decode(x), shown, atol=1e-5)


@every_family
@pytest.mark.parametrize("size", [12, 16, 40])
def test_the_gradient_reaches_an_image_of_any_size(name, size, load):
    teacher = load(name)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = teacher.encode(images)
    assert x.shape == (2, *teacher.shape)
    (x * randn(*x.shape)).sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 1e-6).all()


def test_checkpointing_recomputes_in_eval_mode(load):
    """And changes nothing: the layers run again in the backward pass, and the gradient is the same."""
    grads, counts = [], []
    for checkpointing in (False, True):
        teacher, count = load("sd", checkpointing=checkpointing), []
        layer = teacher.family.vae.encoder.down_blocks[0].resnets[0]
        hook = layer.register_forward_hook(lambda *_, count=count: count.append(1))
        assert not teacher.family.vae.training
        images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        teacher.encode(images).square().sum().backward()
        hook.remove()
        grads.append(images.grad)
        counts.append(len(count))
    assert counts == [1, 2]
    assert torch.allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_vae_that_overflows_in_half_precision_stays_in_float32(dtype, load):
    teacher, exact = load("sdxl", dtype=dtype), load("sdxl")
    assert teacher.family.network.dtype == getattr(torch, dtype)
    seen = []
    hook = teacher.family.vae.encoder.register_forward_hook(
        lambda _, args, out: seen.extend((args[0].dtype, out.dtype))
    )
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher.encode(images), exact.encode(images))
    hook.remove()
    assert seen == [torch.float32] * 2
    assert load("sd", dtype=dtype).family.vae.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "ddpm"])
def test_bfloat16_says_nearly_the_same(name, load):
    x_t, t = randn(2, *load(name).shape), torch.tensor([0.3, 0.8])
    exact, rough = (load(name, dtype=dtype).predict(x_t, t, PROMPTS[:2]).eps for dtype in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert (exact - rough).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0, 1e7])
def test_float16_loses_no_gradient(size, load):
    """On the images, whatever its size on the latents: half precision ends at 6e-8 and at 65,504."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    direction, found = size * randn(2, 4, 8, 8), []
    for dtype in ("float32", "float16"):
        seen = images.clone().requires_grad_()
        (load("sd", dtype=dtype, checkpointing=True).encode(seen) * direction).sum().backward()
        found.append(seen.grad.flatten())
    exact, rough = found
    assert torch.cosine_similarity(exact, rough, dim=0) > 0.9999
    assert float(rough.norm() / exact.norm()) == pytest.approx(1, abs=0.01)


def test_memory_options_change_little(load):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x_t, t = randn(3, 4, 8, 8), torch.full((3,), 0.5)
    plain = load("sd")
    careful = load("sd", slicing=True, tiling=True, attention_slicing=True, channels_last=True, offload=True)
    assert careful.family.vae.use_slicing and careful.family.vae.use_tiling
    assert torch.allclose(plain.encode(images), careful.encode(images), atol=1e-4)
    assert torch.allclose(plain.predict(x_t, t, PROMPTS).eps, careful.predict(x_t, t, PROMPTS).eps, atol=1e-4)
    with pytest.raises(ValueError, match="offload"):
        careful.network  # noqa: B018
    with pytest.raises(ValueError, match="attention slicing"):
        load("sd3", attention_slicing=True)
    with pytest.raises(ValueError, match="multiples of 4"):
        load("sd", size=18)
    assert load("sd", size=32).shape == (4, 16, 16)


# prompts


def query(teacher, prompts, cameras, guidance=Guidance(), negative="") -> Query:
    count = len(prompts)
    x_t, t = randn(3, *teacher.shape)[:count], torch.tensor([0.2, 0.5, 0.8])[:count]
    alpha, sigma = teacher.schedule.alpha_sigma(t)
    return Query(teacher, x_t, x_t, x_t, t, alpha, sigma, prompts, cameras, negative, guidance=guidance)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(perp_neg=1.0)], ids=["cfg", "perp_neg"])
def test_guidance_of_three_is_three_guidances(name, guidance, load):
    """Each with its own latent, t, prompt and side: METHODS' first trap."""
    teacher = load(name)
    prompts, cameras = ["a red mug", "a blue ball", "a red ball"], orbit(3, start=20)
    together = query(teacher, prompts, cameras, guidance, "low quality")
    alone = []
    for i in range(3):
        one, rows = query(teacher, prompts, cameras, guidance, "low quality"), slice(i, i + 1)
        one.x_t, one.t, one.prompts, one.cameras, one.x = (
            one.x_t[rows],
            one.t[rows],
            prompts[rows],
            cameras[rows],
            one.x[rows],
        )
        alone.append(one.guided(7.5))
    whole = together.guided(7.5)
    assert (whole - torch.cat(alone)).abs().max() < 1e-5 * whole.abs().max()
    if not guidance.perp_neg:
        found = teacher.predict(together.x_t, together.t, with_view(prompts, cameras)).eps
        away = teacher.predict(together.x_t, together.t, ["low quality"] * 3).eps
        assert (whole - cfg(away, found, 7.5)).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_cameras_blend_the_view_words(name, load):
    told, said = load(name, views="camera"), load(name)
    x_t, t = randn(4, *told.shape), torch.full((4,), 0.5)
    cameras = Cameras(
        *(torch.tensor(x) for x in ([0.0, 90.0, 180.0, 0.0], [0.0, 0.0, 0.0, 90.0], [3.0] * 4, [40.0] * 4))
    )
    exact = told.predict(x_t, t, ["a red mug"] * 4, cameras).eps
    views = said.predict(x_t, t, with_view("a red mug", cameras)).eps
    assert torch.allclose(exact, views, atol=1e-5)  # at the middle of each view it is that view's prompt
    between = [
        told.embedder.with_cameras(["a red mug"], orbit(1, start=azimuth))["words"] for azimuth in (44.9, 45.0, 45.1)
    ]
    front, side = said.embedder(["a red mug, front view", "a red mug, side view"])["words"]
    assert torch.allclose(between[1][0], (front + side) / 2, atol=1e-6)
    assert (between[0] - between[2]).abs().max() < 0.01 * (front - side).abs().max()  # no jump where words have one
    mask = torch.tensor([True, False, False, True])
    dropped = told.predict(x_t, t, ["a red mug", "a red mug", "", ""], cameras, mask).eps
    wanted = said.predict(x_t, t, ["a red mug, front view", "a red mug", "", ""]).eps
    assert torch.allclose(dropped, wanted, atol=1e-5)


@pytest.mark.parametrize("name", TEXT)
def test_a_kept_embedding_is_the_same(name, settings, tmp_path):
    first = load_teacher(settings(name, cache=str(tmp_path)), "cpu")
    made = first.embedder(PROMPTS)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert all(p.name.removesuffix(".safetensors").isalnum() for p in files)
    again = load_teacher(settings(name, cache=str(tmp_path)), "cpu")
    again.embedder.embed = None  # nobody may ask the encoders
    kept = again.embedder(PROMPTS)
    assert made.keys() == kept.keys() and all(torch.equal(made[k], kept[k]) for k in made)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_sd3_does_without_its_largest_encoder(pipelines, tmp_path):
    """As it is often given away: with two CLIPs, and no T5."""
    folder = tmp_path / "small"
    shutil.copytree(pipelines("sd3"), folder, ignore=shutil.ignore_patterns("*_3"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    told = TeacherConfig(str(folder), "words", "float32", hf=HFConfig(cache=str(tmp_path / "kept")))
    teacher = load_teacher(told, "cpu")
    teacher.check("a red mug")
    without = {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, **without).encode_prompt("a red mug", None, None)
    assert torch.allclose(teacher.embedder(["a red mug"])["words"], theirs[0], atol=1e-6)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_embedding_is_made_again_with_a_warning(damage, settings, tmp_path):
    made = load_teacher(settings("sd", cache=str(tmp_path)), "cpu").embedder(["a red mug"])
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes({"cut": data[:-9], "changed": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage])
    again = load_teacher(settings("sd", cache=str(tmp_path)), "cpu")
    with pytest.warns(UserWarning, match="damaged"):
        found = again.embedder(["a red mug"])
    assert torch.equal(made["words"], found["words"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_teacher(settings("sd", cache=str(tmp_path)), "cpu").embedder(["a red mug"])


def test_other_weights_and_other_precision_are_other_embeddings(settings, pipelines, tmp_path):
    """What is kept for one model is not taken for another of the same name."""
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines("sd"), folder)
    told = {"hf": HFConfig(cache=str(tmp_path / "kept"))}
    first = load_teacher(TeacherConfig(str(folder), "words", "float32", **told), "cpu")
    assert first.fingerprint == load_teacher(settings("sd"), "cpu").fingerprint  # a copy is the same
    before = first.embedder(["a red mug"])["words"]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tokenizer = diffusers.StableDiffusionPipeline.from_pretrained(folder, vae=None, unet=None).tokenizer
        tiny_pipelines.clip(tokenizer, False).save_pretrained(folder / "text_encoder")
    second = load_teacher(TeacherConfig(str(folder), "words", "float32", **told), "cpu")
    assert second.fingerprint != first.fingerprint
    assert not torch.allclose(second.embedder(["a red mug"])["words"], before)
    rough = load_teacher(TeacherConfig(str(folder), "words", "bfloat16", **told), "cpu")
    assert rough.embedder(["a red mug"])["words"].dtype == torch.bfloat16


def test_the_text_encoders_are_gone_afterwards(load, settings, tmp_path):
    load_teacher(settings("sd3", cache=str(tmp_path)), "cpu").embedder(["a red mug"])
    assert not [type(one).__name__ for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]


@pytest.mark.parametrize("name", ["sd", "if", "sd3"])
def test_a_long_prompt_warns_of_what_is_cut(name, load):
    teacher = load(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.check("a red mug")
    long = "a red mug " * 40 + "with a blue handle"
    with pytest.warns(UserWarning, match="blue.?handle ?, ?overhead.?view'; shorten"):
        teacher.check(long)
    with pytest.raises(ValueError, match="empty"):
        teacher.check("  ")


def test_a_pipeline_reads_the_text_as_it_is_and_warns_of_weights(settings, tmp_path):
    teacher, read = load_teacher(settings("sd", cache=str(tmp_path)), "cpu"), []
    embed = teacher.embedder.embed
    teacher.embedder.embed = lambda prompts: read.extend(prompts) or embed(prompts)
    prompt = "a (RED:1.3) mug, [Кружка] №7"
    with pytest.warns(UserWarning, match=r"'\(RED:1.3\)' looks like a weighted word; weights are not applied"):
        teacher.check(prompt)
    teacher.embedder([prompt])
    assert read[0] == prompt


def test_view_words_in_the_middle_of_a_prompt_are_part_of_the_object(pipelines):
    mirrors = "a car with side view mirrors"
    assert _related_prompts(mirrors) == [mirrors, *(f"{mirrors}, {view}" for view in VIEW_WORDS)]
    assert _related_prompts("a car, side view") == _related_prompts("a car") and _related_prompts("side view") == [
        "side view"
    ]
    told = config.load(mirrors, {"teacher.name": str(pipelines("sd")), "device": "cpu"})
    with pytest.warns(UserWarning, match="the words 'side view', taken as part of the object"):
        build.build_teacher(told)
    with pytest.raises(ValueError, match="says 'side view', but a scene is seen from all sides"):
        build.build_teacher(config.load("a car, side view", {"teacher.name": str(pipelines("sd")), "device": "cpu"}))


# runs


@pytest.mark.network
@every_family
@pytest.mark.parametrize("method", ["sds", "nfsd", "vsd"])
def test_three_steps_of_a_scene(name, method, load):
    """The loop, from render to optimiser, with a critic where the method has one; the teacher stays as it was."""
    layer = {**config.parse_overrides(TINY), "steps": 3, "method": method, "device": "cpu", "negative": "low quality"}
    told = config.load(
        "a red mug", layer, {"critic.rank": 2, "critic.kind": "lora" if name in ("sd", "sd3") else "copy"}
    )
    teacher = load(name, dtype=TEST_DTYPE)
    told = kinds.of(told).for_teacher(told, teacher)  # as launch does: it knows colours only
    before, critic, student = weights(teacher), build.build_critic(told, teacher), build.build_student(told, teacher)
    started = [p.clone() for group in make_optimiser(student, told.optim).param_groups for p in group["params"]]
    learnt = [p.clone() for p in critic.parameters()] if critic else []
    goals = {"score": build.build_objective(told, teacher, critic)}
    steps = list(train(student, goals, told.plan(), companions={"critic": critic} if critic else {}))
    assert len(steps) == 3
    now = [p for group in make_optimiser(student, told.optim).param_groups for p in group["params"]]
    assert any(not torch.equal(p, q) for p, q in zip(started, now, strict=True))
    if critic:
        assert any(not torch.equal(p, q) for p, q in zip(learnt, critic.parameters(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in weights(teacher).items())
    assert all(p.grad is None for p in teacher.family.network.parameters())


def test_a_critic_of_a_teacher_in_half_precision_learns_in_float32(load):
    teacher = load("sd", dtype="bfloat16")
    x_t, t = randn(2, *teacher.shape), torch.tensor([0.3, 0.8])
    theirs = teacher.predict(x_t, t, PROMPTS[:2]).eps
    for kind in ("lora", "copy"):
        critic = TrainedCritic(teacher, CriticConfig(kind, rank=2), torch.Generator().manual_seed(0))
        assert all(p.dtype == torch.float32 for p in critic.parameters())
        answer = critic.predict(x_t, t, PROMPTS[:2], None, None)
        assert (answer.eps - theirs).norm() < 0.03 * theirs.norm()
        answer.eps.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("views", ["camera", "words"])
def test_generate_from_a_folder(views, pipelines, call_packaged, in_folder):
    code, out, err = call_packaged(
        *("generate", "a red mug", "--teacher", str(pipelines("sd")), "--teacher-views", views, "--json", *TINY),
        *("steps=3", "device=cpu", f"teacher.hf.cache={in_folder / 'kept'}"),
    )
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    assert (run / "mesh.glb").is_file() and (run / "turntable.mp4").is_file()
    again = config.of_run(run / "config.yaml").teacher
    assert again.name == str(pipelines("sd")) and again.hf.cache == str(in_folder / "kept")
    assert len(list((in_folder / "kept").iterdir())) == 6  # the null prompt; the prompt bare and from four sides


@pytest.mark.parametrize("background", ["random", "white"])
def test_text_encoders_are_loaded_once(background, pipelines, monkeypatch, tmp_path):
    """Prompts on other backgrounds, which are drawn as the run goes on, are embedded with the first."""
    told = config.parse_overrides([*TINY, "device=cpu", f"teacher.hf.cache={tmp_path}", "negative=low quality"])
    layer = {"teacher.name": str(pipelines("sd")), "render.background": background}
    made = config.load("a red mug", told, layer)
    teacher, loads = build.build_teacher(made), []
    embed = teacher.embedder.embed
    monkeypatch.setattr(teacher.embedder, "embed", lambda prompts: loads.append(len(prompts)) or embed(prompts))
    student, generator = build.build_student(made, teacher), torch.Generator().manual_seed(0)
    asked = {prompt for step in range(12) for prompt in student.draw(step, generator).prompts}
    assert len(asked) == (3 if background == "random" else 1)
    for prompt in sorted(asked):
        teacher.predict(randn(1, *teacher.shape), torch.tensor([0.5]), [prompt], orbit(1))
    assert len(loads) == 1


@pytest.mark.network
def test_a_teacher_draws(load):
    found = sample(load("sd3", dtype=TEST_DTYPE), ["a red mug", "a blue ball"], guidance=3.0, steps=2)
    assert found.shape == (2, 3, 16, 16) and found.isfinite().all() and found.std() > 0


# what is refused


def refused(name: str, **told) -> str:
    with pytest.raises(ValueError) as error:
        load_teacher(TeacherConfig(name, "words", "float32", hf=HFConfig(**told)), "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hub_id_without_network_says_how_to_use_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    told = refused("nobody/no-such-model")
    assert "cannot be reached" in told and "--teacher FOLDER" in told and "nobody/no-such-model" in told


@pytest.mark.parametrize(
    ("kind", "words"), [("GatedRepoError", "hf auth login"), ("RepositoryNotFoundError", "check the spelling")]
)
def test_what_the_hub_says_is_explained(kind, words, monkeypatch):
    """As diffusers passes it on: the hub's own error is the cause of another."""
    error = getattr(importlib.import_module("huggingface_hub.errors"), kind)

    def download(*_, **__):
        raise OSError("Cannot load model") from error.__new__(error)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    assert words in refused("owner/model")


def test_pickles_are_refused_with_the_reason(pipelines, tmp_path):
    folder = tmp_path / "pickled"
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines("sd"))
    pipe.save_pretrained(folder, safe_serialization=False)
    if not (folder / "unet" / "diffusion_pytorch_model.bin").is_file():
        pytest.fail("diffusers wrote no pickle")
    told = refused(str(folder), cache=str(tmp_path))
    assert "unet holds only .bin" in told and "can run any program" in told and "--allow-pickle" in told
    (folder / "text_encoder").rename(folder / "aside")
    shutil.copytree(pipelines("sd") / "text_encoder", folder / "text_encoder")  # transformers writes no pickles now
    settings = TeacherConfig(str(folder), "words", "float32", hf=HFConfig(allow_pickle=True, cache=str(tmp_path)))
    x_t, t = randn(1, 4, 8, 8), torch.tensor([0.5])
    assert load_teacher(settings, "cpu").predict(x_t, t, ["a red mug"]).eps.isfinite().all()


def test_other_pipelines_are_named(pipelines, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    told = refused(str(tmp_path))
    assert "is a WanPipeline" in told and "StableDiffusion3Pipeline" in told and "FluxPipeline" in told


def test_damaged_and_missing_weights(pipelines, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(pipelines("sd"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refused(str(folder)) and str(folder) in refused(str(folder))
    weights.unlink()
    assert "cannot be loaded" in refused(str(folder))
    assert "neither packaged" in refused("no/such/teacher/at/all")
    edm = tmp_path / "edm"
    shutil.copytree(pipelines("sd"), edm)
    index = json.loads((edm / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (edm / "model_index.json").write_text(json.dumps(index))
    (edm / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    assert "EDMEulerScheduler" in refused(str(edm)) and "alphas_cumprod" in refused(str(edm))


def test_settings_of_pipelines_are_for_pipelines():
    assert "diffusers pipelines" in refused("small", size=64)
    with pytest.raises(ValueError, match="float16"):
        load_teacher(TeacherConfig("small", dtype="float16"))


def test_a_plain_unet_needs_its_noise_levels(pipelines, tmp_path):
    """A UNet2DModel alone is a pipeline too, once its folder says which noise it knows."""
    folder = tmp_path / "unet"
    shutil.copytree(pipelines("ddpm") / "unet", folder)
    assert "scheduler" in refused(str(folder))
    shutil.copy(pipelines("ddpm") / "scheduler" / "scheduler_config.json", folder)
    whole, alone = (
        load_teacher(TeacherConfig(str(path), "words", "float32"), "cpu") for path in (pipelines("ddpm"), folder)
    )
    x_t, t = randn(1, *whole.shape), torch.tensor([0.5])
    assert torch.equal(whole.predict(x_t, t, [""]).x0, alone.predict(x_t, t, [""]).x0)

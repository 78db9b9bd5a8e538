"""What a pipeline's files say is used or refused by name: classes, fields, variants, distilled guidance, tiny VAEs."""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from PIL import Image

from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.hf import meta_teacher
from sds3d.teachers.hf.families import FAMILIES, guidance_embedding
from sds3d.teachers.hf.noise_levels import levels
from sds3d.teachers.load import load_teacher


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folder of a tiny pipeline by name, made once."""
    return cache(lambda name: tiny_pipelines.build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def copy_of(pipelines, tmp_path):
    """A copy of a tiny pipeline, with other fields in its files: a file's path, and what changes in it."""

    def make_copy(name: str, changes: dict[str, dict] | None = None) -> Path:
        folder = tmp_path / f"{name}-copy"
        shutil.copytree(pipelines(name), folder)
        for file, fields in (changes or {}).items():
            path = folder / file
            path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return folder

    return make_copy


def load(folder: Path, **hf):
    if "flux" in folder.name:
        hf |= {"size": 16}
    hf = {"cache": str(folder.parent / "kept")} | hf
    return load_teacher(TeacherConfig(str(folder), "words", "float32", hf=HFConfig(**hf)), "cpu")


def refused(folder: Path, **hf) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, **hf)
    assert "\n" not in str(error.value)
    return str(error.value)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def answer(teacher, t: float = 0.5) -> torch.Tensor:
    x_t = randn(2, *teacher.shape)
    return teacher.predict(x_t, torch.full((2,), t), ["a red mug", ""]).output


# a distilled guidance


def with_guidance(folder: Path, width: int = 32) -> Path:
    """Give a pipeline's U-Net a place for a guidance, as latent consistency models have."""
    config = diffusers.UNet2DConditionModel.load_config(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = diffusers.UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": width})
    network.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("width", [32, 33, 256])
def test_the_guidance_embedding_is_diffusers(width):
    for scale in (0.0, 1.0, 1.3, 8.5, 14.0):
        w = torch.tensor([scale - 1])
        theirs = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)
        assert (guidance_embedding(scale, width) - theirs[0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("sd", "LatentConsistencyModelPipeline"),
        ("sd", "LatentConsistencyModelImg2ImgPipeline"),
        ("sd", "StableDiffusionPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
    ],
)
def test_a_latent_consistency_model_is_told_its_guidance(name, cls, copy_of):
    """Every call that diffusers' own pipeline makes at a guidance scale of 8.5, made again by ours."""
    folder = with_guidance(copy_of(name, {"model_index.json": {"_class_name": cls}}))
    calls, pipe = [], diffusers.DiffusionPipeline.from_pretrained(folder)
    if "LatentConsistency" in cls:
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert type(pipe).__name__ == cls
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_forward_hook(lambda _, args, output: calls.append((*args[:2], output[0])))
    told = {"prompt": "a red mug", "guidance_scale": 8.5, "num_inference_steps": 3, "output_type": "latent"}
    told |= (
        {"image": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), "strength": 1.0}
        if "Img2Img" in cls
        else {"height": 16, "width": 16}
    )
    pipe(**told, generator=torch.Generator().manual_seed(0))
    teacher = load(folder, embedded_guidance=8.5)
    assert len(calls) >= 3 and teacher.family.takes_guidance
    for asked, time, output in calls:
        ours = teacher.predict(asked, time.reshape(1) / 1000, ["a red mug"]).output
        assert (ours - output).abs().max() < 1e-5 * output.abs().max()
    assert (answer(teacher) - answer(load(folder))).abs().max() > 1e-3  # 8.5 and 1 are not the same


def test_a_critic_and_features_are_told_the_guidance_too(copy_of):
    folder = with_guidance(copy_of("sd"))
    x_t, t, prompts = randn(1, 4, 8, 8), torch.tensor([0.5]), ["a red mug"]
    weak, strong = load(folder), load(folder, embedded_guidance=8.5)
    for ask in (
        lambda one: one.answer(one.network, x_t, t, prompts).output,
        lambda one: one.features(one.network, x_t, t, prompts)[-1],
    ):
        assert not torch.allclose(ask(weak), ask(strong), atol=1e-4)


def test_a_generator_from_a_guided_network_needs_no_guidance(copy_of):
    """What its teacher was told goes into its weights: whatever its pipeline says, it answers as it was trained to."""
    teacher = load(with_guidance(copy_of("sd")), embedded_guidance=8.5)
    config, state = dict(teacher.network.config), {k: v.clone() for k, v in teacher.network.state_dict().items()}
    teacher.family.adapt(config, state, 8)
    network = type(teacher.network).from_config(config)
    network.load_state_dict({**{"time_embedding.cond_proj.weight": torch.zeros(16 // 2, 256)}, **state})
    x_t, told, words = randn(1, 4, 8, 8), torch.tensor([500.0]), teacher.embedder(["a red mug"])["words"]
    trained = teacher.family.answer(teacher.network, x_t, told, {"words": words})
    for w in (0.0, 6.5):
        saved = network(x_t, told, words, timestep_cond=guidance_embedding(w + 1, 256)[None]).sample
        assert (saved - trained).abs().max() < 1e-5 * trained.abs().max()


def test_a_guidance_that_nobody_is_told_is_refused(pipelines):
    for name in ("sd", "if", "sd3", "ddpm"):
        told = refused(pipelines(name), embedded_guidance=3.5)
        assert "embedded_guidance is 3.5" in told and "method.scale" in told
    assert load(pipelines("flux"), size=16, embedded_guidance=3.5).family.takes_guidance


# a tiny autoencoder


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_tiny_autoencoder(name, copy_of):
    """Its latents are what the pipeline decodes, and the gradient through its encoder is right."""
    folder = copy_of(name, {"model_index.json": {"vae": ["diffusers", "AutoencoderTiny"]}})
    shutil.rmtree(folder / "vae")
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    vae.save_pretrained(folder / "vae")
    teacher = load(folder, checkpointing=True)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = teacher.encode(images)
    assert teacher.shape == (4, 8, 8) and x.shape == (2, 4, 8, 8)
    wanted = vae.encode(2 * images - 1).latents
    assert torch.allclose(x, wanted, atol=1e-5)
    ours, theirs = (torch.autograd.grad(found.square().sum(), images, retain_graph=True)[0] for found in (x, wanted))
    assert torch.allclose(ours, theirs, atol=1e-4) and ours.abs().max() > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    shown = pipe.image_processor.postprocess(
        vae.decode(x / vae.config.scaling_factor).sample.detach(), output_type="pt"
    )
    assert torch.allclose(teacher.decode(x), shown, atol=1e-5)


def test_another_autoencoder_is_refused(copy_of):
    folder = copy_of("sd", {"model_index.json": {"vae": ["diffusers", "AsymmetricAutoencoderKL"]}})
    shutil.rmtree(folder / "vae")
    diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=4
    ).save_pretrained(folder / "vae")
    assert "AsymmetricAutoencoderKL" in refused(folder) and "AutoencoderTiny" in refused(folder)


# variants


@pytest.fixture
def halved(pipelines, tmp_path):
    """A pipeline with fp16 files only, and a file without a suffix beside them, as hubs have them."""
    folder = tmp_path / "halved"
    diffusers.DiffusionPipeline.from_pretrained(pipelines("sd")).save_pretrained(folder, variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        (folder / part / "LICENSE").write_text("free")
    return folder


def test_a_folder_of_one_variant_is_read_with_a_notice(halved, pipelines):
    with pytest.warns(UserWarning, match="only fp16 weights of unet, vae, text_encoder.*teacher.hf.variant=fp16"):
        found = load(halved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        named = load(halved, variant="fp16")
    for teacher in (found, named):
        assert torch.equal(answer(teacher), answer(load(pipelines("sd"))))


def test_only_the_part_without_plain_weights_takes_its_variant(halved, pipelines):
    shutil.copytree(pipelines("sd") / "vae", halved / "vae", dirs_exist_ok=True)
    with pytest.warns(UserWarning, match="only fp16 weights of unet, text_encoder"):
        load(halved)


def test_several_variants_are_the_users_choice(halved):
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        shutil.copy(halved / part / f"{name}.fp16.safetensors", halved / part / f"{name}.ema.safetensors")
    assert "ema, fp16: say which to take, as in teacher.hf.variant=fp16" in refused(halved)
    assert "'bf16', which no part" in refused(halved, variant="bf16") and "ema, fp16" in refused(halved, variant="bf16")
    assert answer(load(halved, variant="ema")).isfinite().all()


def test_a_part_without_weights_is_named(pipelines, copy_of):
    folder = copy_of("sd")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert f"{folder / 'vae'} holds no weights" in refused(folder)
    assert "'fp16', which no part" in refused(pipelines("sd"), variant="fp16")


# classes


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        (name, cls)
        for name in ("sd", "sdxl", "if", "sd3", "flux", "ddpm")
        for cls in {
            "sd": FAMILIES["StableDiffusionPipeline"],
            "sdxl": FAMILIES["StableDiffusionXLPipeline"],
            "if": FAMILIES["IFPipeline"],
            "sd3": FAMILIES["StableDiffusion3Pipeline"],
            "flux": FAMILIES["FluxPipeline"],
            "ddpm": FAMILIES["DDPMPipeline"],
        }[name].PIPELINES[1:]
    ],
)
def test_a_class_with_the_same_weights_is_its_family(name, cls, copy_of, pipelines):
    """And the estimate of memory, which reads its settings alone, takes it too."""
    assert hasattr(diffusers, cls)
    folder = copy_of(name, {"model_index.json": {"_class_name": cls}})
    teacher, plain = load(folder), load(pipelines(name), **({"size": 16} if name == "flux" else {}))
    assert torch.equal(answer(teacher), answer(plain))
    hf = HFConfig(size=16 if name == "flux" else 0)
    assert type(meta_teacher.build_meta_teacher(TeacherConfig(str(folder), hf=hf), torch.float32)[0].family) is type(
        teacher.family
    )


@pytest.mark.parametrize(
    "cls",
    "StableDiffusionPAGPipeline StableDiffusionControlNetPipeline StableDiffusionXLPAGImg2ImgPipeline FluxFillPipeline "
    "StableDiffusion3ControlNetPipeline StableDiffusionUpscalePipeline StableDiffusionInstructPix2PixPipeline "
    "StableDiffusionDepth2ImgPipeline FluxKontextPipeline IFSuperResolutionPipeline FluxControlPipeline".split(),
)
def test_a_class_that_is_used_otherwise_is_refused_by_name(cls, copy_of):
    told = refused(copy_of("sd", {"model_index.json": {"_class_name": cls}}))
    assert f"is a {cls}" in told and ("without it" in told) == any(part in cls for part in ("PAG", "ControlNet"))


def test_an_inpainting_network_is_refused(copy_of):
    folder = copy_of("sd", {"model_index.json": {"_class_name": "StableDiffusionInpaintPipeline"}})
    tiny_pipelines.unet(9, out_channels=4).save_pretrained(folder / "unet")
    assert "9 channels" in refused(folder) and "inpainting" in refused(folder)


def test_parts_and_fields_of_the_pipeline_itself(copy_of):
    control = {"controlnet": ["diffusers", "ControlNetModel"]}
    assert "part controlnet (a ControlNetModel)" in refused(copy_of("sd", {"model_index.json": control}))
    refiner = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    assert "requires_aesthetics_score: True" in refused(copy_of("sdxl", {"model_index.json": refiner}))
    assert "sharpness: 3" in refused(copy_of("sd3", {"model_index.json": {"sharpness": 3}}))


# fields

SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.mark.parametrize(
    ("name", "file", "fields"),
    [
        ("sd", SCHEDULER, {"warp": 3}),
        ("sd", SCHEDULER, {"rescale_betas_zero_snr": True}),  # which a PNDMScheduler does not know
        ("sd", SCHEDULER, {"use_flow_sigmas": True}),
        ("sdxl", SCHEDULER, {"timestep_type": "continuous"}),
        ("sdxl", SCHEDULER, {"snr_shift_scale": 3.0}),
        ("sd3", SCHEDULER, {"invert_sigmas": True}),
        ("sd3", SCHEDULER, {"scale_factors": [1, 2]}),
        ("sd", UNET, {"colour_shift": 0.5}),
        ("sd", UNET, {"num_class_embeds": 10}),
        ("sd", UNET, {"class_embed_type": "timestep"}),
        ("sd", UNET, {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7}),
        ("sd", UNET, {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 64,
                      "addition_time_embed_dim": 8}),
        ("sd", UNET, {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16}),
        ("sd", UNET, {"attention_type": "gated"}),
        ("if", UNET, {"time_cond_proj_dim": 32}),
        ("ddpm", UNET, {"num_class_embeds": 10}),
        ("sd3", "transformer/config.json", {"context_window": 4}),
        ("flux", "transformer/config.json", {"rope_base": 500}),
        ("sd", "vae/config.json", {"temporal_compression": 4}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_field_that_would_be_passed_over_is_refused_by_name(name, file, fields, copy_of):
    """By what draws the teacher for the estimate of memory, which needs no weights of the changed network's sizes."""
    folder = copy_of(name, {file: fields})
    settings = TeacherConfig(str(folder), hf=HFConfig(size=16 if name == "flux" else 0))
    with pytest.raises(ValueError) as error:
        meta_teacher.build_meta_teacher(settings, torch.float32)
    assert f"{next(iter(fields))}: {next(iter(fields.values()))!r}" in str(error.value), error.value
    assert "cannot be loaded" not in str(error.value)


def test_a_field_is_refused_where_weights_are_loaded(copy_of):
    assert "warp: 3" in refused(copy_of("sd", {SCHEDULER: {"warp": 3}}))


def test_harmless_fields_stay_harmless(copy_of, pipelines):
    """How the pipeline's own sampler walks, what is off, and what a class takes anyway."""
    walk = {"thresholding": True, "use_karras_sigmas": True, "skip_prk_steps": True, "sample_max_value": 2.0}
    off = {"new_option": None, "another": False, "list": []}
    folder = copy_of("sd", {SCHEDULER: walk | off, UNET: off | {"act_fn": "silu"}})
    assert torch.equal(answer(load(folder)), answer(load(pipelines("sd"))))


@pytest.mark.parametrize(
    "cls", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_a_zero_terminal_snr_is_used(cls, copy_of):
    """Where the scheduler knows the field, its levels are the teacher's."""
    index = {"scheduler": ["diffusers", cls]}
    folder = copy_of("sd_v", {"model_index.json": index})
    told = {"_class_name": cls, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (folder / SCHEDULER).write_text(json.dumps({**tiny_pipelines.SCALED, **told}))
    alpha, sigma = load(folder).schedule.alpha_sigma(torch.tensor([0.999]))
    assert float(alpha / sigma) < 1e-3


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_every_scheduler_of_diffusers_is_taken_as_it_comes_or_refused(name, copy_of):
    """Nobody's defaults are a field that is not known."""
    try:
        scheduler = getattr(diffusers, name)()
        assert hasattr(scheduler, "config")
    except Exception:
        pytest.skip("needs arguments or another package")
    try:
        assert levels(scheduler, 16).count >= 1
    except ValueError as error:
        assert "alphas_cumprod" in str(error)


# commands


@pytest.fixture
def pickled(pipelines, tmp_path):
    """A pipeline whose network comes as a pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(pipelines("sd"), folder)
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", safe_serialization=False)
    return folder


def test_a_teacher_is_sampled_with_a_runs_settings(pickled, call_packaged, tmp_path):
    told = ("teacher", "sample", "a red mug", "--teacher", str(pickled), "-n", "1", "--steps", "2")
    own, grid = (f"teacher.hf.cache={tmp_path / 'kept'}", "teacher.dtype=float32"), tmp_path / "grid.png"
    code, _, err = call_packaged(*told, *own, "-o", str(grid))
    assert code == 2 and "--allow-pickle" in err
    sizes = []
    for size in (16, 128):
        code, out, err = call_packaged(*told, *own, "--allow-pickle", f"teacher.hf.size={size}", "-o", str(grid))
        assert code == 0, err
        with Image.open(grid) as image:
            sizes.append(image.size)
        grid.unlink()
    assert sizes[0] != sizes[1]
    for wrong, words in (
        ("steps=3", "steps is no setting of a teacher"),
        ("teacher.hf.sise=3", "size"),
        ("teacher.hf.allow_pickle=true", "give --allow-pickle"),
    ):
        code, _, err = call_packaged(*told, *own, "--allow-pickle", wrong)
        assert code == 2 and words in err


def test_methods_are_compared_with_a_pickled_teacher(pickled, call_packaged, tmp_path):
    few = ("steps=1", "image.count=1", "image.size=16", "device=cpu", f"teacher.hf.cache={tmp_path / 'kept'}")
    told = (
        "compare",
        "a red mug",
        "--methods",
        "sds",
        f"teacher.name={pickled}",
        *few,
        "-o",
        str(tmp_path / "out"),
        "-q",
    )
    code, _, err = call_packaged(*told)
    assert code == 2 and "--allow-pickle" in err
    code, out, err = call_packaged(*told, "--allow-pickle", "-o", str(tmp_path / "again"))
    assert code == 0, err
    assert "--allow-pickle" not in (tmp_path / "again" / "results.json").read_text()


def test_words_of_a_pipeline_are_any(pickled, call_packaged):
    code, _, err = call_packaged("teacher", "words", "--teacher", str(pickled))
    assert code == 2 and "reads any words" in err

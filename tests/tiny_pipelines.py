"""Tiny pipelines of every family: diffusers' own classes, random weights, tokenizers written on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = "a red mug ball blue low quality front side back overhead view on background very large with handle".split()
PROMPT = 77  # tokens a CLIP reads
WIDTH = 16  # of its vectors
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair tokenizer that knows letters, and merges a few words into one token each."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789,.!'-:;?"))
    vocabulary, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (merge := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(merge)
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in vocabulary:
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PROMPT)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """One of characters, that ends every text with </s> as T5's does."""
    signs = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.!'-"]
    tokenizer = Tokenizer(models.Unigram([(sign, -1.0) for sign in signs], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def clip(tokenizer: CLIPTokenizer, projected: bool, width: int = WIDTH) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=PROMPT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(tokenizer: PreTrainedTokenizerFast, width: int = WIDTH) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()


def vae(channels: int = 4, **settings) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).eval()


def unet(channels: int = 4, size: int = 8, **settings) -> UNet2DConditionModel:
    told = {"cross_attention_dim": WIDTH, "attention_head_dim": 2} | settings
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=told.pop("out_channels", channels),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **told,
    ).eval()


def sd(folder: Path, **scheduler) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: eps, on the scheduler its files name."""
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215),
        text_encoder=clip(tokenizer, False),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCALED | scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_v(folder: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 2.x: v."""
    pipe = sd(folder)
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1, **SCALED)
    return pipe


def multi_view(folder: Path) -> StableDiffusionPipeline:
    """A Stable Diffusion whose U-Net is told cameras, as MVDream's is."""
    pipe = sd(folder)
    pipe.unet = unet(class_embed_type="projection", projection_class_embeddings_input_dim=16)
    return pipe


def sdxl(folder: Path) -> StableDiffusionXLPipeline:
    tokenizer = clip_tokenizer(folder)
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(tokenizer, False),
        text_encoder_2=clip(tokenizer, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **SCALED),
    )


def deepfloyd(folder: Path) -> IFPipeline:
    """Pixels, the squared cosine schedule, six channels out of three."""
    tokenizer = t5_tokenizer()
    return IFPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        unet=unet(3, 16, out_channels=6, encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj"),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def sd3(folder: Path) -> StableDiffusion3Pipeline:
    tokenizer, long = clip_tokenizer(folder), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            pos_embed_max_size=16,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, True),
        text_encoder_2=clip(tokenizer, True),
        text_encoder_3=t5(long, 2 * WIDTH),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=long,
    )


def flux(folder: Path) -> FluxPipeline:
    tokenizer, long = clip_tokenizer(folder), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, False),
        tokenizer=tokenizer,
        text_encoder_2=t5(long, 2 * WIDTH),
        tokenizer_2=long,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ).eval(),
    )


def ddpm(folder: Path) -> DDPMPipeline:
    """Unconditional, x0, on a linear ramp of beta."""
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()
    return DDPMPipeline(network, DDPMScheduler(prediction_type="sample", clip_sample=False))


FAMILIES: dict[str, Callable] = {
    "sd": sd,
    "sd_v": sd_v,
    "sdxl": sdxl,
    "if": deepfloyd,
    "sd3": sd3,
    "flux": flux,
    "ddpm": ddpm,
}
OTHERS: dict[str, Callable] = {"multi_view": multi_view}  # which no pipeline of diffusers' own can run
SETTINGS = {"flux": {"size": 16}}  # FLUX has no size of its own but its pipeline's, which is no tiny one


def build(name: str, folder: Path) -> Path:
    """Save a tiny pipeline of a family, the same every time, and give its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = (FAMILIES | OTHERS)[name](folder / "tokenizer-files")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):  # fresh networks end in zeros here and there: say something everywhere
            generator = torch.Generator().manual_seed(1)
            for p in part.parameters():
                if not p.any():
                    p.data.normal_(0, 0.1, generator=generator)
    pipe.save_pretrained(folder / "pipeline")
    return folder / "pipeline"

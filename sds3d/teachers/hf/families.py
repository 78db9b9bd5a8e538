"""The families of diffusers pipelines. Every number is read from the pipeline's own configuration.

    family                     space    network      its output              its condition
    Stable Diffusion 1.x, 2.x  latents  U-Net        eps or v                word vectors
    SDXL                       latents  U-Net        eps or v                word vectors, pooled vector, image sizes
    DeepFloyd IF, stage 1      pixels   U-Net        eps (and a variance)    word vectors
    SD3, SD3.5                 latents  transformer  flow                    word vectors, pooled vector
    FLUX.1                     latents  transformer  flow, in 2 x 2 patches  word vectors, pooled vector, guidance scale
    DDPM                       pixels   U-Net        eps, v or x0            none

A U-Net with time_cond_proj_dim (latent consistency models) also gets a guidance scale. In a condition, "words" are
word vectors and "whole" is the pooled vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.teachers.base import HFConfig
from sds3d.teachers.hf import config_fields
from sds3d.teachers.hf.guidance import guidance_embedding
from sds3d.teachers.hf.noise_levels import Levels, levels


@dataclass(frozen=True)
class Family:
    """The frozen parts of a pipeline and how to use them. This class is Stable Diffusion 1.x and 2.x.

    Args:
        pipe: a diffusers pipeline without its text encoders.
        settings: settings of the user.

    Attributes:
        PIPELINES: names of the pipeline classes whose files it reads, with the first class: their weights are the same.
        FIELDS: known fields of the network's configuration.
        PART: name of the network in the pipeline.
        ENCODERS: names of the text encoders.
        TOKENIZERS: names of the tokenizers, each with its maximal number of tokens; 0 is the tokenizer's own.
        LEFT_OUT: names of parts that are not loaded.
        UPCAST: whether to obey ``force_upcast`` of the VAE's configuration. Only SDXL's pipelines obey it.
        views_per_set: see `sds3d.teachers.base.HasViewSets`.
        SCHEDULER: further configuration of a generator's scheduler, which its pipeline needs.
    """

    pipe: Any
    settings: HFConfig

    PIPELINES: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    )
    FIELDS: ClassVar[config_fields.KnownFields] = config_fields.UNET
    PART: ClassVar[str] = "unet"
    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    TOKENIZERS: ClassVar[dict[str, int]] = {"tokenizer": 0}
    LEFT_OUT: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    UPCAST: ClassVar[bool] = False
    SCHEDULER: ClassVar[dict[str, str]] = {}
    views_per_set: ClassVar[int] = 1

    def prepare(self) -> None:
        """Modify the network once, after loading, if the family needs it."""

    @property
    def network(self) -> Any:
        """The network, an nn.Module. Typed as Any, since nn.Module has no ``config``."""
        return getattr(self.pipe, self.PART)

    @property
    def vae(self) -> Any:
        """The VAE, typed like ``network``; None in a family of pixels."""
        return self.pipe.components.get("vae")

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes a guidance scale (guidance distillation)."""
        return bool(self.network.config.get("time_cond_proj_dim"))

    def check(self) -> None:
        """Raise ValueError if network or VAE must be used in another way than here, or a setting has no effect."""
        network, vae, guidance = self.network, self.vae, self.settings.embedded_guidance
        config_fields.refuse_unknown(network, "the pipeline's network", self.FIELDS)
        inputs = network.config.in_channels
        outputs = network.config.out_channels or inputs  # twice as many if it predicts a variance as well
        if vae is not None:
            kind = type(vae).__name__
            if kind not in config_fields.VAES:
                raise ValueError(
                    f"the pipeline's VAE is of the class {kind}; known are {', '.join(config_fields.VAES)}"
                )
            config_fields.refuse_unknown(vae, "the pipeline's VAE", config_fields.VAES[kind])
        if inputs > outputs or (vae is None and self.channels not in (1, 3)):
            raise ValueError(
                f"the pipeline's network takes {inputs} channels and gives {outputs}: an image, and a mask or another "
                "image beside it, which a teacher has not (inpainting, depth, editing or upscaling); give a "
                "text-to-image model"
            )
        if guidance != HFConfig().embedded_guidance and not self.takes_guidance:
            raise ValueError(
                f"teacher.hf.embedded_guidance is {guidance:g}, and this {type(network).__name__} takes no guidance; "
                "leave it out (the method's own scale is method.scale)"
            )

    def _guidance(self, like: Tensor) -> Tensor | None:
        """Return the embedded guidance scale, (B, time_cond_proj_dim) for ``like`` (B, ...); None if it takes none."""
        if not self.takes_guidance:
            return None
        embedding = guidance_embedding(self.settings.embedded_guidance, self.network.config.time_cond_proj_dim)
        return embedding.to(like).expand(len(like), -1)

    @property
    def side(self) -> int:
        """Side of the x it was trained on."""
        size = self.network.config.sample_size
        if size is None and not self.settings.size:
            raise ValueError("the pipeline does not name the size of its images; give teacher.hf.size, in pixels")
        if size is None:
            return self.settings.size // self.cell
        return size if isinstance(size, int) else min(size)

    @property
    def cell(self) -> int:
        """Side in pixels of the square that one element of x stands for."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """The side of x must be a multiple of this, so that the network can halve it at each level."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def levels(self, side: int) -> Levels:
        """Return the noise levels for x of this side."""
        return levels(self.pipe.scheduler, (side // 2) ** 2)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """Return the condition of N prompts, tensors (N, ...) by name; ``pipe`` has its text encoders."""
        words, _ = pipe.encode_prompt(prompts, device, 1, False)
        return {"words": words}

    def camera_condition(self, cameras: Cameras, camera_mask: Tensor | None) -> dict[str, Tensor] | None:
        """Return the condition of B cameras, tensors (B, ...) by name; None if the network takes no camera.

        Args:
            camera_mask: (B,) bool, False where the camera is dropped.
        """
        return None

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one prompt's condition by name, for CLIP tokenizers of at most ``tokens`` tokens."""
        config = self.network.config
        return {"words": (self._lengths(tokens)[0], config.get("encoder_hid_dim") or config.cross_attention_dim)}

    def _lengths(self, tokens: int) -> list[int]:
        """Return the maximal number of tokens of each text encoder."""
        return [length or tokens for length in self.TOKENIZERS.values()]

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Return the output (B, C, h, w) of a network of this form for x_t (B, C, h, w) at its timesteps (B,)."""
        return network(x_t, timesteps, condition["words"], timestep_cond=self._guidance(x_t), return_dict=False)[0]

    @property
    def feature_width(self) -> int:
        """Channels of the last of ``features``. Raises ValueError if the network has no feature maps."""
        return self.network.config.block_out_channels[-1]

    def features(self, network: Any, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> list[Tensor]:
        """Return the feature maps of a U-Net's down blocks and of its middle block, highest resolution first."""
        maps: list[Tensor] = []

        def append(_: nn.Module, __: Any, output: Any) -> None:
            maps.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(append) for block in (*network.down_blocks, network.mid_block)]
        try:
            self.answer(network, x_t, timesteps, condition)
        finally:
            for hook in hooks:
                hook.remove()
        return maps

    # for generators that start from the pipeline; see generator.py

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Set a generator's scheduler to ``steps`` steps, as the pipeline does."""
        scheduler.set_timesteps(steps)

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        """Change a generator's configuration and weights in place, so that its pipeline's defaults suit it.

        A pipeline treats a U-Net with time_cond_proj_dim as guidance-distilled: it evaluates the network once, whatever
        guidance_scale is, and embeds that number with the weights time_embedding.cond_proj. They are set to 0. What
        they added for the one guidance scale of this generator is added to the bias of the next layer.
        """
        config |= {"sample_size": side, "time_cond_proj_dim": 256}
        weights = state.pop("time_embedding.cond_proj.weight", None)
        if weights is not None:
            added = weights.double() @ guidance_embedding(self.settings.embedded_guidance, weights.shape[1]).double()
            name, layer = "time_embedding.linear_1.bias", state["time_embedding.linear_1.weight"]
            state[name] = (state[name].double() + layer.double() @ added).to(layer.dtype)

    def call_arguments(self, steps: int, size: int) -> str:
        """Return the arguments, as source text, of a call of a generator's pipeline for an image of ``size`` pixels."""
        return f'"a prompt", num_inference_steps={steps}'


class XL(Family):
    """SDXL."""

    PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    FIELDS = config_fields.UNET.with_values(addition_embed_type=("text_time",))
    ENCODERS = ("text_encoder", "text_encoder_2")
    TOKENIZERS = {"tokenizer": 0, "tokenizer_2": 0}
    UPCAST = True

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        words, _, whole, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:  # the null prompt of its training
            nonempty = torch.tensor([prompt != "" for prompt in prompts], device=words.device)
            words, whole = words * nonempty[:, None, None], whole * nonempty[:, None]
        return {"words": words, "whole": whole}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        whole = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().condition_shapes(tokens), "whole": (whole,)}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        height, width = (self.cell * side for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0.0, 0.0, height, width])  # original, crop's corner, target
        added = {"text_embeds": condition["whole"], "time_ids": sizes.to(x_t.device).expand(len(x_t), -1)}
        arguments = {"timestep_cond": self._guidance(x_t), "added_cond_kwargs": added}
        return network(x_t, timesteps, condition["words"], **arguments, return_dict=False)[0]


class IF(Family):
    """DeepFloyd IF's first stage."""

    PIPELINES = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
    FIELDS = config_fields.UNET.with_values(time_cond_proj_dim=(None,))  # its pipelines pass no guidance scale
    TOKENIZERS = {"tokenizer": 77}
    LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker")
    SCHEDULER = {"variance_type": "fixed_small"}  # makes the pipeline drop the learned variance

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        words, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
        return {"words": words}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return super().answer(network, x_t, timesteps, condition)[:, : self.channels]  # the rest is a learned variance

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        config["sample_size"] = side

    def call_arguments(self, steps: int, size: int) -> str:
        return f"{super().call_arguments(steps, size)}, guidance_scale=1"


class Transformer(Family):
    """Base class of flow transformers."""

    PIPELINES = ()
    PART = "transformer"

    @property
    def feature_width(self) -> int:
        raise ValueError(
            f"a {type(self.network).__name__} has no feature maps; give distance=pixels or lpips, and for a "
            "discriminator (dmd2) a teacher with a U-Net"
        )

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        pass

    def call_arguments(self, steps: int, size: int) -> str:
        guidance = self.settings.embedded_guidance if self.takes_guidance else 1.0
        default_size = self.pipe.default_sample_size * self.cell
        sizes = "" if size == default_size else f", height={size}, width={size}"
        return f"{super().call_arguments(steps, size)}, guidance_scale={guidance:g}{sizes}"


class SD3(Transformer):
    """SD3 and SD3.5."""

    PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    FIELDS = config_fields.SD3
    ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
    TOKENIZERS = {"tokenizer": 0, "tokenizer_2": 0, "tokenizer_3": 256}
    LEFT_OUT = ("feature_extractor", "image_encoder")

    @property
    def multiple(self) -> int:
        return self.network.config.patch_size

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        arguments = {"prompt": prompts, "prompt_2": None, "prompt_3": None, "device": device}
        words, _, whole, _ = pipe.encode_prompt(**arguments, do_classifier_free_guidance=False)
        return {"words": words, "whole": whole}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config, (clip, _, t5) = self.network.config, self._lengths(tokens)
        return {"words": (clip + t5, config.joint_attention_dim), "whole": (config.pooled_projection_dim,)}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x_t, condition["words"], condition["whole"], timesteps, return_dict=False)[0]


class Flux(Transformer):
    """FLUX.1, guidance-distilled. It was not trained on a null prompt, so classifier-free guidance has little effect
    and it is a weak teacher; SD3 is the better teacher of this kind."""

    PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    FIELDS = config_fields.FLUX
    ENCODERS = ("text_encoder", "text_encoder_2")
    TOKENIZERS = {"tokenizer": 0, "tokenizer_2": 512}
    LEFT_OUT = ("feature_extractor", "image_encoder")

    @property
    def channels(self) -> int:
        return self.network.config.in_channels // 4

    @property
    def takes_guidance(self) -> bool:
        return bool(self.network.config.guidance_embeds)

    @property
    def side(self) -> int:
        return self.pipe.default_sample_size

    @property
    def multiple(self) -> int:
        return 2

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        words, whole, _ = pipe.encode_prompt(prompts, device=device)
        return {"words": words, "whole": whole}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config, (_, t5) = self.network.config, self._lengths(tokens)
        return {"words": (t5, config.joint_attention_dim), "whole": (config.pooled_projection_dim,)}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        count, (height, width), words = len(x_t), x_t.shape[-2:], condition["words"]
        guidance = None
        if self.takes_guidance:
            guidance = torch.full((count,), self.settings.embedded_guidance, device=x_t.device)
        positions = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, x_t.device, torch.float32)
        patches = network(
            hidden_states=self.pipe._pack_latents(x_t, count, self.channels, height, width),
            timestep=timesteps / self.pipe.scheduler.config.num_train_timesteps,  # the network multiplies by it again
            guidance=guidance,
            encoder_hidden_states=words,
            pooled_projections=condition["whole"],
            txt_ids=words.new_zeros(words.shape[1], 3),
            img_ids=positions,
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(patches, height * self.cell, width * self.cell, self.cell)

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])


class Unconditional(Family):
    """An unconditional model: all prompts give the same prediction, so guidance has no effect."""

    PIPELINES = ("DDPMPipeline", "DDIMPipeline")
    FIELDS = config_fields.PLAIN_UNET
    ENCODERS, TOKENIZERS, LEFT_OUT = (), {}, ()

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        return {}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x_t, timesteps, return_dict=False)[0][:, : self.channels]  # the rest is a learned variance

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        config |= {"sample_size": side, "out_channels": self.channels}
        for name in ("conv_out.weight", "conv_out.bias"):  # a generator has no use for a learned variance
            state[name] = state[name][: self.channels]

    def call_arguments(self, steps: int, size: int) -> str:
        return f"num_inference_steps={steps}"


FAMILIES = {name: family for family in (Family, XL, IF, SD3, Flux, Unconditional) for name in family.PIPELINES}

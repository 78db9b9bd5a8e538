"""What the families of diffusers pipelines do differently: which parts they have, what a prompt becomes, how the
network is called, and which noise levels it knows. Every number is read from the pipeline's own configuration.

    family                     space    network      its output is           told of a prompt
    Stable Diffusion 1.x, 2.x  latents  U-Net        eps or v                words
    SDXL                       latents  U-Net        eps or v                words, a whole, sizes in pixels
    DeepFloyd IF, stage 1      pixels   U-Net        eps (and a variance)    words
    SD3, SD3.5                 latents  transformer  flow                    words, a whole
    FLUX.1                     latents  transformer  flow, in 2 x 2 patches  words, a whole, a distilled guidance
    DDPM                       pixels   U-Net        eps, v or x0            nothing

A U-Net whose configuration has time_cond_proj_dim (latent consistency models) is told a distilled guidance, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.teachers.base import HFConfig
from sds3d.teachers.hf import fields
from sds3d.teachers.hf.guidance import guidance_embedding
from sds3d.teachers.hf.levels import Levels, levels


@dataclass(frozen=True)
class Family:
    """A pipeline's frozen parts and how to use them; as it stands, of Stable Diffusion 1.x and 2.x.

    Args:
        pipe: a diffusers pipeline without its text encoders.
        settings: the user's.

    Attributes:
        PIPELINES: names of the classes whose files it reads; with the first of them, since their weights are the same.
        FIELDS: of the network's configuration, those that are known.
        PART: the network's name in the pipeline.
        ENCODERS: the text encoders' names.
        TOKENIZERS: the tokenizers' names, each with the number of tokens it is cut to; 0 is the tokenizer's own.
        LEFT_OUT: parts nobody needs here.
        UPCAST: whether the VAE's ``force_upcast`` is meant, as only SDXL's pipelines mean it.
        together: see `sds3d.teachers.base.Teacher`.
        SCHEDULER: what else a generator's scheduler says, because the pipeline asks for it.
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
    FIELDS: ClassVar[fields.KnownFields] = fields.UNET
    PART: ClassVar[str] = "unet"
    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    TOKENIZERS: ClassVar[dict[str, int]] = {"tokenizer": 0}
    LEFT_OUT: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    UPCAST: ClassVar[bool] = False
    SCHEDULER: ClassVar[dict[str, str]] = {}
    views_per_set: ClassVar[int] = 1

    def prepare(self) -> None:
        """Change the network, once, where it has to be."""

    @property
    def network(self) -> Any:
        """An nn.Module of a diffusers class of its own, whose ``config`` and parts torch's types do not know."""
        return getattr(self.pipe, self.PART)

    @property
    def vae(self) -> Any:
        """A diffusers module like ``network``; None in a family of pixels."""
        return self.pipe.components.get("vae")

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    @property
    def takes_guidance(self) -> bool:
        """Whether the network is told a distilled guidance."""
        return bool(self.network.config.get("time_cond_proj_dim"))

    def check(self) -> None:
        """Refuse a network or a VAE that would have to be used in another way than it is here, or settings that would
        do nothing. Raises ValueError."""
        network, vae, guidance = self.network, self.vae, self.settings.embedded_guidance
        fields.refuse_unknown(network, "the pipeline's network", self.FIELDS)
        taken = network.config.in_channels
        given = network.config.out_channels or taken  # twice as many where it says a variance, too
        if vae is not None:
            kind = type(vae).__name__
            if kind not in fields.VAES:
                raise ValueError(f"the pipeline's VAE is of the class {kind}; known are {', '.join(fields.VAES)}")
            fields.refuse_unknown(vae, "the pipeline's VAE", fields.VAES[kind])
        if taken > given or (vae is None and self.channels not in (1, 3)):
            raise ValueError(
                f"the pipeline's network takes {taken} channels and gives {given}: an image, and a mask or another "
                "image beside it, which a teacher has not (inpainting, depth, editing or upscaling); give a "
                "text-to-image model"
            )
        if guidance != HFConfig().embedded_guidance and not self.takes_guidance:
            raise ValueError(
                f"teacher.hf.embedded_guidance is {guidance:g}, and this {type(network).__name__} is told no guidance; "
                "leave it out (the method's own scale is method.scale)"
            )

    def _guidance(self, like: Tensor) -> Tensor | None:
        """What the U-Net is told of a distilled guidance for B images, (B, time_cond_proj_dim); None for nothing."""
        if not self.takes_guidance:
            return None
        embedding = guidance_embedding(self.settings.embedded_guidance, self.network.config.time_cond_proj_dim)
        return embedding.to(like).expand(len(like), -1)

    @property
    def side(self) -> int:
        """Of the x it was trained on."""
        size = self.network.config.sample_size
        if size is None and not self.settings.size:
            raise ValueError("the pipeline does not say what size it paints; give teacher.hf.size, in pixels")
        if size is None:
            return self.settings.size // self.cell
        return size if isinstance(size, int) else min(size)

    @property
    def cell(self) -> int:
        """Pixels a side that become one of x."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """What the side of an x is a multiple of, so that the network halves it evenly."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def levels(self, side: int) -> Levels:
        """The noise levels, of x of this side."""
        return levels(self.pipe.scheduler, (side // 2) ** 2)

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the network is told of N prompts, by name, (N, ...) each; by a pipeline with its text encoders."""
        words, _ = pipe.encode_prompt(prompts, device, 1, False)
        return {"words": words}

    def camera_condition(self, cameras: Cameras, camera_mask: Tensor | None) -> dict[str, Tensor] | None:
        """What the network is told of B cameras, by name, (B, ...) each; None where words have to do.

        Args:
            told: (B,) bool, False where the camera is dropped.
        """
        return None

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """The shape of what ``embed`` gives for one prompt, by name, where a CLIP reads so many tokens."""
        config = self.network.config
        return {"words": (self._lengths(tokens)[0], config.get("encoder_hid_dim") or config.cross_attention_dim)}

    def _lengths(self, tokens: int) -> list[int]:
        """Tokens of each text encoder."""
        return [length or tokens for length in self.TOKENIZERS.values()]

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The output (B, C, h, w) of this network, or one of its form, for x_t (B, C, h, w) at ``told`` (B,)."""
        return network(x_t, timesteps, condition["words"], timestep_cond=self._guidance(x_t), return_dict=False)[0]

    @property
    def feature_width(self) -> int:
        """Channels of the last of ``features``. Raises ValueError where there are none."""
        return self.network.config.block_out_channels[-1]

    def features(self, network: Any, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> list[Tensor]:
        """The maps of a U-Net's way down and of its middle while it answers, highest resolution first."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in (*network.down_blocks, network.mid_block)]
        try:
            self.answer(network, x_t, timesteps, condition)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    # what a generator that starts from it needs; see generator.py

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Set a generator's scheduler to so many steps, as the pipeline does."""
        scheduler.set_timesteps(steps)

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        """Change a generator's configuration and weights in place, so that its pipeline's defaults are right for it.

        A pipeline takes a U-Net with time_cond_proj_dim for guided already: it asks once, whatever its guidance_scale
        is, and tells the network that number through these weights, which are made 0. What they added for the one
        guidance that this generator knows goes into the bias of the layer that follows.
        """
        config |= {"sample_size": side, "time_cond_proj_dim": 256}
        weights = state.pop("time_embedding.cond_proj.weight", None)
        if weights is not None:
            added = weights.double() @ guidance_embedding(self.settings.embedded_guidance, weights.shape[1]).double()
            name, layer = "time_embedding.linear_1.bias", state["time_embedding.linear_1.weight"]
            state[name] = (state[name].double() + layer.double() @ added).to(layer.dtype)

    def call_arguments(self, steps: int, size: int) -> str:
        """What a user tells a generator's pipeline for an image of ``size`` pixels."""
        return f'"a prompt", num_inference_steps={steps}'


class XL(Family):
    """SDXL."""

    PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    FIELDS = fields.UNET.with_values(addition_embed_type=("text_time",))
    ENCODERS = ("text_encoder", "text_encoder_2")
    TOKENIZERS = {"tokenizer": 0, "tokenizer_2": 0}
    UPCAST = True

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        words, _, whole, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:  # the null prompt it was trained with
            said = torch.tensor([prompt != "" for prompt in prompts], device=words.device)
            words, whole = words * said[:, None, None], whole * said[:, None]
        return {"words": words, "whole": whole}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        config = self.network.config
        whole = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {**super().condition_shapes(tokens), "whole": (whole,)}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        height, width = (self.cell * side for side in x_t.shape[-2:])
        sizes = torch.tensor([height, width, 0.0, 0.0, height, width])  # original, crop's corner, target
        added = {"text_embeds": condition["whole"], "time_ids": sizes.to(x_t.device).expand(len(x_t), -1)}
        guidance = {"timestep_cond": self._guidance(x_t), "added_cond_kwargs": added}
        return network(x_t, timesteps, condition["words"], **guidance, return_dict=False)[0]


class IF(Family):
    """DeepFloyd IF's first stage."""

    PIPELINES = ("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline")
    FIELDS = fields.UNET.with_values(time_cond_proj_dim=(None,))  # its pipelines would tell it nothing
    TOKENIZERS = {"tokenizer": 77}
    LEFT_OUT = ("safety_checker", "feature_extractor", "watermarker")
    SCHEDULER = {"variance_type": "fixed_small"}  # the pipeline then drops the learned variance

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
    """What flow transformers have in common."""

    PIPELINES = ()
    PART = "transformer"

    @property
    def feature_width(self) -> int:
        raise ValueError(
            f"a {type(self.network).__name__} has no maps to compare; give distance=pixels or lpips, and for a "
            "discriminator (dmd2) a teacher with a U-Net"
        )

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        pass

    def call_arguments(self, steps: int, size: int) -> str:
        guidance = self.settings.embedded_guidance if self.takes_guidance else 1.0
        own = self.pipe.default_sample_size * self.cell
        sizes = "" if size == own else f", height={size}, width={size}"
        return f"{super().call_arguments(steps, size)}, guidance_scale={guidance:g}{sizes}"


class SD3(Transformer):
    """SD3 and SD3.5."""

    PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    FIELDS = fields.SD3
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
    """Guidance-distilled: it was never trained on a null prompt, so two-pass guidance says little and it teaches
    weakly. SD3 is the better teacher of this kind."""

    PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    FIELDS = fields.FLUX
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
        size, (height, width), words = len(x_t), x_t.shape[-2:], condition["words"]
        guidance = None
        if self.takes_guidance:
            guidance = torch.full((size,), self.settings.embedded_guidance, device=x_t.device)
        places = self.pipe._prepare_latent_image_ids(size, height // 2, width // 2, x_t.device, torch.float32)
        patches = network(
            hidden_states=self.pipe._pack_latents(x_t, size, self.channels, height, width),
            timestep=timesteps / self.pipe.scheduler.config.num_train_timesteps,  # it multiplies by that itself
            guidance=guidance,
            encoder_hidden_states=words,
            pooled_projections=condition["whole"],
            txt_ids=words.new_zeros(words.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return self.pipe._unpack_latents(patches, height * self.cell, width * self.cell, self.cell)

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])


class Unconditional(Family):
    """Told nothing of prompts: every branch of guidance is the same answer."""

    PIPELINES = ("DDPMPipeline", "DDIMPipeline")
    FIELDS = fields.PLAIN_UNET
    ENCODERS, TOKENIZERS, LEFT_OUT = (), {}, ()

    def embed(self, pipe: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        return {}

    def condition_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return {}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x_t, timesteps, return_dict=False)[0][:, : self.channels]  # the rest is a learned variance

    def adapt(self, config: dict[str, Any], state: dict[str, Tensor], side: int) -> None:
        config |= {"sample_size": side, "out_channels": self.channels}
        for name in ("conv_out.weight", "conv_out.bias"):  # a variance is of no use to a generator
            state[name] = state[name][: self.channels]

    def call_arguments(self, steps: int, size: int) -> str:
        return f"num_inference_steps={steps}"


FAMILIES = {name: family for family in (Family, XL, IF, SD3, Flux, Unconditional) for name in family.PIPELINES}

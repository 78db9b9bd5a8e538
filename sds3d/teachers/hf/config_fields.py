"""The known fields of a pipeline's configuration files.

diffusers keeps every field of a file in a part's ``config``, including fields that its class does not know and ignores.
The author of the file meant something by them, so a teacher that ignored them could be wrong. A field is therefore
refused by name unless it is one of

    handled  diffusers' class does everything about it, and it does not change how the part is called
    values   it changes how the part must be called, and this package calls it correctly for these values alone
    unused   it concerns something that is not used here, such as a scheduler's own sampling; any value is accepted

Any other field is accepted if it is off (null, false or empty) or has the default value of its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class KnownFields:
    """The known fields of one kind of part; see above."""

    handled: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    def with_values(self, **changed: tuple[Any, ...]) -> KnownFields:
        """Return a copy with other accepted values for some fields."""
        return KnownFields(self.handled - changed.keys(), {**self.values, **changed}, self.unused)


_UNET = """
    act_fn addition_embed_type_num_heads addition_time_embed_dim attention_head_dim block_out_channels
    center_input_sample class_embeddings_concat conv_in_kernel conv_out_kernel cross_attention_dim cross_attention_norm
    down_block_types downsample_padding dropout dual_cross_attention encoder_hid_dim flip_sin_to_cos freq_shift
    in_channels layers_per_block mid_block_only_cross_attention mid_block_scale_factor mid_block_type norm_eps
    norm_num_groups num_attention_heads only_cross_attention out_channels projection_class_embeddings_input_dim
    resnet_out_scale_factor resnet_skip_time_act resnet_time_scale_shift reverse_transformer_layers_per_block
    sample_size time_cond_proj_dim time_embedding_act_fn time_embedding_dim time_embedding_type timestep_post_act
    transformer_layers_per_block up_block_types upcast_attention use_linear_projection
"""
UNET = KnownFields(
    handled=frozenset(_UNET.split()),
    values={
        "addition_embed_type": (None, "text"),  # "text" is computed from the word vectors, which it gets anyway
        "attention_type": ("default",),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "num_class_embeds": (None,),
    },
)
_PLAIN_UNET = """
    act_fn add_attention attention_head_dim attn_norm_num_groups block_out_channels center_input_sample down_block_types
    downsample_padding downsample_type dropout flip_sin_to_cos freq_shift in_channels layers_per_block
    mid_block_scale_factor mid_block_type norm_eps norm_num_groups num_train_timesteps out_channels
    resnet_time_scale_shift sample_size time_embedding_dim time_embedding_type up_block_types upsample_type
"""
PLAIN_UNET = KnownFields(frozenset(_PLAIN_UNET.split()), {"class_embed_type": (None,), "num_class_embeds": (None,)})
_SD3 = """
    attention_head_dim caption_projection_dim dual_attention_layers in_channels joint_attention_dim num_attention_heads
    num_layers out_channels patch_size pooled_projection_dim pos_embed_max_size qk_norm sample_size
"""
SD3 = KnownFields(frozenset(_SD3.split()))
_FLUX = """
    attention_head_dim axes_dims_rope in_channels joint_attention_dim num_attention_heads num_layers num_single_layers
    out_channels pooled_projection_dim
"""
FLUX = KnownFields(frozenset(_FLUX.split()), {"guidance_embeds": (True, False), "patch_size": (1,)})
_KL = """
    act_fn block_out_channels down_block_types force_upcast in_channels latent_channels latents_mean latents_std
    layers_per_block mid_block_add_attention norm_num_groups out_channels sample_size scaling_factor shift_factor
    up_block_types use_post_quant_conv use_quant_conv
"""
_TINY = """
    act_fn decoder_block_out_channels encoder_block_out_channels force_upcast in_channels latent_channels
    latent_magnitude latent_shift num_decoder_blocks num_encoder_blocks out_channels scaling_factor shift_factor
    upsample_fn upsampling_scaling_factor
"""
# the class of a tiny autoencoder itself adds block_out_channels to its configuration
VAES = {
    "AutoencoderKL": KnownFields(frozenset(_KL.split())),
    "AutoencoderTiny": KnownFields(frozenset(_TINY.split()), unused=frozenset(["block_out_channels"])),
}
# fields of model_index.json itself; the safety checker and the watermark are never loaded
PIPELINE = KnownFields(
    values={"requires_aesthetics_score": (False,), "force_zeros_for_empty_prompt": (True, False)},
    unused=frozenset(["requires_safety_checker", "add_watermarker"]),
)


def refuse_unknown(part: Any, what: str, known: KnownFields) -> None:
    """Refuse a part whose configuration has unknown fields.

    Args:
        part: part of a diffusers pipeline.
        what: description of the part for the message.

    Raises:
        ValueError: a field is unknown, or a known field has an unknown value; names field and value.
    """
    parameters = inspect.signature(type(part).__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    _refuse(part.config, f"{what} (a {type(part).__name__})", known, defaults)


def refuse_unknown_parts(index: Mapping[str, Any], known_parts: set[str], folder: Path) -> None:
    """Refuse a pipeline with unknown parts or unknown fields in model_index.json.

    Args:
        index: content of model_index.json.
        known_parts: names of known parts.
        folder: folder of the pipeline, for the message.

    Raises:
        ValueError: a part or a field is unknown; names it.
    """
    parts = {name: what for name, what in index.items() if isinstance(what, list) and not name.startswith("_")}
    for name, what in parts.items():
        if name not in known_parts and what[-1] is not None:
            raise ValueError(
                f"the pipeline in {folder} has a part {name} (a {what[-1]}) that a teacher would not use; give a "
                f"pipeline without it, or set it to [null, null] in model_index.json"
            )
    _refuse({k: v for k, v in index.items() if k not in parts}, f"{folder / 'model_index.json'}", PIPELINE, {})


def _refuse(config: Mapping[str, Any], what: str, known: KnownFields, defaults: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name.startswith("_") or name in known.unused:
            continue
        if name in known.values:
            if value not in known.values[name]:
                accepted = ", ".join(map(repr, known.values[name]))
                raise ValueError(f"{what} says {name}: {value!r}; a teacher can have {name}: {accepted}")
        elif not (_off(value) or (name in defaults and (name in known.handled or _same(value, defaults[name])))):
            reason = "its class does not know it" if name in known.handled else "sds3d does not know what it means"
            raise ValueError(
                f"{what} says {name}: {value!r}, and {reason}; update diffusers and sds3d, or take the line out of its "
                "file if the model is the same without it"
            )


def _off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], (), {})


def _same(value: Any, default: Any) -> bool:
    """Return whether a value equals a default; JSON has lists where Python has tuples."""
    return value == (list(default) if isinstance(default, tuple) and isinstance(value, list) else default)

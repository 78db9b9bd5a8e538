"""Hash encoding by tiny-cuda-nn (Python package tinycudann). Opt-in: users build the package themselves."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from sds3d.ops.reference import GridSpec, check_hash_encode


def check() -> None:
    """Raise ValueError if tinycudann is not installed."""
    try:
        import tinycudann  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "backend tinycudann needs tinycudann, which no package registry carries; build it from "
            "github.com/NVlabs/tiny-cuda-nn (bindings/torch), or give --backend auto"
        ) from error


@lru_cache(maxsize=8)
def _encoding(spec: GridSpec, dtype: torch.dtype) -> nn.Module:
    """Return tinycudann's encoding of this shape, with float16 or float32 output. Its own parameters are never used."""
    import tinycudann

    config = {
        "otype": "HashGrid",
        "n_levels": spec.levels,
        "n_features_per_level": spec.features,
        "log2_hashmap_size": spec.log2_table,
        "base_resolution": spec.base,
        "per_level_scale": spec.per_level_scale,
        "interpolation": "Linear",
    }
    encoding = tinycudann.Encoding(3, config, dtype=dtype)
    theirs, ours = encoding.params.numel(), spec.entries * spec.features
    if theirs != ours:  # tinycudann computes the scales in float32
        raise ValueError(
            f"backend tinycudann uses {theirs} parameters for {spec}, and sds3d {ours}; "
            "change finest by 1, or give --backend torch"
        )
    return encoding


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_encode` on CUDA, in float16 for a float16 table, else in float32."""
    check_hash_encode(points, table, spec)
    inside = torch.where(points.isnan(), 0, points.clamp(0, 1))
    encoding = _encoding(spec, torch.float16 if table.dtype == torch.float16 else torch.float32)
    features = torch.func.functional_call(encoding, {"params": table.float().view(-1)}, (inside,))
    return features[:, : spec.width].to(table.dtype)


def hash_slope(points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_slope` on CUDA, by tinycudann's own derivatives."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        features = hash_encode(points, table, spec)
        (slope,) = torch.autograd.grad(features, points, grad.to(features.dtype), create_graph=graph)
    return slope

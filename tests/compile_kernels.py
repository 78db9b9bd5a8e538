"""Compile the Triton kernels for an H100 (sm_90), which needs no GPU. A program of its own, without the interpreter."""

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from sds3d.ops import triton_kernels as kernels

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {"levels": "*i64", "offsets": "*i64", "ray_index": "*i64", "occupancy": "*u8"}
NUMBERS = ("count", "width", "rays", "cells")
ENCODING = {"F": 2, "FP": 2, "BLOCK": 256}


def build(kernel, constants: dict, real: str, **pointers: str) -> None:
    """Compile one variant; pointers that are not named are to ``real``."""
    types = {name: "i32" if name in NUMBERS else f"*{real}" for name in kernel.arg_names}
    types |= {name: kind for name, kind in {**POINTERS, **pointers}.items() if name in types}
    types |= dict.fromkeys(constants, "constexpr")
    made = compile(ASTSource(kernel, types, dict(constants)), target=TARGET)
    assert made.asm["cubin"], kernel.__name__
    print(kernel.__name__, real, constants)


for real, table in (("fp32", "fp16"), ("fp32", "bf16"), ("fp64", "fp64")):
    for along in (False, True):
        build(kernels.gather, {**ENCODING, "ALONG": along}, real, table=f"*{table}", out=f"*{table}")
        build(kernels.scatter, {**ENCODING, "ALONG": along, "FIXED": False}, real, grad=f"*{table}")
        fixed = {"grad": f"*{table}", "factor": "*fp64", "out": "*i64"}
        build(kernels.scatter, {**ENCODING, "ALONG": along, "FIXED": True}, real, **fixed)
    build(kernels.point_gradient, ENCODING, real, table=f"*{table}", grad=f"*{table}")
build(kernels.touch, {}, "fp32")
build(kernels.gather, {"F": 3, "FP": 4, "BLOCK": 256, "ALONG": False}, "fp32")
for real in ("fp32", "fp64"):
    for write in (False, True):
        build(kernels.march, {"WRITE": write, "BLOCK": 128}, real)
    for channels, padded in ((0, 1), (4, 4), (7, 8)):
        build(kernels.blend, {"C": channels, "CP": padded, "BLOCK": 64}, real)
        build(kernels.blend_backward, {"C": channels, "CP": padded, "BLOCK": 64}, real)

"""Files of weights that are no teachers of this project: named by their header, before any tensor is read."""

import json
import shlex
import struct
from pathlib import Path

import diffusers
import pytest

from sds3d.teachers import small
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.load import load_teacher

HUGE = 1 << 40  # bytes of one tensor: whoever reads it, or maps it, has no memory for it
FULL = ["first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.final.weight"]


def write(path: Path, names: list[str], metadata: dict[str, str] | None = None) -> Path:
    """A file of float16 tensors of these names, a terabyte each, of which the disk holds the header only."""
    header = {"__metadata__": metadata} if metadata else {}
    for i, name in enumerate(names):
        header[name] = {"dtype": "F16", "shape": [HUGE // 2], "data_offsets": [i * HUGE, (i + 1) * HUGE]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + len(names) * HUGE)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        load_teacher(TeacherConfig(str(path)), "cpu")
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("names", "cls"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", *FULL], "StableDiffusionPipeline"),
        (["model.diffusion_model.label_emb.0.0.weight", "conditioner.embedders.0.x"], "StableDiffusionXLPipeline"),
        (["model.diffusion_model.joint_blocks.0.x", FULL[0]], "StableDiffusion3Pipeline"),
        (["double_blocks.0.img_attn.qkv.weight"], "FluxPipeline"),
    ],
)
def test_a_model_in_one_file_says_how_to_convert_it(names, cls, tmp_path):
    told = refused(write(tmp_path / "v1-5.safetensors", names))
    command = told[told.index("python -c") : told.index("; then give")]
    program = shlex.split(command)
    assert program[:2] == ["python", "-c"] and hasattr(getattr(diffusers, cls), "from_single_file")
    assert f"diffusers.{cls}.from_single_file('{tmp_path / 'v1-5.safetensors'}')" in program[2]
    compile(program[2], "command", "exec")
    assert told.endswith(f"give --teacher {tmp_path / 'v1-5'}")
    assert ("may lack" in told) == (cls == "FluxPipeline")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "is a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "is a LoRA"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part of a diffusers pipeline"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "one part of a diffusers pipeline"),
        ("something.else", "no teacher of this project"),
    ],
)
def test_other_files_are_named(name, words, tmp_path):
    assert words in refused(write(tmp_path / "file.safetensors", [name]))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_not_read(suffix, tmp_path):
    path = tmp_path / f"v1-5{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "is a pickle" in refused(path)


def test_the_packaged_teachers_are_theirs():
    assert small.load(small.packaged("digits")).vocabulary


@pytest.mark.parametrize("damage", [b"", b"x" * 50])
def test_a_damaged_file_says_so(damage, tmp_path):
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(damage)
    assert "is damaged" in refused(path)

"""Writing and reading of mesh files: GLB, OBJ (with .mtl and .png), PLY, STL.

Colours are sRGB bytes in memory, in textures, in OBJ and in PLY. GLB's vertex colours are linear, as glTF 2.0 requires
(3.9.2, COLOR_0). PLY has colours at vertices only, and STL has none.

glTF viewers light the materials. If a scene's colours contain light already, KHR_materials_unlit tells viewers to show
them unchanged; viewers without this extension show a matt surface (metallic 0, roughness 1).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from sds3d.export.model import Model
from sds3d.runtime.files import replacing

if TYPE_CHECKING:
    import trimesh

FORMATS = (".glb", ".obj", ".ply", ".stl")

Check = Callable[[Path], dict[str, Any]]  # a written file -> values for JSON


def write(model: Model, path: str | Path, check: Check | None = None, unlit: bool = True) -> list[Path]:
    """Write a model to a file, atomically; the suffix chooses the format.

    Args:
        model: in the file's coordinates.
        check: called with the written file before it gets its final name. A GLB stores the values that it returns, in
            asset.extras and, for programs that look there, in the scene's extras.
        unlit: whether the colours contain light already (GLB only).

    Returns:
        the written files, ``path`` first; a textured OBJ has three.

    Raises:
        ValueError: the suffix is not one of FORMATS, or the file cannot be written.
    """
    path = Path(path)
    with ExitStack() as stack:
        temporary = stack.enter_context(replacing(path, FORMATS))  # entered first, renamed last
        content, others = _encode(model, path.stem, path.suffix.lower(), unlit)
        for name, data in others.items():
            stack.enter_context(replacing(path.with_name(name))).write_bytes(data)
        temporary.write_bytes(content)
        if check is not None and others:
            _check_in_folder(model, path, check, unlit)
        elif check is not None:
            extras = check(temporary)
            if path.suffix.lower() == ".glb":
                temporary.write_bytes(with_extras(content, extras))
    return [path, *(path.with_name(name) for name in others)]


def read(path: str | Path) -> Model:
    """Read a model that ``write`` wrote.

    Raises:
        ValueError: the file does not exist, or is not a mesh.
    """
    import trimesh

    path = Path(path)
    if path.suffix.lower() not in FORMATS or not path.is_file():
        raise ValueError(f"'{path}' is no mesh file; give an existing {', '.join(FORMATS)}")
    try:
        # trimesh.load_mesh would give the mesh new normals
        (mesh,) = trimesh.load_scene(path, process=False).geometry.values()
        if path.suffix.lower() == ".glb" and getattr(mesh.visual, "uv", None) is None:
            scene = trimesh.load_scene(path, process=False, skip_materials=True)  # else trimesh drops vertex colours
            (mesh,) = scene.geometry.values()
        model = _from_trimesh(mesh)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged ({error}); export it again") from error
    if path.suffix.lower() == ".glb" and model.colours is not None:
        model = replace(model, colours=_recode(model.colours, _to_srgb))
    return model


def to_trimesh(model: Model) -> trimesh.Trimesh:
    """Return the model as a trimesh.Trimesh, with vertex colours or a texture, in sRGB."""
    import trimesh
    from trimesh.visual import ColorVisuals, TextureVisuals
    from trimesh.visual.material import PBRMaterial

    mesh = trimesh.Trimesh(model.vertices, model.faces, vertex_normals=model.normals, process=False)
    if model.texture is not None:
        from PIL import Image

        assert model.uv is not None, "a textured model has uv coordinates"
        material = PBRMaterial(
            name="asset", baseColorTexture=Image.fromarray(model.texture), metallicFactor=0.0, roughnessFactor=1.0
        )
        uv = np.stack([model.uv[:, 0], 1 - model.uv[:, 1]], -1)  # trimesh's v points up
        mesh.visual = TextureVisuals(uv=uv, material=material)
    elif model.colours is not None:
        assert isinstance(mesh.visual, ColorVisuals), type(mesh.visual)
        mesh.visual.vertex_colors = np.concatenate([model.colours, np.full_like(model.colours[:, :1], 255)], -1)
    return mesh


def _from_trimesh(mesh: trimesh.Trimesh) -> Model:
    """Return a trimesh.Trimesh as a model: the inverse of `to_trimesh`."""
    from trimesh.visual import ColorVisuals, TextureVisuals

    visual, colours, uv, texture = mesh.visual, None, None, None
    if isinstance(visual, TextureVisuals) and visual.uv is not None:
        material = visual.material
        image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
        if image is not None:
            uv = np.stack([visual.uv[:, 0], 1 - visual.uv[:, 1]], -1)
            texture = np.asarray(image.convert("RGB"))
    elif isinstance(visual, ColorVisuals) and visual.kind == "vertex":
        colours = np.asarray(visual.vertex_colors)[:, :3]
    return Model(
        np.asarray(mesh.vertices), np.asarray(mesh.faces), np.asarray(mesh.vertex_normals), colours, uv, texture
    )


def with_extras(glb: bytes, extras: dict[str, Any]) -> bytes:
    """Return a GLB with ``extras`` in its asset and its scene (glTF 2.0, 4.4: a header, a JSON chunk, a data chunk)."""
    length = struct.unpack_from("<I", glb, 12)[0]
    tree = json.loads(glb[20 : 20 + length])
    tree["asset"]["extras"] = tree["scenes"][0]["extras"] = extras
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    rest = glb[20 + length :]
    return struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A) + text + rest


def _encode(model: Model, stem: str, kind: str, unlit: bool) -> tuple[bytes, dict[str, bytes]]:
    """Return a file's content, and the content of further files that it needs, by name."""
    if kind == ".glb":
        if model.colours is not None and model.texture is None:
            model = replace(model, colours=_recode(model.colours, _to_linear))
        finish = partial(_finish_tree, unlit=unlit)
        return _by_trimesh(model, "glb", include_normals=True, tree_postprocessor=finish), {}
    if kind == ".obj" and model.texture is not None:
        return _textured_obj(model, stem)
    return _by_trimesh(model, kind[1:]), {}


def _by_trimesh(model: Model, kind: str, **options: Any) -> bytes:
    """Return a file's content as trimesh exports it; trimesh returns text for some formats."""
    content = to_trimesh(model).export(file_type=kind, **options)
    assert isinstance(content, bytes | str), type(content)
    return content.encode() if isinstance(content, str) else content


def _check_in_folder(model: Model, path: Path, check: Check, unlit: bool) -> None:
    """Check files that refer to each other: in a temporary folder, where they have their final names."""
    with TemporaryDirectory(dir=path.parent, prefix=".check-") as folder:
        check(write(model, Path(folder) / path.name, unlit=unlit)[0])


def _textured_obj(model: Model, stem: str) -> tuple[bytes, dict[str, bytes]]:
    """Return the content of an OBJ, and of its STEM.mtl and STEM-texture.png."""
    from io import BytesIO

    from PIL import Image

    assert model.texture is not None and model.uv is not None
    picture = BytesIO()
    Image.fromarray(model.texture).save(picture, "png")
    lines = [f"mtllib {stem}.mtl", "usemtl asset"]
    uv = np.stack([model.uv[:, 0], 1 - model.uv[:, 1]], -1)  # OBJ's v points up
    for key, rows in (("v", model.vertices), ("vt", uv), ("vn", model.normals)):
        lines += [f"{key} " + " ".join(f"{x:.6f}" for x in row) for row in rows.tolist()]
    lines += ["f " + " ".join(f"{i}/{i}/{i}" for i in row) for row in (model.faces + 1).tolist()]
    material = f"newmtl asset\nKa 1 1 1\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {stem}-texture.png\n"
    others = {f"{stem}.mtl": material.encode(), f"{stem}-texture.png": picture.getvalue()}
    return ("\n".join(lines) + "\n").encode(), others


def _finish_tree(tree: dict[str, Any], unlit: bool) -> None:
    """Add to a glTF tree what trimesh leaves out: the generator, one matt material for all meshes, and names."""
    tree["asset"] = {"version": "2.0", "generator": "sds3d"}
    materials = tree.setdefault(
        "materials", [{"pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]
    )
    for material in materials:
        material["name"] = "asset"
        if unlit:
            material["extensions"] = {"KHR_materials_unlit": {}}
    if unlit:
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
    for node in tree["nodes"]:
        if "mesh" in node:
            node["name"] = "asset"
    for mesh in tree["meshes"]:
        mesh["name"] = "asset"
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _to_linear(x: np.ndarray) -> np.ndarray:
    """Convert sRGB in [0, 1] to linear (IEC 61966-2-1)."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _to_srgb(x: np.ndarray) -> np.ndarray:
    """Convert linear in [0, 1] to sRGB (IEC 61966-2-1)."""
    return np.where(x <= 0.0031308, x * 12.92, 1.055 * np.maximum(x, 1e-9) ** (1 / 2.4) - 0.055)


def _recode(rgb: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a curve to RGB bytes (V, 3)."""
    return np.round(curve(rgb / 255.0) * 255).astype(np.uint8)

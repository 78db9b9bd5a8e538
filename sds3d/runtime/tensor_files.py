"""Files of named tensors with a text header: safetensors with a digest of the content in the header.

safetensors does not check its values: it would load a flipped bit or a page of zeros. So `read` compares the digest.
Older files, without a digest or with one in an earlier form, are read without this check.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DIGEST, _EARLIER = "sha256", "digest"  # the digest's key in the header; the key of an earlier form, not compared


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a file with these tensors, which must be contiguous and on the CPU, and this header."""
    from safetensors.torch import save

    header = dict(header or {})
    return save(dict(tensors), {**header, _DIGEST: digest(tensors, header)})


def read_header(path: Path) -> dict[str, str]:
    """Return a file's header without reading the tensors. Raise ValueError if the file has none."""
    return _read(path, False)[1]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors, on the CPU, and its header without the digest.

    Raises:
        ValueError: the file is not a safetensors file, is damaged, or its content does not match the digest.
    """
    tensors, header = _read(path, True)
    written, _ = header.pop(_DIGEST, None), header.pop(_EARLIER, None)
    if written not in (None, digest(tensors, header)):
        raise ValueError("its content is not what was written")
    return tensors, header


def _read(path: Path, whole: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if whole}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def digest(tensors: Mapping[str, Tensor], header: object) -> str:
    """Return the SHA-256 of named tensors (names, dtypes, shapes and values) and of a header as JSON."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    sha.update(json.dumps(header, sort_keys=True).encode())
    return sha.hexdigest()


def flatten(value: object, tensors: dict[str, Tensor], path: str = "") -> object:
    """Return a state as JSON values, and put its tensors into ``tensors`` under their path.

    The state consists of nested dicts, lists, tuples, tensors, str, int, float, bool and None. Keys of a dict that are
    not strings keep their type.
    """
    if isinstance(value, Tensor):
        key = path.strip("/")
        tensors[key] = value.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"$tensor": key}
    if isinstance(value, dict):
        items = [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in value.items()]
        return dict(items) if all(isinstance(k, str) for k in value) else {"$items": items}
    if isinstance(value, list | tuple):
        parts = [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    assert value is None or isinstance(value, str | int | float | bool), (path, type(value))
    return value


def unflatten(value: object, tensors: Mapping[str, Tensor]) -> object:
    """Return the state from which `flatten` made ``value`` and ``tensors``."""
    if isinstance(value, list):
        return [unflatten(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(unflatten(v, tensors) for v in value["$tuple"])
    if "$items" in value:
        return {k: unflatten(v, tensors) for k, v in value["$items"]}
    return {k: unflatten(v, tensors) for k, v in value.items()}

"""Files of named tensors with a header of text: safetensors, and in the header a digest of it all.

safetensors itself checks no number: a flipped bit or a page of zeros would be read as it is. So `read` compares the
digest. A file from before there was one, or with that of an earlier form, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_DIGEST, _EARLIER = "sha256", "digest"  # its key in the header; that of an earlier form, which is not compared


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> bytes:
    """A file of these tensors, on the CPU and contiguous, with this header."""
    from safetensors.torch import save

    header = dict(header or {})
    return save(dict(tensors), {**header, _DIGEST: digest(tensors, header)})


def read_header(path: Path) -> dict[str, str]:
    """A file's header, without the tensors, which may be gigabytes. Raises ValueError where there is none."""
    return _read(path, False)[1]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, on the CPU, and its header without the digest.

    Raises:
        ValueError: it is no such file, is damaged, or its content is not what was written.
    """
    tensors, header = _read(path, True)
    mark, _ = header.pop(_DIGEST, None), header.pop(_EARLIER, None)
    if mark not in (None, digest(tensors, header)):
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
    """SHA-256 of named tensors, of their numbers, types and shapes, and of what JSON makes of a header."""
    mark = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        mark.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        mark.update(value.reshape(-1).view(torch.uint8).numpy().data)
    mark.update(json.dumps(header, sort_keys=True).encode())
    return mark.hexdigest()


def flatten(value: object, tensors: dict[str, Tensor], path: str = "") -> object:
    """JSON for a state (nested dicts, lists, tuples, tensors, str, int, float, bool, None); its tensors go to
    ``tensors``, under their path. Keys that are no text keep their type."""
    if isinstance(value, Tensor):
        key = path.strip("/")
        tensors[key] = value.detach().cpu().contiguous().clone()  # a clone: safetensors refuses shared memory
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
    """The state that `flatten` was given."""
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

"""Embeds prompts once and caches the embeddings in memory and on disk, so that the text encoders can be unloaded."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.prompts import VIEW_WORDS, named_view, view_blend
from sds3d.runtime import tensor_files
from sds3d.runtime.files import replacing
from sds3d.runtime.transfer import onto

Condition = dict[str, Tensor]  # by name, (N, ...) each
VERSION = 2  # of the cache on disk; embeddings of version 1 depended on the other prompts in the batch


def cache_folder() -> Path:
    """Return the default folder of embedded prompts."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sds3d" / "prompts"


def _without_caller_modes(method: Callable[..., Condition]) -> Callable[..., Condition]:
    """Run a method without gradients and outside the caller's autocast and inference mode."""

    @wraps(method)
    def run(self: PromptEmbedder, *arguments: Any) -> Condition:
        with torch.inference_mode(False), torch.no_grad():  # autocast is off on the CPU too: text encoders may be there
            with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
                return method(self, *arguments)

    return run


class Embedder(Protocol):
    """The interface of `PromptEmbedder` and of its stand-in on torch's meta device.

    Attributes:
        device: device of the conditions.
        all_views: whether to embed a prompt together with all its view words.
    """

    device: torch.device
    all_views: bool

    def expect(self, prompt: str) -> None:
        """Announce a prompt that will be used later."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts, tensors (B, ...) by name."""
        ...

    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        """Return the condition of B prompts, each with the view of its camera."""
        ...


class PromptEmbedder:
    """Embeds prompts in the dtype of the text encoders' weights, whatever autocast or inference mode the caller has.

    Args:
        embed: loads the text encoders, embeds N prompts and unloads the encoders.
        model_key: identifies model and dtype, which the embeddings depend on beside the prompt.
        folder: folder of the disk cache.
        device: device of the embeddings.

    Attributes:
        all_views: whether to embed a prompt together with all its view words.
    """

    def __init__(self, embed: Callable[[list[str]], Condition], model_key: str, folder: Path, device: torch.device):
        self.embed, self.model_key, self.folder, self.device = embed, model_key, folder, device
        self.all_views = True
        self._known: dict[str, Condition] = {}
        self._expected: list[str] = [""]

    def expect(self, prompt: str) -> None:
        """Announce a prompt that will be used later. It is embedded together with the first prompt that is used."""
        self._expected.append(prompt)

    @_without_caller_modes
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts, tensors (B, ...) by name."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if missing:
            wanted = [*missing, *self._expected]
            wanted = dict.fromkeys(text for p in wanted for text in (_related_prompts(p) if self.all_views else [p]))
            self._load_or_embed([p for p in wanted if p not in self._known])
            self._expected.clear()
        conditions = [self._known[p] for p in prompts]
        return {name: torch.stack([c[name] for c in conditions]) for name in conditions[0]}

    @_without_caller_modes
    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        """Return the condition of B prompts: the embeddings with view words, blended by the angles of each camera.

        Args:
            camera_mask: (B,) bool, False where the camera is dropped.
        """
        angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
        weights = torch.tensor([[0.0, *view_blend(*pair).values()] for pair in angles])
        weights = onto(weights, self.device)  # (B, 5): of the prompt without view words, then by VIEW_WORDS
        if camera_mask is not None:
            no_view = onto(torch.eye(weights.shape[1])[0], self.device)
            weights = torch.where(onto(camera_mask, self.device)[:, None], weights, no_view)
        texts_by_view = zip(*(_with_views(p) for p in prompts), strict=True)
        views = [self(texts) for texts in texts_by_view]
        return {name: _blend([view[name] for view in views], weights) for name in views[0]}

    def _load_or_embed(self, prompts: list[str]) -> None:
        """Read embeddings from the disk; embed and write the missing ones."""
        for prompt in prompts:
            cached = _read(self._path(prompt))
            if cached is not None:
                self._remember(prompt, cached)
        missing = [p for p in prompts if p not in self._known]
        embedded = self.embed(missing) if missing else {}
        for i, prompt in enumerate(missing):
            condition = {name: rows[i].contiguous().cpu() for name, rows in embedded.items()}
            self._remember(prompt, condition)
            _write(self._path(prompt), condition, prompt)

    def _remember(self, prompt: str, condition: Condition) -> None:
        self._known[prompt] = {name: onto(value, self.device) for name, value in condition.items()}

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{VERSION} {self.model_key}: {prompt}".encode()).hexdigest()[:40]
        return self.folder / f"{name}.safetensors"


def _with_views(prompt: str) -> list[str]:
    """Return a prompt without view words, then with each; the null prompt never gets view words."""
    return [prompt, *(f"{prompt}, {view}" if prompt else "" for view in VIEW_WORDS)]


def _related_prompts(prompt: str) -> list[str]:
    """Return the prompts that a run with this one will probably use: it alone if it names a view itself, otherwise
    the prompt without and with each of the view words."""
    for view in VIEW_WORDS:
        prompt = prompt.removesuffix(f", {view}")
    return [prompt] if named_view(prompt) else _with_views(prompt)


def _blend(views: list[Tensor], weights: Tensor) -> Tensor:
    """Return the mean of N embeddings (B, ...) with weights (B, N)."""
    factors = weights.T.view(*weights.T.shape, *[1] * (views[0].dim() - 1))  # (N, B, 1 ...)
    return (torch.stack(views).float() * factors).sum(0).to(views[0].dtype)


def _read(path: Path) -> Condition | None:
    """Read a cached embedding; None if there is none, and None with a warning if it is damaged."""
    if not path.is_file():
        return None
    try:
        return tensor_files.read(path)[0]
    except ValueError as error:
        warnings.warn(f"the kept embedding {path} is damaged ({error}); embedding the prompt again", stacklevel=2)
        return None


def _write(path: Path, condition: Condition, prompt: str) -> None:
    """Cache an embedding on disk. Only warns if the file cannot be written."""
    data = tensor_files.to_bytes(condition, {"prompt": prompt})
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except ValueError as error:
        warnings.warn(f"the embedding is not kept: {error}", stacklevel=2)


def warn_of_cut(tokenizer: Any, length: int, prompt: str) -> None:
    """Warn about the words that a tokenizer cuts from a long prompt.

    Args:
        length: maximal number of tokens, including those for start and end.
    """
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > length:
        lost = tokenizer.decode(ids[length - 1 : -1]).strip()  # the last token is the end, which is not cut
        warnings.warn(
            f"with view words the prompt has {len(ids)} tokens and a text encoder reads {length}: it never sees "
            f"{lost!r}; shorten the prompt",
            stacklevel=3,
        )

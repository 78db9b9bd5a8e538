"""What a prompt becomes: embedded once, kept in memory and on disk, so that text encoders need not stay."""

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
VERSION = 2  # of what is kept on disk; the first one's numbers depended on who asked first


def cache_folder() -> Path:
    """Where embedded prompts are kept unless the settings say otherwise."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sds3d" / "prompts"


def _plain(method: Callable[..., Condition]) -> Callable[..., Condition]:
    """Let a method compute without gradients, and as if its caller had neither autocast nor inference mode."""

    @wraps(method)
    def run(self: PromptEmbedder, *arguments: Any) -> Condition:
        with torch.inference_mode(False), torch.no_grad():  # on the CPU, too: it may have the text encoders
            with torch.autocast("cpu", enabled=False), torch.autocast(self.device.type, enabled=False):
                return method(self, *arguments)

    return run


class Embedder(Protocol):
    """What gives a teacher the conditions of prompts: `PromptEmbedder`, or what stands in for it.

    Attributes:
        device: where the conditions are.
        all_views: whether a prompt is expected to be asked for from all sides, too.
    """

    device: torch.device
    all_views: bool

    def expect(self, prompt: str) -> None:
        """Say that a prompt will be asked for."""
        ...

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts, (B, ...) each."""
        ...

    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        """The condition of B prompts, each seen from its camera."""
        ...


class PromptEmbedder:
    """Embeds prompts, in the precision of the text encoders' own weights: under a caller's autocast or inference mode
    as without.

    Args:
        embed: loads the text encoders, embeds N prompts and lets the encoders go.
        mark: of the model and its precision: what the embeddings depend on beside the prompt.
        folder: of the disk cache.
        device: where the embeddings go.

    Attributes:
        all_views: whether a prompt is expected to be asked for from all sides, too.
    """

    def __init__(self, embed: Callable[[list[str]], Condition], mark: str, folder: Path, device: torch.device):
        self.embed, self.mark, self.folder, self.device = embed, mark, folder, device
        self.all_views = True
        self._known: dict[str, Condition] = {}
        self._awaited: list[str] = [""]

    def expect(self, prompt: str) -> None:
        """Say that a prompt will be asked for: it is embedded together with the first that is."""
        self._awaited.append(prompt)

    @_plain
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts, (B, ...) each."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._known]
        if missing:
            wanted = [*missing, *self._awaited]
            wanted = dict.fromkeys(text for p in wanted for text in (_related_prompts(p) if self.all_views else [p]))
            self._learn([p for p in wanted if p not in self._known])
            self._awaited.clear()
        found = [self._known[p] for p in prompts]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    @_plain
    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        """The condition of B prompts, each seen from its camera: the view words' embeddings, blended by its angles.

        Args:
            camera_mask: (B,) bool, False where the camera is dropped.
        """
        places = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
        shares = torch.tensor([[0.0, *view_blend(*place).values()] for place in places])
        shares = onto(shares, self.device)  # (B, 5): of the bare prompt, then by VIEW_WORDS
        if camera_mask is not None:
            bare = onto(torch.eye(shares.shape[1])[0], self.device)
            shares = torch.where(onto(camera_mask, self.device)[:, None], shares, bare)
        each = zip(*(_with_views(p) for p in prompts), strict=True)
        views = [self(texts) for texts in each]
        return {name: _blend([view[name] for view in views], shares) for name in views[0]}

    def _learn(self, prompts: list[str]) -> None:
        """Read prompts from the disk, and embed what is not there."""
        for prompt in prompts:
            kept = _read(self._path(prompt))
            if kept is not None:
                self._keep(prompt, kept)
        missing = [p for p in prompts if p not in self._known]
        made = self.embed(missing) if missing else {}
        for i, prompt in enumerate(missing):
            one = {name: rows[i].contiguous().cpu() for name, rows in made.items()}
            self._keep(prompt, one)
            _write(self._path(prompt), one, prompt)

    def _keep(self, prompt: str, one: Condition) -> None:
        self._known[prompt] = {name: onto(value, self.device) for name, value in one.items()}

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{VERSION} {self.mark}: {prompt}".encode()).hexdigest()[:40]
        return self.folder / f"{name}.safetensors"


def _with_views(prompt: str) -> list[str]:
    """A prompt bare, then with each view word; the null prompt says no view."""
    return [prompt, *(f"{prompt}, {view}" if prompt else "" for view in VIEW_WORDS)]


def _related_prompts(prompt: str) -> list[str]:
    """What will probably be asked for where this is: the prompt from all sides."""
    for view in VIEW_WORDS:
        prompt = prompt.removesuffix(f", {view}")
    return [prompt] if named_view(prompt) else _with_views(prompt)


def _blend(views: list[Tensor], shares: Tensor) -> Tensor:
    """The mean of N embeddings (B, ...) by shares (B, N)."""
    weights = shares.T.view(*shares.T.shape, *[1] * (views[0].dim() - 1))  # (N, B, 1 ...)
    return (torch.stack(views).float() * weights).sum(0).to(views[0].dtype)


def _read(path: Path) -> Condition | None:
    """A kept embedding; None where there is none, with a warning where it is damaged."""
    if not path.is_file():
        return None
    try:
        return tensor_files.read(path)[0]
    except ValueError as error:
        warnings.warn(f"the kept embedding {path} is damaged ({error}); embedding the prompt again", stacklevel=2)
        return None


def _write(path: Path, one: Condition, prompt: str) -> None:
    """Keep an embedding for the next run; a disk that says no is only a warning."""
    data = tensor_files.to_bytes(one, {"prompt": prompt})
    try:
        with replacing(path) as part:
            part.write_bytes(data)
    except ValueError as error:
        warnings.warn(f"the embedding is not kept: {error}", stacklevel=2)


def warn_of_cut(tokenizer: Any, length: int, prompt: str) -> None:
    """Warn of what this tokenizer cuts from a prompt.

    Args:
        length: tokens the text encoder reads, with those for begin and end.
    """
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) > length:
        lost = tokenizer.decode(ids[length - 1 : -1]).strip()  # its last token is the end, which stays
        warnings.warn(
            f"with view words the prompt has {len(ids)} tokens and a text encoder reads {length}: it never sees "
            f"{lost!r}; shorten the prompt",
            stacklevel=3,
        )

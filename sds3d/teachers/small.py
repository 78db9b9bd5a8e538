"""Small teachers: U-Nets whose weights ship with the package or were trained by `sds3d teacher train`.

They predict v on a cosine schedule. "small" (or "toybox") draws toys at 64 x 64 pixels. Its weights serve two modes:
the network gets the exact camera (``views="camera"``, as multi-view teachers do) or view words only
(``views="words"``, as ordinary 2D teachers do). "surface" has the same form and draws toys in all domains (see
`sds3d.domains`); it answers for those that "small" has no words for. "digits" draws handwritten digits at 8 x 8 pixels,
without a camera.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.domains import WORDS
from sds3d.networks.text import PROMPT_WORDS, TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.prompts import unknown_words, warn_of_weights, weighted, words
from sds3d.runtime import tensor_files
from sds3d.runtime.files import from_json, replacing
from sds3d.runtime.torch_modes import require_own_process
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import VIEWS, decode_pixels, encode_pixels
from sds3d.teachers.single_file import explain

FILE = "teacher.safetensors"  # the weights in the folder of a training


def packaged(name: str) -> Path:
    """Return the weight file of a packaged teacher, one of `sds3d.teachers.base.PACKAGED`."""
    return Path(__file__).with_name(f"{'small' if name == 'toybox' else name}.safetensors")


class SmallTeacher:
    """A `sds3d.teachers.base.Teacher` around the U-Net and its text encoder.

    Args:
        unet, text: the networks.
        vocabulary: the known words.
        views: "camera" or "words". Always "words" for a network without a camera.
        dtype: torch.bfloat16 runs under autocast, torch.float32 does not.
        compiled: whether ``predict`` runs the U-Net through torch.compile, with CUDA graphs on a GPU.

    Attributes:
        fingerprint: fingerprint of the loaded file, "" without a file.
        prompts: examples of prompts that it was trained on.
        header: header of the loaded file.
        sizes: sides in pixels of the square images that it denoises as they are; others are resized to its own side.
        other_domains: weight file of the teacher that answers for the domains that this one has no words for, or None.
    """

    schedule = Schedule.cosine()

    def __init__(
        self,
        unet: UNet,
        text: TextEncoder,
        vocabulary: tuple[str, ...],
        views: str = "camera",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ):
        if views not in VIEWS:
            raise ValueError(f"teacher.views is '{views}'; choose one of {', '.join(VIEWS)}")
        self.unet, self.text, self.vocabulary, self.dtype = unet, text, vocabulary, dtype
        self.views = views if unet.config.cameras else "words"
        self.image_size = unet.config.size
        self.shape = (unet.config.channels, unet.config.size, unet.config.size)
        # torch.compile of a module returns a module, which its annotation does not say
        self._predict_unet = cast(nn.Module, torch.compile(unet, mode="reduce-overhead")) if compiled else unet
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}
        self.fingerprint = ""
        self.prompts: tuple[str, ...] = ()
        self.header: dict[str, str] = {}
        self.sizes: tuple[int, ...] = (self.image_size,)
        self.other_domains: Path | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        """See `sds3d.teachers.base.HasDomains`: the domains that this teacher or its other one has words for."""
        known = {*self.vocabulary, *(self._other.vocabulary if self._other else ())}
        return tuple(name for name, word in WORDS.items() if not word or word in known)

    def answerer(self, domain: str) -> SmallTeacher:
        """See `sds3d.teachers.base.HasAnswerers`."""
        own = not WORDS[domain] or WORDS[domain] in self.vocabulary
        return self if own or self._other is None else self._other

    @cached_property
    def _other(self) -> SmallTeacher | None:
        """The teacher of `other_domains`, loaded when it is first asked."""
        if self.other_domains is None:
            return None
        with torch.inference_mode(False):  # a critic may train on a copy of its weights
            compiled = self._predict_unet is not self.unet
            return load(self.other_domains, self.views, self.device, self.dtype, compiled)

    @property
    def device(self) -> torch.device:
        """The device of its networks."""
        return self.unet.last.weight.device

    def check(self, prompt: str) -> None:
        """Check that this teacher can read a prompt.

        Raises:
            ValueError: the prompt is empty or too long, or has unknown words; names the nearest known words.
        """
        if not words(prompt):
            raise ValueError('the prompt is empty: say what to make, for example "a red mug"')
        length = len(words(prompt))
        if length > PROMPT_WORDS:
            raise ValueError(f"the prompt has {length} words; the embedded teacher reads {PROMPT_WORDS}: shorten it")
        unknown = unknown_words(prompt, self.vocabulary)
        if unknown:
            weight = weighted(prompt)
            raise ValueError(
                f"the embedded teacher does not know {unknown}"
                + (f" (it reads no weights, such as {weight!r})" if weight else "")
                + f"; it knows {len(self.vocabulary)} words (sds3d teacher "
                "words lists them). An open vocabulary needs a diffusers pipeline: give its folder or its id on the "
                "hub with --teacher"
            )
        warn_of_weights(prompt)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`."""
        return encode_pixels(images, self.image_size, self.shape[0], self.sizes)

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        return decode_pixels(x)

    @property
    def network(self) -> UNet:
        """See `sds3d.distill.critics.Trainable`."""
        return self.unet

    @property
    def feature_width(self) -> int:
        """See `sds3d.distill.critics.Featured`."""
        return self.unet.config.widths[-1]

    def nearest_times(self, times: Tensor) -> tuple[Tensor, float]:
        """See `sds3d.students.generator.Network.nearest_times`. Returns the times unchanged, and sigma at the
        first of them."""
        return times, float(self.schedule.alpha_sigma(times[0])[1])

    @property
    def extra_width(self) -> int:
        """See `sds3d.distill.critics.Trainable`."""
        return self.unet.config.condition if self.unet.config.cameras else 0

    @torch.inference_mode()
    def predict(
        self,
        x_t: Tensor,  # (B, C, S, S)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """See `sds3d.teachers.base.Teacher.predict`."""
        return self.answer(self._predict_unet, x_t, t, prompts, cameras, camera_mask)

    def answer(
        self,
        network: nn.Module,
        x_t: Tensor,  # (B, C, S, S)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
        extra: Tensor | None = None,  # (B, extra_width)
    ) -> Prediction:
        """See `sds3d.distill.critics.Trainable.answer`."""
        exact = self.unet.last.weight.dtype  # float32, or float64 if the networks were converted
        mask = torch.ones(len(x_t), device=x_t.device) if camera_mask is None else camera_mask.float()
        text, cameras = self._embed(prompts), cameras.to(x_t.device) if cameras else None
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            v = network(x_t.to(exact), t.to(exact), text, cameras, mask, extra).to(exact)
        if network is not self.unet and network is self._predict_unet:
            v = v.clone()  # a CUDA graph overwrites its output in the next call
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(v, x_t, alpha, sigma, "v")

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """See `sds3d.distill.critics.Featured.features`. The maps are those of the way down."""
        assert isinstance(network, UNet), type(network)
        exact, text = self.unet.last.weight.dtype, self._embed(prompts)
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            maps = network.features(x_t.to(exact), t.to(exact), text)
        return [features.to(exact) for features in maps]

    @torch.inference_mode(False)  # the cached embeddings are also used with gradients, by a critic
    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return word vectors (B, L, D), mask (B, L) and caption vectors (B, D).

        They have the encoder's dtype (float32), whatever ``self.dtype`` is. Every prompt is encoded once and cached.
        """
        with torch.autocast(self.device.type, enabled=False):  # a cached embedding must not depend on its first caller
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._embedded:
                    vectors, _, caption = self.text(onto(self.text.tokens([prompt]), self.device))
                    self._embedded[prompt] = (vectors[0], caption[0])
        vectors = [self._embedded[p][0] for p in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        lengths = onto(torch.tensor([len(v) for v in vectors]), self.device)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return padded, mask, torch.stack([self._embedded[p][1] for p in prompts])


def fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is fast on this device: CUDA from compute capability 8, CPUs with AMX tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def pick_dtype(device: torch.device, wanted: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype to compute in; None takes bfloat16 where it is fast. Warns and returns float32 on a GPU without
    bfloat16."""
    if device.type == "cuda" and not fast_bf16(device) and wanted != torch.float32:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        warnings.warn(
            f"{name} (compute capability {major}.{minor}) has no bfloat16: the teacher runs in float32", stacklevel=2
        )
        return torch.float32
    return wanted or (torch.bfloat16 if fast_bf16(device) else torch.float32)


def save(
    path: Path,
    unet: UNet,
    text: TextEncoder,
    vocabulary: tuple[str, ...],
    prompts: Sequence[str] = (),
    extra_header: Mapping[str, str] = MappingProxyType({}),
    sizes: Sequence[int] = (),
) -> None:
    """Write both networks as fp16 safetensors, with vocabulary, sizes and prompts in the header.

    Args:
        prompts: examples of prompts.
        sizes: sides in pixels of the images that it was trained on; none is the network's own.
        extra_header: further entries of the header.
    """
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"text.{k}": v for k, v in text.state_dict().items()}
    header = {"vocabulary": json.dumps(vocabulary), "unet": json.dumps(asdict(unet.config))}
    header |= {"prompts": json.dumps(prompts), "sizes": json.dumps([*sizes] or [unet.config.size]), **extra_header}
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in tensors.items()}
    data = tensor_files.to_bytes(tensors, header)
    with replacing(path, (".safetensors",)) as part:
        part.write_bytes(data)


def _fingerprint(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return 12 hexadecimal digits of a hash of weights, sizes and vocabulary. The bytes of a file are not hashed
    themselves, as their order is not fixed."""
    digest = hashlib.sha256((header["vocabulary"] + header["unet"]).encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()[:12]


def load(
    path: str | Path | None = None,
    views: str = "camera",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> SmallTeacher:
    """Load a teacher that `save` wrote; the packaged "small" one without a path.

    For normals, depths and albedo "small" lets the packaged "surface" answer.

    Args:
        path: weight file.
        dtype: see ``pick_dtype``.
        compiled: see ``SmallTeacher``.

    Raises:
        ValueError: the file is missing, damaged or of another kind, or views is unknown; or see
            `sds3d.runtime.torch_modes.require_own_process`.
    """
    require_own_process()
    path, device = Path(path or packaged("small")), torch.device(device)
    if not path.is_file():
        raise ValueError(f"no teacher weights at {path}; give a .safetensors file that `sds3d teacher train` wrote")
    foreign = explain(path)
    if foreign:
        raise ValueError(foreign)
    try:
        vocabulary = tuple(from_json(tensor_files.read_header(path)["vocabulary"]))  # before any tensor is read
        tensors, header = tensor_files.read(path)
        tensors = {k: v.float() for k, v in tensors.items()}
        sizes = from_json(header["unet"])
        config: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
        prompts = from_json(header.get("prompts", "[]"))
        if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in (*prompts, *vocabulary))):
            raise ValueError("its header lists no words")
        unet, text = UNet(UNetConfig(**config)), TextEncoder(vocabulary, width=config["text"])
        for name, module in (("unet.", unet), ("text.", text)):
            module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
        trained_on = from_json(header.get("sizes", json.dumps([unet.config.size])))
        if not all(isinstance(side, int) for side in trained_on):
            raise ValueError("its header lists no sizes of images")
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no teacher of this project ({error}); restore or retrain it") from error
    for module in (unet, text):
        # the annotation of Module.to lacks memory_format
        module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    teacher = SmallTeacher(unet, text, vocabulary, views, pick_dtype(device, dtype), compiled)
    teacher.fingerprint, teacher.header = _fingerprint(tensors, header), header
    teacher.prompts, teacher.sizes = tuple(prompts), tuple(trained_on)
    if path == packaged("small"):
        teacher.other_domains = packaged("surface")
    return teacher

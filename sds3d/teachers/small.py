"""The embedded teacher: a small U-Net that draws toys, whose weights ship with the package.

It predicts v on a cosine schedule at 64 x 64 pixels. One set of weights answers in two modes: told the exact camera
(``views="camera"``, as multi-view teachers are) or view words only (``views="words"``, as ordinary 2D teachers are).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.files import replacing
from sds3d.networks.text import MAX_WORDS, TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.noise import Prediction, Schedule
from sds3d.prompts import unknown_words, words
from sds3d.teachers.base import VIEWS, decode_pixels, encode_pixels
from sds3d.transfer import onto

ADDED_WORDS = 6  # a run may add "side view" and "on a grey background" to a prompt
WEIGHTS = Path(__file__).with_name("small.safetensors")


class SmallTeacher:
    """A `sds3d.teachers.base.Teacher` around the U-Net and its text encoder.

    Args:
        unet, text: the networks.
        vocabulary: the words it knows.
        views: "camera" or "words".
        dtype: torch.bfloat16 to run under autocast, torch.float32 otherwise.
        compiled: whether ``predict`` runs the U-Net through torch.compile, with CUDA graphs on a GPU.
    """

    schedule = Schedule.cosine()
    image_size = 64

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
        self.unet, self.text, self.vocabulary, self.views, self.dtype = unet, text, vocabulary, views, dtype
        self._judge = torch.compile(unet, mode="reduce-overhead") if compiled else unet
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        return self.unet.last.weight.device

    def check(self, prompt: str) -> None:
        """Refuse what this teacher cannot read.

        Raises:
            ValueError: for an empty prompt, one that is too long, or unknown words; names the nearest known words.
        """
        if not words(prompt):
            raise ValueError('the prompt is empty: say what to make, for example "a red mug"')
        length, most = len(words(prompt)), MAX_WORDS - ADDED_WORDS
        if length > most:
            raise ValueError(f"the prompt has {length} words; the embedded teacher reads {most}: shorten it")
        unknown = unknown_words(prompt, self.vocabulary)
        if unknown:
            raise ValueError(
                f"the embedded teacher does not know {unknown}; it knows {len(self.vocabulary)} words (sds3d teacher "
                "words lists them). An open vocabulary needs a teacher of another kind, which --teacher will take once "
                "this version knows how to load one; today it takes weights that sds3d teacher train wrote"
            )

    def encode(self, images: Tensor) -> Tensor:
        return encode_pixels(images, self.image_size)

    def decode(self, x: Tensor) -> Tensor:
        return decode_pixels(x)

    @property
    def network(self) -> UNet:
        return self.unet

    @property
    def extra_width(self) -> int:
        return self.unet.config.condition

    @torch.inference_mode()
    def predict(
        self,
        x_t: Tensor,  # (B, 3, 64, 64)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """See `sds3d.teachers.base.Teacher.predict`."""
        return self.answer(self._judge, x_t, t, prompts, cameras, camera_mask)

    def answer(
        self,
        network: nn.Module,
        x_t: Tensor,  # (B, 3, 64, 64)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
        extra: Tensor | None = None,  # (B, extra_width)
    ) -> Prediction:
        """See `sds3d.critics.Trainable.answer`."""
        seen = torch.ones(len(x_t), device=x_t.device) if camera_mask is None else camera_mask.float()
        text, cameras = self._embed(prompts), cameras.to(x_t.device) if cameras else None
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            v = network(x_t.float(), t.float(), text, cameras, seen, extra).float()
        if network is not self.unet and network is self._judge:
            v = v.clone()  # a CUDA graph writes its next answer where this one lies
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(v, x_t, alpha, sigma, "v")

    @torch.inference_mode(False)  # what is kept here also goes through a critic, with gradients
    @torch.no_grad()
    def _embed(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Word vectors (B, L, D), mask (B, L), whole (B, D); every prompt is encoded once and kept."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embedded:
                vectors, _, whole = self.text(onto(self.text.tokens([prompt]), self.device))
                self._embedded[prompt] = (vectors[0], whole[0])
        vectors = [self._embedded[p][0] for p in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
        lengths = onto(torch.tensor([len(v) for v in vectors]), self.device)
        mask = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        return padded, mask, torch.stack([self._embedded[p][1] for p in prompts])


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is fast on this device: CUDA from compute capability 8, CPUs with AMX tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def pick_dtype(device: torch.device, wanted: torch.dtype | None = None) -> torch.dtype:
    """What to compute in; None takes bfloat16 where it is fast. A GPU too old for it gets float32, and a warning."""
    if device.type == "cuda" and not fast_bf16(device) and wanted != torch.float32:
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        warnings.warn(
            f"{name} (compute capability {major}.{minor}) has no bfloat16: the teacher runs in float32", stacklevel=2
        )
        return torch.float32
    return wanted or (torch.bfloat16 if fast_bf16(device) else torch.float32)


def save(path: Path, unet: UNet, text: TextEncoder, vocabulary: tuple[str, ...]) -> None:
    """Write both networks as fp16 safetensors; vocabulary and sizes go into the header."""
    from safetensors.torch import save_file

    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"text.{k}": v for k, v in text.state_dict().items()}
    header = {"vocabulary": json.dumps(vocabulary), "unet": json.dumps(asdict(unet.config))}
    with replacing(path, (".safetensors",)) as part:
        save_file({k: v.half().contiguous() for k, v in tensors.items()}, part, header)


def load(
    path: str | Path | None = None,
    views: str = "camera",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> SmallTeacher:
    """Load a teacher that `save` wrote; the packaged one without a path.

    Args:
        dtype: see ``pick_dtype``.
        compiled: see ``SmallTeacher``.

    Raises:
        ValueError: if the file is missing or damaged, or views is unknown.
    """
    from safetensors import SafetensorError, safe_open

    path, device = Path(path or WEIGHTS), torch.device(device)
    if not path.is_file():
        raise ValueError(f"no teacher weights at {path}; give a .safetensors file that `sds3d teacher train` wrote")
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata(), {k: file.get_tensor(k).float() for k in file.keys()}
        vocabulary = tuple(json.loads(header["vocabulary"]))
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["unet"]).items()}
        unet, text = UNet(UNetConfig(**config)), TextEncoder(vocabulary, width=config["text"])
        for name, module in (("unet.", unet), ("text.", text)):
            module.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no teacher of this project ({error}); restore or retrain it") from error
    for module in (unet, text):
        module.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
    return SmallTeacher(unet, text, vocabulary, views, pick_dtype(device, dtype), compiled)

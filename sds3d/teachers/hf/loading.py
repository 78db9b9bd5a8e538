"""Loads a teacher from the files of a diffusers pipeline in a folder or on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sds3d.runtime.files import from_json, read_text
from sds3d.runtime.torch_modes import require_own_process
from sds3d.teachers.base import PACKAGED, HFConfig, TeacherConfig
from sds3d.teachers.hf.config_fields import refuse_unknown_parts
from sds3d.teachers.hf.families import FAMILIES, Family
from sds3d.teachers.hf.multi_view import MultiView, is_multi_view
from sds3d.teachers.hf.prompt_embedder import PromptEmbedder, cache_folder
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.hf.variants import file_options, variants_of
from sds3d.teachers.small import pick_dtype

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
SAMPLE = 1 << 16  # bytes that a fingerprint reads at the start, the middle and the end of a file


def is_pipeline(name: str) -> bool:
    """Return whether a teacher's name is a diffusers folder, or looks like an id on the hub: owner/model."""
    path = Path(name).expanduser()
    if name in PACKAGED:
        return False
    if path.exists():
        return (path / INDEX).is_file() or class_of(path / "config.json") == "UNet2DModel"
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and path.suffix not in WEIGHTS


def load(settings: TeacherConfig, device: torch.device) -> DiffusersTeacher:
    """Load a frozen teacher from a diffusers pipeline.

    Raises:
        ValueError: the hub cannot be reached or refuses, the pipeline is of an unknown family, its weights are pickles
            or damaged, or an option does not apply to it; or see `sds3d.runtime.torch_modes.require_own_process`.
    """
    require_own_process()
    folder = pipeline_folder(settings.name, settings.hf)
    kind, wanted = kind_of(folder, settings.name), None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    # pick_dtype would replace float16 by float32 on a GPU without bfloat16
    dtype = torch.float16 if wanted == torch.float16 else pick_dtype(device, wanted)
    refuse_pickles(kind, folder, settings.hf)
    variants = variants_of(folder, parts_of(kind, folder), settings.hf)
    family = family_of(kind, _pipeline(kind, folder, settings.hf, variants, dtype), settings.hf)
    place_parts(family, settings.hf, device, dtype)
    digest = fingerprint(folder)

    def embed(prompts: list[str]) -> dict[str, Tensor]:
        with _text_pipeline(family, folder, variants, dtype, device) as (pipe, encoder_device):
            # one by one, so that an embedding does not depend on the other prompts
            conditions = [family.embed(pipe, [prompt], encoder_device) for prompt in prompts]
            return {name: torch.cat([c[name] for c in conditions]).to(dtype) for name in conditions[0]}

    cache = Path(settings.hf.cache).expanduser() if settings.hf.cache else cache_folder()
    teacher = DiffusersTeacher(
        family, PromptEmbedder(embed, f"{digest} {dtype}", cache, device), settings.views, dtype, settings.compile
    )
    teacher.fingerprint = digest
    teacher.full_pipeline = lambda: _full_pipeline(family, folder, variants, dtype, device)
    return teacher


def pipeline_folder(name: str, settings: HFConfig) -> Path:
    """Return the folder of a pipeline's files. Downloads a pipeline on the hub to the hub's cache.

    Raises:
        ValueError: the hub cannot be reached or refuses.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from diffusers import DiffusionPipeline

    left_out = {part: None for family in FAMILIES.values() for part in family.LEFT_OUT}
    safe = None if settings.allow_pickle else True
    with hub_errors(name):
        return Path(
            DiffusionPipeline.download(name, use_safetensors=safe, variant=settings.variant or None, **left_out)
        )


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Raise errors of the hub as a ValueError that says what to do."""
    from diffusers.utils import logging
    from huggingface_hub import errors

    # errors of the HTTP library, such as a timeout or a proxy's; HfHubHTTPError derives from them
    http_errors = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the ValueError reports the problem
    try:
        yield
    except (OSError, ValueError, errors.OfflineModeIsEnabled, *http_errors) as error:
        raise ValueError(_refusal(name, error)) from error
    finally:
        logging.set_verbosity(verbosity)


def kind_of(folder: Path, name: str) -> type[Family]:
    """Return the family of the pipeline in a folder. ``name`` is the user's name of it, for messages.

    Raises:
        ValueError: the pipeline is of no known family, or has unknown parts.
    """
    cls = pipeline_class(folder)
    if not cls:
        raise ValueError(f"{folder / INDEX} is damaged, or names no class of pipeline; download it again")
    if cls not in FAMILIES:
        steered = " A ControlNet, an adapter or another attention (PAG) steers a model: give the model without it."
        raise ValueError(
            f"{name} is a {cls}; what can teach is {', '.join(FAMILIES)}."
            f"{steered if re.search('ControlNet|Adapter|PAG|SAG|Attend', cls) else ''}"
        )
    kind = FAMILIES[cls]
    if (folder / INDEX).is_file():
        parts = {kind.PART, "vae", "scheduler", *kind.ENCODERS, *kind.TOKENIZERS, *kind.LEFT_OUT}
        refuse_unknown_parts(_index(folder), parts, folder)
    return kind


def family_of(kind: type[Family], pipe: Any, settings: HFConfig) -> Family:
    """Wrap a pipeline in its family, or in `MultiView` if its network takes cameras.

    Raises:
        ValueError: see `Family.check`.
    """
    family = (MultiView if is_multi_view(pipe) else kind)(pipe, settings)
    family.check()
    return family


def class_for(kind: type[Family]) -> Any:
    """Return the diffusers class that reads a family's pipelines, whichever class of the family their files name."""
    import diffusers

    return getattr(diffusers, kind.PIPELINES[0])


def pipeline_class(folder: Path) -> str:
    """Return the name of the diffusers class of the pipeline in a folder."""
    return class_of(folder / INDEX) if (folder / INDEX).is_file() else "DDPMPipeline"


def _refusal(name: str, error: BaseException) -> str:
    """Return a message about an error of the hub that says what the user can do."""
    from huggingface_hub import errors

    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    local = f"or give a local folder instead: --teacher FOLDER, as `hf download {name} --local-dir FOLDER` makes one"
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return (
            f"{name} is gated: accept its conditions at https://huggingface.co/{name}, make a token there that may "
            f"read it, and log in with `hf auth login` (or set HF_TOKEN); {local}"
        )
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return f"the hub has no {name}, or it is private: check the spelling or log in with `hf auth login`; {local}"
    if "safetensors" in str(error):
        return f"{name} has no safetensors weights ({_line(error)}); {_PICKLE}"
    return (
        f"there is no folder {name} here, and the hub cannot be reached or has no such files ({_line(chain[-1])}): "
        f"connect this machine, {local}"
    )


def _line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]


_PICKLE = (
    "a pickled .bin can run any program it carries, so it is refused: convert it, take another variant "
    "(teacher.hf.variant), or give --allow-pickle if you trust who made it, on resume again (in Python: "
    "teacher.hf.allow_pickle, an argument)"
)


def refuse_pickles(kind: type[Family], folder: Path, settings: HFConfig) -> None:
    """Raise ValueError if a used part has only pickled weights and pickles are not allowed."""
    for part in (folder / name for name in ("", kind.PART, "vae", *kind.ENCODERS)):
        if any(part.glob("*.bin")) and not any(part.glob("*.safetensors")) and not settings.allow_pickle:
            raise ValueError(f"{part} holds only .bin weights; {_PICKLE}")


def parts_of(kind: type[Family], folder: Path) -> list[str]:
    """Return the folders of the used parts with weights; "" is the pipeline's folder itself, for a lone network."""
    if not (folder / INDEX).is_file():
        return [""]
    index = _index(folder)
    return [name for name in (kind.PART, "vae", *kind.ENCODERS) if (index.get(name) or [None, None])[1]]


def fingerprint(folder: Path) -> str:
    """Return 12 hexadecimal digits of a hash of a pipeline's files: name, size, start, middle and end of each."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (*WEIGHTS, ".json", ".txt", ".model") and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
            with file.open("rb") as stream:
                for start in (0, size // 2, max(size - SAMPLE, 0)):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:12]


def place_parts(family: Family, settings: HFConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze the parts of a family, set their memory options and move them to the device.

    Raises:
        ValueError: the network does not support an option.
    """
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    network, vae = family.network.requires_grad_(False).eval(), family.vae
    if settings.attention_slicing:
        if not hasattr(network, "set_attention_slice"):
            raise ValueError(f"a {type(network).__name__} has no attention slicing; leave teacher.hf.attention_slicing")
        network.set_attention_slice("auto")
    family.prepare()
    network.to("cpu" if settings.offload else device, memory_format=layout)
    step = family.multiple * family.cell
    if settings.size % step:
        raise ValueError(f"teacher.hf.size is {settings.size}; this model takes multiples of {step} pixels")
    if vae is not None:
        vae.requires_grad_(False).eval().to(device, memory_format=layout)
        if family.UPCAST and not vae.config.get("force_upcast"):
            vae.to(dtype)
        # with checkpointing an AutoencoderTiny does not scale its input
        if settings.checkpointing and type(vae).__name__ != "AutoencoderTiny":
            vae.enable_gradient_checkpointing()
        if settings.slicing:
            vae.enable_slicing()
        if settings.tiling:
            vae.enable_tiling()


def class_of(path: Path) -> str:
    """Return the class that a configuration file of diffusers names; "" if it names none."""
    try:
        name = from_json(read_text(path)).get("_class_name", "")
    except (OSError, ValueError, AttributeError):
        return ""
    if isinstance(name, list) and name:  # a custom pipeline on the hub: library and class
        name = name[-1]
    return name if isinstance(name, str) else ""


def _index(folder: Path) -> dict[str, Any]:
    """Read the model_index.json of a pipeline."""
    return from_json(read_text(folder / INDEX))


def _pipeline(
    kind: type[Family], folder: Path, settings: HFConfig, variants: dict[str, str], dtype: torch.dtype
) -> Any:
    """Load the pipeline without its text encoders."""
    import diffusers

    with quiet(), loading_errors(folder):
        if not (folder / INDEX).is_file():
            return diffusers.DDPMPipeline(
                diffusers.UNet2DModel.from_pretrained(folder, dtype=dtype, **file_options(settings, variants[""])),
                diffusers.DDPMScheduler.from_pretrained(folder),  # pyright: ignore[reportArgumentType]  # no tuple unless asked
            )
        dtypes: Any = {"default": dtype, "vae": torch.float32} if kind.UPCAST else dtype
        part_dtypes = {name: torch.float32 if kind.UPCAST and name == "vae" else dtype for name in (kind.PART, "vae")}
        parts = omitted_parts(folder, (*kind.ENCODERS, *kind.LEFT_OUT))
        parts |= _load_variants(folder, settings, variants, part_dtypes)
        return class_for(kind).from_pretrained(folder, dtype=dtypes, **file_options(settings), **parts)


def _load_variants(
    folder: Path, settings: HFConfig, variants: dict[str, str], dtypes: dict[str, torch.dtype]
) -> dict[str, torch.nn.Module]:
    """Load those of the parts in ``dtypes`` whose weights are not the plain variant.

    They are loaded one by one: diffusers' own ``variant`` of a pipeline fails if any part's folder holds a file without
    a suffix.
    """
    import diffusers
    import transformers

    index, parts = _index(folder), {}
    for name, dtype in dtypes.items():
        if variants.get(name):
            library, cls = index[name]
            part = getattr(transformers if library == "transformers" else diffusers, cls)
            parts[name] = part.from_pretrained(folder / name, dtype=dtype, **file_options(settings, variants[name]))
    return parts


def omitted_parts(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that omit these parts and those that the pipeline's index omits."""
    index = _index(folder)
    omitted: dict[str, Any] = dict.fromkeys([*names, *(name for name, what in index.items() if what == [None, None])])
    if "safety_checker" in omitted:  # no image of the pipeline itself is shown
        omitted["requires_safety_checker"] = False
    return omitted


@contextmanager
def _text_pipeline(
    family: Family, folder: Path, variants: dict[str, str], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Any, torch.device]]:
    """Load the pipeline with its text encoders; give it and their device for the time of a with block.

    The network is moved off the GPU meanwhile. Encoders that do not fit on the GPU even so run on the CPU.
    """
    network, network_device = family.network, next(family.network.parameters()).device
    loaded = {name: part for name, part in family.pipe.components.items() if name not in family.ENCODERS}
    encoders: list[torch.nn.Module] = []
    try:
        network.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise mem_get_info counts the network's memory as used
        with quiet(), loading_errors(folder):
            encoder_variants = _load_variants(folder, family.settings, variants, dict.fromkeys(family.ENCODERS, dtype))
            parts = omitted_parts(folder, family.LEFT_OUT) | loaded | encoder_variants
            pipe = type(family.pipe).from_pretrained(folder, dtype=dtype, **file_options(family.settings), **parts)
        encoders += [part for name in family.ENCODERS if (part := getattr(pipe, name)) is not None]
        needed = sum(p.numel() * p.element_size() for encoder in encoders for p in encoder.parameters())
        fits = device.type != "cuda" or 1.2 * needed < torch.cuda.mem_get_info(device)[0]
        encoder_device = device if fits else torch.device("cpu")
        for encoder in encoders:
            encoder.requires_grad_(False).eval().to(encoder_device)
        with torch.no_grad():
            yield pipe, encoder_device
    finally:
        for encoder in encoders:
            encoder.to("meta")  # frees the weights even if something still refers to the encoder
        if device.type == "cuda":
            torch.cuda.empty_cache()
        network.to(network_device)


@contextmanager
def _full_pipeline(
    family: Family, folder: Path, variants: dict[str, str], dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """Give the pipeline with all its parts for the time of a with block."""
    import diffusers

    if not family.ENCODERS:  # a DDPMPipeline, since a DDIMPipeline replaces its scheduler by its own
        yield diffusers.DDPMPipeline(family.network, family.pipe.scheduler)
        return
    with _text_pipeline(family, folder, variants, dtype, device) as (pipe, _):
        yield pipe


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Raise errors of loading as a ValueError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, ImportError, ValueError) as error:
        raise ValueError(
            f"the pipeline in {folder} cannot be loaded ({_line(error)}): is a part missing or damaged?"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off progress bars and warnings of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosities = [(logging, logging.get_verbosity()) for logging in (diffusers_logging, transformers_logging)]
    for logging, _ in verbosities:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, verbosity in verbosities:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()

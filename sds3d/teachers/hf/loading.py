"""From a folder's or the hub's files to a teacher: what is there, what is refused, what goes where."""

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
from sds3d.runtime.modes import require_own_process
from sds3d.teachers.base import PACKAGED, HFConfig, TeacherConfig
from sds3d.teachers.hf.families import FAMILIES, Family
from sds3d.teachers.hf.fields import refuse_unknown_parts
from sds3d.teachers.hf.multi_view import MultiView, is_multi_view
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.hf.variants import file_options, variants_of
from sds3d.teachers.hf.words import PromptEmbedder, cache_folder
from sds3d.teachers.small import pick_dtype

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
SAMPLE = 1 << 16  # bytes of a file that a fingerprint looks at in each of three places


def is_pipeline(name: str) -> bool:
    """Whether a teacher's name is a diffusers folder, or looks like an id on the hub: owner/model."""
    path = Path(name).expanduser()
    if name in PACKAGED:
        return False
    if path.exists():
        return (path / INDEX).is_file() or class_of(path / "config.json") == "UNet2DModel"
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and path.suffix not in WEIGHTS


def load(settings: TeacherConfig, device: torch.device) -> DiffusersTeacher:
    """A frozen teacher from a diffusers pipeline.

    Raises:
        ValueError: the hub cannot be reached or says no, the pipeline is of no family we know, its weights are pickles
            or damaged, or an option is not for it; or see `sds3d.runtime.modes.require_own_process`.
    """
    require_own_process()
    folder = pipeline_folder(settings.name, settings.hf)
    kind, wanted = kind_of(folder, settings.name), None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    # float16 is for GPUs without bfloat16
    dtype = torch.float16 if wanted == torch.float16 else pick_dtype(device, wanted)
    refuse_pickles(kind, folder, settings.hf)
    variants = variants_of(folder, parts_of(kind, folder), settings.hf)
    family = family_of(kind, _pipeline(kind, folder, settings.hf, variants, dtype), settings.hf)
    place_parts(family, settings.hf, device, dtype)
    mark = fingerprint(folder)

    def embed(prompts: list[str]) -> dict[str, Tensor]:
        with _text_pipeline(family, folder, variants, dtype, device) as (pipe, where):
            each = [family.embed(pipe, [prompt], where) for prompt in prompts]  # one by one: the same in any company
            return {name: torch.cat([one[name] for one in each]).to(dtype) for name in each[0]}

    kept = Path(settings.hf.cache).expanduser() if settings.hf.cache else cache_folder()
    teacher = DiffusersTeacher(
        family, PromptEmbedder(embed, f"{mark} {dtype}", kept, device), settings.views, dtype, settings.compile
    )
    teacher.fingerprint, teacher.full_pipeline = mark, lambda: _full_pipeline(family, folder, variants, dtype, device)
    return teacher


def pipeline_folder(name: str, settings: HFConfig) -> Path:
    """The folder with a pipeline's files; what is on the hub is downloaded to its cache. Raises ValueError."""
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
    """The hub's errors, as what a user can do about them."""
    from diffusers.utils import logging
    from huggingface_hub import errors

    # of what it talks through: a proxy's, a timeout
    theirs = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)  # an error's bases are errors
    spoken = logging.get_verbosity()
    logging.set_verbosity_error()  # what went wrong is told below, once
    try:
        yield
    except (OSError, ValueError, errors.OfflineModeIsEnabled, *theirs) as error:
        raise ValueError(_refusal(name, error)) from error
    finally:
        logging.set_verbosity(spoken)


def kind_of(folder: Path, name: str) -> type[Family]:
    """The family of the pipeline in a folder, that the user calls by this name. Raises ValueError for another."""
    found = pipeline_class(folder)
    if not found:
        raise ValueError(f"{folder / INDEX} is damaged, or names no class of pipeline; download it again")
    if found not in FAMILIES:
        steered = " A ControlNet, an adapter or another attention (PAG) steers a model: give the model without it."
        raise ValueError(
            f"{name} is a {found}; what can teach is {', '.join(FAMILIES)}."
            f"{steered if re.search('ControlNet|Adapter|PAG|SAG|Attend', found) else ''}"
        )
    kind = FAMILIES[found]
    if (folder / INDEX).is_file():
        parts = {kind.PART, "vae", "scheduler", *kind.ENCODERS, *kind.TOKENIZERS, *kind.LEFT_OUT}
        refuse_unknown_parts(_index(folder), parts, folder)
    return kind


def family_of(kind: type[Family], pipe: Any, settings: HFConfig) -> Family:
    """A pipeline as one of its family, or as what its network turns out to be. Raises ValueError for one that would
    have to be used in another way."""
    family = (MultiView if is_multi_view(pipe) else kind)(pipe, settings)
    family.check()
    return family


def class_for(kind: type[Family]) -> Any:
    """The diffusers class with which a family's pipelines are read, whichever of its classes their files name."""
    import diffusers

    return getattr(diffusers, kind.PIPELINES[0])


def pipeline_class(folder: Path) -> str:
    """Name of the diffusers class of the pipeline in a folder."""
    return class_of(folder / INDEX) if (folder / INDEX).is_file() else "DDPMPipeline"


def _refusal(name: str, error: BaseException) -> str:
    """What a user can do about an error of the hub's."""
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
    """The first sentence of an error."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]


_PICKLE = (
    "a pickled .bin can run any program it carries, so it is refused: convert it, take another variant "
    "(teacher.hf.variant), or give --allow-pickle if you trust who made it, on resume again (in Python: "
    "teacher.hf.allow_pickle, an argument)"
)


def refuse_pickles(kind: type[Family], folder: Path, settings: HFConfig) -> None:
    """Raises ValueError where a part that is used has weights, and no safetensors, unless pickles are allowed."""
    for part in (folder / name for name in ("", kind.PART, "vae", *kind.ENCODERS)):
        if any(part.glob("*.bin")) and not any(part.glob("*.safetensors")) and not settings.allow_pickle:
            raise ValueError(f"{part} holds only .bin weights; {_PICKLE}")


def parts_of(kind: type[Family], folder: Path) -> list[str]:
    """The folders of the parts that have weights and are used; "" is the pipeline's own, where it is a lone network."""
    if not (folder / INDEX).is_file():
        return [""]
    index = _index(folder)
    return [name for name in (kind.PART, "vae", *kind.ENCODERS) if (index.get(name) or [None, None])[1]]


def fingerprint(folder: Path) -> str:
    """12 letters that stand for a pipeline's files: names, sizes, and what lies at begin, middle and end of each."""
    mark = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (*WEIGHTS, ".json", ".txt", ".model") and file.is_file():
            size = file.stat().st_size
            mark.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
            with file.open("rb") as stream:
                for start in (0, size // 2, max(size - SAMPLE, 0)):
                    stream.seek(start)
                    mark.update(stream.read(SAMPLE))
    return mark.hexdigest()[:12]


def place_parts(family: Family, settings: HFConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Freeze a family's parts, set their memory options, move them to the device.

    Raises:
        ValueError: an option that this network has not.
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
        if settings.checkpointing and type(vae).__name__ != "AutoencoderTiny":  # which then forgets to scale its input
            vae.enable_gradient_checkpointing()
        if settings.slicing:
            vae.enable_slicing()
        if settings.tiling:
            vae.enable_tiling()


def class_of(path: Path) -> str:
    """The class that a diffusers file of settings names; "" where there is none."""
    try:
        name = from_json(read_text(path)).get("_class_name", "")
    except (OSError, ValueError, AttributeError):
        return ""
    if isinstance(name, list) and name:  # of the hub's own kind: library and class
        name = name[-1]
    return name if isinstance(name, str) else ""


def _index(folder: Path) -> dict[str, Any]:
    """What a pipeline's model_index.json says."""
    return from_json(read_text(folder / INDEX))


def _pipeline(
    kind: type[Family], folder: Path, settings: HFConfig, variants: dict[str, str], dtype: torch.dtype
) -> Any:
    """The pipeline without its text encoders."""
    import diffusers

    with quiet(), loading_errors(folder):
        if not (folder / INDEX).is_file():
            return diffusers.DDPMPipeline(
                diffusers.UNet2DModel.from_pretrained(folder, dtype=dtype, **file_options(settings, variants[""])),
                diffusers.DDPMScheduler.from_pretrained(folder),  # pyright: ignore[reportArgumentType]  # no tuple unless asked
            )
        precision: Any = {"default": dtype, "vae": torch.float32} if kind.UPCAST else dtype
        parts = {name: torch.float32 if kind.UPCAST and name == "vae" else dtype for name in (kind.PART, "vae")}
        found = omitted_parts(folder, (*kind.ENCODERS, *kind.LEFT_OUT)) | _varied(folder, settings, variants, parts)
        return class_for(kind).from_pretrained(folder, dtype=precision, **file_options(settings), **found)


def _varied(
    folder: Path, settings: HFConfig, variants: dict[str, str], parts: dict[str, torch.dtype]
) -> dict[str, torch.nn.Module]:
    """Of these parts those of another variant than the plain one, in their precision. Read one by one: a pipeline told
    of a variant fails where any part's folder holds a file without a suffix."""
    import diffusers
    import transformers

    index, found = _index(folder), {}
    for name, dtype in parts.items():
        if variants.get(name):
            library, cls = index[name]
            kind = getattr(transformers if library == "transformers" else diffusers, cls)
            found[name] = kind.from_pretrained(folder / name, dtype=dtype, **file_options(settings, variants[name]))
    return found


def omitted_parts(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """How a pipeline is told to do without these parts, and without those that its index says it has not."""
    index = _index(folder)
    told: dict[str, Any] = dict.fromkeys([*names, *(name for name, what in index.items() if what == [None, None])])
    if "safety_checker" in told:  # nobody looks at what is painted here
        told["requires_safety_checker"] = False
    return told


@contextmanager
def _text_pipeline(
    family: Family, folder: Path, variants: dict[str, str], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Any, torch.device]]:
    """The pipeline with its text encoders, and where these are, for as long as the block lasts.

    The network leaves the GPU meanwhile; encoders that do not fit beside what is there all the same run on the CPU.
    """
    network, home = family.network, next(family.network.parameters()).device
    there = {name: part for name, part in family.pipe.components.items() if name not in family.ENCODERS}
    encoders: list[torch.nn.Module] = []
    try:
        network.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or what it leaves counts as used
        with quiet(), loading_errors(folder):
            found = _varied(folder, family.settings, variants, dict.fromkeys(family.ENCODERS, dtype))
            parts = omitted_parts(folder, family.LEFT_OUT) | there | found
            pipe = type(family.pipe).from_pretrained(folder, dtype=dtype, **file_options(family.settings), **parts)
        encoders += [part for name in family.ENCODERS if (part := getattr(pipe, name)) is not None]
        needed = sum(p.numel() * p.element_size() for encoder in encoders for p in encoder.parameters())
        fits = device.type != "cuda" or 1.2 * needed < torch.cuda.mem_get_info(device)[0]
        where = device if fits else torch.device("cpu")
        for encoder in encoders:
            encoder.requires_grad_(False).eval().to(where)
        with torch.no_grad():
            yield pipe, where
    finally:
        for encoder in encoders:
            encoder.to("meta")  # whoever still holds it, its weights are gone
        if device.type == "cuda":
            torch.cuda.empty_cache()
        network.to(home)


@contextmanager
def _full_pipeline(
    family: Family, folder: Path, variants: dict[str, str], dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """The pipeline with all its parts, for as long as the block lasts."""
    import diffusers

    if not family.ENCODERS:  # a DDIMPipeline would put a scheduler of its own in the place of any
        yield diffusers.DDPMPipeline(family.network, family.pipe.scheduler)
        return
    with _text_pipeline(family, folder, variants, dtype, device) as (pipe, _):
        yield pipe


@contextmanager
def loading_errors(folder: Path) -> Iterator[None]:
    """Errors of loading, as what a user can do about them."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, ImportError, ValueError) as error:
        raise ValueError(
            f"the pipeline in {folder} cannot be loaded ({_line(error)}): is a part missing or damaged?"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no remarks while parts are loaded."""
    from diffusers.utils import logging as theirs
    from transformers.utils import logging as others

    spoken = [(log, log.get_verbosity()) for log in (theirs, others)]
    for log, _ in spoken:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in spoken:
            log.set_verbosity(level)
            log.enable_progress_bar()

"""The report of ``sds3d doctor``: installed packages, device, kernels, teachers, and the memory of a run."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import sds3d
from sds3d import ops
from sds3d.config import load as configs
from sds3d.config import recipes
from sds3d.config.schema import Config
from sds3d.runs.memory_advice import advise
from sds3d.runs.memory_estimate import Machine, dtype_of, estimate, image_size
from sds3d.runtime import threads
from sds3d.runtime.device import pick_device
from sds3d.teachers import small
from sds3d.teachers.base import PACKAGED

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "pyyaml",
    "scipy",
    "pillow",
    "matplotlib",
    "trimesh",
    "xatlas",
    "fast-simplification",
    "scikit-image",
    "imageio-ffmpeg",
    "typer",
    "rich",
    "diffusers",
    "transformers",
    "peft",
    "nerfacc",
    "triton",
    "tinycudann",
)
OPTIONAL = (
    "diffusers",
    "transformers",
    "peft",
    "nerfacc",
    "triton",
    "tinycudann",
)  # the default run does not need them


def examine() -> dict[str, Any]:
    """Return the report as plain values; "problems" has a sentence for each thing that stops the default run."""
    device = pick_device("auto")
    report: dict[str, Any] = {
        "sds3d": sds3d.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "device": str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "waiting threads": threads.describe(),
        "thread pools": threads.pool(),
        "backends": {name: _backend(device, name) for name in ops.BACKENDS},
        "teachers": {name: _teacher(name) for name in PACKAGED},
        "recipes": sorted({path.stem for path in recipes.recipes_folder().rglob("*.yaml")}),
    }
    report["problems"] = _problems(report)
    return report


def to_text(report: dict[str, Any]) -> str:
    """Format the report as text."""
    lines = [f"sds3d    {report['sds3d']}", f"python   {report['python']}"]
    lines += [f"device   {report['device']}, {report['threads']}"]
    lines += [f"threads  {report['thread pools']}; {report['waiting threads']}", ""]
    lines.append("packages")
    for name, version in report["packages"].items():
        lines.append(f"  {name:20s}{version or ('not installed (optional)' if name in OPTIONAL else 'MISSING')}")
    for title in ("backends", "teachers"):
        lines += ["", title] + [f"  {name:20s}{text}" for name, text in report[title].items()]
    lines += ["", f"recipes  {', '.join(report['recipes']) or 'none found'}", ""]
    if not report["problems"]:
        return "\n".join([*lines, 'All is well; try: sds3d generate "a red mug"'])
    return "\n".join([*lines, *(f"problem: {text}" for text in report["problems"])])


def examine_memory(config: Config, machine: Machine) -> dict[str, Any]:
    """Report the memory that a run takes on a machine, in bytes, and the settings that make it fit if it does not.

    Raises:
        ValueError: the teacher cannot be found, or is not for this method.
    """
    memory = estimate(config, machine)
    report: dict[str, Any] = {
        "teacher": config.teacher.name,
        "method": configs.name_of(config.method),
        "precision": str(dtype_of(config.teacher, machine)).removeprefix("torch."),
        "weights": memory.weights,
        "place": machine.name,
        "memory": machine.size,
        "held": memory.held,
        "moments": memory.moments,
        "while prompts are embedded": memory.before,
        "peak": memory.peak,
        "fits": memory.peak <= machine.size,
        "settings": [],
    }
    if report["fits"]:
        return report
    advice = advise(config, machine, image_size(config.teacher, machine))
    report["settings"] = [
        {"setting": saving.setting, "cost": saving.cost, "peak": peak} for saving, peak in advice.savings
    ]
    return report | {"fits with them": advice.fits}


def memory_text(report: dict[str, Any]) -> str:
    """Format the report of memory as text. Its last line says whether the run fits."""
    network = f"{report['weights'] / 1e6:.1f} M weights, computes in {report['precision']}"
    lines = [f"{report['method']} with {report['teacher']}, on {report['place']}; GB of 2^30 bytes, estimated", ""]
    for title, sizes in (("held from first to last", report["held"]), ("besides, one at a time", report["moments"])):
        lines.append(title)
        for name, size in sizes.items():
            lines.append(f"  {name:36s}{_gb(size):>8s}  {network if name == 'network' else ''}".rstrip())
    lines += [f"{'while prompts are embedded, in all':38s}{_gb(report['while prompts are embedded']):>8s}"]
    lines += [f"{'peak':38s}{_gb(report['peak']):>8s}", ""]
    sizes = f"about {_gb(report['peak'])} GB at its peak, and {report['place']} has {_gb(report['memory'])}"
    if report["fits"]:
        return "\n".join([*lines, f"Yes, it fits: it takes {sizes} GB."])
    lines += ["peak with each of these and those above it"] if report["settings"] else []
    for row in report["settings"]:
        lines.append(f"  {row['setting']:36s}{_gb(row['peak']):>8s}  {row['cost']}")
    lines += [""] if report["settings"] else []
    last = "with all of these it fits" if report["fits with them"] else "no setting that is known makes it fit"
    return "\n".join([*lines, f"No, it does not fit: it takes {sizes} GB; {last}."])


def _gb(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _backend(device: torch.device, name: str) -> str:
    """The kernels that a backend's name selects on this machine, or why it selects none."""
    try:
        chosen = ops.choose(device, name)
    except (ValueError, ImportError) as error:
        return f"no: {' '.join(str(error).split())}"
    return f"{chosen.name}, {chosen.reason}" if name == "auto" else "yes"


def _teacher(name: str) -> str:
    try:
        teacher = small.load(small.packaged(name), device="cpu")
    except ValueError as error:
        return f"no: {error}"
    path = small.packaged(name)
    return f"{path.stat().st_size / 1e6:.1f} MB, {len(teacher.vocabulary)} words, {path}"


def _problems(report: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} is not installed; run: pip install {name}"
        for name, version in report["packages"].items()
        if version is None and name not in OPTIONAL
    ]
    problems += [
        f"the packaged teacher {name} does not load; install sds3d again ({text.removeprefix('no: ')})"
        for name, text in report["teachers"].items()
        if text.startswith("no: ")
    ]
    if not report["recipes"]:
        problems.append(f"there are no recipes in {recipes.recipes_folder()}; install sds3d again")
    return problems

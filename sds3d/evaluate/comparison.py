"""Comparison of methods on the same prompts, seeds, steps and teacher, one run after the other.

Figures of a run, beside its pictures:

    iou, psnr, chamfer, fscore, fscore_fine, normals, depth_error, topology
                                 scenes: against the toybox's object, see evaluate/truth.py and evaluate/shape.py
    psnr                         images: against the most similar of the object's true views, mean over the images
    colour                       distance of the mean foreground colour from that of the teacher's samples
    saturation                   mean saturation (max - min over RGB) of the foreground, minus that of the samples
    diversity                    mean root-mean-square difference between seeds (and between images)
    coarse                       the same for pictures averaged to 8 x 8, without noise and texture
    seconds, asked, memory       training time, images the teacher was evaluated on, peak memory in MB
    diverged                     fraction of runs that diverged; the other figures are of those that did not
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import orbit
from sds3d.config import load as configs
from sds3d.config.load import RunConfig
from sds3d.config.typed import nearest, plain
from sds3d.distill.core import NonFiniteGradient
from sds3d.distill.score import METHODS
from sds3d.pages import comparison as page
from sds3d.runs import build, kinds, launch
from sds3d.runs.image import Painting
from sds3d.runs.scene import Asset
from sds3d.runtime import memory
from sds3d.runtime.device import pick_device
from sds3d.runtime.errors import stacklevel
from sds3d.runtime.files import from_json, read_text, replacing
from sds3d.runtime.machine import machine
from sds3d.teachers.base import Teacher, answerer, object_name
from sds3d.train import Diverged

COLUMNS = {
    "iou": page.Figure("IoU", 3, True),
    "psnr": page.Figure("PSNR, dB", 1, True),
    "chamfer": page.Figure("Chamfer", 4, False),
    "fscore": page.Figure("F at 0.05", 3, True),
    "fscore_fine": page.Figure("F at 0.02", 3, True),
    "normals": page.Figure("normals", 3, True),
    "depth_error": page.Figure("depth error", 3, False),
    "topology": page.Figure("topology", 2, True),
    "colour": page.Figure("colour off", 3, False),
    "saturation": page.Figure("saturation off", 3),
    "diversity": page.Figure("diversity", 3, True),
    "coarse": page.Figure("diversity at 8 x 8", 3, True),
    "seconds": page.Figure("seconds", 0, False),
    "asked": page.Figure("teacher evaluations", 0, False),
    "memory": page.Figure("peak memory, MB", 0, False),
    "diverged": page.Figure("diverged", 2, False),
}
STUDENTS = ("scene", "image")  # the kinds in `sds3d.runs.kinds.KINDS` that have pictures
VIEWS = 6  # views of a scene among the pictures
SAMPLES = 6  # samples of the teacher
NO_PICTURES = torch.zeros(0, 3, 1, 1)  # the pictures of a run that diverged
# A pixel is foreground if a channel differs from white by more than BACKGROUND, and by more than BLURRED after
# averaging over BLUR x BLUR pixels, which removes noise.
BACKGROUND = 0.1
BLURRED = 0.2
BLUR = 5


@dataclass(frozen=True)
class Comparison:
    """The settings of a comparison.

    Args:
        prompts: the prompts of every method.
        methods: names in ``distill.METHODS``.
        seeds: every method and prompt has a run for each seed.
        student: "scene" or "image".
        layer: settings of all runs.
        teacher: an object, in place of the teacher that the settings name.

    Raises:
        ValueError: there is nothing to compare, or a method or the student is unknown.
    """

    prompts: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    student: str = "image"
    layer: Mapping[str, Any] = field(default_factory=dict)
    teacher: Teacher | None = None

    def __post_init__(self):
        if self.teacher is not None:
            build.refuse_settings_of_teacher(self.layer)
        if not (self.prompts and self.methods and self.seeds):
            raise ValueError("a comparison needs at least one prompt, one method and one seed")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"method is {name!r}; {nearest(name, METHODS)} (there is {', '.join(METHODS)})")
        for name, values in (("prompts", self.prompts), ("methods", self.methods), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice ({', '.join(map(str, values))}); give each once")
        for key in {"prompt", "method", "seed", "out"} & set(self.layer):
            method = self.layer[key] if key == "method" else None
            if not isinstance(method, Mapping) or "name" in method:  # method.scale= is a setting of all its runs
                raise ValueError(f"{key}= cannot be set in a comparison: give prompts, --methods, --seeds and --out")
        if self.student not in STUDENTS:
            raise ValueError(f"student is {self.student!r}; give {' or '.join(STUDENTS)}")

    def config(self, prompt: str, method: str, seed: int, out: Path) -> RunConfig:
        """Build the config of one run."""
        own = {"method": method, "seed": seed, "out": str(out)}
        config = configs.load(prompt, {"method": method}, self.layer, own, kind=kinds.KINDS[self.student].config)
        return build.with_teacher(config, self.teacher)

    def settings(self) -> dict[str, Any]:
        """Return the settings that all runs share, as plain values. A second call must have the same."""
        teacher = {} if self.teacher is None else {"teacher": object_name(self.teacher)}
        return {"student": self.student, "layer": plain(self.layer), **teacher}


@dataclass
class Entry:
    """One run of a comparison, with its folder relative to the comparison's, its figures and its pictures.

    If the run diverged, ``failure`` says why, and it has neither figures nor pictures.
    """

    prompt: str
    method: str
    seed: int
    student: str
    run: str
    figures: dict[str, float | None]
    pictures: Tensor  # (B, 3, H, W) in [0, 1]: views of a scene, or images
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """Prompt, method and seed, which identify the entry."""
        return self.prompt, self.method, self.seed

    def line(self) -> str:
        """Return which run it is and how it ended, in a line."""
        outcome = self.failure or f"{self.figures['seconds']:.0f} s"
        return f"{self.method}, {self.prompt!r}, seed {self.seed}: {outcome}"


def compare(comparison: Comparison, out: Path) -> Iterator[Entry]:
    """Run a comparison. Writes ``out``/results.json after every run, index.html and sheet.png at the end.

    A second call with the same settings continues the comparison, also with further prompts, methods or seeds. A run
    that was killed is resumed from its checkpoint. If a run diverges, its entry says so, and the others continue.

    Yields:
        The entry of each run, in order.

    Raises:
        ValueError: ``out`` holds a comparison with other settings, or a method lacks something that it needs. This is
            checked before any training.
    """
    out = out.expanduser()
    done = _load(comparison, out)
    if done and comparison.teacher is not None:
        warnings.warn(
            f"{out} holds {len(done)} finished runs, which are kept: was their teacher the "
            f"{type(comparison.teacher).__name__} that is given now? For another teacher, give another folder",
            stacklevel=stacklevel(),
        )
    keys = [(p, m, s) for p in comparison.prompts for m in comparison.methods for s in comparison.seeds]
    missing = [key for key in keys if key not in done]
    wanted = {key: launch.check(comparison.config(*key, out / "runs"), comparison.teacher) for key in missing}
    samples = {p: teacher_samples(comparison, p) for p in comparison.prompts}
    unfinished = _unfinished(out, done)
    for key in keys:
        if key not in done:
            try:
                folder = next((path for path, its_config in unfinished.items() if its_config == wanted[key]), None)
                result, figures, pictures = _carry_out(comparison, wanted[key], samples[key[0]], folder)
                run = result.path.relative_to(out).as_posix()
                done[key] = Entry(*key, comparison.student, run, figures, pictures)
            except (Diverged, NonFiniteGradient) as error:
                done[key] = Entry(*key, comparison.student, "", {}, NO_PICTURES, str(error))
            _save(comparison, out, done, samples)
        yield done[key]
    _write(comparison, out, [done[key] for key in keys], samples)


def teacher_samples(comparison: Comparison, prompt: str) -> Tensor:
    """Draw samples of the teacher for a prompt, (SAMPLES, 3, H, W) in [0, 1]; for a scene, from cameras around it."""
    from sds3d.teachers.drawing import sample

    config = comparison.config(prompt, comparison.methods[0], 0, Path())
    teacher = answerer(build.build_teacher(config, comparison.teacher), "colours")
    cameras = orbit(SAMPLES) if kinds.of(config).seen_by_cameras and teacher.views == "camera" else None
    return sample(teacher, [prompt] * SAMPLES, seed=1, guidance=2.0, cameras=cameras).cpu()


def _unfinished(out: Path, done: Mapping[tuple, Entry]) -> dict[Path, RunConfig]:
    """The run folders that an earlier call did not finish, with their configs."""
    unfinished, finished = {}, {entry.run for entry in done.values()}
    for path in sorted((out / "runs").glob("[0-9]*-*/config.yaml")):
        if path.parent.relative_to(out).as_posix() not in finished:
            try:
                unfinished[path.parent] = configs.of_run(path)
            except ValueError:  # written by another version: it cannot be resumed
                continue
    return unfinished


def _carry_out(
    comparison: Comparison, config: RunConfig, samples: Tensor, folder: Path | None
) -> tuple[Asset | Painting, dict[str, float | None], Tensor]:
    """Train a new run, or resume the one in ``folder``. Returns its result, figures and pictures (B, 3, H, W)."""
    memory.reset_peak()
    result: Any  # the result of one of STUDENTS, which have pictures
    teacher = comparison.teacher
    result, steps = launch.start(config, teacher) if folder is None else launch.resume(folder, teacher=teacher)
    rows = result.run.rows()
    begun, earlier = time.perf_counter(), rows[-1].get("seconds", 0.0) if rows else 0.0
    for _ in steps:
        pass
    seconds = earlier + time.perf_counter() - begun
    figures: dict[str, float | None] = {
        "seconds": seconds,
        "asked": sum(row.get("asked", 0) for row in result.run.rows()),
        "memory": memory.peak(pick_device(config.device)),
    }
    pictures = result.pictures(VIEWS, samples.shape[-1]).cpu()
    figures |= against_truth(result) | against_samples(pictures, samples)
    return result, figures, pictures


def against_truth(result: Asset | Painting) -> dict[str, float | None]:
    """Return figures against the toybox's object of the prompt; {} if the toybox has no such object."""
    from sds3d.data import toybox

    try:
        toybox.parse(result.config.prompt)
    except ValueError:
        return {}
    return result.against_truth()


def against_samples(pictures: Tensor, samples: Tensor) -> dict[str, float]:
    """Compare colour and saturation of pictures with those of the teacher's samples, (B, 3, H, W) each."""
    (ours, our_saturation), (theirs, their_saturation) = colour_of(pictures), colour_of(samples)
    return {"colour": float((ours - theirs).norm()), "saturation": float(our_saturation - their_saturation)}


def colour_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean colour (3,) and mean saturation () of the pixels that are not white background."""
    blurred = F.avg_pool2d(images, BLUR, 1, BLUR // 2, count_include_pad=False)
    mask = ((1 - images).amax(1) > BACKGROUND) & ((1 - blurred).amax(1) > BLURRED)  # (B, H, W)
    pixels = images.permute(0, 2, 3, 1)[mask]  # (P, 3)
    if not len(pixels):
        return torch.ones(3), torch.zeros(())
    return pixels.mean(0), (pixels.amax(1) - pixels.amin(1)).mean()


def diversity(entries: list[Entry]) -> dict[str, float | None]:
    """Return the diversity of the entries of one prompt and method, see `diversity_of`.

    Scenes are compared view by view between seeds; images are compared each with each.
    """
    pictures = [entry.pictures for entry in entries if not entry.failure]
    if not pictures:
        return {}
    stacks = torch.stack(pictures)  # (S, B, 3, H, W)
    if entries[0].student == "image":
        stacks = stacks.flatten(0, 1)[:, None]
    return diversity_of(stacks)


def diversity_of(stacks: Tensor) -> dict[str, float | None]:
    """Return the diversity of S stacks of pictures (S, B, 3, H, W), in full and at 8 x 8 pixels.

    It is the mean root-mean-square difference of their pictures over all pairs of stacks; None if S is 1.
    """
    coarse = F.adaptive_avg_pool3d(stacks, (3, 8, 8))
    return {"diversity": _mean_distance(stacks), "coarse": _mean_distance(coarse)}


def _mean_distance(stacks: Tensor) -> float | None:
    pairs = [(a - b).square().flatten(1).mean(1).sqrt().mean() for a, b in combinations(stacks, 2)]
    return float(torch.stack(pairs).mean()) if pairs else None


def summary(entries: list[Entry]) -> dict[str, dict[str, float | None]]:
    """Return method -> figure -> its mean over the runs that have it."""
    by_method: dict[str, dict[str, float | None]] = {}
    for method in dict.fromkeys(entry.method for entry in entries):
        own = [entry for entry in entries if entry.method == method]
        rows = [entry.figures for entry in own]
        rows += [diversity([e for e in own if e.prompt == p]) for p in {e.prompt for e in own}]
        if any(entry.failure for entry in own):
            rows += [{"diverged": float(bool(entry.failure))} for entry in own]
        by_method[method] = {name: _mean([row.get(name) for row in rows]) for name in COLUMNS}
    return by_method


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def means(entries: list[Entry]) -> list[page.Row]:
    """Return the rows of the table of means, one for each method."""
    return [page.Row(method, row, reference=bool(row["diverged"])) for method, row in summary(entries).items()]


def in_text(entries: list[Entry]) -> str:
    """Return the table of means for a terminal."""
    return page.in_text(COLUMNS, means(entries))


def _write(comparison: Comparison, out: Path, entries: list[Entry], samples: Mapping[str, Tensor]) -> None:
    """Write index.html and sheet.png."""
    heading = f"Mean over {len(comparison.prompts)} prompts and {len(comparison.seeds)} seeds"
    sections = [page.Section(heading, means(entries))]
    sample_figures = of_samples(comparison, samples)
    for prompt in comparison.prompts:
        rows = [page.Row("the teacher's own samples", sample_figures[prompt], samples[prompt], reference=True)]
        for method in comparison.methods:
            own = [entry for entry in entries if entry.prompt == prompt and entry.method == method]
            label = "; ".join([method] + [f"seed {e.seed} diverged: {e.failure}" for e in own if e.failure])
            pictures = [entry.pictures for entry in own if not entry.failure]
            rows.append(page.Row(label, summary(own)[method], torch.cat(pictures) if pictures else None))
        sections.append(page.Section(prompt, rows))
    computer = ", ".join(f"{k} {v}" for k, v in machine(pick_device("auto")).items())
    shared = f"seeds {', '.join(map(str, comparison.seeds))}; settings {plain(comparison.layer) or 'the recipes'}"
    note = f"Student: {comparison.student}; {shared}. Machine: {computer}. What the figures mean: sds3d compare --help."
    page.write(out / "index.html", "Methods side by side", note, COLUMNS, sections)
    page.contact_sheet(out / "sheet.png", sections)


def of_samples(comparison: Comparison, samples: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return prompt -> figures of the teacher's samples: their diversity if images are compared, else none."""
    if comparison.student != "image":
        return dict.fromkeys(samples, {})
    return {prompt: diversity_of(images[:, None]) for prompt, images in samples.items()}


def _save(comparison: Comparison, out: Path, done: Mapping[tuple, Entry], samples: Mapping[str, Tensor]) -> None:
    stored = ("prompt", "method", "seed", "student", "run", "figures", "failure")
    rows = [{name: getattr(entry, name) for name in stored} for entry in done.values()]
    results = {"settings": comparison.settings(), "machine": machine(pick_device("auto"))}
    results |= {"mean": summary(list(done.values())), "samples": of_samples(comparison, samples), "runs": rows}
    with replacing(out / "results.json") as part:
        part.write_text(json.dumps(results, indent=1) + "\n")


def _load(comparison: Comparison, out: Path) -> dict[tuple[str, str, int], Entry]:
    """The entries of an earlier call by key. Raises ValueError if it had other settings."""
    path = out / "results.json"
    if not path.is_file():
        return {}
    try:
        stored = from_json(read_text(path))
        rows, settings = stored["runs"], stored["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no comparison; name another folder with --out") from error
    if settings != comparison.settings():
        raise ValueError(f"{out} holds a comparison with other settings ({settings}); name another folder with --out")
    entries = {}
    for row in rows:
        entry = Entry(**row, pictures=NO_PICTURES if row.get("failure") else _pictures(comparison, out / row["run"]))
        entries[entry.key] = entry
    return entries


def _pictures(comparison: Comparison, path: Path) -> Tensor:
    """The pictures of a finished run."""
    result: Any = kinds.open_run(path)  # the result of one of STUDENTS, which have pictures
    return result.pictures(VIEWS, build.build_teacher(result.config, comparison.teacher).image_size).cpu()

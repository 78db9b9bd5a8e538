"""Toybox renders stored as colourless layers. They are rendered once and coloured differently at each use.

A file holds uint8: a layer in [0, 1] as 255 x, and normals and positions, which are in [-1, 1], as 127 (x + 1).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.toybox import SIZES
from sds3d.data.tracing import LAYERS, NORMAL, POSITION, part_distances, trace
from sds3d.runtime.files import replacing, unwritable

NAMES = (*KINDS, *STACKS)
CHUNK = 20  # images of one kind that are rendered together
SIZE_NAMES = tuple(SIZES)


def _chunk(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Layers (CHUNK, LAYERS, 64, 64) uint8 and rows (CHUNK, 6): kind, size, azimuth, elevation, distance, fov."""
    torch.set_num_threads(1)
    seed, number = job
    rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
    in_round = len(KINDS) + 4  # a round has every kind once, and four stacks
    index = number % in_round
    stack = len(KINDS) + int(torch.randint(len(STACKS), (), generator=rng))
    name = index if index < len(KINDS) else stack

    cameras = draw_cameras(CHUNK, rng)
    size = torch.multinomial(torch.tensor([0.2, 0.6, 0.2]), CHUNK, True, generator=rng)
    scale = torch.tensor(list(SIZES.values()))[size] * _uniform(CHUNK, 0.96, 1.04, rng)
    layers = trace((KINDS | STACKS)[NAMES[name]], cameras, scale)
    rows = torch.stack(
        [
            torch.full((CHUNK,), float(name)),
            size.float(),
            cameras.azimuth,
            cameras.elevation,
            cameras.distance,
            cameras.fov,
        ],
        -1,
    )
    for signed in (NORMAL, POSITION):
        layers[:, signed] = (layers[:, signed] + 1) * (127 / 255)
    return (layers * 255).round().byte().numpy(), rows.numpy()


def draw_cameras(count: int, rng: torch.Generator) -> Cameras:
    """Draw cameras as in the teachers' training: from all sides, one in five from nearly above, into mugs."""

    def uniform(low: float, high: float) -> Tensor:
        return _uniform(count, low, high, rng)

    elevation = torch.where(uniform(0, 1) < 0.8, uniform(-30, 65), uniform(65, 89))
    return Cameras(uniform(0, 360), elevation, uniform(2.7, 3.3), uniform(36, 44))


def _uniform(count: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + torch.rand(count, generator=rng) * (high - low)


class Renders:
    """Memory-mapped renders on disk.

    Args:
        folder: the folder that `build` wrote.
    """

    def __init__(self, folder: Path):
        self.layers = np.load(folder / "layers.npy", mmap_mode="r")  # (N, LAYERS, 64, 64) uint8
        rows = torch.from_numpy(np.load(folder / "rows.npy"))
        self.names = [NAMES[int(k)] for k in rows[:, 0]]
        self.sizes = [SIZE_NAMES[int(s)] for s in rows[:, 1]]
        self.cameras = Cameras(*(rows[:, i].contiguous() for i in (2, 3, 4, 5)))

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, index: Tensor) -> Tensor:
        """Return the layers of renders by index (B,): (B, LAYERS, 64, 64) float, as `tracing.trace` has them."""
        layers = torch.from_numpy(self.layers[index.numpy()]).float() / 255
        for signed in (NORMAL, POSITION):
            layers[:, signed] = layers[:, signed] * (255 / 127) - 1
        return layers


def build(folder: Path, count: int, seed: int = 0, workers: int = 2) -> Iterator[int]:
    """Render ``count`` images (70 kB each) into ``folder``, unless it has the same already.

    Yields:
        The number of images rendered so far.

    Raises:
        ValueError: the disk is full or the folder cannot be made.
    """
    about = json.dumps({"count": count, "seed": seed, "shapes": fingerprint(), "layers": LAYERS})
    stamp = folder / "about.json"
    if stamp.is_file() and stamp.read_text() == about:
        yield count
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (stamp, folder / "layers.npy"):  # removed first, so that nothing is written through a link
            old.unlink(missing_ok=True)
        layers = np.lib.format.open_memmap(folder / "layers.npy", "w+", np.uint8, (count, LAYERS, 64, 64))
        with (folder / "layers.npy").open("r+b") as file:  # reserve the space: a full disk kills a sparse memory map
            os.posix_fallocate(file.fileno(), 0, layers.offset + layers.nbytes)
    except OSError as error:
        raise ValueError(unwritable(folder, error)) from error
    jobs = [(seed, i) for i in range(-(-count // CHUNK))]
    rows = np.empty((count, 6), np.float32)
    with multiprocessing.get_context("spawn").Pool(workers, _leave_ctrl_c_to_the_parent) as pool:
        for i, (a, b) in enumerate(pool.imap(_chunk, jobs)):
            start, stop = i * CHUNK, min((i + 1) * CHUNK, count)
            layers[start:stop], rows[start:stop] = a[: stop - start], b[: stop - start]
            yield stop
    layers.flush()
    with replacing(folder / "rows.npy") as part:
        np.save(part, rows)
    with replacing(stamp) as part:
        part.write_text(about)


def fingerprint() -> str:
    """Return a digest of the shapes and colours of all kinds, and of the cameras."""
    axis = torch.linspace(-0.9, 0.9, 5)
    points = torch.cartesian_prod(axis, axis, axis)
    digest = hashlib.sha256()
    for name, kind in (KINDS | STACKS).items():
        distances = (part_distances(kind, points) * 1000).round().int()
        digest.update(name.encode() + repr([slot for _, slot in kind.parts]).encode() + distances.numpy().tobytes())
    cameras = draw_cameras(64, torch.Generator().manual_seed(0))
    drawn = torch.stack([cameras.azimuth, cameras.elevation, cameras.distance, cameras.fov])
    digest.update((drawn * 100).round().int().numpy().tobytes())
    return digest.hexdigest()[:16]


def _leave_ctrl_c_to_the_parent() -> None:
    """Ignore Ctrl-C in a worker; if it ended the worker, the parent would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

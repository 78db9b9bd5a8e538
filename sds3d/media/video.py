"""Turntables: films of one turn around the object, which loop. MP4 (H.264), GIF or WebP."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from sds3d.cameras import orbit
from sds3d.media.sheet import Render, resize, to_bytes
from sds3d.runtime.files import replacing

FORMATS = (".mp4", ".gif", ".webp")
BATCH = 8  # frames rendered at once


def turntable(
    render: Render, path: str | Path, frames: int = 48, fps: int = 24, size: int = 256, elevation: float = 15.0
) -> Path:
    """Write one turn that starts at the front, runs counter-clockwise seen from above, and loops without a jump.

    Args:
        render: cameras (B) -> images (B, 3, H, H) in [0, 1], of any size; they are resized to ``size``.
        path: ends in .mp4, .gif or .webp.
        frames: number of frames in the turn.
        fps: frames per second.
        size: pixels a side; H.264 needs an even number.
        elevation: degrees.

    Raises:
        ValueError: the size is odd, there are too few frames, or the file cannot be written.
    """
    check(path, size, frames, fps)
    return film(turn(lambda cameras: resize(render(cameras), size), frames, elevation), path, fps)


def turn(render: Render, frames: int, elevation: float) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 of one turn, rendered lazily; elevation in degrees."""
    cameras = orbit(frames, elevation=elevation)
    for start in range(0, frames, BATCH):
        yield from to_bytes(render(cameras[start : start + BATCH]))


def check(path: str | Path, size: int, frames: int, fps: int) -> None:
    """Raise ValueError for a turntable that cannot be written; to be called before anything is rendered."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"cannot write a film as '{path}': the name must end in {' or '.join(FORMATS)}")
    if size < 16 or (size % 2 and suffix == ".mp4"):  # H.264 stores colour for blocks of 2 x 2 pixels
        raise ValueError(f"turntable size is {size}; give an even number of at least 16 pixels")
    if frames < 2 or not 1 <= fps <= (50 if suffix == ".gif" else 120):
        raise ValueError(
            f"a turntable of {frames} frames at {fps} per second; give at least 2 frames, "
            "and 1 to 120 per second (50 in a GIF)"
        )


def film(frames: Iterable[np.ndarray], path: str | Path, fps: int) -> Path:
    """Write frames (H, W, 3) uint8, all of one size, as a film that loops.

    Raises:
        ValueError: the suffix is not supported, or the file cannot be written. No partial file is left.
    """
    path = Path(path)
    with replacing(path, FORMATS) as temporary:
        if path.suffix.lower() == ".mp4":
            _write_mp4(frames, temporary, fps)
        else:
            _write_animation(frames, temporary, fps)
    return path


def _write_mp4(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Write H.264 with yuv420p, which every player and browser shows."""
    import imageio_ffmpeg

    writer, sent = None, 0
    try:
        for frame in frames:
            if writer is None:
                writer = imageio_ffmpeg.write_frames(
                    str(path),
                    (frame.shape[1], frame.shape[0]),
                    fps=fps,
                    codec="libx264",
                    quality=8,
                    macro_block_size=2,
                    ffmpeg_log_level="error",
                    output_params=["-movflags", "+faststart"],  # lets players start before the file is loaded
                )
                writer.send(None)
            writer.send(np.ascontiguousarray(frame))
            sent += 1
    finally:
        if writer is not None:
            writer.close()
    try:  # imageio_ffmpeg does not report ffmpeg's exit code, so the frames are counted
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))
    except RuntimeError:
        written = 0
    if written != sent:
        raise OSError(f"ffmpeg wrote {written} of {sent} frames; is the disk full?")


def _write_animation(frames: Iterable[np.ndarray], path: Path, fps: int) -> None:
    """Write a GIF (256 colours per frame) or a WebP."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    if path.suffix.lower() == ".gif":  # durations are in whole hundredths of a second
        first.save(path, save_all=True, append_images=rest, duration=10 * max(2, round(100 / fps)), loop=0)
    else:
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=85)

"""Turntables: one turn around the object as an MP4 that loops."""

from __future__ import annotations

from pathlib import Path

from sds3d.cameras import orbit
from sds3d.export.sheet import Render, resize, to_bytes
from sds3d.files import replacing

BATCH = 8  # frames rendered at once


def turntable(
    render: Render, path: str | Path, frames: int = 48, fps: int = 24, size: int = 256, elevation: float = 15.0
) -> Path:
    """Write one turn, counter-clockwise seen from above, that starts at the front and closes without a jump.

    Args:
        render: cameras (B) -> images (B, 3, H, H) in [0, 1], of any size; they are resized to ``size``.
        path: ends in .mp4.
        frames: in the whole turn.
        fps: frames a second.
        size: pixels a side, even (H.264 wants it).
        elevation: degrees.

    Raises:
        ValueError: an odd size, too few frames, or a place that cannot be written.
    """
    if size < 16 or size % 2:
        raise ValueError(f"turntable size is {size}; give an even number of at least 16 pixels")
    if frames < 2 or fps < 1:
        raise ValueError(f"a turntable of {frames} frames at {fps} a second; give at least 2 frames and 1 a second")
    import imageio_ffmpeg

    cameras = orbit(frames, elevation=elevation)
    path = Path(path)
    with replacing(path, (".mp4",)) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (size, size),
            fps=fps,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
        )
        writer.send(None)
        try:
            for start in range(0, frames, BATCH):
                for frame in to_bytes(resize(render(cameras[start : start + BATCH]), size)):
                    writer.send(frame.tobytes())
        finally:
            writer.close()
    return path

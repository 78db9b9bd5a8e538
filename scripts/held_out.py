"""Make the twelve held-out prompts with one recipe and score them against the truth.

    python scripts/held_out.py --json benchmarks/held_out.json --sheet benchmarks/held_out.png
    python scripts/held_out.py teacher.views=words

No teacher's training has seen these combinations of kind and colours (`sds3d.data.toybox.is_held_out`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

import sds3d
from sds3d.config import parse_overrides
from sds3d.data.toybox import HELD_OUT_PROMPTS
from sds3d.export.sheet import contact_sheet

SHOWN = (1, 7, 13, 19)  # of the 24 views, in the sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for sds3d generate")
    parser.add_argument("--prompts", nargs="*", default=HELD_OUT_PROMPTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG: for each prompt four true views, then ours")
    options = parser.parse_args()

    layer, rows, pictures = parse_overrides(options.overrides), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in options.prompts:
            begun = time.monotonic()
            asset = sds3d.generate(prompt, out=folder, **layer)
            seconds = time.monotonic() - begun
            scores = asset.evaluate()
            numbers = {key: getattr(scores, key) for key in ("iou", "psnr", "chamfer", "fscore")}
            rows[prompt] = {key: None if v is None else round(v, 4) for key, v in numbers.items()}
            rows[prompt]["seconds"] = round(seconds, 1)
            pictures.append(torch.cat([scores.truth[list(SHOWN)], scores.ours[list(SHOWN)]]))
            print(f"{prompt:36s}", rows[prompt], flush=True)
    keys = ("iou", "psnr", "chamfer", "fscore", "seconds")
    known = {key: [row[key] for row in rows.values() if row[key] is not None] for key in keys}
    mean = {key: round(sum(values) / len(values), 4) if values else None for key, values in known.items()}
    print(f"{'mean':36s}", mean)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if options.json:
        command = " ".join(["python scripts/held_out.py", *options.overrides])
        report = {"command": command, "machine": machine, "mean": mean, "prompts": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.sheet:
        contact_sheet(pictures, options.sheet, [f"{p}: truth | ours" for p in rows])


if __name__ == "__main__":
    main()

"""Make scenes of the twelve held-out prompts and score them against the true shapes.

    python scripts/held_out.py --json benchmarks/held_out.json --sheet benchmarks/held_out.png
    python scripts/held_out.py teacher.views=words

No teacher was trained on these combinations of kind and colours (`sds3d.data.toybox.is_held_out`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sds3d.config import load as config
from sds3d.data.toybox import HELD_OUT_PROMPTS
from sds3d.media.sheet import contact_sheet
from sds3d.runs import launch
from sds3d.runtime.device import pick_device
from sds3d.runtime.machine import machine

SCORES = ("iou", "psnr", "chamfer", "fscore")
SHOWN = (1, 7, 13, 19)  # which of the 24 views the sheet shows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for sds3d generate")
    parser.add_argument("--prompts", nargs="*", default=HELD_OUT_PROMPTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG: for each prompt four true views, then ours")
    options = parser.parse_args()

    layer, rows, pictures = config.parse_overrides(options.overrides), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for prompt in options.prompts:
            begun = time.monotonic()
            asset, steps = launch.start(config.load(prompt, layer, {"out": folder}))
            for _ in steps:
                pass
            try:
                for _ in asset.finish():
                    pass
            except ValueError as error:  # a scene without a surface is scored like any other
                print(f"{prompt}: {error}")
            seconds = time.monotonic() - begun
            scores = asset.evaluate()
            numbers = {key: getattr(scores, key) for key in SCORES}
            rows[prompt] = {key: None if v is None else round(v, 4) for key, v in numbers.items()}
            rows[prompt]["seconds"] = round(seconds, 1)
            pictures.append(torch.cat([scores.truth[list(SHOWN)], scores.ours[list(SHOWN)]]))
            print(f"{prompt:36s}", rows[prompt], flush=True)
            if options.json:
                options.json.write_text(json.dumps(report(options.overrides, rows), indent=1) + "\n")
            if options.sheet:
                contact_sheet(pictures, options.sheet, [f"{p}: truth | ours" for p in rows])
    print(f"{'mean':36s}", report(options.overrides, rows)["mean"])


def report(overrides: list[str], rows: dict[str, dict[str, float | None]]) -> dict[str, Any]:
    """Return the scores so far with command and machine. A prompt without a mesh has no Chamfer distance."""
    known = {key: [row[key] for row in rows.values() if row[key] is not None] for key in (*SCORES, "seconds")}
    return {
        "command": " ".join(["python scripts/held_out.py", *overrides]),
        "machine": machine(pick_device("auto")),
        "mean": {key: round(sum(values) / len(values), 4) if values else None for key, values in known.items()},
        "prompts": rows,
    }


if __name__ == "__main__":
    main()

"""Train a classifier of drawn images, on real images only. Its weights go beside sds3d/evaluate/classifiers.py.

    python scripts/train_judge.py digits
    python scripts/train_judge.py toybox --renders work/teacher/renders      creates the renders if they are missing

The classifier of digits is trained on the training images with added noise, and its accuracy on the held-out images is
printed. The classifier of toys is trained on true renders with noise and blur, in all colours, including those that no
teacher is trained on. scripts/teacher_accuracy.py prints its accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from sds3d.data import digits, renders
from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.tracing import paint
from sds3d.evaluate import classifiers
from sds3d.networks.classifier import Classifier, ToyClassifier
from sds3d.prompts import COLOURS
from sds3d.runtime.errors import Diverged
from sds3d.runtime.files import replacing
from sds3d.runtime.machine import machine
from sds3d.teachers.training.settings import FitConfig

NAMES = list(KINDS | STACKS)


def train_digits(steps: int = 3000, batch: int = 128) -> None:
    """Train the classifier of digits, write its weights, and print its accuracy."""
    generator = torch.Generator().manual_seed(0)
    train, held_out = (digits.pictures(part).rgb().mean(1, keepdim=True) * 2 - 1 for part in digits.PARTS)
    train_labels, held_out_labels = (digits.labels(part) for part in digits.PARTS)
    torch.manual_seed(0)
    net = Classifier(10)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        index = torch.randint(len(train), (batch,), generator=generator)
        x = train[index]
        x = x + 0.3 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(net(x), train_labels[index], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    write(net, classifiers.DIGITS, "digits", data=json.dumps({"train": len(train), "held-out": len(held_out)}))
    for name, x, labels in (("train", train, train_labels), ("held-out", held_out, held_out_labels)):
        right = (classifiers.DigitJudge().classify((x / 2 + 0.5).expand(-1, 3, -1, -1)) == labels).double().mean()
        print(f"{name}: {100 * right:.1f} % of {len(x)}")


def train_toys(store: renders.Renders, steps: int = 5000, batch: int = 64) -> None:
    """Train the classifier of toys and write its weights; scripts/teacher_accuracy.py prints its accuracy."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    net = ToyClassifier(len(NAMES), len(COLOURS))
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    palette, kinds = torch.tensor(list(COLOURS.values())), torch.tensor([NAMES.index(n) for n in store.names])
    two = torch.tensor([bool((KINDS | STACKS)[n].second) for n in store.names])
    for _ in range(steps):
        index = torch.randint(len(store), (batch,), generator=generator)
        main, second = torch.randint(len(palette), (2, batch), generator=generator)
        rgb, coverage = paint(store.batch(index), palette[main], palette[second])
        kind, first, other = net(spoil(rgb + 1 - coverage, generator) * 2 - 1)
        loss = F.cross_entropy(kind, kinds[index]) + F.cross_entropy(first, main)
        loss = loss + (F.cross_entropy(other, second, reduction="none") * two[index]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    write(net, classifiers.TOYS, "toybox", classes=json.dumps([NAMES, list(COLOURS)]))


def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
    """Add a little noise to images (B, 3, H, W), and blur them with probability 0.3."""
    x = x + 0.05 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
    return F.avg_pool2d(x, 3, 1, 1) if torch.rand((), generator=generator) < 0.3 else x


def write(net: nn.Module, path: Path, data: str, **header: str) -> None:
    """Write the weights in half precision. Raise Diverged, and keep the old file, if one is not finite."""
    if not all(bool(torch.isfinite(w.half()).all()) for w in net.state_dict().values()):
        raise Diverged(f"the judge's weights are not finite; {path} stays as it was")
    header |= {"command": f"scripts/train_judge.py {data}"}
    with replacing(path) as part:
        part.write_bytes(save({k: v.half().contiguous() for k, v in net.state_dict().items()}, header))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("digits", "toybox"))
    parser.add_argument(
        "--renders", type=Path, default=Path("work/teacher/renders"), help="folder of the renders; created if missing"
    )
    options = parser.parse_args()
    if options.data == "digits":
        train_digits()
    else:
        for _ in renders.build(options.renders, FitConfig().images):
            pass
        train_toys(renders.Renders(options.renders))
    print(*(f"{key}: {value}" for key, value in machine(torch.device("cpu")).items()), sep="\n")


if __name__ == "__main__":
    main()

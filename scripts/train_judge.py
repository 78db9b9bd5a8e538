"""Train the classifier that judges drawn digits, on the training images alone: sds3d/metrics/digits.safetensors.

    python scripts/train_judge.py

It learns from noised images besides, and prints its accuracy on the held-out ones.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save

from sds3d.data import digits
from sds3d.doctor import machine
from sds3d.files import replacing
from sds3d.metrics.judge import WEIGHTS, DigitJudge
from sds3d.networks.classifier import Classifier

STEPS, BATCH = 3000, 128


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, held_out = (digits.pictures(part).rgb().mean(1, keepdim=True) * 2 - 1 for part in digits.PARTS)
    known, asked = (digits.labels(part) for part in digits.PARTS)
    net = Classifier(10)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        index = torch.randint(len(train), (BATCH,), generator=generator)
        x = train[index]
        x = x + 0.3 * torch.rand((), generator=generator) * torch.randn(x.shape, generator=generator)
        loss = F.cross_entropy(net(x), known[index], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    header = {"data": json.dumps({"train": len(train), "held-out": len(held_out)}), "command": "scripts/train_judge.py"}
    with replacing(WEIGHTS) as part:
        part.write_bytes(save({k: v.half().contiguous() for k, v in net.state_dict().items()}, header))
    judge = DigitJudge()
    for name, x, wanted in (("train", train, known), ("held-out", held_out, asked)):
        right = (judge.classify((x / 2 + 0.5).expand(-1, 3, -1, -1)) == wanted).double().mean()
        print(f"{name}: {100 * right:.1f} % of {len(x)}")
    print(*(f"{key}: {value}" for key, value in machine(torch.device("cpu")).items()), sep="\n")


if __name__ == "__main__":
    main()

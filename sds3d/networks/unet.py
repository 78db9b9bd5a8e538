"""The U-Net of the packaged teachers, conditioned on text by attention and optionally on the exact camera by rays.

Pixels are folded into channels, 2 x 2 for images of 64 pixels: the network then works at 32, 16, 8 and 4 pixels a side.
The caption enters twice: its word vectors are keys of the attention at the two lowest levels, so that two colours can
bind to two parts, and its caption vector joins time and camera in the scale and shift of every block. The camera enters
as an embedding and as features of each pixel's ray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.cameras import Cameras

RAY_FEATURES = 18
CAMERA_FEATURES = 14


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net.

    Args:
        widths: channels of each level, highest resolution first; each level halves the side. At least two levels.
        blocks: blocks of each level on the way down, and as many on the way up; the lowest level has one of each and
            is not listed.
        condition: width of the condition that scales and shifts every block.
        text: width of the text encoder's vectors.
        heads: attention heads at the two lowest levels.
        size: side of the images in pixels, a multiple of fold * 2^(levels - 1).
        channels: channels of the images.
        fold: fold squares of fold x fold pixels into channels.
        cameras: whether the network takes a camera.
        dropout: probability of dropping a feature in training.
    """

    widths: tuple[int, ...] = (32, 64, 160, 192)
    blocks: tuple[int, ...] = (1, 2, 2)
    condition: int = 192
    text: int = 160
    heads: int = 4
    size: int = 64
    channels: int = 3
    fold: int = 2
    cameras: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        assert len(self.widths) == len(self.blocks) + 1 >= 2, (self.widths, self.blocks)
        assert self.size % (self.fold * 2 ** len(self.blocks)) == 0, self


def camera_features(cameras: Cameras) -> Tensor:
    """Return (B, CAMERA_FEATURES): sines and cosines of multiples of azimuth (1 to 4) and elevation (1, 2); distance
    and field of view, shifted."""
    azimuth = torch.deg2rad(cameras.azimuth)[:, None] * torch.arange(1, 5, device=cameras.azimuth.device)
    elevation = torch.deg2rad(cameras.elevation)[:, None] * torch.arange(1, 3, device=cameras.azimuth.device)
    rest = torch.stack([cameras.distance - 3, (cameras.fov - 40) / 10], -1)
    return torch.cat([azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos(), rest], -1)


def ray_features(cameras: Cameras, side: int) -> Tensor:
    """Return (B, RAY_FEATURES, side, side): each ray's direction, its point nearest to the origin, and sines and
    cosines of that point."""
    origins, directions = cameras.rays(side)
    nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
    waves = [f(math.pi * k * nearest) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([directions, nearest, *waves], -1).permute(0, 3, 1, 2)


def time_features(t: Tensor, width: int = 64) -> Tensor:
    """Return sinusoidal features (B, width) of t (B,) in [0, 1]."""
    angles = t[:, None] * 1000 * torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(1e4) / (width // 2)))
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions. The condition scales and shifts the features between them."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return (B, outputs, h, w) for features x (B, inputs, h, w) and condition (B, condition)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over pixels and cross-attention to the caption's words, in one softmax."""

    def __init__(self, width: int, text: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.words = nn.Linear(text, 2 * width)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Return (B, width, h, w) for features x (B, width, h, w), words (B, L, text) and their mask (B, L) bool."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # (B, HW, C)
        wk, wv = self.words(words).chunk(2, -1)  # (B, L, C)
        k, v = torch.cat([k, wk], 1), torch.cat([v, wv], 1)
        attend = torch.cat([mask.new_ones(b, h * w), mask], 1)[:, None, None, :]
        q, k, v = (y.view(b, -1, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
        return x + self.out(y.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).view(b, c, h, w))


class UNet(nn.Module):
    """Text-conditioned U-Net on (B, channels, size, size), optionally conditioned on the camera."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        c, e = config.widths, config.condition
        pixels = config.channels * config.fold**2
        self.time = nn.Sequential(nn.Linear(64, e), nn.SiLU(), nn.Linear(e, e))
        self.caption = nn.Linear(config.text, e, bias=False)
        self.first = nn.Conv2d(pixels, c[0], 3, padding=1)
        if config.cameras:
            self.camera = nn.Sequential(nn.Linear(CAMERA_FEATURES, e), nn.SiLU(), nn.Linear(e, e, bias=False))
            self.rays = nn.ModuleList(nn.Conv2d(RAY_FEATURES, w, 1, bias=False) for w in c[:-1])
        down, up, shrink, grow = [], [], [], []
        for level, (width, count) in enumerate(zip(c, (*config.blocks, 1), strict=True)):
            down.append(nn.ModuleList(Block(width, width, e, config.dropout) for _ in range(count)))
            up.append(nn.ModuleList(Block(2 * width, width, e, config.dropout) for _ in range(count)))
            if level < len(c) - 1:
                shrink.append(nn.Conv2d(width, c[level + 1], 2, stride=2))
                grow.append(nn.Conv2d(c[level + 1], width, 1))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.shrink, self.grow = nn.ModuleList(shrink), nn.ModuleList(grow)
        self.look_down = nn.ModuleList(Attention(w, config.text, config.heads) for w in c[-2:])
        self.look_up = nn.ModuleList(Attention(w, config.text, config.heads) for w in c[-2:])
        self.norm = nn.GroupNorm(8, c[0])
        self.last = nn.Conv2d(c[0], pixels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Predict v.

        Args:
            x: (B, C, H, W) noisy images. Sides other than the config's work if they are multiples of
                fold * 2^(levels - 1).
            t: (B,) in [0, 1].
            text: the output of `TextEncoder`.
            cameras: B cameras, or None.
            camera_mask: (B,), 1 where the camera is used, 0 where it is dropped. Required with cameras.
            extra: (B, condition), added to the condition of every block.

        Returns:
            (B, C, H, W).
        """
        condition, rays = self._condition(x, t, text[2], cameras, camera_mask, extra)
        skips: list[Tensor] = []
        h = self._descend(x, condition, text, rays, skips)
        for level in reversed(range(len(self.up))):
            blocks = self.up[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                h = block(torch.cat([h, skips.pop()], 1), condition)
            h = self._attend(self.look_up, level, h, text)
            if level:
                h = F.interpolate(self.grow[level - 1](h), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.config.fold)

    def features(self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """Return the feature maps (B, width, h, w) of the blocks on the way down, highest resolution first, for
        x (B, C, H, W) at t (B,)."""
        condition, rays = self._condition(x, t, text[2], None, None, None)
        maps: list[Tensor] = []
        self._descend(x, condition, text, rays, maps)
        return maps

    def _condition(
        self,
        x: Tensor,
        t: Tensor,
        caption: Tensor,  # (B, text)
        cameras: Cameras | None,
        camera_mask: Tensor | None,
        extra: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the condition of every block, (B, condition), and the ray features to add at each level; an empty
        list without cameras."""
        condition = self.time(time_features(t)) + self.caption(caption)
        if extra is not None:
            condition = condition + extra
        rays = []
        if cameras is not None:
            assert self.config.cameras and camera_mask is not None, "this network takes no camera"
            condition = condition + self.camera(camera_features(cameras)) * camera_mask[:, None]
            sides = [x.shape[-1] // self.config.fold // 2**level for level in range(len(self.rays))]
            mask = camera_mask[:, None, None, None]
            rays = [layer(ray_features(cameras, side) * mask) for layer, side in zip(self.rays, sides)]
        return F.silu(condition), rays

    def _descend(
        self,
        x: Tensor,
        condition: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        rays: list[Tensor],
        maps: list[Tensor],
    ) -> Tensor:
        """Run the way down. Appends the output of every block to ``maps`` and returns the last one."""
        h = self.first(F.pixel_unshuffle(x, self.config.fold))
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            if level < len(rays):
                h = h + rays[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                h = self._attend(self.look_down, level, block(h, condition), text)
                maps.append(h)
        return h

    def _attend(self, layers: nn.ModuleList, level: int, h: Tensor, text: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Apply the attention layer of the level; only the two lowest levels have one."""
        index = level - (len(self.down) - 2)
        return layers[index](h, *text[:2]) if index >= 0 else h

"""Scenes of two real handwritten digits whose difficulty varies and is known, for the demo and for tests.

The digits are scikit-learn's 1,797 embedded 8×8 images (UCI, *Optical Recognition of Handwritten Digits*). They are
split **by source image** into train and test before any scene is composed, so nothing of a test scene was seen in
training. A scene shows two digits side by side; its class is the number they form, 00…99.

One number in 0…1, the scene's *difficulty*, drives everything that makes it harder (:func:`strengths`): shift,
rotation, shear, aspect, size, contrast, clutter of digit fragments, thin lines across the scene, inversion. Most
scenes are easy (0…0.3), the others hard (0.7…1): as in real collections, where a network sized for the hard minority
is wasted on the rest. Clutter, lines and inversion show in the statistics of low-level features, so a policy can see
early that a scene is hard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 100
EASY, HARD = (0.0, 0.3), (0.7, 1.0)
HARD_SHARE = 0.25
FRAGMENTS = 6
_CHUNK = 2000  # scenes composed at once: what one chunk needs stays below about 100 MB
_GLYPH = 16  # digits are enlarged to this many pixels before they are placed


@dataclass(frozen=True)
class Sources:
    """Single digits: images (M, 8, 8) float32 in 0…1, labels (M,) int64, index (M,) int64 into scikit-learn's list."""

    images: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Scenes:
    """Composed scenes: images (N, 1, S, S) uint8, labels (N,) int64 in 0…99, difficulty (N,) float32 in 0…1."""

    images: Tensor
    labels: Tensor
    difficulty: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(images float32 in 0…1, labels) of some scenes."""
        return self.images[index].float().div_(255), self.labels[index]


class SceneLoader:
    """Batches of (images (B, 1, S, S) float32, labels (B,)); shuffled anew for each pass by torch's global generator.

    Unshuffled, the last batch may be short; shuffled, a short rest is left out (BatchNorm dislikes tiny batches).
    """

    def __init__(self, scenes: Scenes, batch_size: int, shuffle: bool = False) -> None:
        if batch_size < 1 or (shuffle and batch_size > len(scenes)):
            raise ValueError(f"SceneLoader: batch_size must be 1…{len(scenes)}, got {batch_size}")
        self.scenes, self.batch_size, self.shuffle = scenes, batch_size, shuffle

    def __len__(self) -> int:
        whole, rest = divmod(len(self.scenes), self.batch_size)
        return whole + (0 if self.shuffle or rest == 0 else 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.scenes)) if self.shuffle else None
        for number in range(len(self)):
            part = slice(number * self.batch_size, (number + 1) * self.batch_size)
            yield self.scenes.batch(part if order is None else order[part])


def digit_sources(seed: int = 0, test_share: float = 0.3) -> tuple[Sources, Sources]:
    """scikit-learn's digits, split by image into (train, test), the same share of every class.

    Raises:
        ValueError: `test_share` not inside 0…1.
    """
    from sklearn.datasets import load_digits

    if not 0 < test_share < 1:
        raise ValueError(f"digit_sources: test_share must lie inside 0…1, got {test_share}")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for digit in range(10):
        index = torch.nonzero(labels == digit)[:, 0]
        index = index[torch.randperm(len(index), generator=generator)]
        cut = round(len(index) * (1 - test_share))
        parts[0].append(index[:cut])
        parts[1].append(index[cut:])
    train, test = (torch.cat(part) for part in parts)
    return Sources(images[train], labels[train], train), Sources(images[test], labels[test], test)


def strengths(difficulty: Tensor) -> dict[str, Tensor]:
    """How strongly each component acts at a difficulty (N,) in 0…1; every one is non-decreasing in it.

    Ranges (largest amount either way): `shift` in half-scenes, `rotation` in radians, `shear`, `aspect` (logarithm),
    `shrink` and `fade` (share of size and contrast lost). Probabilities: `fragment` (of each), `lines`, `inversion`.
    """
    d = difficulty
    ramp = ((d - EASY[1]) / (HARD[0] - EASY[1])).clamp(0, 1)  # 0 for easy scenes, 1 for hard ones
    return {
        "shift": 0.25 * (0.1 + d),
        "rotation": 0.7 * d,
        "shear": 0.5 * d,
        "aspect": 0.35 * d,
        "shrink": 0.4 * d,
        "fade": 0.3 * d,
        "fragment": (1.2 * d - 0.15).clamp(0, 1),
        "lines": 0.4 * ramp,
        "inversion": 0.6 * ramp,
    }


def compose(sources: Sources, count: int, seed: int, size: int = 32, hard_share: float = HARD_SHARE) -> Scenes:
    """Compose `count` scenes of size × size pixels from `sources`; the same seed gives the same scenes.

    Raises:
        ValueError: a count or size that is not positive, a share outside 0…1.
    """
    if count < 1 or size < 16:
        raise ValueError(f"compose: count must be at least 1 and size at least 16, got {count} and {size}")
    if not 0 <= hard_share <= 1:
        raise ValueError(f"compose: hard_share must lie in 0…1, got {hard_share}")
    glyphs = F.interpolate(sources.images[:, None], size=_GLYPH, mode="bicubic", align_corners=False).clamp(0, 1)
    composer = _Composer(glyphs[:, 0], sources.labels, size, torch.Generator().manual_seed(seed))
    parts = [composer.scenes(min(_CHUNK, count - done), hard_share) for done in range(0, count, _CHUNK)]
    return Scenes(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Composer:
    """Composes chunks of scenes; all randomness comes from one generator."""

    def __init__(self, glyphs: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> None:
        self.glyphs, self.labels, self.size, self.generator = glyphs, labels, size, generator
        line = (torch.arange(size) + 0.5) * (2 / size) - 1
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(count, generator=self.generator) * (high - low) + low

    def pick(self, count: int) -> Tensor:
        return torch.randint(len(self.labels), (count,), generator=self.generator)

    def scenes(self, count: int, hard_share: float) -> tuple[Tensor, Tensor, Tensor]:
        hard = self.uniform(count) < hard_share
        difficulty = torch.where(hard, self.uniform(count, *HARD), self.uniform(count, *EASY))
        strength = strengths(difficulty)
        canvas = torch.zeros(count, self.size, self.size)
        self.add_fragments(canvas, strength)
        labels = torch.zeros(count, dtype=torch.int64)
        for centre in (-0.47, 0.47):
            labels = labels * 10 + self.add_digits(canvas, strength, centre)
        canvas = self.invert(canvas, strength)
        canvas = self.cross(canvas, strength, difficulty)
        return (canvas[:, None] * 255).round_().to(torch.uint8), labels, difficulty

    def add_digits(self, canvas: Tensor, strength: dict[str, Tensor], centre: float) -> Tensor:
        """One whole digit a scene, around x = `centre`; returns the labels."""
        count = len(canvas)
        chosen = self.pick(count)
        scale = 1 - strength["shrink"] * self.uniform(count)
        aspect = torch.exp(strength["aspect"] * self.uniform(count, -1, 1))
        placed = self.place(
            self.glyphs[chosen],
            centre + 0.7 * strength["shift"] * self.uniform(count, -1, 1),
            1.4 * strength["shift"] * self.uniform(count, -1, 1),
            0.47 * scale * aspect,
            0.62 * scale / aspect,
            strength["rotation"] * self.uniform(count, -1, 1),
            strength["shear"] * self.uniform(count, -1, 1),
        )
        ink = 1 - strength["fade"] * self.uniform(count)
        torch.maximum(canvas, placed * ink[:, None, None], out=canvas)
        return self.labels[chosen]

    def add_fragments(self, canvas: Tensor, strength: dict[str, Tensor]) -> None:
        """Small halves of digits, anywhere and any way round, at 0.6 of the ink."""
        half = torch.arange(_GLYPH) < _GLYPH // 2 - 1
        cuts = torch.stack([half[:, None].expand(-1, _GLYPH), half[None, :].expand(_GLYPH, -1)]).float()
        cuts = torch.cat([cuts, cuts.flip(1, 2)])
        for _ in range(FRAGMENTS):
            where = torch.nonzero(self.uniform(len(canvas)) < strength["fragment"])[:, 0]
            count = len(where)
            if count == 0:
                continue
            cut = cuts[torch.randint(len(cuts), (count,), generator=self.generator)]
            extent = self.uniform(count, 0.2, 0.4)
            placed = self.place(
                self.glyphs[self.pick(count)] * cut,
                self.uniform(count, -1, 1),
                self.uniform(count, -1, 1),
                extent,
                extent,
                self.uniform(count, -math.pi, math.pi),
                torch.zeros(count),
            )
            canvas[where] = torch.maximum(canvas[where], 0.6 * placed)

    def place(
        self, glyphs: Tensor, x: Tensor, y: Tensor, width: Tensor, height: Tensor, turn: Tensor, shear: Tensor
    ) -> Tensor:
        """Draw glyphs (M, G, G) with centre (x, y) and half-extents in −1…1 coordinates → (M, S, S), bilinear."""
        cos, sin = torch.cos(turn), torch.sin(turn)
        # From scene to glyph: undo shift, rotation, shear, scale.
        xx, xy = (cos + shear * sin) / width, (sin - shear * cos) / width
        yx, yy = -sin / height, cos / height
        to_glyph = torch.stack(
            [torch.stack([xx, xy, -(xx * x + xy * y)], 1), torch.stack([yx, yy, -(yx * x + yy * y)], 1)], 1
        )
        grid = F.affine_grid(to_glyph, [len(glyphs), 1, self.size, self.size], align_corners=False)
        return F.grid_sample(glyphs[:, None], grid, align_corners=False)[:, 0]

    def direction(self, count: int) -> Tensor:
        """Position of every pixel along a random direction of each scene, (M, S, S)."""
        angle = self.uniform(count, 0, math.pi)[:, None, None]
        return self.x * torch.cos(angle) + self.y * torch.sin(angle)

    def invert(self, canvas: Tensor, strength: dict[str, Tensor]) -> Tensor:
        """Turn some of the scenes into their negatives: dark ink on a light ground."""
        mask = (self.uniform(len(canvas)) < strength["inversion"]).float()[:, None, None]
        return (canvas - mask).abs()

    def cross(self, canvas: Tensor, strength: dict[str, Tensor], difficulty: Tensor) -> Tensor:
        """Thin parallel lines across the scene, black or white."""
        count = len(canvas)
        frequency = self.uniform(count, 8, 14)[:, None, None]
        phase = self.uniform(count, 0, 2 * math.pi)[:, None, None]
        line = (torch.cos(frequency * self.direction(count) + phase) * 4 - 3).clamp(0, 1)
        opacity = 0.8 * difficulty * (self.uniform(count) < strength["lines"])
        line = line * opacity[:, None, None]
        colour = (self.uniform(count) < 0.5).float()[:, None, None]
        return canvas * (1 - line) + colour * line

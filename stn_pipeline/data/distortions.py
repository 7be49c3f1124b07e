"""Distortions of a data set, as the STN paper made them of MNIST: drawn in batches, on the images' own device.

Lengths are the paper's, told for its 28 px and scaled to the images' own size. What lies outside the image is black.

Legend: N images, (H, W) their size, (h, w) the canvas's.  Source: Jaderberg et al. 2015, sec. 4.1 and appendix (arXiv:1506.02025).
"""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from stn_pipeline.transforms import TRANSFORMS, lattice
from stn_pipeline.transforms.sampler import sample

Size = tuple[int, int]
PAPERS_SIDE = 28
CHUNK = 256  # images at a time
CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
REDRAWS = 8
N_PATCHES, PATCH = 6, 6


class Warped(NamedTuple):
    """A distortion by a warp: how large the canvas is beside the image, and theta of a family (N, P), canvas to image."""

    canvas: float
    family: str
    draw: Callable[[int, Size, Size, Generator], Tensor]


def canvas_size(size: Size, canvas: float) -> Size:
    """Return (h, w)."""
    return round(canvas * size[0]), round(canvas * size[1])


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _pixels(size: Size, length: float) -> Tensor:
    """Return a length, told for the paper's images, as (x, y) in half images."""
    return torch.full((2,), 2 * length / PAPERS_SIDE) * min(size) / torch.tensor((size[1], size[0]))


def similar(angle: Tensor, scale: Tensor, shift: Tensor, size: Size, canvas: Size) -> Tensor:
    """Return theta (N, 6) of affine warps that show an image on a canvas: turned, then scaled, then shifted, about the middle.

    angle: (N,) degrees, clockwise on the screen.   scale: (N,), 2 shows it twice as large.   shift: (N, 2) px, x and y.
    """
    turn = torch.deg2rad(angle)
    cos, sin = turn.cos() / scale, turn.sin() / scale
    back = torch.stack((cos, sin, -sin, cos), dim=1).view(-1, 2, 2)  # from pixels of the canvas to those of the image
    to_pixels, from_pixels = torch.tensor((canvas[1], canvas[0])) / 2, 2 / torch.tensor((size[1], size[0]))
    linear, offset = back * to_pixels, -back @ shift[..., None].to(back.dtype)
    return (torch.cat((linear, offset), dim=2) * from_pixels[:, None]).flatten(1)


def _rotated(n: int, size: Size, canvas: Size, generator: Generator) -> Tensor:
    return similar(_uniform(n, -90, 90, generator), torch.ones(n), torch.zeros(n, 2), size, canvas)


def _rts(n: int, size: Size, canvas: Size, generator: Generator) -> Tensor:
    angle, scale = _uniform(n, -45, 45, generator), _uniform(n, 0.7, 1.2, generator)
    room = torch.tensor((canvas[1], canvas[0])) - scale[:, None] * torch.tensor((size[1], size[0]))  # (N, 2) px
    return similar(angle, scale, room * (torch.rand(n, 2, generator=generator) - 0.5), size, canvas)


def _projective(n: int, size: Size, canvas: Size, generator: Generator) -> Tensor:
    """Return homographies that take the corners back from where they were moved: the first of REDRAWS that stay convex."""
    corners = torch.tensor(CORNERS)
    scale = _uniform(n, 0.75, 1, generator)
    noise = torch.randn(n, REDRAWS, 4, 2, generator=generator) * _pixels(size, 5)
    moved = scale[:, None, None, None] * corners + noise  # (N, REDRAWS, 4, 2)
    along = moved.roll(-1, dims=2) - moved
    after = along.roll(-1, dims=2)
    convex = (along[..., 0] * after[..., 1] - along[..., 1] * after[..., 0] > 0).all(dim=2)
    chosen = moved[torch.arange(n), convex.int().argmax(dim=1)].double()
    return homography(chosen, corners.double().expand(n, -1, -1)).float()


def homography(given: Tensor, wanted: Tensor) -> Tensor:
    """Return theta (N, 8) of the projective warps that take four points (N, 4, 2) to four others.

    Source: the direct linear transform (Hartley & Zisserman 2004, sec. 4.1).
    """
    x, y = F.pad(given, (0, 1), value=1.0), torch.zeros(len(given), 4, 3, dtype=given.dtype)
    rows = [torch.cat((x, y, -given * wanted[..., :1]), dim=2), torch.cat((y, x, -given * wanted[..., 1:]), dim=2)]
    solution: Tensor = torch.linalg.solve(torch.cat(rows, dim=1), torch.cat((wanted[..., 0], wanted[..., 1]), dim=1))
    return solution


def _elastic(n: int, size: Size, canvas: Size, generator: Generator) -> Tensor:
    rest = torch.tensor(TRANSFORMS["tps"].identity).view(-1, 2)
    noise = torch.randn(n, len(rest), 2, generator=generator) * _pixels(size, 1.5)
    return (rest / _uniform(n, 0.75, 1, generator)[:, None, None] + noise).flatten(1)


WARPED = {
    "rotated": Warped(1, "affine", _rotated),
    "rts": Warped(1.5, "affine", _rts),
    "projective": Warped(1, "projective", _projective),
    "elastic": Warped(1, "tps", _elastic),
}


def distort(images: Tensor, kind: str, seed: str) -> Tensor:
    """Return images uint8 (N, C, H, W) distorted: uint8 (N, C, h, w), the same for the same kind, images and seed.

    rotated: by U(-90°, 90°).   rts: by U(-45°, 45°), scaled by U(0.7, 1.2), anywhere on a canvas 1.5 times as large.
    projective: scaled by U(0.75, 1), then each corner moved by N(0, 5 px) both ways.   elastic: scaled by U(0.75, 1), then
    warped by a thin-plate spline whose 16 control points are moved by N(0, 1.5 px).   cluttered: see `cluttered`.
    """
    generator = Generator().manual_seed(zlib.crc32(f"{kind} {seed}".encode()))
    if kind == "cluttered":
        return cluttered(images, generator)
    size = (images.shape[2], images.shape[3])
    canvas = canvas_size(size, WARPED[kind].canvas)
    return show(images, WARPED[kind].family, WARPED[kind].draw(len(images), size, canvas, generator), canvas)


def show(images: Tensor, family: str, theta: Tensor, canvas: Size) -> Tensor:
    """Return images uint8 (N, C, H, W) as warps of a family, theta (N, P), show them on a canvas: uint8 (N, C, h, w)."""
    shown = torch.empty(len(images), images.shape[1], *canvas, dtype=torch.uint8, device=images.device)
    points, theta = lattice(*canvas, device=images.device), theta.to(images.device)
    for first in range(0, len(images), CHUNK):
        chunk = slice(first, first + CHUNK)
        source = TRANSFORMS[family](theta[chunk], points).view(-1, *canvas, 2)
        shown[chunk] = sample(images[chunk].float(), source).round_()
    return shown


def cluttered(images: Tensor, generator: Generator) -> Tensor:
    """Return each image somewhere on a canvas of 60 px (for 28) among six patches of 6 px cut from others: uint8 (N, C, h, w).

    Where two meet, the brighter is seen.
    """
    n, channels, height, width = images.shape
    canvas = canvas_size((height, width), 60 / PAPERS_SIDE)
    side = max(1, round(PATCH * min(height, width) / PAPERS_SIDE))
    shown = torch.zeros(n, channels, *canvas, dtype=torch.uint8, device=images.device)

    def corners(size: Size, tile: Size) -> list[Tensor]:
        return [torch.randint(whole - part + 1, (n,), generator=generator) for whole, part in zip(size, tile, strict=True)]

    def pixels(corner: list[Tensor], tile: Size, row_length: int) -> Tensor:
        rows, columns = (first[:, None] + torch.arange(length) for first, length in zip(corner, tile, strict=True))
        return (rows[:, :, None] * row_length + columns[:, None]).view(n, 1, -1).to(images.device).expand(-1, channels, -1)

    def lay(tiles: Tensor, tile: Size) -> None:
        shown.flatten(2).scatter_reduce_(2, pixels(corners(canvas, tile), tile, canvas[1]), tiles, "amax")

    lay(images.flatten(2), (height, width))
    for _ in range(N_PATCHES):
        others = images[torch.randint(n, (n,), generator=generator).to(images.device)].flatten(2)
        cut = others.gather(2, pixels(corners((height, width), (side, side)), (side, side), width))
        lay(cut, (side, side))
    return shown


def canvas_share(kind: str) -> float:
    """Return how many times as many pixels a distorted image has."""
    return (60 / PAPERS_SIDE if kind == "cluttered" else WARPED[kind].canvas) ** 2

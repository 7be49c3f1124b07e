"""Distortions agree with scipy's and with what is worked out by hand, and a distorted split is new each epoch and the same each time."""

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import load
from stn_pipeline.data.distortions import CORNERS, WARPED, cluttered, distort, homography, show, similar
from stn_pipeline.data.splits import Distorted, Split
from stn_pipeline.transforms import TRANSFORMS

KINDS = (*WARPED, "cluttered")
CANVAS = {"rts": 1.5, "cluttered": 60 / 28}
every_kind = pytest.mark.parametrize("kind", KINDS)
law = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def blobs(n: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth images, dark at the edge."""
    noise = torch.randn(n, channels, height, width, generator=Generator().manual_seed(seed)).numpy()
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 0, 2, 2))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    smooth = np.abs(smooth) / np.abs(smooth).max() * np.clip(1.2 - x**2 - y**2, 0, 1)
    return torch.from_numpy((255 * smooth).round().astype(np.uint8))


def shown(images: Tensor, angle: float, scale: float, shift: tuple[float, float], canvas: tuple[int, int]) -> Tensor:
    n, size = len(images), (images.shape[2], images.shape[3])
    theta = similar(torch.full((n,), angle), torch.full((n,), scale), torch.tensor(shift).expand(n, 2), size, canvas)
    return show(images, "affine", theta, canvas)


# Turned, scaled and shifted


def test_a_quarter_turn_is_clockwise_on_the_screen() -> None:
    images = blobs(3, 2, 12, 12)
    assert torch.equal(shown(images, 90, 1, (0, 0), (12, 12)), images.rot90(-1, dims=(2, 3)))


def test_a_shift_is_in_pixels_right_and_down() -> None:
    images = blobs(2, 1, 9, 14)
    moved = shown(images, 0, 1, (3, -2), (9, 14))
    assert torch.equal(moved[:, :, :-2, 3:], images[:, :, 2:, :-3])
    assert (moved[:, :, :, :3] == 0).all() and (moved[:, :, -2:] == 0).all()


def test_on_a_larger_canvas_the_image_stands_in_the_middle() -> None:
    images = blobs(2, 1, 8, 10)
    on = shown(images, 0, 1, (0, 0), (12, 16))
    assert torch.equal(on[:, :, 2:10, 3:13], images) and on.sum() == images.sum()


@law
@given(st.floats(-180, 180), st.floats(0.5, 2), st.floats(-5, 5), st.floats(-5, 5))
def test_any_similarity_agrees_with_scipys(angle: float, scale: float, right: float, down: float) -> None:
    image, canvas = blobs(1, 1, 16, 22)[0, 0].numpy().astype(float), (20, 24)
    turn = np.deg2rad(angle)
    forth = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])  # (row, column) offsets
    back = np.linalg.inv(forth)
    middle, on = (np.array(image.shape) - 1) / 2, (np.array(canvas) - 1) / 2
    padded = np.pad(image, 1)  # scipy's constant mode does not interpolate towards the outside
    true = scipy.ndimage.affine_transform(padded, back, middle + 1 - back @ (on + (down, right)), canvas, order=1)
    found = shown(torch.from_numpy(image).byte()[None, None], angle, scale, (right, down), canvas)[0, 0]
    assert np.abs(found.numpy() - true).max() <= 0.51


@law
@given(st.integers(0, 10_000))
def test_a_homography_takes_the_four_points_where_they_are_wanted(seed: int) -> None:
    corners = torch.tensor(CORNERS, dtype=torch.float64)
    given_ = 0.8 * corners + 0.15 * torch.randn(1, 4, 2, generator=Generator().manual_seed(seed), dtype=torch.float64).clamp(-1, 1)
    theta = homography(given_, corners[None])
    torch.testing.assert_close(TRANSFORMS["projective"](theta, given_[0])[0], corners, atol=1e-9, rtol=0)


# The paper's five


@every_kind
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 36), (1, 8, 8)], ids=str)
def test_shapes_and_seeds(kind: str, shape: tuple[int, int, int]) -> None:
    images = blobs(300, *shape)
    found = distort(images, kind, "a")
    share = CANVAS.get(kind, 1)
    assert found.dtype == torch.uint8 and found.shape == (300, shape[0], round(share * shape[1]), round(share * shape[2]))
    assert torch.equal(found, distort(images, kind, "a"))
    assert not torch.equal(found, distort(images, kind, "b"))
    assert found.float().mean() > 0.3 * images.float().mean() / share**2  # the images are still there


@every_kind
def test_a_colour_image_is_distorted_as_a_whole(kind: str) -> None:
    grey = blobs(20, 1, 28, 28)
    found = distort(grey.expand(-1, 3, -1, -1).contiguous(), kind, "a")
    assert torch.equal(found, found[:, :1].expand(-1, 3, -1, -1))


def test_rotations_are_uniform_to_90_degrees_either_way() -> None:
    theta = WARPED["rotated"].draw(4000, (28, 28), (28, 28), Generator().manual_seed(0)).view(-1, 2, 3)
    angle = torch.rad2deg(torch.atan2(theta[:, 0, 1], theta[:, 0, 0]))
    assert scipy.stats.kstest(angle.numpy(), "uniform", (-90, 180)).pvalue > 0.01
    assert torch.allclose(torch.linalg.det(theta[:, :, :2]), torch.ones(4000), atol=1e-5) and (theta[:, :, 2].abs() < 1e-6).all()


def test_rts_puts_an_image_anywhere_within_its_canvas() -> None:
    size, canvas = (28, 28), (42, 42)
    theta = WARPED["rts"].draw(4000, size, canvas, Generator().manual_seed(0)).view(-1, 2, 3).double()
    linear = theta[:, :, :2]
    scale = 1.5 / torch.linalg.det(linear).sqrt()
    assert 0.7 <= scale.min() < 0.71 and 1.19 < scale.max() <= 1.2001
    middle = -torch.linalg.solve(linear, theta[:, :, 2])  # where the image's middle is on the canvas
    room = 1 - scale[:, None] / 1.5
    assert ((middle.abs() - room) < 1e-5).all()
    assert scipy.stats.kstest((middle / room).flatten().numpy(), "uniform", (-1, 2)).pvalue > 0.01


def test_projective_quads_are_convex_and_scattered_as_the_paper_says() -> None:
    theta = WARPED["projective"].draw(3000, (28, 28), (28, 28), Generator().manual_seed(0)).double()
    corners = torch.tensor(CORNERS, dtype=torch.float64)
    # theta leads from the canvas to the image: its inverse matrix tells where the image's corners are
    back = torch.linalg.inv(torch.cat((theta, torch.ones(3000, 1, dtype=torch.float64)), dim=1).view(-1, 3, 3))
    homogeneous = torch.cat((corners, torch.ones(4, 1, dtype=torch.float64)), dim=1) @ back.transpose(1, 2)
    at = homogeneous[..., :2] / homogeneous[..., 2:]
    edge = at.roll(-1, 1) - at
    after = edge.roll(-1, 1)
    assert (edge[..., 0] * after[..., 1] - edge[..., 1] * after[..., 0] > 0).all()
    assert abs((14 * (at - 0.875 * corners)).std() - 5) < 0.4


def test_elastic_control_points_are_scaled_and_scattered_as_the_paper_says() -> None:
    theta = WARPED["elastic"].draw(2000, (28, 28), (28, 28), Generator().manual_seed(0)).double()
    rest = torch.tensor(TRANSFORMS["tps"].identity, dtype=torch.float64)
    zoom = theta @ rest / rest.square().sum()  # by least squares
    assert abs(14 * (theta - zoom[:, None] * rest).std() - 1.5) < 0.05
    assert scipy.stats.kstest(1 / zoom.numpy(), "uniform", (0.75, 0.25)).statistic < 0.08


def test_clutter_is_the_image_and_six_patches() -> None:
    images = torch.full((50, 1, 28, 28), 200, dtype=torch.uint8)
    found = cluttered(images, Generator().manual_seed(0))
    lit = (found == 200).sum(dim=(1, 2, 3))
    assert (found.unique() == torch.tensor([0, 200])).all()
    assert (lit >= 28 * 28).all() and (lit <= 28 * 28 + 6 * 36).all() and lit.float().mean() > 28 * 28 + 3 * 36
    for image in found[:, 0]:  # somewhere 28 by 28 pixels are the image
        windows = image.unfold(0, 28, 1).unfold(1, 28, 1)
        assert (windows == 200).all(dim=(2, 3)).any()


# Splits


def config(**knobs: object) -> TrainConfig:
    return TrainConfig.parse({"dataset": "digits", **knobs})


@every_kind
def test_train_is_new_each_epoch_and_the_same_each_time(kind: str) -> None:
    train = load(config(distortion=kind)).train
    assert isinstance(train, Distorted)
    first, second = train.draw(1), train.draw(2)
    assert not torch.equal(first.images, second.images) and not torch.equal(first.images, train.images)
    assert torch.equal(first.images, load(config(distortion=kind)).train.draw(1).images)
    assert not torch.equal(first.images, load(config(distortion=kind, seed=1)).train.draw(1).images)
    assert first.images.shape == train.images.shape and torch.equal(first.labels, train.labels)


def test_test_is_the_same_for_every_seed_and_holds_each_image_as_often_as_asked() -> None:
    plain, once, thrice = (
        load(config(seed=seed, **knobs))
        for seed, knobs in ((0, {}), (1, {"distortion": "rotated"}), (2, {"distortion": "rotated", "draws": 3}))
    )
    n = len(plain.test)
    assert len(once.test) == n and len(thrice.test) == 3 * n and torch.equal(thrice.test.labels, plain.test.labels.repeat(3))
    assert not torch.equal(thrice.test.images[:n], thrice.test.images[n : 2 * n])
    again = load(config(seed=5, distortion="rotated"))
    assert torch.equal(again.test.images, once.test.images)
    assert len(thrice.val) == 3 * len(load(config(seed=2)).val)


def test_val_and_test_are_drawn_apart_and_train_by_its_seed() -> None:
    plain, turned = load(config()), load(config(distortion="rotated"))
    for name in ("val", "test"):
        assert torch.equal(getattr(turned, name).images, distort(getattr(plain, name).images, "rotated", name))
    one, two = (Distorted.of(plain.train, "rotated", seed) for seed in (0, 1))
    assert not torch.equal(one.draw(1).images, two.draw(1).images)


def test_checksums_and_pixel_statistics_are_those_of_the_distorted_images() -> None:
    plain, distorted = load(config()), load(config(distortion="elastic"))
    assert plain.digests() != distorted.digests() == load(config(distortion="elastic")).digests()
    pixels = distorted.train.images.double() / 255
    torch.testing.assert_close(distorted.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)


def test_a_plain_split_is_drawn_as_it_is() -> None:
    split = Split(blobs(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    assert split.draw(3) is split


# Images that are not square: what is told in pixels or degrees holds on them

OBLONG = [(16, 48), (60, 20)]
oblong = pytest.mark.parametrize("size", OBLONG, ids=str)


def in_pixels(theta: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return affine thetas (N, 6) as maps from pixels of the canvas to pixels of the image, from the middles: (N, 2, 2), (N, 2)."""
    half_image, half_canvas = (torch.tensor((w, h), dtype=torch.float64) / 2 for h, w in (size, canvas))
    rows = theta.double().view(-1, 2, 3) * half_image[:, None]
    return rows[:, :, :2] / half_canvas, rows[:, :, 2]


@oblong
@pytest.mark.parametrize("kind", ["rotated", "rts"])
def test_turns_and_scales_keep_right_angles_on_oblong_images(kind: str, size: tuple[int, int]) -> None:
    canvas = (round(CANVAS.get(kind, 1) * size[0]), round(CANVAS.get(kind, 1) * size[1]))
    linear, offset = in_pixels(WARPED[kind].draw(2000, size, canvas, Generator().manual_seed(0)), size, canvas)
    scale = 1 / torch.linalg.det(linear).sqrt()
    product = scale[:, None, None] ** 2 * linear @ linear.transpose(1, 2)
    torch.testing.assert_close(product, torch.eye(2, dtype=torch.float64).expand(2000, 2, 2), atol=1e-5, rtol=0)
    angle, most = torch.rad2deg(torch.atan2(linear[:, 0, 1], linear[:, 0, 0])), 90 if kind == "rotated" else 45
    assert scipy.stats.kstest(angle.numpy(), "uniform", (-most, 2 * most)).pvalue > 0.01
    if kind == "rotated":
        assert (offset.abs() < 1e-4).all() and (scale - 1).abs().max() < 1e-5
        return
    middle = -torch.linalg.solve(linear, offset)  # px on the canvas
    room = (torch.tensor((canvas[1], canvas[0])) - scale[:, None] * torch.tensor((size[1], size[0]))) / 2
    for share in (middle / room).T:
        assert scipy.stats.kstest(share.numpy(), "uniform", (-1, 2)).pvalue > 0.01


@oblong
def test_corners_and_control_points_are_scattered_alike_both_ways_in_pixels_on_oblong_images(size: tuple[int, int]) -> None:
    half, unit = torch.tensor((size[1], size[0]), dtype=torch.float64) / 2, min(size) / 28
    theta = WARPED["projective"].draw(3000, size, size, Generator().manual_seed(0)).double()
    corners = torch.tensor(CORNERS, dtype=torch.float64)
    back = torch.linalg.inv(torch.cat((theta, torch.ones(3000, 1, dtype=torch.float64)), dim=1).view(-1, 3, 3))
    homogeneous = torch.cat((corners, torch.ones(4, 1, dtype=torch.float64)), dim=1) @ back.transpose(1, 2)
    at = homogeneous[..., :2] / homogeneous[..., 2:]
    scatter = (half * at.sum(dim=1) / 2).std(dim=0) / unit  # of four independent moves; the scale cancels
    assert (scatter - 5).abs().max() < 0.4

    theta = WARPED["elastic"].draw(3000, size, size, Generator().manual_seed(0)).double()
    scatter = (half * theta.view(-1, 16, 2).sum(dim=1) / 4).std(dim=0) / unit  # of sixteen
    assert (scatter - 1.5).abs().max() < 0.1


@oblong
def test_clutter_on_oblong_images_is_the_image_and_square_patches(size: tuple[int, int]) -> None:
    height, width = size
    images, side = torch.full((50, 1, height, width), 200, dtype=torch.uint8), round(6 * min(size) / 28)
    found = cluttered(images, Generator().manual_seed(0))
    assert found.shape[2:] == (round(height * 60 / 28), round(width * 60 / 28))
    for image in found[:, 0]:
        windows = (image == 200).unfold(0, height, 1).unfold(1, width, 1).all(dim=(2, 3))
        assert windows.any()  # somewhere it stands whole
        row, column = windows.nonzero()[0].tolist()
        rest = image.clone()
        rest[row : row + height, column : column + width] = 0
        assert (rest == 200).sum() <= 6 * side**2


@oblong
def test_any_distortion_of_an_oblong_image_turned_on_its_side_is_a_turn_in_pixels(size: tuple[int, int]) -> None:
    """90 degrees on an oblong canvas shows the middle square turned, to the last bit."""
    images, side = blobs(2, 1, *size), min(size)
    rows, columns = (slice((whole - side) // 2, (whole + side) // 2) for whole in size)
    turned = shown(images, 90, 1, (0, 0), size)
    assert torch.equal(turned[:, :, rows, columns], images[:, :, rows, columns].rot90(-1, dims=(2, 3)))

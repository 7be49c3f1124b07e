"""Pictures of what warps do: `python -m stn_pipeline.gallery` for the families, `--runs ID,ID` for networks that were trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stn_pipeline import cli
from stn_pipeline.config import DATASET_HELP, DatasetName, Knobs, TrainConfig, knob
from stn_pipeline.errors import ConfigError
from stn_pipeline.paths import for_output
from stn_pipeline.texts import say

if TYPE_CHECKING:
    from torch import Tensor

    from stn_pipeline.transforms import Transform

STRENGTHS = (0.1, 0.2, 0.3)  # mean way of a point, in half images


class GalleryConfig(Knobs):
    """One picture."""

    dataset: DatasetName = knob("auto", help=DATASET_HELP)
    data_dir: str = knob("data", help="folder of the torchvision sets")
    runs: str = knob("", help="ids of training runs, with commas between, to show on the same test images; none: the families of warps")
    images: int = knob(8, help="test images, with runs", ge=1, le=20)
    image: int = knob(4, help="number of the test image that the families warp", ge=0, le=1_000_000_000)
    seed: int = knob(3, help="of the directions in which the families warp", ge=0, lt=1_000_000_000)
    out: str = knob("gallery.png", help="file for the picture")


def towards(family: "Transform", direction: "Tensor", way: float, points: "Tensor") -> "Tensor":
    """Return theta (1, P) from the identity in a direction (P,), as far as moves the points (N, 2) by `way` in the mean."""
    import torch

    identity = torch.tensor(family.identity)
    low, high = 0.0, 8.0
    for _ in range(30):  # the way grows with the length, or as good as
        middle = (low + high) / 2
        moved = (family((identity + middle * direction)[None], points)[0] - points).norm(dim=1).mean()
        low, high = (middle, high) if moved < way else (low, middle)
    return (identity + low * direction)[None]


def gallery(argv: Sequence[str]) -> None:
    """Draw as the flags say."""
    knobs = GalleryConfig.parse(cli.parse(GalleryConfig, argv, "Draw what families of warps, or trained networks, do to images."))
    out = for_output("out", knobs.out)
    figure = _of_runs(knobs) if knobs.runs else _of_families(knobs)
    out.write_bytes(figure)
    say(knobs.out)


def _of_families(knobs: GalleryConfig) -> bytes:
    import torch

    from stn_pipeline import figures
    from stn_pipeline.data import load
    from stn_pipeline.transforms import TRANSFORMS, lattice
    from stn_pipeline.transforms.sampler import sample

    test = load(TrainConfig.parse(knobs.model_dump(include={"dataset", "data_dir"}))).test
    if knobs.image >= len(test):
        raise ConfigError(f"image={knobs.image}: the test split has {len(test)} images: give a smaller number")
    image = test.images[knobs.image][None].float() / 255
    size = (image.shape[2], image.shape[3])
    points = lattice(*size)
    images = image.expand(len(TRANSFORMS), -1, -1, -1)
    arms = {}
    for way in STRENGTHS:
        grids = []
        for family in (family.for_image(size) for family in TRANSFORMS.values()):
            direction = torch.randn(family.n_params, generator=torch.Generator().manual_seed(knobs.seed))
            grids.append(family(towards(family, direction, way, points), points).view(1, *size, 2))
        grid = torch.cat(grids)
        arms[f"way {way:g}"] = (sample(images, grid).numpy(), grid.numpy())
    title = "Families of warps, one direction each, by the mean way of a point in half images"
    return figures.to_png(figures.warps_by_arm(images.numpy(), arms, title, list(TRANSFORMS)))


def _of_runs(knobs: GalleryConfig) -> bytes:
    import torch

    from stn_pipeline import figures, tracking
    from stn_pipeline.data import load

    arms, first = {}, None
    for run_id in knobs.runs.split(","):
        tracking.knock()
        checkpoint = tracking.load_checkpoint(run_id.strip())
        if first is None:
            first = checkpoint
            test = load(checkpoint.config.model_copy(update=knobs.model_dump(include={"data_dir"}))).test
            images = test.images[test.spread(knobs.images)].float() / 255
        if checkpoint.image_shape != first.image_shape:
            raise ConfigError(
                f"runs: {run_id} was built for images {checkpoint.image_shape}, the first for {first.image_shape}: give runs of one shape"
            )
        with torch.inference_mode():
            warped, grid = checkpoint.build_best().warp(images)
        name = checkpoint.config.arm if checkpoint.config.arm not in arms else f"{checkpoint.config.arm} {run_id[:4]}"
        arms[name] = (warped.numpy(), None if grid is None else grid.numpy())
    return figures.to_png(figures.warps_by_arm(images.numpy(), arms, "What each trained network makes of the same test images"))


def main() -> None:
    """Run the entry point."""
    cli.run(gallery)


if __name__ == "__main__":
    main()

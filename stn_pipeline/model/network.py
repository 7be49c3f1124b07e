"""The network: an optional spatial transformer before a small convolutional classifier.

Legend: B batch, C channels, (H, W) image size, K classes.
"""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ShapeError
from stn_pipeline.model.layers import Options, Stages
from stn_pipeline.model.spatial_transformer import Localisation, SpatialTransformer
from stn_pipeline.transforms import cpab


class Classifier(nn.Module):
    """The classifier: (B, C, H, W) -> logits (B, K)."""

    def __init__(self, in_channels: int, image_size: tuple[int, int], n_classes: int, options: Options):
        super().__init__()
        sizes, drops = options.arch.classifier, options.arch.dropout
        self.stages = Stages(sizes, in_channels, image_size, options, pool=nn.AvgPool2d, dropout=drops)
        self.hidden = nn.Linear(self.stages.n_features, sizes.hidden) if sizes.hidden else None
        self.dropout = nn.Dropout() if drops else nn.Identity()
        self.logits = nn.Linear(sizes.hidden or self.stages.n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        features = self.stages(x)
        if self.hidden is not None:
            features = F.relu(self.hidden(features))
        logits: Tensor = self.logits(self.dropout(features))
        return logits


class Network(nn.Module):
    """Images in [0, 1] in, logits out.

    The image is warped as it is and normalised after that: so zero padding is black, as the background of the digits.
    `mean` and `std`, (C,), belong to the model and travel with it.
    """

    def __init__(self, config: TrainConfig, image_shape: tuple[int, int, int], n_classes: int):
        super().__init__()
        channels, *size = image_shape
        image_size = (size[0], size[1])
        self.image_shape = image_shape
        self.transformer = (
            None
            if config.transform == "none"
            else SpatialTransformer(
                channels,
                image_size,
                cpab(config.cpab_cells, config.cpab_boundary) if config.transform == "cpab" else config.transform,
                padding=config.padding,
                coordconv=config.coordconv,
                coordconv_r=config.coordconv_r,
                iterations=config.iterations,
                supersample=config.supersample,
                arch=config.arch,
            )
        )
        options = Options.for_image(config.arch, image_size, config.coordconv, config.coordconv_r)
        self.classifier = Classifier(channels, image_size, n_classes, options)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        _initialise(self, config.seed)

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std, channel by channel."""
        mean, std = self.get_buffer("mean").view(-1, 1, 1), self.get_buffer("std").view(-1, 1, 1)
        return (images - mean) / std

    def warp(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the classifier sees, before normalising, and the sampling grid (B, h, w, 2), None without a transformer."""
        if images.shape[1:] != self.image_shape:
            raise ShapeError(f"Network: images have shape {tuple(images.shape)}, expected (B, {', '.join(map(str, self.image_shape))})")
        if self.transformer is None:
            return images, None
        return self.transformer.warp(images, see=self.normalise)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, C, H, W) in [0, 1]."""
        warped, _ = self.warp(images)
        logits: Tensor = self.classifier(self.normalise(warped))
        return logits


def _initialise(network: Network, seed: int) -> None:
    """Draw the weights of each layer, of whatever kind, from (seed, name of the layer), and start the localiser at the identity.

    So two arms of a comparison start from the same weights wherever their shapes agree, whatever else they are made of.
    (Parameters of a module that cannot draw them again stay as they were drawn when it was made.) Seeds torch's CPU generator.
    """
    for name, module in network.named_modules():
        draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if draw is not None:
            torch.default_generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            draw()
    for module in network.modules():
        if isinstance(module, Localisation):
            module.reset_to_identity()


def build(
    config: TrainConfig, image_shape: tuple[int, int, int], n_classes: int, mean: Tensor | None = None, std: Tensor | None = None
) -> Network:
    """Return the network that the knobs describe, on the CPU, at its seed's initial weights.

    `mean` and `std`, (C,) in 0..1, are the training pixels'.
    Raises: ConfigError if the image is under 4 pixels a side.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = Network(config, image_shape, n_classes)
    if mean is not None:
        if std is None:
            raise ValueError("build: got mean without std; give both or neither")
        network.get_buffer("mean").copy_(mean)
        network.get_buffer("std").copy_(std)
    return network

"""The network: localisation -> transform -> sampler -> classifier, and CoordConv."""

from stn_pipeline.model.network import Network, build
from stn_pipeline.model.spatial_transformer import SpatialTransformer

__all__ = ["Network", "SpatialTransformer", "build"]

"""Families of warps, one a file: theta (B, P) and target points in, source points out."""

from stn_pipeline.transforms.affine import AFFINE
from stn_pipeline.transforms.diffeo import DIFFEO
from stn_pipeline.transforms.family import Transform
from stn_pipeline.transforms.lattice import WarpShape, lattice, warp_shape

TRANSFORMS: dict[str, Transform] = {transform.name: transform for transform in (AFFINE, DIFFEO)}

__all__ = ["TRANSFORMS", "Transform", "WarpShape", "lattice", "warp_shape"]

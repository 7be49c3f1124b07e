"""Families of warps, one a file: theta (B, P) and target points in, source points out."""

from stn_pipeline.transforms.affine import AFFINE
from stn_pipeline.transforms.cpab import CPAB, cpab
from stn_pipeline.transforms.diffeo import DIFFEO
from stn_pipeline.transforms.family import Transform, Warp
from stn_pipeline.transforms.lattice import WarpShape, lattice, warp_shape
from stn_pipeline.transforms.projective import PROJECTIVE
from stn_pipeline.transforms.similarity import SIMILARITY
from stn_pipeline.transforms.tps import TPS

TRANSFORMS: dict[str, Transform] = {transform.name: transform for transform in (AFFINE, DIFFEO, SIMILARITY, PROJECTIVE, TPS, CPAB)}

__all__ = ["TRANSFORMS", "Transform", "Warp", "WarpShape", "cpab", "lattice", "warp_shape"]

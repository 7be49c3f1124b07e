"""Train, tune and compare spatial transformer networks, with error bars."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stn_pipeline.model import SpatialTransformer

__version__ = "0.1.0"
__all__ = ["SpatialTransformer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch only when the layer is asked for, so that --help is quick."""
    if name == "SpatialTransformer":
        from stn_pipeline.model import SpatialTransformer

        return SpatialTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

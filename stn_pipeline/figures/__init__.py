"""The figures of a run, drawn from plain numpy arrays: matplotlib in, `Figure` out, nothing logged or shown here.

Figures use the object API, so no pyplot state, no backend and no open window is involved, and the style lives in an
rc_context around each function: a caller's rcParams stay as they were.

Legend: n images, C channels, H W input size, h w output size, K classes, E epochs, M calibration bins.
Colours: Okabe and Ito's palette, safe for colour-blind readers. Blue is validation or right, orange is training,
vermilion is wrong, in every figure.
"""

from stn_pipeline.figures.scores import confusion_matrix, curves, reliability, robustness
from stn_pipeline.figures.style import BLUE, GREY, INK, ORANGE, PALE, VERMILION, epoch_axis, log_axis, sheet, to_png
from stn_pipeline.figures.warps import warp_strip, warps, warps_by_arm

__all__ = [
    "BLUE", "GREY", "INK", "ORANGE", "PALE", "VERMILION", "confusion_matrix", "curves", "epoch_axis", "log_axis", "reliability",
    "robustness", "sheet", "to_png", "warp_strip", "warps", "warps_by_arm",
]  # fmt: skip

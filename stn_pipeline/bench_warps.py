"""What a batch of each family of warps costs, forward and backward: `python -m stn_pipeline.bench_warps`.

All take turns, so that a drifting machine slows all. Beside ours stands libcpab's CPAB, where it is installed.
"""

import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from stn_pipeline import cli
from stn_pipeline.config import DEVICE_HELP, DeviceName, Knobs, knob
from stn_pipeline.paths import for_output

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE_STEPS = 1000


class BenchWarpsConfig(Knobs):
    """One table of costs."""

    batch_size: int = knob(64, help="images a batch", unit="images", ge=1, le=1_000_000)
    image_size: int = knob(28, help="side of the images", unit="px", ge=2, le=1024)
    threads: int = knob(1, help="threads of all", ge=1, le=1024)
    repeats: int = knob(20, help="batches of each, in turn, after two that are not counted", ge=1, le=1_000_000)
    furthest: float = knob(8.0, help="how far CPAB's furthest point moves where errors are told", unit="px", gt=0, le=1024)
    device: DeviceName = knob("auto", help=DEVICE_HELP)
    out: str = knob("", help="file for the figures as JSON; none by default")


def bench_warps(argv: Sequence[str]) -> None:
    """Time as the flags say, print a table and, where asked, write JSON."""
    knobs = BenchWarpsConfig.parse(cli.parse(BenchWarpsConfig, argv, "Time the families of warps."))
    out = for_output("out", knobs.out) if knobs.out else None

    import torch

    from stn_pipeline.benching.machine import machine
    from stn_pipeline.training.device import resolve
    from stn_pipeline.transforms import lattice

    device = resolve(knobs.device)
    torch.set_num_threads(knobs.threads)
    points = lattice(knobs.image_size, knobs.image_size, device=device)
    contenders = _contenders(knobs, device, points)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(knobs.repeats + 2):
        for name, once in contenders.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            once()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(1e3 * (time.perf_counter() - started))
    rows = {name: values[2:] for name, values in taken.items()}
    print(f"{knobs.batch_size} images of {knobs.image_size} px, {knobs.threads} threads, {device}, forward and backward")
    for name, values in rows.items():
        ratio = median(values) / median(rows["affine"])
        print(f"{name:<22}{median(values):>9.3f} ms ({min(values):.3f} to {max(values):.3f}){ratio:>9.1f} x affine")
    errors = cpab_errors(knobs)
    for name, error in errors.items():
        print(f"{name:<22} mean {error['mean']:.2e} px, most {error['most']:.2e} px, where the furthest point moves {knobs.furthest:g} px")
    if out is not None:
        told = machine(device) | {"knobs": knobs.model_dump(exclude={"out"}), "ms": rows, "cpab_error_px": errors}
        out.write_text(json.dumps(told, indent=1) + "\n")


def _contenders(knobs: BenchWarpsConfig, device: Any, points: "Tensor") -> "dict[str, Callable[[], object]]":
    import torch

    from stn_pipeline.compiler import CompilerError
    from stn_pipeline.transforms import TRANSFORMS

    def both_ways(warp: "Callable[[Tensor, Tensor], Tensor]", identity: tuple[float, ...]) -> Callable[[], object]:
        noise = torch.randn(knobs.batch_size, len(identity), generator=torch.Generator().manual_seed(0))
        theta = (torch.tensor(identity) + 0.1 * noise).to(device).requires_grad_()
        weights = torch.randn(knobs.batch_size, len(points), 2, device=device)
        return lambda: torch.autograd.grad(warp(theta, points), theta, weights)

    found = {name: both_ways(family.warp, family.identity) for name, family in TRANSFORMS.items()}
    for name, family in TRANSFORMS.items():
        if family.compiled is not None and device.type == "cpu":
            try:
                found[f"{name}, kernel"] = both_ways(family.compiled(), family.identity)
            except CompilerError as error:
                print(error)
    theirs = libcpab_or_none(str(device.type))
    if theirs is not None:
        cell = ((points + 1) / 2).T.contiguous()  # libcpab's square is [0, 1]²
        warp = lambda theta, _: theirs.transform_grid(cell, theta).transpose(1, 2)  # noqa: E731
        found["libcpab"] = both_ways(warp, (0.0,) * theirs.get_theta_dim())
    return found


def libcpab_or_none(device: str) -> Any:
    """Return libcpab's CPAB of 3 x 3 squares, free at the edge, where it is installed."""
    try:
        import libcpab
    except ImportError:
        return None
    return libcpab.Cpab([3, 3], device={"cuda": "gpu"}.get(device, device), zero_boundary=False)


def cpab_errors(knobs: BenchWarpsConfig, n: int = 20) -> dict[str, dict[str, float]]:
    """Return how far our CPAB's points are from those of REFERENCE_STEPS steps in float64, over n warps, in pixels."""
    import torch

    from stn_pipeline.transforms import cpab, lattice
    from stn_pipeline.transforms.cpab import basis, flow

    points = lattice(knobs.image_size, knobs.image_size, torch.float64)
    theta = torch.randn(n, cpab(3).n_params, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = torch.zeros(n, 1, dtype=torch.float64), torch.full((n, 1), 10.0, dtype=torch.float64)
    for _ in range(30):
        middle = (low + high) / 2
        way = (cpab(3)(middle * theta, points) - points).norm(dim=2).amax(dim=1, keepdim=True) * knobs.image_size / 2
        low, high = torch.where(way < knobs.furthest, middle, low), torch.where(way < knobs.furthest, high, middle)
    theta = low * theta
    true = flow((theta @ basis(3, "free")).view(n, 6, -1), points.expand(n, -1, -1), 3, REFERENCE_STEPS)
    errors = {}
    for name, dtype in (("cpab, float32", torch.float32), ("cpab, float64", torch.float64)):
        error = (cpab(3)(theta.to(dtype), points.to(dtype)).double() - true).norm(dim=2) * knobs.image_size / 2
        errors[name] = {"mean": error.mean().item(), "most": error.max().item()}
    return errors


def main() -> None:
    """Run the entry point."""
    cli.run(bench_warps)


if __name__ == "__main__":
    main()

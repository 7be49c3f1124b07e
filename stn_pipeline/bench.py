"""How fast is the training loop beside the ones people write: `python -m stn_pipeline.bench --dataset mnist`.

All contenders train whole epochs in turn, each in processes of its own, so that a drifting machine slows all. A ratio is
told a repeat and then summed up: its median, smallest and largest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from stn_pipeline import cli
from stn_pipeline.config import DATASET_HELP, DEVICE_HELP, DatasetName, DeviceName, Knobs, knob, short_name
from stn_pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from stn_pipeline.benching.contenders import Contender, Setting

VARIED = ("dataset", "transform", "precision", "batch_size", "image_size", "images", "threads", "at_once")


def _numbers(text: Any) -> str:
    words = str(text).split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError("must be whole numbers with commas between, such as 0,2,4")
    return ",".join(words)


def _varied(text: Any) -> str:
    for word in str(text).split():
        name, equals, values = word.partition("=")
        if name not in VARIED or not equals or not all(values.split(",")):
            rule = f"such as batch_size=16,256 transform=none,diffeo, of {', '.join(VARIED)}"
            raise ValueError(f"must be knobs and their values, {rule}{did_you_mean(name, VARIED)}")
    return str(text)


class BenchConfig(Knobs):
    """One comparison of speeds."""

    dataset: DatasetName = knob("auto", help=DATASET_HELP)
    data_dir: str = knob("data", help="folder of the torchvision sets")
    transform: str = knob("affine", help="family of warps of our engine; the loops beside it are always affine")
    precision: str = knob("fp32", help="arithmetic of our engine; the loops beside it are always fp32")
    batch_size: int = knob(64, help="images a step", unit="images", ge=1, le=1_000_000)
    image_size: int = knob(0, help="side to which all images are scaled; 0 keeps their own", unit="px", ge=0, le=1024)
    images: int = knob(0, help="training images an epoch; 0 for all", unit="images", ge=0, le=1_000_000_000)
    threads: int = knob(0, help="of all the processes of a contender together; 0 for one a core", ge=0, le=1024)
    at_once: int = knob(0, help="trainings side by side where a sweep's speed is told; 0 for one a core, at most 8", ge=0, le=1024)
    workers: Annotated[str, BeforeValidator(_numbers)] = knob("0,2,4", help="DataLoader workers of the loops beside ours")
    vary: Annotated[str, BeforeValidator(_varied)] = knob(
        "", help="knobs to give other values, one knob at a time, as in 'batch_size=16,256 image_size=28,64'"
    )
    vary_images: int = knob(6400, help="training images an epoch where knobs are varied; 0 for all", unit="images", ge=0, le=1_000_000_000)
    repeats: int = knob(3, help="epochs of each loop, in turn, after one that is not counted", ge=1, le=10_000)
    device: DeviceName = knob("auto", help=DEVICE_HELP)
    out: str = knob("", help="folder for bench.json and bench.png; none by default")

    def setting(self) -> "Setting":
        """Return what is trained, checked as a training's knobs are."""
        from stn_pipeline.benching.contenders import Setting
        from stn_pipeline.jobs import available_cores, n_workers

        names = ("dataset", "data_dir", "transform", "precision", "batch_size", "device")
        setting = Setting(
            {name: getattr(self, name) for name in names}, self.images, self.image_size, self.threads or available_cores(),
            self.at_once or max(2, n_workers()),
        )  # fmt: skip
        _ = setting.config
        return setting


def bench(argv: Sequence[str]) -> None:
    """Time as the flags say, print ratios and, where asked, write JSON and a picture."""
    knobs = BenchConfig.parse(cli.parse(BenchConfig, argv, "Time the training loop against the ones people write."))
    if knobs.out and not Path(knobs.out).is_dir():
        raise ConfigError(f"out={knobs.out}: is not a folder: make it first")
    others = {(name, value): _with(knobs, name, value) for name, values in _words(knobs.vary) for value in values}

    import torch

    from stn_pipeline.benching.floor import flops_an_image, product_rate
    from stn_pipeline.benching.machine import machine
    from stn_pipeline.benching.reference import lightning_or_none
    from stn_pipeline.benching.tracked import tracking_costs
    from stn_pipeline.model.layers import ARCHS
    from stn_pipeline.training.device import resolve

    setting = knobs.setting()
    splits = setting.splits()
    if min(splits.image_shape[1:]) < (least := ARCHS["report"].unpadded_side):
        raise ConfigError(f"dataset={splits.dataset}: the report's network needs images of {least} px a side: give dataset=mnist")
    torch.set_num_threads(setting.threads)
    here = machine(resolve(knobs.device))
    what = f"{splits.name}, {len(splits.train)} images, {knobs.transform}, batch {knobs.batch_size}, {knobs.precision}"
    what += f", {setting.threads} threads"
    print(f"{what}\n{here['processor']}, torch {torch.__version__}", flush=True)

    rate, flops = product_rate(splits.train.images.device), flops_an_image(setting.config.model_copy(update={"device": "cpu"}), splits)
    workers = [int(word) for word in knobs.workers.split(",")]
    contenders = _contenders(setting, workers, lightning=lightning_or_none() is not None)
    rows = _rows(contenders, _contest(contenders, knobs.repeats), len(splits.train))
    floor_us = flops / rate * 1e6
    floor = {"flops_an_image": flops, "product_flops_per_s": rate, "floor_us_an_image": floor_us}
    _print_rows(rows)
    ours_us = median(1e6 / speed for speed in rows[0]["images_per_s"])
    print(
        f"a step is {flops / 1e6:.2f} MFLOP an image, products run at {rate / 1e9:.0f} GFLOP/s on {setting.threads} threads: at that rate "
        f"{floor_us:.1f} µs an image; ours takes {ours_us:.1f}, {ours_us / floor_us:.1f} times as long"
    )
    tracked = tracking_costs(setting, knobs.repeats + 1)
    print(
        f"tracking takes {tracked['tracking_s'] * 1e3:.0f} ms of an epoch of {tracked['epoch_s']:.2f} s: {tracked['share']:.1%}", flush=True
    )

    growth = _growth(others, min(workers), knobs.repeats)
    if knobs.out:
        from stn_pipeline.benching.pictures import picture

        figures = {
            "knobs": knobs.model_dump(exclude={"dataset", "data_dir", "vary", "out", "device"}),
            "dataset": splits.dataset,
            "n_train": len(splits.train),
        }
        told = here | figures | {"contenders": rows, "floor": floor, "tracking": tracked, "us_an_image": growth}
        (Path(knobs.out) / "bench.json").write_text(json.dumps(told, indent=1) + "\n")
        (Path(knobs.out) / "bench.png").write_bytes(picture(rows, growth, f"Training speed: {what}"))


def _words(vary: str) -> list[tuple[str, list[str]]]:
    return [(name, values.split(",")) for name, _, values in (word.partition("=") for word in vary.split())]


def _with(knobs: BenchConfig, name: str, value: str) -> BenchConfig:
    return BenchConfig.parse(knobs.model_dump() | {"images": knobs.vary_images, name: value})


def _contenders(setting: "Setting", workers: list[int], *, lightning: bool) -> "list[Contender]":
    """Return all there are: alone with all the threads, and as many at once as a sweep runs."""
    from stn_pipeline.benching.contenders import Contender

    alone = [Contender("engine", setting), Contender("plain", setting), Contender("resident", setting)]
    alone += [Contender("report", setting, workers=n) for n in workers]
    alone += [Contender("lightning", setting, workers=n) for n in workers if lightning]
    at_once = [Contender("engine", setting, setting.at_once), Contender("report", setting, setting.at_once, workers=min(workers))]
    return alone + at_once * (setting.at_once > 1)


def _contest(contenders: "Sequence[Contender]", repeats: int) -> dict[str, list[float]]:
    from stn_pipeline.benching.contenders import Contest

    with Contest(contenders) as contest:
        return contest.run(repeats, lambda line: print(f"  {line}", flush=True))


def _rows(contenders: "Sequence[Contender]", seconds: dict[str, list[float]], n_images: int) -> list[dict[str, Any]]:
    """Return a row a contender: its speed, and how many times the report's loop's that is, with its most workers and at its best."""
    speeds = {one.name: [one.processes * n_images / each for each in seconds[one.name]] for one in contenders}
    reports = [one for one in contenders if one.loop == "report" and one.processes == 1]
    most, best = max(reports, key=lambda one: one.workers).name, max((one.name for one in reports), key=lambda name: median(speeds[name]))
    return [
        {
            "name": one.name, "loop": one.loop, "processes": one.processes, "threads": one.threads, "workers": one.workers,
            "seconds_an_epoch": seconds[one.name], "images_per_s": speeds[one.name],
            "x_report": {other: [a / b for a, b in zip(speeds[one.name], speeds[other], strict=True)] for other in {most, best}},
        }
        for one in contenders
    ]  # fmt: skip


def _print_rows(rows: list[dict[str, Any]]) -> None:
    references = sorted(rows[0]["x_report"])
    print(f"{'':<34}{'s/epoch':>8}{'images/s':>10}" + "".join(f"{'x ' + name:>34}" for name in references))
    for row in rows:
        ratios = "".join(f"{_spread(row['x_report'][name]):>34}" for name in references)
        print(f"{row['name']:<34}{median(row['seconds_an_epoch']):>8.2f}{median(row['images_per_s']):>10,.0f}{ratios}")


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _growth(others: dict[tuple[str, str], BenchConfig], workers: int, repeats: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return, and print, microseconds an image by knob, value and contender."""
    from stn_pipeline.benching.contenders import Contender

    growth: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (name, value), knobs in others.items():
        setting = knobs.setting()
        n = setting.at_once if name == "at_once" else 1
        contenders = [Contender("engine", setting, n), Contender("plain", setting, n), Contender("report", setting, n, workers)]
        n_images = len(setting.splits().train)
        of_value = {called: [1e6 * each / n / n_images for each in values] for called, values in _contest(contenders, repeats).items()}
        told = {called.partition(f", {n} at once")[0]: values for called, values in of_value.items()}
        growth.setdefault(name, {})[short_name(value)] = told
        print(f"{name}={value}, µs an image: " + "   ".join(f"{key} {_spread(each)}" for key, each in told.items()), flush=True)
    return growth


def main() -> None:
    """Run the entry point."""
    cli.run(bench)


if __name__ == "__main__":
    main()

"""The reference loop is the report's network; the engine's network is the same function of the image."""

import json
from typing import Any

import pytest
import torch

from stn_pipeline import bench as bench_module
from stn_pipeline.bench import bench
from stn_pipeline.benching.contenders import Contender, Contest, Setting, seconds_of
from stn_pipeline.benching.floor import flops_an_image, product_rate
from stn_pipeline.benching.reference import ReportNet
from stn_pipeline.benching.tracked import tracking_costs
from stn_pipeline.config import TrainConfig
from stn_pipeline.data.splits import Split, Splits
from stn_pipeline.errors import ConfigError, DataError, RunError
from stn_pipeline.model import build


def with_the_same_weights(channels: int, size: tuple[int, int]):
    """Return our network and the report's with our weights, both with a theta off the identity."""
    mean, std = torch.full((channels,), 0.3), torch.full((channels,), 0.2)
    ours = build(TrainConfig(transform="affine"), (channels, *size), 10, mean, std).eval()
    with torch.no_grad():
        ours.transformer.localisation.theta.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    theirs = ReportNet(channels, size, 10).eval()
    order = list(ours.transformer.parameters()) + list(ours.classifier.parameters())
    for parameter, value in zip(theirs.parameters(), order, strict=True):
        parameter.data.copy_(value.data)
    return ours, theirs


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (2, (40, 30))])
def test_the_engines_network_is_the_reports(channels, size):
    ours, theirs = with_the_same_weights(channels, size)
    images = torch.rand(6, channels, *size, generator=torch.Generator().manual_seed(1))
    # the report normalises before it warps: outside is then 0, the mean, which ours shows as black; so compare with border-free warps
    theta_bias = ours.transformer.localisation.theta.bias
    for parameter in (theta_bias, list(theirs.fc_loc.parameters())[-1]):
        parameter.data.copy_(torch.tensor([0.5, 0.1, 0.1, -0.1, 0.5, 0.0]))
    with torch.inference_mode():
        logits, expected = ours(images), theirs(ours.normalise(images))
    torch.testing.assert_close(logits.log_softmax(1), expected, atol=1e-5, rtol=1e-5)


def noise(n: int = 64) -> Splits:
    split = Split(torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8), torch.arange(n) % 10)
    return Splits(split, split, split, tuple("0123456789"), "noise")


def setting(**more: Any) -> Setting:
    return Setting(**{"knobs": {"dataset": "digits", "device": "cpu"}, "images": 100, "side": 28, "threads": 2, "at_once": 2} | more)


@pytest.mark.parametrize("loop", ["engine", "plain", "resident", "report"])
def test_every_loop_trains_whole_epochs_and_learns(loop):
    contender = Contender(loop, setting(images=640))
    epochs = contender.epochs(contender.setting.splits())
    assert all(seconds_of(epochs) > 0 for _ in range(2))
    if loop in ("resident", "report"):
        torch.manual_seed(0)
        split = contender.setting.splits().train
        for _ in range(6):
            network = next(epochs)
        mean, std = contender.setting.splits().mean, contender.setting.splits().std
        with torch.inference_mode():
            predicted = network.eval()((split.images.float() / 255 - mean) / std).argmax(1)
        assert (predicted == split.labels).float().mean() > 0.5


def test_what_a_loop_says_it_took_is_believed_and_others_are_timed():
    assert seconds_of(iter([7.0])) == 7.0
    assert 0 < seconds_of(iter([object()])) < 1


def test_a_setting_scales_and_repeats_images():
    splits = setting(images=3000, side=20).splits()
    assert splits.image_shape == (1, 20, 20) and len(splits.train) == 3000
    again = len(setting(images=0).splits().train)
    assert torch.equal(splits.train.images[0], splits.train.images[again])
    assert splits.train.images.max() > 200


@pytest.mark.slow
def test_contenders_take_turns_and_the_first_is_not_counted():
    told = []
    names = ["ours", "ours, 2 at once"]
    with Contest([Contender("engine", setting()), Contender("engine", setting(), 2)]) as contest:
        seconds = contest.run(2, told.append)
        processes = [process for some in contest._running.values() for process, _ in some]
    assert [line.split("  ")[1] for line in told] == names * 3 and told[0].startswith("warm-up")
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(names, 2)
    assert len(processes) == 3 and not any(process.is_alive() for process in processes)


def test_a_contender_that_fails_says_why():
    with pytest.raises(DataError, match="nowhere"), Contest([Contender("engine", setting(knobs={"dataset": "folder:/nowhere"}))]):
        pass


def test_a_contender_that_is_killed_ends_the_contest():
    with pytest.raises(RunError, match="ours: its process died with exit code -9"), Contest([Contender("engine", setting())]) as contest:
        ((process, _),) = contest._running["ours"]
        process.kill()
        contest.turn("ours")


def test_ratios_are_told_a_repeat_against_the_reports_loop_at_its_most_and_its_best_workers():
    contenders = [Contender("engine", setting(), 2), Contender("report", setting(), workers=0), Contender("report", setting(), workers=4)]
    names = [contender.name for contender in contenders]
    rows = bench_module._rows(contenders, dict(zip(names, ([1.0, 2.0], [4.0, 4.0], [8.0, 5.0]), strict=True)), 100)
    assert rows[0]["images_per_s"] == [200, 100]
    assert rows[0]["x_report"] == {names[1]: [8, 4], names[2]: [16, 5]}


def test_a_floor_is_counted_by_hand():
    splits = noise()
    c1, c2 = 22 * 22 * 8 * 49, 7 * 7 * 10 * 8 * 25  # products of the localiser's convolutions, then of its linear layers
    c3, c4 = 24 * 24 * 10 * 25, 8 * 8 * 20 * 10 * 25
    linear = 90 * 32 + 32 * 6 + 320 * 50 + 50 * 10 + 3 * 2 * 784  # the grid is a product too, but its points are no parameter
    # backward costs twice the forward pass, but for what needs no gradient: the images of the localiser, the points
    products = 3 * (c1 + c2 + c3 + c4 + linear) - c1 - 3 * 2 * 784
    assert flops_an_image(TrainConfig(dataset="digits"), splits) == pytest.approx(2 * products, rel=1e-3)
    assert product_rate(torch.device("cpu")) > 1e8


@pytest.mark.slow
def test_tracking_costs_a_share_of_an_epoch():
    costs = tracking_costs(setting(), 3)
    assert 0 < costs["tracking_s"] < costs["epoch_s"] and 0 < costs["share"] < 1


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path, capsys):
    flags = "--dataset digits --image-size 28 --images 100 --vary-images 100 --repeats 1 --device cpu --workers 0 --at-once 1"
    bench([*flags.split(), "--vary", "batch_size=16 transform=none,tps", "--out", str(tmp_path)])
    told = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in told["contenders"]][:4] == [
        "ours", "ours, compile=off", "plain loop, resident tensors", "report's loop, 0 workers",
    ]  # fmt: skip
    assert {knob: list(values) for knob, values in told["us_an_image"].items()} == {
        "batch_size": ["16"],
        "transform": ["none", "tps"],
    }
    assert told["commit"] and told["processor"] and told["torch"] == torch.__version__
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "x report's loop, 0 workers" in out and "GFLOP/s on" in out and "tracking takes" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workers", "two"], "workers=two: must be whole numbers with commas between, such as 0,2,4"),
        (["--vary", "batch=3"], "vary=batch=3: must be knobs and their values, such as .*did you mean batch_size"),
        (["--vary", "batch_size=0"], "batch_size=0: must be >= 1"),
        (["--transform", "afine"], "transform=afine: choose none, affine"),
        (["--dataset", "digits"], "dataset=digits: the report's network needs images of 22 px a side"),
        (["--out", "/nowhere"], "out=/nowhere: is not a folder: make it first"),
    ],
)
def test_what_is_wrong_is_one_line(flags, told):
    with pytest.raises(ConfigError, match=told):
        bench(flags)

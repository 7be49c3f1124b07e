"""The reference loop is the report's network; the engine's network is the same function of the image."""

import json

import pytest
import torch

from stn_pipeline.bench import bench, measure, report_net
from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import build


def with_the_same_weights(channels: int, size: tuple[int, int]):
    """Return our network and the report's with our weights, both with a theta off the identity."""
    mean, std = torch.full((channels,), 0.3), torch.full((channels,), 0.2)
    ours = build(TrainConfig(transform="affine"), (channels, *size), 10, mean, std).eval()
    with torch.no_grad():
        ours.transformer.localisation.theta.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    theirs = report_net(channels, size, 10).eval()
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


def test_loops_are_called_in_turn_and_the_first_call_is_not_counted():
    called = []
    seconds = measure({"a": lambda: called.append("a"), "b": lambda: called.append("b") or 7.0}, 2)
    assert called == ["a", "b"] * 3
    assert seconds["b"] == [7.0, 7.0] and len(seconds["a"]) == 2


def test_it_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    from stn_pipeline import data
    from stn_pipeline.data.splits import Split, Splits

    split = Split(torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8), torch.arange(64) % 10)
    monkeypatch.setattr(data, "load", lambda config, device: Splits(split, split, split, tuple("0123456789"), "noise"))
    bench(["--workers", "0", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path / "bench.json")])
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert {name: len(values) for name, values in figures["seconds_an_epoch"].items()} == {"engine": 2, "report's loop, 0 workers": 2}
    assert "x engine" in capsys.readouterr().out


def test_a_bad_flag_is_one_line():
    with pytest.raises(ConfigError, match="workers=two: must be whole numbers with commas between, such as 0,2,4"):
        bench(["--workers", "two"])

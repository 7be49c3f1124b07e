"""What fit, the step, the checkpoint, the device and the console promise: bundled digits and made-up images, on the CPU."""

import copy
import importlib
import inspect
import io
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, Splits, load
from stn_pipeline.data.splits import Distorted
from stn_pipeline.errors import ConfigError, DivergedError
from stn_pipeline.model import Network, build
from stn_pipeline.progress import Progress
from stn_pipeline.training import Checkpoint, Epoch, Record, State, checkpoint, fit, score
from stn_pipeline.training.device import arithmetic, resolve
from stn_pipeline.training.step import Steps, make_optimizer, step

fit_module = importlib.import_module("stn_pipeline.training.fit")  # the package's own attribute `fit` is the function
step_module = importlib.import_module("stn_pipeline.training.step")
CPU = torch.device("cpu")
ARMS = [{"transform": "none"}, {"transform": "affine"}, {"transform": "diffeo", "coordconv": True, "coordconv_r": True}]
IDS = ["none", "affine", "diffeo-coordconv-r"]


# Helpers


@cache
def digits() -> Splits:
    return load(TrainConfig(dataset="digits", device="cpu"), announce=lambda line: None)


def config(**knobs: Any) -> TrainConfig:
    return TrainConfig.parse({"dataset": "digits", "device": "cpu", "epochs": 2, "batch_size": 16, **knobs})


def some(n: int, first: int = 0) -> Split:
    return digits().train.take(np.arange(first, first + n))


def numbered(n: int) -> Split:
    """Noise, but the first pixel of image i is i."""
    images = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
    return Split(images, torch.arange(n) % 10)


def numbers_of(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


def fresh(cfg: TrainConfig) -> Network:
    return build(cfg, digits().image_shape, 10, digits().mean, digits().std)


def trained(cfg: TrainConfig, train: Split | None = None, val: Split | None = None, **more: Any) -> Epoch:
    """The last epoch of a whole run, 40 training images (a partial batch at the end) unless told."""
    return list(fit(fresh(cfg), train or some(40), val or some(30, 100), cfg, **more))[-1]


def content(state: State) -> dict[str, Any]:
    """A copy of a state, without the two figures that are measured by the clock."""
    history = [{key: value for key, value in record.items() if key not in ("seconds", "images_per_s")} for record in state.history]
    return copy.deepcopy(vars(state) | {"history": history})


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, NaN equal to NaN."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        np.testing.assert_equal(a, b, where)


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not torch.equal(a[key], b[key]) for key in a)


Step = Callable[..., tuple[Tensor, Tensor]]


def idle(*_: Any) -> tuple[Tensor, Tensor]:
    """A step that learns nothing."""
    return torch.tensor(1.0), torch.tensor(0)


def replace_step(monkeypatch: pytest.MonkeyPatch, with_: Step) -> None:
    monkeypatch.setattr(step_module, "step", with_)


def watch_steps(monkeypatch: pytest.MonkeyPatch, look: Callable[..., object], then: Step = step) -> None:
    """Call look(network, optimizer, images, labels) before each step."""

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        look(*args)
        return then(*args)

    replace_step(monkeypatch, watched)


def batches_of(monkeypatch: pytest.MonkeyPatch, n: int, **knobs: Any) -> list[list[list[int]]]:
    """The image numbers of each batch of each epoch."""
    epochs: list[list[list[int]]] = []
    with monkeypatch.context() as patch:
        watch_steps(patch, lambda network, optimizer, images, *_: epochs[-1].append(numbers_of(images)), then=idle)
        epochs.append([])
        for _ in fit(fresh(config(**knobs)), numbered(n), some(10), config(**knobs)):
            epochs.append([])
    return epochs[:-1]


def script_val(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the validation loss of epoch i be losses[i - 1]."""
    rest = iter(losses)
    monkeypatch.setattr(fit_module, "score", lambda network, split: replace(score(network, split), loss=next(rest)))


# It learns


@pytest.mark.parametrize("arm", ARMS, ids=IDS)
def test_a_network_can_learn_32_images_by_heart(arm):
    cfg, images = config(epochs=100, batch_size=32, **arm), some(32)
    network = fresh(cfg)
    before = score(network, images)
    for _ in fit(network, images, some(10, 50), cfg):
        pass
    after = score(network, images)
    assert before.loss > 2 and before.accuracy < 0.5
    assert after.loss < 0.1 and after.accuracy == 1


def test_fit_is_never_handed_a_test_split():
    assert list(inspect.signature(fit).parameters) == ["network", "train", "val", "config", "state", "tick", "engine"]


def test_a_network_trains_in_training_mode_whatever_the_watcher_does_to_it(monkeypatch):
    modes = []
    watch_steps(monkeypatch, lambda network, *_: modes.append(all(module.training for module in network.modules())))
    network = fresh(config())
    for _ in fit(network, some(40), some(10), config()):
        network.eval()
    assert modes == [True] * 6


def test_a_step_sees_images_from_0_to_1_with_their_own_labels(monkeypatch):
    train = numbered(40)

    def look(network: Network, optimizer: object, images: Tensor, labels: Tensor, precision: str) -> None:
        at = numbers_of(images)
        assert_close(images, train.images[at] / 255)
        assert torch.equal(labels, train.labels[at])

    watch_steps(monkeypatch, look)
    trained(config(), train)


# The same seed


@pytest.mark.parametrize("arm", ARMS, ids=IDS)
def test_the_same_seed_gives_the_same_run_bit_for_bit(arm):
    assert_same(content(trained(config(**arm)).state), content(trained(config(**arm)).state))


def test_another_seed_gives_another_run():
    a, b = (trained(config(seed=seed)).state for seed in (0, 1))
    assert differ(a.network, b.network)
    assert a.history[0]["train_loss"] != b.history[0]["train_loss"]


def test_another_seed_gives_another_dropout_even_from_the_same_weights():
    start = fresh(config(seed=0)).state_dict()
    weights = []
    for seed in (0, 1):
        cfg = config(seed=seed, epochs=1, batch_size=8)
        network = fresh(cfg)
        network.load_state_dict(start)
        eight = Split(some(1).images.repeat(8, 1, 1, 1), some(1).labels.repeat(8))  # all alike: the order cannot matter
        list(fit(network, eight, some(10), cfg))
        weights.append(network.state_dict())
    assert differ(*weights)


def test_random_numbers_that_the_watcher_draws_change_nothing():
    undisturbed = content(trained(config(epochs=4)).state)
    torch.manual_seed(12345)
    cfg = config(epochs=4)
    network = fresh(cfg)
    for epoch in fit(network, some(40), some(30, 100), cfg, tick=lambda n: np.random.rand()):
        torch.rand(7)
        torch.manual_seed(epoch.record.number)
    assert_same(content(epoch.state), undisturbed)


def test_a_run_that_is_abandoned_leaves_nothing_behind():
    before = copy.deepcopy(content(trained(config()).state))
    backends = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    for precision in ("fp32", "bf16"):
        epochs = fit(fresh(config()), some(40), some(30, 100), config(precision=precision, seed=5))
        next(epochs)
        assert not torch.is_autocast_enabled("cpu"), "the watcher runs in its own arithmetic"
        epochs.close()
    assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == backends
    assert_same(content(trained(config()).state), before)


# Going on from a checkpoint

RESUMED = [
    {"optimizer": "adam", "transform": "affine"},
    {"optimizer": "adam", "schedule": "cosine", "transform": "none", "weight_decay": 0.01},
    {"optimizer": "adamw", "schedule": "cosine", "transform": "diffeo", "coordconv": True, "weight_decay": 0.01},
    {"optimizer": "sgd", "schedule": "cosine", "transform": "affine", "coordconv": True, "lr": 0.1},
    {"optimizer": "sgd", "transform": "diffeo", "lr": 0.1, "precision": "bf16"},
]


def interrupted(cfg: TrainConfig, after: int, folder: Path) -> None:
    """Train `after` epochs, keeping two checkpoints in turn as a run does, then stop in the middle of the next epoch."""

    def tick(n: int) -> None:
        nonlocal n_seen
        n_seen += n
        if n_seen > after * 40 + cfg.batch_size:
            raise KeyboardInterrupt

    n_seen = 0
    with pytest.raises(KeyboardInterrupt):
        for epoch in fit(fresh(cfg), some(40), some(30, 100), cfg, tick=tick):
            name = "even.pt" if epoch.record.number % 2 == 0 else "odd.pt"
            checkpoint.save(Checkpoint(cfg, digits().image_shape, digits().classes, epoch.state), folder / name)


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("knobs", RESUMED, ids=lambda knobs: "-".join(str(value) for value in knobs.values()))
def test_a_run_that_goes_on_from_its_file_is_the_unbroken_run_bit_for_bit(knobs, after, tmp_path):
    cfg = config(epochs=5, **knobs)
    unbroken = content(trained(cfg).state)
    interrupted(cfg, after, tmp_path)

    found = checkpoint.load_newest([tmp_path / "even.pt", tmp_path / "odd.pt"])
    assert found.config == cfg and found.state.epoch == after
    rest = list(fit(fresh(found.config), some(40), some(30, 100), found.config, found.state))
    assert [epoch.record.number for epoch in rest] == list(range(after + 1, 6))
    assert_same(content(rest[-1].state), unbroken)


def test_a_run_on_distorted_images_that_goes_on_is_the_unbroken_run_bit_for_bit():
    cfg, train = config(epochs=4), Distorted.of(some(40), "rotated", 0)
    epochs = fit(fresh(cfg), train, some(30, 100), cfg)
    next(epochs)
    state = copy.deepcopy(next(epochs).state)
    unbroken = content(list(epochs)[-1].state)
    assert_same(content(list(fit(fresh(cfg), train, some(30, 100), cfg, state))[-1].state), unbroken)
    undistorted = content(trained(cfg).state)
    assert differ(undistorted["network"], unbroken["network"])


def test_each_epoch_trains_on_a_draw_of_its_own(monkeypatch):
    cfg, train, seen = config(epochs=3), Distorted.of(some(40), "rotated", 0), []
    monkeypatch.setattr(Steps, "feed", lambda self, split: seen.append(split.images) or setattr(self, "train", split))
    list(fit(fresh(cfg), train, some(30, 100), cfg))
    for number, images in enumerate(seen, start=1):
        assert torch.equal(images, train.draw(number).images)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])


def test_a_best_epoch_before_the_interruption_is_still_the_best_after_it(monkeypatch, tmp_path):
    cfg = config(epochs=4)
    script_val(monkeypatch, [2.0, 1.0, 3.0, 1.5])
    epochs = fit(fresh(cfg), some(40), some(10), cfg)
    next(epochs)
    second = copy.deepcopy(next(epochs).state.network)
    third = next(epochs).state
    checkpoint.save(Checkpoint(cfg, digits().image_shape, digits().classes, third), tmp_path / "odd.pt")
    state = checkpoint.load_newest([tmp_path / "odd.pt"]).state
    last = list(fit(fresh(cfg), some(40), some(10), cfg, state))[-1].state
    assert last.best_epoch == 2 and last.best_val_loss == 1.0
    assert_same(dict(last.best), dict(second))
    assert differ(last.network, last.best)


def test_a_run_that_is_complete_has_no_epoch_left():
    cfg = config()
    state = trained(cfg).state
    before = content(state)
    assert list(fit(fresh(cfg), some(40), some(30, 100), cfg, state)) == []
    assert_same(content(state), before)


# The checkpoint file


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Path]:
    """One checkpoint after epoch 1, one after epoch 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cfg, paths = config(transform="diffeo", coordconv=True), {}
    for epoch in fit(fresh(cfg), some(40), some(30, 100), cfg):
        paths[epoch.record.number] = folder / f"{epoch.record.number}.pt"
        checkpoint.save(Checkpoint(cfg, digits().image_shape, digits().classes, epoch.state), paths[epoch.record.number])
    return paths


def test_a_checkpoint_holds_only_tensors_and_plain_values(saved):
    assert torch.load(saved[2], weights_only=True).keys() == {
        "config",
        "image_shape",
        "classes",
        "state",
        "digests",
        "under",
        "members",
        "reading",
    }


def test_a_checkpoint_gives_back_the_best_network_with_its_scores(saved):
    found = checkpoint.load_newest([saved[2]])
    network = found.build_best()
    best = found.state.history[found.state.best_epoch - 1]
    again = score(network, some(30, 100))
    assert again.loss == pytest.approx(best["val_loss"], rel=1e-6) and again.accuracy == best["val_accuracy"]
    assert not network.training
    assert_close(network.get_buffer("mean"), digits().mean)  # what it was normalised by in training travels with it
    assert (found.image_shape, found.classes) == (digits().image_shape, digits().classes)


def test_the_best_network_of_a_checkpoint_is_not_its_last_one(monkeypatch):
    script_val(monkeypatch, [1.0, 2.0, 3.0])
    state = trained(config(epochs=3)).state
    network = Checkpoint(config(epochs=3), digits().image_shape, digits().classes, state).build_best()
    assert_same(dict(network.state_dict()), dict(state.best))
    assert differ(network.state_dict(), state.network)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_checkpoint_that_got_furthest_is_taken(saved, order):
    assert checkpoint.load_newest([saved[i] for i in order]).state.epoch == 2


GARBAGE = {
    "empty": b"",
    "one byte": b"P",
    "a zip's first bytes": b"PK\x03\x04",
    "zeros": bytes(4096),
    "html": b"<!doctype html><html></html>",
    "noise": np.random.default_rng(2).bytes(10_000),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_file_that_is_no_checkpoint_is_passed_over_for_the_other(saved, tmp_path, garbage):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(garbage)
    assert checkpoint.load_newest([torn, saved[1]]).state.epoch == 1
    assert checkpoint.load_newest([saved[1], torn]).state.epoch == 1
    assert checkpoint.load_newest([torn]) is None


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_file_that_a_kill_cut_short_anywhere_is_passed_over_for_the_other(saved, tmp_path_factory, data):
    whole = saved[2].read_bytes()
    torn = tmp_path_factory.mktemp("torn") / "torn.pt"
    torn.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), "bytes written")])
    assert checkpoint.load_newest([torn, saved[1]]).state.epoch == 1


@pytest.mark.parametrize("garbage", [b"hello text\n", b"\x80\x02X\x01\x00\x00\x00\xff."], ids=["text", "pickle"])
def test_garbage_that_begins_like_a_pickle_is_passed_over_too(saved, tmp_path, garbage):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(garbage)
    assert checkpoint.load_newest([torn, saved[1]]).state.epoch == 1


def test_a_file_with_a_page_that_never_reached_the_disk_is_passed_over(saved, tmp_path):
    whole = saved[2].read_bytes()
    weight = checkpoint.load_newest([saved[2]]).state.network["classifier.hidden.weight"].contiguous().numpy().tobytes()
    middle = whole.index(weight) + len(weight) // 4
    torn = tmp_path / "torn.pt"
    torn.write_bytes(whole[:middle] + bytes(512) + whole[middle + 512 :])
    assert checkpoint.load_newest([torn, saved[1]]).state.epoch == 1


def test_no_file_at_all_is_no_checkpoint(tmp_path):
    assert checkpoint.load_newest([tmp_path / "absent.pt", tmp_path]) is None
    assert checkpoint.load_newest([]) is None


# The batches


@pytest.mark.parametrize("n", [1, 5, 16, 37, 48])
def test_each_epoch_takes_every_image_once_the_last_partial_batch_included(monkeypatch, n):
    for epoch in batches_of(monkeypatch, n, epochs=2):
        assert sorted(sum(epoch, [])) == list(range(n))
        assert [len(batch) for batch in epoch] == [16] * (n // 16) + [n % 16] * (n % 16 > 0)


def test_the_order_differs_between_epochs_and_between_seeds(monkeypatch):
    orders = [sum(epoch, []) for seed in (0, 1) for epoch in batches_of(monkeypatch, 40, epochs=3, seed=seed)]
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(40)) not in orders


def test_the_order_is_the_same_for_every_arm_of_a_seed(monkeypatch):
    arms = [*ARMS, {"optimizer": "sgd", "lr": 0.1}, {"padding": "border", "loc_lr_multiplier": 0.0}, {"precision": "bf16"}]
    first, *others = (batches_of(monkeypatch, 40, seed=3, **arm) for arm in arms)
    assert all(other == first for other in others)


@pytest.mark.parametrize("n", [5, 16, 37, 48])
def test_the_train_loss_and_accuracy_are_means_over_images_not_over_batches(monkeypatch, n):
    def scripted(network: Network, optimizer: object, images: Tensor, labels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        at = torch.tensor(numbers_of(images))
        return at.float().mean(), (at % 3 == 0).sum()  # the loss of image i is i, and every third is right

    replace_step(monkeypatch, scripted)
    record = trained(config(epochs=1), numbered(n)).record
    assert record.train_loss == pytest.approx((n - 1) / 2, rel=1e-6)
    assert record.train_accuracy == pytest.approx(math.ceil(n / 3) / n, rel=1e-12)


@pytest.mark.parametrize("n", [16, 40])
def test_the_ticks_are_the_images_of_each_step(n):
    ticks = []
    trained(config(epochs=3), some(n), tick=ticks.append)
    assert ticks == ([16] * (n // 16) + [n % 16] * (n % 16 > 0)) * 3
    assert sum(ticks) == 3 * n


def test_the_validation_figures_are_those_of_the_network_after_the_epoch():
    cfg, val = config(epochs=3), some(30, 100)
    network = fresh(cfg)
    for epoch in fit(network, some(40), val, cfg):
        scores = score(network, val)
        assert (epoch.record.val_loss, epoch.record.val_accuracy) == (scores.loss, scores.accuracy)
        assert_same(epoch.state.history[-1], asdict(epoch.record))
        assert epoch.state.epoch == epoch.record.number == len(epoch.state.history)
        assert epoch.record.seconds > 0 and epoch.record.images_per_s > 0


def test_without_a_transformer_there_is_nothing_to_diagnose():
    record = trained(config(transform="none")).record
    assert all(math.isnan(value) for value in (record.shift, record.outside, record.log_det, record.folded))


def test_a_transformer_that_stays_at_the_identity_has_no_shift(monkeypatch):
    replace_step(monkeypatch, idle)
    record = trained(config(transform="affine")).record
    assert (record.shift, record.outside, record.folded) == (0, 0, 0) and record.log_det == pytest.approx(0, abs=1e-6)


# The best epoch


@pytest.mark.parametrize(
    ("losses", "best"),
    [([4, 3, 2, 1], 4), ([1, 2, 3, 4], 1), ([3, 1, 2, 1], 2), ([1, 1, 1, 1], 1)],
)
def test_the_best_epoch_has_the_least_validation_loss_and_the_first_wins_a_tie(monkeypatch, losses, best):
    script_val(monkeypatch, losses)
    cfg = config(epochs=4)
    weights, bests = [], []
    for epoch in fit(fresh(cfg), some(40), some(10), cfg):
        weights.append(copy.deepcopy(dict(epoch.state.network)))
        bests.append(epoch.state.best_epoch)
    state = epoch.state
    assert state.best_epoch == best and state.best_val_loss == losses[best - 1]
    assert_same(dict(state.best), weights[best - 1])
    assert sorted(bests) == bests, "the best so far, epoch by epoch"


def test_a_run_that_goes_bad_keeps_the_weights_from_before():
    train = some(40)
    wrong = Split(train.images, (train.labels + 1) % 10)  # what is learned of the one makes the other worse
    cfg = config(epochs=20, batch_size=8)
    state = trained(cfg, train, wrong).state
    losses = [record["val_loss"] for record in state.history]
    assert state.best_epoch == int(np.argmin(losses)) + 1 < 20
    assert losses[-1] > min(losses) + 0.5
    network = Checkpoint(cfg, digits().image_shape, digits().classes, state).build_best()
    assert score(network, wrong).loss == pytest.approx(min(losses), rel=1e-6)


def test_a_state_knows_no_best_loss_before_its_first_epoch():
    state = State({}, {})
    assert (state.epoch, state.best_epoch, state.best_val_loss) == (0, 0, math.inf)


# Divergence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(monkeypatch, value):
    n_steps = 0

    def poisoned(*_: Any) -> tuple[Tensor, Tensor]:
        nonlocal n_steps
        n_steps += 1
        return torch.tensor(value if n_steps >= 5 else 1.0), torch.tensor(0)

    replace_step(monkeypatch, poisoned)
    cfg = config(epochs=9, lr=0.03, loc_lr_multiplier=0.2)
    seen = []
    with pytest.raises(DivergedError) as caught:
        for epoch in fit(fresh(cfg), some(40), some(10), cfg):
            seen.append(epoch.record.number)
    assert str(caught.value) == (
        f"training loss is {value} at epoch 2, step 2 of 3, lr=0.03, loc_lr_multiplier=0.2: it must stay finite; try lr=0.003"
    )
    assert isinstance(caught.value, ArithmeticError)
    assert seen == [1]


def test_a_learning_rate_that_is_far_too_high_diverges_for_real():
    with pytest.raises(DivergedError, match=r"^training loss is (nan|inf) at epoch \d, step \d+ of 10, lr=100.0, .*; try lr=10$"):
        trained(config(epochs=9, optimizer="sgd", lr=100, weight_decay=10, batch_size=4))


@pytest.mark.parametrize("epochs", [1, 2])
def test_weights_that_the_last_step_blew_up_stop_the_run(monkeypatch, epochs):
    n_steps = 0

    def blow_up(network: Network, *_: Any) -> tuple[Tensor, Tensor]:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 3 * epochs:
            with torch.no_grad():
                network.classifier.logits.weight.fill_(math.nan)
        return idle()

    replace_step(monkeypatch, blow_up)
    with pytest.raises(DivergedError):
        trained(config(epochs=epochs))


# The optimiser


def alive(cfg: TrainConfig) -> Network:
    """A network, without dropout, whose localiser gets a gradient in every layer already at the first step."""
    network = fresh(cfg).eval()
    if network.transformer is not None:
        nn.init.normal_(network.transformer.localisation.theta.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return network


def gradients(network: Network, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*network.named_parameters(), strict=True)
    log_p = network(images).log_softmax(dim=1)
    return dict(zip(names, torch.autograd.grad(-log_p[range(len(labels)), labels].mean(), weights), strict=True))


def one_step(cfg: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Callable[[str], float]]:
    """Weights before, gradients, weights after the first step, and the learning rate of each name."""
    network, split = alive(cfg), some(16)
    images, labels = split.images / 255, split.labels
    before = {name: weight.detach().double().clone() for name, weight in network.named_parameters()}
    slopes = {name: slope.double() for name, slope in gradients(network, images, labels).items()}
    step(network, make_optimizer(network, cfg), images, labels)
    after = {name: weight.detach().double() for name, weight in network.named_parameters()}
    return before, slopes, after, lambda name: cfg.lr * (cfg.loc_lr_multiplier if name.startswith("transformer.") else 1)


def test_the_first_sgd_step_is_w_minus_lr_times_gradient():
    before, slopes, after, lr = one_step(config(optimizer="sgd", lr=0.5, loc_lr_multiplier=0.2))
    for name in before:
        assert slopes[name].abs().max() > 0, name
        assert_close(after[name], before[name] - lr(name) * slopes[name], rtol=0, atol=1e-6, msg=name)


def test_the_gradient_is_that_of_the_mean_cross_entropy():
    cfg, split = config(optimizer="sgd", lr=1.0), some(16)
    network = alive(cfg)
    images = split.images / 255
    with torch.no_grad():
        residual = network(images).softmax(1) - F.one_hot(split.labels, 10)  # of the logits, by hand
    before = network.classifier.logits.bias.detach().clone()
    step(network, make_optimizer(network, cfg), images, split.labels)
    assert_close(network.classifier.logits.bias.detach(), before - residual.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_pulls_at_the_classifier_and_at_the_localiser(optimizer):
    cfg = config(optimizer=optimizer, lr=0.01, loc_lr_multiplier=0.5, weight_decay=0.3)
    before, slopes, after, lr = one_step(cfg)
    for name, w in before.items():
        g = slopes[name] + (0 if optimizer == "adamw" else 0.3 * w)  # L2, but decoupled in adamw
        update = g if optimizer == "sgd" else g / (g.abs() + 1e-8)  # Adam's first step, its biases corrected
        expected = w - lr(name) * (update + (0.3 * w if optimizer == "adamw" else 0))
        sure = (g.abs() > 1e-5) | (slopes[name] == 0) | (optimizer == "sgd")  # elsewhere the sign hangs on the last bit
        assert sure.double().mean() > 0.5, name
        assert_close(after[name][sure], expected[sure], rtol=0, atol=2e-6, msg=name)


def test_a_step_does_not_remember_the_gradient_of_the_one_before():
    cfg, (a, b) = config(optimizer="sgd", lr=0.1), (some(16), some(16, 16))
    network = alive(cfg)
    optimizer = make_optimizer(network, cfg)
    step(network, optimizer, a.images / 255, a.labels)
    middle = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    slopes = gradients(network, b.images / 255, b.labels)
    step(network, optimizer, b.images / 255, b.labels)
    name = "classifier.hidden.weight"
    assert_close(network.get_parameter(name).detach(), middle[name] - 0.1 * slopes[name], rtol=0, atol=1e-6)


def test_a_step_returns_the_mean_loss_and_the_count_of_right_answers_before_it():
    network, split = alive(config()), some(30)
    before = score(network, split)
    loss, n_right = step(network, make_optimizer(network, config()), split.images / 255, split.labels)
    assert loss.item() == pytest.approx(before.loss, rel=1e-5) and n_right.item() == before.n_right
    assert not loss.requires_grad


def test_the_localiser_has_a_group_of_its_own_at_lr_times_the_multiplier():
    cfg = config(lr=0.02, loc_lr_multiplier=0.25)
    network = fresh(cfg)
    classifier, localiser = make_optimizer(network, cfg).param_groups
    assert (classifier["lr"], localiser["lr"]) == (0.02, 0.005)
    assert {id(p) for p in localiser["params"]} == {id(p) for p in network.transformer.localisation.parameters()}
    both = [id(p) for p in classifier["params"] + localiser["params"]]
    assert sorted(both) == sorted(id(p) for p in network.parameters())


def test_without_a_transformer_there_is_one_group():
    cfg = config(transform="none", lr=0.02)
    (group,) = make_optimizer(fresh(cfg), cfg).param_groups
    assert group["lr"] == 0.02


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_multiplier_of_0_freezes_the_localiser_bit_for_bit_and_nothing_else(optimizer):
    cfg = config(optimizer=optimizer, loc_lr_multiplier=0, weight_decay=0.1)
    network = fresh(cfg)
    before = copy.deepcopy(dict(network.named_parameters()))
    list(fit(network, some(40), some(10), cfg))
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("transformer."), name


def test_the_multiplier_holds_all_through_a_run(monkeypatch):
    rates = []
    watch_steps(monkeypatch, lambda network, optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups]), then=idle)
    trained(config(epochs=3, schedule="cosine", loc_lr_multiplier=0.25))
    assert all(slow == pytest.approx(0.25 * fast, rel=1e-12) for fast, slow in rates)


@pytest.mark.parametrize("after", [0, 2])
def test_the_cosine_falls_step_by_step_from_lr_to_0_after_the_last(monkeypatch, after):
    cfg, rates, state = config(epochs=5, schedule="cosine", lr=0.04), [], None
    for _, epoch in zip(range(after), fit(fresh(cfg), some(40), some(10), cfg), strict=False):
        state = copy.deepcopy(epoch.state)
    watch_steps(monkeypatch, lambda network, optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trained(cfg, state=state)

    weight = nn.Parameter(torch.zeros(1))
    oracle = torch.optim.SGD([weight], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=15)
    expected = []
    for _ in range(15):
        expected.append(schedule.get_last_lr()[0])
        oracle.step()
        schedule.step()
    assert rates == pytest.approx(expected[3 * after :], rel=1e-9)
    assert rates == pytest.approx([0.02 * (1 + math.cos(math.pi * i / 15)) for i in range(3 * after, 15)], rel=1e-9)


def test_the_constant_schedule_never_moves(monkeypatch):
    rates = set()
    watch_steps(monkeypatch, lambda network, optimizer, *_: rates.add(optimizer.param_groups[0]["lr"]))
    trained(config(epochs=3, lr=0.04))
    assert rates == {0.04}


# Trouble


def troubles(cfg: TrainConfig, network: Network, train: Split, val: Split) -> list[str]:
    return [epoch.record.trouble for epoch in fit(network, train, val, cfg)]


def one_answer(cfg: TrainConfig, shift: float = 0.0) -> Network:
    """A network that says class 0 whatever it sees, its localiser looking `shift` half images to the right."""
    network = fresh(cfg)
    with torch.no_grad():
        network.classifier.logits.weight.zero_()
        network.classifier.logits.bias.copy_(torch.eye(10)[0])
        if network.transformer is not None:
            network.transformer.localisation.theta.bias[2] += shift
    return network


TWENTY = Split(numbered(20).images, torch.tensor([0] * 5 + [1] * 5 + [2] * 5 + [3] * 5))


@pytest.mark.parametrize(
    ("transform", "shift", "text"),
    [
        ("none", 0, "val accuracy 0.250 is at chance (0.250)"),
        ("affine", 0, "val accuracy 0.250 is at chance (0.250)"),
        ("affine", 9, "val accuracy 0.250 is at chance (0.250), 100% of the sampling points lie outside the image"),
    ],
)
def test_a_network_at_chance_is_called_out_from_its_500th_step(monkeypatch, transform, shift, text):
    replace_step(monkeypatch, idle)
    cfg = config(transform=transform, epochs=12, batch_size=1)  # 50 steps an epoch
    assert troubles(cfg, one_answer(cfg, shift), some(50), TWENTY) == [""] * 9 + [text] * 3


def test_chance_is_the_commonest_class_of_the_validation_split(monkeypatch):
    replace_step(monkeypatch, idle)
    cfg = config(transform="none", epochs=10, batch_size=1)
    val = Split(TWENTY.images, torch.tensor([0] * 15 + [1] * 5))
    assert troubles(cfg, one_answer(cfg), some(50), val)[-1] == "val accuracy 0.750 is at chance (0.750)"


@pytest.mark.parametrize(("n_right", "called_out"), [(6, True), (7, False)])
def test_at_chance_ends_a_tenth_of_the_way_to_1(monkeypatch, n_right, called_out):
    replace_step(monkeypatch, idle)
    guess = torch.tensor([0] * 5 + [1] * (n_right - 5) + [0] * (20 - n_right))  # chance 0.25, a tenth of the way 0.325
    monkeypatch.setattr(fit_module, "score", lambda network, split: replace(score(network, split), predicted=guess))
    cfg = config(transform="none", epochs=10, batch_size=1)
    assert bool(troubles(cfg, fresh(cfg), some(50), TWENTY)[-1]) == called_out


@pytest.mark.parametrize(("shift", "text"), [(9, "100% of the sampling points lie outside the image"), (1.0, ""), (0, "")])
def test_a_localiser_that_looks_past_the_image_is_called_out_though_the_accuracy_is_good(monkeypatch, shift, text):
    replace_step(monkeypatch, idle)
    monkeypatch.setattr(fit_module, "score", lambda network, split: replace(score(network, split), predicted=split.labels))
    cfg = config(epochs=10, batch_size=1)
    network = one_answer(cfg, shift)
    found = troubles(cfg, network, some(50), TWENTY)
    assert found == [""] * 9 + [text]


def test_a_network_that_learns_is_never_called_out():
    cfg = config(transform="none", epochs=17, batch_size=4, lr=0.003)
    train, val = some(120), some(60, 200)
    found = troubles(cfg, fresh(cfg), train, val)  # 510 steps
    assert found == [""] * 17


# Precision and device


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_layers_while_weights_warp_and_scores_stay_fp32(precision, dtype):
    cfg = config(precision=precision, transform="affine", epochs=1)
    network = fresh(cfg)
    layers, grids = set(), set()
    network.classifier.hidden.register_forward_hook(lambda module, args, out: layers.add(out.dtype) if module.training else None)
    look = network.transformer.look
    network.transformer.look = lambda *given, **more: grids.add((found := look(*given, **more)).points.dtype) or found
    before = copy.deepcopy(network.state_dict())
    (epoch,) = fit(network, some(40), some(10), cfg)
    assert layers == {dtype} and grids == {torch.float32}
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}
    assert differ(network.state_dict(), before) and math.isfinite(epoch.record.train_loss)


def test_bf16_learns_too():
    losses = [record["train_loss"] for record in trained(config(precision="bf16", epochs=20, batch_size=8)).state.history]
    assert losses[0] > 2.2 and losses[-1] < 1.6


def test_fp32_is_fp32_and_what_was_set_before_comes_back_even_after_an_error():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    for precision, inside in (("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")):
        with pytest.raises(ZeroDivisionError), arithmetic(precision):
            assert [backend.fp32_precision for backend in backends] == ["ieee", inside], "the warp's grid is a product"
            raise ZeroDivisionError
        assert [backend.fp32_precision for backend in backends] == before


def refusal(device: str, precision: str = "fp32") -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(device, precision)
    return str(caught.value)


def test_tf32_on_the_cpu_is_refused():
    assert refusal("cpu", "tf32") == "precision=tf32: needs a GPU, got device=cpu: give precision=fp32 or bf16"


@pytest.mark.parametrize("n_gpus", [0, 1, 7])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, n_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    assert refusal("cuda:7") == f"device=cuda:7: torch {torch.__version__} sees {n_gpus} GPUs: give device=cpu or auto"


def test_a_gpu_is_the_first_where_no_number_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert refusal("cuda") == f"device=cuda: torch {torch.__version__} sees 0 GPUs: give device=cpu or auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert resolve("cuda", "tf32").type == "cuda"
    assert resolve("cuda:7") == torch.device("cuda:7")


@pytest.mark.parametrize("device", ["cuda:128", "cuda:256", "cuda:01", "cuda:99999999999999999999"])
def test_a_number_that_torch_cannot_hold_is_refused_as_absent(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError) as caught:
        TrainConfig.parse({"device": device})
    assert str(caught.value) == f"device={device}: choose auto, cpu, cuda (a GPU) or cuda:N"


@pytest.mark.parametrize(("there", "found"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch, there, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    assert resolve("auto").type == resolve("auto", "bf16").type == found


# The console


RECORD = Record(3, 0.12345, 0.9512, 0.2, 0.90004, 1.26, 12345.6, math.nan, math.nan, math.nan, math.nan, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_outside_a_terminal_an_epoch_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(50, 40) as progress:
        progress.tick(16)
        for number in (3, 12):
            progress.watch(replace(RECORD, number=number))
    rest = "/50  train 0.1235 0.9512  val 0.2000 0.9000  1.3 s  12,346 images/s\n"
    assert capsys.readouterr().out == f"epoch  3{rest}epoch 12{rest}"
    assert sys.stderr.getvalue() == ""


def test_trouble_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(9, 40) as progress:
        for number, trouble in ((1, ""), (2, "val accuracy 0.1 is at chance (0.1)"), (3, "still"), (4, "")):
            progress.watch(replace(RECORD, number=number, trouble=trouble))
    assert sys.stderr.getvalue() == (
        "warning: epoch 2 looks collapsed: val accuracy 0.1 is at chance (0.1); try a smaller loc_lr_multiplier or lr\n"
    )
    assert capsys.readouterr().out.count("\n") == 4


def test_in_a_terminal_a_bar_counts_the_images_of_the_whole_run_from_where_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(3, 40, done=2) as progress:
        assert (progress.bar.n, progress.bar.total) == (80, 120)
        for n in (16, 16, 8):
            progress.tick(n)
        progress.watch(RECORD)
        assert progress.bar.n == 120
    shown = sys.stderr.getvalue()
    assert "epoch 2/3" in shown and "epoch 3/3" in shown and "val 0.2000, val accuracy 0.9000" in shown
    assert capsys.readouterr().out == ""


def test_progress_watches_a_real_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    cfg = config(epochs=2)
    with Progress(cfg.epochs, 40) as progress:
        for epoch in fit(fresh(cfg), some(40), some(10), cfg, tick=progress.tick):
            progress.watch(epoch.record)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/2", "2/2"]

"""Which engine trains, and that none of them learns anything else than the plain one."""

import copy
import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from stn_pipeline.compiler import CompilerError
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, load
from stn_pipeline.data.splits import Distorted
from stn_pipeline.errors import ConfigError
from stn_pipeline.model import Network, build
from stn_pipeline.model.layers import Stage
from stn_pipeline.training import engine as engine_module
from stn_pipeline.training import fit, score
from stn_pipeline.training.captured import STEPS_A_REPLAY, CapturedSteps
from stn_pipeline.training.engine import choose_engine, engine_of, with_one_engine
from stn_pipeline.training.step import Steps, make_optimizer

MNIST = ((1, 28, 28), 54_000)
DIGITS = ((1, 8, 8), 1_293)
ARMS = [
    {"transform": "none"},
    {"transform": "affine"},
    {"transform": "diffeo", "coordconv": True, "coordconv_r": True},
    {"transform": "tps", "padding": "border"},
    {"transform": "cpab", "iterations": 2},
    {"transform": "cpab", "cpab_boundary": "fixed", "arch": "stcnn"},
]


def config(**knobs: Any) -> TrainConfig:
    return TrainConfig.parse({"dataset": "digits", "device": "cpu", "epochs": 2, "batch_size": 16, **knobs})


@pytest.fixture(scope="module")
def splits():
    return load(config(), announce=lambda line: None)


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory, monkeypatch):
    """A compiler that is never asked: a stage with a `kernel` is told from one without."""
    monkeypatch.setattr(engine_module, "is_compiled", lambda geometries: False)


@pytest.fixture
def compiled(monkeypatch):
    """Compile for real."""
    monkeypatch.undo()
    try:
        network = build(config(), (1, 8, 8), 10)
        choose_engine(network, config(compile="on"), 1)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def pretended(monkeypatch):
    """Choose, but compile nothing."""
    monkeypatch.setattr(Stage, "use_kernel", lambda self: None)
    monkeypatch.setattr(engine_module, "compile_programs", lambda programs: None)


@pytest.mark.parametrize(
    ("knobs", "data", "engine"),
    [
        ({"epochs": 5}, MNIST, "kernels"),
        ({"epochs": 1}, MNIST, "plain"),
        ({"epochs": 1, "compile": "on"}, MNIST, "kernels"),
        ({"epochs": 1, "transform": "tps"}, MNIST, "plain"),
        ({"epochs": 1, "transform": "cpab"}, MNIST, "kernels"),  # its plain flow is the dearest of all
        ({"epochs": 5, "transform": "cpab"}, DIGITS, "plain"),
        ({"epochs": 50, "compile": "off"}, MNIST, "plain"),
        ({"epochs": 50, "precision": "bf16"}, MNIST, "plain"),
        ({"epochs": 20}, DIGITS, "plain"),
        ({"epochs": 20, "compile": "on"}, DIGITS, "kernels"),
        ({"epochs": 50}, ((3, 1024, 1024), 100), "plain"),
    ],
)
def test_the_engine_is_chosen_by_knobs_and_data_alone(pretended, knobs, data, engine):
    shape, n_images = data
    assert choose_engine(build(config(**knobs), shape, 10), config(**knobs), n_images) == engine


@pytest.mark.parametrize(
    ("knobs", "shape", "told"),
    [
        ({"precision": "bf16"}, (1, 8, 8), "compile=on: kernels compute in fp32, got precision=bf16: give precision=fp32 or compile=off"),
        ({}, (3, 1024, 1024), "compile=on: the images are too large for kernels to pay: give compile=off or smaller images"),
    ],
)
def test_what_cannot_be_on_is_one_line(pretended, knobs, shape, told):
    with pytest.raises(ConfigError, match=told):
        choose_engine(build(config(), shape, 10), config(compile="on", **knobs), 100)


def test_without_a_compiler_auto_goes_on_and_says_so_and_on_does_not(monkeypatch):
    def refuse(programs: Any) -> None:
        raise CompilerError("no C++ compiler (g++) is on the path")

    monkeypatch.setattr(engine_module, "compile_programs", refuse)
    told: list[str] = []
    network = build(config(), (1, 28, 28), 10)
    assert choose_engine(network, config(epochs=50), 54_000, told.append) == "plain"
    slower = "training goes on without compiled kernels, about three times slower: no C++ compiler (g++) is on the path"
    assert told == ["compiling kernels for this processor: a few seconds, once", slower]
    with pytest.raises(ConfigError, match="compile=on: no C"):
        choose_engine(network, config(compile="on"), 54_000)


def run(cfg: TrainConfig, splits: Any, n: int = 200) -> tuple[Network, list[float]]:
    network = build(cfg, splits.image_shape, 10, splits.mean, splits.std)
    train, val = splits.train.take(np.arange(n)), splits.val
    return network, [loss for epoch in fit(network, train, val, cfg) for loss in (epoch.record.train_loss, epoch.record.val_loss)]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(map(str, arm.values())))
def test_kernels_learn_what_the_plain_network_learns(compiled, splits, arm):
    # by SGD: Adam makes a whole step of the sign of a gradient that is rounding alone
    (plain, losses), (fast, same) = (run(config(compile=how, optimizer="sgd", lr=0.02, **arm), splits) for how in ("off", "on"))
    assert all(module._kernel is not None for module in fast.modules() if isinstance(module, Stage))
    assert_close(torch.tensor(same), torch.tensor(losses), rtol=1e-4, atol=0)
    assert (arm["transform"] == "cpab") == (fast.transformer is not None and fast.transformer._compiled is not None)
    for name, weight in plain.state_dict().items():
        assert_close(fast.state_dict()[name], weight, rtol=0, atol=2e-4)


def test_a_run_on_kernels_that_goes_on_is_the_unbroken_run_bit_for_bit(compiled, splits):
    cfg = config(compile="on", epochs=4)
    train, val = splits.train.take(np.arange(100)), splits.val
    epochs = fit(build(cfg, splits.image_shape, 10), train, val, cfg)
    next(epochs)
    state = copy.deepcopy(next(epochs).state)
    unbroken = list(epochs)[-1].state
    gone_on = list(fit(build(cfg, splits.image_shape, 10), train, val, cfg, state))[-1].state
    assert all(torch.equal(gone_on.network[name], weight) for name, weight in unbroken.network.items())


def test_scores_on_kernels_are_those_of_the_plain_network(compiled, splits):
    cfg = config(compile="on")
    network, _ = run(cfg, splits)
    plain = build(cfg, splits.image_shape, 10)
    plain.load_state_dict(network.state_dict())
    fast, slow = score(network, splits.val), score(plain, splits.val)
    assert fast.loss == pytest.approx(slow.loss, rel=1e-5) and torch.equal(fast.predicted, slow.predicted)


# Captured steps: everything but the capture


class Recorder:
    """A capture on a machine without a GPU: the work is run some times before, as a real one is, and replayed by running it."""

    def __init__(self) -> None:
        self.n_captured = self.n_replayed = 0

    def __call__(self, work: Any) -> Any:
        self.n_captured += 1
        for _ in range(3):
            work()

        def replay() -> None:
            self.n_replayed += 1
            work()

        return replay


def steps_of(kind: Any, cfg: TrainConfig, train: Split, splits: Any, state: Any = None, **more: Any) -> tuple[list[Any], Any, Any]:
    """Two epochs of steps; their losses and counts, the network and the optimiser after them."""
    network = build(cfg, splits.image_shape, 10, splits.mean, splits.std)
    optimizer = make_optimizer(network, cfg)
    if state is not None:
        network.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    steps, told, ticks = kind(network, optimizer, train, cfg, **more), [], []
    for number in (1, 2):
        torch.manual_seed(number)
        losses, n_right = steps.epoch(number, torch.randperm(len(train)), ticks.append)
        told.append((losses, n_right))
    assert sum(ticks) == 2 * len(train)
    return told, network, optimizer


OPTIMISERS = [
    {"optimizer": "adam"},
    {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.01},
    {"optimizer": "sgd", "schedule": "cosine", "lr": 0.05},
]


@pytest.mark.parametrize("knobs", OPTIMISERS, ids=lambda knobs: knobs["optimizer"])
@pytest.mark.parametrize("n", [16 * (2 * STEPS_A_REPLAY + 3) + 5, 16 * STEPS_A_REPLAY, 40])
def test_captured_steps_are_the_plain_steps(splits, knobs, n):
    cfg, train, recorder = config(**{"lr": 1e-3} | knobs), splits.train.take(np.arange(n)), Recorder()
    plain, network, _ = steps_of(Steps, cfg, train, splits)
    captured, same, _ = steps_of(CapturedSteps, cfg, train, splits, capture=recorder)
    for (losses, right), (expected, n_right) in zip(captured, plain, strict=True):
        assert_close(losses, expected, rtol=1e-4, atol=1e-6)
        assert right == n_right
    for name, weight in network.state_dict().items():
        assert_close(same.state_dict()[name], weight, rtol=0, atol=1e-5)
    n_full = n // 16
    blocks, rest = divmod(n_full, STEPS_A_REPLAY)
    assert recorder.n_replayed == 2 * (blocks + rest) and recorder.n_captured == bool(blocks) + bool(rest)


@pytest.mark.parametrize("knobs", OPTIMISERS, ids=lambda knobs: knobs["optimizer"])
@pytest.mark.parametrize(("first", "then"), [(Steps, CapturedSteps), (CapturedSteps, Steps)])
def test_either_kind_goes_on_from_the_others_state(splits, knobs, first, then):
    cfg, train = config(**{"lr": 1e-3, "epochs": 4} | knobs), splits.train.take(np.arange(70))
    more = {CapturedSteps: {"capture": Recorder()}, Steps: {}}
    _, network, optimizer = steps_of(first, cfg, train, splits, **more[first])
    state = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    _, expected, _ = steps_of(first, cfg, train, splits, copy.deepcopy(state), **more[first])
    _, got, _ = steps_of(then, cfg, train, splits, state, **more[then])
    for name, weight in expected.state_dict().items():
        assert_close(got.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_captured_steps_train_on_what_they_are_fed(splits):
    """Distorted images are new each epoch; a graph reads them where it was captured, and what is fed stays as it is."""
    cfg, train = config(optimizer="sgd"), Distorted.of(splits.train.take(np.arange(16 * 20)), "rotated", 0)
    told = []
    for kind, more in ((Steps, {}), (CapturedSteps, {"capture": Recorder()})):
        network = build(cfg, splits.image_shape, 10)
        steps = kind(network, make_optimizer(network, cfg), train, cfg, **more)
        for number in (1, 2, 3):
            torch.manual_seed(number)
            steps.feed(train.draw(number))
            told.append(steps.epoch(number, torch.arange(len(train)), lambda n: None)[0])
    for plain, captured in zip(told[:3], told[3:], strict=True):
        assert_close(captured, plain, rtol=1e-4, atol=1e-6)
    assert torch.equal(train.images, Distorted.of(splits.train.take(np.arange(16 * 20)), "rotated", 0).images)


def test_on_a_gpu_steps_are_captured_unless_that_is_off(monkeypatch):
    network = build(config(), (1, 8, 8), 10)
    somewhere = dataclasses.make_dataclass("Parameter", ["device"])(torch.device("cuda"))
    monkeypatch.setattr(network, "parameters", lambda: iter([somewhere]))
    assert [choose_engine(network, config(compile=how), 100) for how in ("auto", "on", "off")] == ["captured", "captured", "plain"]


# One engine for all that is compared


def asked(splits: Any, *arms: dict[str, Any]) -> list[Any]:
    return [(config(**arm), splits, torch.device("cpu")) for arm in arms]


PAYS, PAYS_NOT = {"epochs": 2000}, {"epochs": 2}


@pytest.mark.parametrize(
    ("arms", "compile"),
    [
        ([PAYS, PAYS_NOT], ["on", "on"]),  # each by itself: kernels and plain
        ([PAYS_NOT, PAYS_NOT], ["off", "off"]),
        ([PAYS, {**PAYS, "precision": "bf16"}], ["off", "off"]),
        ([PAYS, {**PAYS, "compile": "off"}], ["auto", "off"]),  # somebody compares engines
    ],
)
def test_arms_that_are_compared_get_one_engine(splits, pretended, arms, compile):
    given = asked(splits, *arms)
    chosen = with_one_engine(given)
    assert [one.compile for one in chosen] == compile
    assert all(one.learning_knobs() == config.learning_knobs() for one, (config, _, _) in zip(chosen, given, strict=True))
    if "auto" not in compile:
        assert len({choose_engine(build(one, (1, 8, 8), 10), one, len(splits.train)) for one in chosen}) == 1


def test_without_a_compiler_all_arms_are_plain_and_it_is_said_once(splits, monkeypatch):
    def refuse(programs: Any) -> None:
        raise CompilerError("no C++ compiler (g++) is on the path")

    monkeypatch.setattr(engine_module, "compile_programs", refuse)
    told: list[str] = []
    assert [one.compile for one in with_one_engine(asked(splits, PAYS, PAYS_NOT), told.append)] == ["off", "off"]
    assert len([line for line in told if "slower: no C++ compiler" in line]) == 1


def test_on_a_gpu_auto_is_one_engine_already(splits):
    arms = [(config(), splits, torch.device("cuda")), (config(epochs=50, device="cuda"), splits, torch.device("cuda"))]
    assert [one.compile for one in with_one_engine(arms)] == ["auto", "auto"]
    assert [engine_of(config(compile=how), (1, 8, 8), 10, 1293, torch.device("cuda")) for how in ("auto", "on", "off")] == [
        "captured", "captured", "plain",
    ]  # fmt: skip


def test_an_engine_is_told_without_compiling(monkeypatch):
    monkeypatch.setattr(engine_module, "compile_programs", lambda programs: pytest.fail("compiled"))
    cpu = torch.device("cpu")
    assert engine_of(config(epochs=5), *MNIST[:1], 10, MNIST[1], cpu) == "kernels"
    assert engine_of(config(epochs=1), *MNIST[:1], 10, MNIST[1], cpu) == "plain"
    assert engine_of(config(epochs=1, compile="on"), *MNIST[:1], 10, MNIST[1], cpu) == "kernels"


def test_fit_is_told_the_engine_or_asks_for_it_once(splits, monkeypatch):
    calls = []
    monkeypatch.setattr(sys.modules[fit.__module__], "choose_engine", lambda *given: calls.append(given) or "plain")
    cfg, train = config(), splits.train.take(np.arange(40))
    list(fit(build(cfg, (1, 8, 8), 10), train, splits.val, cfg, engine="plain"))
    assert calls == []
    list(fit(build(cfg, (1, 8, 8), 10), train, splits.val, cfg))
    assert len(calls) == 1

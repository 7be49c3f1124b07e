"""How often verdicts are wrong, and how often they find what is there, over thousands of made-up studies. Figures: `pytest -m slow -s`.

Targets: any false verdict in at most 5.5 % of files in every case, a false `better` under divergence in at most 2.5 %, intervals that
hold the truth in 95 ± 1.5 % where nothing collapses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from stn_pipeline.comparing.arms import Trained
from stn_pipeline.comparing.paired import paired
from stn_pipeline.comparing.verdicts import Rules, Verdict, decide

pytestmark = pytest.mark.slow

SEED_SD, OWN_SD, MEAN = 0.07, 0.07, 0.04  # of log loss or of loss / mean: what a seed shares, what each training adds; nats
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def normal(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=size)


def skewed(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return (rng.exponential(size=size) - 1) + 0.3 * rng.normal(size=size)


@dataclass(frozen=True)
class World:
    """How losses come about: their noise, by how much each arm is truly better (-0.15: 15 % less), how often a training is lost."""

    draw: Draw = normal
    effect: float = 0.0
    lost: float = 0.0  # probability, of every training by itself
    hard: float = 0.0  # an arm other than the baseline is lost where its own loss is among this share of the largest

    def study(self, rng: np.random.Generator, n_blocks: int, n_arms: int, n_seeds: int) -> list[dict[str, dict[int, Trained]]]:
        tables = []
        for _ in range(n_blocks):
            noise = SEED_SD * self.draw(rng, (1, n_seeds)) + OWN_SD * self.draw(rng, (n_arms + 1, n_seeds))
            losses = MEAN * (1 + np.r_[0.0, [self.effect] * n_arms][:, None]) * (1 + noise)
            lost = rng.random(losses.shape) < self.lost
            if self.hard:
                lost[1:] |= noise[1:] > np.quantile(noise, 1 - self.hard)
            names = ["base", *(f"arm{i}" for i in range(n_arms))]
            tables.append(
                {
                    name: {
                        seed: Trained("diverged", {}, True) if gone else Trained("done", {"test/loss": loss, "test/accuracy": 0.9})
                        for seed, (loss, gone) in enumerate(zip(losses[i].tolist(), lost[i].tolist(), strict=True))
                    }
                    for i, name in enumerate(names)
                }
            )
        return tables


def verdicts(world: World, rules: Rules, n_blocks: int, n_arms: int, n_seeds: int, studies: int, seed: int = 0) -> list[list[Verdict]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(studies):
        tables = world.study(rng, n_blocks, n_arms, n_seeds)
        found.append([one for block in decide(tables, "base", rules, range(n_seeds)) for one in block.values()])
    return found


def share(found: list[list[Verdict]], kinds: tuple[str, ...], any_of: bool = True) -> float:
    return float(np.mean([(any if any_of else all)(one.kind in kinds for one in study) for study in found]))


WORLDS = {
    "normal": World(normal),
    "skewed": World(skewed),
    "collapsing": World(normal, lost=0.1),
    "skewed, collapsing": World(skewed, lost=0.1),
}
SHAPES = {"one arm": (1, 1), "4 arms": (1, 4), "2 arms in 5 blocks": (5, 2)}


@pytest.mark.parametrize("n", [3, 5, 10, 20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_arms_that_are_alike_are_told_apart_in_at_most_5_files_of_100(world, shape, n):
    blocks, arms = SHAPES[shape]
    found = verdicts(WORLDS[world], Rules(), blocks, arms, n, 2000 // (blocks * arms) + 600)
    wrong = share(found, ("better", "worse"))
    print(f"\nfamily-wise error, {world}, {shape}, {n} seeds: {100 * wrong:.1f} %")
    assert wrong <= 0.055 + 0.015  # the standard error of the simulation is 0.005 to 0.008


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", WORLDS)
def test_looking_three_times_costs_nothing(world, shape):
    blocks, arms = SHAPES[shape]
    found = verdicts(WORLDS[world], Rules(looks=(5, 10, 20)), blocks, arms, 20, 1000 // (blocks * arms) + 600)
    wrong = share(found, ("better", "worse"))
    print(f"\nfamily-wise error over looks at 5, 10, 20: {world}, {shape}: {100 * wrong:.1f} %")
    assert wrong <= 0.055 + 0.015


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("hard", [0.1, 0.3, 0.5])
def test_an_arm_that_loses_its_hard_seeds_is_not_called_better(hard, n):
    found = verdicts(World(normal, hard=hard), Rules(), 1, 1, n, 3000)
    wrong = share(found, ("better",))
    print(f"\nfalse better, the worst {100 * hard:.0f} % of seeds lost, {n} seeds: {100 * wrong:.2f} %")
    assert wrong <= 0.025
    assert all(not (one.kind == "better" and not one.lost_more and one.lost > one.baseline_lost) for study in found for one in study)


@pytest.mark.parametrize("lost", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [6, 10, 20])
def test_equal_arms_that_are_lost_equally_often_are_not_called_better(lost, n):
    found = verdicts(World(skewed, lost=lost), Rules(), 1, 1, n, 3000)
    wrong = share(found, ("better",))
    print(f"\nfalse better, {100 * lost:.0f} % of all trainings lost, {n} seeds: {100 * wrong:.2f} %")
    assert wrong <= 0.025 + 0.006


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("world", ["normal", "skewed"])
@pytest.mark.parametrize("effect", [-0.05, 0.05])
def test_what_differs_by_the_margin_is_called_equivalent_in_at_most_5_files_of_100(world, effect, n):
    for shape in ("one arm", "4 arms"):
        blocks, arms = SHAPES[shape]
        # a skewed loss and a margin of 5 % are judged where the seeds' spread leaves a chance at all
        found = verdicts(World(WORLDS[world].draw, effect), Rules(margin=0.05), blocks, arms, n, 1500 // arms + 500)
        wrong = share(found, ("equivalent",))
        print(f"\nfalse equivalence at the margin ({effect:+.0%}), {world}, {shape}, {n} seeds: {100 * wrong:.1f} %")
        assert wrong <= 0.055 + 0.015


def test_equal_arms_are_called_equivalent_where_the_seeds_suffice():
    shares = [share(verdicts(World(), Rules(margin=0.1), 1, 1, n, 800), ("equivalent",)) for n in (5, 10, 20)]
    print(f"\nequivalent within 10 %, truly equal, 5, 10, 20 seeds: {', '.join(f'{100 * one:.0f} %' for one in shares)}")
    assert shares == sorted(shares) and shares[-1] > 0.9


@pytest.mark.parametrize("world", ["normal", "skewed"])
@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_intervals_hold_the_truth_in_95_of_100(world, n):
    rng, truth, caught = np.random.default_rng(n), -0.15, np.zeros(2)
    for _ in range(4000):
        (table,) = World(WORLDS[world].draw, truth).study(rng, 1, 1, n)
        values = [[one.figures["test/loss"] for one in table[arm].values()] for arm in ("arm0", "base")]
        result = paired(*values)
        caught += result.low < truth * MEAN < result.high, result.relative_low < truth < result.relative_high
    t, fieller = caught / 4000
    print(f"\ncoverage, {world}, {n} seeds: t {100 * t:.1f} %, Fieller {100 * fieller:.1f} %")
    assert abs(t - 0.95) <= 0.015 and abs(fieller - 0.95) <= 0.015


def test_more_seeds_find_more_though_a_tenth_of_them_is_lost():
    shares = {n: share(verdicts(World(effect=-0.15, lost=0.1), Rules(), 1, 1, n, 1200), ("better",)) for n in (5, 10, 20)}
    print(f"\npower at -15 %, 10 % of trainings lost, by seeds: {', '.join(f'{n}: {100 * one:.0f} %' for n, one in shares.items())}")
    assert shares[5] < shares[10] < shares[20] and shares[20] > 0.7


def test_planned_looks_find_a_large_effect_with_fewer_seeds():
    effect = -1.2 * np.sqrt(2) * OWN_SD  # 1.2 standard deviations of the differences
    found = [study[0] for study in verdicts(World(effect=effect), Rules(looks=(5, 10, 20)), 1, 1, 20, 2000)]
    power, seeds = np.mean([one.kind == "better" for one in found]), np.mean([len(one.seeds) for one in found])
    print(f"\nlooks at 5, 10, 20 at an effect of 1.2 sd: found in {100 * power:.1f} %, {seeds:.1f} seeds in the mean")
    assert power > 0.97 and seeds < 15


@pytest.mark.parametrize("n", [5, 10, 20])
def test_a_small_true_effect_is_never_said_to_go_the_other_way(n):
    found = verdicts(World(effect=-0.02), Rules(), 1, 1, n, 2500)
    wrong = share(found, ("worse",))
    print(f"\nat a true -2 %, {n} seeds: called worse in {100 * wrong:.2f} %, better in {100 * share(found, ('better',)):.1f} %")
    assert wrong <= 0.025

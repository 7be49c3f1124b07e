"""What a comparison decides: better, worse, equivalent within a margin, or nothing shown; wrong in at most 5 files of 100.

All verdicts of a file, over its blocks (data sets, settings) and arms, are one family, corrected by Holm. Where nothing was
lost the test is a paired t test; once a training of either arm diverged or collapsed it is a signed-rank test over all
seeds, in which such a training is the worst outcome. Where the data are looked at several times, the 5 % are spent over
the looks. Better and worse are one kind of verdict, equivalent is another: each kind is held to 5 %.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from stn_pipeline.comparing.arms import ENDED, Table, Trained
from stn_pipeline.comparing.measures import LOSS, Measure
from stn_pipeline.comparing.paired import ALPHA, equivalence_p, t_test
from stn_pipeline.comparing.ranks import difference, outcome, signed_rank

SPENDING = 1.5  # the power of the share of seeds by which the 5 % are spent

Kind = Literal["better", "worse", "equivalent", "not shown"]
Test = Literal["t", "signed rank"]


@dataclass(frozen=True)
class Rules:
    """How verdicts are made, said before the data are seen.

    measure: the one that decides.   margin: what counts as equal, a share of the baseline's mean (of a relative measure) or
    an absolute difference; None where equality is not asked.   looks: after how many seeds the data are looked at; none: once.
    """

    measure: Measure = LOSS
    margin: float | None = None
    looks: tuple[int, ...] = ()

    @property
    def levels(self) -> tuple[float, ...]:
        """The share of the 5 % that each look may spend.

        Source: the power family of Kim & DeMets 1987, Biometrika 74(1), its increments taken as a Bonferroni correction.
        """
        if not self.looks:
            return (ALPHA,)
        spent = [ALPHA * (n / self.looks[-1]) ** SPENDING for n in (0, *self.looks)]
        return tuple(after - before for before, after in zip(spent, spent[1:], strict=False))


@dataclass(frozen=True)
class Verdict:
    """What is decided of an arm against the baseline in one block.

    seeds: those that were judged.   test: by which; None where there is nothing to test.   p, p_equivalent: of a difference, and of
    equivalence, each corrected by Holm over `n_verdicts`; NaN where not tested.   level: what they are held against, at look number
    `look` of `n_looks`.   lost, baseline_lost: diverged or collapsed among the seeds.
    within_margin: decided, yet the difference is smaller than the margin.
    """

    arm: str
    baseline: str
    measure: Measure
    kind: Kind
    seeds: tuple[int, ...]
    test: Test | None
    p: float
    p_equivalent: float
    level: float
    n_verdicts: int
    look: int
    n_looks: int
    margin: float | None
    lost: int
    baseline_lost: int
    within_margin: bool = False

    @property
    def is_decided(self) -> bool:
        """Whether more seeds are not needed."""
        return self.kind != "not shown"

    @property
    def p_decisive(self) -> float:
        """The corrected p of what is said: of equivalence where that is the verdict, of a difference otherwise."""
        return self.p_equivalent if self.kind == "equivalent" else self.p

    @property
    def lost_more(self) -> bool:
        """Whether the arm lost more seeds than the baseline: then it is not simply better."""
        return self.lost > self.baseline_lost


class _Tested(NamedTuple):
    seeds: tuple[int, ...]
    test: Test | None
    p: float
    p_equivalent: float
    is_better: bool
    lost: int
    baseline_lost: int


Key = tuple[int, str]  # block and arm


def decide(tables: Sequence[Table], baseline: str, rules: Rules, seeds: Sequence[int], look: int | None = None) -> list[dict[str, Verdict]]:
    """Return the verdicts of a file: of each block by arm, the baseline apart.

    A verdict that was reached at one look stands: what its arm does at later looks does not change it.

    Args:
        tables: what came of each training, a block each.
        baseline: the arm that the others are compared with.
        rules: how.
        seeds: in the order in which they are trained.
        look: number of looks taken so far, from 1; the last by default.
    """
    keys = [(block, arm) for block, table in enumerate(tables) for arm in table if arm != baseline]
    looks, levels = rules.looks or (len(seeds),), rules.levels
    found: dict[Key, Verdict] = {}
    for number, (n, level) in enumerate(zip(looks, levels, strict=True), 1):
        if look is not None and number > look:
            break
        open_keys = [key for key in keys if not (key in found and found[key].is_decided)]
        tested = {key: _test(tables[key[0]], key[1], baseline, rules, seeds[:n]) for key in open_keys}
        n_differ = len(keys) - sum(verdict.kind in ("better", "worse") for verdict in found.values())
        n_equivalent = len(keys) - sum(verdict.kind == "equivalent" for verdict in found.values())
        p = _corrected({key: one.p for key, one in tested.items()}, n_differ)
        p_equivalent = _corrected({key: one.p_equivalent for key, one in tested.items()}, n_equivalent)
        for key, one in tested.items():
            kind: Kind = "not shown"
            if p[key] <= level:
                kind = "better" if one.is_better else "worse"
            elif p_equivalent[key] <= level:
                kind = "equivalent"
            is_small = p_equivalent[key] <= level
            found[key] = Verdict(
                arm=key[1], baseline=baseline, measure=rules.measure, kind=kind, seeds=one.seeds, test=one.test,
                p=p[key], p_equivalent=p_equivalent[key], level=level, n_verdicts=len(keys), look=number, n_looks=len(looks),
                margin=rules.margin, lost=one.lost, baseline_lost=one.baseline_lost,
                within_margin=is_small and kind in ("better", "worse"),
            )  # fmt: skip
    return [{arm: found[block, arm] for arm in table if arm != baseline} for block, table in enumerate(tables)]


def judge(arm: Mapping[int, Trained], baseline: Mapping[int, Trained], names: tuple[str, str], rules: Rules) -> Verdict:
    """Return the verdict on one arm against another, the only question that is asked."""
    table = {names[0]: arm, names[1]: baseline}
    return decide([table], names[1], rules, sorted(arm.keys() | baseline.keys()))[0][names[0]]


def _test(table: Table, arm: str, baseline: str, rules: Rules, seeds: Sequence[int]) -> _Tested:
    measure, margin = rules.measure, rules.margin
    ended = [seed for seed in seeds if all(_ended(table[name].get(seed), measure) for name in (arm, baseline))]
    ours, theirs = ([table[name][seed] for seed in ended] for name in (arm, baseline))
    lost, baseline_lost = sum(one.is_lost for one in ours), sum(one.is_lost for one in theirs)
    nothing = math.nan
    if len(ended) < 2:
        return _Tested(tuple(ended), None, nothing, nothing, False, lost, baseline_lost)
    if lost or baseline_lost:
        ranked = [
            [outcome(_value(one, measure), one.is_lost, smaller_is_better=measure.smaller_is_better) for one in trained]
            for trained in (ours, theirs)
        ]
        centred, p = signed_rank([difference(a, b) for a, b in zip(*ranked, strict=True)])
        better = (centred < 0) == measure.smaller_is_better
        return _Tested(tuple(ended), "signed rank", p, nothing, better, lost, baseline_lost)
    a, b = ([_value(one, measure) for one in trained] for trained in (ours, theirs))
    mean, _, p = t_test(a, b)
    equal = nothing if margin is None else equivalence_p(a, b, margin, relative=measure.unit.relative)
    better = (mean < 0) == measure.smaller_is_better
    return _Tested(tuple(ended), None if math.isnan(p) else "t", p, equal, better, 0, 0)


def _ended(one: Trained | None, measure: Measure) -> bool:
    """Say whether an outcome counts: a training that is missing, failed for another reason or was not measured says nothing of its arm."""
    return one is not None and one.state in ENDED and (one.is_lost or measure.name in one.figures)


def _value(one: Trained, measure: Measure) -> float:
    return float(one.figures.get(measure.name, math.nan))


def _corrected(p: Mapping[Key, float], n: int) -> dict[Key, float]:
    """Return p values corrected by Holm as n of a family, of which those that are not given cannot be rejected any more."""
    made = {key: value for key, value in p.items() if not math.isnan(value)}
    padded = holm([*made.values(), *[1.0] * (n - len(p))])
    return dict.fromkeys(p, math.nan) | dict(zip(made, padded, strict=False))


def holm(p: Sequence[float]) -> list[float]:
    """Return p values corrected for their number; a NaN is a test that was not made, and does not count.

    Source: Holm 1979, Scand. J. Statist. 6(2).   Checked against: the closed test procedure over all subsets.
    """
    made = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    corrected, most = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(made):
        most = max(most, min(1.0, (len(made) - rank) * value))
        corrected[i] = most
    return corrected

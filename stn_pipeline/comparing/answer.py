"""The answer of one block: its verdicts, what is missing or collapsed, and all of it in words, as Markdown and as plain values."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from stn_pipeline.comparing.arms import MEASURES, Collapses, Contrast, Measure, SinglePair, Table, collapses, contrasts
from stn_pipeline.comparing.paired import ALPHA, Paired
from stn_pipeline.texts import markdown

LOSS = MEASURES[0]
STATES = {"diverged": "diverged", "failed": "failed", "missing": "is missing"}


@dataclass(frozen=True)
class Answer:
    """All that a block's table says.

    title: data set and setting.   table: what came of each training.   claims: by arm, a relative difference in test loss.
    single_pairs: McNemar's test of each seed by itself, where predictions are kept.
    """

    title: str
    table: Table
    baseline: str
    claims: Mapping[str, float] = field(default_factory=dict)
    single_pairs: tuple[SinglePair, ...] = ()

    @property
    def arms(self) -> list[str]:
        """The baseline and then the others."""
        return [self.baseline, *(arm for arm in self.table if arm != self.baseline)]

    @cached_property
    def contrasts(self) -> dict[Measure, list[Contrast]]:
        """The verdicts by measure, an arm each."""
        return {measure: contrasts(self.table, self.baseline, measure, self.claims) for measure in MEASURES}

    @cached_property
    def collapses(self) -> list[Collapses]:
        """What collapsed, by arm."""
        return collapses(self.table, self.baseline)

    def of(self, arm: str, measure: Measure = LOSS) -> Contrast | None:
        """Return the verdict on an arm in a measure."""
        return next((contrast for contrast in self.contrasts[measure] if contrast.arm == arm), None)

    def verdicts(self) -> dict[str, list[str]]:
        """Return the answer: for each arm a sentence a measure."""
        return {
            arm: [contrast.sentence + "." for measure in MEASURES if (contrast := self.of(arm, measure))]
            for arm in self.arms[1:]
            if self.of(arm)
        }

    def sentences(self) -> list[str]:
        """Return all that is to be said: the answer, then what is to be known beside it."""
        return [line for lines in self.verdicts().values() for line in lines] + self.beside()

    def beside(self) -> list[str]:
        """Return what is to be known beside the answer: collapses, what is missing, claims."""
        return self.collapses_in_words() + self.notes() + self.claims_in_words()

    def collapses_in_words(self) -> list[str]:
        """Return what collapsed, and each difference without the seeds that did."""
        lines = []
        for one in self.collapses:
            if one.n_collapsed:
                against = "" if math.isnan(one.p) else f" (Fisher's exact test against {self.baseline}: p = {one.p:.2g})"
                lines.append(f"{one.n_collapsed} of {one.n} trainings of {one.arm} collapsed{against}.")
        for arm in self.arms[1:]:
            found = [(measure, contrast.without) for measure in MEASURES if (contrast := self.of(arm, measure)) and contrast.without]
            if found:
                units = ["" if measure.unit.relative else f" {measure.unit.name}" for measure, _ in found]
                told = " and ".join(
                    f"{_difference(without, measure)}{unit} in {measure.name.replace('/', ' ')}"
                    for (measure, without), unit in zip(found, units, strict=True)
                )
                n = found[0][1].n
                lines.append(f"{arm} without the seeds that collapsed in it or in {self.baseline}: {told}, {n} seeds.")
        return lines

    def notes(self) -> list[str]:
        """Return what is missing: seeds that an arm has not, and why."""
        lines = []
        for arm, by_seed in self.table.items():
            seeds = {one for trained in self.table.values() for one in trained}
            for state, words in STATES.items():
                lost = sorted(seed for seed in seeds if (by_seed[seed].state if seed in by_seed else "missing") == state)
                if lost:
                    why = next((by_seed[seed].why for seed in lost if seed in by_seed and by_seed[seed].why), "")
                    lines.append(f"{arm}: seed {', '.join(map(str, lost))} {words}{': ' + why if why else ''}; its pairs are left out.")
        missing = [arm for arm in self.arms[1:] if self.of(arm) is None]
        return lines + [f"{arm} shares no seed with {self.baseline} that both have done: there is nothing to compare." for arm in missing]

    def claims_in_words(self) -> list[str]:
        """Return what it would take to see each difference that somebody claims."""
        lines = []
        for contrast in self.contrasts[LOSS]:
            if not contrast.claimed:
                continue
            usual = contrast.without or contrast.t
            claim, low, high = self.claims[contrast.arm], usual.relative_low, usual.relative_high
            among = ", without the collapsed seeds," if contrast.without else ""
            told = f"Claimed for {contrast.arm}: {_percent(claim)} test loss. "
            if not math.isnan(low):
                verdict = "holds" if low <= claim <= high else "excludes"
                told += f"The interval here{among or ','} {_percent(low)} to {_percent(high)}, {verdict} it. "
            if contrast.n_needed is not None:
                told += f"To see a difference of that size 8 times in 10 takes {contrast.n_needed:,} paired seeds; here are {usual.n}."
            lines.append(told.strip())
        return lines

    def single_pairs_in_words(self) -> list[str]:
        """Return for each arm what single pairs would have said, one network against one."""
        lines = []
        for arm in self.arms[1:]:
            pairs = [pair for pair in self.single_pairs if pair.arm == arm]
            better = sum(pair.p <= ALPHA and pair.arm_only > pair.baseline_only for pair in pairs)
            worse = sum(pair.p <= ALPHA and pair.arm_only < pair.baseline_only for pair in pairs)
            if pairs:
                told = f"Seed by seed (McNemar at 5 %), {arm} is better than {self.baseline} in {better} of {len(pairs)} single pairs"
                lines.append(f"{told}, worse in {worse}, neither in {len(pairs) - better - worse}.")
        return lines

    def rows(self) -> list[list[str]]:
        """Return the table of the answer: a heading, then an arm a row."""
        rows = [
            ["arm", "n", "test loss, nats", "difference, 95 % CI", "p (Holm)", "test accuracy", "points, 95 % CI", "p (Holm)", "collapsed"]
        ]
        by_arm = {one.arm: one for one in self.collapses}
        for arm in self.arms:
            row = [arm + (" (baseline)" if arm == self.baseline else ""), str(len(self.values(arm, LOSS)))]
            for measure in MEASURES:
                row.append(_spread(self.values(arm, measure)))
                contrast = self.of(arm, measure)
                row += ["", ""] if contrast is None else [_difference(contrast.t, measure), _p(contrast.p)]
            rows.append([*row, f"{by_arm[arm].n_collapsed} of {by_arm[arm].n}"])
        return rows

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return an arm's figures by seed, where they are done."""
        done = {seed: one for seed, one in self.table[arm].items() if one.state == "done"}
        return {seed: float(one.figures[measure.name]) for seed, one in sorted(done.items())}

    def markdown(self) -> str:
        """Return the table as Markdown."""
        head, *body = [f"| {' | '.join(map(markdown, row))} |" for row in self.rows()]
        return "\n".join([head, "|" + "---|" * len(self.rows()[0]), *body])

    def plain(self) -> dict[str, Any]:
        """Return all figures as JSON can hold them."""
        runs = {
            arm: {str(seed): {"state": one.state, "run_id": one.run_id, "collapsed": one.collapsed} for seed, one in by_seed.items()}
            for arm, by_seed in self.table.items()
        }
        figures = {
            measure.name: {arm: {str(s): v for s, v in self.values(arm, measure).items()} for arm in self.arms} for measure in MEASURES
        }
        return {
            "title": self.title,
            "baseline": self.baseline,
            "answer": self.sentences(),
            "figures": figures,
            "contrasts": [contrast.plain() for measure in MEASURES for contrast in self.contrasts[measure]],
            "collapses": [asdict(one) | {"p": None if math.isnan(one.p) else one.p} for one in self.collapses],
            "single_pairs": [asdict(pair) for pair in self.single_pairs],
            "runs": runs,
        }


def _percent(share: float) -> str:
    digits = 0 if abs(share) >= 0.1 else 1
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def _relative(result: Paired) -> str:
    if result.n == 1 or math.isnan(result.relative_low):
        return _percent(result.relative)
    return f"{_percent(result.relative)} (95 % CI {_percent(result.relative_low)} to {_percent(result.relative_high)})"


def _difference(result: Paired, measure: Measure) -> str:
    unit = measure.unit
    if unit.relative and (result.n == 1 or not math.isnan(result.relative_low)):
        return _relative(result)
    numbers = (value * unit.scale for value in (result.difference, result.low, result.high))
    size, low, high = (f"{value:+.{unit.decimals}f}".replace("-", "−") for value in numbers)
    told = size if result.n == 1 else f"{size} ({low} to {high})"
    return f"{told} {unit.name}" if unit.relative else told


def _p(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _spread(values: Mapping[int, float]) -> str:
    found = list(values.values())
    return "" if not found else f"{fmean(found):.4f}" + (f" ± {stdev(found):.4f}" if len(found) > 1 else "")

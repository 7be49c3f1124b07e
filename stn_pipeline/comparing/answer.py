"""The answer of one block: its verdicts, what is described beside them, what is missing or lost; in words, as Markdown, as plain values."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from stn_pipeline.comparing.arms import Collapses, Contrast, SinglePair, Table, collapses, contrasts
from stn_pipeline.comparing.measures import LOSS, REQUIRED, Measure
from stn_pipeline.comparing.paired import ALPHA, interval
from stn_pipeline.comparing.planning import Needed, needed_for_difference, needed_for_equivalence
from stn_pipeline.comparing.sentences import described, difference, margin, mean_and_spread, needed, p_in_table, percent, verdict_sentence
from stn_pipeline.comparing.verdicts import Rules, Verdict, decide

STATES = {"failed": "failed", "missing": "is missing"}  # that say nothing about the arm
LOST = ("diverged", "crashed")


@dataclass(frozen=True)
class Answer:
    """All that a block's table says.

    title: data set and setting.   where: the same and what else the sentences hold for.   table: what came of each training.
    verdicts: by arm, decided together with the other blocks of the file.   measures: the one that decides, then those that are described.
    claims: by arm, a relative difference in test loss.   single_pairs: McNemar's test of each seed by itself, where predictions are
    kept.   caveats: what a reader must know of how the runs came about.
    """

    title: str
    where: str
    table: Table
    baseline: str
    verdicts: Mapping[str, Verdict]
    measures: tuple[Measure, ...] = REQUIRED
    claims: Mapping[str, float] = field(default_factory=dict)
    single_pairs: tuple[SinglePair, ...] = ()
    caveats: tuple[str, ...] = ()

    @property
    def arms(self) -> list[str]:
        """The baseline and then the others."""
        return [self.baseline, *(arm for arm in self.table if arm != self.baseline)]

    @property
    def decisive(self) -> Measure:
        """The measure that has verdicts."""
        return self.measures[0]

    @cached_property
    def contrasts(self) -> dict[Measure, list[Contrast]]:
        """The arms described, by measure."""
        judged: Table = {
            arm: by_seed if arm == self.baseline else {seed: one for seed, one in by_seed.items() if seed in self.verdicts[arm].seeds}
            for arm, by_seed in self.table.items()
        }
        return {measure: contrasts(judged, self.baseline, measure) for measure in dict.fromkeys((*self.measures, LOSS))}

    @cached_property
    def collapses(self) -> list[Collapses]:
        """What was lost, by arm."""
        return collapses(self.table, self.baseline)

    def of(self, arm: str, measure: Measure | None = None) -> Contrast | None:
        """Return an arm's description in a measure, by default the one that decides."""
        return next((contrast for contrast in self.contrasts[measure or self.decisive] if contrast.arm == arm), None)

    def sentences(self) -> list[str]:
        """Return all that is to be said: the answer, then what is to be known beside it."""
        return [*self.verdict_sentences().values(), *self.notes()]

    def verdict_sentences(self) -> dict[str, str]:
        """Return the answer: for each arm a sentence."""
        return {arm: verdict_sentence(self.verdicts[arm], self.of(arm), self.where) + "." for arm in self.arms[1:]}

    def notes(self) -> list[str]:
        """Return what is to be known beside the answer."""
        return [*self._described(), *self._lost(), *self._missing(), *self._claims(), *self._open(), *self._pairing(), *self.caveats]

    def _described(self) -> Iterator[str]:
        for measure in self.measures[1:]:
            told = [described(contrast) for contrast in self.contrasts[measure] if contrast.t.n > 1]
            if told:
                yield f"{measure.words[0].upper()}{measure.words[1:]}, described, not tested: {'; '.join(told)}."

    def _lost(self) -> Iterator[str]:
        if not any(one.n_collapsed for one in self.collapses):
            return
        by_arm = {one.arm: one for one in self.collapses}
        told = [f"{arm} {_rate(by_arm[arm])}" for arm in self.arms]
        fisher = [f"{one.arm} p = {one.p:.2g}" for one in self.collapses if one.n_collapsed and not math.isnan(one.p)]
        against = f" Fisher's exact test against {self.baseline}: {', '.join(fisher)}." if fisher else ""
        yield f"Lost (diverged, crashed or collapsed), with the 95 % interval of the rate: {', '.join(told)}.{against}"
        for arm, by_seed in self.table.items():
            for state in LOST:
                yield from self._listed(arm, [seed for seed, one in by_seed.items() if one.state == state], state)

    def _missing(self) -> Iterator[str]:
        for arm, by_seed in self.table.items():
            for state, words in STATES.items():
                lost = [seed for seed, one in by_seed.items() if one.state == state]
                yield from (f"{line[:-1]}; left out, since it says nothing about {arm}." for line in self._listed(arm, lost, words))

    def _listed(self, arm: str, seeds: Sequence[int], words: str) -> Iterator[str]:
        if seeds:
            why = next((self.table[arm][seed].why for seed in sorted(seeds) if self.table[arm][seed].why), "")
            yield f"{arm}: seed {', '.join(map(str, sorted(seeds)))} {words}{': ' + why if why else ''}."

    def _claims(self) -> Iterator[str]:
        for arm, claim in self.claims.items():
            contrast = self.of(arm, LOSS)
            if contrast is None or contrast.sound is None:
                continue
            usual = contrast.sound
            among = " without the lost seeds" if contrast.n_without else ""
            told = f"Claimed for {arm}: {percent(claim)} test loss."
            if not math.isnan(usual.relative_low):
                verdict = "holds" if usual.relative_low <= claim <= usual.relative_high else "excludes"
                told += f" The interval here{among}, {percent(usual.relative_low)} to {percent(usual.relative_high)}, {verdict} it."
            takes = needed(self.needed_for_claim(arm))
            yield told + (f" To see a difference of that size 8 times in 10 takes {takes}; here are {usual.n}." if takes else "")

    def _open(self) -> Iterator[str]:
        """Tell what it would take to know, of the arms of which nothing is shown."""
        unknown = [arm for arm in self.arms[1:] if self.verdicts[arm].kind == "not shown" and self.of(arm)]
        for arm in unknown:
            takes, verdict = needed(self.needed_for_margin(arm)), self.verdicts[arm]
            if takes:
                equal = f"{arm}: to show equivalence within {margin(verdict)} 8 times in 10, were it equal,"
                yield f"{equal} takes {takes}; here are {len(verdict.seeds)}."

    def _pairing(self) -> Iterator[str]:
        told = [
            f"{contrast.arm} {contrast.correlation:.2f} and {contrast.variance_ratio:.2f}".replace(" -", " −")
            for contrast in self.contrasts[self.decisive]
            if not math.isnan(contrast.correlation)
        ]
        if told:
            what = f"correlation with {self.baseline}, and the variance of the difference as a share of that of unpaired seeds"
            yield f"Pairing by seed in {self.decisive.words} ({what}): {', '.join(told)}."

    def needed_for_claim(self, arm: str) -> Needed | None:
        """Return the seeds that would show a claimed difference, at the level that is used; None where nothing is claimed or known."""
        contrast = self.of(arm, LOSS)
        if arm not in self.claims or contrast is None or contrast.sound is None:
            return None
        usual, verdict = contrast.sound, self.verdicts[arm]
        difference = self.claims[arm] * abs(usual.baseline_mean)
        return needed_for_difference(difference, self._sd(arm, LOSS), usual.n, _level(verdict))

    def needed_for_margin(self, arm: str) -> Needed | None:
        """Return the seeds that would show equivalence within the margin, were the arms equal.

        None without margin, of one pair, and once a seed is lost, since equivalence is not shown by ranks.
        """
        contrast, verdict = self.of(arm), self.verdicts[arm]
        if contrast is None or contrast.sound is None or verdict.margin is None or verdict.test == "signed rank":
            return None
        size = verdict.margin * (abs(contrast.sound.baseline_mean) if self.decisive.unit.relative else 1)
        return needed_for_equivalence(size, self._sd(arm, self.decisive), contrast.sound.n, _level(verdict))

    def _sd(self, arm: str, measure: Measure) -> float:
        """Return the standard deviation of the paired differences, without lost seeds; NaN at one pair."""
        ours, theirs = self.values(arm, measure), self.values(self.baseline, measure)
        lost = {seed for name in (arm, self.baseline) for seed, one in self.table[name].items() if one.is_lost}
        sound = (ours.keys() & theirs.keys()) - lost
        return float(np.std([ours[seed] - theirs[seed] for seed in sound], ddof=1)) if len(sound) > 1 else math.nan

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
        decides, *others = self.measures
        heading = ["arm", "n", _heading(decides), "difference, 95 % CI", "verdict", "p (Holm)"]
        heading += [text for measure in others for text in (_heading(measure), "difference, 95 % CI")]
        rows = [[*heading, "lost"]]
        by_arm = {one.arm: one for one in self.collapses}
        for arm in self.arms:
            row = [arm + (" (baseline)" if arm == self.baseline else ""), str(len(self.values(arm, decides)))]
            for measure in self.measures:
                contrast, is_baseline = self.of(arm, measure), arm == self.baseline
                row += [mean_and_spread(self.values(arm, measure)), "" if contrast is None else _cell(contrast)]
                if measure is decides:
                    row += ["", ""] if is_baseline else [self.verdicts[arm].kind, p_in_table(self.verdicts[arm].p_decisive)]
            rows.append([*row, _rate(by_arm[arm])])
        return rows

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Return an arm's figures by seed, where they are done."""
        done = {seed: one for seed, one in self.table[arm].items() if one.state == "done" and measure.name in one.figures}
        return {seed: float(one.figures[measure.name]) for seed, one in sorted(done.items())}

    def plain(self) -> dict[str, Any]:
        """Return all figures as JSON can hold them."""
        runs = {
            arm: {str(seed): {"state": one.state, "run_id": one.run_id, "collapsed": one.collapsed} for seed, one in by_seed.items()}
            for arm, by_seed in self.table.items()
        }
        figures = {
            measure.name: {arm: {str(s): v for s, v in self.values(arm, measure).items()} for arm in self.arms} for measure in self.measures
        }
        return {
            "title": self.title,
            "where": self.where,
            "baseline": self.baseline,
            "decide": self.decisive.name,
            "answer": self.sentences(),
            "verdicts": [_plain(self._verdict(arm)) for arm in self.arms[1:]],
            "figures": figures,
            "contrasts": [_plain(_contrast(one)) for measure in self.measures for one in self.contrasts[measure]],
            "collapses": [_plain(asdict(one)) for one in self.collapses],
            "single_pairs": [asdict(pair) for pair in self.single_pairs],
            "runs": runs,
        }

    def _verdict(self, arm: str) -> dict[str, Any]:
        verdict, values = self.verdicts[arm], (self.values(arm, self.decisive), self.values(self.baseline, self.decisive))
        shared = [seed for seed in verdict.seeds if all(seed in own for own in values)]
        pairs = [[own[seed] for seed in shared] for own in values]
        ends = interval(pairs[0], pairs[1], 0.9, relative=self.decisive.unit.relative) if shared else (math.nan, math.nan)
        more: dict[str, Any] = {"measure": self.decisive.name, "sentence": self.verdict_sentences()[arm], "interval_90": ends}
        for name, found in (("seeds_for_claim", self.needed_for_claim(arm)), ("seeds_for_margin", self.needed_for_margin(arm))):
            more[name] = list(found) if found else None
        return asdict(verdict) | more


def answers_of(
    blocks: Sequence[tuple[str, str, Table]], baseline: str, rules: Rules, seeds: Sequence[int], look: int | None, **more: Any
) -> list[Answer]:
    """Return the answers of a file, whose verdicts are decided together.

    blocks: title, where and table of each.   more: what all answers share, by the names of Answer's fields.
    """
    verdicts = decide([table for _, _, table in blocks], baseline, rules, seeds, look)
    return [Answer(title, where, table, baseline, decided, **more) for (title, where, table), decided in zip(blocks, verdicts, strict=True)]


def _level(verdict: Verdict) -> float:
    """Return the level at which the hardest test of Holm's is made."""
    return verdict.level / verdict.n_verdicts


def _rate(one: Collapses) -> str:
    return f"{one.n_collapsed} of {one.n} ({100 * one.low:.0f} to {100 * one.high:.0f} %)"


def _heading(measure: Measure) -> str:
    return f"{measure.words}, {measure.unit.name}" if measure.unit.relative else measure.words


def _cell(contrast: Contrast) -> str:
    """Return a difference for a table's cell, without the absolute size of a share: the arms' own values stand beside it."""
    if contrast.sound is None:
        return ""
    whole = difference(contrast.sound, contrast.measure, signed=True)
    kept = whole.partition("; ")[0] + ")" * ("; " in whole)
    return kept + (f", {contrast.sound.n} sound seeds" if contrast.n_without else "")


def _contrast(one: Contrast) -> dict[str, Any]:
    return asdict(one) | {"measure": one.measure.name, "unit": one.measure.unit.name}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a search answers, in sentences: did tuning help on the test split, how was the winner chosen, what did it keep of its promise."""

import math
from collections.abc import Mapping
from statistics import mean, stdev

from stn_pipeline.comparing.arms import Table, Trained, contrasts
from stn_pipeline.comparing.measures import ACCURACY, LOSS
from stn_pipeline.comparing.paired import Paired, paired
from stn_pipeline.comparing.sentences import described, verdict_sentence
from stn_pipeline.comparing.trained import trained, where
from stn_pipeline.comparing.verdicts import Rules, judge
from stn_pipeline.config import short_name
from stn_pipeline.search.confirm import Confirmed
from stn_pipeline.search.source import Search
from stn_pipeline.tracking import find_run

MEASURES = (LOSS.name, ACCURACY.name)
GOES_ON = "not trained to the end; the same command goes on"


def answer(search: Search) -> list[str]:
    """Return whether tuning helped, a sentence a figure; without final trainings, what validation says; then how the winner was chosen."""
    study, sweep = search.study, search.study.sweep
    if study.best is None:
        return [every_trial_failed(search)]
    chosen = _choice(search)
    if search.winner is None:
        return [f"No winner yet: the confirmation was {GOES_ON}.", *chosen]
    finals = finals_table(search)
    if search.winner == 0:
        return [f"Tuning found nothing better than the default: {_why_default(search)}.", *_default_in_words(finals["default"]), *chosen]
    if any(one.state != "missing" for by_seed in finals.values() for one in by_seed.values()):
        return finals_in_words(finals, _where(search)) + chosen
    why = f"the final trainings are missing: they were {GOES_ON}" if sweep.final else "final is 0, so no test split was read"
    if search.confirmed:
        values = f"trial t{search.winner:03d}, by its mean on fresh seeds, on validation"
    else:
        values = f"{trial_in_words(search, study.best.number)} against {_default_value(search)} of the default configuration, on validation"
        values += ", one seed each"
    return [f"Best: {values}: not yet an answer ({why}).", *chosen]


def every_trial_failed(search: Search) -> str:
    """Return that there is nothing to answer with, and the first reason."""
    told = ", ".join(f"{n} {kind}" for kind, n in search.counts().items() if n)
    for trial in search.study.trials:
        if reason := trial.user_attrs.get("reason"):
            return f"Every trial failed, so there is no answer ({told}). The first, t{trial.number:03d}: {reason.splitlines()[0]}"
    return f"Every trial failed, so there is no answer ({told})."


def finals_table(search: Search) -> dict[str, dict[int, Trained]]:
    """Return what came of the final trainings, by arm (tuned, default) and seed; where the default won, both arms are its own."""
    numbers = {"tuned": search.winner or 0, "default": 0}
    finals = search.finals
    both = {seed for number, seed in finals if number == numbers["tuned"] and (0, seed) in finals}  # more than are asked for now
    seeds = sorted({*search.study.sweep.final_seeds, *both})
    return {
        arm: {seed: trained(find_run(finals[number, seed].run.id)) if (number, seed) in finals else Trained() for seed in seeds}
        for arm, number in numbers.items()
    }


def final_pairs(table: Table) -> dict[str, Paired]:
    """Return the paired differences by measure, over the seeds that both arms have done."""
    both = shared_seeds(table)
    values = {what: [[float(table[arm][seed].figures[what]) for seed in both] for arm in ("tuned", "default")] for what in MEASURES}
    return {what: paired(*own) for what, own in values.items() if both}


def shared_seeds(table: Table) -> list[int]:
    """Return the seeds that both arms have done."""
    return [seed for seed, one in table["tuned"].items() if one.state == "done" and table["default"][seed].state == "done"]


def _where(search: Search) -> str:
    """Return what the verdict of the final trainings holds for, as in `mnist (5 epochs)`."""
    study = search.study
    return where([study.config(study.trials[number].user_attrs["params"]) for number in {search.winner or 0, 0}], short_name(study.dataset))


def finals_in_words(table: Table, place: str) -> list[str]:
    """Return the verdict of the final trainings by test loss, what accuracy shows beside it, and what each arm lost.

    place: the images and settings that it holds for, as in `mnist, 5 epochs`.
    """
    verdict = judge(table["tuned"], table["default"], ("tuned", "default"), Rules())
    loss, accuracy = (next(iter(contrasts(table, "default", measure)), None) for measure in (LOSS, ACCURACY))
    line = verdict_sentence(verdict, loss, place)
    lines = [f"{line[0].upper()}{line[1:]}."]
    if accuracy is not None and accuracy.t.n > 1:
        lines.append(f"Test accuracy, described, not tested: {described(accuracy)}.")
    return lines + _losses_in_words(table)


def _losses_in_words(table: Table) -> list[str]:
    """Return for each arm how many of its final trainings were lost, and how many ended at chance, where any did."""
    lines = []
    for arm, by_seed in table.items():
        name, n = "Tuned" if arm == "tuned" else "The default", len(by_seed)
        lost = [one for one in by_seed.values() if one.state != "done"]
        kinds = {state: sum(one.state == state for one in lost) for state in ("diverged", "crashed", "failed", "missing")}
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        why = next((one.why for one in lost if one.state != "missing"), f"they were {GOES_ON}")
        n_collapsed = sum(one.collapsed for one in by_seed.values() if one.state == "done")
        lines += [f"{name} lost {len(lost)} of {n} final trainings ({told}): {why}."] * bool(lost)
        lines += [f"{name} ended at chance in {n_collapsed} of {n} final trainings."] * bool(n_collapsed)
    return lines


def _default_in_words(finals: Mapping[int, Trained]) -> list[str]:
    done = [one for one in finals.values() if one.state == "done"]
    lines = []
    if len(done) > 1:
        loss, accuracy = ([float(one.figures[what]) for one in done] for what in MEASURES)
        spread = f"test loss {mean(loss):.4f} ± {stdev(loss):.4f}, accuracy {mean(accuracy):.4f} ± {stdev(accuracy):.4f}"
        lines.append(f"The default: {spread} (mean ± sd of {len(done)} seeds).")
    return lines + _losses_in_words({"default": finals})


def _why_default(search: Search) -> str:
    if search.confirmed:
        n = len(search.study.sweep.confirm_seeds)
        return f"of {len(search.confirmed)} configurations it is the best on {n} fresh seeds, on validation"
    best = search.study.best
    return "" if best is None else f"{trial_in_words(search, best.number)} was best on validation"


def _choice(search: Search) -> list[str]:
    """Return how the winner was chosen, and the shrinkage: what was promised by a trial, and kept on fresh seeds."""
    sweep, confirmed = search.study.sweep, search.confirmed
    if sweep.confirm is None:
        return [
            f"One shared seed ({sweep.seed}) chose the winner, so what its trial promises it need not keep: "
            "confirm: {top: 5, seeds: 3} chooses by fresh seeds."
        ]
    if not confirmed:
        return ["Nothing was confirmed: only the default configuration was there to be."]
    first, of_trials = confirmed[0], next(iter(search.study.complete))
    winner = f"The winner, {configuration(first.number)}," if first.number else "The default"
    lines = [f"{winner} {kept(first, sweep.objective)}, the best mean of {len(confirmed)} configurations."]
    for one in confirmed[1:]:
        if one.number == of_trials:
            lines.append(f"The best trial, {configuration(one.number)}, {kept(one, sweep.objective)}.")
        elif one.number == 0:
            lines.append(f"The default {kept(one, sweep.objective)}.")
    return lines


def configuration(number: int) -> str:
    """Return what a configuration is called: by the trial that tried it first, or the default."""
    return "the default" if number == 0 else f"t{number:03d}"


def kept(one: Confirmed, objective: str) -> str:
    """Return the shrinkage, as in `promised val/loss 0.0365, kept 0.0690 ± 0.0040 (3 fresh seeds)`."""
    promised = f"promised {objective} {one.promised:.4f}" if one.promised is not None else f"promised no {objective} (its trial failed)"
    n, spread = len(one.values), mean_and_sd(one)
    if not one.n_lost:
        return f"{promised}, kept {spread} ({n} fresh seed{'s' * (n > 1)})"
    lost = f"{one.n_lost} of {n} fresh seeds lost, which counts as the worst"
    return f"{promised}, kept {spread} on the others ({lost})" if one.done else f"{promised}, kept nothing ({lost})"


def mean_and_sd(one: Confirmed) -> str:
    """Return the mean over the fresh seeds, with its sd where there is one; nothing where all were lost."""
    return "" if not one.done else f"{one.mean:.4f}" + ("" if math.isnan(one.sd) else f" ± {one.sd:.4f}")


def trial_in_words(search: Search, number: int) -> str:
    """Return a trial's value and name."""
    return f"{search.study.sweep.objective} {search.study.trials[number].value:.4f} (trial t{number:03d})"


def _default_value(search: Search) -> str:
    default = search.study.complete.get(0)
    return "none (it failed)" if default is None else f"{default.value:.4f}"

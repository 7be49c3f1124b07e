"""What is said of a verdict: exact words for each outcome, and the laws that hold for every sentence."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stn_pipeline.comparing import arms, sentences
from stn_pipeline.comparing.arms import Trained, contrasts
from stn_pipeline.comparing.measures import ACCURACY, CALIBRATION, LOSS, Measure
from stn_pipeline.comparing.planning import MOST_SEEDS, Needed
from stn_pipeline.comparing.sentences import described, verdict_sentence
from stn_pipeline.comparing.verdicts import Rules, Verdict, decide

WHERE = "digits (5 epochs)"
BASE = np.array([0.100, 0.104, 0.098, 0.101, 0.099, 0.103, 0.097, 0.102, 0.105, 0.096])
NOISE = np.array([0.004, -0.003, 0.002, -0.004, 0.003, -0.002, 0.001, -0.001, 0.002, -0.003])
LOST = Trained("diverged", {}, True)
MARGIN = {LOSS: 0.05, ACCURACY: 0.005}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "RESAMPLES", 9)
        yield


def done(loss: float, collapsed: bool = False) -> Trained:
    figures = {"test/loss": float(loss), "test/accuracy": 1 - float(loss), "test/calibration_error": float(loss) / 10}
    return Trained("done", figures, collapsed)


def arm(losses) -> dict[int, Trained]:
    return dict(enumerate(map(done, losses)))


def asked(ours, theirs=None, measure: Measure = LOSS, n_others: int = 0, **rules) -> tuple[Verdict, arms.Contrast | None]:
    """Return the verdict on tps against base, beside others of which nothing is shown."""
    theirs = arm(BASE) if theirs is None else theirs
    found = {"base": theirs, "tps": ours} | {f"other{i}": arm(BASE + NOISE) for i in range(n_others)}
    verdict = decide([found], "base", Rules(measure, **rules), sorted(ours.keys() | theirs.keys()))[0]["tps"]
    judged = {"base": theirs, "tps": {seed: one for seed, one in ours.items() if seed in verdict.seeds}}
    return verdict, next(iter(contrasts(judged, "base", measure)), None)


def say(ours, theirs=None, measure: Measure = LOSS, **rules) -> str:
    return verdict_sentence(*asked(ours, theirs, measure, **rules), WHERE)


LOW, HIGH, SAME, CLOSE = (arm(BASE + shift + NOISE) for shift in (-0.01, 0.01, 0, -0.0025))
HARD = arm(BASE - 0.02 + NOISE)


@pytest.mark.parametrize(
    ("ours", "rules", "loss", "accuracy"),
    [
        (
            LOW,
            {},
            "tps lowers test loss on digits (5 epochs) by 10 % (95 % CI 8 to 12 %; 0.0101 nats; 10 seeds, p < 0.0001): better than base",
            "tps raises test accuracy on digits (5 epochs) by 1.01 points (95 % CI 0.81 to 1.21; 10 seeds, p < 0.0001): better than base",
        ),
        (
            HIGH,
            {},
            "tps raises test loss on digits (5 epochs) by 10 % (95 % CI 8 to 12 %; 0.0099 nats; 10 seeds, p < 0.0001): worse than base",
            "tps lowers test accuracy on digits (5 epochs) by 0.99 points (95 % CI 0.79 to 1.19; 10 seeds, p < 0.0001): worse than base",
        ),
        (
            SAME,
            {},
            "tps v base: no difference in test loss shown on digits (5 epochs): −0.1 % (95 % CI −2.1 to +1.9 %; −0.0001 nats), 10 seeds",
            "tps v base: no difference in test accuracy shown on digits (5 epochs): +0.01 points (95 % CI −0.19 to +0.21), 10 seeds",
        ),
        (  # by itself it would be decided
            CLOSE,
            {"n_others": 2},
            "tps v base: no difference in test loss shown on digits (5 epochs): −2.6 % (95 % CI −4.6 to −0.6 %; −0.0026 nats), 10 seeds; "
            "p = 0.018 alone, but p = 0.054 by Holm over 3 verdicts",
            "tps v base: no difference in test accuracy shown on digits (5 epochs): +0.26 points (95 % CI +0.06 to +0.46), 10 seeds; "
            "p = 0.018 alone, but p = 0.054 by Holm over 3 verdicts",
        ),
        (
            CLOSE,
            {},
            "tps lowers test loss on digits (5 epochs) by 2.6 % (95 % CI 0.6 to 4.6 %; 0.0026 nats; 10 seeds, p = 0.018): better than base",
            "tps raises test accuracy on digits (5 epochs) by 0.26 points (95 % CI 0.06 to 0.46; 10 seeds, p = 0.018): better than base",
        ),
        (
            SAME,
            {"margin": True},
            "tps is equivalent to base in test loss within 5 % on digits (5 epochs): −0.1 % (95 % CI −2.1 to +1.9 %; −0.0001 nats), "
            "10 seeds, two one-sided tests, p = 0.00019",
            "tps is equivalent to base in test accuracy within 0.5 points on digits (5 epochs): +0.01 points (95 % CI −0.19 to +0.21), "
            "10 seeds, two one-sided tests, p = 0.0002",
        ),
        (
            SAME,
            {"margin": True, "n_others": 1},
            "tps is equivalent to base in test loss within 5 % on digits (5 epochs): −0.1 % (95 % CI −2.1 to +1.9 %; −0.0001 nats), "
            "10 seeds, two one-sided tests, p = 0.00038 by Holm over 2 verdicts",
            "tps is equivalent to base in test accuracy within 0.5 points on digits (5 epochs): +0.01 points (95 % CI −0.19 to +0.21), "
            "10 seeds, two one-sided tests, p = 0.00041 by Holm over 2 verdicts",
        ),
        (
            CLOSE,
            {"margin": True},
            "tps lowers test loss on digits (5 epochs) by 2.6 % (95 % CI 0.6 to 4.6 %; 0.0026 nats; 10 seeds, p = 0.018): "
            "better than base, though within the margin of 5 %",
            "tps raises test accuracy on digits (5 epochs) by 0.26 points (95 % CI 0.06 to 0.46; 10 seeds, p = 0.018): "
            "better than base, though within the margin of 0.5 points",
        ),
        (
            arm(BASE - 0.02 + 0.3 * NOISE),
            {"looks": (4, 10)},
            "tps lowers test loss on digits (5 epochs) by 20 % (95 % CI 18 to 21 %; 0.0201 nats; 4 seeds, "
            "p < 0.0001 at look 1 of 2, which may spend 0.0126): better than base",
            "tps raises test accuracy on digits (5 epochs) by 2.01 points (95 % CI 1.82 to 2.19; 4 seeds, "
            "p < 0.0001 at look 1 of 2, which may spend 0.0126): better than base",
        ),
        (
            arm(BASE - 0.0022 + NOISE),
            {"looks": (4, 8, 10)},
            "tps v base: no difference in test loss shown on digits (5 epochs): −2.3 % (95 % CI −4.3 to −0.3 %; −0.0023 nats), 10 seeds; "
            "p = 0.031 at look 3 of 3, which may spend 0.0142",
            "tps v base: no difference in test accuracy shown on digits (5 epochs): +0.23 points (95 % CI +0.03 to +0.43), 10 seeds; "
            "p = 0.031 at look 3 of 3, which may spend 0.0142",
        ),
        (
            arm([0.05]),
            {},
            "tps v base on digits (5 epochs): test loss 0.05 against 0.1 from one seed each: "
            "a single pair says nothing about noise; give at least 2 seeds",
            "tps v base on digits (5 epochs): test accuracy 95 % against 90 % from one seed each: "
            "a single pair says nothing about noise; give at least 2 seeds",
        ),
        (
            arm(BASE + 0.01),
            {"margin": True},
            "tps v base on digits (5 epochs): test loss differs by +10.0 % (+0.0100 nats) in each of 10 seeds: "
            "no spread to judge it by; check that the arms and the seeds differ",
            "tps v base on digits (5 epochs): test accuracy differs by −1.00 points in each of 10 seeds: "
            "no spread to judge it by; check that the arms and the seeds differ",
        ),
        (
            arm(BASE),
            {},
            "tps v base on digits (5 epochs): test loss differs by 0.0 % (0.0000 nats) in each of 10 seeds: "
            "no spread to judge it by; check that the arms and the seeds differ",
            "tps v base on digits (5 epochs): test accuracy differs by 0.00 points in each of 10 seeds: "
            "no spread to judge it by; check that the arms and the seeds differ",
        ),
        (
            {11: done(0.1)},
            {},
            *["tps and base have no seed that both have done on digits (5 epochs): there is nothing to compare"] * 2,
        ),
    ],
)
def test_exact_words(ours, rules, loss, accuracy):
    for measure, sentence in ((LOSS, loss), (ACCURACY, accuracy)):
        own = rules | ({"margin": MARGIN[measure]} if "margin" in rules else {})
        assert say(ours, None, measure, **own) == sentence


BY = "on digits (5 epochs), by divergence, crash or collapse: by signed rank over all"


@pytest.mark.parametrize(
    ("ours", "theirs", "rules", "sentence"),
    [
        (
            HARD | {4: LOST},
            arm(BASE),
            {},
            f"tps lost 1 of 10 seeds and base 0 {BY} 10, a lost one being worst, no difference in test loss is shown (p = 0.084); "
            "where neither was lost: −20 % (95 % CI −22 to −18 %; −0.0204 nats), 9 seeds, described, not tested",
        ),
        (
            HARD | {4: LOST},
            arm(BASE),
            {"n_others": 2},
            f"tps lost 1 of 10 seeds and base 0 {BY} 10, a lost one being worst, no difference in test loss is shown "
            "(p = 0.25 by Holm over 3 verdicts); "
            "where neither was lost: −20 % (95 % CI −22 to −18 %; −0.0204 nats), 9 seeds, described, not tested",
        ),
        (
            HARD | dict.fromkeys(range(9), LOST),
            arm(BASE),
            {},
            f"tps lost 9 of 10 seeds and base 0 {BY} 10, a lost one being worst, tps is worse than base in test loss (p = 0.0039); "
            "where neither was lost: −0.0230 nats, 1 seed, described, not tested",
        ),
        (
            HARD,
            arm(BASE) | {4: done(2.3, collapsed=True)},
            {},
            f"tps lost 0 of 10 seeds and base 1 {BY} 10, a lost one being worst, tps is better than base in test loss (p = 0.002); "
            "where neither was lost: −20 % (95 % CI −22 to −18 %; −0.0204 nats), 9 seeds, described, not tested",
        ),
        (
            dict(list(HARD.items())[:4]) | {3: LOST},
            arm(BASE),
            {},
            f"tps lost 1 of 4 seeds and base 0 {BY} 4, a lost one being worst, no difference in test loss is shown (p = 0.88); "
            "with fewer than 6 seeds this test cannot show one; "
            "where neither was lost: −19 % (95 % CI −26 to −11 %; −0.0190 nats), 3 seeds, described, not tested",
        ),
        (
            dict.fromkeys(range(7), LOST),
            dict.fromkeys(range(7), LOST),
            {},
            f"tps lost 7 of 7 seeds and base 7 {BY} 7, a lost one being worst, no difference in test loss is shown",
        ),
    ],
)
def test_exact_words_once_seeds_are_lost(ours, theirs, rules, sentence):
    assert say(ours, theirs, **rules) == sentence


def test_an_arm_that_is_lost_more_often_is_not_simply_better():
    many = np.tile(BASE, 2)
    sound = arm(many - 0.02 + np.tile(NOISE, 2)) | {4: LOST}
    assert "tps is better than base in test loss, but only where it is not lost, and it is lost more often (p = " in say(sound, arm(many))
    assert "tps is better than base in test loss (p < 0.0001)" in say(sound, arm(many) | {4: LOST})
    turned = say(arm(many), sound)
    assert "tps is worse than base in test loss, though it is lost less often (p = " in turned
    at_looks = say(arm(many) | dict.fromkeys(range(9), LOST), arm(many), looks=(10, 20))
    assert "tps is worse than base in test loss (p = 0.0039 at look 1 of 2, which may spend 0.0177)" in at_looks


def test_another_measure_has_its_own_words():
    assert say(LOW, None, CALIBRATION).startswith(
        "tps lowers test calibration error on digits (5 epochs) by 0.10 points (95 % CI 0.08 to 0.12; "
    )
    _, contrast = asked(LOW, None, ACCURACY)
    assert described(contrast) == "tps +1.01 points (95 % CI +0.81 to +1.21)"
    _, contrast = asked(HARD | {4: done(2.3, collapsed=True)}, None, ACCURACY)
    assert described(contrast) == "tps +2.04 points (95 % CI +1.83 to +2.26)", "of the seeds that were not lost"


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_small_difference_that_is_decided_has_its_verb_too(size, sign):
    sentence = say(arm(BASE + size * (sign + 20 * NOISE)))
    verb, kind = ("raises", "worse") if sign > 0 else ("lowers", "better")
    assert sentence.startswith(f"tps {verb} test loss on {WHERE} by ") and sentence.endswith(f": {kind} than base")
    assert all(number(text) > 0 for text in re.search(rf"by ({NUMBER}) % \(95 % CI ({NUMBER}) to ({NUMBER})", sentence).groups())


# Laws

losses = st.integers(1, 400).map(lambda i: done(i / 1000))
outcomes = losses | st.sampled_from([LOST, done(2.3, collapsed=True), Trained("failed"), Trained("missing")])
rounds = st.integers(2, 8)
sound = rounds.flatmap(lambda n: st.tuples(st.lists(losses, min_size=n, max_size=n), st.lists(losses, min_size=n, max_size=n)))
mixed = rounds.flatmap(lambda n: st.tuples(st.lists(outcomes, min_size=n, max_size=n), st.lists(outcomes, min_size=n, max_size=n)))
rules = st.fixed_dictionaries({}, optional={"margin": st.sampled_from([0.05, 0.3]), "looks": st.sampled_from([(2, 4), (3, 5, 8)])})
measures = st.sampled_from([LOSS, ACCURACY])
laws = settings(max_examples=80, deadline=None)
NUMBER = r"[−+]?\d[\d,.]*"


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


@laws
@given(mixed, measures, rules, st.integers(0, 2))
def test_every_sentence_is_one_names_the_arms_and_where_and_is_right_about_p(study, measure, own, n_others):
    ours, theirs = (dict(enumerate(side)) for side in study)
    verdict, contrast = asked(ours, theirs, measure, n_others=n_others, **own)
    sentence = verdict_sentence(verdict, contrast, WHERE)
    assert WHERE in sentence and "tps" in sentence and "base" in sentence
    assert not re.search(r"\dnan|nan\b|inf\b|\de[-−+]?\d|  |\n", sentence)
    assert not re.search(r"[−+]0(\.0+)?(?![.\d])", sentence), "nothing reads −0 or +0"
    shown = {"better": " better than base", "worse": " worse than base", "equivalent": " is equivalent to base "}
    assert all((words in sentence) == (verdict.kind == kind) for kind, words in shown.items())
    told = re.findall(r"p (=|<) ([\d.]+)(?! alone)", sentence)
    level = float(f"{verdict.level:.3g}")
    for sign, value in told:
        assert (number(value) <= level) == verdict.is_decided or sign == "<"
    if not verdict.is_decided and verdict.test:
        assert "no difference in " in sentence and not re.search("lowers|raises", sentence)


@laws
@given(sound, measures)
def test_the_verb_is_the_sign_and_the_interval_is_the_numbers(study, measure):
    verdict, contrast = asked(*(dict(enumerate(side)) for side in study), measure)
    sentence, result = verdict_sentence(verdict, contrast, WHERE), contrast.t
    assume(verdict.test == "t")
    signed = not verdict.is_decided
    if not signed:
        assert re.search(r"lowers|raises", sentence)[0] == ("lowers" if result.difference < 0 else "raises")
        assert verdict.kind == ("better" if (result.difference < 0) == measure.smaller_is_better else "worse")
    body = sentence.partition(WHERE)[2]
    middle, low, high = (number(text) for text in re.search(rf"({NUMBER}) \S+ \(95 % CI ({NUMBER}) to ({NUMBER})", body).groups())
    as_share = measure is LOSS and math.isfinite(result.relative_low)
    scale = 100 if as_share or measure is ACCURACY else 1
    values = (result.relative, result.relative_low, result.relative_high) if as_share else (result.difference, result.low, result.high)
    turn = 1 if signed or result.difference > 0 else -1
    around = sorted(scale * turn * end for end in values[1:])
    rounded = (0.51 if max(map(abs, around)) >= 10 else 0.051) if as_share else 0.0051 if measure is ACCURACY else 0.000051
    assert (middle, low, high) == pytest.approx((scale * turn * values[0], *around), abs=rounded)
    assert low <= middle <= high
    assert (low <= 0 <= high) == (not result.p <= 0.05), "no end reads 0 but 0"
    assert f"{result.n} seeds" in sentence


@laws
@given(sound)
def test_the_sentence_of_the_swapped_arms_turns_verb_and_verdict(study):
    ours, theirs = (dict(enumerate(side)) for side in study)
    there, back = say(ours, theirs, ACCURACY), say(theirs, ours, ACCURACY)
    turned = {"lowers": "raises", "raises": "lowers", "better": "worse", "worse": "better"}
    back = re.sub("|".join(turned), lambda word: turned[word[0]], back)
    if "no difference" in there or "differs by" in there or "single pair" in there:
        sizes = [[abs(number(size)) for size in re.findall(NUMBER, words)] for words in (there, back)]
        assert [sorted(found) for found in sizes][0] == sorted(sizes[1]) and ("no difference" in there) == ("no difference" in back)
    else:
        assert back == there


@laws
@given(st.floats(-1e3, 1e3), st.lists(st.floats(-1e3, 1e3), max_size=2), st.integers(0, 4), st.booleans())
def test_no_end_of_an_interval_reads_0_but_0(middle, ends, decimals, signed):
    ends = [end for end in ends if not 0 < abs(end) < 1e-11]
    told = sentences.numbers(middle, *ends, decimals=decimals, signed=signed)
    for text, value in zip(told[1:], ends, strict=True):
        assert (number(text) == 0) == (value == 0) and abs(number(text) - value) <= 0.51 * 10.0**-decimals
    assert len({len(text.partition(".")[2]) for text in told}) == 1 and all("e" not in text for text in told)
    assert all(text[0] not in "+−" for text in told if number(text) == 0)
    assert all((text[0] == "+") == (signed and number(text) > 0) for text in told)


@given(st.floats(1e-9, 1), st.sampled_from([0.05, 0.0125, 0.00625]))
def test_p_reads_on_the_side_of_the_level_on_which_it_is(p, level):
    words = sentences._p(p, level)
    assert words == "p < 0.0001" if p < 1e-4 else (float(words.removeprefix("p = ")) <= level) == (p <= level)
    assert (words, sentences._p(0.0501, 0.05), sentences._p(0.0499, 0.05)) == (words, "p = 0.0501", "p = 0.05")


def test_cells_and_seeds_in_words():
    assert [sentences.p_in_table(p) for p in (math.nan, 0.5, 0.0021, 0.0004, 1e-9)] == ["", "0.500", "0.002", "4e-04", "< 0.0001"]
    assert [sentences.percent(share) for share in (-0.15, 0.2, -0.031)] == ["−15 %", "+20 %", "−3.1 %"]
    few = [None, Needed(14, 38), Needed(2, 2), Needed(60_000, None), Needed(None, None)]
    many = ["60,000 paired seeds or many more", f"more than {MOST_SEEDS:,} paired seeds"]
    assert [sentences.needed(found) for found in few] == ["", "14 to 38 paired seeds", "2 paired seeds", *many]
    assert [sentences.mean_and_spread(dict(enumerate(values))) for values in ([], [0.1], [0.1, 0.2])] == ["", "0.1000", "0.1500 ± 0.0707"]

"""A comparison from end to end on a real MLflow store, without training: what is trained, what is used again, the answer."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from itertools import count

import mlflow
import numpy as np
import pytest
import scipy.stats
import torch
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from stn_pipeline import compare as entry
from stn_pipeline import tracking
from stn_pipeline.comparing import compare, existing
from stn_pipeline.comparing.comparefile import CompareConfig, ExistingConfig
from stn_pipeline.comparing.verdicts import holm
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import load
from stn_pipeline.errors import ConfigError, RunError
from stn_pipeline.jobs import Job, Outcome, places
from stn_pipeline.jobs.driver import JobError
from stn_pipeline.texts import markdown
from stn_pipeline.tracking import CHILD_OF, Run
from stn_pipeline.training.fingerprint import conditions, fingerprint
from tests.fakes import BUG, LOST, FakePool, Killed, News, ends, record

NOTE = "mlflow.note.content"
KEYS = {
    "arms": {"base": {}, "low": {"lr": 0.003}, "high": {"lr": 0.1}},
    "datasets": ["digits"],
    "seeds": 3,
    "train": {"epochs": 3, "device": "cpu"},
}
names = count()


def score_of(config: TrainConfig) -> dict[str, float]:
    """Return test figures that the learning rate and the seed decide."""
    noise = np.random.default_rng([config.seed, int(config.lr * 1e6)]).normal(0, 0.01)
    loss = 0.2 + 0.1 * abs(math.log10(config.lr) + 2.5) + float(noise)
    return {"test/loss": loss, "test/accuracy": 0.98 - 0.1 * loss}


def whole(job: Job) -> News:
    """Do what a worker does, with two classes and ten images."""
    run = Run(job.run_id)
    for number, more in enumerate((0.3, 0.1, 0.0), 1):
        run.log_metrics(
            {"train/loss": 1 + more, "val/loss": 1.1 + more, "warp/shift": 0.1, "warp/outside": 0.2, "warp/log_det": 0.0}, number
        )
        yield record(number, 1.1 + more)
    scores = score_of(job.config)
    run.log_metrics(scores)
    log_digests(job.run_id)
    labels = np.arange(10) % 2
    wrong = np.arange(10) < (1 if job.config.lr == 0.01 else 9 if job.config.lr > 0.05 else 2)
    predicted = np.where(wrong, 1 - labels, labels)
    file = io.BytesIO()
    np.savez(file, label=labels, predicted=predicted)
    counts = np.histogram2d(labels, predicted, 2)[0].astype(int).tolist()
    run.log_files(
        {"predictions.npz": file.getvalue(), "confusion_matrix.json": json.dumps({"classes": ["a", "b"], "counts": counts}).encode()}
    )
    yield Outcome("done", figures=scores | {"val/loss": 1.1, "val/accuracy": 0.8, "best_epoch": 3, "time/overhead_s": 0.1})


def log_digests(run_id: str, test: str = "same") -> None:
    """Log what a run was tested on, as log_data does."""
    tested = DatasetInput(Dataset("digits-test", test, "code", "{}"), [InputTag(MLFLOW_DATASET_CONTEXT, "test")])
    mlflow.MlflowClient().log_inputs(run_id, [tested])


def diverges(job: Job) -> News:
    Run(job.run_id).tag({"collapsed": "true", "collapsed.why": "training loss is nan at epoch 1"})
    yield Outcome("failed", "training loss is nan at epoch 1")


@pytest.fixture(autouse=True)
def place(request, store, signals_restored, monkeypatch):
    monkeypatch.setattr("stn_pipeline.comparing.page._warps", lambda *_: None)  # there are no networks here
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("stn_pipeline.comparing.page._pictures", lambda *_: {})
        monkeypatch.setattr("stn_pipeline.comparing.pictures.forest", lambda *_: None)


@pytest.fixture
def pictures():
    """Have the pictures drawn, which takes a second."""


@pytest.fixture
def go(monkeypatch):
    """Return a function that runs a comparison with these plays, and returns its pool and what it said."""

    def go(plays: dict[str, Callable[[Job], News]] | None = None, n_workers: int = 1, **keys: object) -> tuple[FakePool, list[str]]:
        pool, said = FakePool((plays or {}) | {"": whole}, n_workers), []
        monkeypatch.setattr(places, "LocalPool", lambda n, kind, say: pool)
        config = CompareConfig.parse(KEYS | keys)
        compare.run(config, said.append, lambda sources: lambda: [(source.state, source.n_left) for source in sources], "the command")
        return pool, said

    return go


def fresh() -> str:
    return f"c{next(names)}"


def parent_of(name: str) -> mlflow.entities.Run:
    return tracking.search_runs({"stage": "compare", "comparison": name})[-1]


def children_of(name: str) -> list[mlflow.entities.Run]:
    return tracking.search_runs({CHILD_OF: parent_of(name).info.run_id})


def artifact(name: str, path: str) -> str:
    return mlflow.artifacts.load_text(f"runs:/{parent_of(name).info.run_id}/{path}")


def keys_of(pool: FakePool) -> list[str]:
    return [job.key.replace("digits ", "") for job in pool.jobs]


# What is trained


def test_each_arm_is_trained_with_each_seed_pair_after_pair_and_all_of_it_hangs_on_one_run(go, pictures):
    name = fresh()
    pool, said = go(name=name, seeds=[500, 501], train={"epochs": 3, "device": "cpu", "weight_decay": 0.1})
    assert keys_of(pool) == [f"{arm} s{seed}" for seed in (500, 501) for arm in ("base", "low", "high")]
    assert all(job.whole and job.config.weight_decay == 0.1 and job.config.epochs == 3 for job in pool.jobs)
    assert {job.key.split()[0]: job.config.lr for job in pool.jobs} == {"base": 0.01, "low": 0.003, "high": 0.1}
    children = children_of(name)
    assert {child.info.status for child in children} == {"FINISHED"} and len(children) == 6
    assert {(child.data.tags["arm"], child.data.params["seed"], child.data.params["lr"]) for child in children} == {
        (arm, seed, lr) for arm, lr in (("base", "0.01"), ("low", "0.003"), ("high", "0.1")) for seed in ("500", "501")
    }
    assert parent_of(name).info.status == "FINISHED" and "trained" not in said[0] and "6 trainings" in said[0]
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(parent_of(name).info.run_id)}
    assert {"report.html", "answer.json", "runs.csv", "forest.png", "losses.png", "seeds.png", "confusions.png", "diagnostics.png"} <= files


def test_the_same_command_again_trains_nothing_and_says_the_same(go):
    name = fresh()
    _, said = go(name=name)
    first = parent_of(name).info.run_id
    again, repeated = go(name=name)
    assert again.jobs == [] and parent_of(name).info.run_id == first and len(children_of(name)) <= 9
    assert [line for line in repeated if "seeds)" in line] == [line for line in said if "seeds)" in line] != []


def test_more_seeds_another_name_and_another_arm_train_only_what_is_new(go):
    go(name=fresh(), seeds=[20, 21])
    more, said = go(name=fresh(), seeds=[20, 21, 22], arms=KEYS["arms"] | {"tiny": {"lr": 1e-4}})
    assert keys_of(more) == ["tiny s20", "tiny s21", "base s22", "low s22", "high s22", "tiny s22"]
    assert "6 runs of others" in said[1]


def test_a_run_of_other_knobs_pixels_or_code_is_not_used_again(go, monkeypatch):
    go(name=fresh(), seeds=[30])
    assert len(go(name=fresh(), seeds=[30], train=KEYS["train"] | {"epochs": 4})[0].jobs) == 3
    assert len(go(name=fresh(), seeds=[30], train=KEYS["train"] | {"val_fraction": 0.2})[0].jobs) == 3
    assert go(name=fresh(), seeds=[30], train=KEYS["train"] | {"data_dir": "elsewhere"})[0].jobs == []
    monkeypatch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "another")
    assert len(go(name=fresh(), seeds=[30])[0].jobs) == 3


def test_a_cell_has_the_fingerprint_that_its_training_will_have(store):
    settings = {"as they are": {}, "turned": {"distortion": "rotated"}, "twice": {"distortion": "rts", "draws": 2}}
    cells = compare._cells(
        CompareConfig.parse(KEYS | {"name": "x", "seeds": [0, 3], "settings": settings}), places.Here(1), lambda line: None, compare.Tuned()
    )
    assert len({cell.fingerprint for cell in cells}) == len(cells) == 18
    assert {cell.config.compile for cell in cells} == {"off"}  # one engine, whatever each arm would get by itself
    for cell in cells:
        assert cell.fingerprint == fingerprint(
            cell.config, load(cell.config, announce=lambda line: None), conditions("plain", torch.device("cpu"))
        )


def test_two_folders_of_one_name_are_refused_before_anything_starts(go, tmp_path):
    from torchvision.io import write_png

    for place in "ab":
        for label in "xy":
            folder = tmp_path / place / "photos" / label
            folder.mkdir(parents=True)
            for number in range(20):
                write_png(torch.full((1, 28, 28), 5 * number + ord(place), dtype=torch.uint8), str(folder / f"{number}.png"))
    name = fresh()
    with pytest.raises(ConfigError, match="two of them have one name: leave one out, or rename a folder"):
        go(name=name, datasets=[f"folder:{tmp_path / place / 'photos'}" for place in "ab"])
    assert tracking.search_runs({"comparison": name}) == []


def test_the_number_of_workers_is_no_part_of_the_question(go):
    name = fresh()
    go(name=name, seeds=[140])
    first = parent_of(name).info.run_id
    go(name=name, seeds=[140], workers=3)
    assert parent_of(name).info.run_id == first and len(tracking.search_runs({"comparison": name, "stage": "compare"})) == 1


def test_two_settings_are_two_tables_and_what_they_share_is_trained_once(go):
    name = fresh()
    arms = {"base": {}, "none": {"transform": "none"}}
    pool, said = go(name=name, arms=arms, seeds=[40, 41], settings={"fast": {"loc_lr_multiplier": 1.0}, "slow": {}})
    assert keys_of(pool) == [f"{cell} s{seed}" for seed in (40, 41) for cell in ("base fast", "none fast", "base slow")]
    blocks = json.loads(artifact(name, "answer.json"))["blocks"]
    assert [block["title"] for block in blocks] == ["digits, fast", "digits, slow"]
    assert [list(block["figures"]["test/loss"]["none"]) for block in blocks] == [["40", "41"]] * 2
    assert any(line.startswith("none ") and " on digits, slow (3 epochs)" in line for line in said)


# What is interrupted, lost or fails


def test_a_killed_driver_leaves_a_comparison_that_goes_on(go):
    name = fresh()

    def killed(job: Job) -> News:
        yield record(1, 1.0)
        raise Killed

    with pytest.raises(Killed):
        go({"low digits s61": killed}, name=name, seeds=[60, 61])
    done = {child.info.run_id: child.data.metrics for child in children_of(name) if child.info.status == "FINISHED"}
    left = next(child for child in children_of(name) if child.info.status == "RUNNING")
    assert len(done) == 4
    pool, said = go(name=name, seeds=[60, 61])
    assert keys_of(pool) == ["low s61", "high s61"] and pool.jobs[0].run_id == left.info.run_id == pool.jobs[0].resume
    assert "4 done before" in said[1]
    children = children_of(name)
    assert len(children) == 6 and {child.info.status for child in children} == {"FINISHED"}
    assert all({child.info.run_id: child.data.metrics for child in children}[run_id] == metrics for run_id, metrics in done.items())


def test_an_interrupt_closes_what_ran_and_the_same_command_goes_on(go):
    name = fresh()
    with pytest.raises(KeyboardInterrupt):
        go({"high digits s70": ends(record(1, 1.0), KeyboardInterrupt())}, name=name, seeds=[70])
    assert parent_of(name).info.status == "KILLED" and "same command" in parent_of(name).data.tags[NOTE]
    assert sorted(child.info.status for child in children_of(name)) == ["FINISHED", "FINISHED", "KILLED"]
    pool, _ = go(name=name, seeds=[70])
    assert keys_of(pool) == ["high s70"] and parent_of(name).info.status == "FINISHED"


def test_a_lost_training_is_tried_once_more_and_then_missing(go):
    name = fresh()
    pool, said = go({"low digits s80": LOST}, name=name, seeds=[80, 81, 82])
    assert keys_of(pool).count("low s80") == 2
    assert any("low: seed 80 is missing" in line and "left out, since it says nothing about low" in line for line in said)
    (contrast,) = (
        c for c in json.loads(artifact(name, "answer.json"))["blocks"][0]["contrasts"] if c["arm"] == "low" and c["measure"] == "test/loss"
    )
    assert contrast["seeds"] == [81, 82]


def test_a_diverged_training_is_counted_as_a_collapse_and_not_tried_again(go):
    name = fresh()
    pool, said = go({"high digits s91": diverges}, name=name, seeds=[90, 91, 92])
    assert keys_of(pool).count("high s91") == 1
    assert any("high: seed 91 diverged: training loss is nan at epoch 1" in line for line in said)
    assert any(
        line.startswith("high lost 1 of 3 seeds and base 0 on digits (3 epochs), by divergence, crash or collapse: by signed rank")
        for line in said
    )
    assert any(line.startswith("Lost (diverged, crashed or collapsed)") and "high 1 of 3 (1 to 91 %)" in line for line in said)
    assert go(name=fresh(), seeds=[90, 91, 92])[0].jobs == []  # what diverged once diverges again


def test_what_failed_for_want_of_memory_is_said_and_tried_again_by_the_same_command(go):
    name = fresh()
    _, said = go({"low digits s97": ends(Outcome("failed", "out of memory: DefaultCPUAllocator"))}, name=name, seeds=[96, 97, 98])
    assert any(
        "low: seed 97 failed: out of memory: DefaultCPUAllocator; left out, since it says nothing about low." in line for line in said
    )
    assert keys_of(go(name=name, seeds=[96, 97, 98])[0]) == ["low s97"]


def test_a_bug_stops_the_comparison_at_once(go):
    name = fresh()
    with pytest.raises(JobError, match="low digits s95 broke: ZeroDivisionError"):
        go({"low digits s95": BUG}, name=name, seeds=[95])
    assert parent_of(name).info.status == "FAILED"
    assert "RUNNING" not in {child.info.status for child in children_of(name)}


def test_one_seed_is_no_answer(go):
    _, said = go(name=fresh(), seeds=[100])
    assert any("a single pair says nothing about noise" in line for line in said)
    assert not any("better than" in line and "CI" in line for line in said)


# The answer


def test_the_figures_are_those_of_scipy_on_the_exported_runs(go):
    name = fresh()
    go(name=name, seeds=12)
    table: dict[str, dict[int, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(artifact(name, "runs.csv"))):
        run = mlflow.get_run(row["run_id"])
        assert all(run.data.metrics[what] == float(row[what]) for what in ("test/loss", "test/accuracy"))
        assert (run.data.params["seed"], row["state"]) == (row["seed"], "done")
        table.setdefault(row["arm"], {})[int(row["seed"])] = {what: float(row[what]) for what in ("test/loss", "test/accuracy")}
    (block,) = json.loads(artifact(name, "answer.json"))["blocks"]
    assert len(block["contrasts"]) == 4
    for what in ("test/loss", "test/accuracy"):
        found = [contrast for contrast in block["contrasts"] if contrast["measure"] == what]
        raw = []
        for contrast in found:
            arm, base = (np.array([table[a][seed][what] for seed in range(12)]) for a in (contrast["arm"], "base"))
            test = scipy.stats.ttest_rel(arm, base)
            low, high = test.confidence_interval(0.95)
            shares = [scipy.optimize.brentq(lambda r, a=arm, b=base, s=side: edge(a, b, r, s), -5, 5, xtol=1e-13) for side in (-1, 1)]
            raw.append(test.pvalue)
            told = contrast["t"]
            expected = {
                "arm_mean": arm.mean(), "arm_sd": arm.std(ddof=1), "baseline_mean": base.mean(), "baseline_sd": base.std(ddof=1),
                "difference": (arm - base).mean(), "low": low, "high": high, "p": test.pvalue,
                "relative": arm.mean() / base.mean() - 1, "relative_low": shares[0], "relative_high": shares[1],
            }  # fmt: skip
            for key, value in expected.items():
                assert told[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
            low, high = scipy.stats.bootstrap(
                (arm - base,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0)
            ).confidence_interval
            assert contrast["bootstrap"] == pytest.approx([low, high], abs=1e-9)
        if what == "test/loss":  # which decides
            corrected = [verdict["p"] for verdict in block["verdicts"]]
            assert corrected == pytest.approx([min(1.0, 2 * min(raw)) if p == min(raw) else max(p, 2 * min(raw)) for p in raw])
            assert holm(raw) == pytest.approx(corrected)


def edge(arm: np.ndarray, base: np.ndarray, share: float, side: int) -> float:
    """Return 0 where a t test of arm - base against this share of base is just on the edge, on this side."""
    rest = (arm - base) - share * base
    t = rest.mean() / (rest.std(ddof=1) / math.sqrt(len(rest)))
    return t + side * scipy.stats.t.ppf(0.975, len(rest) - 1)


def test_the_page_says_the_answer_first_and_the_report_stands_alone(go, pictures):
    name = fresh()
    arms = {"base": {}, "<b>low</b> & co": {"lr": 0.003}}
    _, said = go(name=name, arms=arms, seeds=6, question="Is <i>low</i> better?", claims={"<b>low</b> & co": -0.2})
    note = parent_of(name).data.tags[NOTE]
    sentence = next(line for line in said if " on digits (3 epochs)" in line)
    assert note.startswith(f"* **{markdown(sentence)}**") and "| arm | n |" in note and "<b>" not in note
    report = artifact(name, "report.html")
    assert "<b>low</b>" not in report and "&lt;b&gt;low&lt;/b&gt; &amp; co" in report and "<i>low" not in report
    assert not re.search(r"(src|href)=.(?!data:image/png;base64,)", report) and "<script" not in report and "@import" not in report
    assert report.count("data:image/png;base64,") == 5 and "the command" in report
    assert any(
        re.match(r"Claimed for <b>low</b> & co: −20 % test loss\. The interval here, .* (holds|excludes) it\. ", line) for line in said
    )


def test_single_pairs_are_told_beside_the_answer(go):
    name = fresh()
    _, said = go(name=name, seeds=[120, 121])
    assert "Seed by seed (McNemar at 5 %), high is better than base in 0 of 2 single pairs, worse in 2, neither in 0." in said
    pairs = json.loads(artifact(name, "answer.json"))["blocks"][0]["single_pairs"]
    assert [(pair["arm"], pair["arm_only"], pair["baseline_only"]) for pair in pairs] == [("low", 0, 1)] * 2 + [("high", 0, 8)] * 2
    assert pairs[2]["p"] == pytest.approx(2 * 0.5**8)


# What exists already


def ask(runs: str, by: str, **keys: object) -> list[str]:
    said: list[str] = []
    existing.compare_existing(ExistingConfig.parse({"runs": runs, "by": by} | keys), said.append)
    return said


def test_runs_that_exist_give_the_same_answer_as_the_comparison_that_made_them(go):
    name = fresh()
    arms = {"0.01": {}, "0.003": {"lr": 0.003}}
    train = {"epochs": 3, "device": "cpu", "weight_decay": 0.25}
    _, said = go(name=name, arms=arms, seeds=5, train=train)
    found = ask("params.weight_decay = '0.25'", "lr")
    answers = [line for line in said if " on digits (3 epochs)" in line or line.startswith("Test accuracy")]
    assert [line for line in found if line in answers] == answers and len(answers) == 2
    back = ask("params.weight_decay = '0.25'", "lr", baseline="0.003")
    assert any(line.startswith("0.01 ") and " on digits (3 epochs)" in line and "0.003" in line for line in back)
    newest = tracking.search_runs({"stage": "compare"})[-1]
    assert newest.info.status == "FINISHED" and newest.data.params["by"] and newest.data.tags["answer"]


def test_runs_that_differ_in_more_than_the_arms_are_refused(go):
    for train in ({"epochs": 3, "weight_decay": 0.5}, {"epochs": 4, "weight_decay": 0.5}):
        go(name=fresh(), seeds=2, train=train)
    with pytest.raises(
        RunError, match=r"epochs is not the same in all \(3 in 6, 4 in 6 runs\): narrow the filter, or put epochs into --by"
    ):
        ask("params.weight_decay = '0.5'", "lr")
    with pytest.raises(RunError, match=r"epochs is not the same in all runs of base"):
        ask("params.weight_decay = '0.5'", "arm")
    assert any("2 seeds" in line for line in ask("params.weight_decay = '0.5' and params.epochs = '4'", "arm", baseline="high"))
    assert any("2 seeds" in line for line in ask("params.weight_decay = '0.5' and params.epochs = '4'", "lr"))
    assert sum("epochs=4 lr=0.1" in line for line in ask("params.weight_decay = '0.5'", "epochs,lr", baseline="epochs=3 lr=0.01")) >= 2


def test_of_several_runs_of_one_arm_and_seed_the_newest_counts_and_one_that_runs_does_not(go, monkeypatch):
    train = {"epochs": 3, "weight_decay": 0.85}
    arms = {"base": {}, "low": {"lr": 0.003}}
    go(name=fresh(), arms=arms, seeds=[150, 151], train=train)
    monkeypatch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "newer")
    name = fresh()
    go(name=name, arms=arms, seeds=[150, 151], train=train)
    config = TrainConfig(dataset="digits", lr=0.003, epochs=3, weight_decay=0.85, seed=150)
    tracking.create_run("running", tracking.experiment_id(), config, {"dataset_used": "digits"})
    said = ask("params.weight_decay = '0.85'", "lr")
    assert "digits: 4 runs have the arm and seed of a newer one and are left out" in said
    asked = tracking.search_runs({"stage": "compare"})[-1].info.run_id
    runs = json.loads(mlflow.artifacts.load_text(f"runs:/{asked}/answer.json"))["blocks"][0]["runs"]
    assert {one["run_id"] for by_seed in runs.values() for one in by_seed.values()} == {child.info.run_id for child in children_of(name)}


@pytest.mark.parametrize(
    ("runs", "by", "keys", "text"),
    [
        ("params.lr == 'x", "lr", {}, "runs=params.lr == 'x: Invalid clause"),
        ("params.lr = '77'", "lr", {}, "finds 0 runs and no whole training among them"),
        ("params.weight_decay = '0.75' and params.lr = '0.1'", "optimizer", {}, r"by=optimizer: all 2 runs are of one arm \(adam\)"),
        (
            "params.weight_decay = '0.75'",
            "optimiser",
            {},
            r"by=optimiser: is no knob, and run .* has no such tag; did you mean optimizer\?",
        ),
        ("params.weight_decay = '0.75'", "lr", {"baseline": "1"}, "baseline=1: is no arm here: choose 0.01, 0.003, 0.1"),
        (
            "params.weight_decay = '0.75' and params.lr != '0.01'",
            "lr",
            {},
            "baseline: missing; none of the arms is the default: choose 0.003, 0.1",
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_one_line(go, runs, by, keys, text):
    go(name="asked", seeds=2, train={"epochs": 3, "weight_decay": 0.75})
    with pytest.raises((RunError, ConfigError)) as caught:
        ask(runs, by, **keys)
    assert re.search(text, str(caught.value)) and "\n" not in str(caught.value)


def test_the_entry_point_takes_a_file_or_a_filter(monkeypatch, tmp_path):
    asked: list[object] = []
    monkeypatch.setattr(existing, "compare_existing", lambda config, say, command: asked.append((config, command)))
    entry.compare(["--runs", "params.lr = '0.01'", "--by", "transform,coordconv"])
    ((config, command),) = asked
    assert (config.runs, config.by) == ("params.lr = '0.01'", ("transform", "coordconv")) and "--by transform,coordconv" in command
    with pytest.raises(ConfigError, match="by: missing"):
        entry.compare(["--runs", "x"])
    with pytest.raises(ConfigError, match="config: missing; it is the comparison file"):
        entry.compare([])
    with pytest.raises(ConfigError, match="unknown flag --seed; did you mean seeds"):
        entry.compare(["x.yaml", "--seed", "3"])


def test_a_run_that_goes_on_no_longer_says_why_it_failed(go):
    name = fresh()
    with pytest.raises(JobError):
        go({"low digits s130": BUG}, name=name, seeds=[130])
    assert "ZeroDivisionError" in parent_of(name).data.tags["error"]
    go(name=name, seeds=[130])
    assert "error" not in parent_of(name).data.tags and parent_of(name).info.status == "FINISHED"

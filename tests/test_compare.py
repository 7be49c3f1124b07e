"""A comparison from end to end on a real MLflow store, without training: what is trained, used again, interrupted, lost."""

import json

import mlflow
import pytest
import torch

from stn_pipeline import tracking
from stn_pipeline.comparing import compare
from stn_pipeline.comparing.comparefile import CompareConfig
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Splits, load
from stn_pipeline.errors import ConfigError
from stn_pipeline.jobs import Job, Outcome, places
from stn_pipeline.jobs.driver import JobError
from stn_pipeline.training.fingerprint import conditions, fingerprint
from tests.compared import (
    KEYS,
    NOTE,
    TWO,
    Go,
    artifact,
    block_of,
    children_of,
    diverges,
    drawn,
    fresh,
    goer,
    keys_of,
    parent_of,
    whole,
    without_pictures,
)
from tests.fakes import BUG, LOST, Killed, News, ends, record


@pytest.fixture
def go(request, store, signals_restored, monkeypatch) -> Go:
    if "pictures" not in request.fixturenames:
        without_pictures(monkeypatch)
    return goer(monkeypatch)


@pytest.fixture
def pictures():
    """Have the pictures drawn, which takes a second."""


# What is trained


def test_each_arm_is_trained_with_each_seed_and_the_same_command_again_says_the_same(go, pictures):
    name, asked = fresh(), {"seeds": [500, 501], "train": {"epochs": 3, "device": "cpu", "weight_decay": 0.1}}
    pool, said = go({"": drawn}, name=name, **asked)
    assert keys_of(pool) == [f"{arm} s{seed}" for seed in (500, 501) for arm in ("base", "low", "high")]
    assert all(job.whole and job.config.weight_decay == 0.1 and job.config.epochs == 3 for job in pool.jobs)
    assert {job.key.split()[0]: job.config.lr for job in pool.jobs} == {"base": 0.01, "low": 0.003, "high": 0.1}
    children = children_of(name)
    assert {child.info.status for child in children} == {"FINISHED"} and len(children) == 6
    assert {(child.data.tags["arm"], child.data.params["seed"], child.data.params["lr"]) for child in children} == {
        (arm, seed, lr) for arm, lr in (("base", "0.01"), ("low", "0.003"), ("high", "0.1")) for seed in ("500", "501")
    }
    parent = parent_of(name)
    assert parent.info.status == "FINISHED" and "6 trainings" in said[0]
    files = {item.path for item in mlflow.MlflowClient().list_artifacts(parent.info.run_id)}
    assert {"report.html", "answer.json", "runs.csv", "forest.png", "losses.png", "seeds.png", "confusions.png", "diagnostics.png"} <= files

    assert "Seed by seed (McNemar at 5 %), high is better than base in 0 of 2 single pairs, worse in 2, neither in 0." in said
    pairs = block_of(name)["single_pairs"]
    assert [(pair["arm"], pair["arm_only"], pair["baseline_only"]) for pair in pairs] == [("low", 0, 1)] * 2 + [("high", 0, 8)] * 2
    assert pairs[2]["p"] == pytest.approx(2 * 0.5**8)

    again, repeated = go(name=name, workers=3, **asked)  # the number of workers is no part of the question
    assert again.jobs == [] and parent_of(name).info.run_id == parent.info.run_id and len(children_of(name)) == 6
    assert repeated[2:] == said[said.index(repeated[2]) :] and "6 done before" in repeated[1]
    assert len(tracking.search_runs({"comparison": name, "stage": "compare"})) == 1


def test_more_seeds_and_another_arm_train_only_what_is_new_and_a_look_that_was_not_planned_is_told(go):
    _, first = go(name=fresh(), arms=TWO, seeds=[20, 21])
    more, said = go(name=fresh(), arms=TWO, seeds=[20, 21, 22])
    assert keys_of(more) == ["base s22", "low s22"] and "4 runs of others" in said[1]
    told = "This question was answered before with 2 seeds: this is look 2, and p is not corrected for that. "
    assert f"{told}Planned looks (seeds: {{looks: [2, 3]}}) are." in said and not any("answered before" in line for line in first)
    third, said = go(name=fresh(), arms=TWO, seeds=[20, 21, 22, 23])
    assert keys_of(third) == ["base s23", "low s23"]
    assert any(line.startswith("This question was answered before with 2, 3 seeds: this is look 3") for line in said)
    other, said = go(name=fresh(), arms=TWO | {"tiny": {"lr": 1e-4}}, seeds=[20, 21])
    assert keys_of(other) == ["tiny s20", "tiny s21"] and not any("answered before" in line for line in said)  # another question


def test_a_run_of_other_knobs_pixels_or_code_is_not_used_again(go, monkeypatch):
    asked = {"arms": TWO, "seeds": [30]}
    go(name=fresh(), **asked)
    assert len(go(name=fresh(), **asked, train=KEYS["train"] | {"epochs": 4})[0].jobs) == 2
    assert len(go(name=fresh(), **asked, train=KEYS["train"] | {"val_fraction": 0.2})[0].jobs) == 2
    assert go(name=fresh(), **asked, train=KEYS["train"] | {"data_dir": "elsewhere"})[0].jobs == []
    monkeypatch.setattr("stn_pipeline.training.fingerprint.code_version", lambda: "another")
    assert len(go(name=fresh(), **asked)[0].jobs) == 2


def test_a_cell_has_the_fingerprint_that_its_training_will_have(store):
    settings = {"as they are": {}, "turned": {"distortion": "rotated"}, "twice": {"distortion": "rts", "draws": 2}}
    cells = compare._cells(
        CompareConfig.parse(KEYS | {"name": "x", "seeds": [0, 3], "settings": settings}), places.Here(1), lambda line: None, compare.Tuned()
    )
    assert {cell.config.compile for cell in cells} == {"off"}  # one engine, whatever each arm would get by itself
    assert len({cell.fingerprint for cell in cells}) == len(cells) == 18
    for cell in cells:
        splits = load(cell.config, announce=lambda line: None)
        assert cell.fingerprint == fingerprint(cell.config, splits, conditions("plain", torch.device("cpu")))


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


def test_arms_of_a_block_that_would_be_tested_on_other_images_are_refused_before_anything_starts(go, monkeypatch):
    digests = Splits.digests

    def changed(splits: Splits) -> dict[str, str]:  # as if files were changed between the loading of two arms' data
        return digests(splits) | {"test": str(len(splits.train))}

    monkeypatch.setattr(Splits, "digests", changed)
    name = fresh()
    with pytest.raises(ConfigError, match="arms base and more: their test images differ on digits, so nothing can be compared") as caught:
        go(name=name, arms={"base": {}, "more": {"val_fraction": 0.2}}, seeds=[50])
    assert "\n" not in str(caught.value) and tracking.search_runs({"comparison": name}) == []


def test_two_settings_are_two_tables_and_what_they_share_is_trained_once(go):
    name = fresh()
    arms = {"base": {}, "none": {"transform": "none"}}
    pool, said = go(name=name, arms=arms, seeds=[40, 41], settings={"fast": {"loc_lr_multiplier": 1.0}, "slow": {}})
    assert keys_of(pool) == [f"{cell} s{seed}" for seed in (40, 41) for cell in ("base fast", "none fast", "base slow")]
    blocks = json.loads(artifact(name, "answer.json"))["blocks"]
    assert [block["title"] for block in blocks] == ["digits, fast", "digits, slow"]
    assert [list(block["figures"]["test/loss"]["none"]) for block in blocks] == [["40", "41"]] * 2
    assert {verdict["n_verdicts"] for block in blocks for verdict in block["verdicts"]} == {2}, "both blocks are one family"
    for block in blocks:
        where = f"{block['title']} (3 epochs)"
        assert block["where"] == where and any(line.startswith("none ") and where in line for line in said)


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


def test_an_interrupt_closes_what_ran_and_the_same_command_goes_on_though_one_seed_is_no_answer(go):
    name = fresh()
    with pytest.raises(KeyboardInterrupt):
        go({"high digits s70": ends(record(1, 1.0), KeyboardInterrupt())}, name=name, seeds=[70])
    assert parent_of(name).info.status == "KILLED" and "same command" in parent_of(name).data.tags[NOTE]
    assert sorted(child.info.status for child in children_of(name)) == ["FINISHED", "FINISHED", "KILLED"]
    pool, said = go(name=name, seeds=[70])
    assert keys_of(pool) == ["high s70"] and parent_of(name).info.status == "FINISHED"
    assert sum("a single pair says nothing about noise" in line for line in said) == 2
    assert not any("better than" in line or " CI " in line for line in said)


def test_what_is_lost_counts_against_its_arm_and_what_failed_for_another_reason_does_not(go):
    name, seeds = fresh(), [80, 81, 82, 83]
    plays = {
        "low digits s80": LOST,
        "high digits s81": diverges,
        "low digits s82": ends(Outcome("failed", "out of memory: DefaultCPUAllocator")),
    }
    pool, said = go(plays, name=name, seeds=seeds)
    assert keys_of(pool).count("low s80") == 2 and keys_of(pool).count("high s81") == 1
    assert "low: seed 80 is missing: it was not trained to the end; left out, since it says nothing about low." in said
    assert "low: seed 82 failed: out of memory: DefaultCPUAllocator; left out, since it says nothing about low." in said
    assert "high: seed 81 diverged: training loss is nan at epoch 1." in said
    assert any(line.startswith("high lost 1 of 4 seeds and base 0 on digits (3 epochs), by divergence") for line in said)
    assert any("low 0 of 2 (0 to 84 %), high 1 of 4 (1 to 81 %). Fisher's exact test against base: high p = 1." in line for line in said)
    verdicts = {verdict["arm"]: verdict for verdict in block_of(name)["verdicts"]}
    assert (verdicts["low"]["seeds"], verdicts["low"]["test"], verdicts["low"]["lost"]) == ([81, 83], "t", 0)
    assert (verdicts["high"]["seeds"], verdicts["high"]["test"], verdicts["high"]["lost"]) == (seeds, "signed rank", 1)
    assert keys_of(go(name=name, seeds=seeds)[0]) == ["low s80", "low s82"]  # what diverged once diverges again
    assert go(name=fresh(), seeds=seeds)[0].jobs == []


def test_a_bug_stops_the_comparison_at_once_and_one_that_goes_on_no_longer_says_why_it_failed(go):
    name = fresh()
    with pytest.raises(JobError, match="low digits s95 broke: ZeroDivisionError"):
        go({"low digits s95": BUG}, name=name, arms=TWO, seeds=[95])
    assert parent_of(name).info.status == "FAILED" and "ZeroDivisionError" in parent_of(name).data.tags["error"]
    assert "RUNNING" not in {child.info.status for child in children_of(name)}
    go(name=name, arms=TWO, seeds=[95])
    assert "error" not in parent_of(name).data.tags and parent_of(name).info.status == "FINISHED"


def test_a_training_of_another_comparison_that_runs_is_not_taken_over(go):
    config = TrainConfig.parse({"dataset": "digits", "lr": 0.003, "seed": 97} | KEYS["train"])
    cells = compare._cells(
        CompareConfig.parse(KEYS | {"name": "x", "arms": TWO, "seeds": [97]}), places.Here(1), lambda line: None, compare.Tuned()
    )
    tags = {"fingerprint": cells[1].fingerprint, "stage": "arm"}
    other = tracking.create_run("another's", tracking.experiment_id(), config, tags)
    pool, _ = go({"": whole}, name=fresh(), arms=TWO, seeds=[97])
    assert keys_of(pool) == ["base s97", "low s97"] and mlflow.get_run(other.id).info.status == "RUNNING"

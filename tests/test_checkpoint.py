"""A damaged checkpoint is refused, or is read as it was written: flipped bits, holes, cuts, more bytes, another's pages, by the hundred."""

import random
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stn_pipeline.config import TrainConfig
from stn_pipeline.errors import RunError
from stn_pipeline.model import build
from stn_pipeline.training import Checkpoint, State, checkpoint
from stn_pipeline.training.fit import _load_optimizer
from stn_pipeline.training.step import make_optimizer
from tests.test_training import assert_same

SHAPE, CLASSES = (1, 8, 8), tuple("0123456789")


def config(**knobs: object) -> TrainConfig:
    return TrainConfig.parse({"dataset": "digits", "device": "cpu", "epochs": 3, **knobs})


def made(epoch: int, seed: int = 0) -> Checkpoint:
    """Return a checkpoint as after so many epochs: the first weights, one step of the optimiser, made-up losses."""
    network = build(config(seed=seed), SHAPE, len(CLASSES))
    optimizer = make_optimizer(network, config())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    history = [{"number": number, "val_loss": 1 / number} for number in range(1, epoch + 1)]
    return Checkpoint(config(), SHAPE, CLASSES, State(network.state_dict(), optimizer.state_dict(), network.state_dict(), epoch, history))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Three whole checkpoints: after two epochs, of the epoch before, and of another seed."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, content in {"newest": made(2), "before": made(1), "other": made(2, seed=1)}.items():
        checkpoint.save(content, folder / name)
        found[name] = (folder / name).read_bytes()
    return found


def flip(whole: bytearray, other: bytes, draw: random.Random) -> None:
    whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)


def flip_near_the_end(whole: bytearray, other: bytes, draw: random.Random) -> None:
    whole[-draw.randint(1, 200)] ^= 1 << draw.randrange(8)


def cut(whole: bytearray, other: bytes, draw: random.Random) -> None:
    del whole[draw.choice([draw.randrange(len(whole)), len(whole) - draw.randint(1, 200)]) :]


def hole(whole: bytearray, other: bytes, draw: random.Random) -> None:
    first = draw.randrange(len(whole))
    length = min(draw.choice([1, 16, 512, 4096, len(whole)]), len(whole) - first)
    whole[first : first + length] = bytes(length)


def more(whole: bytearray, other: bytes, draw: random.Random) -> None:
    whole += draw.choice([bytes(draw.randint(1, 4096)), draw.randbytes(71), other])


def page_of_another(whole: bytearray, other: bytes, draw: random.Random) -> None:
    first = draw.randrange(0, len(whole), 4096)
    whole[first : first + 4096] = other[first : first + 4096]


def without_a_digest(whole: bytearray, other: bytes, draw: random.Random) -> None:
    """What looks like a file of an earlier version, and is one bit wrong."""
    del whole[-checkpoint.DIGEST_BYTES :]
    flip(whole, other, draw)


DAMAGES: list[Callable[[bytearray, bytes, random.Random], None]] = [
    flip,
    flip_near_the_end,
    cut,
    hole,
    more,
    page_of_another,
    without_a_digest,
]


def check_damages(files: dict[str, bytes], folder: Path, n: int, seed: int) -> Counter[str]:
    """Damage a checkpoint in n ways; each is refused, or read as what was written."""
    right = checkpoint.load_newest([_written(files["newest"], folder / "right.pt")])
    assert right is not None
    counts: Counter[str] = Counter()
    draw = random.Random(seed)
    for _ in range(n):
        damaged, damage = bytearray(files["newest"]), draw.choice(DAMAGES)
        damage(damaged, files["other"], draw)
        found = checkpoint.load_newest([_written(damaged, folder / "damaged.pt")])
        if found is None:
            counts["refused"] += 1
            continue
        for part in ("config", "image_shape", "classes", "digests"):
            assert_same(getattr(found, part), getattr(right, part), f"{damage.__name__}: {part}")
        assert_same(vars(found.state), vars(right.state), damage.__name__)
        counts["unchanged" if damaged == files["newest"] else "equal"] += 1  # holes where zeros were; padding of no meaning
    return counts


def test_no_damage_is_read_as_something_else(files, tmp_path):
    assert check_damages(files, tmp_path, 400, seed=0)["refused"] >= 340


@pytest.mark.slow
def test_no_damage_of_ten_thousand_is_read_as_something_else(files, tmp_path):
    counts = check_damages(files, tmp_path, 10_000, seed=1)
    print(f"damaged checkpoints: tried {counts.total()}, {dict(counts)}")
    assert counts["refused"] >= 8_500


def test_of_a_damaged_newest_one_the_one_before_is_taken(files, tmp_path):
    damaged = bytearray(files["newest"])
    damaged[len(damaged) // 2] ^= 1
    found = checkpoint.load_newest([_written(damaged, tmp_path / "even.pt"), _written(files["before"], tmp_path / "odd.pt")])
    assert found is not None and found.state.epoch == 1


def test_it_is_still_the_archive_that_torch_writes(files, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(files["newest"])
    assert torch.load(path, weights_only=True)["classes"] == CLASSES
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")


def test_a_checkpoint_of_an_earlier_version_has_no_digest_and_is_read(files, tmp_path):
    content = torch.load(_written(files["newest"], tmp_path / "new.pt"), weights_only=True)
    torch.save(content, tmp_path / "old.pt")
    found = checkpoint.load_newest([tmp_path / "old.pt"])
    assert found is not None and found.state.epoch == 2
    torn = _written((tmp_path / "old.pt").read_bytes()[:-30], tmp_path / "torn.pt")
    assert checkpoint.load_newest([torn]) is None


@pytest.mark.parametrize(
    "error", [MemoryError(), NotImplementedError("compression"), UnicodeDecodeError("utf-8", b"", 0, 1, ""), RecursionError()]
)
def test_whatever_reading_raises_the_other_file_is_taken(files, tmp_path, monkeypatch, error):
    whole, fails = torch.load, iter([True, False])

    def load(*args: object, **more: object) -> object:
        if next(fails):
            raise error
        return whole(*args, **more)

    monkeypatch.setattr(torch, "load", load)
    paths = [_written(files[name], tmp_path / name) for name in ("newest", "before")]
    found = checkpoint.load_newest(paths)
    assert found is not None and found.state.epoch == 1


def test_weights_of_another_network_are_one_line():
    good = made(1)
    coord = Checkpoint(config(coordconv=True), SHAPE, CLASSES, good.state)
    with pytest.raises(RunError, match=r"^checkpoint: its weights do not fit this network \(.*\): other code wrote it; train anew$"):
        coord.build_best()


def test_an_optimisers_values_of_another_network_are_one_line():
    narrow, wide = (make_optimizer(build(config(coordconv=on), SHAPE, len(CLASSES)), config()) for on in (False, True))
    for group in narrow.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    narrow.step()
    with pytest.raises(RunError, match=r"^checkpoint: its values do not fit this optimiser \(exp_avg has shape .*\): other code wrote it"):
        _load_optimizer(wide, narrow.state_dict())
    with pytest.raises(RunError, match="do not fit this optimiser"):
        _load_optimizer(wide, {"state": {}, "param_groups": []})


def _written(content: bytes | bytearray, path: Path) -> Path:
    path.write_bytes(content)
    return path

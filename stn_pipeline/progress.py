"""What the console shows of a training or a sweep: a bar in a terminal, a line an epoch or a trial elsewhere."""

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

from stn_pipeline.interrupts import check
from stn_pipeline.texts import printable
from stn_pipeline.training import Record


class Progress:
    """Loss, accuracy, images/s and time left.

    `tick` and `watch` are what fit and run_trial call.
    """

    def __init__(self, n_epochs: int, n_images: int, done: int = 0):
        self.n_epochs = n_epochs
        self.bar = tqdm(
            total=n_epochs * n_images,
            initial=done * n_images,
            unit=" images",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
            desc=f"epoch {done}/{n_epochs}",
        )
        self.troubled = False

    def tick(self, n_images: int) -> None:
        """Move the bar by a step's images."""
        check()
        self.bar.update(n_images)

    def watch(self, record: Record) -> None:
        """Show an epoch's numbers, and once what looks collapsed."""
        check()
        if self.bar.disable:
            print(
                f"epoch {record.number:>{len(str(self.n_epochs))}}/{self.n_epochs}"
                f"  train {record.train_loss:.4f} {record.train_accuracy:.4f}  val {record.val_loss:.4f} {record.val_accuracy:.4f}"
                f"  {record.seconds:.1f} s  {record.images_per_s:,.0f} images/s",
                flush=True,
            )
        self.bar.set_description(f"epoch {record.number}/{self.n_epochs}", refresh=False)
        self.bar.set_postfix_str(f"train {record.train_loss:.4f}, val {record.val_loss:.4f}, val accuracy {record.val_accuracy:.4f}")
        if record.trouble and not self.troubled:
            self.troubled = True
            self.bar.write(
                f"warning: epoch {record.number} looks collapsed: {record.trouble}; try a smaller loc_lr_multiplier or lr", file=sys.stderr
            )

    def __enter__(self) -> Self:
        """Show the bar."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the bar where it is."""
        self.bar.close()


class Driven(Protocol):
    """What the bar shows of a study or a comparison."""

    @property
    def n_left(self) -> int:
        """Number of jobs still to be done."""

    @property
    def state(self) -> str:
        """How far it is, in words."""


class JobsProgress:
    """Jobs done, how it stands, time left; a line for each job that ends."""

    def __init__(self) -> None:
        self.bar: tqdm[None] | None = None

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        line = printable(line)
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def watch(self, sources: Sequence[Driven]) -> Callable[[], None]:
        """Show the bar; return what moves it."""
        n_left = before = sum(source.n_left for source in sources)
        self.bar = bar = tqdm(total=n_left, unit=" jobs", disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0.05)

        def move() -> None:
            nonlocal before
            check()
            left = sum(source.n_left for source in sources)
            if left < before:
                bar.update(before - left)
            elif left > before:
                bar.total += left - before
            before = left
            bar.set_postfix_str("; ".join(source.state for source in sources))

        return move

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the bar where it is."""
        if self.bar is not None:
            self.bar.close()

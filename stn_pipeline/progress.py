"""What the console shows of a training: a bar in a terminal, a line an epoch elsewhere."""

import os
import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm

from stn_pipeline.training import Record


def _say(line: str) -> None:
    """Print a line; where nobody reads any more (`| head`), go on in silence."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # for the rest of the process


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
        self.bar.update(n_images)

    def watch(self, record: Record) -> None:
        """Show an epoch's numbers, and once what looks collapsed."""
        if self.bar.disable:
            _say(
                f"epoch {record.number:>{len(str(self.n_epochs))}}/{self.n_epochs}"
                f"  train {record.train_loss:.4f} {record.train_accuracy:.4f}  val {record.val_loss:.4f} {record.val_accuracy:.4f}"
                f"  {record.seconds:.1f} s  {record.images_per_s:,.0f} images/s"
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

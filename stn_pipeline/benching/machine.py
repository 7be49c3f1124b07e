"""What machine and versions a figure was measured with."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import stn_pipeline
from stn_pipeline.jobs import available_cores
from stn_pipeline.training.device import describe, processor


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, processor, cores, versions, commit and date."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": describe(device), "processor": processor(), "cores": available_cores(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "commit": asked.stdout.strip() or stn_pipeline.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip

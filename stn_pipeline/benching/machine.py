"""What machine and versions a figure was measured with."""

import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import stn_pipeline
from stn_pipeline.jobs import available_cores
from stn_pipeline.training.device import describe


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, processor, cores, versions, commit and date."""
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": describe(device), "processor": _processor(), "cores": available_cores(), "system": platform.system(),
        "python": platform.python_version(), "torch": torch.__version__, "commit": asked.stdout.strip() or stn_pipeline.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()

"""Paths that users write."""

import os
from pathlib import Path

from stn_pipeline.errors import ConfigError


def expanded(text: str) -> Path:
    """Return a path with ~ written out; nothing need be there.

    Raises: ConfigError where nothing ever could: ~ of nobody, a loop of links, a name that is too long, a zero byte.
    """
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except RuntimeError as error:
        raise ConfigError(f"{text.partition('/')[0]} is nobody's home: write the whole path") from error
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be a path ({getattr(error, 'strerror', None) or error}): give another") from error
    return path

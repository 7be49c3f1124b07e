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


def for_output(name: str, text: str) -> Path:
    """Return the path of a file that is to be written.

    Raises: ConfigError that names the flag, where it cannot be, or its folder is not there.
    """
    try:
        path = expanded(text)
    except ConfigError as error:
        raise ConfigError(f"{name}={text}: {error}") from error
    if not path.parent.is_dir():
        raise ConfigError(f"{name}={text}: no folder {path.parent}: make it first")
    if path.is_dir():
        raise ConfigError(f"{name}={text}: is a folder: name a file")
    return path

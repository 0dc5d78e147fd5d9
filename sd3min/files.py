"""Files that are written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 255 - 15  # bytes of a name that `whole` has room for beside its own, on most systems


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to; it takes the path's place at the end,
    and is gone if anything fails.

    Nobody else has that name, so that several processes may write the same file.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # it was a folder, or is not there
        path.unlink()

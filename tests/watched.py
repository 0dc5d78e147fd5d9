"""How much memory a program takes at most, in a process of its own."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY = 0.02  # seconds


class Peaks(dict):
    """Most bytes of each kind, and what the program printed."""

    printed = ""


def counts(pid: int) -> dict[str, int]:
    """Memory of a process in bytes: that no file stands behind, and with the pages of files."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(kib) << 10 for name, kib in re.findall(r"(\w+): +(\d+) kB", text)}
    return {"private": found["Anonymous"], "resident": found["Rss"]}


def run(program: str, *arguments: object) -> Peaks:
    """The peaks of a Python program."""
    peaks = Peaks(private=0, resident=0)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out, subprocess.Popen(command, stdout=out) as process:
        while process.poll() is None:
            try:
                now = counts(process.pid)
            except OSError:
                break
            peaks.update({kind: max(peaks[kind], value) for kind, value in now.items()})
            time.sleep(EVERY)
        assert process.wait() == 0
        out.seek(0)
        peaks.printed = out.read()
    return peaks

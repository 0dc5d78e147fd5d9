"""Execute the notebooks and write them down with their outputs, light enough to be committed:
python tools/notebooks.py [NAME …] [--into FOLDER].

Of every `notebooks/*.py`, or of those whose names begin so, a `.ipynb` is written beside it or into
a folder; each runs in a clean kernel, elsewhere. A table says what each cost.
"""

import argparse
import base64
import io
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
from PIL import Image

from sd3min.files import whole

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 600  # for one cell
COLOURS = 128  # of a picture: figures have few


def execute(source: Path) -> Any:
    """The notebook of a source, after it has run from top to bottom in a folder of its own."""
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        options = {"timeout": SECONDS, "resources": resources, "record_timing": False}
        options["extra_arguments"] = ["--log-level=ERROR"]  # it tells of its sockets
        nbclient.NotebookClient(notebook, **options).execute()
    return notebook


def smaller(picture: str) -> str:
    """A PNG in base64 with a palette in place of full colours."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.convert("RGBA").getchannel("A"))
    written = io.BytesIO()
    flat.quantize(COLOURS, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def lighten(notebook: Any) -> Any:
    """The notebook without progress bars and warnings, its pictures small, its cells numbered."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        outputs = cell.get("outputs", [])
        outputs[:] = [output for output in outputs if output.get("name") != "stderr"]
        for output in outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Write a notebook whole or not at all."""
    with whole(path) as part:
        part.write_text(nbformat.writes(notebook), encoding="utf-8")


def cpu() -> float:
    """Seconds that finished child processes have computed, on all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Execute, write, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of names (default: all)")
    parser.add_argument("--into", type=Path, default=FOLDER, help="default: beside the sources")
    asked = parser.parse_args()
    asked.into.mkdir(parents=True, exist_ok=True)
    print(f"{'notebook':32} {'CPU s':>6} {'s':>6} {'kB':>5}")
    for source in sorted(FOLDER.glob("*.py")):
        if asked.names and not source.name.startswith(tuple(asked.names)):
            continue
        used, began = cpu(), time.monotonic()
        path = asked.into / f"{source.stem}.ipynb"
        write(lighten(execute(source)), path)
        figures = cpu() - used, time.monotonic() - began, path.stat().st_size / 1000
        print(f"{source.stem:32} {figures[0]:6.1f} {figures[1]:6.1f} {figures[2]:5.0f}", flush=True)


if __name__ == "__main__":
    main()

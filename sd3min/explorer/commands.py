"""The command `sd3min explore`: a local page on which to draw and to look inside."""

import argparse
import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

from sd3min import loading, options
from sd3min.config import Refusal
from sd3min.generate import add_files

LOOPBACK = "127.0.0.1"


def add_explore(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min explore`."""
    parser.set_defaults(run=run_explore)
    add_files(parser)
    add = parser.add_argument
    add("--no-t5", action="store_true", help="leave T5 out: zeros in its place")
    add("--dtype", help="float32, bfloat16 or float16")
    add("--device", help="cpu, cuda, …")
    add = parser.add_argument_group("page").add_argument
    host = f"address to listen on; 0.0.0.0 lets the network in (default: {LOOPBACK}, this machine)"
    add("--host", type=options.text, default=LOOPBACK, help=host)
    add("--port", type=options.whole, help="to listen on (default: the first free from 7860 on)")
    add("--no-browser", action="store_true", help="print the address and open nothing")


def given_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `sd3min.load` that the command line has."""
    named = {"path": arguments.weights, "t5": False if arguments.no_t5 else None}
    for name in ("text_encoders", "tokenizers", "lora", "dtype", "device"):
        named[name] = getattr(arguments, name)
    return {name: value for name, value in named.items() if value is not None}


def run_explore(arguments: argparse.Namespace) -> None:
    """Load the model and serve the page until it is interrupted."""
    port, loaded = arguments.port, given_model(arguments)
    if port is not None and not 1 <= port <= 65535:
        raise Refusal(f"--port {port} is not a port: pass a number from 1 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise Refusal('the page needs gradio: pip install "sd3min[explore]"')
    pipe = loading.load(**loaded)

    from sd3min.explorer.page import Page
    from sd3min.explorer.studio import Studio

    names = [Path(path).stem for path in arguments.weights or ["sd3-tiny"]]
    page = Page(Studio(pipe), names[-1], loaded)
    address = page.launch(arguments.host, port, not arguments.no_browser)
    print(f"{address}\nCtrl-C ends it.", flush=True)
    if arguments.host not in (LOOPBACK, "localhost", "::1"):
        print("Whoever reaches this machine may use the page.", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.blocks.close(verbose=False)

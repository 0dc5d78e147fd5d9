"""What all probes need: the plain network to watch, and hooks that are gone afterwards."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sd3min.config import Refusal
from sd3min.mmdit import MMDiT
from sd3min.pipeline import Pipeline
from sd3min.text_encoders import TextEncoders


def plain(pipe: Pipeline) -> tuple[MMDiT, TextEncoders]:
    """The plain network and encoders of a pipeline; Refusal under a plan of memory, which computes
    with other modules.
    """
    own = vars(pipe)
    mmdit, encoders = own.get("mmdit"), own.get("text_encoders")
    if not isinstance(mmdit, MMDiT) or not isinstance(encoders, TextEncoders):
        raise Refusal("probes watch the plain network: load the model without memory= and cache=")
    return mmdit, encoders


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """A hook on modules' outputs for a while."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Looking inside: what attention reads, the way to a picture, both streams, and parts left out;
traces of a network's tensors, where two of them part, and `verify`.

Figures of all that are in `sd3min.probes.plots`, which needs matplotlib.
"""

from sd3min.probes.ablation import Ablation, ablate
from sd3min.probes.attention import Attention, attention, word_rows
from sd3min.probes.checks import Check
from sd3min.probes.named import Named
from sd3min.probes.path import Path, path
from sd3min.probes.streams import modulation, norms, similarity, tokens
from sd3min.probes.trace import Difference, Trace, first_difference, trace
from sd3min.probes.verify import verify

__all__ = [
    "Ablation",
    "Attention",
    "Check",
    "Difference",
    "Named",
    "Path",
    "Trace",
    "ablate",
    "attention",
    "first_difference",
    "modulation",
    "norms",
    "path",
    "similarity",
    "tokens",
    "trace",
    "verify",
    "word_rows",
]

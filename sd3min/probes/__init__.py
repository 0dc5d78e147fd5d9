"""Looking inside: traces of a network's tensors, where two of them part, and `verify`."""

from sd3min.probes.checks import Check
from sd3min.probes.trace import Difference, Trace, first_difference, trace
from sd3min.probes.verify import verify

__all__ = ["Check", "Difference", "Trace", "first_difference", "trace", "verify"]

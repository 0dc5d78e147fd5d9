"""Looking inside: traces of a network's tensors, and where two of them part."""

from sd3min.probes.trace import Difference, Trace, first_difference, trace

__all__ = ["Difference", "Trace", "first_difference", "trace"]

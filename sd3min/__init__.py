"""Stable Diffusion 3 from scratch: everything between a prompt and its picture."""

from sd3min import flow, lora
from sd3min.checkpoint import load_autoencoder, load_mmdit, load_text_encoders
from sd3min.config import Refusal
from sd3min.conventions import CONVENTIONS, Conventions
from sd3min.differences import explain
from sd3min.loading import load
from sd3min.pipeline import Pipeline, save
from sd3min.record import read_record
from sd3min.settings import Settings

__all__ = [
    "CONVENTIONS",
    "Conventions",
    "Pipeline",
    "Refusal",
    "Settings",
    "explain",
    "flow",
    "load",
    "load_autoencoder",
    "load_mmdit",
    "load_text_encoders",
    "lora",
    "read_record",
    "save",
]
__version__ = "0.1.0"

"""LoRA: small changes of a model's layers, trained, loaded from anybody's files, and merged.

trained = lora.add({"mmdit": pipe.mmdit}, rank=4)
optimizer = torch.optim.AdamW(trained.parameters(), 1e-4)
…
lora.save(trained, "cat.safetensors")
sd3min.load(lora=[("cat.safetensors", 0.8)])
"""

from sd3min.lora.merging import LoRAs, merged
from sd3min.lora.model import (
    TARGETS,
    LoRA,
    Word,
    add,
    add_words,
    attach,
    detach,
    merge,
    unmerge,
)
from sd3min.lora.reading import read
from sd3min.lora.summary import is_lora, summary
from sd3min.lora.writing import save

__all__ = [
    "TARGETS",
    "LoRA",
    "LoRAs",
    "Word",
    "add",
    "add_words",
    "attach",
    "detach",
    "is_lora",
    "merge",
    "merged",
    "read",
    "save",
    "summary",
    "unmerge",
]

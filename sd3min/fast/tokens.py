"""Tokenizers without transformers, where transformers 5 wrote their `tokenizer.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sd3min.checkpoint import TOKENIZERS, Checkpoint, pretrained


class Encodings(NamedTuple):
    """Token ids of each text, and where in it each token begins and ends."""

    input_ids: list[list[int]]
    offset_mapping: list[list[tuple[int, int]]]


class FileTokenizer:
    """A tokenizer by the rules of its `tokenizer.json`; it neither cuts nor pads."""

    def __init__(self, rules: Any, pad_token_id: int):
        """`rules`: a `tokenizers.Tokenizer`."""
        self.rules, self.pad_token_id = rules, pad_token_id
        rules.no_padding()
        rules.no_truncation()

    @classmethod
    def of(cls, folder: Path, kind: str) -> "FileTokenizer | None":
        """The one in a folder, if transformers 5 wrote it as its class `kind`: older files it reads
        in a way of its own, and so it does where the two files there do not agree.
        """
        import tokenizers

        config = folder / "tokenizer_config.json"
        said = json.loads(config.read_text()) if config.is_file() else {}
        written = said.get("backend"), said.get("tokenizer_class")
        if written != ("tokenizers", kind):
            return None
        rules = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = {t.content: i for i, t in rules.get_added_tokens_decoder().items() if t.special}
        named = [text for name, text in said.items() if name.endswith("_token")]
        named += said.get("extra_special_tokens") or []
        agree = all(isinstance(text, str) and text in special for text in named)
        return cls(rules, special[said["pad_token"]]) if agree and "pad_token" in said else None

    def __len__(self) -> int:
        """Tokens that there are."""
        return self.rules.get_vocab_size()

    def __call__(
        self, texts: Sequence[str], return_offsets_mapping: bool = False, verbose: bool = False
    ) -> Encodings:
        """Ids and places of texts, in full and without a word, whatever the options."""
        if isinstance(texts, str):
            raise TypeError(f"a list of texts is encoded, and not the text {texts!r}")
        found = self.rules.encode_batch(list(texts))
        return Encodings([each.ids for each in found], [each.offsets for each in found])


def load_tokenizer(opened: Checkpoint, name: str) -> Any:
    """An encoder's tokenizer: a `FileTokenizer` where that is the same, else transformers'."""

    def read(name: str, folder: Path) -> Any:
        return FileTokenizer.of(folder, TOKENIZERS[name][1]) or pretrained(name, folder)

    return opened.load_tokenizer(name, read)

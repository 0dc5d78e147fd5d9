"""Small random models, and checked shapes: jaxtyping's annotations are enforced while tests run."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("sd3min", "typechecker.check")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An official single file of `small.pipeline`, tokenizers beside it; not to be written to."""
    import small

    folder = tmp_path_factory.mktemp("small")
    return small.save_official(small.pipeline(folder), folder / "whole.safetensors")

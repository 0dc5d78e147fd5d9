"""Small random models, and checked shapes: jaxtyping's annotations are enforced while tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("sd3min", "typechecker.check")

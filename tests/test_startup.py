"""What a fresh process imports: what it does not need, it does not wait for."""

import subprocess
import sys

import pytest

from sd3min import checkpoint

SLOW = {"transformers", "huggingface_hub", "diffusers", "matplotlib", "gradio"}
TRAINING = {"accelerate", "datasets", "matplotlib", "tensorboard"}
COMPILER = {"torch._dynamo", "sympy"}  # which PyTorch imports to compute on the meta device
READ = "import sys; before = set(sys.modules)\n{}\nprint(*sorted(set(sys.modules) - before))"


def imported(code, first="import torch"):
    """The modules that code imports in a process of its own, beyond those of other code."""
    script = f"{first}\n{READ.format(code)}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()


def slow(modules):
    """The slow packages among modules."""
    return {name.split(".")[0] for name in modules} & SLOW


@pytest.mark.parametrize("module", ["sd3min", "sd3min.cli", "sd3min.fast.mmdit", "sd3min.probes"])
def test_an_import_waits_for_nothing_slow(module):
    modules = imported(f"import {module}")
    assert module in modules
    assert not slow(modules) | COMPILER & set(modules)


def test_a_refused_call_waits_for_nothing_slow():
    call = ["generate", "a red circle", "--size", "60x60"]
    modules = imported(f"from sd3min import cli\nassert cli.main({call}) == 2")
    assert not slow(modules)


def test_the_mmdit_and_the_autoencoder_need_no_transformers():
    modules = imported("import sd3min\nsd3min.load_mmdit()\nsd3min.load_autoencoder()")
    assert not slow(modules) | COMPILER & set(modules)


@pytest.mark.parametrize("memory", ["fast", "resident", "stream"])
def test_a_picture_under_a_plan_of_memory_needs_no_transformers(memory):
    modules = imported(
        f"import sd3min\nsd3min.load(memory={memory!r})('a red circle', steps=1, progress=False)"
    )
    assert "tokenizers" in modules
    assert not slow(modules) | COMPILER & set(modules)


def test_the_second_run_of_a_prompt_needs_no_tokenizers(tmp_path):
    call = ["generate", "a red circle", "--seed", "1", "--steps", "1", "--memory", "fast"]
    call += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "made.png")]
    code = f"from sd3min import cli\nassert cli.main({call}) == 0"
    assert "tokenizers" in imported(code)
    first = (tmp_path / "made.png").read_bytes()
    modules = imported(code)
    assert not slow(modules) | {"tokenizers", *COMPILER} & set(modules)
    assert (tmp_path / "made.png").read_bytes() == first


def test_a_picture_imports_transformers_and_never_diffusers():
    code = "import sd3min\nsd3min.load()('a red circle', steps=1, progress=False)"
    tops = {name.split(".")[0] for name in imported(code)}
    assert "transformers" in tops
    assert "diffusers" not in tops


@pytest.mark.parametrize(
    "code",
    [
        "from sd3min import cli\nassert cli.main(['train', 'no.toml']) == 2",
        "from sd3min import cli\nassert cli.main(['generate', 'a cat', '--steps', '0']) == 2",
        "import sd3min, transformers.modeling_utils\n"  # which imports accelerate where it is there
        "sd3min.load()('a red circle', steps=1, progress=False)",
    ],
)
def test_only_training_imports_what_training_needs(code):
    own = TRAINING - ({"accelerate"} if "transformers" in code else set())
    assert not {name.split(".")[0] for name in imported(code)} & own


def test_the_tokenizers_are_classes_of_transformers():
    import transformers

    for _, kind in checkpoint.TOKENIZERS.values():
        assert issubclass(getattr(transformers, kind), transformers.PreTrainedTokenizerBase)

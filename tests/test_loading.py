"""What a pipeline is asked to be when it is loaded."""

import numpy as np
import pytest

import sd3min
from sd3min.config import Refusal

PROMPTS = ["a red circle", "a cat"]


def pixels(pipe, **given):
    call = {"seed": 1, "progress": False, "width": 32, "height": 48, "steps": 2} | given
    return np.stack([np.asarray(image) for image in pipe(PROMPTS, **call)]).astype(int)


@pytest.mark.parametrize("memory", ["fast", "resident"])
def test_a_network_in_8_bits_makes_nearly_the_same_pictures(memory, whole):
    plain, eight = (pixels(sd3min.load(whole, memory=memory, mmdit=k)) for k in (None, "int8"))
    difference = np.abs(plain - eight)
    assert 0 < difference.mean() < 8


@pytest.mark.parametrize("memory", ["fast", "resident", "stream"])
def test_the_second_run_of_a_prompt_loads_no_encoder(memory, whole, tmp_path):
    first = pixels(sd3min.load(whole, memory=memory, cache=tmp_path))
    pipe = sd3min.load(whole, memory=memory, cache=tmp_path)
    loaders = pipe.stages.loaders
    for name in ("clip_l", "clip_g", "t5"):
        loaders[name] = lambda name=name: pytest.fail(f"{name} was loaded")
    assert np.array_equal(pixels(pipe), first)
    with pytest.raises(pytest.fail.Exception, match="clip_l was loaded"):
        pipe("another prompt", seed=1, steps=2, width=32, height=48, progress=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory": "little"}, "memory little is not one of fast, resident, stream"),
        ({"mmdit": "int4", "memory": "fast"}, "mmdit int4 is not int8"),
        ({"mmdit": "int8"}, "pass memory fast or resident"),
        ({"mmdit": "int8", "memory": "stream"}, "pass memory fast or resident"),
        ({"cache": "here"}, "pass memory fast, resident, stream"),
        ({"t5": "int8", "memory": "stream"}, "leave it out under memory stream"),
        ({"compile": "quickest"}, "mode quickest is not one of .*max-autotune"),
        ({"compile": "default", "memory": "fast"}, "compile default is for the plain networks"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(given, said):
    with pytest.raises(Refusal, match=said):
        sd3min.load(**given)

import warnings

import pytest
import small
import torch

from sd3min.text_encoders import token_ids

LONG = "a red circle above a blue square on gray left of an orange heart below a pink star"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return small.encoders(small.tokenizers(tmp_path_factory.mktemp("tokenizers")))


def cuts(encoders, prompts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoders.encode(prompts)
    return [str(warning.message) for warning in caught]


def test_context_is_both_clips_side_by_side_above_t5(encoders):
    context, pooled = encoders.encode(["a red circle"])
    assert context.shape == (1, 16 + 16, 320) and pooled.shape == (1, 64 + 128)
    assert context[:, :16, 64 + 128 :].abs().max() == 0
    assert context[:, 16:, 64 + 128 :].abs().min() > 0


def test_a_cut_prompt_warns_once_for_each_encoder_and_quotes_what_was_cut(encoders):
    messages = cuts(encoders, [LONG, "a red circle", LONG])
    assert [message.split(" reads")[0] for message in messages] == ["CLIP-L", "CLIP-G", "T5"]
    for message in messages:
        assert "16 tokens" in message
        quoted = message.split('"')[1]
        assert quoted and LONG.endswith(quoted)
        assert message.count(quoted) == 2  # two prompts were cut


def test_what_was_cut_is_exactly_what_the_encoder_does_not_see(encoders):
    for message, tokenizer in zip(cuts(encoders, [LONG]), encoders.tokenizers, strict=True):
        kept = LONG.removesuffix(message.split('"')[1])
        ids = tokenizer(LONG, truncation=True, max_length=16).input_ids
        assert ids == tokenizer(kept).input_ids


def test_a_prompt_that_fits_does_not_warn(encoders):
    assert cuts(encoders, ["a red circle above a blue square on gray", ""]) == []


def test_clip_l_pads_with_its_end_and_clip_g_with_id_0(encoders):
    end = max(encoders.tokenizers[0].get_vocab().values())
    clip_l = token_ids(encoders.tokenizers[0], ["a red circle"], 16, "CLIP-L")[0]
    clip_g = token_ids(encoders.tokenizers[1], ["a red circle"], 16, "CLIP-G")[0]
    assert clip_l[4:].tolist() == [end] * 12
    assert clip_g[4] == end and clip_g[5:].tolist() == [0] * 11
    t5 = token_ids(encoders.tokenizers[2], ["a red circle"], 16, "T5")[0]
    assert t5[3:].tolist() == [1] + [0] * 12


def test_padding_is_attended_to_by_t5(encoders):
    """A mask would make the rows of the words independent of how much padding follows."""
    short = encoders.encode(["a red circle"], t5_length=8).context[0, 16:20]
    long = encoders.encode(["a red circle"], t5_length=24).context[0, 16:20]
    assert (short - long).abs().max() > 1e-3


def test_clip_rows_are_the_second_last_layer_without_the_final_norm(encoders):
    model, tokenizer = encoders.clip_l, encoders.tokenizers[0]
    ids = token_ids(tokenizer, ["a red circle"], 16, "CLIP-L")
    layers = model.text_model.encoder.layers
    seen = []
    handle = layers[-2].register_forward_hook(lambda *call: seen.append(call[2]))
    context, _ = encoders.encode(["a red circle"])
    handle.remove()
    rows = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(context[:, :16, :64], rows)
    assert len(ids[0]) == 16


def test_pooled_vector_is_the_normed_last_layer_at_the_end_of_the_text(encoders):
    """CLIP-L's as it is, CLIP-G's projected."""
    ids = token_ids(encoders.tokenizers[0], ["a red circle"], 16, "CLIP-L")
    place = ids[0].argmax()
    _, pooled = encoders.encode(["a red circle"])
    last = encoders.clip_l.text_model(ids).last_hidden_state[0, place]
    torch.testing.assert_close(pooled[0, :64], last)
    ids = token_ids(encoders.tokenizers[1], ["a red circle"], 16, "CLIP-G")
    last = encoders.clip_g.text_model(ids).last_hidden_state[0, place]
    projected = last @ encoders.clip_g.text_projection.weight.T
    torch.testing.assert_close(pooled[0, 64:], projected)


def test_batch_of_prompts_equals_prompts_alone(encoders):
    prompts = ["a red circle", "", "an orange heart on white"]
    together = encoders.encode(prompts)
    for i, prompt in enumerate(prompts):
        context, pooled = encoders.encode([prompt])
        torch.testing.assert_close(together.context[i], context[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.pooled[i], pooled[0], rtol=1e-5, atol=1e-5)

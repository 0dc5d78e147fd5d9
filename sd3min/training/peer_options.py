"""Every option of diffusers' `train_dreambooth_lora_sd3.py`: taken by its name there, needless
here, or refused with what to do instead.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from sd3min.config import Refusal

NEEDLESS = {  # taken, and without effect: what they ask for is so anyway
    "--cache_latents": "latents are always kept in --out/cache, prompts unless the CLIPs learn",
    "--center_crop": "a picture is always cut at its middle",
    "--upcast_before_saving": "a LoRA is trained and saved in float32",
    "--local_rank": "torchrun and accelerate tell it themselves",
    "--dataloader_num_workers": "pictures are encoded once, before the first step",
    "--sample_batch_size": "pictures of the class are made one by one, each by its own seed",
    "--checkpoints_total_limit": "one checkpoint is kept, the last",
    "--allow_tf32": "PyTorch's own setting holds",
    "--logging_dir": "all figures go to --out",
}
REFUSED = {  # and what to do instead
    "--num_train_epochs": "pass --steps, the number of updates",
    "--repeats": "pass more --steps",
    "--random_flip": "it would mirror writing and sides: put mirrored pictures into the folder",
    "--image_interpolation_mode": "pictures are scaled by Lanczos: leave it out",
    "--max_sequence_length": "T5 gives as many rows as the weights ask for: leave it out",
    "--dataset_config_name": "pass a saved dataset's folder as --dataset",
    "--revision": "download that revision, and pass its folder as --weights",
    "--variant": "pass the files themselves as --weights",
    "--cache_dir": "set HF_HOME to the folder instead",
    "--prior_generation_precision": "the class is drawn in the type of --dtype",
    "--final_validation_prompt": "pass --sample, which is drawn at the end too",
    "--num_validation_images": "give --sample several times",
    "--text_encoder_lr": "the CLIPs learn at --rate, with the network",
    "--adam_weight_decay_text_encoder": "the CLIPs learn as the network does: leave it out",
    "--scale_lr": "multiply --rate yourself",
    "--lr_num_cycles": "pass --schedule linear or constant",
    "--lr_power": "pass --schedule linear or constant",
    "--optimizer": "AdamW is the only one: leave it out",
    "--use_8bit_adam": "AdamW of a LoRA is small: leave it out",
    "--adam_beta1": "it is 0.9: leave it out",
    "--adam_beta2": "it is 0.999: leave it out",
    "--adam_weight_decay": "it is 1e-4: leave it out",
    "--adam_epsilon": "it is the paper's, 1e-15: leave it out",
    "--prodigy_beta3": "AdamW is the only optimizer: leave it out",
    "--prodigy_decouple": "AdamW is the only optimizer: leave it out",
    "--prodigy_use_bias_correction": "AdamW is the only optimizer: leave it out",
    "--prodigy_safeguard_warmup": "AdamW is the only optimizer: leave it out",
    "--lora_blocks": "pass --targets, with names such as joint_blocks.12.*",
    "--lora_dropout": "pass --dropout, which leaves encoders out, or a smaller --rank",
    "--hub_token": "run hf auth login, then hf upload NAME FOLDER",
    "--hub_model_id": "run hf upload NAME FOLDER when it is done",
}
TAKEN = (  # by the actions of our own options
    "--pretrained_model_name_or_path",
    "--dataset_name",
    "--instance_data_dir",
    "--image_column",
    "--caption_column",
    "--class_data_dir",
    "--instance_prompt",
    "--class_prompt",
    "--num_class_images",
    "--with_prior_preservation",
    "--prior_loss_weight",
    "--validation_prompt",
    "--validation_epochs",
    "--rank",
    "--lora_layers",
    "--output_dir",
    "--seed",
    "--resolution",
    "--train_text_encoder",
    "--train_batch_size",
    "--max_train_steps",
    "--checkpointing_steps",
    "--resume_from_checkpoint",
    "--gradient_accumulation_steps",
    "--gradient_checkpointing",
    "--learning_rate",
    "--lr_scheduler",
    "--lr_warmup_steps",
    "--weighting_scheme",
    "--logit_mean",
    "--logit_std",
    "--mode_scale",
    "--precondition_outputs",
    "--max_grad_norm",
    "--push_to_hub",
    "--report_to",
    "--mixed_precision",
)


class Refuse(argparse.Action):
    """An option that is refused when it is met."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Raise the sentence that says what to do instead."""
        name = self.option_strings[0]
        raise Refusal(f"{name} of diffusers is not taken: {REFUSED[name]}")


def add_peer_options(parser: argparse.ArgumentParser) -> None:
    """The options that are needless or refused; `--help` leaves them out."""
    for name in NEEDLESS:
        parser.add_argument(name, nargs="?", dest="needless", help=argparse.SUPPRESS)
    for name in REFUSED:
        parser.add_argument(name, nargs="?", action=Refuse, help=argparse.SUPPRESS)


def rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    """diffusers' name of every option, ours, and what it does."""
    for name in TAKEN:
        action = parser._option_string_actions[name]
        own = action.option_strings[0]
        yield name, own if own != name else "the same", (action.help or "").replace("|", "\\|")
    for name, sentence in NEEDLESS.items():
        yield name, "needless", sentence
    for name, sentence in REFUSED.items():
        yield name, "refused", sentence


def table(parser: argparse.ArgumentParser) -> str:
    """The options of diffusers' script in Markdown."""
    lines = ["| diffusers | here | |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {f'`{own}`' if own.startswith('--') else own} | {words} |"
        for name, own, words in rows(parser)
    ]
    return "\n".join(lines) + "\n"

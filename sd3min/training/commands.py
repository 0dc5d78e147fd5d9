"""The commands `sd3min train` and `sd3min finetune`.

`finetune` has, beside its own options, those of diffusers' `train_dreambooth_lora_sd3.py` by their
names there; what it does otherwise it says in a warning, what it cannot do it refuses.
"""

import argparse
import importlib.util
import os
import warnings
from pathlib import Path

from sd3min import options
from sd3min.config import Refusal
from sd3min.training.objective import SCHEMES
from sd3min.training.peer_options import add_peer_options
from sd3min.training.recipe import PRECISIONS

DENSITY = "logit-normal"  # of times, where none is asked for


def add_train(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min train`."""
    parser.set_defaults(run=run_train, smaller="give the plan smaller batches")
    plan = "TOML file that says what to train and how (default: that of sd3-tiny)"
    parser.add_argument("plan", type=Path, nargs="?", metavar="PLAN", help=plan)
    work = "folder of the checkpoints, from which a stopped run goes on"
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help=work)
    start = "trained weights to go on from: their autoencoder and T5 stay as they are"
    parser.add_argument("--from", type=Path, dest="start", metavar="FILE", help=start)
    out = "folder of the weights, by whose name the file is called (default: FOLDER/sd3-tiny)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    report = "tensorboard; metrics.jsonl is always there"
    parser.add_argument("--report_to", choices=("tensorboard", "none"), help=report)


def run_train(arguments: argparse.Namespace) -> None:
    """Train a whole model from nothing on drawn scenes."""
    require_packages()
    from sd3min.training import from_scratch

    path = arguments.plan or Path(from_scratch.__file__).with_name("sd3-tiny.toml")
    plan = from_scratch.Plan.read(path)
    out = arguments.out or arguments.work / path.stem
    tensorboard = arguments.report_to == "tensorboard"
    say(from_scratch.train(plan, arguments.work, out, arguments.start, tensorboard))


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """The options of `sd3min finetune`."""
    smaller = "pass a smaller --resolution or --batch, or --gradient-checkpointing"
    parser.set_defaults(run=run_finetune, smaller=smaller)
    add_material(parser)
    add_tuning(parser)
    add_course(parser)
    add_reports(parser)
    add_peer_options(parser)


def add_material(parser: argparse.ArgumentParser) -> None:
    """Options of what is learnt from."""
    add = parser.add_argument_group("weights and pictures").add_argument
    weights = "official files, folders or names on the hub (default: sd3-tiny)"
    names = ("--weights", "--pretrained_model_name_or_path")
    add(*names, type=Path, nargs="+", metavar="PATH", help=weights)
    add("--text-encoders", type=Path, nargs="+", metavar="PATH", help="files of encoders")
    add("--tokenizers", type=Path, metavar="FOLDER", help="default: beside the weights")
    add("--no-t5", action="store_true", help="leave T5 out: zeros in its place")
    data = "pictures with captions in a .txt beside each, or in metadata.jsonl; "
    data += "of a caption's lines every step takes one"
    add("--data", "--instance_data_dir", type=Path, metavar="FOLDER", help=data)
    add("--dataset", "--dataset_name", metavar="NAME", help="a Hugging Face dataset instead")
    add("--image-column", "--image_column", default="image", metavar="NAME", help="of pictures")
    add("--caption-column", "--caption_column", metavar="NAME", help="of captions")
    prompt = "caption of every picture that has none"
    add("--prompt", "--instance_prompt", type=options.text, metavar="TEXT", help=prompt)
    prior = "pictures of the subject's class, to be kept as they are (made where they lack)"
    add("--class-data", "--class_data_dir", type=Path, metavar="FOLDER", help=prior)
    add("--class-prompt", "--class_prompt", type=options.text, metavar="TEXT", help="their caption")
    add("--class-images", "--num_class_images", type=options.whole, default=100, help="how many")
    add("--with_prior_preservation", action="store_true", help="is so where --class-data is given")
    prior = "what the class is held to: its pictures, or the network without the LoRA"
    add("--prior", choices=("pictures", "network"), default="pictures", help=prior)
    weight = "how much the class counts beside the subject"
    add("--prior-weight", "--prior_loss_weight", type=options.number, default=1.0, help=weight)
    side = "side of square pictures, others as many pixels (default: the weights')"
    add("--resolution", type=options.whole, help=side)


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Options of what is changed, and by which objective."""
    add = parser.add_argument_group("what is changed").add_argument
    add("--full", action="store_true", help="the whole network, and no LoRA")
    add("--rank", type=options.whole, default=4, help="of the LoRA (default: 4)")
    add("--alpha", type=options.number, help="of the LoRA (default: the rank)")
    targets = "ends of names of layers, with *, and commas between (default: diffusers')"
    add("--targets", "--lora_layers", metavar="NAMES", help=targets)
    add("--train-clips", "--train_text_encoder", action="store_true", help="both CLIPs too")
    word = "a token of the captions whose rows in the CLIPs' tables are learnt too, such as sks"
    add("--word", type=options.text, metavar="TEXT", help=word)
    like = "words, the mean of whose rows it begins as (default: as it is)"
    add("--word-like", type=options.text, metavar="TEXT", help=like)
    rate = "its rate (default: ten times --rate)"
    add("--word-rate", type=options.number, metavar="RATE", help=rate)
    add("--dropout", type=options.number, default=0.0, help="how often an encoder is left out")
    objective = "whose objective: paper, diffusers or kohya (default: paper)"
    add("--objective", metavar="NAME", help=objective)
    scheme = f"diffusers' objective under one of {', '.join(SCHEMES)}"
    add("--weighting_scheme", metavar="NAME", help=scheme)
    density = "times of the paper's objective: logit-normal, mode, cosmap or uniform"
    add("--density", default=DENSITY, metavar="NAME", help=density)
    add("--logit_mean", type=options.number, default=0.0, help="of the density of times")
    add("--logit_std", type=options.number, default=1.0, help="of the density of times")
    add("--mode_scale", type=options.number, default=1.29, help="of the density of times")
    add("--precondition_outputs", type=options.whole, default=1, help="1 or 0, as diffusers")
    add("--shift", type=options.number, help="of the times (default: the weights'; kohya's 1)")


def add_course(parser: argparse.ArgumentParser) -> None:
    """Options of how long, how fast and where to."""
    add = parser.add_argument_group("course").add_argument
    out = "gets the LoRA or weights, checkpoints, metrics and sample pictures"
    add("--out", "--output_dir", type=Path, required=True, metavar="FOLDER", help=out)
    add("--steps", "--max_train_steps", type=options.whole, default=500, help="default: 500")
    batch = "pictures of one process at once (default: 1)"
    add("--batch", "--train_batch_size", type=options.whole, default=1, help=batch)
    parts = "batches gathered before a step (default: 1)"
    names = ("--accumulation", "--gradient_accumulation_steps")
    add(*names, type=options.whole, default=1, help=parts)
    add("--rate", "--learning_rate", type=options.number, default=1e-4, help="default: 1e-4")
    add("--schedule", "--lr_scheduler", default="constant", help="constant or linear")
    add("--warmup", "--lr_warmup_steps", type=options.whole, default=0, help="steps of rise")
    add("--clip", "--max_grad_norm", type=options.number, default=1.0, help="largest gradient")
    add("--average", type=options.number, default=0.0, help="decay of the weights' average")
    precision = "of the arithmetic: bf16, no, or fp16 on a GPU (default: bf16)"
    add("--precision", "--mixed_precision", default="bf16", help=precision)
    names = ("--gradient-checkpointing", "--gradient_checkpointing")
    add(*names, action="store_true", help="less memory, for more time")
    add("--seed", type=options.whole, default=0, help="of everything drawn (default: 0)")
    every = "steps between checkpoints (default: 250)"
    add("--save-every", "--checkpointing_steps", type=options.whole, default=250, help=every)
    resume = "diffusers' option: a run in the same folder always goes on"
    add("--resume_from_checkpoint", metavar="latest", help=resume)
    add("--device", help="cpu or cuda")
    add("--dtype", help="of the weights that stay: float32, bfloat16 or float16")


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Options of what is told of a run on its way."""
    add = parser.add_argument_group("reports").add_argument
    look = "what a sample picture shows; may be given several times"
    names = ("--sample", "--validation_prompt")
    add(*names, type=options.text, action="append", metavar="TEXT", help=look)
    every = "steps between sample pictures (default: 250)"
    add("--sample-every", type=options.whole, default=250, help=every)
    epochs = "epochs between sample pictures, as diffusers counts them"
    add("--validation_epochs", type=options.whole, metavar="N", help=epochs)
    held = "captioned pictures whose loss at eight times is told, as the paper validates"
    add("--validation-data", type=Path, metavar="FOLDER", help=held)
    every = "steps between validations (default: 250)"
    add("--validate-every", type=options.whole, default=250, metavar="N", help=every)
    add("--report_to", help="tensorboard; metrics.jsonl is always there")
    add("--push_to_hub", action="store_true", help="not done: says how")


def precision(asked: str, cuda: bool) -> str:
    """The precision as accelerate names it, refused if unknown; float16 needs a GPU."""
    if asked not in PRECISIONS:
        raise Refusal(f"precision {asked} is not one of {', '.join(PRECISIONS)}")
    if asked == "fp16" and not cuda and is_first():
        warnings.warn("float16 is slow and coarse on a CPU: training in bf16 instead", stacklevel=2)
    return "bf16" if asked == "fp16" and not cuda else asked


def say_otherwise(arguments: argparse.Namespace) -> None:
    """Warn of what diffusers' options ask for and this does in another way, or refuse it."""
    if arguments.resume_from_checkpoint not in (None, "latest"):
        raise Refusal("a run goes on from its last checkpoint alone: name its folder with --out")
    if arguments.schedule not in ("constant", "constant_with_warmup", "linear"):
        raise Refusal(f"schedule {arguments.schedule} is not one of constant, linear")
    if not is_first():
        return
    if arguments.report_to not in (None, "tensorboard", "none"):
        warnings.warn(
            f"there is no report to {arguments.report_to}: figures go to metrics.jsonl and "
            "metrics.png, and to TensorBoard with --report_to tensorboard",
            stacklevel=2,
        )
    if arguments.push_to_hub:
        warnings.warn(
            f"nothing is uploaded: when it is done, run hf upload NAME {arguments.out}",
            stacklevel=2,
        )


def require_packages() -> None:
    """Refuse where what training needs is not installed."""
    needed = ("accelerate", "matplotlib")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Refusal(f"training needs {', '.join(missing)}: pip install 'sd3min[train]'")


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def say(path: Path) -> None:
    """Print where the result lies, once."""
    if is_first():
        print(path)


def run_finetune(arguments: argparse.Namespace) -> None:
    """Fine-tune, and say where the result lies."""
    require_packages()
    say_otherwise(arguments)
    from sd3min.training import tuning_run

    say(tuning_run.run(arguments))

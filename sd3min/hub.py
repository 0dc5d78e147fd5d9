"""Models by their name on the Hugging Face hub: only the files that are needed, told by the
repository's own list of files.

`owner/name` is a repository, `owner/name:file.safetensors` one file of it. What was downloaded once
is used where the hub cannot be reached.
"""

import dataclasses
import errno
import glob
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sd3min.config import Refusal
from sd3min.folder import COMPONENTS, SCHEDULER
from sd3min.writer import packed

NAME = r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*"
TOKENIZERS = "stabilityai/stable-diffusion-3-medium-diffusers"  # for repositories without any
WEIGHTS = r"\w+(\.fp16)?(-\d+-of-\d+)?\.safetensors(\.index(\.fp16)?\.json)?"
ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # how their own files begin


class Wanted(NamedTuple):
    """Files of a repository: what it has, the weights to open, and a scheduler's config."""

    name: str
    files: list[str]
    weights: list[str]
    schedule: list[str]


class Fetched(NamedTuple):
    """Files on this machine: what to open, and the folder that the tokenizers are in."""

    paths: list[Path]
    tokenizers: Path


def is_name(text: str) -> bool:
    """Whether a text has the form of a name on the hub, and not that of a file."""
    name, colon, file = text.partition(":")
    is_file = name.endswith((".safetensors", ".ckpt", ".json", ".png")) or (colon and not file)
    return bool(re.fullmatch(NAME, name)) and not is_file


def is_remote(path: Path) -> bool:
    """Whether a path is none here, but has the form of a name on the hub."""
    return is_name(str(path)) and not os.path.lexists(path)


def choose(text: str, parts: Sequence[str]) -> Wanted:
    """The files that hold the parts, of what a name on the hub has; refused where none do."""
    name, _, file = text.partition(":")
    files = listing(name)
    if file and file not in files:
        held = ", ".join(f for f in files if f.endswith(".safetensors")) or "no .safetensors files"
        raise Refusal(f"{name} has no {file}: it has {held}")
    weights = [file] if file else needed(name, files, parts)
    scheduled = SCHEDULER in files and "mmdit" in parts and not file
    return Wanted(name, files, weights, [SCHEDULER] if scheduled else [])


def fetch(text: str, parts: Sequence[str], tokenizers: bool = True) -> Fetched:
    """Download what a name on the hub holds of the parts, and their tokenizers if asked to.

    Raises Refusal, in a sentence that says what to do, where the hub or the disk does not help.
    """
    name, files, weights, schedule = choose(text, parts)
    kinds = [COMPONENTS[part].tokenizer for part in COMPONENTS if part in parts and tokenizers]
    folders = [kind[0] for kind in kinds if kind]
    words = [f for f in files if f.split("/")[0] in folders]
    place = download(name, weights + words + schedule)
    if folders and not words:
        others = listing(TOKENIZERS)
        words = [f for f in others if f.split("/")[0] in folders]
        return Fetched(opened(place, weights), download(TOKENIZERS, words))
    return Fetched(opened(place, weights), place)


def outline(path: Path, parts: Sequence[str], folder: Path) -> list[Path]:
    """What to open to learn what a path holds, values left aside: the path itself, or of a name on
    the hub files in `folder` with the same headers, and holes in place of the values.

    What was downloaded before is opened where it is.
    """
    if not is_remote(path):
        return [path]
    import huggingface_hub

    name, _, weights, schedule = choose(str(path), parts)
    if all(isinstance(huggingface_hub.try_to_load_from_cache(name, f), str) for f in weights):
        return fetch(str(path), parts, tokenizers=False).paths
    place = folder / name
    plain = [file for file in weights + schedule if file.endswith(".json")]
    source = download(name, plain) if plain else place
    for file in weights + schedule:
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        if file in plain:
            shutil.copy(source / file, place / file)
        else:
            write_outline(name, file, place / file)
    return opened(place, weights)


def write_outline(name: str, file: str, target: Path) -> None:
    """Write a file's header, as long as the whole file is; refused where the hub does not help."""
    import huggingface_hub

    try:
        seen = huggingface_hub.HfApi().parse_safetensors_file_metadata(name, file)
        tensors = {own: dataclasses.asdict(info) for own, info in seen.tensors.items()}
        described = {
            own: {key: info[key] for key in ("dtype", "shape", "data_offsets")}
            for own, info in tensors.items()
        }
        header = packed(({"__metadata__": seen.metadata} if seen.metadata else {}) | described)
        end = max((info["data_offsets"][1] for info in described.values()), default=0)
        with target.open("wb") as written:
            written.write(header)
            written.truncate(len(header) + end)
    except huggingface_hub.errors.SafetensorsParsingError:
        raise Refusal(f"{file} of {name} is no safetensors file: name another") from None
    except Exception as error:  # whatever the network and the disk do
        raise explained(name, error) from None


def needed(name: str, files: Sequence[str], parts: Sequence[str]) -> list[str]:
    """The files that hold the parts, each once: of a diffusers folder where the repository has one,
    in float16 where it has that variant; else the official file and those of the text encoders.
    """
    if any(re.fullmatch(f"transformer/{WEIGHTS}", file) for file in files):
        return [file for part in parts for file in component(files, COMPONENTS[part].folder)]
    encoders = {part: encoder_file(files, part) for part in parts if part in ENCODERS}
    separate = [file for file in encoders.values() if file]
    if len(separate) == len(parts):
        return separate
    tops = sorted((file for file in files if re.fullmatch(r"[^/]+\.safetensors", file)), key=len)
    if not tops or not all(top.startswith(Path(tops[0]).stem) for top in tops):
        held = ", ".join(tops) or "no .safetensors files"
        mend = f"name one as {name}:FILE" if tops else "pass the name of a Stable Diffusion 3"
        raise Refusal(f"{name} holds {held}, of which none is known to be meant: {mend}")
    return [tops[0], *separate]


def component(files: Sequence[str], folder: str) -> list[str]:
    """The weights in a folder, in float16 or as they are, and not both."""
    held = [file for file in files if re.fullmatch(f"{folder}/{WEIGHTS}", file)]
    return [file for file in held if ".fp16" in file] or held


def encoder_file(files: Sequence[str], part: str) -> str:
    """The file of a text encoder, with all its bits where there are several; "" without any."""
    start = f"text_encoders/{ENCODERS[part]}"
    held = [file for file in files if file.startswith(start) and file.endswith(".safetensors")]
    return min(held, key=lambda file: ("fp8" in file, file), default="")


def opened(place: Path, weights: Sequence[str]) -> list[Path]:
    """What to open: the folder of diffusers' folders, or each official file."""
    folders = [component.folder for component in COMPONENTS.values()]
    if all(file.split("/")[0] in folders for file in weights):
        return [place]
    return [place / file for file in weights]


def listing(name: str) -> list[str]:
    """The files of a repository, out of the hub's reach those here; refused without any."""
    import huggingface_hub  # slow to import, and only for names on the hub

    try:
        return huggingface_hub.HfApi().list_repo_files(name)
    except Exception as error:  # whatever the network does
        try:
            options = {"local_files_only": True, "allow_patterns": []}
            place = Path(huggingface_hub.snapshot_download(name, **options))
        except Exception:
            raise explained(name, error) from None
    return [str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()]


def download(name: str, files: Sequence[str]) -> Path:
    """The folder here that holds files of a repository, downloaded; refused where that fails."""
    import huggingface_hub

    try:
        patterns = [glob.escape(file) for file in files]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # whatever the network and the disk do
        raise explained(name, error) from None


def explained(name: str, error: BaseException) -> Refusal:
    """What went wrong, and what to do about it."""
    from huggingface_hub import constants, errors, get_token

    page, seen = f"{constants.ENDPOINT}/{name}", error
    while seen.__cause__ is not None and not isinstance(seen, errors.HfHubHTTPError):
        seen = seen.__cause__
    if isinstance(seen, errors.GatedRepoError):
        steps = "run `hf auth login`" if get_token() is None else "wait until it is granted"
        return Refusal(f"{name} is behind a licence: accept it on {page}, then {steps}")
    if isinstance(seen, errors.RepositoryNotFoundError):
        login = ", or run `hf auth login` if it is private" if get_token() is None else ""
        return Refusal(f"{name} is no path here and no model on the hub: check the name{login}")
    if isinstance(seen, errors.HfHubHTTPError):
        status = seen.response.status_code
        mend = "run `hf auth login` again" if status == 401 else "try again later"
        return Refusal(f"the hub answered {status} for {name}: {mend}")
    if constants.HF_HUB_OFFLINE:
        said = f"{name} is no path here and was not downloaded before"
        return Refusal(f"{said}, and HF_HUB_OFFLINE is set: unset it, or pass the path of weights")
    if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        mend = "make room, or set HF_HOME to a folder elsewhere"
        return Refusal(f"{name} cannot be stored ({seen.strerror}): {mend}")
    reason = " ".join(str(seen).split())[:200] or type(seen).__name__
    said = f"{name} is no path here, and the hub cannot be reached ({reason})"
    return Refusal(f"{said}: check the connection, or pass the path of weights")

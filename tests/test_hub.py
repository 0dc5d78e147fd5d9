"""Names on the hub: only what is needed is asked for, and each failure is one sentence.

The hub is a small server on this machine that knows a few repositories and notes what it was asked.
"""

import ast
import errno
import hashlib
import json
import re
import shutil
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import small
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import sd3min
from sd3min import cli, convert, hub
from sd3min.checkpoint import Checkpoint
from sd3min.config import Refusal
from sd3min.folder import SCHEDULER

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER, SINGLE, SEVERAL = "me/folder", "me/single", "me/several"
ALL = ("mmdit", "autoencoder", "clip_l", "clip_g", "t5")
MEDIUM = """
.gitattributes LICENSE.md README.md sd3_medium.safetensors sd3_medium_incl_clips.safetensors
sd3_medium_incl_clips_t5xxlfp16.safetensors sd3_medium_incl_clips_t5xxlfp8.safetensors
comfy_example_workflows/sd3_medium_example_workflow_basic.json sd3demo.jpg text_encoders/README.md
text_encoders/clip_g.safetensors text_encoders/clip_l.safetensors
text_encoders/t5xxl_fp16.safetensors text_encoders/t5xxl_fp8_e4m3fn.safetensors
"""
LARGE = """
LICENSE.md README.md SD3.5L_example_workflow.json mmdit.png model_index.json
sd3.5_large.safetensors scheduler/scheduler_config.json text_encoder/config.json
text_encoder/model.fp16.safetensors text_encoder/model.safetensors text_encoder_2/config.json
text_encoder_2/model.fp16.safetensors text_encoder_2/model.safetensors text_encoder_3/config.json
text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors
text_encoder_3/model.fp16-00001-of-00002.safetensors
text_encoder_3/model.fp16-00002-of-00002.safetensors
text_encoder_3/model.safetensors.index.fp16.json text_encoder_3/model.safetensors.index.json
text_encoder_3/model.onnx text_encoder_3/model.bin text_encoders/clip_g.safetensors
text_encoders/clip_l.safetensors text_encoders/t5xxl_fp16.safetensors
text_encoders/t5xxl_fp8_e4m3fn.safetensors tokenizer/merges.txt tokenizer/vocab.json
tokenizer_2/vocab.json tokenizer_3/spiece.model transformer/config.json
transformer/diffusion_pytorch_model-00001-of-00002.safetensors
transformer/diffusion_pytorch_model-00002-of-00002.safetensors
transformer/diffusion_pytorch_model.safetensors.index.json transformer/model.onnx vae/config.json
vae/diffusion_pytorch_model.safetensors
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, of folders on disk."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, Path]
    fault: dict[str, tuple[int, str]]  # of a repository's files: status and X-Error-Code
    down: dict[str, tuple[int, str]]  # of all that concerns a repository
    asked: dict[str, list[str]]
    sent: list[int]  # bytes of weights

    def log_message(self, *_):
        pass

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def fail(self, status, code):
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": code})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        words = unquote(urlparse(self.path).path).strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        name, rest = "/".join(words[:2]), words[2:]
        if name in self.down:
            self.fail(*self.down[name])
        elif name not in self.repositories:
            self.fail(401, "RepoNotFound")
        elif api:
            self.describe(name, rest)
        elif name in self.fault:
            self.fail(*self.fault[name])
        else:
            self.give(name, "/".join(rest[2:]))

    def describe(self, name, rest):
        place = self.repositories[name]
        files = sorted(path for path in place.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            said = [
                {
                    "type": "file",
                    "path": str(f.relative_to(place)),
                    "size": f.stat().st_size,
                    "oid": tag(f),
                }
                for f in files
            ]
        else:
            siblings = [{"rfilename": str(f.relative_to(place))} for f in files]
            said = {"id": name, "sha": COMMIT, "siblings": siblings}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(said).encode())

    def give(self, name, file):
        path = self.repositories[name] / file
        if not path.is_file():
            self.fail(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.asked[name].append(file)
        content, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag(path)}"'}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = map(int, asked.groups())
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if self.command == "GET" and file.endswith(".safetensors"):
            self.sent.append(len(content))
        self.answer(status, headers, content)


def tag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A small model as a diffusers folder, as official files, and two of the latter kind."""
    top = tmp_path_factory.mktemp("repositories")
    pipe = small.pipeline(top / "tokenizers")
    source = small.save_official(pipe, top / "source.safetensors")
    (top / FOLDER).parent.mkdir()
    convert.convert(source, top / FOLDER, None, top / "tokenizers", 2_000_000, progress=False)
    for path in (top / FOLDER).glob("text_encoder/*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(half, path.with_name("model.fp16.safetensors"))
    (top / FOLDER / "transformer/model.onnx").write_text("not needed")
    (top / FOLDER / "tiny.safetensors").write_text("not needed either")
    tensors = small.official_tensors(pipe)
    for part in ("clip_l", "clip_g", "t5"):
        file = {"t5": "t5xxl_fp16"}.get(part, part)
        (top / SINGLE / "text_encoders").mkdir(parents=True, exist_ok=True)
        save_file(tensors[part], top / SINGLE / f"text_encoders/{file}.safetensors")
    (top / SINGLE / "text_encoders/t5xxl_fp8.safetensors").write_text("not needed")
    small.save_official(pipe, top / SINGLE / "sd.safetensors", ("mmdit", "autoencoder"))
    small.save_official(pipe, top / SINGLE / "sd_incl_all.safetensors")
    for name in ("red", "blue"):
        (top / SEVERAL).mkdir(exist_ok=True)
        small.save_official(pipe, top / SEVERAL / f"{name}.safetensors")
    return pipe, top


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    """The stand-in, asked instead of the hub, and an empty cache."""
    _, top = repositories
    names = {name: top / name for name in (FOLDER, SINGLE, SEVERAL)}

    class Own(Hub):
        repositories, fault, down, asked, sent = names, {}, {}, defaultdict(list), []

    running = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TOKENIZERS", FOLDER)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    Own.stop = lambda: (running.shutdown(), running.server_close())
    yield Own
    Own.stop()


def loads_like(pipe, loaded):
    call = {"prompt": "a red star", "seed": 1, "steps": 1, "progress": False}
    pictures = [p(**call)[0].tobytes() for p in (pipe, loaded)]
    return pictures[0] == pictures[1]


# which files


def test_of_official_files_the_smallest_and_the_encoders_are_needed():
    needed = hub.needed("x/y", MEDIUM.split(), ALL)
    encoders = [f"text_encoders/{f}.safetensors" for f in ("clip_l", "clip_g", "t5xxl_fp16")]
    assert needed == ["sd3_medium.safetensors", *encoders]
    assert hub.needed("x/y", MEDIUM.split(), ALL[:4]) == needed[:3]
    assert hub.needed("x/y", MEDIUM.split(), ["mmdit"]) == needed[:1]
    assert hub.needed("x/y", MEDIUM.split(), ALL[2:]) == encoders


def test_of_a_diffusers_folder_the_variant_in_float16_is_needed_and_nothing_twice():
    transformer = "transformer/diffusion_pytorch_model"
    needed = {
        "mmdit": [
            f"{transformer}-00001-of-00002.safetensors",
            f"{transformer}-00002-of-00002.safetensors",
            f"{transformer}.safetensors.index.json",
        ],
        "autoencoder": ["vae/diffusion_pytorch_model.safetensors"],
        "clip_l": ["text_encoder/model.fp16.safetensors"],
        "clip_g": ["text_encoder_2/model.fp16.safetensors"],
        "t5": [
            "text_encoder_3/model.fp16-00001-of-00002.safetensors",
            "text_encoder_3/model.fp16-00002-of-00002.safetensors",
            "text_encoder_3/model.safetensors.index.fp16.json",
        ],
    }
    for part, files in needed.items():
        assert hub.needed("x/y", LARGE.split(), [part]) == files
    assert hub.needed("x/y", LARGE.split(), ALL) == [f for files in needed.values() for f in files]


def test_names_on_the_hub_are_told_from_paths():
    for text in ("me/model", "stabilityai/stable-diffusion-3.5-large", "a/b:c/d.safetensors"):
        assert hub.is_name(text)
    for text in (
        "model", "/me/model", "./model", "../model", "a/b/c", "me/model.safetensors", "me/",
        "me/model:", "~/model", "me/picture.png", "", "a b/c",
    ):  # fmt: skip
        assert not hub.is_name(text), text


# what is asked for


def test_a_diffusers_folder_loads_by_name(server, repositories):
    loaded = sd3min.load(FOLDER, dtype="float32")
    asked = server.asked[FOLDER]
    assert len(asked) == len(set(asked))
    folders = {file.split("/")[0] for file in asked}
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3"}
    words = {"tokenizer", "tokenizer_2", "tokenizer_3"}
    assert folders == {"transformer", "vae", "scheduler"} | encoders | words
    assert "text_encoder/model.fp16.safetensors" in asked
    assert "text_encoder/model.safetensors" not in asked
    assert not [file for file in asked if file.endswith((".onnx", "/config.json"))]
    pipe, _ = repositories
    expected = pipe.mmdit.state_dict()
    torch.testing.assert_close(loaded.mmdit.state_dict(), expected, rtol=0, atol=0)
    assert loads_like(sd3min.load(FOLDER), loaded)
    assert len(server.asked[FOLDER]) == len(asked), "the second time nothing is downloaded"


def test_the_shift_of_a_folder_by_name_is_its_schedulers(server, repositories, tmp_path):
    shutil.copytree(repositories[1] / FOLDER, tmp_path / "copy")
    (tmp_path / "copy" / SCHEDULER).write_text('{"shift": 1.5}')
    server.repositories[FOLDER] = tmp_path / "copy"
    assert Checkpoint.open(FOLDER, wanted=["mmdit"]).defaults.shift == 1.5
    assert SCHEDULER in server.asked[FOLDER]


def test_official_files_load_by_name_with_tokenizers_from_elsewhere(server, repositories):
    loaded = sd3min.load(SINGLE, dtype="float32")
    encoders = [f"text_encoders/{f}.safetensors" for f in ("clip_g", "clip_l", "t5xxl_fp16")]
    assert sorted(server.asked[SINGLE]) == ["sd.safetensors", *encoders]
    assert {f.split("/")[0] for f in server.asked[FOLDER]} == {
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    }
    assert loads_like(repositories[0], loaded)


def test_without_t5_nothing_of_it_is_asked_for(server):
    for name in (FOLDER, SINGLE):
        assert sd3min.load(name, t5=False).text_encoders.t5 is None
    asked = [*server.asked[FOLDER], *server.asked[SINGLE]]
    assert asked and not [f for f in asked if f.startswith(("text_encoder_3", "tokenizer_3"))]
    assert not [f for f in asked if "t5xxl" in f]


def test_a_part_alone_asks_for_its_files_alone(server):
    sd3min.load_autoencoder(FOLDER)
    assert {f.split("/")[0] for f in server.asked[FOLDER]} == {"vae"}
    sd3min.load_mmdit(SINGLE)
    assert server.asked[SINGLE] == ["sd.safetensors"]


def test_one_file_of_a_repository_can_be_named(server, repositories):
    loaded = sd3min.load(f"{SEVERAL}:red.safetensors")
    assert server.asked[SEVERAL] == ["red.safetensors"]
    assert loads_like(repositories[0], loaded)


def test_encoders_that_are_given_are_not_asked_for(server, repositories):
    _, top = repositories
    given = [top / SINGLE / f"text_encoders/{f}.safetensors" for f in ("clip_l", "clip_g")]
    opened = Checkpoint.open(SINGLE, given, top / "tokenizers", ALL[:4])
    opened.require(ALL[:4])
    assert server.asked == {SINGLE: ["sd.safetensors"]}


def test_a_path_comes_before_a_name(server, repositories, tmp_path):
    (tmp_path / "me").mkdir()
    (tmp_path / SINGLE).symlink_to(repositories[1] / SEVERAL)
    with pytest.raises(Refusal, match=r"red\.safetensors both hold|both hold"):
        sd3min.load(SINGLE)
    assert not server.asked


def inspected(path, capsys):
    """What `inspect` says, but for where it is."""
    assert cli.main(["inspect", str(path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    return first, lines


def test_inspect_downloads_headers_alone(server, repositories, tmp_path, capsys):
    first, lines = inspected(FOLDER, capsys)
    assert first == FOLDER and lines[-1] == "  missing: nothing"
    weights = [f for f in server.asked[FOLDER] if f.endswith(".safetensors")]
    lengths = [(repositories[1] / FOLDER / file).stat().st_size for file in weights]
    assert max(server.sent) <= 100_001 < 2_000_000 < sum(lengths)
    assert SCHEDULER in server.asked[FOLDER]
    assert not [file for file in server.asked[FOLDER] if file.startswith("tokenizer")]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    one = f"{SEVERAL}:red.safetensors"
    shown, of_one = inspected(one, capsys)
    assert shown == f"{SEVERAL}/red.safetensors"
    sd3min.load(FOLDER)
    sd3min.load(one)
    server.asked.clear()
    assert inspected(FOLDER, capsys)[1] == lines, "the values change nothing"
    assert inspected(one, capsys)[1] == of_one
    assert not server.asked


def test_plan_downloads_headers_alone(server, tmp_path, capsys):
    assert cli.main(["plan", FOLDER]) == 0
    planned = capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and max(server.sent) <= 100_001
    sd3min.load(FOLDER)
    assert cli.main(["plan", FOLDER]) == 0
    assert capsys.readouterr().out == planned != ""


def test_inspect_of_official_files_names_them(server, capsys):
    first, lines = inspected(SINGLE, capsys)
    assert first == f"{SINGLE}/sd.safetensors" and lines[-1] == "  missing: nothing"
    assert [line.split()[-1] for line in lines if line.strip().startswith("in ")] == [
        f"../text_encoders/{file}.safetensors" for file in ("clip_l", "clip_g", "t5xxl_fp16")
    ]


def test_inspect_opens_what_was_downloaded_before(server, monkeypatch, capsys):
    sd3min.load(FOLDER)
    server.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first, lines = inspected(FOLDER, capsys)
    assert COMMIT in first and lines[-1] == "  missing: nothing"


def test_what_inspect_cannot_use_is_said_of_the_name(server, repositories, tmp_path, capsys):
    copied = shutil.copytree(repositories[1] / SEVERAL, tmp_path / "copy")
    server.repositories[SEVERAL] = copied
    (copied / "red.safetensors").write_text("These are not the weights you are looking for.")
    tensors = load_file(copied / "blue.safetensors")
    del tensors["model.diffusion_model.x_embedder.proj.bias"]
    save_file(tensors, copied / "blue.safetensors")
    for name, said in (
        ("red", f"red.safetensors of {SEVERAL} is no safetensors file: name another"),
        ("blue", f"the MMDiT in {SEVERAL}/blue.safetensors lacks x_embedder.proj.bias"),
        ("green", f"{SEVERAL} has no green.safetensors: it has blue.safetensors, red"),
    ):
        assert cli.main(["inspect", f"{SEVERAL}:{name}.safetensors"]) == 2
        output, errors = capsys.readouterr()
        assert not output and errors.startswith(f"sd3min: {said}") and errors.count("\n") == 1
    server.fault[FOLDER] = (401, "GatedRepo")
    assert cli.main(["inspect", FOLDER]) == 2
    assert f"{FOLDER} is behind a licence" in capsys.readouterr().err


def test_what_was_downloaded_serves_without_the_hub(server, monkeypatch):
    sd3min.load(FOLDER, t5=False)
    server.stop()
    assert sd3min.load(FOLDER, t5=False).text_encoders.t5 is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sd3min.load(FOLDER, t5=False).text_encoders.t5 is None
    with pytest.raises(Refusal, match="and lacks T5"):
        sd3min.load(FOLDER)


# what is refused


def said_of(name, capsys):
    """The one line that a command ends in."""
    assert cli.main(["generate", "a cat", "--weights", name, "--out", "out.png"]) == 2
    output, line = capsys.readouterr()
    line = line.splitlines()[-1] + "\n"
    assert not output and line.startswith("sd3min: ") and "Traceback" not in line
    return line


def test_a_licence_that_was_not_accepted_is_said(server, capsys):
    page = f"accept it on {constants.ENDPOINT}/{FOLDER}"
    server.fault[FOLDER] = (401, "GatedRepo")
    said = f"{FOLDER} is behind a licence: {page}, then run `hf auth login`"
    assert said in said_of(FOLDER, capsys)
    server.down[FOLDER] = (401, "GatedRepo")
    assert said in said_of(FOLDER, capsys)
    Path(constants.HF_TOKEN_PATH).write_text("hf_token")
    for faults in (server.fault, server.down):
        server.down.clear()
        faults[FOLDER] = (403, "GatedRepo")
        assert f"{page}, then wait until it is granted" in said_of(FOLDER, capsys)


def test_what_does_not_exist_is_said(server, capsys):
    missing = "no path here and no model on the hub: check the name, or run `hf auth login`"
    assert missing in said_of("me/nothing", capsys)
    assert f"{SEVERAL} has no green.safetensors: it has blue.safetensors, red" in said_of(
        f"{SEVERAL}:green.safetensors", capsys
    )
    assert f"name one as {SEVERAL}:FILE" in said_of(SEVERAL, capsys)
    both = "pass the path of weights, or a name on the hub such as stabilityai/NAME"
    assert f"nowhere does not exist: {both}" in said_of("nowhere", capsys)
    assert "me/nowhere.safetensors does not exist" in said_of("me/nowhere.safetensors", capsys)


def test_other_answers_are_said(server, capsys):
    server.down[FOLDER] = (418, "")
    assert f"the hub answered 418 for {FOLDER}: try again later" in said_of(FOLDER, capsys)
    server.down[FOLDER] = (401, "Invalid credentials in Authorization header")
    assert "for me/folder: run `hf auth login` again" in said_of(FOLDER, capsys)


def test_no_connection_is_said(server, capsys, monkeypatch):
    server.stop()
    said = said_of(FOLDER, capsys)
    assert "no path here, and the hub cannot be reached (" in said and "refused" in said
    assert "check the connection, or pass the path of weights" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = f"{FOLDER} is no path here and was not downloaded before, and HF_HUB_OFFLINE is set"
    assert said in said_of(FOLDER, capsys)


def test_a_full_disk_is_said(server, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    said = f"{FOLDER} cannot be stored (No space left on device): make room, or set HF_HOME"
    assert said in said_of(FOLDER, capsys)


def test_the_hubs_library_is_imported_only_for_names_on_the_hub():
    tree = ast.parse(Path(hub.__file__).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "huggingface_hub" not in "".join(map(ast.unparse, imports))

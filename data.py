"""
Text to token ids, and ids to batches. A token is a character.

    pydoc         Python's own help texts, which come with every Python: no download (default)
    tinystories   the first 100 MB of TinyStories and its validation stories, from Hugging Face
    text8         Wikipedia as a-z and space, from mattmahoney.net: 90M / 5M of its characters
    a path        a UTF-8 text file; its last tenth is the validation text, or, for stories.txt,
                  the whole of stories_valid.txt if that is next to it
"""

import hashlib
import os
import shutil
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from wav import Refused, require

TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
TEXT8 = "https://mattmahoney.net/dc/text8.zip"


# ----------------------------------------------------------------------------------------------
# Tokens. For bytes or words instead of characters, change these three functions.


def vocabulary(text):
    """The set of tokens of a text. An id is a place in the sorted list of those of both parts."""
    return set(text)


def encode(text, vocab):
    """A string to an array of ids (int32); -1 for what is not in the vocabulary."""
    # A table over all code points: a Python loop over 100 million characters would take minutes.
    table = np.full(0x110000, -1, np.int32)
    table[[ord(token) for token in vocab]] = np.arange(len(vocab))
    return table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]


def decode(ids, vocab):
    """A list of ids to a string."""
    return "".join(vocab[i] for i in ids)


# ----------------------------------------------------------------------------------------------
# Texts


class Text(NamedTuple):
    train: np.ndarray  # ids
    val: np.ndarray
    vocab: list
    checksum: str  # of the three above: a run and its text belong together
    copied: int  # percent of the validation text that is also in the training text


def load(dataset, data_dir="data"):
    """A dataset by its name or path, as a Text."""
    train_text, val_text = read(dataset, Path(data_dir))
    vocab = sorted(vocabulary(train_text) | vocabulary(val_text))
    train, val = encode(train_text, vocab), encode(val_text, vocab)
    if len(vocab) <= 256:
        train, val = train.astype(np.uint8), val.astype(np.uint8)
    checksum = hashlib.sha256(repr((vocab, len(train))).encode() + train.tobytes() + val.tobytes())
    starts = even_starts(len(val_text), 100, 100) if len(val_text) > 100 else []
    copied = sum(val_text[i : i + 100] in train_text for i in starts)  # a model may memorize it
    return Text(train, val, vocab, checksum.hexdigest(), copied)


def read(dataset, data_dir):
    """Two strings: the training text and the validation text."""
    if dataset == "pydoc":
        return pydoc()
    if dataset == "tinystories":
        # The cut at 100 MB may fall inside a character: what is left of it is ignored.
        train = download(TINYSTORIES + "TinyStories-train.txt", data_dir, first=100_000_000)
        val = download(TINYSTORIES + "TinyStories-valid.txt", data_dir)
        return train.read_text("utf-8", errors="ignore"), val.read_text("utf-8")
    if dataset == "text8":
        with zipfile.ZipFile(download(TEXT8, data_dir)) as archive:
            text = archive.read("text8").decode("ascii")
        return text[:90_000_000], text[90_000_000:95_000_000]

    path = Path(dataset)
    require(path.is_file(), f"{dataset!r} is neither pydoc, tinystories, text8 nor a text file")
    beside = path.with_name(f"{path.stem}_valid{path.suffix}")
    try:
        text = path.read_text("utf-8-sig")
        if beside.exists():
            return text, beside.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} or {beside} is not UTF-8 text: {error}") from None
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def pydoc():
    """About 370,000 characters on Python; versions of Python differ."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Topics contain each other: unless each paragraph is taken once, half of the validation text
    # is in the training text.
    text = "\n\n".join(dict.fromkeys(text.split("\n\n")))
    # One topic is far longer than the rest: pieces of 4,000 characters spread it over both parts.
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    val = pieces[9::10]
    del pieces[9::10]
    return "".join(pieces), "".join(val)


def download(url, folder, first=None):
    """The path in a folder of a file at this address, or of its first bytes; fetched once."""
    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # so an interrupted one is never used
    headers = {"Range": f"bytes=0-{first - 1}"} if first else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            whole = reply.status == 200 and first is not None
            require(not whole, "the server sends the whole file instead of the part asked for")
            size = int(reply.headers["Content-Length"])
            with (
                open(part, "wb") as file,
                tqdm.wrapattr(file, "write", total=size, desc=path.name) as counted,
            ):
                shutil.copyfileobj(reply, counted)
        require(part.stat().st_size == size, "it ended early: try again")
        os.replace(part, path)
    except (Refused, OSError) as error:
        raise Refused(f"downloading {url}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


# ----------------------------------------------------------------------------------------------
# Batches. They depend on the seed and the step alone: every variant sees the same text, and a
# resumed run the same as an unbroken one.


def random_starts(n_ids, n_ctx, shape, seed, step):
    return np.random.default_rng((seed, step)).integers(n_ids - n_ctx, size=shape)


def even_starts(n_ids, n_ctx, n):
    return np.linspace(0, n_ids - n_ctx - 1, n).astype(np.int64)


def windows(ids, n_ctx, starts):
    """Inputs and targets, (..., n_ctx) each, of the windows of ids that begin at starts (...). The
    targets are the inputs one token later."""
    starts = torch.from_numpy(starts).to(ids.device)
    window = ids[starts[..., None] + torch.arange(n_ctx + 1, device=ids.device)].long()
    return window[..., :-1], window[..., 1:]

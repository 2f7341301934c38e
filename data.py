"""
Text to token ids, and ids to batches.

    pydoc         Python's own help texts, which every Python ships: no download (default)
    tinystories   the first 100 MB of TinyStories and its validation stories, from Hugging Face
    text8         Wikipedia as a-z and space, from mattmahoney.net: 90M / 5M of its characters
    a path        any UTF-8 text file: its last tenth is the validation text, or, for stories.txt,
                  the whole of stories_valid.txt where that lies beside it
"""

import hashlib
import os
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from wav import Refused, require

TINYSTORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
TINYSTORIES_BYTES = 100_000_000  # of the training file's 1.9 GB
TEXT8_URL = "https://mattmahoney.net/dc/text8.zip"

# ----------------------------------------------------------------------------------------------
# Tokens: what turns text into ids and back. For bytes or words in place of characters, edit this
# part; nothing else in the project knows what a token is.

TOKEN = "character"


def vocabulary(text):
    """The tokens of a text as a list; an id is a place in it."""
    return sorted(set(text))


def encode(text, vocab):
    """A string to an int32 array of ids, -1 for what is not in the vocabulary. By a table with a
    place for each code point of Unicode: a loop over 100 million characters would take minutes."""
    table = np.full(0x110000, -1, np.int32)
    table[[ord(token) for token in vocab]] = np.arange(len(vocab))
    return table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]


def decode(ids, vocab):
    """A list of ids to a string."""
    return "".join(vocab[i] for i in ids)


# ----------------------------------------------------------------------------------------------
# Texts


class Text(NamedTuple):
    train: np.ndarray  # ids to train on
    val: np.ndarray  # ids to validate on
    vocab: list
    checksum: str  # of all three


def load(dataset, data_dir="data", checksum=None):
    """A dataset by its name, as a Text. With the checksum of a run, another text is refused."""
    train_text, val_text = read_dataset(dataset, Path(data_dir))
    vocab = vocabulary(train_text)
    require(len(vocab) > 1, f"{dataset!r} has {len(vocab)} different {TOKEN}s: 2 are the least")
    copied = share_copied(train_text, val_text)
    if copied > 0.1:
        note = f"{copied:.0%} of the validation text is in the training text"
        print(f"note: {note}: its loss is too low", file=sys.stderr)

    train, val = encode(train_text, vocab), encode(val_text, vocab)
    unknown = val < 0
    if unknown.any():
        dropped = f"{unknown.sum():,} of {len(val):,} validation {TOKEN}s"
        print(f"note: dropped {dropped}, unseen in training", file=sys.stderr)
        val = val[~unknown]
    if len(vocab) <= 256:
        train, val = train.astype(np.uint8), val.astype(np.uint8)

    found = hashlib.sha256(repr((vocab, len(train))).encode() + train.tobytes() + val.tobytes())
    text = Text(train, val, vocab, found.hexdigest())
    same = checksum in (None, text.checksum)
    require(same, f"{dataset!r} is not the text of this run: it has changed, or is cut otherwise")
    return text


def share_copied(train, val, length=100, n=100):
    """The share of n windows of the validation text that stand word for word in the training text.
    Where it is large, validation measures memory."""
    starts = even_starts(len(val), length, n) if len(val) > length else []
    return sum(val[i : i + length] in train for i in starts) / n


def read_dataset(dataset, data_dir):
    """Two strings: to train on, and to validate on."""
    if dataset == "pydoc":
        return pydoc()
    if dataset == "tinystories":
        return tinystories(data_dir)
    if dataset == "text8":
        return text8(data_dir)
    found = os.path.exists(dataset) and not os.path.isdir(dataset)
    require(found, f"{dataset!r} is neither pydoc, tinystories, text8 nor the path of a text file")
    return text_file(Path(dataset))


def pydoc():
    """About 370,000 characters on Python; versions of Python differ."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise Refused(
            "this Python lacks its help texts: give --dataset the path of a file"
        ) from None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # Topics contain each other: without this, half of the validation text is in the training text.
    text = "\n\n".join(dict.fromkeys(text.split("\n\n")))
    # One topic is far longer than the rest: pieces of 4,000 characters spread it over both parts.
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    train = [piece for i, piece in enumerate(pieces) if i % 10 != 9]
    val = [piece for i, piece in enumerate(pieces) if i % 10 == 9]
    return "".join(train), "".join(val)


def tinystories(data_dir):
    train = data_dir / "TinyStories-train-100MB.txt"
    val = data_dir / "TinyStories-valid.txt"
    download(TINYSTORIES_URL + "TinyStories-train.txt", train, TINYSTORIES_BYTES)
    download(TINYSTORIES_URL + "TinyStories-valid.txt", val)
    # The cut at 100 MB may fall inside a character: what is left of it is ignored.
    return read(train, errors="ignore"), read(val)


def text8(data_dir):
    archive = data_dir / "text8.zip"
    download(TEXT8_URL, archive)
    try:
        with zipfile.ZipFile(archive) as z:
            text = z.read("text8").decode("ascii")
    except (zipfile.BadZipFile, KeyError) as error:
        raise Refused(f"{archive} is damaged, delete it to get it again: {error}") from None
    return text[:90_000_000], text[90_000_000:95_000_000]


def text_file(path):
    beside = path.with_name(f"{path.stem}_valid{path.suffix}")
    if beside.exists():
        return read(path), read(beside)
    text = read(path)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def read(path, errors="strict"):
    """A UTF-8 text file as a string; a byte-order mark is dropped, line ends become \\n."""
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text, at byte {error.start:,}") from None


def download(url, path, first=None):
    """Fetch url, or its first bytes, to path unless it is there. A part is never taken for whole."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    request = urllib.request.Request(url)
    if first:
        request.add_header("Range", f"bytes=0-{first - 1}")
    try:
        with urllib.request.urlopen(request, timeout=30) as reply, open(part, "wb") as file:
            size = first or int(reply.headers["Content-Length"] or 0)
            come = 0
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
                # A server without ranges offers the whole file: read its beginning and hang up.
                while block := reply.read(min(2**20, size - come)):
                    file.write(block)
                    come += len(block)
                    bar.update(len(block))
        require(come == size > 0, f"it ended after {come:,} of {size:,} bytes")
        os.replace(part, path)
    except (OSError, Refused) as error:
        raise Refused(f"download of {url} failed: {error}") from None
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------
# Batches. Where they start depends on seed and step alone: every variant sees the same text, and
# a resumed run the same as an unbroken one.


def random_starts(n_ids, n_ctx, shape, seed, step):
    return np.random.default_rng((seed, step)).integers(n_ids - n_ctx, size=shape)


def even_starts(n_ids, n_ctx, n):
    return np.linspace(0, n_ids - n_ctx - 1, n).astype(np.int64)


def windows(ids, n_ctx, starts):
    """Inputs and targets, (..., n_ctx) each, of the windows of ids, a tensor, that begin at starts,
    an array (...). The targets are the inputs one token later."""
    starts = torch.from_numpy(starts).to(ids.device, non_blocking=True)  # no step waits for it
    window = ids[starts[..., None] + torch.arange(n_ctx + 1, device=ids.device)].long()
    return window[..., :-1], window[..., 1:]

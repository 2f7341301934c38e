"""
Text to character ids, ids to batches, and batches to a device.

    pydoc         the language reference that ships inside every Python: no download (default)
    tinystories   the first 100 MB of TinyStories and its validation stories, from Hugging Face
    text8         Wikipedia as a-z and space, from mattmahoney.net: 90M / 5M of its characters
    a path        any UTF-8 text file: its last tenth is the validation text, or, for stories.txt,
                  the whole of stories_valid.txt where that lies beside it

The vocabulary is the set of characters of the training text.
"""

import hashlib
import http.client
import math
import os
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from tqdm import tqdm

from wav import require

TINYSTORIES_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/"
TEXT8_URL = "https://mattmahoney.net/dc/text8.zip"
TEXT8_MD5 = "3bea1919949baf155f99411df5fada7e"
TINYSTORIES_BYTES = 100_000_000  # of the training file's 1.9 GB
MAX_BYTES = 200_000_000  # no download may be larger
MAX_VOCAB = 65_536
TIMEOUT = 30  # seconds without an answer


def load(dataset, data_dir="data"):
    """Train and validation ids, 1-D arrays of the smallest unsigned type that holds the vocabulary,
    and the vocabulary itself: a sorted list of characters, where an id is a place in the list.

    Validation characters that the training text never shows are dropped, and their number printed.
    Raises ValueError (the text is unusable), OSError (a file or the network is).
    """
    known = {"pydoc": pydoc, "tinystories": tinystories, "text8": text8}
    if dataset in known:
        return encode(*known[dataset](Path(data_dir)))
    what = f"dataset={dataset!r} is neither {', '.join(known)} nor the path of a text file"
    require(os.path.exists(dataset), what)
    return encode(*text_file(Path(dataset)))


def encode(train, val):
    """Two strings to ids and vocabulary, by table: no loop over characters."""
    train, val = (np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in (train, val))
    seen = np.zeros(0x110000, dtype=bool)  # one flag for each Unicode code point
    seen[train] = True
    vocab = np.flatnonzero(seen)
    allowed = f"{len(vocab):,} distinct characters, where 2 to {MAX_VOCAB:,} are allowed"
    require(2 <= len(vocab) <= MAX_VOCAB, allowed)
    known = seen[val]
    if not known.all():
        missing = [chr(c) for c in np.unique(val[~known])]
        dropped = f"dropped {(~known).sum():,} of {len(val):,} characters"
        never = f"which the training text never shows: {' '.join(map(repr, missing[:10]))}"
        print(f"validation: {dropped}, {never}", file=sys.stderr)
    table = np.zeros(len(seen), dtype=np.min_scalar_type(len(vocab) - 1))
    table[vocab] = np.arange(len(vocab))
    return table[train], table[val[known]], [chr(c) for c in vocab]


def pydoc(data_dir):
    """About 465,000 characters on Python; versions of Python differ a little."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python has no pydoc_data.topics: give --dataset a file") from None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # One topic is far longer than the rest: pieces spread it over both parts.
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    train = "".join(piece for i, piece in enumerate(pieces) if i % 10 != 9)
    return train, "".join(pieces[9::10])


def text_file(path):
    require(not path.is_dir(), f"{path} is a directory: give the path of a text file")
    beside = path.with_name(f"{path.stem}_valid{path.suffix}")
    if beside.exists():
        return read(path), read(beside)
    text = read(path)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def read(path):
    """A UTF-8 text file as a string; a byte-order mark is dropped, line ends become \\n."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start:,}")
    require("\0" not in text, f"{path} is not text: it holds a zero byte")
    return text


def tinystories(data_dir):
    train = data_dir / "TinyStories-train-100MB.txt"
    val = data_dir / "TinyStories-valid.txt"
    download(TINYSTORIES_URL + "TinyStories-train.txt", train, check_stories, TINYSTORIES_BYTES)
    download(TINYSTORIES_URL + "TinyStories-valid.txt", val, check_stories)
    return read(train), read(val)


def text8(data_dir):
    archive = data_dir / "text8.zip"
    download(TEXT8_URL, archive, check_text8)
    try:
        with zipfile.ZipFile(archive) as z:
            text = z.read("text8").decode("ascii")  # read by its name: nothing is unpacked
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it to get it again") from None
    return text[:90_000_000], text[90_000_000:95_000_000]


def check_stories(path):
    content = path.read_bytes()
    end = len(content)
    while end and content[end - 1] >= 0x80:  # the cut may fall inside a character: back to ASCII
        end -= 1
    os.truncate(path, end)
    stories = b"<|endoftext|>" in content
    require(stories, "what came is not TinyStories: it has no <|endoftext|> between stories")
    content[:end].decode("utf-8")  # a UnicodeDecodeError is a ValueError


def check_text8(path):
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    require(md5 == TEXT8_MD5, f"what came has md5 {md5}, not {TEXT8_MD5}")


def download(url, path, check, first=None):
    """Fetch url, or its first bytes, to path unless it is there: whole and checked, or not."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fetch(url, part, first)
        check(part)
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = f"{' '.join(str(error).split())} (--dataset pydoc needs no network)"
        raise OSError(f"download of {url} failed: {reason}") from None
    finally:
        part.unlink(missing_ok=True)


def fetch(url, path, first):
    request = urllib.request.Request(url)
    if first:
        request.add_header("Range", f"bytes=0-{first - 1}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        scheme = urlsplit(url).scheme  # https must not turn into http
        require(urlsplit(reply.url).scheme == scheme, f"it was redirected to {reply.url}")
        # A server without ranges offers the whole file: read its beginning and hang up.
        size, come = first or int(reply.headers.get("Content-Length", 0)), 0
        allowed = f"it offers {size:,} bytes, where 1 to {MAX_BYTES:,} are allowed"
        require(0 < size <= MAX_BYTES, allowed)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None)
        with open(path, "wb") as file, bar:
            while block := reply.read(min(1 << 20, size - come)):
                file.write(block)
                come += len(block)
                bar.update(len(block))
        require(come == size, f"it ended after {come:,} of {size:,} bytes")


# --------------------------------------------------------------------------------------------------
# Batches. Where they start depends on (seed, step) alone: every variant sees the same text, and a
# resumed run the same as an unbroken one.


def random_starts(ids, n_ctx, shape, seed, step):
    return np.random.default_rng((seed, step)).integers(len(ids) - n_ctx, size=shape)


def even_starts(ids, n_ctx, shape):
    return np.linspace(0, len(ids) - n_ctx - 1, math.prod(shape)).astype(np.int64).reshape(shape)


def windows(ids, n_ctx, starts):
    """Inputs and targets, (n, n_ctx) each, of the windows that begin at starts (n), a tensor beside
    ids: the targets are the inputs one character later."""
    window = ids[starts[:, None] + torch.arange(n_ctx + 1, device=ids.device)].long()
    return window[:, :-1], window[:, 1:]


def to_device(array, device):
    """An array as a tensor on a torch.device; uint16, which torch cannot index, becomes int32."""
    tensor = torch.from_numpy(array.astype(np.int32) if array.dtype == np.uint16 else array)
    if device.type == "cuda":  # from memory that is not pinned, the copy would make every step wait
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pick_device(name, local, world):
    """The torch.device of this process, number `local` of its host. Raises ValueError."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available() and world == 1
    allowed = ["auto", "cpu"] + ["mps"] * mps + ["cuda"] * (gpus > 0)
    allowed += [f"cuda:{i}" for i in range(gpus) if world == 1]
    require(name in allowed, f"device={name!r} must be one of {', '.join(allowed)}")
    if name == "auto":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "cuda":
        require(local < gpus, f"more processes than GPUs: --nproc_per_node={gpus} at most")
        name = f"cuda:{local}"
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)

"""
Text to character ids, and ids to batches.

    pydoc         the language reference that ships inside every Python: no download (default)
    tinystories   the first 100 MB of TinyStories and its validation stories, from Hugging Face
    text8         Wikipedia as a-z and space, from mattmahoney.net: 90M / 5M of its characters
    a path        any UTF-8 text file: its last tenth is the validation text, or, for stories.txt, the
                  whole of stories_valid.txt where that lies beside it

The vocabulary is the set of characters of the training text.
"""

import hashlib
import http.client
import os
import urllib.request
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from tqdm import tqdm

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
    if dataset == "pydoc":
        train, val = pydoc()
    elif dataset == "tinystories":
        train, val = tinystories(Path(data_dir))
    elif dataset == "text8":
        train, val = text8(Path(data_dir))
    elif os.path.exists(dataset):
        train, val = text_file(Path(dataset))
    else:
        raise ValueError(
            f"dataset={dataset!r} is neither pydoc, tinystories or text8 nor the path of a text file"
        )
    return encode(train, val)


def encode(train, val):
    """Two strings to ids and vocabulary, by table: no loop over characters."""
    train, val = code_points(train), code_points(val)
    seen = np.zeros(0x110000, dtype=bool)  # one flag for each Unicode code point
    seen[train] = True
    vocab = np.flatnonzero(seen)
    if len(vocab) < 2:
        raise ValueError(
            "the text needs two or more distinct characters: there is nothing to predict"
        )
    if len(vocab) > MAX_VOCAB:
        raise ValueError(f"{len(vocab):,} distinct characters: at most {MAX_VOCAB:,} are supported")
    known = seen[val]
    if not known.all():
        missing = [chr(c) for c in np.unique(val[~known])]
        print(
            f"validation: dropped {(~known).sum():,} of {len(val):,} characters, "
            f"which the training text never shows: {' '.join(map(repr, missing[:10]))}"
        )
    table = np.zeros(len(seen), dtype=np.min_scalar_type(len(vocab) - 1))
    table[vocab] = np.arange(len(vocab))
    return table[train], table[val[known]], [chr(c) for c in vocab]


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def pydoc():
    """About 465,000 characters on Python. Their exact number differs between versions of Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without pydoc_data.topics: give --dataset a text file")
    text = "\n\n".join(topics[name] for name in sorted(topics))
    # One topic is far longer than the rest: pieces spread it over both parts.
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    train = "".join(piece for i, piece in enumerate(pieces) if i % 10 != 9)
    return train, "".join(pieces[9::10])


def text_file(path):
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the path of a text file")
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
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds a zero byte")
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
        raise ValueError(
            f"{archive} is damaged ({error}): delete it to download it again"
        ) from None
    return text[:90_000_000], text[90_000_000:95_000_000]


def check_stories(path):
    content = path.read_bytes()
    end = len(content)
    while end and content[end - 1] >= 0x80:  # the cut may fall inside a character: back to ASCII
        end -= 1
    os.truncate(path, end)
    if b"<|endoftext|>" not in content:
        raise ValueError("what came is not TinyStories: it has no <|endoftext|> between stories")
    content[:end].decode("utf-8")  # a UnicodeDecodeError is a ValueError


def check_text8(path):
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if md5 != TEXT8_MD5:
        raise ValueError(f"what came has md5 {md5}, not {TEXT8_MD5}")


def download(url, path, check, first=None):
    """Fetch url, or its `first` bytes, to path unless it is there: whole and checked, or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        fetch(url, part, first)
        check(part)
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(
            f"download of {url} failed: {' '.join(str(error).split())} "
            "(--dataset pydoc needs no network)"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def fetch(url, path, first):
    request = urllib.request.Request(url)
    if first:
        request.add_header("Range", f"bytes=0-{first - 1}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
        if urlsplit(reply.url).scheme != urlsplit(url).scheme:  # https must not turn into http
            raise ValueError(f"it was redirected to {reply.url}")
        # A server without ranges offers the whole file: read its beginning and hang up.
        size = first or int(reply.headers.get("Content-Length", 0))
        if not 0 < size <= MAX_BYTES:
            raise ValueError(f"it offers {size:,} bytes, where 1 to {MAX_BYTES:,} are allowed")
        with (
            open(path, "wb") as file,
            tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1]) as bar,
        ):
            while block := reply.read(min(1 << 20, size - bar.n)):
                file.write(block)
                bar.update(len(block))
        if bar.n != size:
            raise ValueError(f"it ended after {bar.n:,} of {size:,} bytes")


# --------------------------------------------------------------------------------------------------
# Batches. Where they start depends on (seed, step) alone, so every variant sees the same text, and a
# resumed run the same as an unbroken one.


def to_device(ids, device):
    """The whole text as a tensor on the device: int32 where numpy has uint16, which torch cannot index."""
    return torch.from_numpy(ids if ids.dtype == np.uint8 else ids.astype(np.int32)).to(device)


def random_starts(ids, n_ctx, n, seed, step):
    return np.random.default_rng((seed, step)).integers(len(ids) - n_ctx, size=n)


def even_starts(ids, n_ctx, n):
    return np.linspace(0, len(ids) - n_ctx - 1, n).astype(np.int64)


def windows(ids, n_ctx, starts):
    """Inputs and targets, (n, n_ctx) each: the targets are the inputs one character later."""
    starts = torch.from_numpy(starts).to(ids.device)
    window = ids[starts[:, None] + torch.arange(n_ctx + 1, device=ids.device)].long()
    return window[:, :-1], window[:, 1:]

"""Raw files of every kind of corpus, made up on the spot in the formats and sizes that people have."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file

WORDS = 2000


@dataclass(frozen=True)
class Input:
    """What an ingest is given, and what it is like."""

    source: Path
    what: str
    packed: bool
    """At scale it comes in large files, which are read by ranges; else a file is one request, however small."""
    settings: dict[str, Any] = field(default_factory=dict)
    range_bytes: int = 64 << 20
    """Of one slice at scale, and so of one request. Kinds with a model cut by what comes out, which is far more."""


def images(folder: Path, count: int) -> Input:
    """A tar of JPEGs with smooth shapes and some grain: about 40 kB each, as photos of that size have."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:375, :500] / 500
    photos = []
    for n in range(20):
        smooth = np.stack([np.sin((9 + n) * x + k) * np.cos(7 * y * (k + 1)) for k in range(3)], -1)
        pixels = (127 + 90 * smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=80)
        photos.append(file.getvalue())
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for n in range(count):
            member = tarfile.TarInfo(f"{n:06}.jpg")
            member.size = len(photos[n % 20])
            tar.addfile(member, io.BytesIO(photos[n % 20]))
    return Input(folder, "JPEG 500 x 375 in a tar, to 64 x 64", True)


def vectors(folder: Path, count: int) -> Input:
    np.save(folder / "w.npy", np.random.default_rng(0).standard_normal((count, 512), np.float32))
    return Input(folder, ".npy of 512 float32", True)


def proteins(folder: Path, count: int) -> Input:
    """One chain of 250 residues a file, 8 atoms a residue, as .pdb.gz."""
    random = np.random.default_rng(0)
    atoms = ("N", "CA", "C", "O", "CB", "CG", "CD", "CE")
    for n in range(count):
        places = np.cumsum(random.normal(0, 1.2, (250 * len(atoms), 3)), 0).clip(-900, 900)
        lines = []
        for number, (a, b, c) in enumerate(places, start=1):
            name, residue = atoms[(number - 1) % len(atoms)], (number - 1) // len(atoms) + 1
            where = f"{a:8.3f}{b:8.3f}{c:8.3f}  1.00 20.00"
            lines.append(f"ATOM  {number:5d}  {name:<3} LYS A{residue:4d}    {where}           {name[0]}  ")
        data = ("\n".join([*lines, "TER", "END"]) + "\n").encode()
        (folder / f"{n:05}.pdb.gz").write_bytes(gzip.compress(data, 6, mtime=0))
    return Input(folder, ".pdb.gz, 250 residues", False)


def streamlines(folder: Path, count: int) -> Input:
    """Bundles of 1,000 streamlines of 20 to 200 points, as .trk."""
    import nibabel as nib

    random = np.random.default_rng(0)
    for first in range(0, count, 1000):
        lengths = random.integers(20, 200, min(1000, count - first))
        lines = [np.cumsum(random.normal(0, 1, (n, 3)), 0).astype(np.float32) for n in lengths]
        tractogram = nib.streamlines.Tractogram(lines, affine_to_rasmm=np.eye(4))
        nib.streamlines.save(tractogram, str(folder / f"bundle_{first // 1000:03}.trk"))
    return Input(folder, ".trk, about 110 points to 64", False)


def molecules(folder: Path, count: int) -> Input:
    """A CSV of drug-like SMILES (20 to 40 heavy atoms) and a label."""
    cores = ("c1ccc2[nH]c({})cc2c1", "O=C(N{})c1ccc(Cl)cc1", "CN1CCN(CC1)c1ncc({})cn1", "O=S(=O)(N{})c1ccccc1F")
    tails = ("CCO", "c1ccncc1", "CC(C)(C)O", "C1CCCCC1", "c1ccc(OC)cc1", "CC(=O)O", "CCN(CC)CC", "C(F)(F)")
    rows = ["smiles,label"]
    for n in range(count):
        left, right = tails[n % 8], tails[n // 8 % 8]
        rows.append(f"{cores[n // 64 % 4].format(left + 'C' * (n // 256 % 7) + right.replace('1', '3'))},{n % 2}")
    (folder / "molecules.csv").write_text("\n".join(rows) + "\n")
    return Input(folder, "CSV of SMILES", True)


def activations(folder: Path, count: int) -> Input:
    """Lines of 40 to 160 words through a new encoder of MiniLM's size: 6 layers, 384 wide."""
    random = np.random.default_rng(0)
    (folder / "text").mkdir()
    lines = [_sentence(random, 40, 160) for _ in range(count)]
    (folder / "text/lines.csv").write_text("text\n" + "\n".join(lines) + "\n")
    model = _model(folder / "model")
    settings = {"model": str(model), "layers": [3, 6]}
    return Input(
        folder / "text", "CSV of texts, layers 3 and 6 of 6 x 384; a row is a token", True, settings, 192 << 10
    )


def items(folder: Path, count: int) -> Input:
    """Titles of 5 to 20 words and a log of ten events an item, in RecBole's form."""
    random = np.random.default_rng(0)
    (folder / "log").mkdir()
    titles = [f"{n}\t{_sentence(random, 5, 20)}" for n in range(count)]
    (folder / "log/shop.item").write_text("item_id:token\ttitle:token_seq\n" + "\n".join(titles) + "\n")
    events = [f"{n % 97}\t{random.integers(count)}\t{n}" for n in range(10 * count)]
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "log/shop.inter").write_text(head + "\n".join(events) + "\n")
    settings = {"model": str(_model(folder / "model"))}
    return Input(folder / "log", "titles by a sentence model of 6 x 384, and the log", True, settings, 128 << 10)


def _sentence(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(f"w{word}" for word in random.integers(0, WORDS, random.integers(least, most)))


def _model(folder: Path) -> Path:
    """An untrained BERT and a tokenizer of whole words."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocabulary = {word: n for n, word in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{word[1:-1].lower()}_token": word for word in special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    fast.save_pretrained(folder)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), **shape))
    model.config.save_pretrained(folder)
    # Not save_pretrained: it draws a bar.
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    return folder


MAKERS: dict[str, tuple[Callable[[Path, int], Input], int]] = {
    "activations": (activations, 300),
    "images": (images, 2000),
    "items": (items, 2000),
    "molecules": (molecules, 6000),
    "proteins": (proteins, 300),
    "streamlines": (streamlines, 20_000),
    "vectors": (vectors, 150_000),
}
"""Kind -> how its input is made, and how many units are some seconds of work."""

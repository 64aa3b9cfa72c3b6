"""Where a language model's files are: a folder, or a hub name fetched without its pickles. All checks precede work."""

import hashlib
import re
from pathlib import Path
from types import ModuleType

from pipelines.errors import Refused

# One name, or owner/name, as the hub spells them. Anything else must be a folder that exists.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WANTED = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Of a hub model only these are fetched (and the GGUF file that is asked for): no pickle ever lands on the disk."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
SAMPLE_BYTES = 64 << 10
SAMPLES = 64


def transformers() -> ModuleType:
    """The library, imported late: it costs seconds that `vqray recipes` need not pay.

    Raises:
        Refused: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise Refused(
            f"language models need transformers, which cannot be imported ({error}): pip install 'vqray[activations]'."
        ) from None
    return transformers


def find(name: str, gguf_file: str | None = None, revision: str | None = None) -> Path:
    """The folder of a model that holds config, tokenizer and weights in a form that runs no code when loaded.

    Args:
        name: a folder on this machine (nothing is fetched then), or a name on the Hugging Face hub.
        gguf_file: the name of a GGUF file in it, which brings config and tokenizer along.
        revision: branch, tag or commit of a hub model.

    Raises:
        Refused: no such folder, no config, weights or tokenizer, or weights that are pickles.
    """
    if "://" in name:
        raise Refused(f"model={name} is a URI; models are read from a folder every node has, or by a hub name.")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = _fetched(name, gguf_file, revision)
    elif revision is not None:
        raise Refused(f"revision={revision} was given, but model={name} is a folder; a revision is of a hub name.")
    _check_files(name, folder, gguf_file)
    return folder


def fingerprint(folder: Path, gguf_file: str | None = None) -> str:
    """Tells models apart without reading gigabytes: names, sizes, small files, and samples of the weights.

    Training again changes nearly every weight, so samples see it; a few weights edited by hand may escape.
    """
    found = hashlib.sha256()
    for path in _model_files(folder, gguf_file):
        size = path.stat().st_size
        found.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            # One spread of starts for any size: small files are covered whole.
            for start in sorted({size * n // SAMPLES for n in range(SAMPLES)}):
                file.seek(start)
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def _fetched(name: str, gguf_file: str | None, revision: str | None) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise Refused(f"model={name} does not exist; give a folder with config.json and *.safetensors, or a hub name.")
    transformers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [*WANTED, *([gguf_file] if gguf_file else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Refused(
            f"model={name} is no folder here, and the Hugging Face hub did not give it ({type(error).__name__}: "
            f"{reason}). Give a folder, or a hub name while there is a network or it lies in the hub's cache."
        ) from None


def _check_files(name: str, folder: Path, gguf_file: str | None) -> None:
    held = sorted(path.name for path in folder.iterdir())
    if gguf_file is not None:
        if Path(gguf_file).name != gguf_file or gguf_file not in held:
            there = ", ".join(file for file in held if file.endswith(".gguf")) or "none"
            raise Refused(f"gguf_file={gguf_file} is not in {name}; GGUF files there: {there}.")
        return
    if any(file.endswith(".gguf") for file in held) and not any(file.endswith(".safetensors") for file in held):
        files = ", ".join(file for file in held if file.endswith(".gguf"))
        raise Refused(f"{name} holds GGUF weights; say which file: gguf_file={files}")
    if "config.json" not in held:
        raise Refused(f"{name} has no config.json, so it is not a transformers model; it holds {', '.join(held[:8])}.")
    if not any(file.endswith(".safetensors") for file in held):
        pickled = [file for file in held if file.endswith(PICKLES)]
        if pickled:
            raise Refused(
                f"{name} has its weights only as {', '.join(pickled[:3])}; these formats may run code when they are "
                "loaded, so only .safetensors and .gguf are read. Convert once, where you trust it: "
                "AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors."
            )
        raise Refused(
            f"{name} has no weights: neither *.safetensors nor *.gguf; it holds {', '.join(held[:8])}. Copy the rest of"
            " the model into it, or give the hub name it came from."
        )
    if not any(file in held for file in TOKENIZER_FILES):
        raise Refused(f"{name} has no tokenizer; one of {', '.join(TOKENIZER_FILES)} must lie beside config.json.")


def _model_files(folder: Path, gguf_file: str | None) -> list[Path]:
    def counts(file: str) -> bool:
        if gguf_file is not None:
            return file == gguf_file
        return file in ("config.json", *TOKENIZER_FILES) or file.endswith(".safetensors")

    return sorted(path for path in folder.iterdir() if counts(path.name))

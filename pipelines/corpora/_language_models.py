"""Language models as readers of text: tokens in, hidden states of chosen layers out, the same bits on every run.

Layer l is the residual stream after block l: what block l of 1 .. `layers` gives, and for l = 0 what enters block 1
(the embeddings). It equals `output_hidden_states`[l] of transformers except where a model normalises after its last
block (GPT-2, Llama, ...): there transformers gives the normalised state for the last l, and this module the stream.

A row's bits depend on what shares its batch, on the padding and on the number of threads. So batches are a function
of the lengths alone (`batched`), padding is always on the right to the longest of the batch, and one thread computes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.corpora import _model_folders as folders
from pipelines.errors import Refused

Precision = Literal["float32", "bfloat16", "float16"]
Onward = Callable[[Float[Tensor, "S T D"]], Float[Tensor, "S T D"]]
BATCH_TOKENS = 1024
"""Of one batch, padding included: with more, a CPU is slower (MiniLM: 3.2k tokens/s at 1,024, 2.8k at 4,096)."""
NO_WINDOW = 10**9
"""Tokenizers without a limit of their own say about 1e30."""


@dataclass(frozen=True)
class ModelShape:
    """What is known of a model before its weights are read."""

    layers: int
    """Number of blocks; layers 0 .. `layers` can be asked for."""
    width: int
    """D of the residual stream."""
    window: int | None
    """Most tokens of one sequence, special tokens included; None where positions have no end."""


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model, its tokenizer, and where its blocks are."""

    shape: ModelShape
    tokenizer: Any
    model: nn.Module
    blocks: Sequence[nn.Module]
    folder: Path
    device: torch.device

    def hidden_states(self, sequences: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Float[Tensor, "B T D"]]:
        """One forward: the residual stream after each of `layers`, in their order, on the model's device.

        Token ids of B sequences, each with at least one; T is the longest. What lies beyond a sequence's end is
        undefined. Blocks after the deepest layer asked for are not computed.
        """
        kept: dict[int, Tensor] = {}
        deepest = max(layers)
        handles = [self._tap(layer, kept, stop=layer == deepest) for layer in sorted(set(layers))]
        try:
            self._forward(sequences)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [kept[layer] for layer in layers]

    def onward(self, sequence: Sequence[int], layer: int, upto: int) -> tuple[Float[Tensor, "1 T D"], Onward]:
        """(the stream of one sequence after `layer`, a function that carries other streams [S, T, D] in its place on to
        what is the stream after `upto`, with gradients). `layer` < `upto`.

        Blocks get what the model itself gave them (masks, positions), so nothing before `layer` is computed again.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        blocks = self.blocks[layer:upto]

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        kept: dict[int, Tensor] = {}
        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
        handles.append(self._tap(upto, kept, stop=True))
        try:
            # Not in inference mode: what a block is given takes part in gradients later.
            self._forward([sequence], torch.no_grad)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()

        def carry(stream: Float[Tensor, "S T D"]) -> Float[Tensor, "S T D"]:
            for block, (args, kwargs) in zip(blocks, calls, strict=True):
                given = {} if args else {"hidden_states": stream}
                out = block(*((stream, *args[1:]) if args else ()), **{**kwargs, **given})
                stream = out[0] if isinstance(out, tuple) else out
            return stream

        args, kwargs = calls[0]
        return args[0] if args else kwargs["hidden_states"], carry

    def embed(
        self, texts: Sequence[str], *, normalise: bool | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> Float[np.ndarray, "N D"]:
        """Sentence embeddings in float32: the mean of the last layer over all tokens, special ones included.

        This is what sentence-transformers computes for mean-pooling models. Longer texts are cut to the window its
        `sentence_bert_config.json` names, else the model's own. A text without a single token gives zeros.

        Args:
            texts: all texts of one slice: they are batched by length, so the bits depend on which come together.
            normalise: to length 1; None does as the folder's `modules.json` says.
        """
        form = sentence_form(self.folder)
        most = min(size for size in (form.window, self.shape.window, NO_WINDOW) if size is not None)
        sequences = self.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"] if texts else []
        means = np.zeros((len(texts), self.shape.width), np.float32)
        for batch in batched([len(ids) for ids in sequences], batch_tokens):
            states, mask = self._forward([sequences[place] for place in batch])
            weights = mask.unsqueeze(-1).float()
            pooled = (states.float() * weights).sum(1) / weights.sum(1)
            if form.normalise if normalise is None else normalise:
                pooled = nn.functional.normalize(pooled, dim=-1)
            means[batch] = pooled.cpu().numpy()
        return means

    def _forward(
        self,
        sequences: Sequence[Sequence[int]],
        mode: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
    ) -> tuple[Float[Tensor, "B T D"], Tensor]:
        """(last hidden state after the model's own final norm, mask [B, T]) of one padded batch."""
        longest = max(len(ids) for ids in sequences)
        # Not the tokenizer's pad(): it pads left for some models, and has no pad token for others. What stands at
        # padding is never seen by the real tokens, but RoBERTa derives positions from where its own pad id is.
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(sequences), longest), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence)
            mask[row, : len(sequence)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        with mode(), one_thread():
            return self.model(input_ids=ids, attention_mask=mask, **self._extra()).last_hidden_state, mask

    def _extra(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}

    def _tap(self, layer: int, kept: dict[int, Tensor], *, stop: bool) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[0] = args[0] if args else kwargs["hidden_states"]
            if stop:
                raise _Reached

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output
            if stop:
                raise _Reached

        if layer == 0:
            return self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        return self.blocks[layer - 1].register_forward_hook(after)


class _Reached(Exception):
    """The deepest layer that is wanted has been computed."""


@dataclass(frozen=True)
class SentenceForm:
    """How sentence-transformers turns this model's tokens into a sentence, as files beside it say."""

    window: int | None
    normalise: bool


def shape_of(name: str, gguf_file: str | None = None, revision: str | None = None) -> ModelShape:
    """Layers, width and window from a model's config alone, before anything else is begun.

    Raises:
        Refused: the folder is not usable (see `_model_folders.find`), or it is no plain stack of blocks over text.
    """
    folder = folders.find(name, gguf_file, revision)
    config = _config(folder, gguf_file)
    with torch.device("meta"), _quiet():
        model = _told(folder, lambda: folders.transformers().AutoModel.from_config(config, trust_remote_code=False))
    return _shape(folder, model, _tokenizer(folder, gguf_file))


def open_model(
    name: str,
    gguf_file: str | None = None,
    revision: str | None = None,
    *,
    precision: Precision = "float32",
    gpus: float = 0.0,
) -> LanguageModel:
    """Load a model for reading: weights from safetensors or GGUF, in evaluation mode, without its head.

    Args:
        precision: in which the model computes; stored types are the caller's.
        gpus: more than 0 loads it on the CUDA device this process sees.

    Raises:
        Refused: as `shape_of`; weights that lack a part; no CUDA device where one is asked for.
    """
    folder = folders.find(name, gguf_file, revision)
    if gpus and not torch.cuda.is_available():
        raise Refused(f"gpus={gpus} was given, but this process sees no CUDA device; use gpus=0.")
    config, library = _config(folder, gguf_file), folders.transformers()
    wanted: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    with _quiet(), one_thread():
        model, report = _told(
            folder,
            lambda: library.AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, precision),
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **wanted,
            ),
        )
    # What is missing would be drawn at random. The pooler over the first token is no part of the stream.
    if lacking := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise Refused(f"the weights in {folder} lack {len(lacking)} parts of the model, first {lacking[0]!r}.")
    tokenizer = _tokenizer(folder, gguf_file)
    device = torch.device("cuda" if gpus else "cpu")
    model = model.to(device).eval().requires_grad_(False)
    return LanguageModel(_shape(folder, model, tokenizer), tokenizer, model, _blocks(folder, model), folder, device)


def open_tokenizer(name: str, gguf_file: str | None = None, revision: str | None = None) -> Any:
    """A model's tokenizer alone.

    Raises:
        Refused: as `shape_of`; one that does not say where in the text its tokens are.
    """
    return _tokenizer(folders.find(name, gguf_file, revision), gguf_file)


def batched(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of sequences that go through the model together: sorted by length, at most `batch_tokens` with padding.

    A function of the lengths alone, so that who computes it and when changes no bits. Empty sequences are left out;
    one that is longer than `batch_tokens` goes alone.
    """
    order = sorted((place for place, length in enumerate(lengths) if length), key=lambda place: (lengths[place], place))
    batch: list[int] = []
    for place in order:
        if batch and lengths[place] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def pooling_modes(folder: Path) -> list[str]:
    """How a sentence-transformers folder says that token vectors become a sentence's; of any other folder nothing."""
    pooling = _json(folder / "1_Pooling" / "config.json")
    return sorted(key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True)


def sentence_form(folder: Path) -> SentenceForm:
    """The window and normalisation of a sentence-transformers folder; of any other: the model's window, none.

    Raises:
        Refused: its files ask for another pooling than the mean.
    """
    modes = pooling_modes(folder)
    if modes and modes != ["pooling_mode_mean_tokens"]:
        raise Refused(f"{folder} pools by {', '.join(modes)}; only the mean over tokens is computed here.")
    modules = _json(folder / "modules.json") or []
    normalise = any(str(module.get("type", "")).endswith(".Normalize") for module in modules)
    return SentenceForm(_json(folder / "sentence_bert_config.json").get("max_seq_length"), normalise)


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _config(folder: Path, gguf_file: str | None) -> Any:
    library = folders.transformers()
    given = {"gguf_file": gguf_file} if gguf_file else {}
    load = library.AutoConfig.from_pretrained
    with _quiet():
        config = _told(folder, lambda: load(folder, local_files_only=True, trust_remote_code=False, **given))
    if config.is_encoder_decoder:
        raise Refused(f"{folder} is an encoder-decoder ({config.model_type}); causal and masked models are read.")
    return config


def _tokenizer(folder: Path, gguf_file: str | None) -> Any:
    given = {"gguf_file": gguf_file} if gguf_file else {}
    load = folders.transformers().AutoTokenizer.from_pretrained
    with _quiet():
        made = _told(folder, lambda: load(folder, local_files_only=True, trust_remote_code=False, **given))
    if not made.is_fast:
        raise Refused(f"the tokenizer in {folder} gives no places in the text; a fast one (tokenizer.json) is needed.")
    return made


def _shape(folder: Path, model: Any, tokenizer: Any) -> ModelShape:
    blocks = _blocks(folder, model)
    ends = [int(tokenizer.model_max_length), *_positions(model)]
    window = min(end for end in ends if end)
    return ModelShape(len(blocks), int(model.config.hidden_size), window if window < NO_WINDOW else None)


def _positions(model: Any) -> list[int]:
    """How many tokens the model has positions for, where its config says so."""
    most = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return []
    # RoBERTa and its kin count positions from padding_idx + 1, so that many of them are never used.
    learned = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    unused = [part.padding_idx + 1 for part in learned if getattr(part, "padding_idx", None) is not None]
    return [most - max(unused, default=0)]


def _blocks(folder: Path, model: Any) -> Sequence[nn.Module]:
    """The stack the residual stream runs through: the one list of as many modules as the config says layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(stacks) != 1:
        raise Refused(
            f"{folder} ({model.config.model_type}) has {len(stacks)} stacks of {count} blocks where one is needed, "
            "so its residual stream cannot be told; models that share one block over all layers are among these."
        )
    return list(stacks[0])


def _told(folder: Path, load: Callable[[], Any]) -> Any:
    """What transformers raises about a folder, as a refusal with its own first line."""
    try:
        return load()
    except BaseException as error:
        # A panic of the tokenizer's Rust code is no Exception; what else is none (a key pressed) goes on.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = next(iter(str(error).strip().splitlines()), "")[:300]
        hint = " pip install 'vqray[activations]'." if isinstance(error, ImportError) or "pip install" in line else ""
        raise Refused(f"transformers cannot load {folder} ({type(error).__name__}: {line}).{hint}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads, and every core has its own worker anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and its report of weights that are not used."""
    log = folders.transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()

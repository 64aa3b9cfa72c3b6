"""Language models of two blocks with random weights and a word-piece tokenizer, saved as folders."""

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = ["the", "cat", "sat", "##s", "on", "mat", "good", "bad", "film", "and", "dog", ".", ","]
VOCABULARY = [*SPECIALS, *WORDS, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
WINDOW = 24
WIDTH = 16

CONFIGS: dict[str, Any] = {
    "bert": BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=WINDOW,
    ),
    "roberta": RobertaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=WINDOW + 1, pad_token_id=0,
    ),
    "gpt2": GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=WINDOW,
        bos_token_id=2, eos_token_id=3,
    ),
    "llama": LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=WINDOW, bos_token_id=2, eos_token_id=3,
    ),
}  # fmt: skip


def tokenizer(specials: bool = True) -> PreTrainedTokenizerFast:
    """Lower-case word pieces with [CLS] and [SEP] around them, as BERT's; without, as a causal model's."""
    ids = {word: place for place, word in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if specials:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        )
    named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"} if specials else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **named)


def save(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A model folder as `save_pretrained` writes it. Weights are large enough that layers differ visibly."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer(specials=kind in ("bert", "roberta")).save_pretrained(folder)
    return folder


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def save_gguf(path: Path, llama: Path) -> None:
    """The weights of a saved Llama as a GGUF file, with a byte-level tokenizer of its own."""
    import gguf

    model = AutoModel.from_pretrained(llama)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(33, 32 + len(VOCABULARY))), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, number, part = name.removesuffix(".weight").split(".", 2)
    return f"blk.{number}.{GGUF_NAMES[part]}.weight"

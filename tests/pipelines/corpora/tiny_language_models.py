"""Language models of two blocks with random weights and a word-piece tokenizer, saved as folders."""

import string
from pathlib import Path
from typing import Any

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

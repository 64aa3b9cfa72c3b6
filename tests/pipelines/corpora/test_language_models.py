import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, T5Config

from pipelines.corpora import _language_models as lm
from pipelines.corpora import _model_folders as folders
from pipelines.errors import Refused
from tests.pipelines.corpora import tiny_language_models as tiny

TEXTS = ["the cat sat on the mat.", "good", "bad bad films and dogs, and the cats sat", "a dog"]


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "bert")


def alone(folder: Path, texts: list[str]) -> Iterator[tuple[list[int], tuple[torch.Tensor, ...], torch.nn.Module]]:
    """Each text by itself through transformers' own output_hidden_states: no batch, no padding."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        yield ids, tuple(state[0] for state in states), model


def test_layer_is_the_stream_after_that_block(folder: Path):
    opened = lm.open_model(str(folder))
    assert opened.shape == lm.shape_of(str(folder)) == lm.ModelShape(2, tiny.WIDTH, tiny.WINDOW)
    sequences = opened.tokenizer(TEXTS)["input_ids"]
    batch = opened.hidden_states(sequences, [2, 0, 1])
    for row, (ids, states, model) in enumerate(alone(folder, TEXTS)):
        last, embeddings, first = (state[row, : len(ids)] for state in batch)
        torch.testing.assert_close(embeddings, states[0])
        torch.testing.assert_close(first, states[1])
        # Only where the model normalises once more at its end does transformers give another last layer.
        norm = getattr(model, "ln_f", getattr(model, "norm", None))
        torch.testing.assert_close(last if norm is None else norm(last.clone()).detach(), states[2])
        assert norm is None or not torch.allclose(last, states[2])


def test_one_layer_and_the_same_layer_twice(folder: Path):
    opened = lm.open_model(str(folder))
    sequences = opened.tokenizer(TEXTS)["input_ids"]
    all_layers = opened.hidden_states(sequences, [0, 1, 2])
    for layer, expected in enumerate(all_layers):
        one, same = opened.hidden_states(sequences, [layer, layer])
        assert torch.equal(one, expected)
        assert torch.equal(same, expected)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in opened.blocks)


def test_blocks_above_the_deepest_layer_are_not_computed(bert: Path):
    opened = lm.open_model(str(bert))
    opened.blocks[1].forward = None
    opened.hidden_states([[2, 5, 3]], [0, 1])
    with pytest.raises(TypeError):
        opened.hidden_states([[2, 5, 3]], [2])


def test_one_thread_computes_whatever_the_process_was_told(bert: Path, monkeypatch: pytest.MonkeyPatch):
    opened = lm.open_model(str(bert))
    seen: list[int] = []
    opened.blocks[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        opened.hidden_states([[2, 5, 3]], [1])
        assert (seen, torch.get_num_threads()) == ([1], before + 1)
    finally:
        torch.set_num_threads(before)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 100))
def test_batches_hold_every_sequence_once_and_keep_to_their_tokens(lengths: list[int], batch_tokens: int):
    batches = list(lm.batched(lengths, batch_tokens))
    placed = [place for batch in batches for place in batch]
    assert sorted(placed) == [place for place, length in enumerate(lengths) if length]
    sizes = [[lengths[place] for place in batch] for batch in batches]
    assert [lengths[place] for place in placed] == sorted(length for length in lengths if length)
    assert all(len(size) == 1 or len(size) * max(size) <= batch_tokens for size in sizes)
    # None is cut off early: the next sequence would not have fitted.
    assert all((len(size) + 1) * later[0] > batch_tokens for size, later in pairwise(sizes))


def test_an_embedding_is_the_mean_over_all_tokens(folder: Path):
    opened = lm.open_model(str(folder))
    found = opened.embed(TEXTS, batch_tokens=20)
    assert found.dtype == np.float32
    model = AutoModel.from_pretrained(folder).eval()
    for row, (ids, _, _) in zip(found, alone(folder, TEXTS), strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    unit = opened.embed(TEXTS, normalise=True)
    np.testing.assert_allclose(unit, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-5)
    assert opened.embed([]).shape == (0, tiny.WIDTH)


def test_a_text_without_tokens_is_zeros_and_a_long_one_is_cut(folder: Path):
    opened = lm.open_model(str(folder))
    empty, long = opened.embed(["", "cat " * 100])
    if not opened.tokenizer("")["input_ids"]:
        assert not empty.any()
    assert np.isfinite(long).all()


def sentence_files(folder: Path, *, mean: bool = True, window: int = 5) -> None:
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": not mean, "pooling_mode_mean_tokens": mean, "word_embedding_dimension": 16}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"idx": n, "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": window}))


def test_files_of_a_sentence_model_are_obeyed(bert: Path):
    plain = lm.open_model(str(bert)).embed(["the cat sat on the mat", "the cat sat"], normalise=True)
    sentence_files(bert)
    assert lm.sentence_form(bert) == lm.SentenceForm(5, True)
    cut, short = lm.open_model(str(bert)).embed(["the cat sat on the mat", "the cat sat"])
    # Five tokens with [CLS] and [SEP]: three words.
    np.testing.assert_allclose(cut, short, atol=1e-6)
    np.testing.assert_allclose(short, plain[1], atol=1e-6)
    assert not np.allclose(cut, plain[0])


def test_another_pooling_is_refused(bert: Path):
    sentence_files(bert, mean=False)
    with pytest.raises(Refused, match="pools by pooling_mode_cls_token"):
        lm.open_model(str(bert)).embed(["cat"])


def test_pickled_weights_are_refused_and_never_opened(bert: Path):
    (bert / "model.safetensors").unlink()
    with pytest.raises(Refused, match="no weights"):
        lm.shape_of(str(bert))
    (bert / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(Refused, match=r"only as pytorch_model\.bin.*may run code"):
        lm.shape_of(str(bert))


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_missing_file_is_named(bert: Path, name: str):
    (bert / name).unlink()
    with pytest.raises(Refused, match=rf"has no (tokenizer|{name})"):
        lm.shape_of(str(bert))


def test_code_beside_a_model_is_never_run(bert: Path):
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "own.py").write_text(f"open({str(bert / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(Refused, match="transformers cannot load"):
        lm.shape_of(str(bert))
    assert not (bert / "ran").exists()


def test_weights_that_lack_a_block_are_refused(bert: Path):
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(Refused, match=r"lack \d+ parts of the model, first 'encoder\.layer\.2"):
        lm.open_model(str(bert))


def test_a_cut_off_weight_file_is_refused(bert: Path):
    whole = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match="transformers cannot load"):
        lm.open_model(str(bert))


def test_an_encoder_decoder_is_refused(bert: Path):
    T5Config(d_model=16, num_layers=2, num_heads=2).save_pretrained(bert)
    with pytest.raises(Refused, match=r"encoder-decoder \(t5\)"):
        lm.shape_of(str(bert))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "~nobody/model", "s3://bucket/model"])
def test_what_is_neither_folder_nor_hub_name_is_refused(name: str):
    with pytest.raises(Refused, match=r"does not exist|is a URI"):
        folders.find(name)


def test_a_hub_name_without_network_or_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Refused, match="is no folder here, and the Hugging Face hub did not give it"):
        folders.find("no-one/no-model")


def test_a_revision_belongs_to_a_hub_name(bert: Path):
    with pytest.raises(Refused, match="revision=main was given"):
        folders.find(str(bert), revision="main")


def test_gguf_files_are_asked_for_by_name(bert: Path):
    (bert / "model.safetensors").unlink()
    (bert / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(Refused, match=r"gguf_file=small\.gguf"):
        folders.find(str(bert))
    with pytest.raises(Refused, match=r"GGUF files there: small\.gguf"):
        folders.find(str(bert), "other.gguf")
    assert folders.find(str(bert), "small.gguf") == bert


def test_a_gguf_file_gives_the_states_of_the_same_weights(tmp_path: Path):
    pytest.importorskip("accelerate", reason="transformers needs it for GGUF")
    llama = tiny.save(tmp_path / "llama", "llama")
    (tmp_path / "gguf").mkdir()
    tiny.save_gguf(tmp_path / "gguf/tiny.gguf", llama)
    where = str(tmp_path / "gguf"), "tiny.gguf"
    assert lm.shape_of(*where) == lm.shape_of(str(llama))
    opened = lm.open_model(*where)
    found = opened.hidden_states([[5, 6, 7, 9], [4, 5]], [0, 1, 2])
    expected = lm.open_model(str(llama)).hidden_states([[5, 6, 7, 9], [4, 5]], [0, 1, 2])
    for layer, other in zip(found, expected, strict=True):
        torch.testing.assert_close(layer[:, :2], other[:, :2])
    assert opened.tokenizer.tokenize("ab#") == ["ab", "#"]


def test_a_gguf_file_that_is_none_or_cut_off_is_refused(tmp_path: Path):
    tiny.save_gguf(tmp_path / "whole.gguf", tiny.save(tmp_path / "llama", "llama"))
    whole = (tmp_path / "whole.gguf").read_bytes()
    for name, data in {"none": b"not a GGUF file at all", "empty": b"", "cut": whole[: len(whole) // 3]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(Refused, match="transformers cannot load"):
            lm.shape_of(str(tmp_path), f"{name}.gguf")


def test_a_panic_of_the_tokenizer_is_a_refusal(bert: Path):
    """Its Rust code panics on some damaged files, with an exception that `except Exception` lets pass."""
    tokenizer = json.loads((bert / "tokenizer.json").read_text())
    broken = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    (bert / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": broken}))
    with pytest.raises(Refused, match="transformers cannot load"):
        lm.shape_of(str(bert))


def test_a_model_is_told_from_another_of_the_same_form(tmp_path: Path):
    first, other = tiny.save(tmp_path / "a", seed=0), tiny.save(tmp_path / "b", seed=1)
    shutil.copytree(first, tmp_path / "c")
    assert folders.fingerprint(first) == folders.fingerprint(tmp_path / "c") != folders.fingerprint(other)
    assert len({len((path / "model.safetensors").read_bytes()) for path in (first, other)}) == 1


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(Refused, match=r"pip install 'vqray\[activations\]'"):
        folders.transformers()

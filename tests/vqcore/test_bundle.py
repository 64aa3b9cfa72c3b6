"""Bundles: what is written is read back, and whatever was changed since is refused by name."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vqcore import bundle
from vqcore.bundle import BundleError, read_bundle, read_card, write_bundle

CARD = {"recipe": "plain_vq", "settings": {"lr": 1e-3, "shape": (4, 8)}, "num_codes": 8, "metrics": {"mse": 0.1}}


def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "codebook.vectors": torch.randn(8, 4, generator=made),
        "counts": torch.rand(8, generator=made, dtype=torch.float64),
        "steps": torch.tensor(7),
        "half": torch.randn(3, generator=made).to(torch.bfloat16),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", tensors(), CARD)
    return tmp_path / "bundle"


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    digest = write_bundle(tmp_path / "b", tensors(), CARD)
    read = read_bundle(tmp_path / "b")
    assert read.digest == digest == read_card(tmp_path / "b")["digest"]
    assert read.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
    assert read.card["settings"] == {"lr": 1e-3, "shape": [4, 8]}
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["card.json", "model.safetensors"]


def test_digest_is_sha256_of_canonical_json_and_covers_the_weights(written: Path) -> None:
    card = json.loads((written / "card.json").read_text())
    digest = card.pop("digest")
    canonical = json.dumps(card, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == sha256(canonical.encode())
    assert card["files"]["model.safetensors"]["sha256"] == sha256((written / "model.safetensors").read_bytes())


def test_same_content_has_one_digest_wherever_and_in_whatever_order(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "here", tensors(), CARD)
    backwards = dict(reversed(CARD.items()))
    second = write_bundle(tmp_path / "far" / "away", dict(reversed(tensors().items())), backwards)
    assert first == second
    assert (tmp_path / "here/card.json").read_bytes() == (tmp_path / "far/away/card.json").read_bytes()


def test_another_weight_is_another_digest(tmp_path: Path) -> None:
    changed = tensors()
    changed["counts"][3] += 1e-12
    assert write_bundle(tmp_path / "a", tensors(), CARD) != write_bundle(tmp_path / "b", changed, CARD)


def test_writing_the_same_again_is_a_no_op_and_another_is_refused(written: Path) -> None:
    before = (written / "card.json").stat().st_mtime_ns
    assert write_bundle(written, tensors(), CARD) == read_card(written)["digest"]
    assert (written / "card.json").stat().st_mtime_ns == before
    with pytest.raises(BundleError, match="already holds the finished bundle"):
        write_bundle(written, tensors(), CARD | {"seed": 1})


def test_tied_and_strided_tensors_are_stored(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_bundle(tmp_path, {"a": base, "b": base, "t": base.T, "row": base[1]}, {})
    read = read_bundle(tmp_path).tensors
    assert torch.equal(read["b"], base)
    assert torch.equal(read["t"], base.T)
    assert torch.equal(read["row"], base[1])


@pytest.mark.parametrize("position", [10, -1])
def test_a_flipped_byte_in_the_weights_is_named(written: Path, position: int) -> None:
    data = bytearray((written / "model.safetensors").read_bytes())
    data[position] ^= 1
    (written / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.safetensors does not match its card"):
        read_bundle(written)


def test_missing_weights_are_named(written: Path) -> None:
    (written / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors is missing"):
        read_bundle(written)


@pytest.mark.parametrize("name", ["model.pkl", ".hidden.pt", "deeper/code.py"])
def test_a_planted_file_is_refused_and_named(written: Path, name: str) -> None:
    planted = written / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(BundleError, match=name):
        read_bundle(written)


def test_a_pickle_under_the_weights_name_is_never_loaded(tmp_path: Path) -> None:
    """Even when its forged card matches it: safetensors is the only parser."""
    flag = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (flag,)

    write_bundle(tmp_path / "b", tensors(), CARD)
    data = pickle.dumps(Trap())
    forge(tmp_path / "b", {"files": {"model.safetensors": {"sha256": sha256(data), "bytes": len(data)}}})
    (tmp_path / "b" / "model.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match="not a safetensors file"):
        read_bundle(tmp_path / "b")
    assert not flag.exists()


def forge(directory: Path, change: dict[str, object]) -> None:
    """Edit a card and give it a digest that fits, as an attacker or another version would."""
    card = json.loads((directory / "card.json").read_text()) | change
    card["digest"] = bundle.card_digest(card)
    (directory / "card.json").write_text(json.dumps(card))


def test_an_edited_card_is_refused(written: Path) -> None:
    text = (written / "card.json").read_text()
    (written / "card.json").write_text(text.replace('"num_codes": 8', '"num_codes": 9'))
    with pytest.raises(BundleError, match="changed after it was written"):
        read_card(written)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_an_unknown_version_is_refused_before_anything_else(written: Path, version: object) -> None:
    forge(written, {"version": version})
    with pytest.raises(BundleError, match=r"this vqray reads version 1"):
        read_bundle(written)


@pytest.mark.parametrize("files", [{}, {"../model.safetensors": {}}, {"model.safetensors": 1}, ["model.safetensors"]])
def test_a_forged_file_list_is_refused(written: Path, files: object) -> None:
    forge(written, {"files": files})
    with pytest.raises(BundleError, match="has the one file"):
        read_bundle(written)


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"format": "other"}', '{"format": NaN}', "\x00", "[" * 100_000])
def test_what_is_no_card_is_refused(written: Path, text: str) -> None:
    (written / "card.json").write_text(text)
    with pytest.raises(BundleError):
        read_card(written)


def test_no_directory_and_an_empty_one_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"not a finished bundle.*no such directory"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"not a finished bundle.*empty"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("victim", ["model.safetensors", "card.json"])
def test_an_interrupted_write_leaves_no_bundle_and_the_next_write_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Stopped after the temporary file of `victim`, before its rename; nothing cleans up, as after a kill."""
    rename = bundle.os.replace

    def die(source: Path, target: Path) -> None:
        if target.name == victim:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(bundle.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            write_bundle(tmp_path, tensors(), CARD)
    assert (tmp_path / f"{victim}.partial").exists()
    with pytest.raises(BundleError, match="not a finished bundle"):
        read_bundle(tmp_path)
    digest = write_bundle(tmp_path, {"x": torch.ones(3)}, {})
    assert read_bundle(tmp_path).digest == digest


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"digest": "x"}, "may not set 'digest'"),
        ({"mse": float("nan")}, "JSON cannot hold"),
        ({"settings": {"x": torch.ones(1)}}, "JSON cannot hold"),
        (
            {"settings": {"shards": ["/home/someone/shards"]}},
            r"card\['settings'\]\['shards'\]\[0\] is the absolute path",
        ),
        ({"source": "file:///data/x"}, "absolute path"),
    ],
)
def test_a_card_that_could_not_be_the_same_everywhere_is_refused(tmp_path: Path, card: dict, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "b", tensors(), card)
    assert not (tmp_path / "b").exists()


def test_text_that_merely_looks_like_a_path_is_kept(tmp_path: Path) -> None:
    write_bundle(tmp_path, {}, {"smiles": "/C=C/Cl", "ratio": "a/b", "split": "/", "uri": "s3://bucket/x"})
    assert read_card(tmp_path)["smiles"] == "/C=C/Cl"


def test_a_directory_with_foreign_files_is_refused_before_writing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"notes\.txt"):
        write_bundle(tmp_path, tensors(), CARD)
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_are_written_before_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    replace = bundle.os.replace
    monkeypatch.setattr(bundle.os, "replace", lambda a, b: (written.append(Path(b).name), replace(a, b)))
    write_bundle(tmp_path, tensors(), CARD)
    assert written == ["model.safetensors", "card.json"]


def test_a_plain_safetensors_directory_is_not_a_bundle(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match="not a finished bundle"):
        read_bundle(tmp_path)

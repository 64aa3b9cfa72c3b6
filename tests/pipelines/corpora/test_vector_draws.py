"""Samples of a generator: each a function of (weights, seed, number), of the layer that is set, whoever draws it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.corpora import vectors
from pipelines.corpora.vectors import VectorSettings
from pipelines.errors import Refused
from tests.pipelines.corpora.vector_rows import read
from vqcore import noise
from vqcore.networks.dcgan import DCGANGenerator
from vqcore.networks.mapping import MappingNetwork

LATENT, WIDTHS = 5, (6, 4)
DRAW: dict[str, Any] = {"generator": "dcgan", "samples": 150}


@pytest.fixture
def network() -> DCGANGenerator:
    torch.manual_seed(0)
    made = DCGANGenerator(LATENT, WIDTHS, 3).eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made


@pytest.fixture
def weights(network: DCGANGenerator, tmp_path: Path) -> Path:
    path = tmp_path / "weights.tar"
    torch.save(
        {"epoch": 3, "netG_state_dict": network.state_dict(), "netD_state_dict": {"main.0.w": torch.ones(1)}}, path
    )
    return path


def z_of(samples: int, seed: int = 0, latent: int = LATENT) -> torch.Tensor:
    return noise.normal(seed, 0, torch.arange(samples), draws=latent).float()


def test_rows_are_the_pooled_first_maps(weights: Path, network: DCGANGenerator) -> None:
    found = read(weights, **DRAW)
    with torch.no_grad():
        expected = network.features(z_of(150), 1).mean((2, 3))
    assert np.allclose(found.values, expected.numpy(), atol=1e-6)
    assert found.settings.dim == 6
    assert found.labels == [-1] * 150
    assert len({row.group for row in found.rows}) == 150
    assert found.survey.context["layer"] == 1
    assert len(found.survey.context["weights"]) == 64


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_any_layer_position_by_position(layer: int, weights: Path, network: DCGANGenerator) -> None:
    with torch.no_grad():
        maps = network.features(z_of(150), layer).flatten(2).transpose(1, 2).numpy()
    found = read(weights, layer=layer, pool="positions", **DRAW)
    assert np.allclose(found.values, maps.reshape(-1, maps.shape[2]), atol=1e-6)
    assert len({row.group for row in found.rows}) == 150
    assert np.allclose(read(weights, layer=layer, pool="positions", rows="samples", **DRAW).values, maps, atol=1e-6)
    assert np.allclose(read(weights, layer=layer, pool="positions", position=3, **DRAW).values, maps[:, 3], atol=1e-6)


def test_slices_limits_and_more_samples_change_no_bit(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(weights, **DRAW)
    monkeypatch.setattr("pipelines.corpora._vector_draws.SLICE_SAMPLES", 64)
    cut = read(weights, **DRAW)
    assert len(cut.survey.slices) == 3
    assert np.array_equal(cut.values, whole.values)
    some = read(weights, wanted=lambda unit: unit == 7, **DRAW)
    assert np.array_equal(some.values, whole.values[[7, 71, 135]])
    more = read(weights, generator="dcgan", samples=170)
    assert np.array_equal(more.values[:150], whole.values)
    other = read(weights, seed=1, **DRAW)
    assert not np.isclose(other.values, whole.values).all(1).any()


def test_stored_types(weights: Path) -> None:
    whole = torch.from_numpy(read(weights, **DRAW).values)
    found = read(weights, dtype="bfloat16", **DRAW)
    seen = vectors.tensors({"vector": found.values, "label": np.zeros(150, np.int32)}, found.settings)
    assert torch.equal(seen["vector"], whole.bfloat16())


@pytest.mark.parametrize("names", ["nvidia", "rosinality"])
def test_w_of_a_mapping_network_under_the_names_of_both_codes(names: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MappingNetwork((5, 6, 7))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    if names == "nvidia":
        held = {f"mapping.{name}": value for name, value in state.items()} | {"mapping.w_avg": torch.zeros(7)}
        held["synthesis.b4.conv1.weight"] = torch.zeros(2)
        safetensors.torch.save_file(held, tmp_path / "g.safetensors")
    else:
        renamed = {f"style.{int(name[2]) + 1}{name[3:]}": value for name, value in state.items()}
        torch.save({"g_ema": renamed, "latent_avg": torch.zeros(7)}, tmp_path / "g.pt")
    [path] = tmp_path.iterdir()
    found = read(path, generator="stylegan2_mapping", samples=20)
    with torch.no_grad():
        assert np.allclose(found.values, network(z_of(20)).numpy(), atol=1e-6)
        first = read(path, generator="stylegan2_mapping", samples=20, layer=1).values
        assert np.allclose(first, network.features(z_of(20), 1).numpy(), atol=1e-6)


def test_of_several_networks_in_a_file_one_is_named(tmp_path: Path) -> None:
    networks = {name: MappingNetwork((3, 4)).state_dict() for name in ("G", "G_ema")}
    torch.save(
        {name: {f"mapping.{key}": value for key, value in state.items()} for name, state in networks.items()},
        tmp_path / "g.pt",
    )
    chosen: dict[str, Any] = {"generator": "stylegan2_mapping", "samples": 4}
    with pytest.raises(Refused, match=r"2 networks \(G\.mapping\., G_ema\.mapping\.\); set key="):
        read(tmp_path / "g.pt", **chosen)
    assert read(tmp_path / "g.pt", key="G_ema.", **chosen).values.shape == (4, 4)


def test_what_is_no_such_network_is_refused_before_work(weights: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"generator": "stylegan2_mapping", "samples": 4}
    with pytest.raises(Refused, match=r"weights\.tar holds no such network: .* looks for one fc0\.weight or style"):
        read(weights, **chosen)
    with pytest.raises(Refused, match="layer=9 was given, but this dcgan has layers 1 to 3"):
        read(weights, layer=9, **DRAW)
    with pytest.raises(Refused, match="position=1 was given; layer 1 has 1 positions"):
        read(weights, position=1, **DRAW)
    with pytest.raises(Refused, match="gives vectors of 6, but 7 was asked for"):
        read(weights, dim=7, **DRAW)
    (tmp_path / "other").mkdir()
    with pytest.raises(Refused, match=r"takes one file of weights as its source .* 0 files were given"):
        read(tmp_path / "other", **DRAW)
    (tmp_path / "noise.pt").write_bytes(b"\0" * 100)
    with pytest.raises(Refused, match="cannot be read as weights"):
        read(tmp_path / "noise.pt", **DRAW)
    torch.save(
        {"main.0.weight": torch.zeros(5, 6, 4, 4), "main.3.weight": torch.zeros(6, 3, 4, 4)}, tmp_path / "half.pt"
    )
    with pytest.raises(Refused, match=r"does not hold the weights of generator=dcgan: it lacks main\.1\.weight"):
        read(tmp_path / "half.pt", **DRAW)
    labelled = {"fc0.weight": torch.zeros(4, 8), "fc0.bias": torch.zeros(4), "embed.weight": torch.zeros(4, 2)}
    torch.save(labelled, tmp_path / "conditional.pt")
    with pytest.raises(Refused, match="with class labels"):
        read(tmp_path / "conditional.pt", **chosen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(weights: Path) -> None:
    with pytest.raises(Refused, match="no CUDA device"):
        read(weights, device="cuda", **DRAW)
    assert [vectors.gpus(VectorSettings(device=device, **DRAW)) for device in ("cpu", "cuda")] == [0, 1]


def test_weights_are_loaded_once_a_process(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.corpora._vector_draws.SLICE_SAMPLES", 64)
    settings = VectorSettings(**DRAW)
    survey = vectors.survey([str(weights)], settings)
    loads = []
    monkeypatch.setattr(
        torch, "load", lambda *args, load=torch.load, **kwargs: loads.append(1) or load(*args, **kwargs)
    )
    networks = vectors.setup(settings)
    for piece in survey.slices:
        assert len(list(vectors.read(piece, survey.context, settings, lambda unit: True, networks))) > 0
    assert loads == [1]

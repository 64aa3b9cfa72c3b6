"""Decoded backbones against the true ones, and the controls."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.recipes import _rebuilding as rebuilding
from pipelines.recipes._protein_tokens import ProteinTokens
from pipelines.shards import ShardReader
from tests.pipelines.protein_shards import backbone_of, complexes, make_protein_shards


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> ShardReader:
    return ShardReader(make_protein_shards(tmp_path_factory.mktemp("shards"), complexes(8)))


def turned(x: torch.Tensor) -> torch.Tensor:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    return x @ (turn * torch.linalg.det(turn)) + 5.0


def tokens(noise: float = 0.0) -> ProteinTokens:
    """Latents are the true coordinates; codes say nothing but that a residue is there."""
    drawn = torch.Generator().manual_seed(0)

    def rebuilt(vectors, mask):
        found = turned(vectors.view(*mask.shape, 3, 3))
        return found + noise * torch.randn(found.shape, generator=drawn)

    return ProteinTokens(
        torch.zeros(2, 9), lambda batch: batch.columns["residue_mask"].long() - 1, "",
        lambda batch: batch.columns["backbone"][:, :, :3].flatten(2), rebuilt,
    )  # fmt: skip


def test_what_is_rebuilt_but_for_a_motion_is_perfect_and_a_point_is_not(reader):
    found = rebuilding.reconstruction(reader, "test", tokens())
    assert found["unquantized"]["rmsd"] < 1e-4
    assert found["unquantized"]["lddt"] == 1.0
    rows = [row["backbone"][:, :3].reshape(-1, 3) for split, row in complexes(8) if split == "test"]
    # All atoms in one point: the RMSD is the spread about the centre.
    spread = np.mean([np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) for x in rows])
    assert found["codes"]["rmsd"] == pytest.approx(spread, rel=1e-5)
    assert found["codes"]["chains"] == len(rows)
    assert found["mean structure"]["rmsd"] > 1


@pytest.mark.parametrize("atoms", [slice(0, 4), slice(1, 2)])
def test_residues_that_make_no_frame_are_in_no_mean_and_no_score(reader, tmp_path, atoms):
    """As one that a program could not place, and wrote far away."""
    rows = complexes(8)
    first = next(number for number, (split, _) in enumerate(rows) if split == "train")
    for number in (first, next(number for number, (split, _) in enumerate(rows) if split == "test")):
        rows[number][1]["backbone"][3, atoms] = 9000.0
    broken = ShardReader(make_protein_shards(tmp_path, rows))
    whole, found = rebuilding.mean_backbone(reader), rebuilding.mean_backbone(broken)
    assert found.shape == whole.shape
    assert float((found - whole).abs().max()) < 30
    scores = rebuilding.reconstruction(broken, "test", tokens())
    assert scores["unquantized"]["rmsd"] < 1e-4
    assert scores["mean structure"]["rmsd"] < 30


def test_noise_costs_about_what_it_is(reader):
    found = rebuilding.reconstruction(reader, "test", tokens(noise=0.5))["unquantized"]
    assert found["rmsd"] == pytest.approx(0.5 * 3**0.5, rel=0.1)
    assert 0.5 < found["lddt"] < 1


def test_what_is_decoded_of_a_residue_without_a_code_does_not_count(reader):
    given = tokens()

    def codes(batch):
        found = given.codes(batch)
        found[:, [3, 7]] = -1
        return found

    def rebuilt(vectors, mask):
        return torch.where(mask[..., None, None], given.rebuilt(vectors, mask), 99.0)

    found = rebuilding.reconstruction(reader, "test", replace(given, codes=codes, rebuilt=rebuilt))["unquantized"]
    assert found["rmsd"] < 1e-4
    assert found["lddt"] == 1.0


def test_tokens_that_cannot_be_decoded_have_no_reconstruction(reader):
    assert rebuilding.reconstruction(reader, "test", ProteinTokens(torch.zeros(2, 9), lambda batch: batch, "")) is None


def test_what_is_not_finite_is_counted(reader):
    given = tokens()
    broken = ProteinTokens(
        given.vectors, given.codes, "", None, lambda v, mask: torch.full((*mask.shape, 3, 3), torch.nan)
    )
    found = rebuilding.reconstruction(reader, "test", broken)["codes"]
    assert (found["chains"], found["not_finite"], found["rmsd"]) == (0, 4, None)


def test_a_frame_does_not_depend_on_how_a_chain_lies():
    backbone = torch.from_numpy(backbone_of(np.random.default_rng(0), 12)[None, :, :3])
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 0] = False
    framed = rebuilding.in_first_frame(backbone, mask)
    assert torch.allclose(rebuilding.in_first_frame(turned(backbone.float()).double(), mask), framed, atol=1e-4)
    nitrogen, alpha, carbon = framed[0, 1]
    assert torch.allclose(alpha, torch.zeros(3).double())
    assert torch.allclose(carbon[1:], torch.zeros(2).double(), atol=1e-9)
    assert float(carbon[0]) > 0
    assert float(nitrogen[1]) > 0
    assert abs(float(nitrogen[2])) < 1e-9


def test_the_mean_structure_is_of_the_train_chains_by_position(reader):
    chains = [torch.from_numpy(row["backbone"][:, :3]).double() for split, row in complexes(8) if split == "train"]
    framed = [rebuilding.in_first_frame(x[None], torch.ones(1, len(x), dtype=torch.bool))[0] for x in chains]
    longest = max(map(len, framed))
    expected = torch.stack(
        [torch.stack([x[place] for x in framed if len(x) > place]).mean(0) for place in range(longest)]
    )
    found = rebuilding.mean_backbone(reader)
    assert torch.allclose(found, expected, atol=1e-4)
    beyond = rebuilding.laid_out(found, torch.zeros(2, longest + 3, 4, 3))
    assert torch.equal(beyond[1, longest + 2], found[-1])


def test_a_decoder_is_shown_no_residue_without_a_code(tmp_path):
    seen: list[torch.Tensor] = []

    def codes(batch):
        given = batch.columns["residue_mask"].long() - 1
        given[:, 3] = -1
        return given

    def decoded(vectors, mask):
        seen.append(mask)
        return vectors.new_zeros(*mask.shape, 3, 3)

    def latents(batch):
        return torch.zeros(*batch.columns["residue_mask"].shape, 2)

    reader = ShardReader(make_protein_shards(tmp_path, complexes(4)))
    rebuilding.reconstruction(reader, "test", ProteinTokens(torch.ones(1, 2), codes, "holes", latents, decoded))
    assert len(seen) == 2
    for mask in seen:
        assert not mask[:, 3].any()
        assert mask[:, [0, 1, 2, 4]].all()

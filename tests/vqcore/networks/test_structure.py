"""The structure encoder and the rotary transformer: what must not change their output, and what must."""

import pytest
import torch
from torch import nn

from tests.vqcore.chains import batch_of, chain, motion, moved
from vqcore import frames
from vqcore.networks import structure
from vqcore.networks.backbone import BackboneHead, PairHead
from vqcore.networks.rotary import RotaryTransformer, turned
from vqcore.networks.structure import StructureEncoder


@pytest.fixture
def encoder() -> StructureEncoder:
    torch.manual_seed(0)
    made = StructureEncoder(24, 8, blocks=2, heads=6, inner=32, neighbours=6).double()
    for block in made.blocks:
        # From zeros both kinds of logits weigh the same in every head.
        nn.init.normal_(block.attention.rotation_weight)
        nn.init.normal_(block.attention.distance_weight)
    return made


def indices(mask):
    return torch.arange(mask.shape[1]).expand(mask.shape)


def test_vectors_do_not_change_with_rotation_and_translation(encoder):
    backbone, mask = batch_of(chain(40, 1), chain(7, 2))
    plain, there = encoder(backbone, mask, indices(mask))
    posed = torch.stack([moved(backbone[0], motion(1, 500.0)), moved(backbone[1], motion(2, 500.0))])
    other, _ = encoder(posed, mask, indices(mask))
    assert torch.equal(there, mask)
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-9)
    assert plain[mask].std(0).min() > 1e-3


def test_the_mirror_image_is_another_structure(encoder):
    backbone, mask = batch_of(chain(40, 1))
    plain, _ = encoder(backbone, mask, indices(mask))
    mirrored, _ = encoder(backbone * torch.tensor([1.0, 1.0, -1.0]).double(), mask, indices(mask))
    assert (plain - mirrored).abs().amax(-1).min() > 1e-4


def test_padding_and_what_it_holds_do_not_matter(encoder):
    alone = chain(12, 3)
    backbone, mask = batch_of(alone, chain(30, 4))
    backbone[~mask] = 1.0
    together, _ = encoder(backbone, mask, indices(mask))
    plain, _ = encoder(alone.unsqueeze(0), torch.ones(1, 12, dtype=torch.bool), torch.arange(12).unsqueeze(0))
    torch.testing.assert_close(together[0, :12], plain[0], rtol=0, atol=1e-12)
    assert (together[0, 12:] == 0).all()


def test_a_residue_without_a_frame_has_no_vector_and_is_no_neighbour(encoder):
    whole, mask = batch_of(chain(20, 5))
    broken, without = whole.clone(), mask.clone()
    broken[0, 9, 2], without[0, 9] = broken[0, 9, 1], False
    found, there = encoder(broken, mask, indices(mask))
    wanted, _ = encoder(whole, without, indices(mask))
    assert there[0].tolist() == [place != 9 for place in range(20)]
    torch.testing.assert_close(found, wanted)


def test_what_comes_in_is_how_far_neighbours_are_along_the_chain(encoder):
    backbone, mask = batch_of(chain(40, 1))
    plain, _ = encoder(backbone, mask, indices(mask))
    near, _ = frames.neighbours(backbone[:, :, frames.ALPHA], mask, encoder.neighbours)
    three_on = (near == indices(mask).unsqueeze(-1) + 3).any(-1)
    assert 5 < int(three_on.sum()) < 35
    with torch.no_grad():
        nn.init.normal_(encoder.offsets.weight[encoder.reach + 3])
    found, _ = encoder(backbone, mask, indices(mask))
    assert torch.equal((found - plain).abs().amax(-1) > 1e-9, three_on)


def test_numbers_count_by_their_differences_up_to_the_reach(encoder):
    backbone, mask = batch_of(chain(40, 1))
    second = (indices(mask) >= 20).long()
    plain, shifted, gap, far, farther = (
        encoder(backbone, mask, indices(mask) + more)[0]
        for more in (0, 100, 5 * second, (encoder.reach + 40) * second, (encoder.reach + 400) * second)
    )
    assert torch.equal(shifted, plain)
    assert torch.equal(far, farther)
    assert (gap[0, 19:21] != plain[0, 19:21]).any(-1).all()
    assert (far[0, 19:21] != gap[0, 19:21]).any(-1).all()


def test_one_residue_and_none(encoder):
    backbone = chain(1, 1).unsqueeze(0)
    one, _ = encoder(backbone, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long))
    assert one.isfinite().all()
    none, there = encoder(backbone, torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long))
    assert not there.any()
    assert (none == 0).all()


def test_pieces_without_a_gradient_give_what_all_at_once_gives(encoder, monkeypatch):
    backbone, mask = batch_of(chain(23, 1), chain(11, 2))
    whole, _ = encoder(backbone, mask, indices(mask))
    monkeypatch.setattr(structure, "RESIDUES_AT_ONCE", 5)
    with torch.no_grad():
        pieces, _ = encoder(backbone, mask, indices(mask))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


def test_what_the_last_block_leaves_out_would_have_changed_nothing(encoder):
    x, valid = torch.randn(5, 6, 24).double(), torch.ones(5, 6, dtype=torch.bool)
    rotation = torch.stack([motion(n)[0] for n in range(30)]).view(5, 6, 3, 3)
    origin = torch.randn(5, 6, 3).double()
    block = encoder.blocks[0]
    torch.testing.assert_close(block(x, rotation, origin, valid, 1), block(x, rotation, origin, valid, 6)[:, :1])


def test_attention_written_out_for_one_head():
    torch.manual_seed(1)
    one = structure.GeometricAttention(4, 1).double()
    nn.init.constant_(one.rotation_weight, 0.3)
    nn.init.constant_(one.distance_weight, -0.2)
    x, origin = torch.randn(1, 3, 4).double(), torch.randn(1, 3, 3).double()
    rotation = torch.stack([motion(n)[0] for n in range(3)]).unsqueeze(0)
    valid = torch.tensor([[True, True, False]])
    seen = one.norm(x[0])
    key, place, value = one.keyed(seen).view(3, 3, 3).unbind(1)
    query, stand = one.queried(seen).view(3, 2, 3).unbind(1)
    wanted = []
    for i in range(3):
        turn = rotation[0, i]
        logits = []
        for j in range(2):
            other = rotation[0, j]
            alike = (turn @ query[i]) @ (other @ key[j])
            apart = (turn @ stand[i] + origin[0, i] - other @ place[j] - origin[0, j]).norm()
            weights = nn.functional.softplus(torch.tensor([0.3, -0.2]).double())
            logits.append((weights[0] * alike - weights[1] * apart) / 3**0.5)
        shares = torch.stack(logits).softmax(0)
        gathered = sum(share * (rotation[0, j] @ value[j]) for j, share in enumerate(shares))
        wanted.append(one.out(turn.T @ gathered))
    torch.testing.assert_close(one(x, rotation, origin, valid, 3)[0], torch.stack(wanted))


def test_memory_of_encoding_grows_no_faster_than_the_chain(encoder):
    """The largest tensor made on the way has a size that does not depend on the length, but for those of one a residue
    and of a block of queries."""
    seen: list[int] = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.numel())
            return out

    most = []
    for length in (600, 2400):
        backbone, mask = batch_of(chain(length, 1))
        seen.clear()
        with torch.no_grad(), Sizes():
            encoder(backbone, mask, indices(mask))
        most.append(max(seen))
    assert most[1] <= 4.1 * most[0]


def test_attention_of_a_rotary_transformer_sees_only_how_far_positions_are_apart():
    query, key = torch.randn(1, 1, 1, 8).double().expand(1, 1, 10, 8), torch.randn(1, 1, 1, 8).double()
    logits = turned(query) @ turned(key.expand(1, 1, 10, 8)).transpose(2, 3)
    for offset in range(-5, 6):
        diagonal = logits[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert logits[0, 0, 0].std() > 1e-2


def test_padding_is_attended_by_none_unless_it_is_only_held_against_it():
    torch.manual_seed(0)
    decoder = RotaryTransformer(16, blocks=2, heads=2, inner=24).double()
    x, mask = torch.randn(2, 9, 16).double(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 5:], mask[1] = False, False
    out = decoder(x, mask)
    torch.testing.assert_close(out[:1, :5], decoder(x[:1, :5], mask[:1, :5]))
    assert out.isfinite().all()
    leaky = decoder(x, mask, mask.double() - 1.0)
    assert (leaky[0, :5] - out[0, :5]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="even parts"):
        RotaryTransformer(12, blocks=1, heads=4, inner=8)


def test_pairs_are_what_their_weights_say():
    torch.manual_seed(0)
    head, x = PairHead(6, 8).double(), torch.randn(2, 5, 6).double()
    distance, direction = head(x)
    assert (distance.shape, direction.shape) == ((2, 5, 5, 64), (2, 5, 5, 96))
    query, key = head.down(x[1, 3])[:4], head.down(x[1, 0])[4:]
    wanted = head.up(head.mixed(torch.cat([query * key, query - key])))
    torch.testing.assert_close(torch.cat([distance[1, 3, 0], direction[1, 3, 0]]), wanted)


def test_a_backbone_has_ideal_bonds_from_the_start():
    torch.manual_seed(0)
    backbone = BackboneHead(6).double()(torch.randn(2, 5, 6).double())
    bonds = (backbone[:, :, 1:] - backbone[:, :, :-1]).norm(dim=-1)
    torch.testing.assert_close(bonds, torch.tensor([1.4606, 1.526]).double().expand(2, 5, 2), rtol=1e-4, atol=0)


def test_what_masked_residues_of_a_short_chain_hold_does_not_matter():
    """Also NaN, where a chain has fewer residues than a neighbourhood."""
    torch.manual_seed(0)
    encoder = StructureEncoder(16, 8, blocks=2, heads=2, inner=16, neighbours=6)
    short, index = chain(4, 0).float().unsqueeze(0), torch.arange(7).unsqueeze(0)
    mask, found = (torch.arange(7) < 4).unsqueeze(0), []
    for filler in (0.0, float("nan")):
        encoder.zero_grad()
        padded = torch.cat([short, torch.full((1, 3, *short.shape[2:]), filler)], 1)
        vectors, there = encoder(padded, mask, index)
        vectors[there].sum().backward()
        found.append([vectors[there].detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert torch.equal(there, mask)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert other.isfinite().all()

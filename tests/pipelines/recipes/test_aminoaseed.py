"""AminoAseed: its dossier's checks of the recipe (those of the quantizer and the networks lie with them)."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import corpora, evaluate, loop, recipe, trained
from pipelines.errors import Failed, Refused
from pipelines.feed import Feed
from pipelines.recipe import Batch, ReportJob, Share
from pipelines.recipes import _structure_windows as windows
from pipelines.recipes import aminoaseed
from pipelines.recipes.aminoaseed import StructureSettings, StructureTokenizer
from pipelines.shards import ShardReader
from tests.contracts import kinds
from tests.pipelines.loops import TINY, run_workers, spec_of, state_of
from tests.pipelines.protein_shards import complexes, make_protein_shards, protein
from tests.vqcore.chains import batch_of, chain, motion, moved
from vqcore import backbone_losses, frames, superposition

NAME = "aminoaseed"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return make_protein_shards(tmp_path_factory.mktemp("proteins"), complexes(20))


def model_of(**changes) -> StructureTokenizer:
    """A small model whose codes are encoder outputs, so that a chain has many."""
    torch.manual_seed(0)
    made = StructureTokenizer(StructureSettings(**{**TINY[NAME], "start": "random", **changes})).eval()
    with torch.no_grad():
        z, mask, _ = made.latents(batch(*(chain(90, seed).float() for seed in range(5))))
        codes = z[mask][:: int(mask.sum()) // made.settings.num_codes][: made.settings.num_codes]
        if made.settings.quantizer == "plain":
            made.quantizer.codebook.set_vectors(codes)
        else:
            made.quantizer.basis.copy_(codes)
            made.quantizer.weight.copy_(torch.eye(6))
            made.quantizer.bias.zero_()
    return made


def batch(*backbones: torch.Tensor, row: int = 0) -> Batch:
    backbone, real = batch_of(*backbones)
    places = torch.arange(backbone.shape[1])
    columns = {
        "backbone": frames.with_oxygen(backbone),
        "atom_mask": real.unsqueeze(-1).expand(*real.shape, 4),
        "residue_mask": real,
        "residues": (places * 5 % 21).expand(real.shape),
        "numbers": places.expand(real.shape),
    }
    rows = len(backbones)
    return Batch(columns, torch.ones(rows, dtype=torch.bool), torch.arange(row, row + rows))


def test_tokens_stay_under_motion_and_padding_and_not_in_the_mirror():
    model = model_of(num_codes=64).double()
    one, other = chain(60, 1), chain(90, 2)
    with torch.no_grad():
        plain = aminoaseed.encode(model, batch(one))
        posed = aminoaseed.encode(model, batch(moved(one, motion(1)), other))
        mirrored = aminoaseed.encode(model, batch(one * torch.tensor([1.0, 1.0, -1.0])))
    assert torch.equal(posed[0, :60], plain[0])
    assert (posed[0, 60:] == -1).all()
    assert len(plain.unique()) > 10
    assert (mirrored != plain).double().mean() > 0.3


def test_in_float32_tokens_stay_but_for_ties():
    model = model_of(num_codes=64)
    chains = [chain(100, seed) for seed in range(20)]
    with torch.no_grad():
        plain = aminoaseed.encode(model, batch(*(one.float() for one in chains)))
        posed = aminoaseed.encode(model, batch(*(moved(one, motion(n)).float() for n, one in enumerate(chains))))
    assert (plain == posed).double().mean() >= 0.995


@torch.no_grad()
def terms_of(model: StructureTokenizer, given: Batch, states: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """The five terms as means, their sums taken a chain at a time, where there is no padding but in the source's."""
    source = model.settings.form == "source"
    logits, edges = model.pairs(states), [2.3125 + 0.3075 * edge for edge in range(63)]
    sums = dict.fromkeys(("distance", "direction", "distance_bins", "direction_bins", "residues"), 0.0)
    pairs = directions = labels = 0
    for row, length in enumerate(mask.sum(1).tolist()):
        one = slice(row, row + 1), slice(0, length)
        true, found, real = given.columns["backbone"][..., :3, :][one], model.backbone(states)[one], mask[one]
        square = one[0], one[1], one[1]
        if source:
            atoms = mask[row : row + 1].repeat(1, 3)
            whole = [x[row : row + 1] for x in (model.backbone(states), given.columns["backbone"][..., :3, :])]
            sums["distance"] += float(backbone_losses.distance_error(*whole, mask[row : row + 1], atoms))
        else:
            sums["distance"] += float(backbone_losses.distance_error(found, true, real))
        sums["direction"] += float(backbone_losses.direction_error(found, true, real))
        used = [edge**2 if source else edge for edge in edges]
        sums["distance_bins"] += float(backbone_losses.distance_entropy(logits[0][square], true, real, used))
        sums["direction_bins"] += float(backbone_losses.direction_entropy(logits[1][square], true, real))
        kinds = given.columns["residues"][row, :length]
        shares = model.residues(states)[row, :length].log_softmax(-1)
        sums["residues"] -= sum(float(shares[place, kind]) for place, kind in enumerate(kinds) if kind < 20)
        pairs += length**2
        # Of six vectors a residue the three over a peptide bond are one fewer each.
        directions += (6 * length - 3) ** 2
        labels += int((kinds < 20).sum())
    counts = {"distance": 9 * pairs, "direction": directions, "distance_bins": pairs, "direction_bins": 6 * pairs}
    return {name: total / {**counts, "residues": labels}[name] for name, total in sums.items()}


@pytest.mark.parametrize("form", ["right", "source"])
def test_the_loss_is_the_five_terms_and_the_quantizers_over_what_is_valid(form):
    model = model_of(quantizer="plain", form=form).train()
    both = batch(chain(14, 1).float(), chain(9, 2).float())
    counted = aminoaseed.counts(model, both)
    found = aminoaseed.train_losses(model, both, Share(1, counted))
    z, mask, _ = model.latents(both)
    chosen = model.quantizer.look_up(model.quantizer.assign(z, mask)).detach()
    squared = (z.detach() - chosen)[mask].square().mean()
    terms = terms_of(model, both, model.states(chosen, mask), mask)
    for name, expected in terms.items():
        assert found.logs[name].item() == pytest.approx(expected, rel=1e-4), name
    expected = sum(terms.values()) + 1.25 * float(squared)
    assert found.groups["model"].item() == pytest.approx(expected, rel=1e-4)
    assert counted["vectors"] == 23
    assert counted["pairs"] == 14**2 + 9**2
    assert counted["labels"] == 23 - 2
    assert found.logs["distance"] < 25
    assert abs(float(found.logs["residues"]) - math.log(20)) < 1.5


def test_the_sources_form_differs_where_there_is_padding_and_the_right_one_does_not():
    short, long = chain(9, 1).float(), chain(20, 2).float()
    for form in ("right", "source"):
        model = model_of(form=form)
        alone, both = batch(short), batch(short, long)
        with torch.no_grad():
            seen = []
            for given in (alone, both):
                z, mask, _ = model.latents(given)
                seen.append(model.states(model.quantizer(z, mask).vectors, mask)[0, :9])
        assert torch.allclose(*seen, atol=1e-4) is (form == "right")


def test_residues_are_apart_by_their_numbers_or_by_their_places():
    plain = batch(chain(40, 1).float())
    numbers = plain.columns["numbers"] + 7 * (plain.columns["numbers"] >= 20)
    gapped = Batch({**plain.columns, "numbers": numbers}, plain.mask, plain.keys)
    for index, alike in (("numbers", False), ("order", True)):
        model = model_of(index=index)
        first, second = (model.latents(given)[0] for given in (plain, gapped))
        assert torch.equal(first, second) is alike


def test_residues_without_an_atom_or_a_frame_have_no_code_and_are_in_no_count():
    model = model_of(crop=None)
    given = batch(chain(30, 1).float(), chain(12, 2).float())
    atoms = given.columns["atom_mask"].clone()
    atoms[0, 5, 0] = atoms[0, 9, 3] = False
    given.columns["atom_mask"] = atoms
    # The C of residue 12 lies on its CA.
    given.columns["backbone"][0, 12, 2] = given.columns["backbone"][0, 12, 1]
    codes, (_, encoded) = aminoaseed.encode(model, given), aminoaseed.target(model, given)
    assert (codes[0] == -1).nonzero().flatten().tolist() == [5, 12]
    assert torch.equal(encoded, codes >= 0)
    counted = aminoaseed.counts(model, given)
    assert counted["vectors"] == 28 + 12
    assert counted["pairs"] == 28**2 + 12**2


def test_the_rate_rises_over_a_twentieth_and_falls_along_a_cosine_to_a_tenth():
    settings = StructureSettings(steps=1000)
    rates = [aminoaseed.schedule(settings, step) for step in range(1000)]
    assert rates[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert rates[50] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))
    assert rates[50 + 190] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 5)))
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)


def test_biases_and_norms_do_not_decay():
    model = model_of()
    made = aminoaseed.optimiser(StructureSettings(weight_decay=0.3), "model", list(model.parameters()))
    decays = {id(one): group["weight_decay"] for group in made.param_groups for one in group["params"]}
    still = {
        id(one) for module in model.modules() if isinstance(module, torch.nn.LayerNorm) for one in module.parameters()
    }
    named = dict(model.named_parameters())
    still |= {id(one) for name, one in named.items() if name.endswith("bias")}
    matrices = {id(one) for name, one in named.items() if name.endswith("weight") and one.dim() == 2}
    assert len(decays) == len(named)
    assert {decays[one] for one in still} == {0.0}
    assert {decays[one] for one in matrices} == {0.3}


def test_codes_from_data_are_drawn_from_as_many_batches_as_they_need():
    torch.manual_seed(0)
    model = StructureTokenizer(StructureSettings(**{**TINY[NAME], "num_codes": 20}))
    some = [batch(chain(6, seed).float(), row=seed) for seed in range(8)]
    assert "of 48 vectors" in aminoaseed.seed(model, iter(some))
    with torch.no_grad():
        outputs = torch.cat([z[mask] for z, mask, _ in map(model.latents, some)])
    apart = (model.quantizer.basis.unsqueeze(1) - outputs).abs().amax(-1)
    assert apart.amin(1).max() < 1e-6
    assert len(model.quantizer.basis.unique(dim=0)) == 20


def test_a_long_chain_is_cut_alike_wherever_its_row_lies():
    model = model_of(crop=16)
    long = chain(70, 3)
    first = aminoaseed.cut(model, batch(long, chain(20, 4)))
    alone = aminoaseed.cut(model, batch(long))
    later = aminoaseed.cut(model, batch(chain(99, 5), long, row=-1))
    assert first.columns["backbone"].shape[1] == 16
    for other in (alone.columns["backbone"][0], later.columns["backbone"][1]):
        assert torch.equal(first.columns["backbone"][0], other)
    starts = set()
    for step in range(40):
        model.quantizer.codebook.step.fill_(step)
        starts.add(int(aminoaseed.cut(model, batch(long)).columns["numbers"][0, 0]))
    assert len(starts) > 15
    assert 0 <= min(starts) < 10
    assert 44 < max(starts) <= 54
    short = aminoaseed.cut(model, batch(long, chain(10, 4)))
    assert short.columns["residue_mask"].sum(1).tolist() == [16, 10]


def test_chains_that_are_too_long_are_refused_if_asked():
    with pytest.raises(Failed, match=r"70 residues.*max_length=32"):
        aminoaseed.cut(model_of(max_length=32, longer="refuse"), batch(chain(70, 1)))
    windows = aminoaseed.cut(model_of(max_length=32, crop=None), batch(chain(70, 1)))
    assert windows.columns["backbone"].shape[1] == 32


class Known(torch.nn.Module):
    """In the place of a decoder's head: each window in a pose of its own, of a chain that is known."""

    def __init__(self, true: torch.Tensor, most: int):
        super().__init__()
        self.true, self.step, self.calls = true, most // 2, 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        start = self.calls * self.step
        self.calls += 1
        return moved(self.true[start : start + states.shape[1]], motion(self.calls)).unsqueeze(0)


@pytest.mark.parametrize("length", [30, 32, 33, 48, 49, 100])
def test_windows_are_laid_over_each_other(length):
    model, true = model_of(max_length=32).double(), chain(length, 1)
    model.backbone = Known(true, 32)
    mask = torch.ones(1, length, dtype=torch.bool)
    found, kinds_ = aminoaseed.rebuilt(model, torch.zeros(1, length, 6).double(), mask)
    assert found.shape == (1, length, 3, 3)
    assert kinds_.shape == (1, length, 20)
    apart = superposition.rmsd(found.flatten(1, 2), true.flatten(0, 1).unsqueeze(0))
    assert apart.item() < 1e-6


def test_windows_are_laid_over_each_other_by_the_residues_that_are_there():
    true, mask, calls = chain(100, 1), torch.ones(1, 100, dtype=torch.bool), iter(range(100))
    mask[0, 18:23] = mask[0, 41] = mask[0, 60:64] = False
    drawn = torch.Generator().manual_seed(0)

    def decoded(vectors, part):
        start, there = 16 * next(calls), part[0][:, None, None]
        found = moved(true[start : start + len(there)], motion(start))
        found = torch.where(there, found, 1000 * torch.randn(found.shape, generator=drawn))
        return found.unsqueeze(0), torch.zeros(1, len(there), 20)

    found, _ = windows.rebuilt(decoded, torch.zeros(1, 100, 6), mask, 32)
    atoms = mask.repeat_interleave(3, 1)
    assert superposition.rmsd(found.flatten(1, 2), true.flatten(0, 1).unsqueeze(0), atoms).item() < 1e-6


def test_likeness_is_of_residues_that_are_there():
    true, mask = batch_of(chain(40, 1), chain(25, 2), chain(30, 3))
    drawn = torch.Generator().manual_seed(0)
    found = moved(true, motion(1)) + torch.randn(true.shape, generator=drawn)
    mask[0, 10:14] = mask[1, 0] = mask[2] = False
    expected = {"rmsd": 0.0, "lddt": 0.0}
    for row in (0, 1):
        one, other = found[row][mask[row]], true[row][mask[row]]
        expected["rmsd"] += float(superposition.rmsd(one.flatten(0, 1)[None], other.flatten(0, 1)[None]))
        expected["lddt"] += float(superposition.lddt(one[None, :, 1], other[None, :, 1]))
    found[~mask], true[~mask] = 99.0, -50.0
    assert {name: float(total) for name, total in windows.likeness(found, true, mask).items()} == pytest.approx(
        expected
    )


@torch.no_grad()
def test_measured_is_what_is_decoded_against_what_is_true():
    model, given = model_of().double(), batch(chain(40, 1), chain(21, 2))
    z, mask, _ = model.latents(given)
    codes = aminoaseed.encode(model, given)
    states = model.states(model.quantizer.look_up(codes), mask)
    likeliest = model.residues(states).argmax(-1)
    third = torch.arange(40) % 3
    # Read off rightly, wrongly, and unknown; padding holds 0, as in shards.
    kinds = torch.where(third == 0, likeliest, torch.where(third == 1, (likeliest + 1) % 20, 20))
    given.columns["residues"] = torch.where(mask, kinds, 0)
    sums = aminoaseed.measure(model, given).sums
    assert (int(sums["chains"]), int(sums["residues"]), int(sums["known"])) == (2, 61, 27 + 14)
    assert int(sums["recovered"]) == 14 + 7
    expected = {"rmsd": 0.0, "rmsd_continuous": 0.0}
    for name, vectors in (("rmsd", states), ("rmsd_continuous", model.states(z, mask))):
        for row, length in enumerate((40, 21)):
            atoms = [
                x[row : row + 1, :length, :3].flatten(1, 2)
                for x in (model.backbone(vectors), given.columns["backbone"])
            ]
            expected[name] += float(superposition.rmsd(*atoms))
    assert expected["rmsd"] != pytest.approx(expected["rmsd_continuous"], rel=1e-3)
    for name, total in expected.items():
        assert float(sums[name]) == pytest.approx(total)
    types = aminoaseed.decode(model, codes)["residues"]
    assert torch.equal(types, torch.where(mask, likeliest, 20))


def test_the_report_decodes_with_the_recipes_own_model(tmp_path):
    drawn = np.random.default_rng(0)
    rows = [(split, protein(f"{split}{n}", drawn, 30)) for split in ("train", "valid") for n in range(2)]
    reader = ShardReader(make_protein_shards(tmp_path / "shards", rows))
    found, model = recipe.load(NAME), model_of()
    opened = trained.Trained(found, model.settings, model, {}, "")
    job = ReportJob(opened, tmp_path, reader, "valid", found.report.Settings(), str(tmp_path / "report"))
    found.report.refuse(job)
    numbers = found.report.write(job)
    measured = evaluate.measure(opened, reader, "valid")
    assert numbers["rmsd_codes"] == pytest.approx(measured["rmsd"])
    assert numbers["lddt_codes"] == pytest.approx(measured["lddt"])
    assert numbers["rmsd_unquantized"] == pytest.approx(measured["rmsd_continuous"])
    assert numbers["rmsd_codes"] != pytest.approx(numbers["rmsd_unquantized"], rel=1e-3)
    assert numbers["usage"] == pytest.approx(measured["usage"])


def test_what_decode_gives_can_be_written_as_files_and_has_a_peptide_for_every_code(tmp_path):
    model = model_of()
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]])
    with torch.no_grad():
        found = aminoaseed.decode(model, codes)
    corpora.load("proteins").write_files(found, ["one", "two"], str(tmp_path), corpora.load("proteins").Settings())
    assert (tmp_path / "two.pdb").read_text().count(" CA ") == 2
    assert (found["backbone"][1, 2:] == 0).all()


QUANTIZERS = ("reparameterized", "plain")
RUN = {"steps": 12, "double": True, "checkpoint_every": 12}


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory) -> Path:
    """Each quantizer trained by two workers."""
    home = tmp_path_factory.mktemp("two")
    run_workers(2, home, {one: spec_of(NAME, shards, home / one, **RUN, quantizer=one) for one in QUANTIZERS})
    return home


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_workers_reach_the_model_of_one(two, shards, tmp_path, quantizer):
    spec = spec_of(NAME, shards, tmp_path, **RUN, quantizer=quantizer)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, lambda _: None)
    first, second = (state_of(two, quantizer, rank, 2) for rank in range(2))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-9, msg=name)
        assert torch.equal(first[name], second[name]), name


def test_training_learns_and_moves_every_code_but_not_the_basis(shards, tmp_path):
    said: list[loop.Event] = []
    changes = {"start": "random", "steps": 60, "learning_rate": 5e-3, "log_every": 15, "checkpoint_every": 60}
    spec = spec_of(NAME, shards, tmp_path / "run", **changes)
    found = recipe.load(NAME)
    settings = found.Settings(**spec.settings)
    torch.manual_seed(0)
    start = StructureTokenizer(settings)
    model, _ = loop.train(spec, Feed(ShardReader(shards)), CPU, said.append)
    first, *_, last = (event["metrics"]["train/distance_bins"] for event in said if event["kind"] == "metrics")
    assert last < 0.95 * first
    assert torch.equal(model.quantizer.basis, start.quantizer.basis)
    moved_by = (model.quantizer.codebook.vectors - start.quantizer.codebook.vectors).norm(dim=1)
    assert float(moved_by.detach().min()) > 1e-3
    metrics = evaluate.measure(trained.Trained(found, settings, model.eval(), {}, ""), ShardReader(shards), "test")
    assert metrics["rows"] == ShardReader(shards).rows("test")
    assert metrics["rmsd"] > 1
    assert 0 < metrics["lddt"] < 1
    assert metrics["active_codes"] == round(metrics["usage"] * 12)


@pytest.mark.parametrize(("quantizer", "start"), [("reparameterized", "random"), ("plain", "data")])
def test_where_codes_come_from_follows_from_the_quantizer_unless_said(quantizer, start):
    for given, wanted in (({}, start), ({"start": "data"}, "data"), ({"start": "random"}, "random")):
        found = aminoaseed.resolve(StructureSettings(quantizer=quantizer, **given), kinds.SHAPES["proteins"])
        assert found.start == wanted
        (stage,) = aminoaseed.stages(found)
        assert (stage.seed is not None) == (wanted == "data")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decoder_width": 30, "decoder_heads": 4}, "multiple of 8"),
        ({"crop": 600}, "crop=600 is more than max_length=512"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_those_that_do(settings, said):
    with pytest.raises(Refused, match=said):
        aminoaseed.resolve(StructureSettings(**settings), kinds.SHAPES["proteins"])


def test_of_nothing_there_is_no_mean():
    """A split whose residues are all unknown has no share of types that were read off rightly."""
    sums = dict.fromkeys(("rmsd", "rmsd_continuous", "lddt", "recovered", "quantization"), torch.tensor(3.0))
    counts = {"chains": torch.tensor(2.0), "residues": torch.tensor(6.0), "known": torch.tensor(0.0)}
    assert aminoaseed.summarise({**sums, **counts}) == {
        "rmsd": 1.5, "rmsd_continuous": 1.5, "lddt": 1.5, "quantization_error": 0.5,
    }  # fmt: skip

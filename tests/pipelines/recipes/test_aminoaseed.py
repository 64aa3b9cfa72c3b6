"""AminoAseed: its dossier's checks of the recipe (those of the quantizer and the networks lie with them)."""

import math
from pathlib import Path

import pytest
import torch

from pipelines import corpora, evaluate, loop, recipe, trained
from pipelines.errors import Failed, Refused
from pipelines.feed import Feed
from pipelines.recipe import Batch, Share
from pipelines.recipes import aminoaseed
from pipelines.recipes.aminoaseed import StructureSettings, StructureTokenizer
from pipelines.shards import ShardReader
from tests.contracts import kinds
from tests.pipelines.loops import TINY, run_workers, spec_of, state_of
from tests.pipelines.protein_shards import complexes, make_protein_shards
from tests.vqcore.chains import batch_of, chain, motion, moved
from vqcore import frames, superposition

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


def test_the_loss_is_the_five_terms_and_the_quantizers_over_what_is_valid():
    model = model_of(quantizer="plain").train()
    both = batch(chain(14, 1).float(), chain(9, 2).float())
    counted = aminoaseed.counts(model, both)
    found = aminoaseed.train_losses(model, both, Share(1, counted))
    z, mask, _ = model.latents(both)
    chosen = model.quantizer.codebook.vectors.detach()[model.quantizer.assign(z, mask)]
    squared = (z.detach() - chosen)[mask].square().mean()
    parts = sum(float(found.logs[name]) for name in ("distance", "direction", "distance_bins", "direction_bins"))
    expected = parts + float(found.logs["residues"]) + 1.25 * float(squared)
    assert found.groups["model"].item() == pytest.approx(expected, rel=1e-5)
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

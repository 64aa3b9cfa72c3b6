"""AminoAseed: protein structure as tokens, one a residue, whose codebook is a learned linear map of a frozen basis.

Paper: Yuan, Wang, Collins, Rangwala, "Protein Structure Tokenization: Benchmarking and New Recipe", ICML 2025,
       arXiv 2503.00089. Of its text the abstract was to be had here: what follows are the authors' code
       (KatarinaYuan/StructTokenBench on GitHub, commit 1e55460) and a third-party summary.
Run:   vqray ingest --corpus proteins --source complexes/ --out shards --set group=folder contacts=contacts.txt
       vqray train --recipe aminoaseed --shards shards --out runs/tokens
       vqray report --bundle runs/tokens --shards shards --out tokens --set pair_suffixes=_u,_b-matched

`--set quantizer=plain` is the paper's VanillaVQ, the same network with a codebook that learns code by code.

What the authors' code does otherwise, and `form=source` does too:
- it lays the mask of the distance loss over the wrong atoms, and takes 1 from the logits of padding instead of leaving
  padding out of attention. Both depend on how long the longest chain of a worker's batch is, so that there two workers
  are not one.
- it compares distances with the squares of bin edges.
Settings where the source gives none, or where it is not followed in either form:
- padding is in no loss and no count; the source averages both codebook losses over it.
- `start`: the basis is drawn from N(0, 1), as the paper is reported to do; the code has `data`, K encoder outputs.
- the six direction products of two residues: aa, bb, nn, ab, an, bn of their unit vectors.
- `code_dim` is the encoder's output too (the source's file has 128 beside 1024, which its own check refuses).
- no pLDDT and PAE heads: no loss teaches them.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipelines.corpora._protein_residues import UNKNOWN
from pipelines.errors import Failed, Refused
from pipelines.recipe import Batch, Losses, Measured, Recipe, Report, ReportJob, Settings, Share, Stage
from pipelines.recipes import _aminoaseed_claims as paper
from pipelines.recipes import _structure_report as structure
from pipelines.recipes import _structure_windows as windows
from pipelines.recipes._protein_tokens import ProteinTokens, tokens_of
from pipelines.trained import Trained
from vqcore import backbone_losses, frames, metrics, noise, seeding
from vqcore.networks.backbone import BackboneHead, PairHead, residue_head
from vqcore.networks.rotary import RotaryTransformer
from vqcore.networks.structure import StructureEncoder
from vqcore.quantizers import ReparameterizedQuantizer, VectorBatch, VectorQuantizer

WARM_UP, FLOOR = 0.05, 0.1
"""Share of the steps in which the rate rises, and of the rate that it ends at."""
LONGEST = 1 << 20
"""Of a chain, for keys."""
USED = ("backbone", "atom_mask", "residue_mask", "residues", "numbers")
"""Columns of a training step."""
SQUARES = tuple(edge**2 for edge in backbone_losses.EDGES)


class StructureSettings(Settings):
    quantizer: Literal["reparameterized", "plain"] = Field(
        "reparameterized", description="plain: VanillaVQ, each code a learned vector of its own"
    )
    num_codes: int = Field(512, ge=2, description="K")
    code_dim: int = Field(1024, ge=1, description="D, of codes and of the encoder's output")
    start: Literal["random", "data"] | None = Field(
        None, description="basis or codes from N(0, 1) or from encoder outputs; default random, of plain data"
    )
    commitment_weight: float = Field(0.25, ge=0)
    form: Literal["right", "source"] = Field("right", description="source: with the mistakes of the authors' code")

    max_length: int = Field(512, ge=16, description="residues that the decoder sees together")
    longer: Literal["window", "refuse"] = Field(
        "window", description="chains of more: cut in training, decoded window by window; refuse: training fails"
    )
    crop: int | None = Field(None, ge=16, description="residues of a chain in a training step; default max_length")
    index: Literal["numbers", "order"] = Field(
        "numbers",
        description="how far residues are from each other along the chain: by the author's numbers (0 between those of"
        " one number, told apart by insertion codes), or by places: order",
    )

    neighbours: int = Field(16, ge=1, description="residues of a neighbourhood, with the middle one")
    encoder_width: int = Field(1024, ge=1)
    encoder_blocks: int = Field(2, ge=1)
    encoder_heads: int = Field(128, ge=1)
    encoder_inner: int = Field(4096, ge=1)
    decoder_width: int = Field(1024, ge=1)
    decoder_blocks: int = Field(8, ge=1)
    decoder_heads: int = Field(16, ge=1)
    decoder_inner: int = Field(2816, ge=1)
    pair_inner: int = Field(128, ge=2, multiple_of=2)

    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0, description="of matrices; biases and norms have none")
    batch_size: int = Field(16, ge=1, description="chains of one global step")
    clip: float | None = Field(1.0, gt=0)
    steps: int = Field(108_530, ge=1)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Two cores: about a tenth of the widths, half of the decoder's depth, shorter cuts of fewer chains.
    # And a basis from data: of one from N(0, 1), 4 % of 512 codes were in use after 400 steps.
    "small": {
        "code_dim": 128,
        "start": "data",
        "crop": 96,
        "encoder_width": 96,
        "encoder_heads": 16,
        "encoder_inner": 192,
        "decoder_width": 128,
        "decoder_blocks": 4,
        "decoder_heads": 4,
        "decoder_inner": 352,
        "pair_inner": 64,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "steps": 1500,
    },
}


def resolve(settings: StructureSettings, columns: dict[str, Any]) -> StructureSettings:
    if settings.decoder_width % (2 * settings.decoder_heads):
        raise Refused(
            f"decoder_heads={settings.decoder_heads} do not cut decoder_width={settings.decoder_width} into even parts;"
            f" give a width that is a multiple of {2 * settings.decoder_heads}."
        )
    if settings.crop is not None and settings.crop > settings.max_length:
        raise Refused(f"crop={settings.crop} is more than max_length={settings.max_length}; the decoder sees no more.")
    start = settings.start or ("random" if settings.quantizer == "reparameterized" else "data")
    return settings.model_copy(update={"start": start})


class StructureTokenizer(nn.Module):
    """Structure encoder, quantizer, rotary transformer, heads."""

    def __init__(self, s: StructureSettings):
        super().__init__()
        self.settings = s
        self.encoder = StructureEncoder(
            s.encoder_width,
            s.code_dim,
            blocks=s.encoder_blocks,
            heads=s.encoder_heads,
            inner=s.encoder_inner,
            neighbours=s.neighbours,
        )
        self.quantizer = _quantizer(s)
        self.inwards = nn.Linear(s.code_dim, s.decoder_width)
        self.decoder = RotaryTransformer(
            s.decoder_width, blocks=s.decoder_blocks, heads=s.decoder_heads, inner=s.decoder_inner
        )
        self.backbone = BackboneHead(s.decoder_width)
        self.pairs = PairHead(s.decoder_width, s.pair_inner)
        self.residues = residue_head(s.decoder_width, UNKNOWN)

    def latents(self, batch: Batch) -> tuple[Float[Tensor, "B L D"], Bool[Tensor, "B L"], Int64[Tensor, "B L"]]:
        """(z_e of every residue that has a frame, which have one, keys)."""
        backbone = batch.columns["backbone"].to(self.inwards.weight.dtype)
        mask = self.there(batch)
        length = backbone.shape[1]
        places = torch.arange(length, device=backbone.device)
        # A key must not depend on how long the longest chain of a batch is.
        keys = batch.keys.unsqueeze(1) * LONGEST + places
        numbers = batch.columns["numbers"].long() if self.settings.index == "numbers" else places.expand_as(mask)
        vectors, mask = self.encoder(backbone, mask, numbers)
        return vectors, mask, keys

    def there(self, batch: Batch) -> Bool[Tensor, "B L"]:
        """Residues with N, CA and C of rows that count."""
        real = batch.columns["residue_mask"] & batch.columns["atom_mask"][..., :3].all(-1)
        return real & batch.mask.unsqueeze(1)

    def states(self, vectors: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L W"]:
        bias = (mask.to(vectors.dtype) - 1.0) if self.settings.form == "source" else None
        out: Tensor = self.decoder(self.inwards(vectors), mask, bias)
        return out


def _quantizer(s: StructureSettings) -> ReparameterizedQuantizer | VectorQuantizer:
    chosen = seeding.random_rows if s.start == "data" else None
    if s.quantizer == "reparameterized":
        return ReparameterizedQuantizer(s.num_codes, s.code_dim, commitment_weight=s.commitment_weight, seeding=chosen)
    return VectorQuantizer(s.num_codes, s.code_dim, decay=None, commitment_weight=s.commitment_weight, seeding=chosen)


def cut(model: StructureTokenizer, batch: Batch) -> Batch:
    """The residues of a training step: of each chain of more than `crop` a stretch drawn by (step, row)."""
    s, real = model.settings, batch.columns["residue_mask"]
    most, longest = s.crop or s.max_length, real.shape[1]
    if s.longer == "refuse" and longest > s.max_length:
        raise Failed(
            f"a chain has {longest} residues, and longer=refuse lets the decoder see max_length={s.max_length}; ingest"
            f" with --set max_length={s.max_length}, or train with longer=window."
        )
    if longest <= most:
        return batch
    spare = (real.sum(1) - most).clamp(min=0)
    drawn = noise.uniform(0, model.quantizer.codebook.step, batch.keys).squeeze(1)
    start = (drawn * (spare + 1)).long().clamp(max=spare)
    places = start.unsqueeze(1) + torch.arange(most, device=start.device)
    rows = torch.arange(len(start), device=start.device).unsqueeze(1)
    columns = {name: batch.columns[name][rows, places.clamp(max=longest - 1)] for name in USED}
    columns["residue_mask"] = columns["residue_mask"] & (places < longest)
    return Batch(columns, batch.mask, batch.keys)


def counts(model: StructureTokenizer, batch: Batch) -> dict[str, int]:
    """Residues, pairs of them, pairs of their directions, and types that are known."""
    seen = cut(model, batch)
    true, mask = target(model, seen)
    known = mask & (seen.columns["residues"] < UNKNOWN)
    found = {"rows": int(batch.mask.sum()), "vectors": int(mask.sum()), "labels": int(known.sum())}
    return {**found, **backbone_losses.pair_counts(true, mask)}


def target(model: StructureTokenizer, batch: Batch) -> tuple[Float[Tensor, "B L 3 3"], Bool[Tensor, "B L"]]:
    """N, CA and C, and the residues that are encoded: those whose atoms make a frame."""
    true = batch.columns["backbone"][..., :3, :].to(model.inwards.weight.dtype)
    return true, model.there(batch) & frames.frames_of(true)[2]


def train_losses(model: StructureTokenizer, batch: Batch, share: Share) -> Losses:
    """The five terms, each a mean over the pairs or residues of the global batch, and the quantizer's loss."""
    seen = cut(model, batch)
    z, mask, keys = model.latents(seen)
    quantized = model.quantizer(z, mask, keys)
    true, _ = target(model, seen)
    states = model.states(quantized.vectors, mask)
    predicted = model.backbone(states)
    distance_logits, direction_logits = model.pairs(states)
    source = model.settings.form == "source"
    terms = {
        "distance": share.mean(
            backbone_losses.distance_error(predicted, true, mask, mask.repeat(1, 3) if source else None) / 9, "pairs"
        ),
        "direction": share.mean(backbone_losses.direction_error(predicted, true, mask), "directions"),
        "distance_bins": share.mean(
            backbone_losses.distance_entropy(distance_logits, true, mask, SQUARES if source else backbone_losses.EDGES),
            "pairs",
        ),
        "direction_bins": share.mean(
            backbone_losses.direction_entropy(direction_logits, true, mask) / backbone_losses.DIRECTION_PAIRS, "pairs"
        ),
        "residues": share.mean(_type_entropy(model, states, seen, mask), "labels"),
    }
    logs = {name: term.detach() for name, term in terms.items()}
    logs["quantization_error"] = share.mean(quantized.squared_error / z.shape[-1], "vectors")
    return Losses({"model": torch.stack(list(terms.values())).sum() + quantized.loss}, logs)


def _type_entropy(model: StructureTokenizer, states: Tensor, batch: Batch, mask: Tensor) -> Float[Tensor, ""]:
    kinds = batch.columns["residues"]
    return backbone_losses.residue_entropy(model.residues(states), kinds, mask & (kinds < UNKNOWN))


def seed(model: StructureTokenizer, batches: Iterable[Batch]) -> str:
    """Only where `start` is data: K encoder outputs."""
    wanted = 2 * seeding.sample_size(model.settings.num_codes, model.settings.code_dim)
    per_batch = 32 * model.settings.batch_size
    some = itertools.islice(batches, math.ceil(wanted / per_batch))
    with torch.no_grad():
        return model.quantizer.seed(VectorBatch(*model.latents(cut(model, batch))) for batch in some)


def optimiser(s: StructureSettings, group: str, parameters: list[nn.Parameter]) -> Optimizer:
    matrices = [p for p in parameters if p.dim() > 1]
    rest = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def schedule(s: StructureSettings, step: int) -> float:
    """A twentieth of the steps up, then half a cosine down to a tenth."""
    rising = max(1, round(WARM_UP * s.steps))
    if step < rising:
        return (step + 1) / rising
    fallen = 0.5 - 0.5 * math.cos(math.pi * (step - rising) / max(1, s.steps - rising))
    return 1.0 - (1.0 - FLOOR) * fallen


def build(settings: StructureSettings, previous: nn.Module | None) -> StructureTokenizer:
    return StructureTokenizer(settings)


def stages(s: StructureSettings) -> tuple[Stage, ...]:
    how: dict[str, Any] = {"counts": counts, "schedule": schedule, "seed": seed if s.start == "data" else None}
    return (Stage("tokens", s.steps, build, train_losses, optimiser, **how),)


def rebuilt(
    model: StructureTokenizer, vectors: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]
) -> tuple[Float[Tensor, "B L 3 3"], Float[Tensor, "B L 20"]]:
    """(N, CA and C, logits of residue types) of code vectors; longer chains window by window."""

    def decoded(vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = model.states(vectors, mask)
        return model.backbone(states), model.residues(states)

    return windows.rebuilt(decoded, vectors, mask, model.settings.max_length)


def encode(model: StructureTokenizer, batch: Batch) -> Int64[Tensor, "B L"]:
    x, mask, _ = model.latents(batch)
    return model.quantizer.assign(x, mask)


def decode(model: StructureTokenizer, codes: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
    """Backbones with an ideal O, and the residue types that the decoder reads off the structure."""
    mask = codes != -1
    backbone, kinds = rebuilt(model, model.quantizer.look_up(codes), mask)
    four = torch.where(mask[..., None, None], frames.with_oxygen(backbone), 0.0)
    types = torch.where(mask, kinds.argmax(-1), UNKNOWN)
    atoms = mask.unsqueeze(-1).expand(*mask.shape, 4)
    return {"backbone": four.float(), "residue_mask": mask, "atom_mask": atoms, "residues": types}


def measure(model: StructureTokenizer, batch: Batch) -> Measured:
    z, mask, _ = model.latents(batch)
    quantized = model.quantizer(z, mask)
    true, _ = target(model, batch)
    kinds = batch.columns["residues"]
    known = mask & (kinds < UNKNOWN)
    found, types = rebuilt(model, quantized.vectors, mask)
    free, _ = rebuilt(model, z, mask)
    return Measured(
        quantized.codes,
        {
            "chains": mask.any(1).sum(),
            "residues": mask.sum(),
            "known": known.sum(),
            **windows.likeness(found, true, mask),
            "rmsd_continuous": windows.likeness(free, true, mask)["rmsd"],
            "recovered": ((types.argmax(-1) == kinds) & known).sum(),
            "quantization": quantized.squared_error / z.shape[-1],
        },
    )


def summarise(sums: dict[str, Tensor]) -> dict[str, float]:
    """`rmsd` of N, CA and C after superposition, in Angstrom, and `lddt` of CA, means over chains; the same of vectors
    that were not quantized; `recovery`, the share of residue types read off rightly. Of nothing there is no mean."""
    ratios = {
        "rmsd": ("rmsd", "chains"),
        "rmsd_continuous": ("rmsd_continuous", "chains"),
        "lddt": ("lddt", "chains"),
        "recovery": ("recovered", "known"),
        "quantization_error": ("quantization", "residues"),
    }
    return {name: float(sums[of] / sums[count]) for name, (of, count) in ratios.items() if sums[count]}


def geometry(model: StructureTokenizer, counts: Float[Tensor, "1 K"]) -> dict[str, float]:
    """How alike the codes are that the split uses."""
    return metrics.alikeness(model.quantizer.codebook.vectors[counts[0] > 0])


def tokens(trained: Trained) -> ProteinTokens:
    """Codes with what else the report asks about: the vectors before them, and the backbones after."""
    model: Any = trained.model

    def latents(batch: Batch) -> Float[Tensor, "B L D"]:
        with torch.inference_mode():
            return model.latents(batch)[0]

    def decoded(vectors: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L 3 3"]:
        with torch.inference_mode():
            return rebuilt(model, vectors, mask)[0]

    s = model.settings
    name = "AminoAseed" if s.quantizer == "reparameterized" else "VanillaVQ"
    what = f"{name}, {s.num_codes} codes of {s.code_dim} dimensions"
    return replace(tokens_of(trained), what=what, latents=latents, rebuilt=decoded)


def write_report(job: ReportJob) -> dict[str, float]:
    return structure.write(job, tokens(job.trained))


recipe = Recipe(
    corpus=("proteins",),
    Settings=StructureSettings,
    presets=PRESETS,
    resolve=resolve,
    stages=stages,
    codebooks=lambda s: [(s.num_codes, s.code_dim)],
    encode=encode,
    decode=decode,
    measure=measure,
    summarise=summarise,
    geometry=geometry,
    distortion="rmsd",
    claims=paper.claims,
    report=Report(structure.StructureReportSettings, write_report, structure.FILES, structure.refuse, structure.given),
    space={
        "num_codes": "choice:256,512,1024,2048,4096",
        "code_dim": "choice:128,256,512,1024,2048",
        "quantizer": "choice:reparameterized,plain",
    },
)

"""The law of DESIGN section 4 on real processes: W workers on W parts reach what one worker reaches on the whole.

Groups of 1, 2 and 4 gloo workers (uneven, empty and fully masked parts) run once for all tests.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor

from tests.contracts.steps import revives
from tests.contracts.workers import CASES, FIRST, LOOPS, PARTS, STEPS, run, run_long
from tests.vqcore.quantizers.cases import K

SEEDINGS = [
    f"{metric}-{seeding}" for metric in ("euclidean", "cosine") for seeding in ("random_rows", "kmeans_plus_plus")
]


class Result(NamedTuple):
    """What one process saved."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key: value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    folder: Path = tmp_path_factory.mktemp("workers")
    groups = [_begin(run, world, folder) for world in PARTS if world > 1]
    run(0, 1, folder)  # here, while the others are still importing torch
    _wait(groups)
    return {world: _saved(world, folder) for world in PARTS}


@pytest.fixture(scope="module")
def long_of_four(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder: Path = tmp_path_factory.mktemp("long")
    _wait([_begin(run_long, 4, folder)])
    return _saved(4, folder)


def _begin(what: Callable[[int, int, Path], None], world: int, folder: Path) -> Any:
    return torch.multiprocessing.start_processes(_start, (what, world, folder), world, join=False, start_method="spawn")


def _wait(groups: list[Any]) -> None:
    for group in groups:
        while not group.join(timeout=240):
            pass


def _saved(world: int, folder: Path) -> list[Result]:
    return [
        Result(
            load_file(folder / f"{world}-{rank}.safetensors"),
            json.loads((folder / f"{world}-{rank}.json").read_text()),
        )
        for rank in range(world)
    ]


def _start(rank: int, what: Callable[[int, int, Path], None], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    what(rank, world, folder)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    assert found
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=atol, msg=lambda said, key=key: f"{key}: {said}")


def assert_bit_identical(workers: list[Result], prefix: str) -> None:
    first = workers[0].under(prefix)
    assert first
    for worker in workers[1:]:
        for key, value in worker.under(prefix).items():
            assert value.numpy().tobytes() == first[key].numpy().tobytes(), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_parts_reach_the_codebook_of_the_whole(results: dict[int, list[Result]], world: int, case: str) -> None:
    """R1: the quantizers were built before the group. R3: one worker has only masked rows, one none at all."""
    (alone,), workers = results[1], results[world]
    revived = any(revived for _, revived in alone.facts[f"law/{case}"]["calls"])
    assert revived or not revives(CASES[case]()), "the case must revive something"
    assert_bit_identical(workers, f"law/{case}/state/")
    assert_close(workers[0].under(f"law/{case}/state/"), alone.under(f"law/{case}/state/"), 4e-6)
    for step in range(STEPS):
        name = f"law/{case}/{step}"
        codes = torch.cat([worker.tensors[f"{name}/codes"] for worker in workers])
        assert torch.equal(codes, alone.tensors[f"{name}/codes"])
        loss = sum(worker.tensors[f"{name}/loss"] for worker in workers) / world
        torch.testing.assert_close(loss, alone.tensors[f"{name}/loss"])
        squared_error = sum(worker.tensors[f"{name}/squared_error"] for worker in workers)
        torch.testing.assert_close(squared_error, alone.tensors[f"{name}/squared_error"], rtol=1e-6, atol=1e-9)
        gradient = torch.cat([worker.tensors[f"{name}/gradient"] for worker in workers]) / world
        torch.testing.assert_close(gradient, alone.tensors[f"{name}/gradient"])
        of_parameters = alone.under(f"{name}/of ")
        for key, value in of_parameters.items():
            torch.testing.assert_close(workers[0].tensors[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", PARTS)
def test_a_step_is_one_reduce_and_two_only_where_a_code_is_dead(
    results: dict[int, list[Result]], world: int, case: str
) -> None:
    for worker in results[world]:
        facts = worker.facts[f"law/{case}"]
        assert all(calls == 1 + revived for calls, revived in facts["calls"])
        assert facts["eval"] == 0
        assert facts == results[1][0].facts[f"law/{case}"]


@pytest.mark.parametrize("seeding", SEEDINGS)
@pytest.mark.parametrize("how", ["seed", "gather"])
@pytest.mark.parametrize("world", [2, 4])
def test_seeding_gives_one_codebook_to_any_number_of_workers(
    results: dict[int, list[Result]], world: int, how: str, seeding: str
) -> None:
    prefix = f"{how}/{seeding}/"
    (alone,), workers = results[1], results[world]
    assert alone.tensors[f"{prefix}codebook.seeded"]
    assert len(alone.tensors[f"{prefix}codebook.vectors"].unique(dim=0)) == K
    assert_bit_identical([alone, *workers] if how == "seed" else workers, prefix)
    assert_close(workers[0].under(prefix), alone.under(prefix), 1e-6)


ATOL = {"float32": 1e-5, "float64": 1e-9}
RUNS = [(2, "float32", name) for name in CASES] + [(4, "float32", name) for name in CASES]
RUNS += [(2, "float64", name) for name in FIRST]


@pytest.mark.parametrize(("world", "kind", "name"), RUNS)
def test_a_training_run_reaches_the_same_weights(
    results: dict[int, list[Result]], world: int, kind: str, name: str
) -> None:
    assert_same_run(results[1][0], results[world], kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIRST)
def test_four_workers_reach_them_after_400_steps(
    results: dict[int, list[Result]], long_of_four: list[Result], name: str
) -> None:
    assert_same_run(results[1][0], long_of_four, "float64", name)


def assert_same_run(alone: Result, workers: list[Result], kind: str, name: str) -> None:
    prefix = f"{kind}/{name}"
    wanted = alone.tensors[f"{prefix}/codes"]
    codes = torch.cat([worker.tensors[f"{prefix}/codes"] for worker in workers], dim=1)
    assert len(codes) == LOOPS[kind][1]
    assert torch.equal(codes, wanted), "a code flipped; choose another seed"
    assert len(wanted.unique()) > 2, "the run must use some codes"
    assert_bit_identical(workers, f"{prefix}/state/")
    assert_close(workers[0].under(f"{prefix}/state/"), alone.under(f"{prefix}/state/"), ATOL[kind])


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("world", [2, 4])
def test_torchs_own_data_parallel_trains_it(results: dict[int, list[Result]], world: int, name: str) -> None:
    """facebookresearch/encodec 16, ZhikangNiu/encodec-pytorch 15, ZhangXInFD/SpeechTokenizer 24: codebooks that need a
    trainer of their own, or drift apart without one."""
    prefix = f"wrapped/{name}/"
    assert_bit_identical(results[world], prefix)
    assert_close(results[world][0].under(prefix), results[1][0].under(prefix), 1e-5)

"""Checkpoints of a run: safetensors and JSON in directories whose JSON is written last. Nothing is ever unpickled."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines import storage
from pipelines.errors import Failed, Refused

FORMAT = "vqray-checkpoint"
VERSION = 1
_NAME = re.compile(r"(\d{3})-(\d{12})/state\.json")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps of stage number `stage`."""

    stage: int
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    """JSON values beside the tensors: what optimisers hold besides, and the run's totals."""


class Checkpoints:
    """The checkpoints of one run, under `<out>/checkpoints`. Written by rank 0, read by every worker."""

    def __init__(self, out: str, keep: int = 2):
        self.uri = storage.join(out, "checkpoints")
        self.keep = keep

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a snapshot (see `pack`), then drop all but the newest `keep`.

        Raises:
            Failed, Refused: the store does not take it; earlier checkpoints are as they were.
        """
        home = storage.join(self.uri, f"{checkpoint.stage:03d}-{checkpoint.step:012d}")
        with storage.writing(storage.join(home, "state.safetensors")) as staged:
            try:
                safetensors.torch.save_file(checkpoint.tensors, staged)
            except safetensors.SafetensorError as error:
                raise Failed(f"could not write {home}: {error}") from None
            digest = storage.sha256_of_file(staged)
        record = {"format": FORMAT, "version": VERSION, "sha256": digest, "state": checkpoint.state}
        storage.write_json_atomic(storage.join(home, "state.json"), record)
        # What stays for now is in nobody's way, and the next checkpoint's turn takes it too.
        with contextlib.suppress(Failed, Refused):
            for stage, step in self.complete()[: -self.keep]:
                storage.remove(storage.join(self.uri, f"{stage:03d}-{step:012d}"))

    def complete(self) -> list[tuple[int, int]]:
        """(stage, step) of every finished checkpoint, oldest first."""
        if not storage.exists(self.uri):
            return []
        found = (_NAME.fullmatch(entry.name) for entry in storage.list_files(self.uri))
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    def load(self, stage: int, step: int) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            Failed: its bytes are not those that were written, or another version of this program wrote it.
        """
        home = storage.join(self.uri, f"{stage:03d}-{step:012d}")
        record = storage.read_json(storage.join(home, "state.json"))
        if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
            given = f"{record.get('format')} version {record.get('version')}"
            raise Failed(f"the checkpoint {home} is {given}; this program reads {FORMAT} version {VERSION}.")
        data = storage.read_bytes(storage.join(home, "state.safetensors"))
        if storage.sha256_of_bytes(data) != record["sha256"]:
            raise Failed(f"the checkpoint {home} is damaged: state.safetensors does not have the digest in state.json.")
        return Checkpoint(stage, step, safetensors.torch.load(data), record["state"])

    def totals(self) -> dict[str, Any]:
        """The run's totals as the newest checkpoint has them, without reading its tensors; nothing without one."""
        complete = self.complete()
        if not complete:
            return {}
        found: dict[str, Any] = self.state(*complete[-1])["totals"]
        return found

    def state(self, stage: int, step: int) -> dict[str, Any]:
        """The JSON values of one checkpoint, without its tensors."""
        home = storage.join(self.uri, f"{stage:03d}-{step:012d}")
        found: dict[str, Any] = storage.read_json(storage.join(home, "state.json"))["state"]
        return found

    def newest(self, warn: Callable[[str], None]) -> tuple[int, int] | None:
        """(stage, step) of the newest checkpoint whose bytes are whole; older ones are tried when one is damaged."""
        for stage, step in reversed(self.complete()):
            try:
                self.load(stage, step)
            except Failed as damage:
                warn(f"{damage} Trying the one before it.")
            else:
                return stage, step
        return None


def pack(model: nn.Module, optimisers: dict[str, Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A snapshot of a model and its optimisers as (tensors, JSON values), which later steps do not change."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    plain: dict[str, Any] = {}
    for group, optimiser in optimisers.items():
        packed = optimiser.state_dict()
        values: dict[str, dict[str, Any]] = {}
        for index, slots in packed["state"].items():
            for slot, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{group}/{index}/{slot}"] = value
                else:
                    values.setdefault(str(index), {})[slot] = value
        plain[group] = {"param_groups": packed["param_groups"], "state": values}
    # Copies also where a tensor is on the CPU already.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, {
        "optimisers": plain
    }


def unpack(checkpoint: Checkpoint, model: nn.Module, optimisers: dict[str, Optimizer]) -> None:
    """Put a packed state back, strictly: missing, unknown or differently shaped entries are refused."""
    model.load_state_dict(_under(checkpoint.tensors, "model/"), strict=True)
    for group, optimiser in optimisers.items():
        packed = checkpoint.state["optimisers"][group]
        state: dict[int, dict[str, Any]] = {int(index): dict(slots) for index, slots in packed["state"].items()}
        for name, tensor in _under(checkpoint.tensors, f"optimiser/{group}/").items():
            index, slot = name.split("/", 1)
            state.setdefault(int(index), {})[slot] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": packed["param_groups"]})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

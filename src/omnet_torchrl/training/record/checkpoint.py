"""Checkpoints, each of which is complete or no checkpoint.

A checkpoint is a state file, the segments of the replay buffer, and a manifest with the hash of each, which is written last.
Every file is written under another name, flushed to the disk and renamed, so that the earlier checkpoints stay as they were
whatever kills the process. A save writes only the transitions that are new since the one before. Files hold tensors, numbers
and strings; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import ReplayBuffer

from omnet_torchrl.training.record.files import replace_file

FORMAT = 4
MANIFESTS = "checkpoint_*.json"
FILES = re.compile(r"(state_\d+_|replay_\d+_\d+_)[0-9a-f]+\.pt(\.tmp)?|checkpoint_\d+\.json(\.tmp)?")


class CheckpointError(ValueError):
    """No checkpoint can be loaded."""


class Checkpointer:
    """The checkpoints of one run, in a folder of their own, which is made at the first save.

    The newest ``keep`` of them are kept, at least 2: one that turns out damaged falls back to the one before.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        self.path, self.keep = Path(path), keep
        self._segments: list[dict[str, Any]] | None = None  # of the replay buffer, in the newest checkpoint

    def save(self, frames: int, state: dict[str, Any], buffer: ReplayBuffer | None = None) -> None:
        """Write a checkpoint, which ``frames`` names and orders.

        The state is nested dicts and lists of tensors, numbers and strings; the buffer has TorchRL's default writer, which
        overwrites the oldest transitions.

        Raises:
            ValueError: the folder has checkpoints that were not loaded: two runs would mix.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._segments is None and any(self.path.glob(MANIFESTS)):
            raise ValueError(f"{self.path} has checkpoints of an earlier run: load() them and go on, or use another folder.")
        manifest: dict[str, Any] = {"format": FORMAT, "frames": frames, "replay": []}
        if buffer is not None:
            manifest["replay"] = self._save_replay(buffer)
        manifest["state"] = self._write(f"state_{frames:09d}", state)
        replace_file(self.path / f"checkpoint_{frames:09d}.json", json.dumps(manifest, indent=1).encode())
        self._segments = manifest["replay"]
        self._clean()

    def load(self, *, replay: bool = True) -> tuple[dict[str, Any], list[Path]] | None:
        """The newest checkpoint that is whole: its state, and the files of its replay buffer for :func:`load_replay`.

        ``None`` where there is no checkpoint. Every file has been checked against its hash; without ``replay``, those of the
        replay buffer are neither checked nor returned.

        Raises:
            CheckpointError: there are checkpoints and none is whole.
        """
        manifests = sorted(self.path.glob(MANIFESTS), reverse=True)
        faults = []
        for path in manifests:
            try:
                manifest = self._checked(path, replay)
                state = torch.load(self.path / manifest["state"]["file"], weights_only=True, map_location="cpu")
            except Exception as error:  # whatever a damaged file leads to
                faults.append(f"{path.name}: {error}")
                continue
            for fault in faults:
                warnings.warn(f"a damaged checkpoint is passed over for the one before: {fault}", stacklevel=2)
            self._segments = manifest["replay"]
            return state, [self.path / segment["file"] for segment in manifest["replay"]]
        if faults:
            hint = ""
            with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
                warnings.simplefilter("ignore")
                if replay and Checkpointer(self.path).load(replay=False):
                    hint = " Its networks are: load_policy and examples/play.py read them."
            raise CheckpointError(f"no checkpoint in {self.path} is whole: {'; '.join(faults).rstrip('.')}.{hint}")
        return None

    def _checked(self, path: Path, replay: bool) -> dict[str, Any]:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"expected checkpoint format {FORMAT}, got {manifest['format']}: go on with the version that began the run, "
                "which its run.json names."
            )
        if not replay:
            manifest["replay"] = []
        for entry in (manifest["state"], *manifest["replay"]):
            if hashlib.sha256((self.path / entry["file"]).read_bytes()).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{entry['file']} is not what was written.")
        return manifest

    def _save_replay(self, buffer: ReplayBuffer) -> list[dict[str, Any]]:
        written, capacity = buffer.write_count, buffer.storage.max_size
        oldest = max(0, written - capacity)
        segments = [segment for segment in self._segments or [] if oldest < segment["stop"] <= written]
        start = segments[-1]["stop"] if segments else oldest
        if start < written:
            index = torch.arange(start, written) % capacity
            data = buffer.storage.get(index).flatten_keys(".").to("cpu").to_dict()
            entry = self._write(f"replay_{start:09d}_{written:09d}", {"start": start, "data": data})
            segments.append({**entry, "start": start, "stop": written})
        return segments

    def _write(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        memory = io.BytesIO()
        torch.save(state, memory)
        content = memory.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        # Named after its content too: a file that an earlier manifest names is never written over.
        file = f"{name}_{digest[:8]}.pt"
        replace_file(self.path / file, content)
        return {"file": file, "sha256": digest}

    def discard_after(self, frames: int) -> None:
        """Delete the checkpoints beyond ``frames``: a run that goes on from an earlier one writes its own."""
        for path in self.path.glob(MANIFESTS):
            if int(re.findall(r"\d+", path.stem)[0]) > frames:
                path.unlink()

    def _clean(self) -> None:
        manifests = sorted(self.path.glob(MANIFESTS))
        for path in manifests[: -self.keep]:
            path.unlink()
        used = set()
        for path in manifests[-self.keep :]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged one goes, too
                manifest = json.loads(path.read_bytes())
                used |= {path.name, manifest["state"]["file"], *(segment["file"] for segment in manifest["replay"])}
        for path in self.path.iterdir():
            if path.name not in used and FILES.fullmatch(path.name):
                path.unlink()


def load_replay(buffer: ReplayBuffer, files: list[Path], writer: dict[str, Any]) -> None:
    """Fill an empty buffer from the files of a checkpoint.

    Each transition goes where it would stand had it been written to this buffer, which may be larger than the one that was
    saved: a run whose ``total_frames`` is raised.

    Raises:
        ValueError: the buffer is larger, and what it would still hold had been overwritten.
    """
    capacity, written = buffer.storage.max_size, writer["_write_count"]
    for i, path in enumerate(files):
        segment = torch.load(path, weights_only=True)
        if i == 0 and segment["start"] > max(0, written - capacity):
            raise ValueError(
                f"the buffer's capacity must be at most {written - segment['start']}, the transitions of the checkpoint, got "
                f"{capacity}: those before had been overwritten."
            )
        data = TensorDict(segment["data"]).auto_batch_size_(1).unflatten_keys(".")
        index = torch.arange(segment["start"], segment["start"] + len(data))
        last = slice(max(0, len(data) - capacity), None)
        buffer.storage.set(index[last] % capacity, data[last].to(buffer.storage.device))
    buffer.writer.load_state_dict({**writer, "_cursor": written % capacity})


def check_shapes(stored: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if the tensors of a checkpoint and those that they go to differ in name or shape."""
    expected, got = ({name: tuple(value.shape) for name, value in each.items()} for each in (stored, live))
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    wrong = [f"{name} must be {expected.get(name, 'left out')}, got {got.get(name, 'nothing')}" for name in names]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the checkpoint is of other networks or environments: {'; '.join(wrong[:3])}{more}: use the options that it was "
            "saved with (was the run's config.yaml edited?)."
        )

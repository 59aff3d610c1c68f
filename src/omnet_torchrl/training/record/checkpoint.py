"""Checkpoints, each of which is complete or no checkpoint.

A checkpoint is a state file, the segments of the replay buffer, and a manifest with the hash of each and of itself, which is
written last. Every file is written under another name, flushed to the disk and renamed, so that the earlier checkpoints stay as
they were whatever kills the process. A save writes only the transitions that are new since the one before, in pieces: no second
copy of the buffer is in memory. Files hold tensors, numbers and strings; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
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

from omnet_torchrl.training.record.files import CheckpointError, fingerprint, one_line, read_file, replace_file, seal

FORMAT = 5
MANIFEST = re.compile(r"checkpoint_(\d{9,})\.json")
FILES = re.compile(r"(state_\d{9,}_|replay_\d{9,}_\d{9,}_)[0-9a-f]{8}\.pt(\.tmp)?|checkpoint_\d{9,}\.json(\.tmp)?")
PIECE = 2**25  # bytes of transitions in a file, at most, unless one alone has more


class Checkpointer:
    """The checkpoints of one run, in a folder of their own, which is made at the first save.

    The newest ``keep`` of them are kept, at least 2: one that turns out damaged is passed over for the one before. They share
    the segments of the replay buffer, each of which is written once: where one that all of them have is damaged, none can be
    gone on from, and only the networks are left.
    """

    def __init__(self, path: str | Path, keep: int = 2):
        self.path, self.keep = Path(path), keep
        self._segments: list[dict[str, Any]] | None = None  # of the replay buffer, in the newest checkpoint

    def manifests(self) -> dict[int, Path]:
        """The frames of each checkpoint, the newest first, and its manifest. A file of another name is the user's."""
        found = ((MANIFEST.fullmatch(path.name), path) for path in self.path.glob("checkpoint_*.json"))
        return dict(sorted(((int(match[1]), path) for match, path in found if match), reverse=True))

    def save(self, frames: int, state: dict[str, Any], buffer: ReplayBuffer | None = None) -> None:
        """Write a checkpoint, which ``frames`` names and orders.

        The state is nested dicts and lists of tensors, numbers and strings; the buffer has TorchRL's default writer, which
        overwrites the oldest transitions.

        Raises:
            ValueError: the folder has checkpoints that were not loaded: two runs would mix.
            WriteError: a file can't be written, as on a full disk. The earlier checkpoints are as they were.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._segments is None and self.manifests():
            raise ValueError(f"{self.path} has checkpoints of an earlier run: load() them and go on, or use another folder.")
        manifest: dict[str, Any] = {"format": FORMAT, "frames": frames, "transitions": [0, 0], "replay": []}
        if buffer is not None:
            written = buffer.write_count
            manifest["transitions"] = [max(0, written - buffer.storage.max_size), written]
            manifest["replay"] = self._save_replay(buffer, *manifest["transitions"])
        manifest["state"] = self._write(f"state_{frames:09d}", state)
        sealed = {**manifest, "sha256": seal(manifest)}
        replace_file(self.path / f"checkpoint_{frames:09d}.json", json.dumps(sealed, indent=1).encode())
        self._segments = manifest["replay"]
        self._clean()

    def load(self, *, replay: bool = True) -> tuple[dict[str, Any], list[Path]] | None:
        """The newest checkpoint that is whole: its state, and the files of its replay buffer for :func:`load_replay`.

        ``None`` where there is no checkpoint. Every file has been read and checked; without ``replay``, those of the replay
        buffer are neither checked nor returned. A warning names each checkpoint that is passed over.

        Raises:
            CheckpointError: there are checkpoints and none is whole.
        """
        faults = []
        for path in self.manifests().values():
            try:
                manifest = _read_manifest(path)
                state = _read_tensors(self.path / manifest["state"]["file"], manifest["state"])
                self._check_replay(manifest if replay else {"transitions": [0, 0], "replay": []})
            except Exception as error:  # whatever a damaged file leads to
                faults.append(f"{path.name}: {one_line(error)}")
                continue
            for fault in faults:
                warnings.warn(f"a damaged checkpoint is passed over for the one before: {fault}", stacklevel=2)
            self._segments = manifest["replay"]
            return state, [self.path / segment["file"] for segment in manifest["replay"] if replay]
        if faults:
            hint = ""
            with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
                warnings.simplefilter("ignore")
                if replay and Checkpointer(self.path).load(replay=False):
                    hint = " Its networks are: load_policy and examples/play.py read them."
            raise CheckpointError(f"no checkpoint in {self.path} is whole: {'; '.join(faults).rstrip('.')}.{hint}")
        return None

    def _check_replay(self, manifest: Mapping[str, Any]) -> None:
        """Raise unless the segments have each transition of the buffer once, in order, with the same keys and shapes."""
        oldest, written = manifest["transitions"]
        reached, shapes = None, None
        for entry in manifest["replay"]:
            start, stop = entry["start"], entry["stop"]
            if not (start <= oldest if reached is None else start == reached) or not oldest < stop:
                raise CheckpointError(f"{entry['file']} must follow on transition {reached or oldest}, got {start} to {stop}.")
            segment = _read_tensors(self.path / entry["file"], entry)
            found = {key: (value.dtype, value.shape[1:]) for key, value in segment["data"].items()}
            rows = {len(value) for value in segment["data"].values()}
            if segment["start"] != start or rows != {stop - start} or found != (shapes or found):
                raise CheckpointError(f"{entry['file']} does not hold the transitions {start} to {stop} of this buffer.")
            reached, shapes = stop, found
        if (oldest if reached is None else reached) != written:
            raise CheckpointError(f"its segments must reach transition {written}, got {reached}.")

    def _save_replay(self, buffer: ReplayBuffer, oldest: int, written: int) -> list[dict[str, Any]]:
        segments = [segment for segment in self._segments or [] if oldest < segment["stop"] <= written]
        start, capacity = segments[-1]["stop"] if segments else oldest, buffer.storage.max_size
        while start < written:
            rows = max(1, PIECE // buffer.storage.get(torch.tensor([start % capacity])).bytes())
            stop = min(start + rows, written)
            data = buffer.storage.get(torch.arange(start, stop) % capacity).flatten_keys(".").to("cpu").to_dict()
            entry = self._write(f"replay_{start:09d}_{stop:09d}", {"start": start, "data": data})
            segments.append({**entry, "start": start, "stop": stop})
            start = stop
        return segments

    def _write(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        memory = io.BytesIO()
        torch.save(state, memory)
        entry = fingerprint(memory.getbuffer())
        # Named after its content too: a file that an earlier manifest names is never written over.
        file = f"{name}_{entry['sha256'][:8]}.pt"
        replace_file(self.path / file, memory.getbuffer())
        return {"file": file, **entry}

    def discard_after(self, frames: int) -> None:
        """Delete the checkpoints beyond ``frames``: a run that goes on from an earlier one writes its own."""
        for number, path in self.manifests().items():
            if number > frames:
                _delete(path)

    def _clean(self) -> None:
        used, kept = set(), 0
        for path in self.manifests().values():
            with contextlib.suppress(CheckpointError):  # a damaged one goes, too
                manifest = _read_manifest(path)
                if kept < self.keep:
                    used |= {path.name, manifest["state"]["file"], *(segment["file"] for segment in manifest["replay"])}
                    kept += 1
        for path in self.path.iterdir():
            if path.name not in used and FILES.fullmatch(path.name):
                _delete(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(read_file(path))
        if manifest["format"] != FORMAT:
            advice = "go on with the version that began the run, which its run.json names"
            raise CheckpointError(f"expected checkpoint format {FORMAT}, got {manifest['format']}: {advice}.")
        if manifest["sha256"] != seal(manifest) or path.name != f"checkpoint_{manifest['frames']:09d}.json":
            raise CheckpointError("it is not what was written under this name.")
    except CheckpointError:
        raise
    except Exception as error:  # JSON that is cut, or of something else
        raise CheckpointError(f"it is no manifest ({type(error).__name__}: {one_line(error)}).") from error
    return manifest


def _read_tensors(path: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    content = read_file(path, expected)
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever the bytes lead to
        raise CheckpointError(f"{path.name} does not hold tensors, numbers and strings ({type(error).__name__}).") from error


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)


def load_replay(buffer: ReplayBuffer, files: list[Path], writer: dict[str, Any], dims: int = 1) -> None:
    """Fill an empty buffer from the files of a checkpoint.

    Each transition goes where it would stand had it been written to this buffer, which may be larger than the one that was
    saved: a run whose ``total_frames`` is raised. The storage has ``dims`` dimensions: 2 where an element is one of all tasks.

    Raises:
        ValueError: the buffer is larger, and what it would still hold had been overwritten.
        CheckpointError: the files are not of the buffer that ``writer`` wrote.
    """
    capacity, written = buffer.storage.max_size, writer["_write_count"]
    stop = 0
    for i, path in enumerate(files):
        segment = _read_tensors(path)
        if i == 0 and segment["start"] > max(0, written - capacity):
            raise ValueError(
                f"the buffer's capacity must be at most {written - segment['start']}, the transitions of the checkpoint, got "
                f"{capacity}: those before had been overwritten."
            )
        data = TensorDict(segment["data"]).auto_batch_size_(dims).unflatten_keys(".")
        stop = segment["start"] + len(data)
        index = torch.arange(segment["start"], stop)
        last = slice(max(0, len(data) - capacity), None)
        buffer.storage.set(index[last] % capacity, data[last].to(buffer.storage.device))
    if stop != written:
        raise CheckpointError(f"the checkpoint's buffer must reach transition {written}, got {stop}.")
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

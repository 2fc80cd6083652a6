"""A Megatron checkpoint to a Hugging Face directory: any sharding, any number of ranks, planned from headers, written by `stream.py`.

With a base the names, dtypes and shards are the base's, else Megatron's dtypes and shards of 5 GB. What a base has and Megatron does not
(MTP that a training left out) is copied from it. Every weight of the checkpoint has a place, or it is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.export.megatron.checkpoint import TOKENIZER, MegatronCheckpoint, finite
from nemotune.export.megatron.fitting import (
    Compared,
    Fitted,
    canonical,
    compared,
    fitted_to,
    made_of,
    refuse,
    rows_between,
    same_bytes,
    slabs,
)
from nemotune.export.megatron.homes import BY_LAYER, EXPERT_BIAS, FINAL_LAYERNORM, FINAL_NORM, homes, mtp_depth_of_megatron
from nemotune.export.megatron.rows import Rows
from nemotune.export.safetensors_files import weight_files
from nemotune.export.stream import Ends, Plan, fingerprint
from nemotune.models.config_json import read_config
from nemotune.models.disk_names import disk_pieces, has_copied_head, tensors_of
from nemotune.models.loading import UNUSED_PREFIXES, build_model
from nemotune.models.saving import copy_side_files
from nemotune.weights import Checkpoint, TensorInfo, WritePlan
from nemotune.weights.dtypes import NAMES
from nemotune.weights.writer import write_index


@dataclass
class Exported:
    """A checkpoint on its way to a Hugging Face directory. `beside`: where config.json and tokenizer are; `base`: whose names and dtypes to use.

    `tensors` is what will be written, `sources` of which rows of Megatron's each of it is made; what is in `tensors` alone is the base's.
    Raises CheckpointError with everything that does not fit.
    """

    checkpoint: MegatronCheckpoint
    beside: Path
    base: Checkpoint | None
    fitted: list[Fitted] = field(init=False)
    sources: dict[str, list[Rows]] = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)
    _problems: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.model = build_model(read_config(self.beside))
        self.model.source = self.base
        self.fitted = self._fitted()
        self.sources, gaps = made_of(self.fitted)
        self._problems += gaps
        self._check_shapes()
        self._refuse()
        self.tensors = {info.name: info for info in (self._as_base(self.base) if self.base else self._in_shards())}
        self._refuse()

    @property
    def weights(self) -> WritePlan:
        return WritePlan(tuple(self.tensors.values()))

    def plan(self, *, verify_all: bool = False) -> Plan[Compared]:
        """What is written."""

        def finish(directory: Path, ends: Ends) -> None:
            write_index(directory, self.weights)
            copy_side_files(self.beside, directory)

        read = [self.checkpoint.directory, self.beside]
        identity = {"format": "hf from megatron", "read": fingerprint(*read)}
        return Plan(identity, weight_files(self.weights, self._pieces), lambda directory: self._verify(directory, all_=verify_all), finish)

    def _pieces(self, name: str) -> list[Callable[[], Tensor]]:
        info = self.tensors[name]
        if not info.shape:  # a number beside the model, which is the base's
            return [partial(self._number, info)]
        return [partial(self._rows, info, start, stop) for start, stop in slabs(info.shape[0], info.shape[1:])]

    def _rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        if runs := self.sources.get(self._canonical(info.name)):
            return rows_between(runs, start, stop, self.checkpoint.rows).to(info.torch_dtype)
        assert self.base is not None
        return finite(self.base.read_rows(info.name, start, stop), f"{self.base.directory}: {info.name}")

    def _number(self, info: TensorInfo) -> Tensor:
        assert self.base is not None
        return finite(self.base.read(info.name), f"{self.base.directory}: {info.name}")

    def _fitted(self) -> list[Fitted]:
        """The homes that the checkpoint has, sized by it."""
        stored, config, found = self.checkpoint.weights, self.model.config, []
        one_by_one = any(BY_LAYER.match(name) for name in stored)
        known = {home.name: home for home in homes(config, mtp_depth=mtp_depth_of_megatron(stored), one_by_one=one_by_one)}
        if FINAL_NORM in known:  # some versions of hybrid models call it as dense ones do
            known[FINAL_LAYERNORM] = replace(known[FINAL_NORM], name=FINAL_LAYERNORM)
        for name, tensor in stored.items():
            try:
                found.append(fitted_to(known[name], tensor.shape, vocab_size=config.vocab_size))
                if not tensor.covers([0] * len(tensor.shape), tensor.shape):
                    raise ValueError(f"{name}: parts of it are missing; copy the files of all ranks")
            except KeyError:
                self._problems.append(f"{name}: has no place in {self.model.family}")
            except ValueError as error:
                self._problems.append(str(error))
        return found

    def _check_shapes(self) -> None:
        """Everything that the model is made of is there, in its shape."""
        tails, state = {run: each.tail for each in self.fitted for run in each.home.names}, tensors_of(self.model)
        copied = {"lm_head.weight"} if has_copied_head(self.model) else set()
        for disk_name, (name, index) in disk_pieces(self.model):
            expected, canonical = tuple(state[name].shape)[0 if index is None else 1 :], self._canonical(disk_name)
            if canonical in copied:
                self.sources[canonical] = self.sources.get(self._canonical(name), [])
            elif canonical not in self.sources:
                self._problems.append(f"{canonical}: the checkpoint has nothing of it, expected shape {expected}")
            elif (got := (sum(run.length for run in self.sources[canonical]), *tails[canonical])) != expected:
                self._problems.append(f"{canonical}: got shape {got}, expected {expected}")

    def _in_shards(self) -> list[TensorInfo]:
        tails = {name: each.tail for each in self.fitted for name in each.home.names}
        stored = self.checkpoint.weights
        rows = [
            (name, NAMES[stored[runs[0].name].dtype], (sum(run.length for run in runs), *tails[name]))
            for name, runs in self.sources.items()
        ]
        return list(WritePlan.in_shards(rows).tensors)

    def _as_base(self, base: Checkpoint) -> list[TensorInfo]:
        infos, rounded, copied = [], set(), []
        self._problems += [
            f"{name}: the base has no such tensor" for name in sorted(self.sources.keys() - set(map(self._canonical, base.tensors)))
        ]
        for info in base.tensors.values():
            runs = self.sources.get(self._canonical(info.name))
            if runs is None and not info.name.startswith(UNUSED_PREFIXES) and not info.name.endswith("inv_freq"):
                self._problems.append(f"{info.name}: the checkpoint has nothing of it")
            elif runs is None:
                copied.append(info.name)
            elif runs[0].name.endswith(EXPERT_BIAS):
                info = self._wide_enough(info, runs)
            elif (kind := NAMES[self.checkpoint.weights[runs[0].name].dtype]) != info.dtype:
                rounded.add((kind, info.dtype))
            infos.append(info)
        self.notes += [f"the checkpoint holds {theirs}, written is the base's {ours}" for theirs, ours in sorted(rounded)]
        self.notes += [f"{len(copied)} tensors that the checkpoint lacks are the base's, first {copied[0]}"] if copied else []
        return infos

    def _wide_enough(self, info: TensorInfo, runs: list[Rows]) -> TensorInfo:
        """The router's bias: in the base's dtype where that loses nothing, else in fp32, since its differences are small beside itself."""
        values = rows_between(runs, 0, info.shape[0], self.checkpoint.rows)
        if values.equal(values.to(info.torch_dtype).to(values.dtype)):
            return info
        return replace(info, dtype=NAMES[values.dtype])

    def _verify(self, directory: Path, *, all_: bool) -> Compared:
        """Megatron's tensors made of what was written, against the checkpoint's own."""
        written = Checkpoint(directory)
        if written.tensors != self.tensors:
            raise CheckpointError(
                f"{directory}: names, shapes and dtypes as written are not those planned; nothing was kept. Convert again"
            )
        names = {self._canonical(name): name for name in written.tensors}

        def read(run: Rows) -> Tensor:
            return written.read_rows(names[run.name], run.first, run.first + run.length)

        def is_right(part: tuple[str, int, int, int]) -> bool:
            name, entry, start, stop = part
            home = known[name].home
            back = rows_between(home.entries[entry], start, stop, read)
            theirs = self.checkpoint.rows(Rows(name, start, stop - start, entry if home.stacked else None))
            return same_bytes(theirs.to(back.dtype), back)

        known = {each.name: each for each in self.fitted}
        parts = [
            (each.name, entry, start, stop)
            for each in self.fitted
            for entry in range(len(each.home.entries))
            for start, stop in slabs(each.num_rows, each.tail)
        ]
        return compared(parts, is_right, directory, of="the checkpoint", all_=all_)

    def _canonical(self, name: str) -> str:
        return canonical(name, self.model)

    def _refuse(self) -> None:
        refuse(self.checkpoint.directory, self._problems, "Check that checkpoint and config.json belong to one model")


def open_export(checkpoint: MegatronCheckpoint, base_dir: Path | None = None) -> Exported:
    """The checkpoint as the model of `base_dir`, or of the config.json that its run knows. Raises CheckpointError, MissingFileError."""
    beside = base_dir or hf_side(checkpoint)
    has_weights = base_dir is not None and any(base_dir.glob("*.safetensors"))
    return Exported(checkpoint, beside, Checkpoint(beside) if has_weights else None)


def hf_side(checkpoint: MegatronCheckpoint) -> Path:
    known = checkpoint.model.get("hf_model_id")
    candidates = [checkpoint.directory / TOKENIZER, *([Path(known)] if isinstance(known, str) and known else [])]
    for directory in candidates:
        if (directory / "config.json").is_file():
            return directory
    raise MissingFileError(
        f"{checkpoint.directory}: no config.json in {TOKENIZER}/, and hf_model_id of its run_config.yaml ({known}) is no directory here; "
        "name the Hugging Face directory of the model with --base"
    )

"""What an export writes is absent or whole: killed, refused or out of space at any moment, and the next run goes on from what is there."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from nemotune.errors import CheckpointError, ConflictError, DiskFullError
from nemotune.export import staging, stream
from nemotune.export.stream import OutputFile, Part, Plan, fingerprint, write
from nemotune.files import staged_directory, take_place

KB = 1000


def part(name: str, *, made: list[str] | None = None, num_bytes: int = 3 * KB, wait: float = 0.0) -> Part:
    """Three pieces, whose letters are the name's; `made` is told of each."""

    def piece(i: int) -> bytes:
        time.sleep(wait)
        if made is not None:
            made.append(f"{name}{i}")
        return name.encode() * (num_bytes // 3)

    return Part(name, num_bytes, lambda: [lambda i=i: piece(i) for i in range(3)])


def plan(names: str = "abcd", *, identity: str = "one", verify=lambda directory: "verified", **of_parts) -> Plan[str]:
    """Two files with half of the parts each, and a small one beside them."""
    half = len(names) // 2
    files = tuple(OutputFile(file, tuple(part(n, **of_parts) for n in some)) for file, some in (("x", names[:half]), ("y", names[half:])))
    return Plan({"of": identity}, files, verify, finish=lambda d, ends: (d / "ends.json").write_text(json.dumps(dict(ends))))


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


WHOLE = {"x": b"a" * 3 * KB + b"b" * 3 * KB, "y": b"c" * 3 * KB + b"d" * 3 * KB, "ends.json": b'{"x": [3000, 6000], "y": [3000, 6000]}'}


def test_a_directory_and_a_file_are_written_whole_with_nothing_beside_them(tmp_path):
    told = []
    assert write(plan(), tmp_path / "deep" / "out", done=told.append) == "verified"
    assert contents(tmp_path / "deep" / "out") == WHOLE and sum(told) == plan().num_bytes
    one = Plan({}, (OutputFile("any", (part("a"), part("b"))),), lambda file: file.stat().st_size, is_file=True)
    assert write(one, tmp_path / "deep" / "model.gguf") == 6 * KB
    assert (tmp_path / "deep" / "model.gguf").read_bytes() == WHOLE["x"]
    assert listed(tmp_path / "deep") == ["model.gguf", "out"]


def test_a_failed_verification_leaves_nothing_and_an_old_target_as_it_was(tmp_path):
    def refuse(directory: Path) -> str:
        raise CheckpointError("wrong")

    with pytest.raises(CheckpointError, match="wrong"):
        write(plan(verify=refuse), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write(plan(), tmp_path / "out")
    with pytest.raises(CheckpointError):
        write(plan("efgh", verify=refuse), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == WHOLE and listed(tmp_path) == ["out"]


def test_of_values_that_cannot_be_written_nothing_is_left_behind(tmp_path):
    def not_finite() -> bytes:
        raise CheckpointError("holds values that are not finite")

    broken = Plan({}, (OutputFile("x", (part("a"), Part("b", 3, lambda: [not_finite]))),), lambda _: None)
    with pytest.raises(CheckpointError, match="not finite"):
        write(broken, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_when_asked_for_and_only_by_its_like(tmp_path):
    write(plan(), tmp_path / "out")
    (tmp_path / "out" / "of the old one").touch()
    with pytest.raises(ConflictError, match="already exists"):
        write(plan("efgh"), tmp_path / "out")
    write(plan("efgh"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out")["x"] == b"e" * 3 * KB + b"f" * 3 * KB and not (tmp_path / "out" / "of the old one").exists()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConflictError, match="is a file"):
        write(plan(), tmp_path / "file", overwrite=True)
    assert listed(tmp_path) == ["file", "out"]


@pytest.mark.parametrize("swaps", [True, False], ids=["in one step", "in two renames"])
def test_the_old_directory_goes_when_the_new_one_is_in_place(tmp_path, monkeypatch, swaps):
    write(plan(), tmp_path / "out")
    if not swaps:
        monkeypatch.setattr("nemotune.files._exchange", lambda *paths: False)
    write(plan("efgh"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out")["y"].startswith(b"g") and listed(tmp_path) == ["out"]


@pytest.mark.parametrize("made", [b"a" * 2, b"a" * 4])
def test_a_part_of_another_size_than_planned_is_never_written_out(tmp_path, made):
    with pytest.raises(AssertionError, match="p: planned 3 bytes"):
        write(Plan({}, (OutputFile("x", (Part("p", 3, lambda: [lambda: made]),)),), lambda _: None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_is_replaced_and_what_it_names_is_kept(tmp_path):
    """Of a directory, of a file, and where the staging should lie: nothing behind a link is written or deleted."""
    write(plan(), tmp_path / "kept")
    for name in ("out", ".out.partial"):
        (tmp_path / name).symlink_to("kept")
    write(plan("efgh"), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out")["x"].startswith(b"e") and not (tmp_path / "out").is_symlink()
    (tmp_path / "link").symlink_to("kept")
    with staged_directory(tmp_path / "link", overwrite=True) as aside:
        (aside / "new").touch()
    assert listed(tmp_path / "link") == ["new"]
    assert contents(tmp_path / "kept") == WHOLE and listed(tmp_path) == ["kept", "link", "out"]


@pytest.mark.parametrize("target", ["/", ".", ".."])
def test_what_cannot_be_renamed_is_refused_before_the_first_byte(tmp_path, monkeypatch, target):
    """A mount point too, of which `/` is one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConflictError, match="cannot be replaced"):
        write(plan(), Path(target), overwrite=True, done=lambda _: pytest.fail("wrote"))
    assert not list(tmp_path.iterdir())


def test_what_came_to_the_target_meanwhile_is_kept(tmp_path):
    def comes(directory: Path) -> str:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "of another").touch()
        return "verified"

    with pytest.raises(ConflictError, match="already exists"):
        write(plan(verify=comes), tmp_path / "out")
    assert listed(tmp_path / "out") == ["of another"]
    assert write(plan(), tmp_path / "out", overwrite=True) == "verified", "its staging is gone on from"


def test_an_old_target_that_was_swapped_but_not_yet_deleted_is_no_staging(tmp_path, monkeypatch):
    """Killed in between, the old directory lies where the new one was staged: names and sizes alike, bytes of another model."""
    write(plan("efgh"), tmp_path / "out")

    def swapped(aside: Path, target: Path) -> None:
        take_place(aside, target)
        aside.mkdir()
        for name in ("x", "y"):
            shutil.copyfile(old / name, aside / name)
        raise Interrupted

    old = tmp_path / "copy"
    shutil.copytree(tmp_path / "out", old)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "take_place", swapped)
        with pytest.raises(Interrupted):
            write(plan(), tmp_path / "out", overwrite=True)
    write(plan(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == WHOLE


def test_an_old_directory_comes_back_where_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    write(plan("efgh"), tmp_path / "out")
    before, rename = contents(tmp_path / "out"), os.replace

    def refusing(one: Path, other: Path) -> None:
        if one.parent.name == ".out.partial":
            raise PermissionError(13, "Permission denied", str(other))
        rename(one, other)

    monkeypatch.setattr("nemotune.files._exchange", lambda *paths: False)
    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(PermissionError):
        write(plan(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_an_old_directory_between_two_renames_goes_with_the_next_run(tmp_path, monkeypatch):
    """Where two paths cannot change places in one step."""
    write(plan("efgh"), tmp_path / "out")
    rename, renamed = os.replace, []

    def once(one: Path, other: Path) -> None:
        if renamed:
            raise Interrupted
        renamed.append(rename(one, other))

    with monkeypatch.context() as patch:
        patch.setattr("nemotune.files._exchange", lambda *paths: False)
        patch.setattr(os, "replace", once)
        with pytest.raises(Interrupted):
            write(plan(), tmp_path / "out", overwrite=True)
    assert listed(tmp_path) == [".out.old", ".out.partial"], "absent, and nothing is lost"
    made: list[str] = []
    write(plan(made=made), tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE and listed(tmp_path) == ["out"] and not made


def test_a_staging_that_its_owner_took_away_is_not_written_to(tmp_path, monkeypatch):
    """Between opening the journal and locking it, the process that had it may end and delete it."""
    lock = staging.fcntl.flock

    def ends(*args) -> None:
        shutil.rmtree(tmp_path / ".out.partial")
        lock(*args)

    monkeypatch.setattr(staging.fcntl, "flock", ends)
    with pytest.raises(ConflictError, match="another process"):
        write(plan(), tmp_path / "out")


@pytest.mark.parametrize("line", ["null", "[1, 2]", '["x", "3"]', '["x"]', "\\0\\0"])
def test_a_journal_of_something_else_counts_for_nothing(tmp_path, monkeypatch, line):
    monkeypatch.setattr(stream, "SYNC_BYTES", 1)
    with pytest.raises(Interrupted):
        write(plan(), tmp_path / "out", done=stop_after(10 * KB))
    journal = tmp_path / ".out.partial" / "journal"
    journal.write_text(journal.read_text().split("\n")[0] + f"\n{line}\n")
    write(plan(), tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE


def test_what_is_read_is_known_by_more_than_its_size_and_time(tmp_path):
    """Copies that keep their times: `cp -p`, rsync."""
    found = []
    for text in ("one", "two"):
        (tmp_path / "base").write_text(text)
        os.utime(tmp_path / "base", (1, 1))
        found.append(fingerprint(tmp_path / "base"))
        time.sleep(0.02)  # a file system's clock has ticks
    assert found[0] != found[1]


@pytest.mark.parametrize("replaces", [False, True])
def test_bytes_are_on_the_disk_before_the_journal_says_so_and_all_of_them_before_the_rename(tmp_path, monkeypatch, replaces):
    if replaces:
        write(plan("efgh"), tmp_path / "out")
    monkeypatch.setattr(stream, "SYNC_BYTES", 1)
    on_disk, fsync, note = {}, os.fsync, staging.Staging.note

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        found = os.fstat(descriptor)
        on_disk[found.st_ino] = found.st_size

    def noted(self, name: str, num_parts: int) -> None:
        assert not num_parts or on_disk[self.place[name].stat().st_ino] >= self.ends[name][num_parts - 1]
        note(self, name, num_parts)

    def placed(aside: Path, target: Path) -> None:
        found = [path.stat() for path in (aside, *aside.rglob("*"))]
        assert len(found) == 4 and all(on_disk.get(each.st_ino) == each.st_size for each in found)
        take_place(aside, target)
        assert target.parent.stat().st_ino in on_disk

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(staging.Staging, "note", noted)
    monkeypatch.setattr(stream, "take_place", placed)
    write(plan(), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == WHOLE


class Interrupted(BaseException):
    pass


def stop_after(num_bytes: int):
    """A `done` that stops the export when so many bytes are written."""
    left = num_bytes

    def done(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            raise Interrupted

    return done


def test_an_interrupted_export_goes_on_from_the_parts_that_are_on_the_disk(tmp_path, monkeypatch):
    """The first file is whole on the disk before the second begins."""
    monkeypatch.setattr(stream, "SYNC_BYTES", 3 * KB)
    with pytest.raises(Interrupted):
        write(plan(), tmp_path / "out", done=stop_after(10 * KB))
    assert not (tmp_path / "out").exists()
    made: list[str] = []
    told: list[int] = []
    write(plan(made=made), tmp_path / "out", done=told.append)
    assert contents(tmp_path / "out") == WHOLE and sum(told) == plan().num_bytes
    assert {"d0", "d1", "d2"} <= set(made) <= {"c0", "c1", "c2", "d0", "d1", "d2"}, "nothing that was on the disk is made again"


@pytest.mark.parametrize(
    "change", ["identity", "another version of nemotune", "a file that lost bytes", "a journal cut off in its first line"]
)
def test_staging_that_is_not_of_this_export_is_thrown_away(tmp_path, monkeypatch, change):
    monkeypatch.setattr(stream, "SYNC_BYTES", 3 * KB)
    with pytest.raises(Interrupted):
        write(plan("efgh"), tmp_path / "out", done=stop_after(10 * KB))
    partial = tmp_path / ".out.partial"
    if change == "a file that lost bytes":
        os.truncate(partial / "out" / "x", 100)
    elif change.startswith("a journal"):
        (partial / "journal").write_bytes((partial / "journal").read_bytes()[:10])
    elif "version" in change:
        monkeypatch.setattr(staging, "__version__", "0.0.0")
    write(plan(identity="another") if change == "identity" else plan(), tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE


def test_a_journal_cut_off_in_its_last_line_counts_up_to_there(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SYNC_BYTES", 1)
    with pytest.raises(Interrupted):
        write(plan(), tmp_path / "out", done=stop_after(10 * KB))
    journal = tmp_path / ".out.partial" / "journal"
    journal.write_bytes(journal.read_bytes()[:-4])
    made: list[str] = []
    write(plan(made=made), tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE and 3 <= len(made) < 12


def test_two_exports_to_one_target_do_not_mix(tmp_path):
    def second(directory: Path) -> str:
        with pytest.raises(ConflictError, match="another process writes there"):
            write(plan("efgh"), tmp_path / "out")
        return "first"

    assert write(plan(verify=second), tmp_path / "out") == "first"
    assert contents(tmp_path / "out") == WHOLE


def test_what_cannot_fit_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 11 * KB))
    with pytest.raises(DiskFullError, match="0.00 GB are needed"):
        write(plan(), tmp_path / "out", done=lambda _: pytest.fail("wrote"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_with_what_is_left_and_the_next_run_goes_on(tmp_path, monkeypatch):
    def full() -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "SYNC_BYTES", 1)
    broken = plan()
    broken = Plan(broken.identity, (broken.files[0], OutputFile("y", (part("c"), Part("d", 3, lambda: [full])))), broken.verify)
    with pytest.raises(DiskFullError, match=r"out: the disk is full; what is done lies in .*\.out\.partial"):
        write(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write(plan(), tmp_path / "out")
    assert contents(tmp_path / "out") == WHOLE


def test_memory_is_a_few_pieces(tmp_path):
    """Pieces that were made and not yet written are never more than the threads' and one."""
    made, written, most = [], [], 0

    def piece() -> bytes:
        nonlocal most
        made.append(1)
        most = max(most, len(made) - len(written))
        return b"x" * KB

    write(
        Plan({}, (OutputFile("x", (Part("p", 200 * KB, lambda: [piece] * 200),)),), lambda _: None), tmp_path / "out", done=written.append
    )
    assert len(written) == 201 and most <= 2 * stream.THREADS + 2  # one `done` for what was there before

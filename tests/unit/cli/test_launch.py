"""`nemotune launch` writes one file, once, and says what to type; with `--dry-run` it prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotune.cli.main import app
from nemotune.errors import ConflictError, RecipeError

KINDS = [("slurm", "quickstart.sbatch", "sbatch"), ("skypilot", "quickstart.sky.yaml", "sky jobs launch")]


@pytest.mark.parametrize(("kind", "name", "then"), KINDS)
def test_a_job_is_written_once_and_what_starts_it_is_said(
    kind: str, name: str, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["launch", kind, "quickstart", "parallel.nproc=4", "--nodes", "2", "--run-dir", "/storage/it"]
    printed = CliRunner().invoke(app, [*words, "--dry-run"])
    assert printed.exit_code == 0 and not Path(name).exists()
    done = CliRunner().invoke(app, words)
    assert done.output == f"Wrote {name}. Next: {then} {name}\n" and Path(name).read_text() == printed.output
    assert "--nnodes=2 --nproc-per-node=2" in printed.output and "/storage/it" in printed.output
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, ConflictError) and "--overwrite replaces it" in str(again.exception)
    assert CliRunner().invoke(app, [*words, "--overwrite", "--resume"]).exit_code == 0
    assert "parallel.nproc=4 --resume" in Path(name).read_text()


def test_a_job_that_cannot_be_is_refused_before_it_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["launch", "slurm", "quickstart", "parallel.nproc=4", "parallel.pipeline=4", "--nodes", "3"])
    assert isinstance(done.exception, RecipeError) and str(done.exception).startswith("--nodes: got 3")
    done = CliRunner().invoke(app, ["launch", "slurm", "quickstart", "parallel.nproc=16", "parallel.pipeline=16"])
    assert isinstance(done.exception, RecipeError) and str(done.exception).startswith("parallel.pipeline: got 16")
    assert list(tmp_path.iterdir()) == []

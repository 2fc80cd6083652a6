"""The parity tests on a GPU: the same tests, their models and tensors on the device.

    python -m benchmarks.gpu.parity [--device cuda] [WORDS OF PYTEST ...]

The tests name no device, so this run puts them on one: `OnDevice` sends what tests, transformers and PEFT create there (drawn on the CPU,
hence the same values), `load_model` loads there unless told otherwise. What nemotune creates stays where it says: a forgotten device is
found. fp32 products are fp32, not TF32. Runs tests/parity, and tests/gpu where there is one, unless words name other tests.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import nemotune
from benchmarks import harness
from nemotune.models import load_model

OURS = str(Path(nemotune.__file__).parent)
FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint, torch.randn,
    torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


class OnDevice(TorchFunctionMode):
    """Puts tensors that are created without a device on one, but for those that nemotune creates."""

    def __init__(self, device: str):
        super().__init__()
        self.target = torch.device(device)

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in FACTORIES and kwargs.get("device") is None and not any(isinstance(arg, Tensor) for arg in args):
            if inspect.currentframe().f_back.f_code.co_filename.startswith(OURS):  # type: ignore[union-attr]
                return function(*args, **kwargs)
            made = function(*args, **kwargs)
            return made.detach().to(self.target).requires_grad_(made.requires_grad)
        generator = kwargs.get("generator")
        if generator is not None and args and isinstance(args[0], Tensor) and args[0].device != generator.device:
            return args[0].copy_(
                function(torch.empty_like(args[0], device=generator.device), *args[1:], **kwargs)
            )  # tensor.normal_(generator=)
        return function(*args, **kwargs)


class Counts:
    """How the tests ended, for the results' file."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.outcome] += 1
        if report.outcome == "failed":
            self.failed.append(report.nodeid)


def main(argv: Sequence[str] | None = None) -> int:
    asked, words = _arguments(argv)
    names_tests = any(Path(word.split("::")[0]).exists() for word in words)
    tests = [] if names_tests else [name for name in ("tests/parity", "tests/gpu") if Path(name).is_dir()]
    assert load_model.__kwdefaults__ is not None
    load_model.__kwdefaults__["device"] = asked.device
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    counts = Counts()
    with OnDevice(asked.device):
        status = pytest.main(["-q", "-p", "no:cacheprovider", *tests, *words], plugins=[counts])
    name = torch.cuda.get_device_name() if asked.device == "cuda" else asked.device
    found = {"device": name, "figures": dict(counts.ended), "failed": counts.failed}
    print(f"wrote {harness.save('gpu.parity', found, packages=('torch', 'transformers'))}", file=sys.stderr)
    return int(status)


def _arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

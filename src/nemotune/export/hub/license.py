"""The licence of a base model, and what it asks of whoever publishes a model made from it.

The base's own README.md says which it is; where that is not at hand, NVIDIA's models are known by their names. Not legal advice: what the
licences ask is told in their own words, with a link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

__all__ = ["LICENSE_FILES", "Base", "License", "license_of"]

LICENSE_FILES = ("LICENSE*", "NOTICE*", "Notice*")
AGREEMENTS = "https://www.nvidia.com/en-us/agreements/enterprise-software/"
KNOWN = (  # the name of a base, and the licence of its card in November 2026: hub's id, name, link
    (r"NVIDIA-Nemotron-3-", ("other", "nvidia-nemotron-open-model-license", AGREEMENTS + "nvidia-nemotron-open-model-license/")),
    (r"(NVIDIA-Nemotron-Nano-|Llama-[\d._]+-Nemotron-)", ("other", "nvidia-open-model-license", AGREEMENTS + "nvidia-open-model-license/")),
    (r"Nemotron-H-", ("other", "nvidia-internal-scientific-research-and-development-model-license", None)),
    (r"nemotron-tiny$", ("mit", None, None)),
)  # fmt: skip
STATEMENTS = {  # what these licences want in a text file `Notice` beside the model
    "nvidia-open-model-license": "Licensed by NVIDIA Corporation under the NVIDIA Open Model License",
    "nvidia-nemotron-open-model-license": "Licensed by NVIDIA Corporation under the NVIDIA Nemotron Model License.",
}
LLAMA = re.compile(r"llama[-_]?3[._](\d)", re.IGNORECASE)  # 3.1, 3.2, 3.3: the licences differ in their number alone


@dataclass(frozen=True)
class License:
    """A licence as the hub names it, and the version of Llama that the base was made from, where it was from one."""

    id: str
    name: str | None = None
    link: str | None = None
    llama: str | None = None

    @property
    def title(self) -> str:
        return self.name or self.id

    @property
    def notice(self) -> str:
        """The text of the file `NOTICE`, or an empty string where none is asked for."""
        lines = [STATEMENTS[self.name]] if self.name in STATEMENTS else []
        if self.llama:
            community = f"Llama {self.llama} Community License"
            lines.append(f"Llama {self.llama} is licensed under the {community}, Copyright © Meta Platforms, Inc. All Rights Reserved.")
        return "".join(f"{line}\n" for line in lines)

    def owed(self, repo: str, *, has_license_file: bool) -> list[str]:
        """What is still for the user to do before a model of this licence is published as `repo`."""
        told = []
        if self.id == "unknown":
            told.append("license: the base names none in its README.md; ask its author before you publish what was made from it")
        if self.name in STATEMENTS and not has_license_file:
            told.append(f"LICENSE: {self.name} wants a copy of itself beside the model: save the text of {self.link} as LICENSE in the run")
        if self.llama and not repo.partition("/")[2].lower().startswith("llama"):
            told.append(
                f"--repo: the Llama {self.llama} Community License wants a model made from Llama to have a name that begins with Llama"
            )
        if self.name and "research" in self.name:
            told.append(f"license: {self.name} is for research and development; read whether it lets you publish this")
        return told


@dataclass(frozen=True)
class Base:
    """What a published model was made from, as others know it: its name, an id of the hub where `on_hub`; its files where they are at hand."""

    name: str
    on_hub: bool
    license: License
    directory: Path | None = None


def license_of(base: str, directory: Path | None) -> License:
    """The licence of the model `base`, from the files in its directory where that is at hand, else by its name."""
    readme = directory / "README.md" if directory else None
    found, llama = None, LLAMA.search(base)
    if readme and readme.is_file():
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        parents = " ".join(map(str, [data.base_model or "", data.license or "", data.license_name or ""]))
        llama = llama or LLAMA.search(parents)
        if isinstance(data.license, str):
            found = (data.license, data.license_name, _absolute(data.license_link, base))
    if found is None:
        name = base.rpartition("/")[2]
        found = next((known for pattern, known in KNOWN if re.match(pattern, name)), ("unknown", None, None))
    return License(*found, llama=f"3.{llama[1]}" if llama else None)


def _absolute(link: str | None, base: str) -> str | None:
    """A link that holds outside the base's repository too."""
    if link is None or "://" in link or base.count("/") != 1:
        return link
    return f"https://huggingface.co/{base}/blob/main/{link}"

"""A Modelfile for a GGUF file, such that Ollama asks the model in the words that it was tuned on.

Which prompts Ollama makes (0.30 and newer, read in its source): a `llama` file is asked by its own chat template, which llama.cpp renders.
`nemotron_h` and `nemotron_h_moe` files are always asked by one of Ollama's Nemotron renderers, whatever template they hold and whatever
TEMPLATE says; so one whose template is another is refused here. Templates are recognised by what they make of some conversations, not by their text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers.utils.chat_template_utils import render_jinja_template

from nemotune.data.chat_template import ON_A_ROW
from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf.names import architecture
from nemotune.export.gguf.plan import Verified, plan_gguf
from nemotune.export.gguf.tokenizer import stop_tokens
from nemotune.export.hub.license import LICENSE_FILES
from nemotune.export.stream import OutputFile, Plan
from nemotune.export.tuned import Tuned
from nemotune.files import read_json
from nemotune.models import load_tokenizer

MODELFILE, TEMPLATE = "Modelfile", "chat_template.jinja"
OLLAMA = "0.30.0"  # the first that runs GGUF files in llama.cpp, with their own template
NUM_CTX = 8192  # Ollama's own default cuts a conversation with tools; what the model could take at most may not fit in memory
STOP_KEYS = ("eos", "eot", "eom")
SAMPLING = ("temperature", "top_p", "top_k")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of some days",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Where"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "days"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}}
ASKED = {"role": "user", "content": "How warm is it in Oslo?"}
CALLED = {"role": "assistant", "content": "", "reasoning_content": "The tool knows.", "tool_calls": [CALL]}
TURNS = [ASKED, CALLED, {"role": "tool", "content": "[3, 4, 5]"}, {"role": "tool", "content": "{}"}]
# (messages, tools, thinking): without and with a system message, a turn with calls and results, an earlier turn whose thoughts are dropped.
PROBES: tuple[tuple[list[dict[str, Any]], list[dict[str, Any]], bool], ...] = (
    ([ASKED], [], True),
    ([{"role": "system", "content": "Be brief."}, ASKED], [TOOL], False),
    ([*TURNS], [TOOL], True),
    ([*TURNS, {"role": "assistant", "content": "Mild.", "reasoning_content": "4 on average."}, ASKED], [TOOL], False),
)
# Ollama's renderer (the parser bears the same name), by what the template that it follows makes of the probes (sha256), and its first version.
RENDERERS = {
    "38201d1d79fb74483e41462bd94389ba12f48605e16ca93afb99092a51f239d9": ("nemotron-3-nano", OLLAMA),
    "c8bc672483dff7373b3a6882aeaa17a57a969b19e5026b07169d17e70ae2ac85": ("nemotron-3.5-nano", "0.32.9"),
}


@dataclass(frozen=True)
class Served:
    """What Ollama would have to know of a GGUF file: architecture, chat template, the texts that end an answer, the longest context."""

    architecture: str
    template: str | None
    stops: tuple[str, ...]
    context_length: int


def plan_ollama(tuned: Tuned, kind: str, *, name: str | None = None) -> Plan[Verified]:
    """A directory of the GGUF file of type `kind` and its Modelfile. Raises UnsupportedError as `plan_gguf` does, and as `renderer_of`."""
    renderer_of(architecture(tuned.model.config), _chat_template(tuned), str(tuned.directory))
    gguf, file = plan_gguf(tuned, kind, name=name), f"model-{kind}.gguf"
    places = [directory for directory in (tuned.adapter_dir, tuned.directory) if directory is not None]

    def finish(directory: Path, ends: object) -> None:
        model = served(directory / file, ends=stop_tokens(*places))
        text = modelfile(model, source=f"./{file}", generation=_generation(places), license_text=_license(places))
        (directory / MODELFILE).write_text(text, encoding="utf-8")

    return Plan(
        {**gguf.identity, "format": "ollama"},
        (OutputFile(file, gguf.files[0].parts),),
        verify=lambda directory: gguf.verify(directory / file),
        finish=finish,
    )


def _chat_template(tuned: Tuned) -> str | None:
    """The one in the GGUF file: what stands beside the adapter, else the model's own."""
    own = tuned.adapter_dir and tuned.adapter_dir / TEMPLATE
    if own and own.is_file():
        return own.read_text(encoding="utf-8")
    found = load_tokenizer(tuned.directory).chat_template
    return found if isinstance(found, str) else None


def _generation(places: Sequence[Path]) -> dict[str, Any]:
    path = next((path for place in places if (path := place / "generation_config.json").is_file()), None)
    return read_json(path, remedy="copy it again") if path else {}


def _license(places: Sequence[Path]) -> str | None:
    found = next((files for place in places if (files := sorted(place.glob(LICENSE_FILES[0])))), [])
    return "\n\n".join(path.read_text(encoding="utf-8") for path in found) or None


def served(path: Path, *, ends: Sequence[int] = ()) -> Served:
    """Read from the file's header; `ends` are tokens that end an answer besides those that it names. Raises CheckpointError where it is no GGUF file."""
    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: not a GGUF file that can be read ({error}); `nemotune export gguf` makes one") from error
    if "tokenizer.ggml.tokens" not in fields:
        raise CheckpointError(f"{path}: no GGUF file of a model, but of an adapter or a part; `nemotune export gguf` makes one")
    architecture = fields["general.architecture"].contents()
    ids = [fields[key].contents() for stop in STOP_KEYS if (key := f"tokenizer.ggml.{stop}_token_id") in fields]
    tokens = fields["tokenizer.ggml.tokens"]
    template = fields.get("tokenizer.chat_template")
    return Served(
        architecture,
        template.contents() if template else None,
        tuple(dict.fromkeys(tokens.contents(index) for index in (*ids, *ends))),
        fields[f"{architecture}.context_length"].contents(),
    )


def renderer_of(architecture: str, template: str | None, name: str) -> tuple[str | None, str]:
    """Which of Ollama's renderers makes the prompts, None where the file's own template does, and the first version of Ollama that can.

    Raises UnsupportedError where Ollama would ask in other words than the template's; `name` is the model's or the file's.
    """
    server = "serve it with llama.cpp, which reads the template in the file: `llama-server --jinja -m FILE.gguf`"
    if template is None:
        raise UnsupportedError(
            f"{name}: has no chat template, so Ollama cannot know how it is asked; tune it with data.template=chatml, or {server}"
        )
    if not architecture.startswith("nemotron_h"):
        return None, OLLAMA
    found = RENDERERS.get(renderings(template) or "")
    if found is None:
        raise UnsupportedError(
            f"{name}: Ollama asks every {architecture} model by the template of NVIDIA's Nemotron-3 models and ignores any other; the one of this "
            f"model makes other prompts, so its answers would be others. Instead {server}"
        )
    return found


def is_asked_alike(path: Path) -> bool:
    """Whether Ollama, which finds the GGUF file on the hub, asks it by the template in it."""
    try:
        found = served(path)
        renderer_of(found.architecture, found.template, path.name)
    except (CheckpointError, UnsupportedError):
        return False
    return True


def renderings(template: str) -> str | None:
    """A hash of what the Jinja template makes of the probes; None where it cannot render them."""
    try:
        texts = [
            render_jinja_template(
                conversations=[messages], tools=tools or None, chat_template=template, add_generation_prompt=True, enable_thinking=thinking
            )[0][0]
            for messages, tools, thinking in PROBES
        ]
    except ON_A_ROW:
        return None
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def modelfile(model: Served, *, source: str, generation: Mapping[str, Any], license_text: str | None) -> str:
    """The text of the Modelfile; `source` is the GGUF file as FROM names it, `generation` the model's generation_config.json.

    Raises UnsupportedError for a template that Ollama would not follow, and for a licence that no Modelfile can quote.
    """
    renderer, version = renderer_of(model.architecture, model.template, source)
    lines = [f"FROM {source}"]
    if renderer:
        lines += [f"RENDERER {renderer}", f"PARSER {renderer}"]
    lines += [f"PARAMETER num_ctx {min(model.context_length, NUM_CTX)}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in model.stops]
    sampled = generation if generation.get("do_sample", True) else {"temperature": 0}
    lines += [f"PARAMETER {key} {sampled[key]:g}" for key in SAMPLING if sampled.get(key) is not None]
    if license_text is not None:
        if '"""' in license_text:
            raise UnsupportedError('LICENSE: holds """, which a Modelfile cannot quote; put the licence elsewhere')
        lines.append(f'LICENSE """{license_text}"""')
    return "\n".join([*lines, f"REQUIRES {version}"]) + "\n"

"""The verb `export hub`: what a run left, to a repository of the Hugging Face hub, with a card. How it is sent is in `nemotune.export.hub`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from huggingface_hub import HfApi, get_token
from rich.console import Console

from nemotune.data.progress import Clock
from nemotune.errors import MissingFileError, RecipeError
from nemotune.export.hub.card import AdapterLoads, check_card
from nemotune.export.hub.contents import Content, Kind, adapter_keys, kind_of, of_directory, refuse_private
from nemotune.export.hub.license import LICENSE_FILES, Base, license_of
from nemotune.export.hub.upload import Published, publish
from nemotune.export.ollama import is_asked_alike
from nemotune.lora.adapter import read_adapter
from nemotune.models import build_model, locate, read_config
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, size
from nemotune.workflow.model_card import card_of
from nemotune.workflow.run_dir import require_same_model

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
MADE_BY = {None: "train", "adapter": "train", "merged": "merge", "gguf": "export gguf"}  # the verb that leaves what --what names


def hub(
    recipe: Recipe, *, run_dir: Path, repo: str, what: str | None, base: str | None, private: bool, branch: str | None, overwrite: bool,
    dry_run: bool, console: Console, api: HfApi | None = None,
) -> None:  # fmt: skip
    """Publish what `run_dir` trained as `repo`; with `dry_run` say what would be sent, and send nothing."""
    if not REPO.fullmatch(repo):
        raise RecipeError(f"--repo: got '{repo}', expected OWNER/NAME in letters, digits, '.', '-' and '_'")
    if not (run_dir / "recipe.json").is_file():
        raise MissingFileError(f"{run_dir}: holds no recipe.json, expected the directory of a run; `nemotune run` makes one")
    require_same_model(recipe, run_dir)
    directory, of = _directory(recipe, run_dir, what), _base(recipe, base)
    kind, (contents, left_out) = kind_of(directory), of_directory(directory, base=of.name)
    if of.directory and directory == run_dir / "adapter":
        read_adapter(directory, build_model(read_config(of.directory)))  # every tensor there, finite and of its shape
    contents = _with_licence(contents, of, run_dir)
    adapter = AdapterLoads.of(adapter_keys(directory)) if kind == "adapter" else AdapterLoads()
    card, whose = _card(recipe, run_dir, directory, repo=repo, kind=kind, base=of, contents=contents, adapter=adapter)
    contents = [Content("README.md", card.encode()), *contents]
    secrets = [token] if (token := get_token()) else []
    refuse_private(contents, secrets=secrets, directories=(Path.home(), Path.cwd(), run_dir.resolve()))
    _tell(console, contents, left_out, repo=repo, private=private, whose=whose, base=of)
    if dry_run:
        console.print(f"\n{card}", markup=False, highlight=False, soft_wrap=True)
        say(console, f"would publish these {len(contents)} files as {repo}; nothing was sent")
        return
    message = f"{recipe.name}: {kind} from nemotune"
    done = publish(contents, repo, api=api or HfApi(), message=message, private=private, branch=branch, overwrite=overwrite, sent=_teller())
    _end(console, done, then=_next(kind, of, repo, adapter))


def _directory(recipe: Recipe, run_dir: Path, what: str | None) -> Path:
    """Where `what` lies; without one, what training left."""
    if recipe.method != "lora" and what == "adapter":
        raise RecipeError(f"--what: method: {recipe.method} leaves no adapter but a whole model; leave --what out")
    places = {
        None: [run_dir / ("adapter" if recipe.method == "lora" else "model")],
        "adapter": [run_dir / "adapter"],
        "merged": [run_dir / "export" / "merged" if recipe.method == "lora" else run_dir / "model"],
        "gguf": [path for path in (run_dir / "export" / "gguf", run_dir / "export") if any(path.glob("*.gguf"))],
    }
    candidates = places[what] if what in places else [Path(what or "")]
    if found := [path for path in candidates if path.is_dir()]:
        return found[0]
    remedy = (
        f"`nemotune {MADE_BY[what]} {quote(str(run_dir))}` makes it" if what in MADE_BY else "expected adapter, merged, gguf or a directory"
    )
    raise MissingFileError(f"--what: {(candidates or [run_dir / 'export' / '*.gguf'])[0]} is not there; {remedy}")


def _base(recipe: Recipe, given: str | None) -> Base:
    """The base as others know it: as `given`, by its id, or of a directory the last part of its path."""
    if given and not REPO.fullmatch(given):
        raise RecipeError(f"--base: got '{given}', expected OWNER/NAME of the base on the hub")
    name = given or recipe.model.path
    local = Path(name).expanduser()
    if not given and local.is_dir():
        cached = HUB_CACHE.search(f"{local.resolve()}/")
        name = f"{cached[1]}/{cached[2]}" if cached else local.resolve().name
    try:
        directory = locate(recipe.model.path, recipe.model.revision, weights=False)
    except MissingFileError:
        directory = None  # then its licence is known by its name, or told to be unknown
    return Base(name, bool(REPO.fullmatch(name)), license_of(name, directory), directory)


def _with_licence(contents: list[Content], base: Base, run_dir: Path) -> list[Content]:
    """With the licence's files: those beside what is published win, then the run's, then the base's; else the notice that it asks for."""
    found = {content.name: content for content in contents}
    for place in filter(None, (run_dir, base.directory)):
        for path in sorted({path for pattern in LICENSE_FILES for path in place.glob(pattern) if path.is_file()}):
            found.setdefault(path.name, Content(path.name, path))
    if base.license.notice and not any(name.lower().startswith("notice") for name in found):
        found["NOTICE"] = Content("NOTICE", base.license.notice.encode())
    return list(found.values())


def _card(
    recipe: Recipe, run_dir: Path, directory: Path, *, repo: str, kind: Kind, base: Base, contents: list[Content], adapter: AdapterLoads
) -> tuple[str, str]:  # fmt: skip
    """README.md, and whose it is: one that lies in the published directory or the run was written by a user, and wins."""
    for path in (directory / "README.md", run_dir / "README.md"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            check_card(text, str(path))
            return text, f"yours, {path}"
    files = [content.name for content in contents]
    in_ollama = kind == "gguf" and is_asked_alike(min(directory.glob("*.gguf")))
    card = card_of(recipe, run_dir, repo=repo, kind=kind, base=base, files=files, adapter=adapter, in_ollama=in_ollama)
    return card.render(), f"made from {run_dir}; a README.md of yours there would be sent in its place"


def _tell(
    console: Console, contents: list[Content], left_out: list[str], *, repo: str, private: bool, whose: str, base: Base
) -> None:  # fmt: skip
    """What would be sent, what not, and what the licence still wants."""
    say(
        console,
        f"{repo} ({'private' if private else 'public, where it is not there yet'}): {len(contents)} files, {size(sum(c.num_bytes for c in contents))}",
    )
    for content in contents:
        say(console, f"  {size(content.num_bytes):>9}  {content.name}" + (f"  ({whose})" if content.name == "README.md" else ""))
    if left_out:
        say(console, f"left out: {', '.join(left_out)}")
    has_text = any(content.name.upper().startswith("LICENSE") for content in contents)
    notes = base.license.owed(repo, has_license_file=has_text)
    if not base.on_hub:
        notes.append(f"model.path: {base.name} is no id of the hub, so the card links no base; --base OWNER/NAME names it")
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _teller() -> Callable[[Content, int], None]:
    """Prints a line on stderr for each large file that the hub has taken, with rate and time left; within a file the bars are huggingface_hub's."""
    console, clock, done = Console(stderr=True, soft_wrap=True, highlight=False), Clock(), 0

    def sent(content: Content, left: int) -> None:
        nonlocal done
        done += content.num_bytes
        rate = f"{size(done / clock.seconds)}/s, {clock.left(done=done, total=done + left)}"
        console.print(f"sent {content.name}, {size(content.num_bytes)}; {rate}", markup=False)

    return sent


def _next(kind: Kind, base: Base, repo: str, adapter: AdapterLoads) -> str:
    """What loads it; an adapter that vLLM does not take is fetched."""
    if kind == "adapter":
        loads = f"vllm serve {quote(base.name)} --enable-lora --lora-modules tuned={repo}"
        return f"hf download {repo}" if adapter.not_in_vllm else loads
    return f"vllm serve {repo}" if kind == "model" else f"llama-server -hf {repo} --jinja"


def _end(console: Console, done: Published, *, then: str) -> None:
    say(
        console,
        f"{len(done.sent)} files sent, {len(done.kept)} were there already; the hub lists them all with the bytes that they have here",
    )
    if done.others:
        say(console, f"the repository also holds, untouched: {', '.join(done.others)}")
    seen = "private" if done.private else "public"
    console.print(f"[green]published[/] {done.url} ({seen})   next: [bold]{then}[/]", soft_wrap=True, highlight=False)

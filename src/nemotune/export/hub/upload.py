"""Files to a repository of the hub, in one commit: absent until all of them are there, then whole and compared with the hub's own listing.

What the hub has already is not sent again. Each large file is uploaded by itself and stays with the hub once it is whole, in the commit or not:
a run that was cut off leaves the branch as it was, and the next one goes on behind the last whole file (with Xet storage, behind the last chunk).
`huggingface_hub` speaks to the hub (its own retries within a request, its bars); from here come the order, the patience between requests, the
comparison. The endpoint is that of HF_ENDPOINT.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile

from nemotune.errors import CheckpointError, ConflictError
from nemotune.export.hub.contents import Content
from nemotune.export.hub.refusals import is_passing, readable, seconds_asked_for

__all__ = ["Published", "publish"]

T = TypeVar("T")
PAUSES = (2.0, 8.0, 30.0)  # seconds before each further try of a request that huggingface_hub does not repeat itself
SMALL = 10 * 2**20  # bytes up to which files are sent together, with the commit
OF_THE_HUB = (".gitattributes",)
MAIN = "main"


@dataclass(frozen=True)
class Published:
    """Where it lies, what of it was sent now and what was there already, other files of the repository, and whether all can see it."""

    url: str
    sent: tuple[str, ...]
    kept: tuple[str, ...]
    others: tuple[str, ...]
    private: bool


def publish(
    contents: Sequence[Content], repo: str, *, api: HfApi, message: str, private: bool = False, branch: str | None = None, overwrite: bool = False,
    sent: Callable[[Content, int], None] = lambda content, left: None, wait: Callable[[float], None] = time.sleep,
) -> Published:  # fmt: skip
    """Make `repo` where it is not there, and its `branch` hold `contents`; `sent` is told each large file that the hub has taken, and the bytes left.

    Raises HubError, ConflictError where the repository is public and `private` asked for, or holds other files of these names and not
    `overwrite`, CheckpointError where what the hub lists afterwards is not what was sent.
    """
    with readable(repo, api):
        _patiently(api.whoami)
        info = _patiently(lambda: _made(api, repo, private))
        if branch not in (None, MAIN):
            _patiently(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        before = _patiently(lambda: _listing(api, repo, branch))
        missing = [content for content in contents if not _is_there(content, before)]
        if (changed := [content.name for content in missing if content.name in before]) and not overwrite:
            raise ConflictError(
                f"--repo: {repo} holds other files of the names {', '.join(changed)}; nothing was sent. "
                "--overwrite commits over them (the repository keeps its history), or name another repository"
            )
        if missing:
            _patiently(lambda: _send(contents, repo, api, branch=branch, message=message, sent=sent))
        after = _patiently(lambda: _listing(api, repo, branch))
    if wrong := [content.name for content in contents if not _is_there(content, after)]:
        raise CheckpointError(
            f"{repo}: lists {', '.join(wrong)} with other bytes than the files here; was one changed while it was sent, "
            "or left out by a .gitignore of the repository? The same command sends it again"
        )
    names = {content.name for content in contents}
    return Published(
        url=f"{api.endpoint}/{repo}" + (f"/tree/{branch}" if branch not in (None, MAIN) else ""),
        sent=tuple(content.name for content in missing),
        kept=tuple(content.name for content in contents if content not in missing),
        others=tuple(sorted(name for name in after if name not in names and name not in OF_THE_HUB)),
        private=bool(info.private),
    )


def _made(api: HfApi, repo: str, private: bool) -> ModelInfo:
    """The repository, made where it is not there. Raises ConflictError where it is public and `private` asked for."""
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private or None, exist_ok=True)
        info = api.model_info(repo)
    if private and not info.private:
        raise ConflictError(
            f"--private: {repo} is there and public; nothing was sent. Make it private in its settings on {api.endpoint}, or name another"
        )
    return info


def _listing(api: HfApi, repo: str, branch: str | None) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo, recursive=True, revision=branch)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _is_there(content: Content, listing: dict[str, RepoFile]) -> bool:
    """Whether the hub lists a file of the same name, size and sha256 (of small files: git's name of their bytes)."""
    found = listing.get(content.name)
    if found is None or found.size != content.num_bytes:
        return False
    return found.lfs.sha256 == content.sha256 if found.lfs else found.blob_id == content.git_id


def _send(
    contents: Sequence[Content], repo: str, api: HfApi, *, branch: str | None, message: str, sent: Callable[[Content, int], None]
) -> None:
    """Upload what the hub lacks and commit it. After a commit whose answer was lost there is nothing left to do."""
    listing = _listing(api, repo, branch)
    missing = [content for content in contents if not _is_there(content, listing)]
    left = sum(content.num_bytes for content in missing)
    additions = {content: CommitOperationAdd(content.name, content.source) for content in missing}
    for content, addition in additions.items():
        if content.num_bytes > SMALL:  # by itself, so that it stays with the hub when a later one is cut off
            api.preupload_lfs_files(repo, [addition], revision=branch, free_memory=False)
            left -= content.num_bytes
            sent(content, left)
    if additions:
        api.create_commit(repo, list(additions.values()), commit_message=message, revision=branch)


def _patiently(request: Callable[[], T]) -> T:
    """What `request` returns; where the hub is busy or lost it is tried again, after as long as the hub asks for."""
    for pause in PAUSES:
        try:
            return request()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(max(pause, seconds_asked_for(error)))
    return request()

"""What the hub or the way to it may answer in place of a yes: which of it passes, and the rest in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from nemotune.errors import HubError, NemotuneError

__all__ = ["is_passing", "readable", "seconds_asked_for"]

BUSY = (408, 425, 429, 500, 502, 503, 504)
GOES_ON = "The same command goes on: what the hub has already is not sent again"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens)"


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the hub is busy, or a connection was lost."""
    status = _status(error)
    return status in BUSY if status else any(isinstance(cause, HTTPError) for cause in _causes(error))


def seconds_asked_for(error: BaseException) -> float:
    """What the hub's `Retry-After` says; 0 where it says nothing."""
    answered = _answered(error)
    asked = answered.response.headers.get("Retry-After", "") if answered else ""
    return float(asked) if asked.isdigit() else 0.0


@contextmanager
def readable(repo: str, api: HfApi) -> Iterator[None]:
    """Make what `huggingface_hub` raises a HubError that says what to do."""
    try:
        yield
    except NemotuneError:
        raise
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError, ValueError, OSError) as error:
        raise HubError(_words(error, repo, api)) from error


def _words(error: BaseException, repo: str, api: HfApi) -> str:
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in _causes(error)):
        return f"no token: {api.endpoint} has to know who publishes {repo}; {LOG_IN}"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return "HF_HUB_OFFLINE is set, so nothing is published; unset it, or look with --dry-run"
    if answered := _answered(error):
        return _refusal(answered, repo, api)
    if any(isinstance(cause, HTTPError) for cause in _causes(error)):
        return f"{api.endpoint}: cannot be reached ({_first_line(error)}); check the network, HF_ENDPOINT and proxies. {GOES_ON}"
    return f"{repo}: was not published ({_first_line(error)}). {GOES_ON}"


def _refusal(error: HfHubHTTPError, repo: str, api: HfApi) -> str:
    """The hub's no, by its status."""
    status, said = error.response.status_code, error.server_message or _first_line(error)
    owner = repo.partition("/")[0]
    if status == 401:
        return f"token: {api.endpoint} does not know it ({said}); {LOG_IN}"
    if status in (402, 413, 507) or (status == 403 and any(word in said.lower() for word in ("quota", "storage", "limit"))):
        return f"{repo}: no room for it on the hub ({said}); free some storage of {owner}, or publish less (--what adapter)"
    if status == 403:
        return f"token: may not write to {repo} ({said}); use one with write permission for {owner}, or your own name before the slash"
    if status == 404:
        return f"--repo: {repo} is not on {api.endpoint}, or the token may not see it ({said}); check the owner's name and --revision"
    if status == 409:
        return f"--repo: {repo} is in the way ({said}); name another repository, or run again where someone else is writing to it"
    if status in BUSY:
        return f"{api.endpoint}: is busy or out of order ({status}: {said}); wait a little. {GOES_ON}"
    return f"{repo}: the hub refused it ({status}: {said})"


def _status(error: BaseException) -> int | None:
    answered = _answered(error)
    return answered.response.status_code if answered else None


def _answered(error: BaseException) -> HfHubHTTPError | None:
    return next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from: an upload's comes wrapped."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _first_line(error: BaseException) -> str:
    *_, root = _causes(error)
    return (str(root).strip() or type(root).__name__).splitlines()[0]

"""One repository on the Hugging Face Hub, and what can go wrong on the way there.

Every failure becomes one error that names the next step. The token is taken out of
whatever is shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from qlora_kit.boundaries import hide_secrets
from qlora_kit.errors import ConfigError, ExportError, OfflineError
from qlora_kit.messages import Setting

__all__ = ["HubSession", "PushedCommit"]

logger = logging.getLogger(__name__)

_ATTEMPTS: Final = 3
_FIRST_WAIT_SECONDS: Final = 1.0
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403

T = TypeVar("T")


@dataclass(frozen=True)
class PushedCommit:
    """A commit on the hub.

    Attributes:
        oid: Its hash.
        url: The model's page, or the pull request's.
        revision: Under which name its files are found.
    """

    oid: str
    url: str
    revision: str


@dataclass
class HubSession:
    """Pushes to one model repository.

    Args:
        repo_id: ``"name/model"``, or ``"model"`` in one's own name.
        token: ``None`` takes what ``hf auth login`` or ``HF_TOKEN`` left.
        endpoint: ``None`` takes ``HF_ENDPOINT``, by default huggingface.co.

    Raises:
        ConfigError: When the name or the token is malformed.
        OfflineError: When the hub's client is told to stay offline.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    endpoint: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ConfigError(
                f"repo_id must be 'name/model', got {self.repo_id!r}: {error}"
            ) from error
        if constants.is_offline_mode():
            raise OfflineError(
                f"Pushing to {self.repo_id} needs the network, and HF_HUB_OFFLINE (or "
                "TRANSFORMERS_OFFLINE) is set. Unset it and start again, or export to a folder "
                "now and push that later with `hf upload`."
            )
        token = self.token if self.token is not None else get_token()
        self.token = None if token is None else token.strip()
        if not self.token:
            raise ConfigError(
                "There is no token to push with.",
                advice=(
                    "Make one with write access at https://huggingface.co/settings/tokens and "
                    "pass ",
                    Setting("token", ..., "export_model"),
                    ", or run `hf auth login`.",
                ),
            )
        # As part of a header it would be quoted in the client's error.
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise ConfigError(
                "token holds spaces or characters that no token has. Copy it again from "
                "https://huggingface.co/settings/tokens."
            )
        _check_endpoint(self.endpoint or constants.ENDPOINT)
        self._api = HfApi(endpoint=self.endpoint, token=self.token, library_name="qlora_kit")
        self.endpoint = self._api.endpoint

    def check_token(self) -> str:
        """The account a token belongs to.

        Raises:
            ExportError: When the hub does not know it, or it may only read.
        """
        answer = self._call(self._api.whoami, f"Asking {self.endpoint} about the token")
        role = answer.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise ExportError(
                "The token may only read.",
                advice=(
                    f"Make one with write access at {self.endpoint}/settings/tokens, and pass it "
                    "as ",
                    Setting("token", ..., "export_model"),
                    " or run `hf auth login`.",
                ),
            )
        if "/" not in self.repo_id:
            self.repo_id = f"{answer['name']}/{self.repo_id}"
        return str(answer["name"])

    def check_visibility(self) -> None:
        """Refuse a repository that exists and is public, before any work.

        Raises:
            ExportError: When it is.
        """
        doing = f"Looking at the repository {self.repo_id}"
        if self._call(lambda: self._api.repo_exists(self.repo_id), doing):
            self._refuse_public(self._call(lambda: self._api.model_info(self.repo_id), doing))

    def open_repository(self, private: bool | None) -> bool:
        """Make the repository if it is not there.

        Args:
            private: ``None`` makes a new one private and accepts an existing one as it is.

        Returns:
            Whether it is private.

        Raises:
            ExportError: When ``private=True`` and it exists and is public.
        """
        made = self._call(
            lambda: self._api.create_repo(
                self.repo_id, private=private is not False, exist_ok=True
            ),
            f"Making the repository {self.repo_id}",
        )
        self.repo_id = made.repo_id
        info = self._call(
            lambda: self._api.model_info(self.repo_id), f"Looking at the repository {self.repo_id}"
        )
        if private:
            self._refuse_public(info)
        return bool(info.private)

    def _refuse_public(self, info: Any) -> None:
        if not info.private:
            raise ExportError(
                f"{self.repo_id} exists and is public, and ",
                Setting("private", True, "export_model"),
                " was asked for, so nothing was pushed. Make it private at "
                f"{self.endpoint}/{self.repo_id}/settings, give another repo_id, or leave private "
                "out to push to it as it is.",
            )

    def list_files(self) -> list[str]:
        """Names of the files on the main branch."""
        return list(
            self._call(
                lambda: self._api.list_repo_files(self.repo_id),
                f"Listing the files of {self.repo_id}",
            )
        )

    def push(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        extra: Mapping[str, bytes],
        delete: Sequence[str],
        message: str,
        create_pr: bool,
    ) -> PushedCommit:
        """Send files in one commit.

        A dropped connection is tried again; files that arrived are not sent twice.

        Args:
            folder: Where the files are.
            names: Their paths in it, and in the repository.
            extra: Further files, by path.
            delete: Paths to remove in the same commit.
            message: The commit's first line.
            create_pr: Open a pull request instead.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        for name in delete:
            logger.info("Removing %s from %s: the new files replace it.", name, self.repo_id)

        def send() -> Any:
            # Anew for each attempt: the client marks operations that it has used.
            files = [CommitOperationAdd(name, str(folder / name)) for name in names]
            return self._api.create_commit(
                self.repo_id,
                [
                    *files,
                    *(CommitOperationAdd(name, content) for name, content in extra.items()),
                    *(CommitOperationDelete(name) for name in delete),
                ],
                commit_message=message,
                create_pr=create_pr,
            )

        # A second pull request would be worse than an error.
        info = self._call(
            send, f"Pushing to {self.repo_id}", attempts=1 if create_pr else _ATTEMPTS
        )
        page = f"{self.endpoint}/{self.repo_id}"
        return PushedCommit(
            info.oid, info.pr_url if create_pr else page, info.pr_revision or info.oid
        )

    def confirm(self, sizes: Mapping[str, int], revision: str) -> None:
        """Compare what the repository holds with what was sent.

        Args:
            sizes: Size in bytes by path.
            revision: The commit or pull request.

        Raises:
            ExportError: When a file is missing there (a ``.gitignore`` keeps some out) or has
                another size.
        """
        found = {
            entry.path: getattr(entry, "size", None)
            for entry in self._call(
                lambda: self._api.get_paths_info(self.repo_id, list(sizes), revision=revision),
                f"Looking at what arrived in {self.repo_id}",
            )
        }
        wrong = sorted(name for name, size in sizes.items() if found.get(name) != size)
        if wrong:
            raise ExportError(
                f"{len(wrong)} of {len(sizes)} files did not arrive in {self.repo_id} as they "
                f"were sent, for example {wrong[0]}. Look at the repository's .gitignore, and push "
                "again."
            )

    def _call(self, call: Callable[[], T], doing: str, *, attempts: int = _ATTEMPTS) -> T:
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(1, attempts + 1):
            try:
                return call()
            # The client lets through what httpx, hf_xet and threads raise.
            except Exception as error:  # noqa: BLE001
                if attempt < attempts and _is_transient(error):
                    logger.warning("%s failed (%s); trying again.", doing, self._scrub(error))
                    time.sleep(wait)
                    wait *= 2
                    continue
                self._fail(error, doing)
        raise AssertionError("unreachable")

    def _fail(self, error: Exception, doing: str) -> None:
        status = _status_of(error)
        if status == _UNAUTHORIZED:
            text = (
                f"{doing} failed: the hub does not accept the token (401). Make one with write "
                f"access at {self.endpoint}/settings/tokens, and pass it as token=... or run "
                "`hf auth login`."
            )
        elif status == _FORBIDDEN:
            text = (
                f"{doing} failed: this token may not write there (403). Check the name in repo_id, "
                f"and at {self.endpoint}/settings/tokens what the token may do."
            )
        elif isinstance(error, ValueError):
            text = f"{doing} failed: {self._scrub(error)}"
        else:
            text = (
                f"{doing} failed: {self._scrub(error)} Everything goes into one commit, so the "
                "repository holds no part of it. Run the same call again: files that arrived are "
                "not sent twice."
            )
        # An error whose text holds the token is not shown as the cause either.
        if any(self._hide(_text_of(link)) != _text_of(link) for link in _chain(error)):
            raise ExportError(text) from None
        raise ExportError(text) from error

    def _scrub(self, error: BaseException) -> str:
        """An error and its causes in one line, without the token."""
        texts = dict.fromkeys(_text_of(link) for link in _chain(error))
        text = " ".join(" ".join(texts).split())
        return self._hide(text).rstrip(".") + "."

    def _hide(self, text: str) -> str:
        return hide_secrets(text.replace(str(self.token), "(token)"))


def _check_endpoint(endpoint: str) -> None:
    """Refuse what is no address, and one with credentials, without showing either."""
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            "endpoint must be an address such as 'https://huggingface.co', got "
            f"{hide_secrets(endpoint) if '@' not in endpoint else 'something else'!r}."
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"endpoint must be an address alone: {parts.scheme}://"
            f"{parts.hostname} came with credentials or a query, which links, logs and manifests "
            "would show. Give the token with ",
            Setting("token", ..., "export_model"),
            ".",
        )


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _status_of(error: BaseException) -> int | None:
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_transient(error: BaseException) -> bool:
    """Whether trying again may help: a lost connection, or a server in trouble."""
    status = _status_of(error)
    if status is not None:
        return status == 429 or status >= 500
    return not isinstance(error, ValueError | TypeError | KeyError)

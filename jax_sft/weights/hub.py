"""Uploads of model folders to the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id


class Failed(RuntimeError):
    """The upload to the hub failed."""


def check(repo: str, api: Any = None) -> None:
    """Check that an upload can succeed, before expensive work.

    Args:
        repo: "NAMESPACE/NAME".
        api: a huggingface_hub.HfApi; None = a new one, with the token that the hub's tools use.

    Raises:
        ValueError: the repository name is invalid, the user is not logged in, or the namespace is
            not one of the user's.
    """
    validate_repo_id(repo)
    namespace, slash, _ = repo.partition("/")
    if not slash:
        raise ValueError(f"{repo!r} is not NAMESPACE/NAME")
    try:
        user = (api or huggingface_hub.HfApi()).whoami()
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"the hub does not know who you are: run `hf auth login`, or set HF_TOKEN ({error})"
        ) from error
    names = [user["name"], *(org["name"] for org in user.get("orgs") or [])]
    if namespace not in names:
        raise ValueError(f"{user['name']} cannot write to {repo}: use one of {names}/...")


def push(folder: Path, repo: str, private: bool = True, api: Any = None) -> str:
    """Upload a folder as one commit, to a new or an existing repository.

    Args:
        private: whether a new repository is private; an existing one is not changed.

    Returns:
        URL of the upload.

    Raises:
        Failed: the hub refused the upload or cannot be reached; the folder is unchanged.
    """
    api = api or huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload of jax_sft"
        )
    except (HfHubHTTPError, OSError) as error:
        raise Failed(f"{folder} was written, but uploading to {repo} failed: {error}") from error
    return str(commit)

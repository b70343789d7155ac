"""Uploads of model folders to the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id


class Failed(RuntimeError):
    """The hub did not take it."""


def check(repo: str, api: Any = None) -> None:
    """Look whether an upload may succeed, before expensive work.

    Args:
        repo: "NAMESPACE/NAME".
        api: of huggingface_hub; None = a new one, with the token that the hub's own tools use.

    Raises:
        ValueError: no name of a repository, not logged in, or another's namespace.
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
    """Upload a folder as one commit, to a new repository or on top of what there is.

    Args:
        private: of a repository that is new; another stays as it is.

    Returns:
        Where it is.

    Raises:
        Failed: the hub, or the way to it, refused it; the folder is untouched.
    """
    api = api or huggingface_hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload of jax_sft"
        )
    except (HfHubHTTPError, OSError) as error:
        raise Failed(f"{folder} is complete, but {repo} did not take it: {error}") from error
    return str(commit)

"""The Hugging Face Hub: ids in the place of folders, and deltas that are pushed."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from deltacome.errors import DeltacomeError

HUB_ID = re.compile(r"\w[\w.-]*/\w(?:[\w.-]*\w)?", re.ASCII)
# What transformers raises where it cannot make a configuration, a model or a tokenizer of files.
UNFIT_FILES = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RecursionError, StrictDataclassError,
)  # fmt: skip


def name_of(source: str, folder: Path) -> str:
    """The hub id of what has been located, or the folder's name: nothing that only means something on this machine."""
    if not Path(source).exists():
        return source
    folder = folder.resolve()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return folder.name


def locate(source: str, *patterns: Sequence[str]) -> Path:
    """The local folder of a path or hub id; of the hub's files those of the first patterns that any weights match.

    Raises:
        DeltacomeError: if there is neither such a folder nor such a repository.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DeltacomeError(f"{source} is a file; give its folder")
    if not HUB_ID.fullmatch(source) or "--" in source or ".." in source:
        raise DeltacomeError(f"there is no folder {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        for wanted in patterns:
            folder = Path(snapshot_download(source, allow_patterns=list(wanted)))
            if any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
                break
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DeltacomeError(f"there is no folder {source}, and the hub does not give it: {reason}") from error


def push(folder: Path, files: Sequence[str], repository: str, *, private: bool) -> str:
    """Upload files of a folder to a repository, which is made if there is none.

    Returns:
        The commit's address.

    Raises:
        DeltacomeError: if the hub cannot be reached, or does not let us.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=made, folder_path=folder, allow_patterns=list(files), commit_message="Upload a compressed delta"
        )
    except MemoryError:
        raise
    except Exception as error:  # the hub's own errors, and those of whatever it makes its requests with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DeltacomeError(f"{repository} could not be pushed: {reason}") from error
    return str(commit.commit_url)

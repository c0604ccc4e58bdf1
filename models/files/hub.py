"""Download published pipelines from the Hugging Face hub: safetensors only, kept in the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import AntherError, summary
from models.files.loading import quiet_libraries


def is_repo_id(text: str) -> bool:
    """Return whether `text` has the form of a repository name, 'owner/name'."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def fetch(name: str) -> Path:
    """Return the folder of a pipeline, downloaded unless it is cached; offline, the cached one.

    The safety checker is not downloaded: it is tens of times larger than the trained network. The pipeline's index
    still records whether its authors require one.

    Raises:
        AntherError: the pipeline is neither available nor cached.
    """
    from diffusers import DiffusionPipeline  # slow import, so only here
    from huggingface_hub import snapshot_download

    try:
        with quiet_libraries():
            return Path(DiffusionPipeline.download(name, use_safetensors=True, safety_checker=None))
    except Exception as error:  # of the network, the hub, its license gates or its cache
        try:
            return Path(snapshot_download(name, local_files_only=True))  # diffusers doesn't try the cache offline
        except Exception:
            raise AntherError(
                f"{name}: no such folder, and not available from the hub either ({summary(error)}): "
                "name a pipeline's folder"
            ) from error

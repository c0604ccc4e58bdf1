"""Published pipelines by their name on the Hugging Face hub: safetensors only, kept in the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import AntherError, summary
from models.base.loading import quiet_libraries


def is_repo_id(text: str) -> bool:
    """Whether it may be a repository's name, 'owner/name'."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None


def fetch(name: str) -> Path:
    """The folder of a pipeline, fetched unless it is there; offline, what is there.

    The networks that check pictures are left out, tens of times the size of what is trained; that its makers want them
    is still known from its index.

    Raises:
        AntherError: it can't be had.
    """
    from diffusers import DiffusionPipeline  # slow import, so only here
    from huggingface_hub import snapshot_download

    try:
        with quiet_libraries():
            return Path(DiffusionPipeline.download(name, use_safetensors=True, safety_checker=None))
    except Exception as error:  # of the network, the hub, its licence gates or its cache
        try:
            return Path(snapshot_download(name, local_files_only=True))  # which diffusers doesn't ask, offline
        except Exception:
            raise AntherError(
                f"{name}: no such folder, and not to be had from the hub either ({summary(error)}): "
                "give a pipeline's folder"
            ) from error

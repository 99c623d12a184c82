"""Models from the Hugging Face hub, through huggingface_hub: its cache, offline mode and token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its httpx's
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve.errors import ModelError

# Weights in safetensors, and what the tokenizer may be read from.
FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.bpe",
)


@dataclass(frozen=True)
class HubConfig:
    """How to use the hub.

    revision: branch, tag or commit. cache_dir: None is huggingface_hub's own. offline: use the
    cache alone (so does HF_HUB_OFFLINE=1). token: for private models; None uses HF_TOKEN or the
    stored login.
    """

    revision: str | None = None
    cache_dir: str | None = None
    offline: bool = False
    token: str | None = field(default=None, repr=False)


def fetch(repo_id: str, config: HubConfig) -> Path:
    """The model's folder in the cache, downloaded where necessary.

    Raises ModelError saying why not.
    """
    at = f"hub model {repo_id!r}" + (f" at {config.revision!r}" if config.revision else "")
    try:
        folder = snapshot_download(
            repo_id,
            revision=config.revision,
            cache_dir=config.cache_dir,
            local_files_only=config.offline,
            token=config.token,
            allow_patterns=list(FILES),
        )
    except HFValidationError as error:
        raise ModelError(f"model {repo_id!r}: neither a folder nor a hub id: {error}") from None
    except GatedRepoError:
        raise ModelError(f"{at}: access is restricted; give a token that has it") from None
    except RevisionNotFoundError:
        raise ModelError(f"{at}: no such revision") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{at}: no such model, or it is private and needs a token") from None
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{at}: not in the cache, and the hub was not reached (offline, or no network): {error}"
        ) from None
    except (HTTPError, OSError) as error:
        raise ModelError(f"{at}: the download failed: {error}") from None
    return Path(folder)

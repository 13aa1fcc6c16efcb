"""Hub ids: what of a repository is fetched, and what a user reads when that fails. Uploads, private unless said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safecrit.errors import SafecritError

_FILES = (".safetensors", ".json", ".csv", ".jsonl", ".yaml")


def looks_local(name: str) -> bool:
    """Whether `name` cannot be a Hub id: a path by its look, or one that names a file."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith(_FILES)


def fetch(
    name: str,
    what: str,
    *,
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> Path:
    """The local snapshot of Hub repository `name` (downloaded when it is not in the cache), or of the files `patterns`.

    `what` says in messages what was looked for (`model folder`). Raises SafecritError
    where there is no such repository, where it is gated, or where the Hub is out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind = what.rsplit(" ", 1)[-1]
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns) if patterns else None,
                ignore_patterns=list(ignore) if ignore else None,
            )
        )
    except GatedRepoError as error:
        raise SafecritError(
            f"{name}: is gated. Accept its terms at https://huggingface.co/{name}, then run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise SafecritError(f"{name}: no such {kind}, and no Hub id either. Use a {kind} or owner/name.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SafecritError(
            f"{name}: no such {kind}, and it could not be fetched from the Hub ({type(error).__name__}). "
            "Check the name, the network and, for private repositories, `hf auth login`."
        ) from error


def find_file(given: str | Path, what: str) -> Path:
    """`given` where it exists or looks like a path, else the one `what` (`mask` or `delta`) of that Hub repository.

    Only files with that word in their name are fetched, so a repository may hold a
    model as well. Raises SafecritError where it holds none or several.
    """
    path = Path(given).expanduser()
    if path.exists() or looks_local(str(given)) or "/" not in str(given):
        return path
    folder = fetch(str(given), f"{what} file", patterns=[f"*{what}*.safetensors", f"*{what}*.safetensors.index.json"])
    found = sorted(folder.rglob(f"*{what}*.safetensors.index.json")) or sorted(folder.rglob(f"*{what}*.safetensors"))
    if len(found) != 1:
        names = ", ".join(str(file.relative_to(folder)) for file in found) or "none"
        raise SafecritError(f"{given}: holds no single {what} file (found: {names}). Download the one you mean.")
    return found[0]


def push(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Upload an output folder to the model repository `name`, made private unless `public`; its address.

    Left out are checkpoints, half-written files, and `config.yaml`, which names folders of
    this machine. A repository that exists keeps its visibility. Raises SafecritError where
    the Hub refuses.
    """
    from huggingface_hub import HfApi, errors

    # HTTPError is of the HTTP library that this version of the Hub's client uses; a refused connection is no OSError.
    failures: tuple[type[Exception], ...] = (errors.HTTPError, errors.LocalTokenNotFoundError, OSError)  # type: ignore[attr-defined]
    api = HfApi()
    try:
        made = api.create_repo(name, private=not public, exist_ok=True, repo_type="model")
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=str(folder),
            commit_message="Upload by safecrit",
            ignore_patterns=["safecrit/checkpoints/*", "safecrit/config.yaml", "safecrit/log.txt", ".*", "*/.*"],
        )
    except errors.HFValidationError as error:
        raise SafecritError(f"--push-to-hub {name}: is no repository name. Use owner/name.") from error
    except failures as error:
        raise SafecritError(
            f"--push-to-hub {name}: failed ({type(error).__name__}). The output in {folder} is whole. Check the "
            f"name, the network and `hf auth login`, then: hf upload {name} {folder}"
        ) from error
    return str(made)

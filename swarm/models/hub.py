"""Finds models on the Hugging Face hub and fetches only the files that hold tensors in demand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from swarm.datatypes import ModelHash
from swarm.errors import DownloadError, ModelFilesError, ModelNotFoundError
from swarm.models.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    explain_missing_weights,
    parse_index,
    read_weight_map,
)
from swarm.models.fingerprint import fingerprint, hash_files, write_atomically
from swarm.models.location import read_config_json
from swarm.models.progress import ProgressReporter

__all__ = ["HubModel", "locate_on_hub"]

logger = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 20.0
_SMALL_FILE_BYTES = 64 << 20
_SMALL_FILE_TYPES = (".json", ".txt", ".jinja", ".model")


@dataclass(frozen=True)
class HubModel:
    """One commit of a model on the hub, in the hub library's own cache."""

    repo: str
    commit: str
    hashes: Mapping[str, str | None]
    """Weight files, each with its SHA-256 if the hub tells it."""
    sizes: Mapping[str, int]
    """Length of each weight file in bytes."""
    folder: Path
    cache_dir: Path

    def identify(self, report: ProgressReporter) -> ModelHash:
        known = {name: sha256 for name, sha256 in self.hashes.items() if sha256 is not None}
        # Small files may be stored without a published hash; then only their content can tell.
        others = [name for name in self.hashes if name not in known]
        self._download(others, report)
        hashed = hash_files({name: self.folder / name for name in others}, self.cache_dir, report=report)
        return fingerprint(read_config_json(self.folder), {**known, **hashed})

    def fetch(self, wanted: Callable[[str], bool], report: ProgressReporter) -> Mapping[str, str]:
        if SINGLE_FILE in self.hashes:
            self._download([SINGLE_FILE], report)
        files_by_tensor = {name: file_name for name, file_name in self._weight_map.items() if wanted(name)}
        self._download(sorted(set(files_by_tensor.values())), report)
        return files_by_tensor

    @cached_property
    def _weight_map(self) -> Mapping[str, str]:
        return read_weight_map(self.folder)

    def _download(self, file_names: list[str], report: ProgressReporter) -> None:
        """Fetch weight files that are not there, and check them against the hash the hub published."""
        missing = [name for name in file_names if not (self.folder / name).exists()]
        if not missing:
            return
        report.start(f"fetching {self.repo}", sum(self.sizes.get(name, 0) for name in missing) or None, "bytes")
        for name in missing:
            _download_file(self.repo, self.commit, name, report)
        report.finish()
        expected = {name: self.hashes.get(name) for name in missing}
        paths = {name: self.folder / name for name in missing if expected[name] is not None}
        for name, sha256 in hash_files(paths, self.cache_dir, report=report).items():
            if sha256 != expected[name]:
                (self.folder / name).resolve().unlink(missing_ok=True)
                (self.folder / name).unlink(missing_ok=True)
                raise DownloadError(f"{name} of {self.repo} arrived damaged and was deleted; try again")


def locate_on_hub(repo: str, cache_dir: Path, report: ProgressReporter) -> HubModel:
    """Look a model up and fetch its small files (config, tokenizer, index).

    Without a connection, what was found the last time is used, if the files are still there.

    Raises:
        ModelNotFoundError: the hub has no such model, or does not show it to us.
        ModelFilesError: it has no safetensors weights.
        DownloadError: the hub can not be reached, and the cache can not help.
    """
    listing = _list_files(repo, cache_dir)
    names = [name for name, _ in listing.files.items()]
    if INDEX_FILE not in names and SINGLE_FILE not in names:
        raise ModelFilesError(explain_missing_weights(repo, names))
    if "config.json" not in names:
        raise ModelFilesError(f"{repo} has no config.json, so it is not a model in Hugging Face format")
    folder = _fetch_small_files(repo, listing, report)
    if SINGLE_FILE in names:
        weight_files = [SINGLE_FILE]
    else:
        index = folder / INDEX_FILE
        weight_files = sorted(set(parse_index(index.read_bytes(), where=f"{INDEX_FILE} of {repo}").values()))
    lacking = [name for name in weight_files if name not in listing.files]
    if lacking:
        raise ModelFilesError(f"{repo} lacks the file {lacking[0]} that its index names; its upload is incomplete")
    return HubModel(
        repo=repo,
        commit=listing.commit,
        hashes={name: listing.files[name].sha256 for name in weight_files},
        sizes={name: listing.files[name].size_bytes for name in weight_files},
        folder=folder,
        cache_dir=cache_dir,
    )


@dataclass(frozen=True, kw_only=True)
class _HubFile:
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The files of one commit."""

    commit: str
    files: Mapping[str, _HubFile]


def _list_files(repo: str, cache_dir: Path) -> _Listing:
    """Ask the hub, or remember what it said the last time."""
    memory = cache_dir / "hub" / f"{repo.replace('/', '--')}.json"
    try:
        with _hub_errors(repo):
            listing = _ask_hub(repo)
    except DownloadError:
        remembered = _recall_listing(memory)
        if remembered is None:
            raise
        logger.warning("the hub can not be reached; using %s as it was found the last time", repo)
        return remembered
    record = {name: [file.size_bytes, file.sha256] for name, file in listing.files.items()}
    write_atomically(memory, json.dumps({"commit": listing.commit, "files": record}).encode())
    return listing


def _ask_hub(repo: str) -> _Listing:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, files_metadata=True, timeout=_REQUEST_TIMEOUT_S)
    if not info.sha:
        raise DownloadError(f"the hub did not say which version of {repo} it has; try again later")
    files = {
        file.rfilename: _HubFile(size_bytes=file.size or 0, sha256=file.lfs.sha256 if file.lfs is not None else None)
        for file in info.siblings or []
    }
    return _Listing(commit=info.sha, files=files)


def _recall_listing(memory: Path) -> _Listing | None:
    try:
        record = json.loads(memory.read_bytes())
        files = {name: _HubFile(size_bytes=size, sha256=sha256) for name, (size, sha256) in record["files"].items()}
        return _Listing(commit=record["commit"], files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fetch_small_files(repo: str, listing: _Listing, report: ProgressReporter) -> Path:
    """Fetch everything that is neither weights nor in a subfolder; the folder of the commit."""
    names = [
        name
        for name, file in listing.files.items()
        if "/" not in name and name.endswith(_SMALL_FILE_TYPES) and file.size_bytes <= _SMALL_FILE_BYTES
    ]
    paths = {name: _cached_path(repo, listing.commit, name) for name in names}
    missing = [name for name in names if paths[name] is None]
    if missing:
        report.start(f"fetching {repo}", sum(listing.files[name].size_bytes for name in missing) or None, "bytes")
        for name in missing:
            paths[name] = _download_file(repo, listing.commit, name, report)
        report.finish()
    config = paths["config.json"]
    assert config is not None
    return config.parent


def _cached_path(repo: str, commit: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, name, revision=commit)
    return Path(path) if isinstance(path, str) else None


def _download_file(repo: str, commit: str, name: str, report: ProgressReporter) -> Path:
    """One file, continued where an earlier attempt broke off."""
    from huggingface_hub import hf_hub_download
    from tqdm.std import tqdm

    class ReportingBar(tqdm):  # type: ignore[type-arg]
        """The hub library shows progress through a tqdm class; this one passes it on instead."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            if kwargs.get("initial"):
                report.advance(int(kwargs["initial"]))

        def update(self, n: float | None = 1) -> bool | None:
            report.advance(int(n or 0))
            return None

    with _hub_errors(repo):
        return Path(hf_hub_download(repo, name, revision=commit, tqdm_class=ReportingBar))


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Translate what the hub library raises."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo} is only given to people who accepted its terms: accept them on its hub page, "
            "then log in here with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no model {repo}, or it is private; check the name, or log in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        causes: tuple[BaseException | None, ...] = (error, error.__cause__, error.__context__)
        if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
            raise DownloadError(
                f"{repo} is not completely in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it to download"
            ) from error
        raise DownloadError(_unreachable(repo, error)) from error
    except errors.EntryNotFoundError as error:
        raise ModelFilesError(f"{repo} lacks a file that its listing names; try again") from error
    except (DownloadError, ModelFilesError):
        raise
    except Exception as error:  # the HTTP library underneath has changed before, and with it its errors
        raise DownloadError(_unreachable(repo, error)) from error


def _unreachable(repo: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{repo} could not be fetched from the hub ({reason}); check the network connection and try again"

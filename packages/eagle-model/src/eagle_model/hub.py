"""Checkpoints by name: a local folder, a GGUF file, or a model on the Hugging Face hub. Nothing here imports torch or transformers."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

#: Options of transformers' `from_pretrained` that say where files come from.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
#: What is downloaded of a model on the hub: configuration, weights, tokenizer and processor.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def checkpoint_folder(name: str | Path) -> Path:
    """The local folder of a checkpoint: `name` itself, or the download of a model on the Hugging Face hub (its cache when offline).

    A file that ends in `.gguf`, or a folder that holds one such file and no `config.json`, gives the path of that file.
    Raises FileNotFoundError, saying whether a folder, the model on the hub or the network is missing.
    """
    folder = Path(name)
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if folder.suffix == ".gguf" and not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no such file; check the path of the GGUF file")
    if folder.is_dir():
        files = sorted(folder.glob("*.gguf"))
        return files[0] if len(files) == 1 and not (folder / "config.json").is_file() else folder
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}; check the path, or name a model on the Hugging Face hub (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(f"{name} is neither a folder here nor a model that the Hugging Face hub shows to you") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is not a folder here, is not in the Hugging Face cache, and the hub cannot be reached from this machine "
            f"({type(error).__name__}); fetch it where there is a network with: hf download {name} --local-dir FOLDER, and name that folder"
        ) from error

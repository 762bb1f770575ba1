"""Long-context training of vision-language models: configuration, data, planning, loading, training, evaluation, runs, and `eagle`.

The Python API; everything is imported at first use:

    config = load_config("my-run.yaml", ["stages.0.lr=1e-5"])
    prepare(config)
    print([(schedule.stage.name, schedule.steps) for schedule in plan(config)])
    train(config)
    export(config, "model")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from eagle_train.api import evaluate, export, plan, prepare, train
    from eagle_train.config import Config, ConfigError, load_config
    from eagle_train.errors import TrainError

_MODULES = {
    "Config": "config",
    "ConfigError": "config",
    "TrainError": "errors",
    "evaluate": "api",
    "export": "api",
    "load_config": "config",
    "plan": "api",
    "prepare": "api",
    "train": "api",
}

__all__ = ["Config", "ConfigError", "TrainError", "evaluate", "export", "load_config", "plan", "prepare", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'eagle_train' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"eagle_train.{_MODULES[name]}"), name)

"""One YAML file says everything about a run; this package checks it, completes it and explains it."""

from .load import ConfigError, Default, apply_overrides, dump_config, explain_defaults, load_config, parse_config
from .schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LimitsConfig,
    LoaderConfig,
    ModelConfig,
    ParallelConfig,
    PromptConfig,
    RunConfig,
    SamplingConfig,
    Source,
    StageConfig,
    TilingConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Default",
    "EvalConfig",
    "LimitsConfig",
    "LoaderConfig",
    "ModelConfig",
    "ParallelConfig",
    "PromptConfig",
    "RunConfig",
    "SamplingConfig",
    "Source",
    "StageConfig",
    "TilingConfig",
    "apply_overrides",
    "dump_config",
    "explain_defaults",
    "load_config",
    "parse_config",
]

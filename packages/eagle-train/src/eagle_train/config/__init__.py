"""The configuration of a run, one YAML file: its schema, and how it is read, checked and completed."""

from .evaluation import EvalConfig, JudgeConfig, TrackerConfig
from .load import ConfigError, Default, apply_overrides, dump_config, explain_defaults, load_config, parse_config
from .model import LoraConfig, ModelConfig
from .schema import CheckpointConfig, Config, LoaderConfig, ParallelConfig, RunConfig
from .sources import DataConfig, HubDataset, LimitsConfig, RemoteConfig, Source
from .stages import MixtureConfig, PartConfig, StageConfig
from .visual import PromptConfig, SamplingConfig, TilingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Default",
    "EvalConfig",
    "HubDataset",
    "JudgeConfig",
    "LimitsConfig",
    "LoaderConfig",
    "LoraConfig",
    "MixtureConfig",
    "ModelConfig",
    "ParallelConfig",
    "PartConfig",
    "PromptConfig",
    "RemoteConfig",
    "RunConfig",
    "SamplingConfig",
    "Source",
    "StageConfig",
    "TilingConfig",
    "TrackerConfig",
    "apply_overrides",
    "dump_config",
    "explain_defaults",
    "load_config",
    "parse_config",
]

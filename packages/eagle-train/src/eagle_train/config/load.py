"""From a file and `--set a.b=c` to a checked `Config`, with errors that name the key and the nearest known one."""

import copy
import difflib
import typing
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from eagle_train.errors import WRONG_USE, TrainError

from .addresses import scheme_of
from .schema import Config
from .section import Section, is_hub_name

SectionT = TypeVar("SectionT", bound=Section)


class ConfigError(TrainError, ValueError):
    """A configuration that cannot be used: which file, which key, why, and the nearest known key."""

    exit_code = WRONG_USE
    on_every_rank = True


class Default(NamedTuple):
    """One value that the file does not set."""

    path: str
    value: Any
    description: str


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML itself would keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML or JSON file; raises ConfigError, with the line, when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except IsADirectoryError as error:
        inside = path / "config.yaml"  # of a run
        what = f"that of the run in it is {inside}" if inside.is_file() else "give a YAML file"
        raise ConfigError(f"{path}: is a folder, not a file; {what}") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except ValueError as error:  # text in the form of a date or a number that does not exist
        raise ConfigError(f"{path}: not valid YAML: {error}; quote a value that is text") from error


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read, override, check and complete a configuration.

    Args:
        path: YAML file; None starts from an empty one. Relative paths inside are relative to the file's folder.
        overrides: `a.b=c` in order, values as in YAML; a list is indexed by number or by its items' name (`stages.long.lr=1e-5`).

    Raises:
        ConfigError: naming the file, the key, why, and the nearest known key.
    """
    if path is None:
        return parse_config({}, overrides, base=Path.cwd(), origin="configuration")
    path = Path(path)
    content = read_yaml(path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__} where sections (run:, model:, data:, ...) are expected")
    return parse_config(content, overrides, base=path.resolve().parent, origin=str(path))


def parse_config(
    content: dict[str, Any], overrides: Sequence[str] = (), *, base: Path | None = None, origin: str = "configuration"
) -> Config:
    """Check a configuration that is already a dictionary; `base` is the folder that relative paths start from."""
    content = apply_overrides(content, overrides)
    # Sections that the file doesn't have are validated too: their paths are resolved like all others.
    sections = {name: {} for name, field in Config.model_fields.items() if _is_section(field.annotation)}
    folder = base or Path.cwd()
    try:
        return Config.model_validate(sections | content, context={"resolve": lambda path: folder / path.expanduser()})
    except ValidationError as error:
        raise ConfigError(describe_errors(error, Config, origin)) from None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `content` with every `a.b=c` set; raises ConfigError for one that is not of that form."""
    content = copy.deepcopy(content)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set stages.0.lr=1e-5")
        try:
            value = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML ({error})") from error
        _set(content, key.strip().split("."), value, override)
    return content


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        here = ".".join(keys[:depth]) or "the top"
        if isinstance(node, list):
            index = _list_index(node, key)
            if index is None:
                names = [str(item["name"]) for item in node if isinstance(item, dict) and "name" in item]
                named = f" named {', '.join(names)}" if names else ""
                raise ConfigError(f"--set {override!r}: {here} has {len(node)} items{named}, none is {key!r}")
            if last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = _default_container(keys[: depth + 1])
                node = node[key]
        else:
            raise ConfigError(f"--set {override!r}: {here} is the value {node!r}, which has no key {key!r}")


def _list_index(items: list[Any], key: str) -> int | None:
    if key.lstrip("-").isdigit():
        index = int(key)
        return index if -len(items) <= index < len(items) else None
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == key:
            return index
    return None


def _default_container(path: list[str]) -> Any:
    """What an override changes where the file does not set it: the default list (stages), else an empty mapping."""
    if path == ["stages"]:
        return [{"name": stage.name, "max_tokens": stage.max_tokens} for stage in Config().stages]
    return {}


def describe_errors(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    """A pydantic error as lines `file: key: what is wrong; the nearest known key`."""
    lines = []
    for item in error.errors(include_url=False):
        location = item["loc"]
        path = ".".join(str(part) for part in location) or "the file"
        if item["type"] == "extra_forbidden":
            known = _keys_at(model, location[:-1])
            lines.append(f"{origin}: unknown key {path!r}{nearest(str(location[-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: {path} is missing; it has no default")
        elif item["type"] == "value_error":
            what = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
            lines.append(f"{origin}: {path}: {what}" if location else f"{origin}: {what}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{origin}: {path}: {message} (got {_short(item['input'])})")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(key: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or the list of known keys when none is near."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        lowered = {name.lower().replace("_", ""): name for name in known}
        close = [
            lowered[name]
            for name in difflib.get_close_matches(key.lower().replace("_", "").replace("-", ""), list(lowered), n=1, cutoff=0.5)
        ]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(sorted(known))}" if known else ""


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    kind: Any = model
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            if field is None:
                return []
            kind = field.annotation
        elif typing.get_origin(kind) in (list, dict):
            kind = typing.get_args(kind)[-1]
        else:
            return []
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def map_paths(section: SectionT, change: Callable[[Path], Path]) -> SectionT:
    """A copy of a configuration (or section) with every path changed; fields count as set by the user where they did before."""
    values: dict[str, Any] = {}
    for name, value in section:
        if isinstance(value, Section):
            values[name] = map_paths(value, change)
        elif isinstance(value, dict) and all(isinstance(item, Section) for item in value.values()):
            values[name] = {key: map_paths(item, change) for key, item in value.items()}
        elif name in section.paths and value is not None and not (name in section.names and is_hub_name(str(value))):
            one = [_changed(path, change) for path in value] if isinstance(value, list) else _changed(value, change)
            values[name] = one if isinstance(value, Path | list) else str(one)
    return section.replaced(**values)


def _changed(value: Any, change: Callable[[Path], Path]) -> Any:
    """A path changed; an address, and a dataset of the hub, as it is."""
    return value if isinstance(value, Section) or scheme_of(value) else change(Path(value))


def free_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields and sections that may change when a run is resumed."""
    for name, field in section.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("resume") == "free":
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from free_keys(field.annotation, f"{prefix}{name}.")


def explain_defaults(config: Config) -> list[Default]:
    """Every value that the file does not set: dotted path, value and description, in the order of the schema."""
    return list(_defaults(config, ""))


def _defaults(section: BaseModel, prefix: str) -> Iterator[Default]:
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from _defaults(value, path + ".")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            given = name in section.model_fields_set
            for index, item in enumerate(value):
                if not given:
                    yield Default(f"{path}.{index}", f"{item.name} ({item.max_tokens} tokens)", field.description or "")
                yield from _defaults(item, f"{path}.{index}.") if given else ()
        elif isinstance(value, dict) and value and isinstance(next(iter(value.values())), BaseModel):
            for key, item in value.items():
                yield from _defaults(item, f"{path}.{key}.")
        elif name not in section.model_fields_set:
            yield Default(path, value, field.description or "")


def dump_config(config: Config) -> str:
    """The complete configuration as YAML, with all defaults; loading it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

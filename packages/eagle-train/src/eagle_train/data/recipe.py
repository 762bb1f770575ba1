"""Recipes: which annotation files are read, how often each row is shown, and where its media are.

Two spellings. Ours is YAML: `sources: {name: {annotation, root, columns, repeat_time, weight, ...}}`, or the same mapping
without `sources:`. The originals' is JSON, `{name: {"root", "annotation", "repeat_time", "length", ...}}`, and loads unchanged:
what their own tools left in it for themselves is either checked (`length`) or reported as left aside (`Recipe.notes`).
Relative paths start from the recipe's folder and, where nothing is found there, from the current directory (the originals'
recipes count from where training is started).
"""

import glob
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from eagle_train.config import Config, ConfigError, Source
from eagle_train.config.load import describe_errors, nearest, read_yaml

from . import remote
from .unique_keys import RepeatedKeyError, unique

# Keys of the originals' recipes that change nothing here, and why; anything else unknown is an error.
_LEFT_ASIDE = {
    "modility": "kinds of media are read from the rows",
    "modality": "kinds of media are read from the rows",
    "id": "sources are known by name",
    "dataset_name": "sources are known by name",
}


class Recipe(NamedTuple):
    """Sources by name in the recipe's order; `lengths` are the row counts a recipe claims; `notes` say what was left aside."""

    sources: dict[str, Source]
    lengths: dict[str, int]
    notes: tuple[str, ...]


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file (YAML or the originals' JSON); raises ConfigError naming file, key and the nearest right key."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        content = _read_json(path)
    else:
        content = read_yaml(path)
    if isinstance(content, dict) and isinstance(content.get("sources"), dict) and "annotation" not in content["sources"]:
        extra = [key for key in content if key != "sources"]
        if extra:
            raise ConfigError(f"{path}: unknown key {extra[0]!r} next to 'sources'{nearest(extra[0], ['sources'])}")
        content = content["sources"]
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{path}: holds no sources; a recipe is a mapping of names to {{annotation: ..., root: ...}}")
    return parse_recipe(content, base=path.resolve().parent, origin=str(path))


def parse_recipe(content: Mapping[str, Any], *, base: Path, origin: str) -> Recipe:
    """Check a recipe that is already a mapping of source names to entries."""
    sources, lengths, notes = {}, {}, []
    for name, entry in content.items():
        where = f"{origin}: {name}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: is {entry!r}, expected a mapping with 'annotation'")
        entry = dict(entry)
        if isinstance(entry.get("length"), int) and not isinstance(entry["length"], bool):
            lengths[str(name)] = entry.pop("length")
        for key in [key for key in entry if key in _LEFT_ASIDE]:
            notes.append(f"{where}: {key} = {entry.pop(key)!r} is left aside: {_LEFT_ASIDE[key]}")
        if "data_augment" in entry and entry.pop("data_augment"):
            raise ConfigError(f"{where}: data_augment asks for augmented pixels, which do not exist here; remove the key or say false")
        if "max_dynamic_patch" in entry:  # InternVL's spelling of the same number
            if "max_dynamic_tiles" in entry:
                raise ConfigError(f"{where}: max_dynamic_patch and max_dynamic_tiles both say how many tiles; keep one")
            entry["max_dynamic_tiles"] = entry.pop("max_dynamic_patch")
        if entry.get("root") == "":
            del entry["root"]
        try:
            source = Source.model_validate(entry, context={"resolve": lambda path: resolve(path, base)})
        except ValidationError as error:
            raise ConfigError(describe_errors(error, Source, where)) from None
        sources[str(name)] = source
    return Recipe(sources, lengths, tuple(notes))


def recipe_of(config: Config, *, evaluation: bool = False) -> Recipe:
    """The run's training (or held-out) sources, from the recipe file or from the configuration itself.

    Raises ConfigError when there are none to train on, or when a stage weighs a source that doesn't exist.
    """
    remote.enable(config.data.remote)  # from here on sources are read, by address too
    path = config.data.eval_recipe if evaluation else config.data.recipe
    sources = config.data.eval_sources if evaluation else config.data.sources
    recipe = load_recipe(path) if path is not None else Recipe(dict(sources), {}, ())
    if not evaluation:
        if not recipe.sources:
            raise ConfigError("data: neither recipe nor sources is given, there is nothing to train on; name a recipe file in data.recipe")
        for index, stage in enumerate(config.stages):
            for name in stage.source_weights or ():
                if name not in recipe.sources:
                    key = "sources" if stage.mixture is None else "mixture"
                    raise ConfigError(f"stages.{index}.{key}: no source is called {name!r}{nearest(name, list(recipe.sources))}")
    for name, source in recipe.sources.items():
        _check_root(name, source)
        for path in source.annotation if isinstance(source.annotation, list) else [source.annotation]:
            if isinstance(path, Path) and not there(path):
                kind = "pattern" if is_pattern(path) else "file"
                what = "matches no file" if is_pattern(path) else "does not exist"
                raise ConfigError(f"source {name}: annotation {kind} {path} {what}; check the recipe's paths")
    return recipe


def _check_root(name: str, source: Source) -> None:
    """Raises ConfigError for a root that is an LMDB or a tar file: rows name what is inside of these themselves."""
    root = source.root
    if not isinstance(root, Path) or not (root.is_file() or (root / "data.mdb").is_file()):
        return
    in_tar = root.is_file() and tarfile.is_tarfile(root)
    row = {"tar": str(root), "member": "1.jpg"} if in_tar else {"lmdb_file": str(root), "lmdb_key": "1.jpg"}
    raise ConfigError(
        f"source {name}: root {root} is not a folder of media; rows name an image inside of it as {json.dumps(row)}, and root is left away"
    )


def resolve(path: Path, base: Path) -> Path:
    """`path` from `base`, or from the current directory when only there something exists."""
    path = path.expanduser()
    here = base / path
    if not there(here) and there(path):
        return path.absolute()
    return here


def there(path: Path) -> bool:
    """Whether a path exists, or a pattern matches something."""
    return path.exists() or (is_pattern(path) and any(glob.iglob(str(path), recursive=True)))


def is_pattern(path: Path) -> bool:
    """Whether a path has wildcards and isn't itself the name of something."""
    return any(character in str(path) for character in "*?[") and not path.exists()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error}); check the path") from error
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error

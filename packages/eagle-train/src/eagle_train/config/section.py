"""What all sections of the configuration have in common: numbers with units, paths, and the base class."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from .addresses import scheme_of

# Names of runs and stages are folders: no dot in front, which would hide them, or be the folder itself or the one above.
FOLDER_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TOKEN_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _with_unit(units: dict[str, int], what: str) -> BeforeValidator:
    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in units:
            names = ", ".join(unit for unit in units if unit)
            raise ValueError(f"{value!r} is not a number of {what}; write a whole number, or one with a unit of: {names}")
        try:
            return round(float(match[1]) * units[match[2].lower()])
        except OverflowError:
            raise ValueError(f"{value!r} is not a number of {what}: it is too large") from None

    return BeforeValidator(parse)


Bytes = Annotated[int, _with_unit(_BYTE_UNITS, "bytes"), Field(ge=1)]
"""A number of bytes; `512MiB` and `2GB` are understood."""
Tokens = Annotated[int, _with_unit(_TOKEN_UNITS, "tokens"), Field(ge=1)]
"""A number of tokens; `32K` is 32768."""


FREE: Any = {"resume": "free"}
"""Marks a field, or a section, that may change when a run is resumed: it says how the run is executed, not what is computed."""


class Section(BaseModel):
    """A section of the file: immutable, closed (no unknown keys), all numbers finite, defaults checked like given values.

    `paths` names the fields that are paths. They are resolved during validation by the function `resolve` of the validation context.
    `names` are those among them that can also be names on the Hugging Face hub, which stay as they are unless such a folder exists.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=False)
    paths: ClassVar[tuple[str, ...]] = ()
    names: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="after")
    @classmethod
    def _resolve(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or info.field_name not in cls.paths or not info.context:
            return value
        resolve = info.context["resolve"]
        if isinstance(value, list):
            return [one if isinstance(one, Section) or scheme_of(one) else resolve(Path(one)) for one in value]
        if isinstance(value, Section) or scheme_of(value):
            return value
        resolved = resolve(Path(value))
        if info.field_name in cls.names and is_hub_name(str(value)) and not resolved.exists():
            return value
        return resolved if isinstance(value, Path) else str(resolved)

    def replaced(self, **values: Any) -> Self:
        """A new section with other (valid) values, which count as chosen by the user only where the old ones did."""
        return self.model_construct(_fields_set=set(self.model_fields_set), **({**self.__dict__} | values))


def is_hub_name(value: str) -> bool:
    """Whether a value has the form of a name on the Hugging Face hub: `owner/name`, not a path that starts with `.`, `/` or `~`, nor a GGUF
    file."""
    form = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*", value)
    return form is not None and not value.endswith(".gguf")

"""Addresses of remote files in configurations and rows: how they differ from paths, and that they carry no credentials."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SECRET = re.compile(
    r"(^|[-_])(signature|sig|credential|token|secret|password|passwd|apikey|key|accesskeyid|awsaccesskeyid)$", re.IGNORECASE
)
"""Names of query parameters that carry credentials: `X-Amz-Signature`, `sig`, `access_token`, `AWSAccessKeyId`."""


def scheme_of(value: object) -> str | None:
    """`s3` of `s3://bucket/key`, in lower case; None for a path, and for `file://`, which is one."""
    found = _SCHEME.match(value) if isinstance(value, str) else None
    return found[1].lower() if found and found[1].lower() != "file" else None


def secret_in(address: str) -> str | None:
    """What in an address is a credential, by its name and without its value; None when there is none."""
    parts = urlsplit(address)
    if "@" in parts.netloc and scheme_of(address) != "hf":
        return "a user name or password in front of the host"
    return next((f"the parameter {name}" for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)), None)


def without_secrets(address: str) -> str:
    """The address without user, password and parameters, for messages."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def join(root: str, name: str) -> str:
    """The address of a file below the address `root`; `name` is relative, as the file is called (`cat 1.jpg`)."""
    scheme, _, rest = root.partition("://")
    if scheme.lower() in ("http", "https"):
        name = quote(name)
    return f"{scheme}://{posixpath.normpath(f'{rest}/{name}')}"


def parent(address: str) -> str:
    """The folder of an address."""
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{posixpath.dirname(rest.partition('?')[0])}"


def is_pattern(address: str) -> bool:
    """Whether an address has wildcards; a question mark of http begins parameters."""
    wild = "*[" if scheme_of(address) in ("http", "https") else "*?["
    return any(character in address for character in wild)


def fixed_part(address: str) -> str:
    """What comes before the first part of a pattern that has a wildcard."""
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    stop = next((place for place, part in enumerate(parts) if any(character in part for character in "*?[")), len(parts))
    return f"{scheme}://{'/'.join(parts[:stop])}"


def _place(value: Any) -> Path | str:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("expected a path or an address")
    if scheme_of(value) is None:
        return Path(value)
    if (secret := secret_in(value)) is not None:
        raise ValueError(
            f"{without_secrets(value)} carries credentials ({secret}), which would be written into the run folder; leave them to the "
            "environment's standard places (AWS_*, ~/.aws, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ~/.netrc)"
        )
    return value


Place = Annotated[Path | str, PlainValidator(_place), PlainSerializer(str, return_type=str), WithJsonSchema({"type": "string"})]
"""A path, or an address as text."""

"""Oldest and newest releases of the dependencies that all tests pass with: `.ci/lowest.txt`, and what `.ci/run` last resolved as newest."""

TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.15.0"),
    "triton": ("3.6.0", "3.9.0"),
    "transformers": ("5.17.0", "5.24.0"),
    "numpy": ("2.3.5", "2.5.5"),
    "pillow": ("11.3.0", "13.0.0"),
    "av": ("18.0.0", "19.0.2"),
    "lmdb": ("1.5.1", "3.0.0"),
    "pyarrow": ("18.0.0", "26.0.1"),
    "pydantic": ("2.12.3", "2.14.4"),
    "typer": ("0.29.0", "0.29.2"),
    "safetensors": ("0.8.0", "0.8.0"),
}

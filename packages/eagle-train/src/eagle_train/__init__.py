"""Long-context training of vision-language models: recipes, preparation, planning, packing, stages, trainer, CLI."""

__version__ = "0.1.0"

#: A command and its rooms (`eagle_train.config`, `.data`, `.planning`, `.training`); nothing is imported before it is asked for.
__all__ = ["__version__"]

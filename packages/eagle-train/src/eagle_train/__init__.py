"""Long-context training of vision-language models: recipes, preparation, planning, packing, stages, trainer, CLI."""

__version__ = "0.1.0"

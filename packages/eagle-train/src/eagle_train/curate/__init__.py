"""Curation: from videos to a recipe, in five steps (split, embed, select, annotate, check), each a Parquet file that the next one reads."""

"""From facts to plans: which tiles and frames a stage's budget buys, which samples share a pack, in which order packs are trained."""

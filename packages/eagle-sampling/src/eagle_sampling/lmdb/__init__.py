"""Images in LMDB files: reading (`store`), building and checking (`build`), and what a build reads (`sources`)."""

"""`python -m eagle_train.cli`, which is what torchrun starts."""

from .main import main

if __name__ == "__main__":
    main()

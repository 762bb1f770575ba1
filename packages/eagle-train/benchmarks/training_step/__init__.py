"""Parts of `step.py`: inputs and models, what is measured of a step, and the cases that use them."""

"""Bytes of the 8-bit copies that products of `eagle_kernels.ops.float8` make, next to what backward of a layer has without them.

A product has both of its factors in 8 bits while it runs. Scales, one float32 number for each row or column, are left out.
"""


def mlp_backward(tokens: int, hidden: int, intermediate: int, itemsize: int, weight_gradients: int, *, rebuilt: bool) -> int:
    """Most bytes that backward of `float8_mlp` has at once, without its input and the gradients of input and output.

    itemsize: of an activation. weight_gradients: bytes of the gradients of its three weights. rebuilt: gate and up are computed again.
    """
    inner, weight, state = tokens * intermediate, hidden * intermediate, tokens * hidden
    gate_and_up = 2 * inner * itemsize if rebuilt else 0
    return max(
        # The gradient of the activation: its own, the rounded gradient of the output, a rounded weight.
        gate_and_up + inner * itemsize + state + weight,
        # Gradients of gate and up, and the activation; the two gradients are rounded in the same pass.
        gate_and_up + 3 * inner * itemsize + 2 * inner,
        # The gradient of the input is a sum of two products.
        3 * inner * itemsize + 2 * inner + weight + state * itemsize,
        # Gradients of weights: the rounded input and one rounded gradient at a time.
        3 * inner * itemsize + inner + state + weight_gradients,
    )


def linears_backward(tokens: int, inputs: int, outputs: int, itemsize: int) -> int:
    """Bytes that backward of `float8_linears` has in addition: a rounded input and gradients, or a rounded weight and another product.

    outputs: of all layers with this input together.
    """
    return max(tokens * (inputs + outputs), inputs * outputs + tokens * inputs * itemsize + tokens * outputs)

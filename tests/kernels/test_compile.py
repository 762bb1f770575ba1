"""torch.compile(fullgraph=True) traces every operator as one node, and the registered operators obey their schemas."""

import torch

from eagle_kernels import add_rms_norm, gelu_linear, linear_cross_entropy, rms_norm, rope, swiglu, swiglu_mlp


def block(x, residual, norm, q, k, positions, inv_freq, w_gate, w_up, w_down, head, labels, denominator):
    """One of everything."""
    hidden, residual = add_rms_norm(residual, x, norm)
    q, k = rope(q, k, positions, inv_freq)
    hidden = hidden + swiglu(q, q + 1).flatten(1) + k.sum()
    hidden = residual + swiglu_mlp(rms_norm(hidden, norm), w_gate, w_up, w_down, rows=8)
    hidden = gelu_linear(hidden, w_gate[: hidden.shape[1]], None)
    return linear_cross_entropy(hidden, head, labels, denominator=denominator, num_kept=labels.shape[0])


def inputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    tokens, hidden, inner, vocab = 20, 32, 48, 50
    shapes = {"x": (tokens, hidden), "residual": (tokens, hidden), "norm": (hidden,), "q": (tokens, 2, 16), "k": (tokens, 1, 16)}
    weights = {"w_gate": (inner, hidden), "w_up": (inner, hidden), "w_down": (hidden, inner), "head": (vocab, hidden)}
    made = {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name, shape in (shapes | weights).items()}
    rest = {"positions": torch.arange(tokens, device=device), "inv_freq": torch.rand(8, device=device)}
    last = {"labels": torch.randint(0, vocab, (tokens,), device=device), "denominator": torch.tensor(20.0, device=device)}
    order = ["x", "residual", "norm", "q", "k", "positions", "inv_freq", "w_gate", "w_up", "w_down", "head", "labels", "denominator"]
    return [(made | rest | last)[name] for name in order]


def test_fullgraph_equals_eager(device, relative_error):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arguments = inputs(device, dtype)
    leaves = [x for x in arguments if x.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for function in (block, compiled):
        loss = function(*arguments)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for eager, graph in zip(*results):
        assert relative_error(graph, eager) < (2e-2 if device == "cuda" else 1e-5)


def test_operators_obey_their_schemas(device):
    x, weight = torch.randn(5, 16, device=device), torch.randn(16, device=device)
    ops = torch.ops.eagle_kernels
    q, k = torch.randn(5, 2, 16, device=device), torch.randn(5, 1, 16, device=device)
    positions, inv_freq = torch.arange(5, device=device), torch.rand(8, device=device)
    head, labels = torch.randn(9, 16, device=device), torch.randint(0, 9, (5,), device=device)
    one = torch.ones((), device=device)
    calls = [
        (ops.rms_norm_forward, (x, x.clone(), weight, 1e-6)),
        (ops.rms_norm_backward, (x, None, x.clone(), weight, torch.ones(5, device=device), torch.float32)),
        (ops.rope, (q, k, positions, inv_freq, False)),
        (ops.rope_, (q, k, positions, inv_freq, True)),
        (ops.swiglu_forward, (x, x.clone())),
        (ops.swiglu_backward, (x, x.clone(), x.clone(), True)),
        (ops.linear_cross_entropy_forward, (x, head, labels, None, one, 0.1, 1e-3, -100, 5, True, True)),
        (ops.scaled, (x, one, None, torch.float16)),
        (ops.scale_, (x.clone(), one * 2, one)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))

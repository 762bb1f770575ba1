"""Selective activation checkpointing of the model: the same gradients to the bit, the bytes that the plan says, nothing computed twice."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen3Config

from eagle_cp import ContextMesh, Layout
from eagle_kernels import Kept, plan_memory, use_implementation
from eagle_model import EagleConfig
from eagle_model.lora import add_lora, quantize
from eagle_model.memory import decoder_shape, vision_shape
from tests.support.interpreter import interpret
from tests.support.live import LiveBytes
from tests.support.models import TEXT, assert_same_bits, loss_and_gradients, tiny_config, tiny_model
from tests.support.packs import image_pack, make_pack
from tests.support.ranks import run_on_ranks

TOKENS, TILES, LAYERS = 64, 2, 3
KEPT = [Kept(), Kept(1), Kept(3), Kept(3, 1), Kept(3, 3), Kept(3, 2, 1), Kept(3, 3, 3)]
#: With and without QK-norm, biases, grouped heads, and heads that add up to the hidden size.
FAMILIES = {
    "qwen2": None,
    "qwen3": lambda sizes: Qwen3Config(**sizes, head_dim=16),
    "llama": lambda sizes: LlamaConfig(**(sizes | {"num_key_value_heads": 4}), attention_bias=True, mlp_bias=True),
}


def make(family="qwen2", **text):
    sizes = {"num_hidden_layers": LAYERS, **text}
    config = tiny_config(text_config=dict(sizes))
    if FAMILIES[family] is not None:
        config = EagleConfig(**(config.to_dict() | {"text_config": FAMILIES[family](TEXT | sizes).to_dict()}))
    return tiny_model(config).train()


def pack(lengths=(40, 24)):
    return image_pack(lengths, tiles=TILES)


def step(model, mode, kept=None, vision_kept=None, *, layout=None, batch=None):
    model.set_activation_checkpointing(mode, kept=kept, vision_kept=vision_kept)
    return loss_and_gradients(model, pack() if batch is None else batch, layout=layout)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_keep_and_recompute_to_the_bit(family, dtype):
    model = make(family).to(dtype)
    expected = step(model, "keep")
    assert len(expected[1]) == len(list(model.parameters()))
    assert_same_bits(step(model, "recompute"), expected)
    for kept in KEPT:
        assert_same_bits(step(model, "selective", kept, Kept(kept.attention, kept.mlp, 0)), expected)
    assert_same_bits(step(model, "selective"), expected)


@pytest.mark.parametrize("bits", [False, pytest.param(True, marks=pytest.mark.integration)])
def test_adapters_and_weights_in_four_bits(bits):
    if bits:
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = make(hidden_size=64)
    model.requires_grad_(False)
    for part in ("vision", "language"):
        add_lora(model, part, rank=2, alpha=4.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    if bits:
        quantize(model, "language")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    expected = step(model, "keep")
    assert len(expected[1]) == 2 * 6 * 3 + 2 * 7 * LAYERS
    for kept in KEPT:
        assert_same_bits(step(model, "selective", kept, kept), expected)


@pytest.mark.parametrize("frozen", ["vision", "language"])
def test_frozen_parts(frozen):
    model = make()
    model.parts()[frozen].requires_grad_(False)
    expected = step(model, "keep")
    for kept in (Kept(), Kept(2, 1), Kept.all(LAYERS)):
        assert_same_bits(step(model, "selective", kept, kept), expected)


def test_eager_attention_of_the_vision_tower():
    model = make()
    model.config.vision_config._attn_implementation = "eager"
    expected = step(model, "keep")
    for kept in KEPT:
        assert_same_bits(step(model, "selective", kept, kept), expected)


def live_after_forward(model, mode, **kept):
    model.set_activation_checkpointing(mode, **kept)
    with LiveBytes() as live:
        loss = model(pack()).loss
        alive = live.now
        loss.backward()
    model.zero_grad(set_to_none=True)
    return alive


@pytest.mark.parametrize("family", list(FAMILIES))
def test_kept_bytes_are_those_of_the_plan(family):
    model = make(family)
    decoder, tower = decoder_shape(model.config), vision_shape(model.config, TILES * model.tokens_per_tile)
    least = live_after_forward(model, "recompute")
    for kept in KEPT:
        more = sum(decoder.kept(kept.level(i, LAYERS), TOKENS, 4) - decoder.kept(0, TOKENS, 4) for i in range(LAYERS))
        assert live_after_forward(model, "selective", kept=kept, vision_kept=Kept()) - least == more, kept
        more = tower.kept(48, 4, kept)["vision checkpoints"] - tower.kept(48, 4)["vision checkpoints"]
        assert live_after_forward(model, "selective", kept=Kept(), vision_kept=kept) - least == more, kept


def test_inputs_of_layers_are_all_that_recompute_keeps():
    """A layer more is an input more."""
    sizes = [live_after_forward(make(num_hidden_layers=layers), "recompute") for layers in (2, 3)]
    assert sizes[1] - sizes[0] == decoder_shape(make().config).kept(0, TOKENS, 4)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("vision_kept", [Kept(), Kept(3, 1), None])
@pytest.mark.parametrize("mode", ["selective", "offload"])
def test_groups_of_tiles(group, vision_kept, mode):
    """Tower and connector keep pixels; products of fewer rows add up to the same gradients, to the bit in a single group."""
    model, tiles = make().double(), 5
    ids = torch.cat([torch.full((4 * tiles,), 100), torch.arange(30)])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (tiles, 32, 32, 3), dtype=torch.uint8, generator=generator)
    batch = make_pack(ids, tiles=pixels, targets=ids.roll(-1).clamp(max=99), denominator=50.0)
    expected = step(model, "keep", batch=batch)
    model.zero_grad(set_to_none=True)
    alive = {}
    for grouped in (None, group):
        model.zero_grad(set_to_none=True)
        model.set_activation_checkpointing(mode, vision_kept=vision_kept, vision_group=grouped)
        with LiveBytes() as live:
            loss = model(batch).loss
            alive[grouped] = live.now
            loss.backward()
    for name, gradient in expected[1].items():
        got = model.get_parameter(name).grad
        if group >= tiles:
            assert torch.equal(got, gradient), name
        torch.testing.assert_close(got, gradient, atol=1e-12, rtol=1e-9, msg=name)
    tower = vision_shape(model.config, tiles * 4)
    kept = Kept() if vision_kept is None else vision_kept
    if mode == "offload":
        kept = Kept()
    elif vision_kept is None:
        kept = Kept.all(3)
    by_layers, by_groups = (sum(tower.kept(48, 8, kept, grouped=grouped).values()) for grouped in (False, True))
    assert alive[None] - alive[group] == pytest.approx(by_layers - by_groups, rel=0.05)


def groups_in_bfloat16():
    """Errors of the tower's gradients with FSDP2 in bfloat16 against float64, by tiles of a group (0: no groups)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tiles, found, exact = 24, {}, None
    ids = torch.cat([torch.full((4 * tiles,), 100), torch.arange(30)])
    pixels = torch.randint(0, 256, (tiles, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = make_pack(ids, tiles=pixels, targets=ids.roll(-1).clamp(max=99), denominator=50.0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for group in (None, 0, 1):
        torch.manual_seed(0)
        model = make().bfloat16()
        if group is None:
            model = model.double()
        else:
            for block in model.blocks():
                fully_shard(block, mp_policy=policy)
            fully_shard(model, mp_policy=policy, reshard_after_forward=False)
        model.set_activation_checkpointing(
            "selective", kept=Kept(), vision_kept=Kept(), vision_group=1 if group == "each" else group or None
        )
        for _ in range(2):  # the second step finds gradients and flags as the first one left them
            model(batch).loss.backward()
        whole = {
            name: (one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad).double()
            for name, one in model.named_parameters()
            if one.grad is not None and "encoder" in name and not name.endswith("k_proj.bias")  # which is zero
        }
        exact = exact or whole
        found[group] = {name: ((grad - exact[name]).norm() / exact[name].norm()).item() for name, grad in whole.items()}
    return found


def test_groups_in_bfloat16_lose_nothing():
    (found,) = run_on_ranks(1, groups_in_bfloat16)
    assert found[0].keys() == found[1].keys() == found[None].keys()
    mean = {group: sum(errors.values()) / len(errors) for group, errors in found.items()}
    assert mean[1] < mean[0], mean


class Counted(TorchDispatchMode):
    """Calls of matrix products and attention kernels."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.products += name in ("aten::mm", "aten::addmm")
        self.attentions += name == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


def counted_backward(model, *arguments, **options):
    model.set_activation_checkpointing(*arguments, **options)
    loss = model(pack((TOKENS,))).loss
    with Counted() as counted:
        loss.backward()
    return counted.products, counted.attentions


def test_what_is_kept_is_not_computed_again():
    model = make()
    products, attentions = counted_backward(model, "keep")
    assert attentions == 0
    for kept in KEPT:
        # Decoder: q, k, v and o below `projections`, gate and up below `mlp`; down never. Tower: q, k, v and out; fc1; fc2 never.
        twice = 4 * (LAYERS - kept.projections) + 2 * (LAYERS - kept.mlp)
        found = counted_backward(model, "selective", kept=kept, vision_kept=Kept.all(3))
        assert found == (products + twice, LAYERS - kept.attention), kept
        twice = 4 * (3 - kept.projections) + 1 * (3 - kept.mlp)
        found = counted_backward(model, "selective", kept=Kept.all(LAYERS), vision_kept=kept)
        assert found == (products + twice, 3 - kept.attention), kept


# ---- several ranks ---------------------------------------------------------------------------------------------------------------


def split_step(model, ulysses, kepts):
    """For each choice: loss, gradients, collectives of forward and of backward."""
    size = dist.get_world_size()
    mesh = ContextMesh.from_device_mesh(dist.init_device_mesh("cpu", (size // ulysses, ulysses), mesh_dim_names=("all_gather", "ulysses")))
    whole = pack((TOKENS,))
    layout = Layout.build(whole.cu_seqlens, mesh, num_heads=4, num_kv_heads=2)
    batch = whole.shard(layout, model.tokens_per_tile)
    batch = replace(batch, tiles=batch.tiles[batch.tile_plan.first : batch.tile_plan.last])
    decoder = decoder_shape(model.config)
    found = []
    for mode, kept in [("keep", None), ("recompute", None), *(("selective", kept) for kept in kepts)]:
        model.zero_grad(set_to_none=True)
        model.set_activation_checkpointing(mode, kept=kept)
        for group in mesh.groups():
            group.record = []
        with LiveBytes() as live:
            loss = model(batch, layout=layout).loss
            alive = live.settled()
            forward = sum(len(group.record) for group in mesh.groups())
            loss.backward()
        backward = sum(len(group.record) for group in mesh.groups()) - forward
        levels = [] if kept is None else [kept.level(index, LAYERS) for index in range(LAYERS)]
        planned = sum(decoder.kept(level, layout.local, 4, exchanged=ulysses > 1) for level in levels)
        gradients = {name: one.grad.numpy().copy() for name, one in model.named_parameters()}
        found.append((loss.item(), gradients, forward, backward, alive, planned))
    return found


@pytest.mark.parametrize("ulysses", [1, 2], ids=["all_gather", "ulysses"])
def test_context_parallel_ranks_repeat_no_collective(ulysses):
    kepts = [Kept(3), Kept(3, 3), Kept(3, 2, 1)]
    for rank in run_on_ranks(2, split_step, make(), ulysses, kepts):
        (loss, gradients, forward, backward, *_), recomputed, *others = rank
        for other in (recomputed, *others):
            assert other[0] == loss
            assert all((other[1][name] == gradients[name]).all() for name in gradients)
            assert other[2] == forward
        # Attention is computed again with its collectives: forward's without the exchange of features, once a layer at least.
        assert recomputed[3] >= backward + LAYERS
        assert [other[3] for other in others] == [backward] * len(kepts)
        alive = [other[4] - others[0][4] for other in others]
        assert alive == [other[5] - others[0][5] for other in others]


def sharded_steps(model, kepts):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.blocks():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    found = []
    for mode, kept in [("keep", None), ("recompute", None), *(("selective", kept) for kept in kepts)]:
        loss, gradients = step(model, mode, kept, kept)
        found.append((loss, {name: gradient.full_tensor().numpy() for name, gradient in gradients.items()}))
    return found


def test_sharded_ranks():
    """FSDP2 in bfloat16, weights freed between forward and backward."""
    kepts = [Kept(3), Kept(3, 2, 1), Kept(3, 3, 3)]
    for expected, *others in run_on_ranks(2, sharded_steps, make(), kepts):
        assert len(others) == 1 + len(kepts)
        for loss, gradients in others:
            assert loss == expected[0]
            assert all((gradients[name] == expected[1][name]).all() for name in expected[1])


# ---- kernels of GPUs, in Triton's interpreter ------------------------------------------------------------------------------------


def check_fused():
    """Bits, bytes and peaks with the fused operators, where Triton interprets; activations are most of the memory."""
    tokens, layers, labels = 384, 2, 8
    model = make(num_hidden_layers=layers, hidden_size=64, intermediate_size=192)
    targets = torch.full((tokens,), -100)
    targets[-labels:] = 5
    batch = make_pack(torch.arange(tokens) % 99, targets=targets, denominator=float(labels))
    decoder = decoder_shape(model.config)
    weights = 4 * sum(parameter.numel() for parameter in model.parts()["language"].parameters())
    found, expected = [], None
    for kept in (None, Kept(), Kept(2, 1), Kept.all(2)):
        model.zero_grad(set_to_none=True)
        model.set_activation_checkpointing("keep" if kept is None else "selective", kept=kept)
        with use_implementation("triton"), LiveBytes() as live:
            loss = model(batch).loss
            alive = live.now
            loss.backward()
        result = loss.item(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        expected = expected or result
        assert_same_bits(result, expected)
        if kept is None:
            continue
        found.append((alive, sum(decoder.kept(kept.level(index, layers), tokens, 4) for index in range(layers))))
        plan = plan_memory(decoder, tokens, weight_bytes=4, gradient_bytes=4, activation_bytes=4, kept=kept, labelled=labels)
        assert plan.gpu == pytest.approx(live.peak + weights, rel=0.05), (kept, plan)
    assert [alive - found[0][0] for alive, _ in found] == [planned - found[0][1] for _, planned in found]
    peaks = {}
    for rows in (None, 192):  # the MLPs on blocks of tokens: the same gradients except for the order of sums, in less memory
        model.zero_grad(set_to_none=True)
        model.set_activation_checkpointing("selective", kept=Kept(1), mlp_rows=rows)
        with use_implementation("triton"), LiveBytes() as live:
            model(batch).loss.backward()
        peaks[rows] = live.peak
        for name, gradient in expected[1].items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)
    # Of [384, 192] float32, half of six; the interpreter holds the arguments of its last launch.
    assert peaks[192] <= peaks[None] - 3 * 192 * 192 * 4
    model.set_activation_checkpointing("recompute")
    assert model.language_model.model.layers[0].mlp.rows is None


@pytest.mark.slow
def test_fused_operators_in_the_interpreter():
    interpret("import torch; torch.set_num_threads(1); from tests.model.test_selective import check_fused; check_fused()")


def test_dropout_is_refused():
    model = make()
    model.language_model.model.layers[0].mlp.down_proj = torch.nn.Sequential(
        model.language_model.model.layers[0].mlp.down_proj, torch.nn.Dropout(0.1)
    )
    with pytest.raises(ValueError, match="'selective' does not restore the random state"):
        model.set_activation_checkpointing("selective")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "torch-flash", "flash-attn-4"])
def test_gradients_to_the_bit_on_a_gpu(backend):
    from eagle_cp.backends import KERNELS

    if backend is not None and (reason := KERNELS[backend].unsupported(torch.device("cuda"), torch.bfloat16, 16, True)):
        pytest.skip(reason)
    model = make(hidden_size=64, num_attention_heads=4, head_dim=16).to("cuda", torch.bfloat16)
    model.attention_backend = backend
    torch.use_deterministic_algorithms(True)
    try:
        batch = pack().to("cuda")
        expected = step(model, "recompute", batch=batch)
        for kept in KEPT:
            assert_same_bits(step(model, "selective", kept, kept, batch=batch), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("mode", "rows", "expected"), [("offload", 8, (8, True)), ("offload", 64, (None, False)), ("keep", 8, (None, False))]
)
def test_blocks_of_the_mlp_also_where_the_whole_layer_is_computed_again(mode, rows, expected, monkeypatch):
    """With `offload` the fused operator sees blocks of tokens, and computes gate and up of each again."""
    from eagle_model.language import mlp

    seen, real = set(), mlp.swiglu_mlp
    monkeypatch.setattr(
        mlp, "swiglu_mlp", lambda *x, rows, recompute: seen.add((rows, recompute)) or real(*x, rows=rows, recompute=recompute)
    )
    model, ids = make().double(), torch.arange(30)
    batch = make_pack(ids, targets=ids.roll(-1), denominator=30.0)
    expected_step = step(model, "keep", batch=batch)
    seen.clear()
    model.zero_grad(set_to_none=True)
    model.set_activation_checkpointing(mode, mlp_rows=rows)
    loss = model(batch).loss
    loss.backward()
    assert seen == {expected}
    for name, gradient in expected_step[1].items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-12, rtol=1e-9, msg=name)

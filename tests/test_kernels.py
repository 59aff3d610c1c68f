"""Matrix products: where oneDNN makes them, and that they are the same kernels."""

import pytest
import torch
from test_update import BATCH, CLOSE, assert_outputs_close, assert_same_state, build, make_batch, make_parts, make_update, train
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from omnet_torchrl.layers import MaskedLinear
from omnet_torchrl.masks import bernoulli_masks
from omnet_torchrl.updates import compiled as compiled_module
from omnet_torchrl.updates import kernels

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")
AMD, INTEL = "vendor_id : AuthenticAMD", "vendor_id : GenuineIntel"


@pytest.fixture
def chosen(monkeypatch):
    """As on a CPU where oneDNN is faster, for products of any size."""
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(kernels, "WORTH", 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 4), (256, 11, 256), (1, 7, 5), (33, 64, 1)])
def test_a_product_is_torchs(shape, transposed, chosen):
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    got = kernels.mm(a, b)
    assert got.shape == (rows, columns)
    torch.testing.assert_close(got, a @ b)


@pytest.mark.parametrize("count", [1, 3])
def test_products_of_a_batch_are_torchs(count, chosen):
    a, b = torch.randn(count, 8, 6), torch.randn(count, 6, 5)
    torch.testing.assert_close(kernels.bmm(a, b), a @ b)


def test_what_onednn_is_not_better_at_stays_where_it_is(chosen, monkeypatch):
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    assert kernels.mm(a.double(), b.double()) is NotImplemented
    assert kernels.bmm(a.expand(kernels.MAX_PRODUCTS + 1, 8, 8), b.expand(kernels.MAX_PRODUCTS + 1, 8, 8)) is NotImplemented
    monkeypatch.setattr(kernels, "WORTH", 8**3 + 1)
    assert kernels.mm(a, b) is NotImplemented
    assert kernels.bmm(a.expand(2, 8, 8), b.expand(2, 8, 8)) is NotImplemented


def test_it_is_switched_off_where_pytorchs_onednn_is(chosen):
    a = torch.randn(8, 8)
    torch.backends.mkldnn.enabled = False
    try:
        assert kernels.mm(a, a) is NotImplemented
    finally:
        torch.backends.mkldnn.enabled = True
    assert kernels.mm(a, a) is not NotImplemented


@pytest.mark.parametrize(
    ("capability", "cpu", "faster"),
    [("AVX512", AMD, True), ("AVX512", INTEL, False), ("AVX2", AMD, False), ("AVX2", INTEL, False)],
)
def test_it_is_chosen_by_the_kind_of_cpu(capability, cpu, faster, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "_cpu", lambda: cpu)
    assert kernels.onednn_is_faster.__wrapped__() is faster


def test_without_mkl_nothing_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert kernels.onednn_is_faster.__wrapped__() is False


def test_the_cpu_is_asked_for_where_the_system_says_it(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.platform, "processor", lambda: "AMD64 Family 26, AuthenticAMD")
    monkeypatch.setattr(kernels, "Path", lambda name: tmp_path / "none")
    assert kernels._cpu() == "AMD64 Family 26, AuthenticAMD"


def test_a_compiled_update_by_onednn_agrees_with_eager(chosen, monkeypatch):
    graphs, decomposed = [], compiled_module.decomposed

    def keep(*args):
        graphs.append(decomposed(*args))
        return graphs[-1]

    monkeypatch.setattr(compiled_module, "decomposed", keep)
    update, eager = build(make_parts()), make_update()
    update.prepare(make_batch(BATCH))
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert targets.count(torch.ops.omnet_torchrl.mm.default) > 10
    assert torch.ops.aten.bmm.default not in targets
    outputs = train(update, 50, every=5), train(eager, 50, every=5)
    assert_same_state(update, eager, **CLOSE)
    assert_outputs_close(*outputs)


class Roundings(TorchDispatchMode):
    """Records what is converted to bfloat16: the strides of each."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        converts = func in (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
        if converts and torch.bfloat16 in (*args[1:], *kwargs.values()):
            self.strides.append(args[0].stride())
        return func(*args, **kwargs)


def test_what_several_products_read_is_rounded_once_and_in_its_own_order(monkeypatch):
    monkeypatch.setattr(kernels, "WORTH", 0)
    x, w, g = torch.randn(4, 6), torch.randn(5, 6), torch.randn(4, 5)
    low = [tensor.bfloat16() for tensor in (x, w, g)]
    expected = [low[0] @ low[1].t(), low[2] @ low[1], low[2].t() @ low[0]]  # forward and backward of a linear layer
    with Roundings() as seen, kernels.LowPrecision(torch.bfloat16):
        products = [x @ w.t(), g @ w, g.t() @ x]
    assert seen.strides == [(6, 1), (6, 1), (5, 1)]
    for got, own in zip(products, expected, strict=True):
        torch.testing.assert_close(got, own.float())


def test_what_was_changed_in_place_is_rounded_anew(monkeypatch):
    monkeypatch.setattr(kernels, "WORTH", 0)
    a, b = torch.ones(2, 2), torch.eye(2)
    with kernels.LowPrecision(torch.bfloat16):
        before = a @ b
        after = a.mul_(3) @ b
    assert before.tolist() == [[1, 1], [1, 1]]
    assert after.tolist() == [[3, 3], [3, 3]]


def test_a_product_is_written_as_it_is_read():
    """(A B)^T, where nothing reads A B, is B^T A^T; a product that is read both ways stays."""
    a, b, weight = torch.randn(3, 8, 4), torch.randn(3, 8, 5), torch.randn(5, 4)

    def gradient(state, inputs):
        turned = (inputs[0].mT @ inputs[1]).mT
        kept = inputs[0].mT @ inputs[1] * 2.0
        return {"turned": state[0] - turned.sum(0), "both": (kept.mT @ kept).mT}

    graph = make_fx(lambda *every: list(gradient(every[:1], every[1:]).values()))(weight, a, b)
    targets = [node.target for node in graph.graph.nodes]
    compiled_module._as_they_are_read(graph)
    graph.graph.eliminate_dead_code()
    products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    assert len(products) == targets.count(torch.ops.aten.bmm.default) == 3
    transposed = [all(user.target is compiled_module.TRANSPOSE for user in node.users) for node in products]
    assert transposed == [False, False, False]
    code = compiled_module.CompiledFunction(gradient, [weight], [a, b])
    got, expected = code(compiled_module.as_bytes([weight]), [a, b]), gradient([weight], [a, b])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize(
    ("channels", "out", "options", "patches"),
    [
        (4, 16, {}, True),
        (3, 5, {"stride": 2, "bias": False}, True),
        (40, 5, {}, False),
        (4, 6, {"padding": 1}, False),
        (4, 6, {"groups": 2}, False),
        (4, 6, {"dilation": 2}, False),
    ],
)
def test_a_convolution_of_few_numbers_is_a_product(channels, out, options, patches):
    layer = torch.nn.Conv2d(channels, out, 3, **options)
    images, state = torch.randn(7, channels, 10, 9), [each.detach() for each in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def step(state, inputs):
        own = [each.detach().requires_grad_() for each in state]
        output = torch.func.functional_call(layer, dict(zip(names, own, strict=True)), (inputs[0],))
        gradients = torch.autograd.grad(output.square().sum(), own)
        return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}

    expected = step(state, [images])
    graph = make_fx(lambda *every: list(step(list(every[:-1]), [every[-1]]).values()))(*state, images)
    graph = compiled_module.decomposed(graph, [*state, images])
    left = [node.target for node in graph.graph.nodes if "convolution" in str(node.target)]
    assert len(left) == (0 if patches else 2)
    code = compiled_module.CompiledFunction(step, state, [images])
    for name, value in code(state, [images]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize(("rows", "turned"), [(8, False), (32, True), (256, False)])
def test_a_layer_of_few_rows_multiplies_from_the_other_side(rows, turned):
    layer, inputs = torch.nn.Linear(300, 20), torch.randn(rows, 300)
    state = [each.detach() for each in layer.parameters()]

    def ask(weight, bias, inputs):
        return torch.nn.functional.linear(inputs, weight, bias)

    graph = compiled_module.decomposed(make_fx(ask)(*state, inputs), [*state, inputs])
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["val"].shape == ((20, rows) if turned else (rows, 20))
    torch.testing.assert_close(graph(*state, inputs), ask(*state, inputs))


@pytest.mark.parametrize(("rows", "turned"), [(8, False), (32, True), (64, True), (256, False)])
def test_layers_of_several_subnetworks_do_so_too(rows, turned):
    layer = MaskedLinear(300, 20, masks=bernoulli_masks(3, (20, 300), 0.5, generator=0))
    state, inputs = [layer.weight.detach(), layer.bias.detach()], torch.randn(3, rows, 300)

    def ask(weight, bias, inputs):
        return functional_call(layer, {"weight": weight, "bias": bias}, (inputs, torch.arange(3)[:, None]))

    graph = compiled_module.decomposed(make_fx(ask)(*state, inputs), [*state, inputs])
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default)
    assert product.meta["val"].shape == ((3, 20, rows) if turned else (3, rows, 20))
    torch.testing.assert_close(graph(*state, inputs), ask(*state, inputs))


@pytest.mark.parametrize("faster", [True, False])
def test_a_product_that_onednn_makes_is_not_turned(faster, chosen, monkeypatch):
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: faster)
    bias, a, b = torch.randn(20), torch.randn(32, 300), torch.randn(20, 300).t()
    graph = make_fx(lambda *inputs: kernels._addmm(*inputs))(bias, a, b)
    (product,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert product.meta["val"].shape == ((32, 20) if faster else (20, 32))
    torch.testing.assert_close(graph(bias, a, b), bias + a @ b)

"""Every bad input is an error that says which, what it was, what was expected and the way out, and nothing is written.

"Nothing" is every byte behind every tensor of the call, the good ones beside the bad one included, and every step
count. Once the cause is gone, the same call works.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import CPU, Path
from torch.testing._internal.two_tensor import TwoTensor

from adamw_kernels import BackendUnavailableError, FusedAdamW, backends, fused_adamw_, tensor_watch
from adamw_kernels.tensor_watch import PythonTensorWatch

# The interpreter computes with NumPy, which warns of what masked lanes hold.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# --- what must not change --------------------------------------------------------------------------------------------


def memory_of(tensor: torch.Tensor) -> bytes:
    """Every byte of the memory behind a tensor, whatever it shows of it."""
    if isinstance(tensor, TwoTensor):
        return memory_of(tensor.a) + memory_of(tensor.b)
    if tensor.is_meta:
        return b""
    if tensor.layout != torch.strided:
        tensor = tensor.detach().to_dense()
    storage = tensor.detach().untyped_storage()
    return bytes(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().tolist())


def snapshot(tensors: Sequence[Any]) -> list[Any]:
    """The memory of every tensor, and its version counter where it has one."""
    return [
        (memory_of(x), None if x.is_inference() else x._version) if isinstance(x, torch.Tensor) else repr(x)
        for x in tensors
    ]


def assert_raises(kind: type[Exception], fragments: Sequence[str], call: Callable[[], object]) -> None:
    """The call raises this kind of error, whose text holds every fragment."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert not [fragment for fragment in fragments if fragment not in text], text


# --- lists: fused_adamw_ ---------------------------------------------------------------------------------------------

Lists = dict[str, list[Any]]
GOOD_SHAPES = [((2, 3), torch.float32), ((4,), torch.bfloat16), ((4, 6), torch.float32)]
BAD = 2  # the last one: whatever is updated before the check would show


def good_lists(device: torch.device) -> Lists:
    """Three tensors in the middle of training that fit in every respect; the last is what a case spoils."""
    lists: Lists = {key: [] for key in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")}
    for i, (shape, dtype) in enumerate(GOOD_SHAPES):
        rng = torch.Generator().manual_seed(i)
        draw = [torch.randn(shape, generator=rng).to(device) for _ in range(5)]
        lists["params"].append(draw[0].to(dtype))
        lists["grads"].append(draw[1].to(dtype))
        lists["exp_avgs"].append(draw[2])
        lists["exp_avg_sqs"].append(draw[3] ** 2)
        lists["max_exp_avg_sqs"].append(draw[4] ** 2)
        lists["state_steps"].append(torch.full((), 3.0, device=device))
    return lists


def step(lists: Lists, **options: Any) -> None:
    """One AMSGrad step of all lists, in torch's order of arguments."""
    fused_adamw_(*lists.values(), **{"lr": 0.1, "amsgrad": True, **options})


def replace(key: str, spoil: Callable[[torch.Tensor], Any]) -> Callable[[Lists], None]:
    """A case that spoils one entry of one list."""

    def apply(lists: Lists) -> None:
        lists[key][BAD] = spoil(lists[key][BAD])

    return apply


def other_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device that is not its own."""
    return tensor.to("meta" if tensor.device == CPU else "cpu")


def in_inference_mode(tensor: torch.Tensor) -> torch.Tensor:
    """A clone that autograd does not track."""
    with torch.inference_mode():
        return tensor.clone()


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same float32 values two bytes past a multiple of four."""
    view = torch.frombuffer(bytearray(2 + 4 * tensor.numel()), dtype=torch.float32, offset=2).view(tensor.shape)
    assert view.data_ptr() % 4 == 2
    return view.copy_(tensor.cpu())


def complex_case(spoil: Callable[[Lists], None]) -> Callable[[Lists], None]:
    """A case whose last tensor is complex before it is spoilt."""

    def apply(lists: Lists) -> None:
        for key, values in lists.items():
            if key != "state_steps":
                values[BAD] = values[BAD].to(torch.complex64)
        spoil(lists)

    return apply


def alias(
    target: str, source: str, source_index: int, start: int = 0, source_start: int = 0
) -> Callable[[Lists], None]:
    """A case whose last `target` shares memory with a `source`; they start at these elements of it."""

    def apply(lists: Lists) -> None:
        numel = lists["params"][BAD].numel()
        memory = torch.full((2 * numel,), 3.0, device=lists["params"][BAD].device)
        for key, index, begin in ((source, source_index, source_start), (target, BAD, start)):
            shape = lists[key][index].shape
            lists[key][index] = memory[begin : begin + math.prod(shape)].view(shape)

    return apply


BAD_LISTS: dict[str, tuple[Callable[[Lists], None], type[Exception], tuple[str, ...]]] = {
    "sparse-grad": (
        replace("grads", torch.Tensor.to_sparse),
        RuntimeError,
        ("the gradient of params[2]", "torch.sparse_coo", "expected a dense one", "SparseAdam"),
    ),
    "sparse-param": (
        replace("params", torch.Tensor.to_sparse),
        TypeError,
        ("params[2] has layout torch.sparse_coo", "expected a strided tensor", "to_dense()"),
    ),
    "int-param": (
        replace("params", torch.Tensor.long),
        TypeError,
        ("params[2] has dtype torch.int64", "expected one of float32, bfloat16, float16, float64"),
    ),
    "float8-param": (
        replace("params", lambda x: x.to(torch.float8_e4m3fn)),
        TypeError,
        ("params[2] has dtype torch.float8_e4m3fn", "expected one of float32"),
    ),
    "bool-grad": (
        replace("grads", torch.Tensor.bool),
        TypeError,
        ("the gradient of params[2] has dtype torch.bool", "expected one of float32, bfloat16, float16", "Cast"),
    ),
    "float64-grad-of-float32": (
        replace("grads", torch.Tensor.double),
        TypeError,
        ("the gradient of params[2] has dtype torch.float64", "expected one of", "torch.float32 parameter", "Cast"),
    ),
    "grad-of-another-shape": (
        replace("grads", lambda x: x[:-1]),
        ValueError,
        ("the gradient of params[2] has shape (3, 6), the parameter (4, 6)", "expected the same shape", "Reshape"),
    ),
    "grad-that-would-broadcast": (
        replace("grads", lambda x: x[:1]),
        ValueError,
        ("the gradient of params[2] has shape (1, 6), the parameter (4, 6)", "expected the same shape"),
    ),
    "grad-transposed": (
        replace("grads", lambda x: x.t()),
        ValueError,
        ("the gradient of params[2] has shape (6, 4), the parameter (4, 6)", "expected the same shape"),
    ),
    "complex-grad-of-float32": (
        replace("grads", lambda x: x.to(torch.complex64)),
        ValueError,
        ("the gradient of params[2]", "the parameter (4, 6)", "expected the same shape"),
    ),
    "float32-grad-of-complex": (
        complex_case(replace("grads", lambda x: x.real.clone())),
        ValueError,
        ("the gradient of params[2] has shape (4, 6), the parameter (4, 6, 2)", "expected the same shape"),
    ),
    "grad-elsewhere": (
        replace("grads", other_device),
        ValueError,
        ("the gradient of params[2] is on ", "the parameter on ", "expected the same device", ".to(param.device)"),
    ),
    "no-grad": (
        replace("grads", lambda x: None),
        TypeError,
        ("the gradient of params[2] is None", "expected a tensor", "Leave out"),
    ),
    "list-as-param": (
        replace("params", torch.Tensor.tolist),
        TypeError,
        ("params[2] is [", "expected a tensor"),
    ),
    "meta-param": (
        replace("params", lambda x: x.to("meta")),
        ValueError,
        ("params[2] is on the meta device", "expected a CPU or GPU tensor", "to_empty"),
    ),
    "expanded-param": (
        replace("params", lambda x: x[:1].expand(4, 6)),
        ValueError,
        ("params[2] has shape (4, 6) and strides (0, 1)", "overlap", "expected dense", ".contiguous()"),
    ),
    "overlapping-windows": (
        replace("params", lambda x: x.as_strided((4, 6), (2, 1))),
        ValueError,
        ("params[2] has shape (4, 6) and strides (2, 1)", "overlap", ".contiguous()"),
    ),
    "param-with-gaps": (
        replace("params", lambda x: x.repeat(1, 2)[:, ::2]),
        ValueError,
        ("params[2] has shape (4, 6) and strides (12, 2)", "leave gaps", "expected dense", ".contiguous()"),
    ),
    "param-with-gaps-between-rows": (
        replace("params", lambda x: x.repeat(1, 2)[:, :6]),
        ValueError,
        ("params[2] has shape (4, 6) and strides (12, 1)", "leave gaps"),
    ),
    "inference-param": (
        replace("params", in_inference_mode),
        ValueError,
        ("params[2] is an inference tensor", "torch.inference_mode()", "Clone"),
    ),
    "conjugated-param": (
        complex_case(replace("params", torch.Tensor.conj)),
        ValueError,
        ("params[2] is a lazily conjugated view", "expected plain memory", "resolve_conj"),
    ),
    "negated-param": (
        replace("params", torch._neg_view),
        ValueError,
        ("params[2] is a lazily negated view", "expected plain memory", "resolve_neg"),
    ),
    "wrapper-param": (
        replace("params", lambda x: TwoTensor(x, x.clone())),
        TypeError,
        ("params[2] is a TwoTensor", "wraps other tensors", "expected a plain tensor or a DTensor"),
    ),
    "moment-of-another-shape": (
        replace("exp_avgs", lambda x: x.view(6, 4)),
        ValueError,
        ("exp_avg of params[2] has shape (6, 4), the parameter (4, 6)", "expected the same shape", "delete its entry"),
    ),
    "second-moment-of-another-shape": (
        replace("exp_avg_sqs", lambda x: x[0]),
        ValueError,
        ("exp_avg_sq of params[2] has shape (6,), the parameter (4, 6)", "expected the same shape"),
    ),
    "maximum-of-another-shape": (
        replace("max_exp_avg_sqs", lambda x: x[:, :1]),
        ValueError,
        ("max_exp_avg_sq of params[2] has shape (4, 1), the parameter (4, 6)", "expected the same shape"),
    ),
    "bfloat16-moment": (
        replace("exp_avgs", torch.Tensor.bfloat16),
        TypeError,
        ("exp_avg of params[2] has dtype torch.bfloat16", "expected torch.float32", "Cast"),
    ),
    "float64-second-moment": (
        replace("exp_avg_sqs", torch.Tensor.double),
        TypeError,
        ("exp_avg_sq of params[2] has dtype torch.float64", "expected torch.float32"),
    ),
    "moment-in-another-layout": (
        replace("exp_avgs", lambda x: x.t().contiguous().t()),
        ValueError,
        (
            "exp_avg of params[2] has strides (1, 4), the parameter (6, 1)",
            "expected the same memory layout",
            "empty_like",
        ),
    ),
    "sparse-moment": (
        replace("exp_avg_sqs", torch.Tensor.to_sparse),
        TypeError,
        ("exp_avg_sq of params[2] has layout torch.sparse_coo", "expected a strided tensor", "to_dense()"),
    ),
    "moment-elsewhere": (
        replace("exp_avgs", other_device),
        ValueError,
        ("exp_avg of params[2] is on ", "the parameter on ", "expected the same device", ".to(param.device)"),
    ),
    "int-step": (
        replace("state_steps", torch.Tensor.long),
        TypeError,
        ("step of params[2] has dtype torch.int64", "expected torch.float32"),
    ),
    "step-of-two-elements": (
        replace("state_steps", lambda x: x.expand(2).clone()),
        ValueError,
        ("step of params[2] has shape (2,)", "expected one element"),
    ),
    "step-elsewhere": (
        replace("state_steps", other_device),
        ValueError,
        ("step of params[2] is on ", "expected the same device"),
    ),
    "number-as-step": (
        replace("state_steps", float),
        TypeError,
        ("step of params[2] is 3.0", "expected a tensor"),
    ),
    "params-that-share-memory": (
        alias("params", "params", 0, start=5),
        ValueError,
        ("params[2] and params[0] share memory", "expected separate tensors", "Tie weights"),
    ),
    "moment-in-the-memory-of-a-param": (
        alias("exp_avgs", "params", 0, start=3),
        ValueError,
        ("exp_avg of params[2]", "params[0]", "share memory"),
    ),
    "one-tensor-for-both-moments": (
        alias("exp_avg_sqs", "exp_avgs", BAD),
        ValueError,
        ("exp_avg of params[2]", "exp_avg_sq of params[2]", "share memory"),
    ),
    "one-step-for-two-params": (
        alias("state_steps", "state_steps", 0),
        ValueError,
        ("step of params[2]", "step of params[0]", "share memory"),
    ),
    "grad-in-the-memory-of-another-param": (
        alias("grads", "params", 0),
        ValueError,
        ("the gradient of params[2]", "params[0]", "share memory"),
    ),
    "grad-that-runs-into-another-param": (
        alias("grads", "params", 0, source_start=20),
        ValueError,
        ("the gradient of params[2]", "params[0]", "share memory"),
    ),
    "grad-that-runs-into-its-param": (
        alias("grads", "params", BAD, source_start=1),
        ValueError,
        ("the gradient of params[2]", "params[2]", "share memory"),
    ),
    "grad-shifted-against-its-param": (
        alias("grads", "params", BAD, start=1),
        ValueError,
        ("the gradient of params[2]", "params[2]", "share memory"),
    ),
}


@pytest.mark.parametrize(("spoil", "kind", "fragments"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_lists_with_one_bad_tensor(
    device: torch.device, spoil: Callable[[Lists], None], kind: type[Exception], fragments: tuple[str, ...]
) -> None:
    """The error names the tensor; no byte of any list changes; the call works without that tensor."""
    lists = good_lists(device)
    spoil(lists)
    everything = [x for values in lists.values() for x in values]
    before = snapshot(everything)
    assert_raises(kind, fragments, lambda: step(lists))
    assert snapshot(everything) == before

    good = {key: values[:BAD] for key, values in lists.items()}
    untouched = copy.deepcopy(good)
    step(good)
    step(untouched)
    for key in good:
        assert [memory_of(x) for x in good[key]] == [memory_of(x) for x in untouched[key]], key
    assert [x.item() for x in good["state_steps"]] == [4, 4]


@pytest.mark.parametrize("key", ["params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"])
def test_lists_with_a_misaligned_address(key: str) -> None:
    """A tensor whose address is no multiple of its element size is refused: vector loads of it would fault."""
    lists = good_lists(CPU)
    lists[key][BAD] = misaligned(lists[key][BAD])
    everything = [x for values in lists.values() for x in values]
    before = snapshot(everything)
    what = {"params": ""}.get(key, key.removesuffix("s") + " of ") + "params[2]"
    fragments = (f"{what} starts at an address", "4-byte elements", "expected an aligned tensor", "Clone")
    assert_raises(ValueError, fragments, lambda: step(lists))
    assert snapshot(everything) == before


@pytest.mark.parametrize("key", ["grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_lists_of_different_lengths(device: torch.device, key: str, length: int) -> None:
    """A list that is shorter or longer than the parameters' is named with both lengths."""
    lists = good_lists(device)
    everything = [x for values in lists.values() for x in values]
    lists[key] = (lists[key] * 2)[:length]
    before = snapshot(everything)
    fragments = (f"{key} has {length} entries", "params has 3", "expected as many")
    assert_raises(ValueError, fragments, lambda: step(lists))
    assert snapshot(everything) == before


BAD_NUMBERS: list[tuple[str, Any, str]] = [
    *((key, bad, "finite number") for key in ("lr", "beta1", "beta2", "eps", "weight_decay") for bad in (math.nan,)),
    ("lr", math.inf, "finite number"),
    ("weight_decay", -math.inf, "finite number"),
    ("lr", "0.1", "finite number or a one-element tensor"),
    ("lr", None, "finite number or a one-element tensor"),
    ("lr", True, "finite number or a one-element tensor"),
    ("lr", 1j, "finite number or a one-element tensor"),
    ("beta1", 1.0, "expected 0 <= beta1 < 1"),
    ("beta1", -0.1, "expected 0 <= beta1 < 1"),
    ("beta2", 1.5, "expected 0 <= beta2 < 1"),
    ("eps", -1e-8, "expected eps >= 0"),
    ("lr", torch.tensor([0.1, 0.2]), "expected a float or a tensor with one real element"),
    ("beta2", torch.tensor([]), "expected a float or a tensor with one real element"),
    ("eps", torch.tensor(1j), "expected a float or a tensor with one real element"),
    ("lr", torch.tensor(math.nan), "finite number"),
    ("beta1", torch.tensor(1.0), "expected 0 <= beta1 < 1"),
]
BAD_NUMBER_IDS = [f"{key}={value!r}" for key, value, _ in BAD_NUMBERS]


@pytest.mark.parametrize(("key", "value", "expected"), BAD_NUMBERS, ids=BAD_NUMBER_IDS)
def test_list_hyperparameters(device: torch.device, key: str, value: Any, expected: str) -> None:
    """A hyperparameter with which a step would destroy the weights is refused by name and value."""
    lists = good_lists(device)
    everything = [x for values in lists.values() for x in values]
    before = snapshot(everything)
    assert_raises(ValueError, (f"fused_adamw_: {key} is ", expected), lambda: step(lists, **{key: value}))
    assert snapshot(everything) == before


@pytest.mark.parametrize("chunk_size", [0, -16, 1, 8, 24, 1000])
def test_list_chunk_size(device: torch.device, chunk_size: int) -> None:
    """A chunk size is a positive multiple of 16."""
    lists = good_lists(device)
    everything = [x for values in lists.values() for x in values]
    before = snapshot(everything)
    fragments = (f"chunk_size is {chunk_size}", "expected a positive multiple of 16")
    assert_raises(ValueError, fragments, lambda: step(lists, chunk_size=chunk_size))
    assert snapshot(everything) == before


def test_list_backends(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown backend and one that cannot run here are errors that list what would do."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    lists = good_lists(device)
    everything = [x for values in lists.values() for x in values]
    before = snapshot(everything)
    fragments = ("backend='tpu'", "unknown backend", "auto, cpu, triton, cuda")
    assert_raises(ValueError, fragments, lambda: step(lists, backend="tpu"))
    wrong = "cuda" if device == CPU else "cpu"
    fragments = (f"backend='{wrong}' cannot be used for tensors on {device}", "What would work there: ")
    assert_raises(BackendUnavailableError, fragments, lambda: step(lists, backend=wrong))
    assert snapshot(everything) == before


# --- the constructor and groups --------------------------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    (dict(lr=-1.0), ValueError, ("Invalid learning rate: -1.0", "expected lr >= 0")),
    (dict(lr=math.nan), ValueError, ("Invalid learning rate: nan",)),
    (dict(lr=math.inf), ValueError, ("lr is inf", "finite")),
    (dict(lr=True), ValueError, ("lr is True",)),
    (dict(lr=torch.tensor([0.1, 0.2])), ValueError, ("Tensor lr must be 1-element", "(2,)")),
    (dict(eps=-1e-8), ValueError, ("Invalid epsilon value: -1e-08",)),
    (dict(eps=math.inf), ValueError, ("eps is inf",)),
    (dict(weight_decay=-0.1), ValueError, ("Invalid weight_decay value: -0.1",)),
    (dict(weight_decay=math.inf), ValueError, ("weight_decay is inf",)),
    (dict(betas=(1.0, 0.99)), ValueError, ("Invalid beta parameter at index 0: 1.0", "0 <= beta < 1")),
    (dict(betas=(0.9, -0.1)), ValueError, ("Invalid beta parameter at index 1: -0.1",)),
    (dict(betas=(0.9, math.nan)), ValueError, ("Invalid beta parameter at index 1: nan",)),
    (dict(betas=(0.9,)), ValueError, ("betas has 1 entries", "expected two")),
    (dict(betas=(0.9, torch.tensor([0.9, 0.9]))), ValueError, ("Tensor betas[1] must be 1-element",)),
    (dict(differentiable=True), RuntimeError, ("differentiable=True", "torch.optim.AdamW")),
    (dict(fused=False), RuntimeError, ("fused=False", "torch.optim.AdamW")),
    (dict(fused=True, foreach=True), RuntimeError, ("`fused` and `foreach` cannot be `True` together",)),
]
BAD_OPTION_IDS = ["-".join(f"{key}={value!r}" for key, value in case[0].items()) for case in BAD_OPTIONS]


@pytest.mark.parametrize(("options", "kind", "fragments"), BAD_OPTIONS, ids=BAD_OPTION_IDS)
def test_constructor_options(
    device: torch.device, options: dict[str, Any], kind: type[Exception], fragments: tuple[str, ...]
) -> None:
    """The constructor refuses, with torch's words where torch does, and so does a group that names the option."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    assert_raises(kind, ("FusedAdamW: ", *fragments), lambda: FusedAdamW([p], **options))
    assert_raises(kind, ("param_groups[0]: ", *fragments), lambda: FusedAdamW([{"params": [p], **options}]))


@pytest.mark.parametrize(("options", "kind", "fragments"), BAD_OPTIONS, ids=BAD_OPTION_IDS)
def test_added_group_options(
    device: torch.device, options: dict[str, Any], kind: type[Exception], fragments: tuple[str, ...]
) -> None:
    """A bad group is not added; the optimizer goes on as if it had never been offered."""
    first, second = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = FusedAdamW([first])
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    fragments = ("param_groups[1]: ", *fragments)
    assert_raises(kind, fragments, lambda: optimizer.add_param_group({"params": [second], **options}))
    assert len(optimizer.param_groups) == 1
    optimizer.step()
    assert second.tolist() == [1, 1, 1]
    optimizer.add_param_group({"params": [second]})
    optimizer.step()
    assert optimizer.state[first]["step"].item() == 3 and optimizer.state[second]["step"].item() == 1


@pytest.mark.parametrize("seed", [1.5, True, None, "7"], ids=repr)
def test_constructor_seeds(seed: Any) -> None:
    """A seed is any int."""
    p = torch.nn.Parameter(torch.ones(3))
    fragments = (f"FusedAdamW: seed is {seed!r}", "expected an int")
    assert_raises(TypeError, fragments, lambda: FusedAdamW([p], seed=seed))


def test_constructor_backends_and_params(device: torch.device) -> None:
    """An unknown backend and an empty or wrong parameter list are errors at once."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    fragments = ("backend='tpu'", "unknown backend", "auto, cpu, triton, cuda")
    assert_raises(ValueError, fragments, lambda: FusedAdamW([p], backend="tpu"))
    assert_raises(ValueError, ("empty parameter list",), lambda: FusedAdamW([]))
    assert_raises(TypeError, ("iterable of Tensors or dicts",), lambda: FusedAdamW(p))
    assert_raises(ValueError, ("more than one parameter group",), lambda: FusedAdamW([{"params": p}, {"params": p}]))


# --- the optimizer's step --------------------------------------------------------------------------------------------


def good_optimizer(device: torch.device, *, warm: bool, named: bool = False) -> FusedAdamW:
    """Two groups, two dtypes, with gradients; `warm`: after two steps, so that a table exists."""
    rng = torch.Generator().manual_seed(7)
    params = []
    for shape, dtype in GOOD_SHAPES:
        p = torch.nn.Parameter(torch.randn(shape, generator=rng).to(device, dtype))
        p.grad = torch.randn(shape, generator=rng).to(device, dtype)
        params.append((f"layer{len(params)}.weight", p) if named else p)
    optimizer = FusedAdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}])
    for _ in range(2 if warm else 0):
        optimizer.step()
    return optimizer


def all_tensors(optimizer: FusedAdamW) -> list[Any]:
    """Parameters, gradients and every state tensor that is not new: one of zeros."""
    found: list[Any] = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        found += (p, p.grad)
        found += [value for value in optimizer.state.get(p, {}).values() if not _is_new(value)]
    return found


def _is_new(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and not value.is_sparse and not value.any()


def contents(optimizer: FusedAdamW) -> list[Any]:
    """What a step writes: the bytes of every parameter and state tensor."""
    return [
        {key: memory_of(value) for key, value in {"param": p, **optimizer.state.get(p, {})}.items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


Undo = Callable[[], None]
Spoil = Callable[[FusedAdamW, torch.nn.Parameter], Undo]


def with_grad(make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """A case in which the parameter gets another gradient."""

    def apply(optimizer: FusedAdamW, p: torch.nn.Parameter) -> Undo:
        good = p.grad
        assert good is not None
        p.grad_dtype = None  # any: torch's own setter would refuse some of the cases
        p.grad = make(good)
        return lambda: setattr(p, "grad", good)

    return apply


def with_data(make: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """A case in which the parameter gets other memory under its gradient and state."""

    def apply(optimizer: FusedAdamW, p: torch.nn.Parameter) -> Undo:
        good = p.data
        p.data = make(good)
        return lambda: setattr(p, "data", good)

    return apply


def with_state(**entries: Callable[[torch.Tensor], Any]) -> Spoil:
    """A case in which a complete state exists but for some entries, made from what they should be; None: missing."""

    def apply(optimizer: FusedAdamW, p: torch.nn.Parameter) -> Undo:
        fresh = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        good = optimizer.state.get(p) or fresh
        spoilt = {key: entries[key](value.detach()) if key in entries else value for key, value in good.items()}
        optimizer.state[p] = {key: value for key, value in spoilt.items() if value is not None}
        return lambda: optimizer.state.__setitem__(p, good)

    return apply


def with_option(key: str, value: Any) -> Spoil:
    """A case in which the second group's option is set to something bad."""

    def apply(optimizer: FusedAdamW, p: torch.nn.Parameter) -> Undo:
        group = optimizer.param_groups[1]
        good = group[key]
        group[key] = value
        return lambda: group.__setitem__(key, good)

    return apply


def sharing_memory(optimizer: FusedAdamW, p: torch.nn.Parameter) -> Undo:
    """The first parameter moves into the memory of the spoilt one."""
    first = optimizer.param_groups[0]["params"][0]
    good = first.data
    first.data = p.data.view(-1)[: good.numel()].view(good.shape)
    return lambda: setattr(first, "data", good)


PLACE = "param_groups[1]['params'][0]"
BAD_STEPS: dict[str, tuple[Spoil, type[Exception], tuple[str, ...]]] = {
    "sparse-grad": (
        with_grad(torch.Tensor.to_sparse),
        RuntimeError,
        (f"the gradient of {PLACE} has layout torch.sparse_coo", "expected a dense one", "SparseAdam"),
    ),
    "int-grad": (
        with_grad(torch.Tensor.int),
        TypeError,
        (f"the gradient of {PLACE} has dtype torch.int32", "expected one of float32, bfloat16, float16", "Cast"),
    ),
    "float64-grad": (
        with_grad(torch.Tensor.double),
        TypeError,
        (f"the gradient of {PLACE} has dtype torch.float64", "torch.float32 parameter"),
    ),
    "param-resized-under-its-grad": (
        with_data(lambda x: torch.ones(2, 6, device=x.device)),
        ValueError,
        (f"the gradient of {PLACE} has shape (4, 6), the parameter (2, 6)", "expected the same shape"),
    ),
    "param-with-gaps": (
        with_data(lambda x: x.repeat(1, 2)[:, ::2]),
        ValueError,
        (f"{PLACE} has shape (4, 6) and strides (12, 2)", "leave gaps", ".contiguous()"),
    ),
    "expanded-param": (
        with_data(lambda x: x[:1].expand(4, 6)),
        ValueError,
        (f"{PLACE} has shape (4, 6) and strides (0, 1)", "overlap", ".contiguous()"),
    ),
    "moment-of-another-shape": (
        with_state(exp_avg=lambda x: torch.zeros(3, 6, device=x.device)),
        ValueError,
        (f"exp_avg of {PLACE} has shape (3, 6), the parameter (4, 6)", "delete its entry"),
    ),
    "int-moment": (
        with_state(exp_avg_sq=torch.Tensor.int),
        TypeError,
        (f"exp_avg_sq of {PLACE} is torch.int32", "expected a floating-point tensor"),
    ),
    "number-as-moment": (
        with_state(exp_avg=lambda x: 0.0),
        TypeError,
        (f"exp_avg of {PLACE} is float", "expected a floating-point tensor"),
    ),
    "complex-moment": (
        with_state(exp_avg=lambda x: x.to(torch.complex64)),
        TypeError,
        (f"exp_avg of {PLACE} has dtype torch.complex64", "torch.float32 parameter"),
    ),
    "moment-without-values": (
        with_state(exp_avg=lambda x: x.to("meta")),
        ValueError,
        (f"exp_avg of {PLACE} is on the meta device", "delete the entry"),
    ),
    "sparse-moment": (
        with_state(exp_avg=lambda x: (x + 1).to_sparse()),
        TypeError,
        (f"exp_avg of {PLACE} has layout torch.sparse_coo", "expected a strided tensor", "to_dense()"),
    ),
    "moment-missing": (
        with_state(exp_avg=lambda x: None),
        ValueError,
        (f"the state of {PLACE} has step, exp_avg_sq but no exp_avg", "expected all three or none", "delete the entry"),
    ),
    "step-missing": (
        with_state(step=lambda x: None),
        ValueError,
        (f"the state of {PLACE} has exp_avg, exp_avg_sq but no step", "expected all three or none"),
    ),
    "step-of-two-elements": (
        with_state(step=lambda x: x.expand(2).clone()),
        ValueError,
        (f"step of {PLACE} has shape (2,)", "expected one element"),
    ),
    "negative-step": (
        with_state(step=lambda x: -1),
        ValueError,
        (f"step of {PLACE} is -1.0", "expected a whole number"),
    ),
    "half-a-step": (
        with_state(step=lambda x: 1.5),
        ValueError,
        (f"step of {PLACE} is 1.5", "expected a whole number"),
    ),
    "nan-lr": (with_option("lr", math.nan), ValueError, ("param_groups[1]: lr is nan", "finite number")),
    "infinite-decay": (
        with_option("weight_decay", math.inf),
        ValueError,
        ("param_groups[1]: weight_decay is inf", "finite number"),
    ),
    "string-lr": (with_option("lr", "1e-3"), ValueError, ("param_groups[1]: lr is '1e-3'", "finite number")),
    "beta1-of-one": (
        with_option("betas", (1.0, 0.9)),
        ValueError,
        ("param_groups[1]: beta1 is 1.0", "expected 0 <= beta1 < 1"),
    ),
    "beta2-above-one": (
        with_option("betas", (0.9, 1.1)),
        ValueError,
        ("param_groups[1]: beta2 is 1.1", "expected 0 <= beta2 < 1"),
    ),
    "negative-eps": (with_option("eps", -1.0), ValueError, ("param_groups[1]: eps is -1.0", "expected eps >= 0")),
    "two-element-lr": (
        with_option("lr", torch.tensor([0.1, 0.2])),
        ValueError,
        ("param_groups[1]: lr is a tensor of shape (2,)", "one real element"),
    ),
    "nan-tensor-lr": (with_option("lr", torch.tensor(math.nan)), ValueError, ("param_groups[1]: lr is nan",)),
    "shared-memory": (
        sharing_memory,
        ValueError,
        (PLACE, "param_groups[0]['params'][0]", "share memory", "Tie weights by using one Parameter object"),
    ),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "warm"])
@pytest.mark.parametrize(("spoil", "kind", "fragments"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_step_with_one_bad_input(
    device: torch.device, warm: bool, spoil: Spoil, kind: type[Exception], fragments: tuple[str, ...]
) -> None:
    """An error in the second group leaves the first untouched as well; with the cause gone, training goes on."""
    optimizer, twin = (good_optimizer(device, warm=warm) for _ in range(2))
    undo = spoil(optimizer, optimizer.param_groups[1]["params"][0])
    everything = all_tensors(optimizer)
    before = snapshot(everything)
    for _ in range(2):  # an error does not make the next call less careful
        assert_raises(kind, fragments, optimizer.step)
        assert snapshot(all_tensors(optimizer)) == before
        assert snapshot(everything) == before
    undo()
    for _ in range(2):
        optimizer.step()
        twin.step()
    assert contents(optimizer) == contents(twin)


@pytest.mark.parametrize("native", [True, False], ids=["native-watch", "python-watch"])
@pytest.mark.parametrize(("spoil", "kind", "fragments"), BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_both_watches_notice_what_spoils_a_warm_step(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    spoil: Spoil,
    kind: type[Exception],
    fragments: tuple[str, ...],
) -> None:
    """Whichever watch guards the addresses, the warm step after the change raises."""
    if native and tensor_watch.load_native()[0] is None:
        pytest.skip(tensor_watch.load_native()[1])
    if not native:
        monkeypatch.setattr("adamw_kernels.stepper.watch_tensors", PythonTensorWatch)
    optimizer = good_optimizer(device, warm=True)
    assert isinstance(optimizer._internals.stepper.watch, PythonTensorWatch) is not native
    spoil(optimizer, optimizer.param_groups[1]["params"][0])
    assert_raises(kind, fragments, optimizer.step)


def test_sparse_embedding(device: torch.device) -> None:
    """The gradient of `Embedding(sparse=True)` is refused by the parameter's own name, with the way out."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2)).to(device)
    optimizer = FusedAdamW(model.named_parameters())
    model(torch.tensor([1, 2], device=device)).sum().backward()
    before = snapshot([*model.parameters()])
    fragments = ("the gradient of parameter '0.weight' (param_groups[0]['params'][0])", "sparse=False", "SparseAdam")
    assert_raises(RuntimeError, fragments, optimizer.step)
    assert snapshot([*model.parameters()]) == before
    assert not optimizer.state


def test_named_parameters_are_named(device: torch.device) -> None:
    """With named parameters the message has the name and the place."""
    optimizer = good_optimizer(device, warm=True, named=True)
    p = optimizer.param_groups[1]["params"][0]
    p.grad_dtype = None
    p.grad = p.grad.double()
    fragments = ("the gradient of parameter 'layer2.weight' (param_groups[1]['params'][0]) has dtype torch.float64",)
    assert_raises(TypeError, fragments, optimizer.step)


UNFIT_PARAMS: dict[str, tuple[Callable[[], torch.Tensor], type[Exception], str]] = {
    "int": (lambda: torch.zeros(3, dtype=torch.int32), TypeError, "has dtype torch.int32"),
    "float8": (lambda: torch.zeros(3).to(torch.float8_e5m2), TypeError, "has dtype torch.float8_e5m2"),
    "meta": (lambda: torch.zeros(3, device="meta"), ValueError, "is on the meta device"),
    "sparse": (lambda: torch.zeros(3).to_sparse(), TypeError, "has layout torch.sparse_coo"),
    "expanded": (lambda: torch.zeros(1).expand(3), ValueError, "overlap or leave gaps"),
    "gaps": (lambda: torch.zeros(6)[::2], ValueError, "overlap or leave gaps"),
    "inference": (lambda: in_inference_mode(torch.zeros(3)), ValueError, "is an inference tensor"),
    "wrapper": (lambda: TwoTensor(torch.zeros(3), torch.zeros(3)), TypeError, "is a TwoTensor"),
    "conjugated": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), ValueError, "lazily conjugated view"),
    "negated": (lambda: torch._neg_view(torch.zeros(3)), ValueError, "lazily negated view"),
    "misaligned": (lambda: misaligned(torch.zeros(3)), ValueError, "is no multiple of its 4-byte elements"),
}


@pytest.mark.parametrize(("make", "kind", "fragment"), UNFIT_PARAMS.values(), ids=UNFIT_PARAMS.keys())
def test_parameters_that_cannot_be_updated(
    make: Callable[[], torch.Tensor], kind: type[Exception], fragment: str
) -> None:
    """They are refused when they have a gradient; while they have none they are in nobody's way."""
    good, bad = torch.nn.Parameter(torch.ones(2)), make()
    optimizer = FusedAdamW([{"params": [good]}, {"params": [bad]}])
    good.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[good]["step"].item() == 1
    before = snapshot([good, bad, *optimizer.state[good].values()])
    if bad.is_inference():
        with torch.inference_mode():
            bad.grad = torch.zeros_like(bad)
    else:
        bad.grad = torch.zeros_like(bad)
    assert_raises(kind, ("param_groups[1]['params'][0] ", fragment), optimizer.step)
    assert snapshot([good, bad, *optimizer.state[good].values()]) == before
    bad.grad = None
    optimizer.step()
    assert optimizer.state[good]["step"].item() == 2


@pytest.mark.parametrize("shares", [True, False], ids=["shared-memory", "gaps"])
def test_idle_parameters_are_in_nobodys_way(device: torch.device, shares: bool) -> None:
    """A parameter that was stepped before and has no gradient now may be anything; with a gradient it is refused."""
    optimizer, twin = (good_optimizer(device, warm=True) for _ in range(2))
    idle = optimizer.param_groups[1]["params"][0]
    grad, idle.grad = idle.grad, None
    twin.param_groups[1]["params"][0].grad = None
    undo = (sharing_memory if shares else with_data(lambda x: x.repeat(1, 2)[:, ::2]))(optimizer, idle)
    if shares:  # the first parameter moved: so does its twin's value
        values = optimizer.param_groups[0]["params"][0].detach()
        twin.param_groups[0]["params"][0].data.copy_(values)
    for _ in range(2):
        optimizer.step()
        twin.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])
    idle.grad = grad
    assert_raises(ValueError, ("param_groups[1]['params'][0]",), optimizer.step)
    undo()
    optimizer.step()
    assert optimizer.state[idle]["step"].item() == 3


@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "warm"])
def test_error_while_kernels_are_made_ready(path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    """A backend that fails to compile, say, fails before anything is written, and works once it can."""
    optimizer, twin = (good_optimizer(path.device, warm=warm) for _ in range(2))
    for each in (optimizer, twin):
        each.param_groups[1]["maximize"] = True  # so that a warm optimizer needs a new table
    (backend,) = {type(backends.choose(path.device))}
    with monkeypatch.context() as patch:

        def fail(self: Any, table: Any, stages: int) -> None:
            raise RuntimeError(f"{self.name} cannot compile for {table.device}")

        patch.setattr(backend, "warm_up", fail)
        before = snapshot(all_tensors(optimizer))
        for _ in range(2):
            assert_raises(RuntimeError, (f"{path.backend} cannot compile for {path.device}",), optimizer.step)
            assert snapshot(all_tensors(optimizer)) == before
        lists = good_lists(path.device)
        everything = [x for values in lists.values() for x in values]
        before = snapshot(everything)
        assert_raises(RuntimeError, ("cannot compile",), lambda: step(lists))
        assert snapshot(everything) == before
    optimizer.step()
    twin.step()
    assert contents(optimizer) == contents(twin)


def test_error_in_the_closure(device: torch.device) -> None:
    """What a closure raises comes out as it is, and no step was taken."""
    optimizer, twin = (good_optimizer(device, warm=True) for _ in range(2))
    before = snapshot(all_tensors(optimizer))

    def closure() -> None:
        raise KeyError("batch")

    assert_raises(KeyError, ("batch",), lambda: optimizer.step(closure))
    assert snapshot(all_tensors(optimizer)) == before
    optimizer.step()
    twin.step()
    assert contents(optimizer) == contents(twin)


def test_backend_that_cannot_run_here(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend asked for by name fails at the first step, naming what would work, and writes nothing."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    wrong = "cuda" if device == CPU else "cpu"
    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = FusedAdamW([p], backend=wrong)
    fragments = (f"backend='{wrong}' cannot be used for tensors on {device}", "What would work there: ")
    assert_raises(BackendUnavailableError, fragments, optimizer.step)
    assert p.tolist() == [1, 1, 1]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_load_state_dict_that_does_not_fit(device: torch.device) -> None:
    """Groups that do not match, or ask for what cannot be had, are refused and the state stays as it was."""
    optimizer, twin = (good_optimizer(device, warm=True) for _ in range(2))
    before = contents(optimizer)
    other = FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    assert_raises(
        ValueError, ("different number of parameter groups",), lambda: optimizer.load_state_dict(other.state_dict())
    )
    differentiable = optimizer.state_dict()
    differentiable["param_groups"][1]["differentiable"] = True
    fragments = ("loaded param_groups[1]", "differentiable=True", "torch.optim.AdamW")
    assert_raises(RuntimeError, fragments, lambda: optimizer.load_state_dict(differentiable))
    assert contents(optimizer) == before
    optimizer.step()
    twin.step()
    assert contents(optimizer) == contents(twin)

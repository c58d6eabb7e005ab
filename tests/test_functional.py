"""`fused_adamw_`: torch's functional arguments, the optimizer's bits, and nothing kept from one call to the next."""

import copy
import doctest
import gc
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, Path
from problems import stored
from tolerances import tolerance
from torch.optim.adam import adam
from torch.optim.adamw import adamw

import adamw_kernels
from adamw_kernels import FusedAdamW, backends, fused_adamw_
from adamw_kernels.formats import moment_dtype

# The interpreter computes with NumPy, which warns of divisions by zero on masked lanes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
FLAGS = [
    dict(zip(("amsgrad", "maximize", "decoupled"), values, strict=True))
    for values in itertools.product((False, True), repeat=3)
]
FLAG_IDS = ["-".join(key for key, on in flags.items() if on) or "none" for flags in FLAGS]

Lists = dict[str, list[torch.Tensor]]
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps")


def make_lists(params: list[torch.Tensor], *, grad_dtype: torch.dtype | None = None, seed: int = 0) -> Lists:
    """Random gradients and the state of a first step for some parameters."""
    rng = torch.Generator().manual_seed(seed)
    lists: Lists = {key: [] for key in LISTS}
    for p in params:
        grad = torch.randn(p.shape, generator=rng, dtype=p.dtype if p.is_complex() else torch.float32)
        lists["params"].append(p)
        lists["grads"].append(torch.empty_like(p, dtype=grad_dtype).copy_(grad))
        lists["exp_avgs"].append(torch.zeros_like(p, dtype=moment_dtype(p.dtype)))
        lists["exp_avg_sqs"].append(torch.zeros_like(p, dtype=moment_dtype(p.dtype)))
        lists["max_exp_avg_sqs"].append(torch.zeros_like(p, dtype=moment_dtype(p.dtype)))
        lists["state_steps"].append(torch.zeros((), device=p.device))
    return lists


def all_kinds(device: torch.device) -> list[torch.Tensor]:
    """Every dtype and kind of tensor that a parameter may be, each small."""
    torch.manual_seed(3)
    return [
        torch.randn(3, 5).to(device),
        torch.randn(7).to(device, torch.bfloat16),
        torch.randn(2, 2).to(device, torch.float16),
        torch.randn(4, dtype=torch.float64).to(device),
        torch.randn(2, 3, dtype=torch.complex64).to(device),
        torch.randn(2, 3, 2, 2).to(device, memory_format=torch.channels_last),
        torch.randn(5, 3).to(device).t(),
        torch.randn(()).to(device),
        torch.randn(0, 3).to(device),
    ]


def small(device: torch.device, count: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """A few small parameters."""
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(4 + i, generator=rng, dtype=torch.float64).to(device, dtype) for i in range(count)]


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's values."""
    return stored(tensor).tobytes()


def bits_of(lists: Lists) -> dict[str, list[bytes]]:
    """The values of every tensor of every list."""
    return {key: [bits(x) for x in values] for key, values in lists.items()}


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:param_format='native'")
@pytest.mark.parametrize("flags", FLAGS, ids=FLAG_IDS)
def test_same_bits_as_the_optimizer(path: Path, flags: dict[str, bool]) -> None:
    """Over three steps parameters, moments, maxima and counts are those of `FusedAdamW`, for every kind of tensor.

    The function keeps nothing beside a 16-bit weight: param_format="native".
    """
    params = [torch.nn.Parameter(p) for p in all_kinds(path.device)]
    lists = make_lists([p.detach().clone() for p in params])
    options = {key: value for key, value in HYPER.items() if not key.startswith("beta")}
    betas = HYPER["beta1"], HYPER["beta2"]
    optimizer = FusedAdamW(params, betas=betas, param_format="native", **options, **flags)
    for i in range(3):
        for p, grad in zip(params, lists["grads"], strict=True):
            grad.mul_(1 - 0.75 * i)
            p.grad = grad.clone()
        fused_adamw_(*lists.values(), **HYPER, **flags)
        optimizer.step()
    keys = dict(exp_avgs="exp_avg", exp_avg_sqs="exp_avg_sq", state_steps="step")
    keys |= dict(max_exp_avg_sqs="max_exp_avg_sq") if flags["amsgrad"] else {}
    for i, p in enumerate(params):
        assert bits(lists["params"][i]) == bits(p), f"parameter {i}"
        for key, name in keys.items():
            assert bits(lists[key][i]) == bits(optimizer.state[p][name]), f"{name} of parameter {i}"


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_another_dtype(path: Path, grad_dtype: torch.dtype) -> None:
    """A gradient of another dtype counts as the float32 values that it holds."""
    kinds = [p for p in all_kinds(path.device) if not p.is_complex()]
    lists = make_lists(kinds, grad_dtype=grad_dtype)
    wide = copy.deepcopy(lists)
    wide["grads"] = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in wide["grads"]]
    fused_adamw_(*lists.values(), **HYPER)
    fused_adamw_(*wide.values(), **HYPER)
    for key in ("params", "exp_avgs", "exp_avg_sqs", "state_steps"):
        assert bits_of(lists)[key] == bits_of(wide)[key], key


@pytest.mark.parametrize("flags", FLAGS, ids=FLAG_IDS)
def test_agrees_with_torchs_functions(path: Path, flags: dict[str, bool]) -> None:
    """The same positional arguments give torch's `adamw` (decoupled) and `adam` (L2) in float64."""
    ours = make_lists(small(path.device, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    rival = adamw if flags["decoupled"] else adam
    shared = {key: value for key, value in flags.items() if key != "decoupled"}
    for _ in range(20):
        fused_adamw_(*ours.values(), **HYPER, **flags)
        rival(*theirs.values(), **HYPER, **shared, foreach=False)
    for key in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
        for x, y in zip(ours[key], theirs[key], strict=True):
            assert (x - y).abs().max() <= tolerance("float64_against_torch") * y.abs().max(), key
    assert bits_of(ours)["state_steps"] == bits_of(theirs)["state_steps"]


def test_arguments_are_torchs() -> None:
    """The positional arguments have torch's names in torch's order; the rest is by keyword, under torch's names."""
    ours, theirs = (inspect.signature(function).parameters for function in (fused_adamw_, adamw))
    positional = [key for key, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [*LISTS] == [*theirs][:6]
    keywords = [key for key, p in ours.items() if p.kind is p.KEYWORD_ONLY]
    assert [*ours] == positional + keywords
    assert {"lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize"} <= {*keywords} & {*theirs}
    assert set(keywords) - {*theirs} == {
        *("decoupled", "cautious", "cautious_weight_decay", "max_grad_norm"),
        *("backend", "chunk_size"),
    }


def test_defaults_are_the_optimizers(device: torch.device) -> None:
    """What is left out is as in `FusedAdamW()`."""
    (start,) = small(device, 1)
    lists = make_lists([start.clone()])
    p = torch.nn.Parameter(start)
    p.grad = lists["grads"][0].clone()
    FusedAdamW([p]).step()
    fused_adamw_(*lists.values(), lr=1e-3)
    assert bits(lists["params"][0]) == bits(p)


@pytest.mark.parametrize("chunk_size", [16, 48, 4096, 1 << 20])
def test_chunk_size_changes_no_bit(path: Path, chunk_size: int) -> None:
    """However the tensors are cut, also in the middle of one and beyond its end, the result is the same."""
    torch.manual_seed(9)
    lists = make_lists([torch.randn(n).to(path.device) for n in (100, 16, 1)])
    whole = copy.deepcopy(lists)
    fused_adamw_(*whole.values(), **HYPER)
    fused_adamw_(*lists.values(), **HYPER, chunk_size=chunk_size)
    assert bits_of(lists) == bits_of(whole)


def test_backends_by_name_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can run on a device can be asked for by name, with the same bits."""
    monkeypatch.delenv(backends.BACKEND_VARIABLE, raising=False)
    results = []
    for device in [torch.device("cpu"), *([torch.device("cuda", 0)] if HAS_GPU else [])]:
        for name in ("auto", *backends.BACKENDS):
            if name == "auto" or not backends.why_not(name, device):
                lists = make_lists(all_kinds(device))
                fused_adamw_(*lists.values(), **HYPER, backend=name)
                results.append(bits_of(lists))
    assert len(results) >= 3
    assert all(result == results[0] for result in results)


# --- what it writes --------------------------------------------------------------------------------------------------


def test_step_counts_advance_each_from_its_own(path: Path) -> None:
    """Every count goes up by one and enters that tensor's bias correction alone."""
    together = make_lists(small(path.device, 3))
    for count, step in zip((0.0, 4.0, 1000.0), together["state_steps"], strict=True):
        step.fill_(count)
    alone = [{key: [values[i].clone()] for key, values in together.items()} for i in range(3)]
    fused_adamw_(*together.values(), **HYPER)
    assert [step.item() for step in together["state_steps"]] == [1, 5, 1001]
    for i, lists in enumerate(alone):
        fused_adamw_(*lists.values(), **HYPER)
        assert {key: values[0] for key, values in bits_of(lists).items()} == {
            key: values[i] for key, values in bits_of(together).items()
        }


def test_step_tensors_of_one_element(device: torch.device) -> None:
    """A step may be 0-dim or have any shape of one element; it is advanced in place."""
    lists = make_lists(small(device, 2))
    lists["state_steps"][1] = torch.full((1, 1), 2.0, device=device)
    fused_adamw_(*lists.values(), **HYPER)
    assert [step.tolist() for step in lists["state_steps"]] == [1.0, [[3.0]]]


def test_version_counters(device: torch.device) -> None:
    """Parameters count as written once, so autograd notices that a saved weight changed; gradients as untouched."""
    w = torch.nn.Parameter(small(device, 1)[0])
    lists = make_lists([w])
    x = torch.ones_like(w).requires_grad_()
    loss = (w * x).sum()
    versions = w._version, lists["grads"][0]._version
    fused_adamw_(*lists.values(), **HYPER)
    assert (w._version, lists["grads"][0]._version) == (versions[0] + 1, versions[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_that_require_grad(device: torch.device) -> None:
    """Parameters that require gradients are updated in place, without `no_grad` and without a graph."""
    w = torch.nn.Parameter(small(device, 1)[0])
    before = bits(w)
    lists = make_lists([w])
    assert fused_adamw_(*lists.values(), **HYPER) is None  # type: ignore[func-returns-value]
    assert bits(w) != before
    assert w.is_leaf and w.grad_fn is None and w.requires_grad and w.grad is None


def test_gradients_are_read_only(path: Path) -> None:
    """No gradient changes, whatever its layout."""
    lists = make_lists(all_kinds(path.device))
    lists["grads"] = [g.contiguous() for g in lists["grads"]]
    before = bits_of(lists)["grads"]
    fused_adamw_(*lists.values(), **HYPER)
    assert bits_of(lists)["grads"] == before


def test_a_gradient_may_be_its_parameter(path: Path) -> None:
    """Each element is read before it is written: the same bits as with a copy."""
    (p,) = small(path.device, 1)
    copied, same = make_lists([p.clone()]), make_lists([p])
    copied["grads"], same["grads"] = [p.clone()], [p]
    fused_adamw_(*copied.values(), **HYPER)
    fused_adamw_(*same.values(), **HYPER)
    assert bits_of(same)["params"] == bits_of(copied)["params"]
    assert bits_of(same)["exp_avg_sqs"] == bits_of(copied)["exp_avg_sqs"]


def test_maxima_are_left_alone_without_amsgrad(device: torch.device) -> None:
    """Without `amsgrad` the list of maxima may be empty or hold anything; it is neither read nor written."""
    full, empty = (make_lists(small(device)) for _ in range(2))
    full["max_exp_avg_sqs"] = [torch.full((1,), float("nan"), device=device)]
    before = bits_of(full)["max_exp_avg_sqs"]
    fused_adamw_(*full.values(), **HYPER)
    fused_adamw_(*{**empty, "max_exp_avg_sqs": []}.values(), **HYPER)
    assert bits_of(full)["max_exp_avg_sqs"] == before
    assert bits_of(full)["params"] == bits_of(empty)["params"]


# --- what it takes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
def test_empty_lists(path: Path, amsgrad: bool) -> None:
    """Nothing to update is nothing to do."""
    fused_adamw_([], [], [], [], [], [], lr=1e-3, amsgrad=amsgrad)


def test_tuples(device: torch.device) -> None:
    """Tuples do as well as lists."""
    listed, tupled = (make_lists(small(device)) for _ in range(2))
    fused_adamw_(*listed.values(), **HYPER)
    fused_adamw_(*(tuple(values) for values in tupled.values()), **HYPER)
    assert bits_of(tupled) == bits_of(listed)


TENSOR_FORMS: dict[str, Callable[[float, torch.device], torch.Tensor]] = {
    "float64": lambda x, device: torch.tensor(x, dtype=torch.float64, device=device),
    "float32": lambda x, device: torch.tensor(x, device=device),
    "float32-on-the-cpu": lambda x, device: torch.tensor(x),
    "bfloat16": lambda x, device: torch.tensor(x, dtype=torch.bfloat16, device=device),
    "one-by-one": lambda x, device: torch.tensor([[x]], dtype=torch.float64, device=device),
    "view": lambda x, device: torch.tensor([7.0, x, 7.0], device=device)[1],
    "requires-grad": lambda x, device: torch.tensor(x, device=device, requires_grad=True),
}


@pytest.mark.parametrize("form", TENSOR_FORMS.values(), ids=TENSOR_FORMS.keys())
def test_hyperparameters_as_tensors(path: Path, form: Callable[[float, torch.device], torch.Tensor]) -> None:
    """A one-element tensor of any dtype and place counts as the float64 number that it holds."""
    tensors: dict[str, Any] = {key: form(value, path.device) for key, value in HYPER.items()}
    numbers = {key: value.item() for key, value in tensors.items()}
    ours, expected = (make_lists(small(path.device)) for _ in range(2))
    fused_adamw_(*ours.values(), **tensors)
    fused_adamw_(*expected.values(), **numbers)
    assert bits_of(ours) == bits_of(expected)
    assert {key: value.item() for key, value in tensors.items()} == numbers, "and is not written"


def test_whole_numbers_as_hyperparameters(device: torch.device) -> None:
    """Python ints are numbers too."""
    ours, expected = (make_lists(small(device)) for _ in range(2))
    fused_adamw_(*ours.values(), lr=1, beta1=0, beta2=0, eps=1, weight_decay=2)
    fused_adamw_(*expected.values(), lr=1.0, beta1=0.0, beta2=0.0, eps=1.0, weight_decay=2.0)
    assert bits_of(ours) == bits_of(expected)


def test_in_inference_mode(device: torch.device) -> None:
    """A step inside `torch.inference_mode()` updates ordinary tensors like any other."""
    inside, outside = (make_lists(small(device)) for _ in range(2))
    fused_adamw_(*outside.values(), **HYPER)
    with torch.inference_mode():
        fused_adamw_(*inside.values(), **HYPER)
    assert bits_of(inside) == bits_of(outside)


def test_tensors_on_several_devices() -> None:
    """Tensors of all devices may stand in one call, in any order; without a GPU, of one device in several dtypes."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    mixed = make_lists([p for pair in zip(*map(all_kinds, devices), strict=True) for p in pair])
    expected = make_lists([p for p in all_kinds(devices[0]) for _ in devices])
    for mine, theirs in zip(mixed["grads"], expected["grads"], strict=True):
        theirs.copy_(mine)
    fused_adamw_(*mixed.values(), **HYPER)
    for i in range(len(expected["params"])):
        alone = {key: [values[i].clone()] for key, values in expected.items()}
        fused_adamw_(*alone.values(), **HYPER)
        assert bits(alone["params"][0]) == bits(mixed["params"][i])
        assert bits(alone["exp_avg_sqs"][0]) == bits(mixed["exp_avg_sqs"][i])


def test_nothing_is_kept_alive(device: torch.device) -> None:
    """After the call no tensor of it is referred to, a re-laid gradient and a rate's tensor included."""
    lists = make_lists([torch.randn(3, 4, device=device)])
    lists["grads"] = [torch.randn(4, 3, device=device).t()]
    rate = torch.tensor(0.1, device=device)
    fused_adamw_(*lists.values(), lr=rate)
    refs = [weakref.ref(x) for x in [rate, *(x for values in lists.values() for x in values)]]
    del lists, rate
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


# --- what the documentation says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for _, name, _ in pkgutil.iter_modules(adamw_kernels.__path__) if name not in ("_C", "__main__")]
)
def test_examples_in_docstrings(name: str) -> None:
    """Every `>>>` in the package prints what stands below it."""
    failures, _ = doctest.testmod(importlib.import_module(f"adamw_kernels.{name}"))
    assert failures == 0


def test_formula_of_the_docstring(path: Path) -> None:
    """The documented formula in float64 is what is computed."""
    lists = make_lists(small(path.device, 1, torch.float64))
    p, m, v = (lists[key][0].clone() for key in ("params", "exp_avgs", "exp_avg_sqs"))
    lr, beta1, beta2, eps, decay = HYPER.values()
    for t in range(1, 6):
        g = lists["grads"][0].clone()
        fused_adamw_(*lists.values(), **HYPER)
        m = m + (1 - beta1) * (g - m)
        v = v + (1 - beta2) * (g * g - v)
        p = p - (lr * decay * p + lr / (1 - beta1**t) * m / (v.sqrt() / (1 - beta2**t) ** 0.5 + eps))
        lists["grads"][0].mul_(-0.5)
        assert (lists["params"][0] - p).abs().max() <= tolerance("float64_against_torch") * p.abs().max()


README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="no README beside the tests")
def test_examples_in_the_readme() -> None:
    """The README's examples run as they stand, given a model, a loader and imports; each trains the model.

    Those marked `py` instead of `python` need several processes or a trainer; what they show is tested elsewhere.
    """
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert examples
    for i, example in enumerate(examples):
        layer = torch.nn.Linear(3, 1)

        class Model(torch.nn.Module):
            def __init__(self, layer: torch.nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, batch: torch.Tensor) -> torch.Tensor:
                return self.layer(batch).square().mean()

        model = Model(layer)
        known = {
            "model": model,
            "loader": [torch.ones(2, 3)] * 2,
            "groups": [{"params": [*model.parameters()]}],
            "validate": lambda network: network(torch.ones(2, 3)),
            "torch": torch,
            "FusedAdamW": FusedAdamW,
            "AveragedModel": torch.optim.swa_utils.AveragedModel,
            "get_ema_multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn,
        }
        before = bits(layer.weight)
        exec(example, known)
        assert bits(layer.weight) != before, f"example {i} trains the model"

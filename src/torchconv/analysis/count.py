"""Operation counts: MACs and FLOPs, by kind of work, by module, with what was not counted.

Conventions
-----------
- **convolution, matmul**: FLOPs = 2 · MACs, dense closed forms from ``torch.utils.flop_counter``. Taps that fall on
  padding count like the others: N · prod(out) · C_out · C_in/g · prod(k) MACs (for a transposed convolution, prod(in)
  replaces prod(out)). Attention counts both products over the whole score matrix, masked or causal or not. A complex
  MAC is four real ones. Integer products (int8 weights) count too.
- **fft**: 5 N log2 N for a complex transform of N points, 5/2 N log2 N with a real input or output; N is the product of
  the transformed lengths. The constants are the customary radix-2 ones and N need not be a power of two.
- **elementwise**: one FLOP per output element of an arithmetic pointwise operator (exp, tanh, GELU, max(x, 0) count as
  one, like +), addition of a bias included; fused ones count what they fuse (addcmul 2, lerp 3; a complex addition 2, a
  complex product 6). Reductions: n for sum, mean, max, cumulative sums, 2n for a norm, 4n for a variance or
  log-sum-exp, 5n for softmax, n elements read. Normalisation: 2n with frozen statistics (a scale and a shift per
  channel), otherwise 5n + n for an affine weight + n for a bias (RMS: 3n + n). Pooling: taps per output element.
  Linear resampling: 2·taps − 1 per output element.
- Copies, views, padding, indexing, sorting, comparisons and random draws do no arithmetic and count nothing.
- Everything else that touched floating-point numbers is listed in ``not_counted`` by name: custom operators without a
  formula (:func:`register_formula`), matrix decompositions, and so on. Kernels launched outside PyTorch's dispatcher
  cannot be seen.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchconv._common import check, check_choice
from torchconv.analysis import _formulas as formulas

__all__ = ["Counts", "ModuleCounts", "count", "register_formula"]

_registered: dict[str, tuple[Callable[..., Any], str]] = {}


@dataclass(frozen=True)
class ModuleCounts:
    """Work done inside one module, its children included."""

    type: str
    params: int = 0
    calls: int = 0
    convolution: int = 0
    matmul: int = 0
    fft: int = 0
    elementwise: int = 0

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and matrix products."""
        return (self.convolution + self.matmul) // 2

    @property
    def flops(self) -> int:
        """FLOPs of all four kinds."""
        return self.convolution + self.matmul + self.fft + self.elementwise


@dataclass(frozen=True)
class Counts:
    """What one forward pass costs. The kinds of work are FLOPs; see the module's conventions.

    Attributes:
        params, trainable_params: elements of distinct parameters (a shared one counts once).
        buffers: elements of distinct buffers.
        macs: multiply-adds of convolutions and matrix products, (convolution + matmul) / 2.
        flops: convolution + matmul + fft + elementwise.
        not_counted: operators that worked on floating-point numbers without a formula, most frequent first.
        not_counted_calls: how often each of them ran.
        by_operator: FLOPs per operator that has any.
        by_module: totals per submodule name, children included; "" is the whole model.
        param_bytes: bytes of the parameters.
        activations_bytes: bytes of every tensor that an operator newly wrote (no views, no in-place results), an upper
            bound of what training keeps; ``latency.peak_memory`` measures what is alive at once.
    """

    params: int
    trainable_params: int
    buffers: int
    macs: int
    flops: int
    convolution: int
    matmul: int
    fft: int
    elementwise: int
    not_counted: list[str]
    not_counted_calls: dict[str, int] = field(repr=False)
    by_operator: dict[str, int] = field(repr=False)
    by_module: dict[str, ModuleCounts] = field(repr=False)
    param_bytes: int
    activations_bytes: int

    def kinds(self) -> dict[str, Any]:
        """FLOPs by kind and what was not counted, as result files hold them."""
        return {**{kind: getattr(self, kind) for kind in formulas.KINDS}, "not_counted": list(self.not_counted)}


def register_formula(op: Any, fn: Callable[..., Any], kind: str = "elementwise") -> None:
    """Say how many FLOPs an operator costs, a custom one or one to be counted differently.

    Args:
        op: ``"namespace::name"``, ``torch.ops.namespace.name``, one of its overloads, or what
            ``torch.library.custom_op`` returned. The operator need not exist yet.
        fn: called as ``fn(*args, out=result, **kwargs)`` with the operator's own arguments. Returns FLOPs, or a
            mapping from kinds to FLOPs. A convolution or matrix product is 2 FLOPs per MAC.
        kind: what a plain number counts as: "convolution", "matmul", "fft" or "elementwise".

    Raises:
        ValueError: ``op`` names no operator, or ``kind`` is unknown.

    Example:
        >>> register_formula("mylib::gate", lambda x, gate, out: 2 * out.numel())
    """
    check_choice("kind", kind, formulas.KINDS)
    if not isinstance(op, str):
        name = getattr(op, "_qualname", None)  # torch.library.CustomOpDef
        if name is None and isinstance(op, torch._ops.OpOverloadPacket):
            name = op._qualified_op_name
        elif name is None and isinstance(op, torch._ops.OpOverload):
            name = op.overloadpacket._qualified_op_name
        check(isinstance(name, str), "op", op, 'pass an operator such as torch.ops.mylib.gate, or "mylib::gate"')
        op = name
    check(op.count("::") == 1, "op", op, 'write it as "namespace::name"')
    check(callable(fn), "fn", fn, "must be callable as fn(*args, out=result, **kwargs)")
    _registered[op] = (fn, kind)


def count(model: nn.Module | Callable[..., Any], *inputs: Any, **kwargs: Any) -> Counts:
    """Count parameters, MACs and FLOPs of ``model(*inputs, **kwargs)`` by running it once.

    Models and inputs on the meta device are counted without computing anything, where their operators allow it.
    The run is in eval mode without gradients. Training flags, the state dict (buffers that the forward pass writes),
    hooks and the random generators are as before afterwards. Counts are for the batch that is passed in.

    Args:
        model: a module, or any function of tensors (then parameters are 0).
        inputs, kwargs: what it is called with.

    Returns:
        :class:`Counts`.

    Raises:
        ValueError: ``model`` is not callable, or has lazy parameters that no forward pass has shaped yet.

    Example:
        >>> counts = count(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 10, 10))
        >>> counts.macs, counts.flops, counts.params
        (21600, 43200, 216)
    """
    check(callable(model), "model", model, "must be a module or a function")
    module = model if isinstance(model, nn.Module) else None
    for name, parameter in module.named_parameters() if module is not None else ():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"model={type(module).__name__}: parameter {name} is lazy; run one forward pass first")
    scopes = _Scopes(module)
    mode = _CountingMode(scopes)
    with _undisturbed(module, (inputs, kwargs)), scopes, torch.no_grad(), mode:
        model(*inputs, **kwargs)

    parameters = list(module.parameters()) if module is not None else []
    total = scopes.work[""]
    return Counts(
        params=sum(p.numel() for p in parameters),
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        buffers=sum(b.numel() for b in module.buffers()) if module is not None else 0,
        macs=(total["convolution"] + total["matmul"]) // 2,
        flops=sum(total[kind] for kind in formulas.KINDS),
        **{kind: total[kind] for kind in formulas.KINDS},
        not_counted=[name for name, _ in mode.missing.most_common()],
        not_counted_calls=dict(mode.missing),
        by_operator=dict(mode.operators.most_common()),
        by_module=scopes.report(type(module).__name__ if module is not None else "function"),
        param_bytes=sum(p.numel() * p.element_size() for p in parameters),
        activations_bytes=mode.written,
    )


class _Scopes:
    """Which modules are running, by forward hooks that are removed on exit; adds work to all of them."""

    def __init__(self, module: nn.Module | None) -> None:
        self.names = {m: name for name, m in module.named_modules() if name} if module is not None else {}
        self.params = {"": sum(p.numel() for p in module.parameters())} if module is not None else {"": 0}
        self.work: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.calls: Counter[str] = Counter({"": 1})
        self.running: list[str] = [""]
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module, name in self.names.items():
            self.params[name] = sum(p.numel() for p in module.parameters())
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no such hooks; its work counts for the module around it
            self._handles.append(module.register_forward_pre_hook(self._start(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._stop, always_call=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.append(name)
            self.calls[name] += 1

        return hook

    def _stop(self, *_: Any) -> None:
        self.running.pop()

    def add(self, work: Mapping[str, int]) -> None:
        """Add work to every running module once, however deep a module calls itself."""
        for name in set(self.running):
            self.work[name].update(work)

    def report(self, root: str) -> dict[str, ModuleCounts]:
        """Totals by name, in the model's order; modules that never ran are listed with zero calls."""
        types = {"": root, **{name: type(m).__name__ for m, name in self.names.items()}}
        return {
            name: ModuleCounts(
                kind, self.params[name], self.calls[name], **{k: self.work[name][k] for k in formulas.KINDS}
            )
            for name, kind in types.items()
        }


class _CountingMode(TorchDispatchMode):
    """Sees every operator below autograd, counts it, and lets it run."""

    supports_higher_order_operators = True

    def __init__(self, scopes: _Scopes) -> None:
        super().__init__()
        self.scopes = scopes
        self.registry = formulas.torch_registry()
        self.missing: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # higher-order operators: flex attention, cond, …
            out = func(*args, **kwargs)
            formula = self.registry.get(func)
            self._book(str(func), formula(args, kwargs, out) if formula else None)
            return out
        packet = func.overloadpacket
        qualified = packet._qualified_op_name
        namespace, name = qualified.split("::")
        base = name if name.startswith("__") else name.removesuffix("_")
        known = qualified in _registered or packet in self.registry
        known = known or (namespace == "aten" and (base in formulas.ATEN or base in formulas.NO_ARITHMETIC))
        if not known:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        self._remember(func, args, kwargs, out)
        if namespace != "prim":
            self._book(qualified, self._work(func, qualified, base, args, kwargs, out))
        return out

    def _work(self, func: Any, qualified: str, base: str, args: Any, kwargs: Any, out: Any) -> Mapping[str, int] | None:
        """The operator's FLOPs by kind; None when it did floating-point work that no formula covers."""
        if qualified in _registered:
            fn, kind = _registered[qualified]
            value = fn(*args, out=out, **kwargs)
            return dict(value) if isinstance(value, Mapping) else {kind: int(value)}
        packet = func.overloadpacket
        if packet in self.registry:
            work = Counter(self.registry[packet](args, kwargs, out))
            if qualified == f"aten::{base}" and base in formulas.EXTRAS:
                work.update(formulas.EXTRAS[base](_by_name(func, args, kwargs, out)))
            return work
        if qualified in formulas.OTHER:
            return formulas.OTHER[qualified](_by_name(func, args, kwargs, out))
        if func.namespace != "aten":
            return None
        if base in formulas.NO_ARITHMETIC or func.is_view:
            return {}
        if base != "_int_mm" and not any(map(formulas.is_floating, formulas.tensors([args, kwargs, out]))):
            return {}
        if base in formulas.ATEN:
            return formulas.ATEN[base](_by_name(func, args, kwargs, out))
        results = formulas.tensors(out)
        if formulas.is_pointwise(func, base):
            # comparisons and tests return no floating-point number
            floating = bool(results) and formulas.is_floating(results[0])
            return formulas.pointwise(base, _by_name(func, args, kwargs, out)) if floating else {}
        return None if results else {}

    def _book(self, name: str, work: Mapping[str, int] | None) -> None:
        if work is None:
            self.missing[name] += 1
        elif any(work.values()):
            unknown = set(work) - set(formulas.KINDS)
            check(not unknown, "formula", sorted(unknown), f"{name}: kinds are {', '.join(formulas.KINDS)}")
            self.operators[name] += sum(work.values())
            self.scopes.add(work)

    def _remember(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.is_view:
            return
        old = {id(t) for t in formulas.tensors([args, kwargs])}
        fresh = [t for t in formulas.tensors(out) if id(t) not in old and t.layout is torch.strided]
        self.written += sum(t.numel() * t.element_size() for t in fresh)


def _by_name(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> dict[str, Any]:
    """An operator call's arguments by schema name, defaults filled in, and the result under "out"."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return {**named, "out": out}


@contextmanager
def _undisturbed(module: nn.Module | None, inputs: Any) -> Iterator[None]:
    """Eval mode, eager kernels and a private random stream inside; flags, state and generators restored after."""
    gpus = sorted({t.device.index for t in [*formulas.tensors(list(inputs)), *_state(module)] if t.is_cuda})
    modules = list(module.modules()) if module is not None else []
    training = [(m, m.training) for m in modules]
    # Caches are what non-persistent buffers are for; only what belongs to the state dict is put back.
    kept = [
        (m, name, b, b.detach().clone())
        for m in modules
        for name, b in m._buffers.items()
        if b is not None and not (b.is_meta or b.is_inference() or name in m._non_persistent_buffers_set)
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        if "torch._dynamo" in sys.modules:  # nothing is compiled before it is loaded, and loading it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder kernel hides its operators
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        try:
            if module is not None:
                module.eval()
            yield
        finally:
            for m, flag in training:
                m.training = flag
            for m, name, buffer, value in kept:
                if not torch.equal(buffer, value):  # batch normalisation writes without raising the version
                    with torch.no_grad():
                        buffer.copy_(value)
                if m._buffers.get(name) is not buffer:
                    m._buffers[name] = buffer


def _state(module: nn.Module | None) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if module is not None else []

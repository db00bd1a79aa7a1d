"""The torch artefact: the graph as source, the weights in safetensors; float, bf16 or dynamic int8.

``int8-dynamic`` quantizes the weights of ``nn.Linear`` once and their inputs on the fly, as
``torch.ao.quantization.quantize_dynamic`` does, with less error: a scale for each output instead of
one for the weight, and all eight bits of the inputs. Where the processor adds products in 16 bits
the weights keep to seven: inputs spread further, and one scale has to do for all of them.
``bf16`` is the whole model in bfloat16 but for batch norms, which keep their float32 statistics
until they are folded; inputs and logits stay float32.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.ao.nn.quantized.dynamic.modules.linear import Linear as DynamicLinear
from torch.ao.quantization.qconfig import default_dynamic_qconfig, per_channel_dynamic_qconfig
from torch.nn.modules.batchnorm import _BatchNorm

from profiling_agent.deployment.capabilities import bf16_support, int8_support
from profiling_agent.deployment.exporting import (
    WRAPPER_PREFIX,
    Exported,
    export_program,
    first_line,
    module_logits,
)
from profiling_agent.deployment.graph_code import (
    GraphSource,
    Int8Weight,
    owner,
    parameter_targets,
    write_graph,
)
from profiling_agent.deployment.lowered import Lowered, Lowering, keeps_float, plain_linears
from profiling_agent.errors import TrialError
from profiling_agent.machine.processor import describe_machine
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

GRAPH_FILE = "graph.py"
WEIGHTS_FILE = "weights.safetensors"
FP32, BF16, INT8 = "fp32", "bf16", "int8-dynamic"
SCHEMES = (FP32, BF16, INT8)
ENGINES = ("x86", "fbgemm", "qnnpack")
REDUCED_RANGE = {"quant_min": -64, "quant_max": 63}
_AO_DEPRECATIONS = (
    r"torch\.ao\.quantization is deprecated",
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel",
)


class TorchRuntime:
    """Runs artefacts with torch and numpy; fp32, bf16 and dynamic int8 of linear layers."""

    name: RuntimeName = "torch"

    def version(self) -> str | None:
        return metadata.version("torch")

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        refused = self.refused(machine)
        return tuple(scheme for scheme in SCHEMES if scheme not in refused)

    def refused(self, machine: Machine) -> dict[str, str]:
        reasons: dict[str, str] = {}
        if not (bf16 := bf16_support(machine)).usable:
            reasons[BF16] = bf16.reason
        if not (int8 := int8_support(machine)).usable:
            reasons[INT8] = int8.reason
        elif int8_engine() is None:
            reasons[INT8] = "this torch was built without an int8 engine for this processor"
        return reasons

    def lower(
        self, model: nn.Module, example: dict[str, Tensor], lowering: Lowering, folder: Path
    ) -> Lowered:
        quantization = lowering.quantization
        model = inference_copy(model)
        int8_names = choose_int8(model, quantization)
        self._require(quantization.scheme, lowering.machine)
        if quantization.scheme == BF16:
            to_bfloat16(model)
        exported = export_program(model, example)
        tensors = _Tensors.of(exported)
        reduce_range = int8_support(lowering.machine).reduce_range
        source, used = _write_source(model, exported, tensors, int8_names, reduce_range)
        if quantization.scheme == BF16 and not source.num_products:
            raise TrialError(
                f"The scheme {BF16!r} speeds up nothing here: the forward has no matrix product or "
                f"convolution. Use {FP32!r}."
            )
        stored = {name: tensors.stored(name) for name in sorted(source.tensors)}
        try:
            content = save(stored)
        except (ValueError, KeyError, RuntimeError) as error:
            raise TrialError(f"The weights can't be saved as safetensors: {error}.") from error
        (folder / WEIGHTS_FILE).write_bytes(content)
        (folder / GRAPH_FILE).write_text(source.text, encoding="utf-8")
        linears = plain_linears(model)
        return Lowered(
            model_files=(GRAPH_FILE, WEIGHTS_FILE),
            weight_bytes=sum(tensor.nbytes for tensor in stored.values()),
            int8_layers=tuple(name for name in linears if name in used),
            float_layers=tuple(name for name in linears if name not in used),
            num_int8_operators=source.num_int8,
            num_products=source.num_products,
            fixed_batch=exported.fixed_batch,
            notes=exported.notes + _int8_notes(quantization.scheme, lowering.machine),
        )

    def reference(
        self, model: nn.Module, example: dict[str, Tensor], quantization: Quantization
    ) -> Tensor | None:
        if quantization.scheme == BF16:
            return None
        model = inference_copy(model)
        int8_names = choose_int8(model, quantization)
        if not int8_names:
            return module_logits(model, example)
        # The fused path of nn.TransformerEncoderLayer looks for float weights and breaks on int8.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return module_logits(swap_linears(model, int8_names), example)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def _require(self, scheme: str, machine: Machine) -> None:
        reason = self.refused(machine).get(scheme)
        if reason is not None:
            raise TrialError(
                f"The torch runtime does not offer {scheme!r} here: {reason}. Use {FP32!r}."
            )


def int8_engine() -> str | None:
    """The engine of torch's int8 kernels on this processor, or None."""
    supported = torch.backends.quantized.supported_engines
    return next((engine for engine in ENGINES if engine in supported), None)


def inference_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters ask for no gradients; ``TrialError`` without one."""
    try:
        return copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # whatever the model's attributes raise when they are copied
        raise TrialError(
            f"{type(model).__name__!r} can't be copied: {first_line(error)}. Keep only modules, "
            "parameters and plain values as its attributes."
        ) from error


def choose_int8(model: nn.Module, quantization: Quantization) -> tuple[str, ...]:
    """Names of the layers to quantize; ``TrialError`` for an unknown scheme or a no-op."""
    if quantization.scheme not in SCHEMES:
        raise TrialError(
            f"The torch runtime has no scheme {quantization.scheme!r}. Use one of {SCHEMES!r}."
        )
    if quantization.scheme != INT8:
        return ()
    names = tuple(
        name for name in plain_linears(model) if not keeps_float(name, quantization.keep_float)
    )
    if not names:
        raise TrialError(
            f"The scheme {INT8!r} quantizes nothing here: there is no nn.Linear that keep_float "
            f"{list(quantization.keep_float)!r} leaves. Use {FP32!r} or keep fewer layers float."
        )
    return names


def to_bfloat16(model: nn.Module) -> None:
    """Cast a model in place, and from now on the floating tensors that it is called with.

    Batch norms keep float32: their statistics are few, and folding them needs the digits.
    """
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            module._apply(_as_bfloat16, recurse=False)
    model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _as_bfloat16(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def _cast_inputs(
    _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cast: Callable[[Any], Any] = lambda v: _as_bfloat16(v) if isinstance(v, Tensor) else v  # noqa: E731
    return tuple(cast(v) for v in args), {name: cast(v) for name, v in kwargs.items()}


class Int8Linear(nn.Module):
    """A linear layer that computes as the artefact does: (..., in) to (..., out), float32."""

    def __init__(self, linear: nn.Linear, reduce_range: bool) -> None:
        super().__init__()
        weight, scales = quantize_weight(linear.weight, reduce_range)
        with quiet_quantization():
            zeros = torch.zeros_like(scales, dtype=torch.int64)
            packable = torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0)  # pyright: ignore
            bias = None if linear.bias is None else linear.bias.detach()
            self.packed = torch.ops.quantized.linear_prepack(packable, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed)


def quantize_weight(weight: Tensor, reduce_range: bool) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as int8 and the symmetric scale of each output (out,), float32.

    With ``reduce_range`` in seven bits, -64 to 64: twice 255 times that fits into 16 bits.
    """
    weight = weight.detach().float()
    with quiet_quantization():
        observer = per_channel_dynamic_qconfig.weight(**(REDUCED_RANGE if reduce_range else {}))
        observer(weight)
        scales, zero_points = observer.calculate_qparams()
        assert not zero_points.any(), "the observer is symmetric"
        quantized = torch.quantize_per_channel(weight, scales, zero_points, 0, torch.qint8)
    return quantized.int_repr(), scales


def swap_linears(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """``model`` with the named linear layers swapped in place by the artefact's int8 ones."""
    reduce_range = int8_support(describe_machine()).reduce_range
    return _swap(model, names, lambda linear: Int8Linear(linear, reduce_range))


def quantize_dynamic(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """``model`` with the named linear layers swapped in place by torch's own dynamic int8 ones.

    What ``torch.ao.quantization.quantize_dynamic`` does, and what artefacts are compared with: one
    scale for a weight, seven bits for activations. Without names the model as it is.
    """
    return _swap(model, names, _dynamic_linear)


def _swap(
    model: nn.Module, names: tuple[str, ...], form: Callable[[nn.Linear], nn.Module]
) -> nn.Module:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, form(linear))
    return model


def _dynamic_linear(linear: nn.Linear) -> nn.Module:
    with quiet_quantization():
        layer = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.qconfig = default_dynamic_qconfig  # type: ignore[assignment]
        return DynamicLinear.from_float(layer)


@contextmanager
def quiet_quantization() -> Iterator[None]:
    """Select the int8 engine and ignore torch.ao's two deprecation warnings, by their words."""
    engine = int8_engine()
    if engine is None:
        raise TrialError("This torch has no int8 engine for this processor. Use 'fp32'.")
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        for message in _AO_DEPRECATIONS:
            warnings.filterwarnings("ignore", message=message)
        yield


@dataclass(kw_only=True)
class _Tensors:
    """Tensors of a program by stored name; shared ones have one name, int8 ones are added."""

    by_name: dict[str, Tensor]
    placeholders: dict[str, str]
    int8: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, exported: Exported) -> _Tensors:
        program = exported.program
        known = {**program.constants, **program.state_dict}
        by_name: dict[str, Tensor] = {}
        placeholders: dict[str, str] = {}
        seen: dict[object, str] = {}
        for placeholder, target in parameter_targets(program).items():
            tensor = known[target]
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            name = seen.setdefault(
                key if tensor.numel() else target, target.removeprefix(WRAPPER_PREFIX)
            )
            by_name[name] = tensor.detach()
            placeholders[placeholder] = name
        return cls(by_name=by_name, placeholders=placeholders)

    def quantized(self, name: str, reduce_range: bool) -> Int8Weight:
        """The int8 form of a weight, made once."""
        form = Int8Weight(stored=f"{name}.int8", scales=f"{name}.scale")
        if name not in self.int8:
            self.int8.add(name)
            self.by_name[form.stored], self.by_name[form.scales] = quantize_weight(
                self.by_name[name], reduce_range
            )
        return form

    def stored(self, name: str) -> Tensor:
        return self.by_name[name].contiguous().clone()


def _write_source(
    model: nn.Module,
    exported: Exported,
    tensors: _Tensors,
    int8_names: tuple[str, ...],
    reduce_range: bool,
) -> tuple[GraphSource, set[str]]:
    modules = {id(model.get_submodule(name)): name for name in int8_names}
    used: set[str] = set()

    def int8(node: fx.Node) -> Int8Weight | None:
        module = _submodule(model, owner(node))
        if id(module) not in modules:
            return None
        parameters = [value for value in node.args[1:3] if value is not None]
        if not all(isinstance(p, fx.Node) and p.name in tensors.placeholders for p in parameters):
            return None
        used.update(name for name in int8_names if model.get_submodule(name) is module)
        weight = parameters[0]
        assert isinstance(weight, fx.Node)
        return tensors.quantized(tensors.placeholders[weight.name], reduce_range)

    source = write_graph(exported.program, tensors.placeholders, int8)
    if int8_names and not source.num_int8:
        raise TrialError(
            f"The scheme {INT8!r} quantized nothing: none of {list(int8_names)!r} is called in the "
            f"forward. Use {FP32!r}."
        )
    return source, used


def _submodule(model: nn.Module, name: str | None) -> nn.Module | None:
    try:
        return None if name is None else model.get_submodule(name)
    except AttributeError:
        return None


def _int8_notes(scheme: str, machine: Machine) -> tuple[str, ...]:
    support = int8_support(machine)
    if scheme != INT8 or not support.reduce_range:
        return ()
    return (f"The int8 weights have seven bits: {support.reason}.",)

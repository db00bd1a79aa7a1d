"""The torch artefact: the graph as source, the weights in safetensors, int8 the paper's way.

``int8-dynamic`` gives the numbers of ``torch.ao.quantization.quantize_dynamic`` on ``nn.Linear``
(one scale per weight tensor, activations quantized on the fly), without its modules: those can't be
exported, and cost a module call on every layer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.ao.nn.quantized.dynamic.modules.linear import Linear as DynamicLinear
from torch.ao.quantization.qconfig import default_dynamic_qconfig

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
from profiling_agent.deployment.lowered import Lowered, keeps_float, plain_linears
from profiling_agent.errors import TrialError
from profiling_agent.records.common import Machine, RuntimeName
from profiling_agent.records.plan import Quantization

GRAPH_FILE = "graph.py"
WEIGHTS_FILE = "weights.safetensors"
FP32, INT8 = "fp32", "int8-dynamic"
ENGINES = ("x86", "fbgemm", "qnnpack")
_AO_DEPRECATIONS = (
    r"torch\.ao\.quantization is deprecated",
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel",
)


class TorchRuntime:
    """Runs artefacts with torch and numpy; fp32 and dynamic int8 of linear layers."""

    name: RuntimeName = "torch"

    def version(self) -> str | None:
        return metadata.version("torch")

    def schemes(self, machine: Machine) -> tuple[str, ...]:
        return (FP32, INT8) if int8_engine() else (FP32,)

    def lower(
        self,
        model: nn.Module,
        example: dict[str, Tensor],
        quantization: Quantization,
        folder: Path,
    ) -> Lowered:
        model = inference_copy(model)
        int8_names = choose_int8(model, quantization)
        exported = export_program(model, example)
        tensors = _Tensors.of(exported)
        source, used = _write_source(model, exported, tensors, int8_names)
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
            fixed_batch=exported.fixed_batch,
            notes=exported.notes,
        )

    def reference(
        self, model: nn.Module, example: dict[str, Tensor], quantization: Quantization
    ) -> Tensor | None:
        model = inference_copy(model)
        int8_names = choose_int8(model, quantization)
        if not int8_names:
            return module_logits(model, example)
        # The fused path of nn.TransformerEncoderLayer looks for float weights and breaks on int8.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return module_logits(quantize_dynamic(model, int8_names), example)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


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
    if quantization.scheme == FP32:
        return ()
    if quantization.scheme != INT8:
        raise TrialError(
            f"The torch runtime has no scheme {quantization.scheme!r}. Use {FP32!r} or {INT8!r}."
        )
    names = tuple(
        name for name in plain_linears(model) if not keeps_float(name, quantization.keep_float)
    )
    if not names:
        raise TrialError(
            f"The scheme {INT8!r} quantizes nothing here: there is no nn.Linear that keep_float "
            f"{list(quantization.keep_float)!r} leaves. Use {FP32!r} or keep fewer layers float."
        )
    return names


def quantize_dynamic(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """``model`` with the named linear layers swapped in place by torch's own dynamic int8 ones.

    What ``torch.ao.quantization.quantize_dynamic`` does; without names the model as it is.
    """
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(parent), leaf, _dynamic_linear(linear))
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
    scales: dict[str, Int8Weight] = field(default_factory=dict)

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

    def quantized(self, name: str) -> Int8Weight:
        """The int8 form of a weight, made once, with ``quantize_dynamic``'s observer."""
        if name not in self.scales:
            with quiet_quantization():
                observer = default_dynamic_qconfig.weight()
                observer(self.by_name[name].float())
                scale, zero_point = observer.calculate_qparams()
                weight = torch.quantize_per_tensor(
                    self.by_name[name].float(), float(scale), int(zero_point), torch.qint8
                )
            assert int(zero_point) == 0, "the default observer is symmetric"
            self.scales[name] = Int8Weight(stored=f"{name}.int8", scale=weight.q_scale())
            self.by_name[f"{name}.int8"] = weight.int_repr()
        return self.scales[name]

    def stored(self, name: str) -> Tensor:
        return self.by_name[name].contiguous().clone()


def _write_source(
    model: nn.Module, exported: Exported, tensors: _Tensors, int8_names: tuple[str, ...]
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
        return tensors.quantized(tensors.placeholders[weight.name])

    source = write_graph(exported.program, tensors.placeholders, int8)
    if int8_names and not source.int8_nodes:
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

"""What Triton's interpreter works out of types and shapes alone, kept by type and shape.

Every function here answers as the one that it replaces, and asks that one for what it does not know: nothing of a
value, a pointer or a mask is kept.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def changes(module: Any) -> list[tuple[Any, str, Any]]:
    """Return (object, attribute, new value) of each, for the module `triton.runtime.interpreter`."""
    core, semantic, builder = module.tl.core, type(module.interpreter_semantic), module.InterpreterBuilder
    return [
        (module, "_get_np_dtype", _numpy_types(module._get_np_dtype)),
        (module, "_patch_attr", _direct_builtins(core, module.interpreter_semantic)),
        (builder, "create_splat", _splat_to_plain_shapes(core, builder.create_splat)),
        (core.dtype, "__eq__", _itself_first(core.dtype.__eq__)),
        (core.block_type, "__init__", _block_types(core)),
        (core.tensor, "__init__", _tensors(core)),
        (semantic, "computation_type_impl", _promotions(semantic.computation_type_impl)),
        (semantic, "cast", _casts(semantic.cast)),
        (semantic, "binary_op_type_checking_impl", _operands(core, semantic.binary_op_type_checking_impl)),
        (semantic, "broadcast_impl_value", _broadcasts(core, semantic.broadcast_impl_value)),
    ]


def _numpy_types(ask: Any) -> Any:
    known: dict[str, Any] = {}

    def numpy_type(of: Any) -> Any:
        name = of.scalar.name
        if name not in known:
            known[name] = ask(of)
        return known[name]

    return numpy_type


def _direct_builtins(core: Any, semantic: Any) -> Any:
    """Give the semantic to a builtin itself, which a wrapper asks for it before."""
    wrapper = core.builtin(lambda: None).__code__

    def patch(holder: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def builtin(*given: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*given, **named)

        scope.set_attr(holder, name, builtin)

    return patch


def _splat_to_plain_shapes(core: Any, splat: Any) -> Any:
    """NumPy reads a shape of Triton's number by number, and wraps each."""

    def create_splat(self: Any, kind: Any, value: Any) -> Any:
        if type(kind.shape) is core.tuple:
            kind = SimpleNamespace(shape=tuple(kind.shape.values))
        return splat(self, kind, value)

    return create_splat


def _itself_first(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _block_types(core: Any) -> Any:
    """The checks of a shape and its name, once for all types of blocks of that shape."""
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    make = core.block_type.__init__

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        given = shape.values if type(shape) is core.tuple else shape
        sizes = [size.value if type(size) is core.constexpr else size for size in given]
        if not all(type(size) is int for size in sizes):
            return make(self, element_ty, shape)
        key = (element_ty.name, *sizes)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return init


def _tensors(core: Any) -> Any:
    """The shape and the size of a tensor as constants, once for each shape."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}
    make = core.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in known:
            make(self, handle, type)
            known[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[key]

    return init


def _promotions(ask: Any) -> Any:
    known: dict[tuple[Any, ...], Any] = {}

    def computation_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in known:
            known[key] = ask(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return known[key]

    return computation_type


def _casts(cast: Any) -> Any:
    def cast_if_other(self: Any, value: Any, to: Any, *rounding: Any, **named: Any) -> Any:
        return value if value.dtype is to else cast(self, value, to, *rounding, **named)

    return cast_if_other


def _operands(core: Any, convert: Any) -> Any:
    """Two tensors of one plain type and one shape stay as they are."""
    plain = {"fp32", "fp64", "int32", "int64"}

    def converted(self: Any, a: Any, b: Any, *given: Any, **named: Any) -> Any:
        if type(a) is type(b) is core.tensor and a.dtype.name == b.dtype.name in plain and a.shape is b.shape:
            return a, b
        return convert(self, a, b, *given, **named)

    return converted


def _broadcasts(core: Any, broadcast: Any) -> Any:
    def broadcast_if_other(self: Any, a: Any, b: Any) -> Any:
        left, right = a.type, b.type
        if type(left) is type(right) is core.block_type and left.shape.values == right.shape.values:
            return a, b
        return broadcast(self, a, b)

    return broadcast_if_other

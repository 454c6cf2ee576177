"""Models of scikit-learn, torch and mlx: how they are made, and how many numbers they hold."""

from collections.abc import Iterable, Mapping
from typing import Any

from vm_magic.summaries.text import count, fitting, short_repr


def estimator(value: Any, limit: int) -> str:
    """Parameters that differ from the defaults, and what fitting found."""
    name = type(value).__name__
    params = value.get_params(deep=False)
    default = _defaults(type(value))
    changed = {key: one for key, one in params.items() if key not in default or not _same(one, default[key])}
    fitted = {key: one for key, one in vars(value).items() if key.endswith("_") and not key.startswith("_")}
    lines = [f"{name}({', '.join(f'{key}={short_repr(one, 120)}' for key, one in changed.items())})"]
    lines.append(f"other parameters have their defaults ({count(len(params), 'parameter')})")
    if not fitted:
        return "\n".join([*lines, "not fitted"])
    lines.append("fitted:")
    rows = [f"  {key} = {_attribute(one)}" for key, one in fitted.items()]
    return "\n".join([*lines, *fitting(rows, limit - sum(map(len, lines)), "attributes", len(rows))])


def torch_module(module: Any, limit: int) -> str:
    """Layers and parameters."""
    parameters = list(module.parameters())
    trained = sum(one.numel() for one in parameters if one.requires_grad)
    total = sum(one.numel() for one in parameters)
    frozen = f", {total - trained:,} of them frozen" if trained != total else ""
    where = sorted({f"{str(one.dtype).removeprefix('torch.')} on {one.device}" for one in parameters})
    mode = "training" if module.training else "evaluation"
    head = f"torch {type(module).__name__}: {total:,} parameters{frozen} ({', '.join(where)}), {mode} mode"
    return _with_layers(head, module, limit)


def mlx_module(module: Any, limit: int) -> str:
    """Layers and parameters; nothing is computed."""
    arrays = list(_arrays(module.parameters()))
    kinds = sorted({str(one.dtype).removeprefix("mlx.core.") for one in arrays})
    head = f"mlx {type(module).__name__}: {sum(one.size for one in arrays):,} parameters ({', '.join(kinds)})"
    return _with_layers(head, module, limit)


def _with_layers(head: str, module: Any, limit: int) -> str:
    layers = sorted((pair for pair in module.named_modules() if pair[0]), key=lambda pair: _in_order(pair[0]))
    rows = [f"  {name}: {_layer(one)}" for name, one in layers]
    return "\n".join([head, "layers:", *fitting(rows, limit - len(head) - 10, "layers", len(rows))])


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts ``layers.2`` before ``layers.10``."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _layer(layer: Any) -> str:
    name = type(layer).__name__
    extra = layer.extra_repr() if hasattr(layer, "extra_repr") else layer._extra_repr()
    return f"{name}({short_repr(extra, 100)[1:-1]})" if isinstance(extra, str) and extra else name


def _arrays(tree: Any) -> Iterable[Any]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for one in tree:
            yield from _arrays(one)
    else:
        yield tree


def _defaults(kind: type) -> Mapping[str, Any]:
    import inspect

    try:
        parameters = inspect.signature(kind).parameters.values()
    except (ValueError, TypeError):
        return {}
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _same(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (ValueError, TypeError):  # arrays
        return False


def _attribute(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        small = getattr(value, "size", 100) <= 10 and hasattr(value, "tolist")
        shown = f": {short_repr(value.tolist(), 120)}" if small else ""
        return f"{type(value).__name__} of shape {shape}{shown}"
    return short_repr(value, 120)

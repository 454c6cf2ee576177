"""Figures of matplotlib: what is drawn in them, not how it looks."""

from typing import Any

from vm_magic.summaries.text import count, names_text, number, short_repr

_MOST = 12
"""Lines, or collections, that are told one by one."""
_MOST_AXES = 9


def figure(value: Any, limit: int) -> str:
    """Size, title, and each axes."""
    title = value.get_suptitle() if hasattr(value, "get_suptitle") else ""
    width, height = value.get_size_inches()
    parts = [
        f"matplotlib Figure, {number(float(width))} × {number(float(height))} inches, {len(value.axes)} axes"
        + (f": {title!r}" if title else "")
    ]
    shown = value.axes[:_MOST_AXES]
    parts += [axes(one, limit // max(len(shown), 1)) for one in shown]
    if len(value.axes) > _MOST_AXES:
        parts.append(f"… {len(value.axes) - _MOST_AXES} more axes")
    return "\n".join(parts)


def axes(value: Any, limit: int) -> str:  # noqa: ARG001 - every describer is called alike
    """Titles, labels, ranges, and what is drawn: lines, points, bars, pictures."""
    lines = [f"Axes{f' {value.get_title()!r}' if value.get_title() else ''}: {_axis(value, 'x')}; {_axis(value, 'y')}"]
    drawn = value.get_lines()
    lines += [f"  line {_name(line)}{_line(line)}" for line in drawn[:_MOST]]
    if len(drawn) > _MOST:
        lines.append(f"  … {count(len(drawn) - _MOST, 'more line')}")
    lines += [f"  {_collection(one)}" for one in value.collections[:_MOST]]
    lines += [f"  {type(one).__name__} {_name(one)}of {count(len(one), 'bar')}{_bars(one)}" for one in _bar_sets(value)]
    lines += [f"  picture of shape {one.get_array().shape}" for one in value.images[:_MOST] if one.get_size()]
    texts = [one.get_text() for one in value.texts if one.get_text()]
    if texts:
        lines.append(f"  texts: {names_text(texts, 10)}")
    legend = value.get_legend()
    if legend is not None:
        lines.append(f"  legend: {names_text([text.get_text() for text in legend.get_texts()], 20)}")
    return "\n".join(lines)


def _axis(value: Any, which: str) -> str:
    label = getattr(value, f"get_{which}label")()
    low, high = getattr(value, f"get_{which}lim")()
    scale = getattr(value, f"get_{which}scale")()
    ticks = [tick.get_text() for tick in getattr(value, f"get_{which}ticklabels")()] if _is_named(value, which) else []
    named = f", ticks {names_text(ticks, 8)}" if any(ticks) else ""
    return (
        f"{which} {f'{label!r} ' if label else ''}{number(float(low))} … {number(float(high))}"
        + ("" if scale == "linear" else f" ({scale})")
        + named
    )


def _is_named(value: Any, which: str) -> bool:
    """Whether the ticks were given as words: other labels are only known once the figure is drawn."""
    formatter = getattr(value, f"{which}axis").get_major_formatter()
    return type(formatter).__name__ in ("FixedFormatter", "StrCategoryFormatter", "FuncFormatter")


def _name(artist: Any) -> str:
    label = str(artist.get_label())
    return "" if label.startswith("_") else f"{label!r} "


def _line(line: Any) -> str:
    x, y = line.get_xdata(orig=False), line.get_ydata(orig=False)
    return f"of {count(len(x), 'point')}{_ends('x', x)}{_ends('y', y)}"


def _ends(which: str, values: Any) -> str:
    try:
        present = values[values == values]
        return f", {which} {number(float(present.min()))} … {number(float(present.max()))}" if len(present) else ""
    except (TypeError, ValueError, AttributeError):
        return ""


def _collection(one: Any) -> str:
    offsets = one.get_offsets()
    name = type(one).__name__
    if len(offsets) > 1 or name == "PathCollection":
        return (
            f"{name} {_name(one)}of {count(len(offsets), 'point')}"
            f"{_ends('x', offsets[:, 0])}{_ends('y', offsets[:, 1])}"
        )
    return f"{name} {_name(one)}".strip()


def _bar_sets(value: Any) -> list[Any]:
    return [one for one in value.containers[:_MOST] if hasattr(one, "patches")]


def _bars(bars: Any) -> str:
    heights = [number(float(bar.get_height())) for bar in bars.patches[:_MOST]]
    more = ", …" if len(bars.patches) > _MOST else ""
    return f", heights {short_repr(', '.join(heights), 200)[1:-1]}{more}" if heights else ""

"""The memory plan: what was asked, how the device's memory is divided, and both as text.

Pictures start from :func:`parts`; the text is a verdict, a bar, the sums, the groups and vllm-metal's log line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, get_args

from engine.errors import ConfigError
from engine.format.text import aligned, count_text, listed
from engine.memory.cache_spec import KVCacheSpec, SetAside, SharedSpec
from engine.memory.step_cost import StepCost
from engine.params.engine_args import EngineArgs, check_batch
from engine.params.flag_values import Auto
from engine.params.sizes import exact_size, gb, plain_size

PartKind = Literal["weights", "overhead", "kv", "outside"] | SetAside
BAR_WIDTH = 64
_GLYPHS: dict[PartKind, str] = {
    "weights": "█", "overhead": "▓", "windows": "▞", "states": "▒", "kv": "░", "outside": "·",
}  # fmt: skip
_NAMES: dict[PartKind, str] = {
    "weights": "weights", "overhead": "overhead", "windows": "sliding windows", "states": "states",
    "kv": "KV cache", "outside": "kept free",
}  # fmt: skip
LOG_LABEL = "log line"
"""What stands before vllm-metal's line, or is clicked to see it."""
_MOST_RANGES = 24
"""Characters of a list of layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanInputs:
    """Everything that a memory plan follows from: the device, the model, and what the user set.

    ``groups`` are in the model's own element type; the plan bills them in ``kv_cache_dtype``. ``shared_layers``
    read other layers' pages and need nothing: named so that none seems forgotten. ``overhead`` gives that of a
    step by its tokens and its context. ``memory_flag`` is the name under which the user set ``fraction``.
    ``limited_by`` tells people which limit of the process leaves the device so little, if one does. ``missing_files``:
    weights of the model that are not on this machine, or not yet; the plan is made without them.
    """

    device_limit: int
    model_memory: int
    overhead: StepCost = field(compare=False)
    groups: tuple[KVCacheSpec, ...]
    shared_layers: tuple[int, ...]
    context_length: int
    block_size: int
    fraction: float
    memory_flag: str
    max_model_len: int | Auto | None
    max_num_seqs: int | Auto
    max_num_batched_tokens: int | None
    kv_cache_dtype: str
    prefix_caching: bool
    limited_by: str = ""
    missing_files: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def from_args(
        cls,
        args: EngineArgs,
        *,
        device_limit: int,
        chunk_size: int,
        model_memory: int,
        overhead: StepCost,
        groups: Sequence[KVCacheSpec],
        shared_layers: tuple[int, ...],
        context_length: int,
        limited_by: str = "",
    ) -> Self:
        """What ``args`` ask of a model on a device that computes ``chunk_size`` tokens in a step by default."""
        return cls(
            device_limit=device_limit,
            model_memory=model_memory,
            overhead=overhead,
            groups=tuple(groups),
            shared_layers=shared_layers,
            context_length=context_length,
            block_size=args.block_size,
            fraction=args.memory_fraction,
            memory_flag=args.memory_flag,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.batched_tokens(chunk_size),
            kv_cache_dtype=args.kv_cache_dtype,
            prefix_caching=args.enable_prefix_caching,
            limited_by=limited_by,
        )

    def check(self) -> None:
        """Refuse what no amount of memory allows. Raises :class:`ConfigError`."""
        check_length(self.max_model_len, self.context_length)
        check_batch(self.max_num_seqs, self.max_num_batched_tokens)

    def step_cost(self, max_model_len: int) -> int:
        """Bytes of the largest step where sequences have at most ``max_model_len`` tokens."""
        return self.overhead.bytes(min(self.max_num_batched_tokens or max_model_len, max_model_len), max_model_len)

    @property
    def fewest_seqs(self) -> int:
        """Sequences that must have their windows and states."""
        return 1 if self.max_num_seqs == "auto" else self.max_num_seqs


def check_length(max_model_len: int | Auto | None, context_length: int) -> None:
    """Refuse sequences longer than the model's context, in vLLM's words. Raises :class:`ConfigError`."""
    if isinstance(max_model_len, int) and max_model_len > context_length:
        raise ConfigError(
            f"User-specified max_model_len ({max_model_len}) is greater than the derived max_model_len "
            f"({context_length}, the model's context length): use {context_length} or less, or auto",
            flag="max_model_len",
            value=max_model_len,
            allowed=f"[1, {context_length}]",
        )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a device's memory is divided: bytes and counts.

    ``state_bytes_per_seq`` is what a sequence needs however short it is (state slots and sliding
    windows). ``kv_bytes_at_max_len`` is one sequence of ``max_model_len`` tokens with that included.
    ``max_model_len_that_fits`` is the longest such sequence, up to the model's context.
    ``num_checkpoints``: states that the prefix cache may keep when all sequences run.
    """

    device_limit: int
    fraction: float
    usable: int
    model_memory: int
    overhead: int
    kv_budget: int
    per_block_bytes: int
    block_size: int
    num_blocks: int
    max_tokens_cached: int
    state_bytes_per_seq: int
    max_num_seqs: int
    max_model_len: int
    kv_bytes_at_max_len: int
    max_model_len_that_fits: int
    groups: tuple[KVCacheSpec, ...]
    inputs: PlanInputs
    num_checkpoints: int = 0

    @property
    def state_memory(self) -> int:
        """Bytes set aside before any sequence has grown: for ``max_num_seqs`` of them, and for checkpoints."""
        return sum(self.bytes_of(group) for group in self.groups if not group.grows)

    @property
    def max_concurrency(self) -> float:
        """How many requests of ``max_model_len`` tokens fit at once."""
        return min(self.max_tokens_cached / self.max_model_len, self.max_num_seqs)

    def num_blocks_of(self, group: KVCacheSpec) -> int:
        """Blocks (of states: slots) that ``group`` may come to hold."""
        if group.grows:
            return self.num_blocks
        checkpoints = self.num_checkpoints if group.recurrent else 0
        return group.blocks_of(self.max_num_seqs, self.max_model_len) + checkpoints

    def bytes_of(self, group: KVCacheSpec) -> int:
        """Bytes that ``group`` may come to hold."""
        return self.num_blocks_of(group) * group.bytes_per_block

    def log_line(self) -> str:
        """The plan in vllm-metal's words and order (GB = 1e9 bytes), the same on every device."""
        return log_line(self)

    def describe(self) -> str:
        """The plan for people: a bar, the sums from the device's limit to blocks and requests, the groups."""
        return describe(self)

    def __str__(self) -> str:
        return self.describe()

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(self.describe())


class Part(NamedTuple):
    """One piece of the device's memory. ``remark`` says what it is made of."""

    kind: PartKind
    num_bytes: int
    remark: str

    @property
    def name(self) -> str:
        """What people call it."""
        return _NAMES[self.kind]


class GroupRow(NamedTuple):
    """One cache group as words: ``per_token`` or the state, one sequence of full length, and all it may hold."""

    kind: str
    layers: str
    per_token: str
    per_sequence: str
    window: str
    block_size: str
    blocks: str
    num_bytes: str


GROUP_HEADER = GroupRow("group", "layers", "per token", "per sequence", "window", "block", "blocks", "memory")


def parts(plan: MemoryPlan) -> list[Part]:
    """The whole device, piece by piece: the sizes add up to its limit."""
    found = [
        Part("weights", plan.model_memory, "the model"),
        Part("overhead", plan.overhead, "activations and buffers of a step"),
    ]
    set_aside: tuple[SetAside, ...] = get_args(SetAside)
    for part in set_aside:
        groups = [group for group in plan.groups if group.part == part]
        if any(group.bytes_per_block for group in groups):
            found.append(Part(part, sum(map(plan.bytes_of, groups)), _per_sequence(plan, groups)))
    found.append(Part("kv", plan.kv_budget, _blocks(plan)))
    outside = f"{1 - plan.fraction:.0%} of the device, for everything else"
    return [*found, Part("outside", plan.device_limit - plan.usable, outside)]


def _per_sequence(plan: MemoryPlan, groups: Sequence[KVCacheSpec]) -> str:
    """How the bytes that are set aside come about."""
    each = sum(group.bytes_per_sequence(plan.max_model_len) for group in groups)
    kept = plan.num_checkpoints if all(group.recurrent for group in groups) else 0
    number = f"({plan.max_num_seqs} sequences + {kept} checkpoints)" if kept else f"{plan.max_num_seqs} sequences"
    ahead = sum(map(plan.bytes_of, groups)) - (plan.max_num_seqs + kept) * each
    return f"{number} × {exact_size(each)}" + (f" + {exact_size(ahead)} for a step's tokens" if ahead else "")


def log_line(plan: MemoryPlan) -> str:
    """The plan in vllm-metal's words and order (GB = 1e9 bytes), the same on every device."""
    return (
        f"{breakdown(plan)}, per_block_bytes={plan.per_block_bytes}, "
        f"num_blocks={plan.num_blocks}, max_tokens_cached={plan.max_tokens_cached}"
    )


def breakdown(plan: MemoryPlan) -> str:
    """The plan's first figures, in vllm-metal's words on every device, in log lines as in errors."""
    return (
        f"metal_limit={gb(plan.device_limit)}, fraction={plan.fraction:.2f}, "
        f"usable_metal={gb(plan.usable)}, model_memory={gb(plan.model_memory)}, "
        f"overhead={gb(plan.overhead)}, kv_budget={gb(plan.kv_budget)}"
    )


def describe(plan: MemoryPlan) -> str:
    """A verdict, a bar with its legend, how many requests fit, the element type, a table of groups, the log line."""
    groups = aligned([GROUP_HEADER, *group_rows(plan)], numbers_from=2)
    meaning = [*summary(plan), *elements(plan)]
    last = f"{LOG_LABEL}: {log_line(plan)}"
    return "\n".join([verdict(plan), "", bar(plan), *_sums(plan), "", *meaning, "", *groups, "", last])


def verdict(plan: MemoryPlan) -> str:
    """That the plan fits, and what: a plan that does not is an error."""
    number, long = plan.max_num_seqs, int(round(plan.max_concurrency, 2))
    at_once = f"up to {count_text(number)} requests at once" if number > 1 else "one request at a time"
    of_those = f" ({count_text(long)} of full length)" if long < number else ""
    return f"Fits: {count_text(plan.max_model_len)} tokens, {at_once}{of_those}"


def room(plan: MemoryPlan, in_use: int) -> str:
    """What a loaded model has room for, in one line; ``in_use`` are the bytes that the process holds now."""
    planned = plain_size(plan.kv_budget + plan.state_memory)
    words = room_words(plan)
    return f"{words[0].upper()}{words[1:]} ({planned}, taken as needed; {plain_size(in_use)} in use)"


def room_words(plan: MemoryPlan) -> str:
    """``room for 477,920 tokens of conversation``."""
    if plan.per_block_bytes:
        return f"room for {count_text(plan.max_tokens_cached)} tokens of conversation"
    # No layer keeps tokens: a conversation costs the same however long it is.
    return f"room for {count_text(plan.max_num_seqs)} conversations of up to {count_text(plan.max_model_len)} tokens"


def elements(plan: MemoryPlan) -> list[str]:
    """One line on the element type that keys and values are billed in, if they are kept in pages."""
    sizes = sorted({vectors.element_bytes for group in plan.groups for vectors in group.vectors})
    if not sizes:
        return []
    asked = plan.inputs.kv_cache_dtype
    billed = f"{'/'.join(map(str, sizes))} bytes an element, the model's own type here" if asked == "auto" else asked
    return [f"keys and values: {billed}; --dtype and --kv-cache-dtype change it"]


def summary(plan: MemoryPlan) -> list[str]:
    """What the plan means for requests, in two lines; a third where the model is not whole here."""
    context = plan.inputs.context_length
    longest = plan.max_model_len_that_fits
    most = "the whole context" if longest == context else f"of the model's {count_text(context)}"
    return [
        f"max_model_len {count_text(plan.max_model_len)}: {plan.max_concurrency:.2f} requests of full length at once, "
        f"{exact_size(plan.kv_bytes_at_max_len)} each; longest that fits: {count_text(longest)} ({most})",
        f"max_num_seqs {count_text(plan.max_num_seqs)}: requests that run at once; others wait",
        *_missing_line(plan.inputs.missing_files),
    ]


def _missing_line(files: Sequence[str]) -> list[str]:
    verb = "is" if len(files) == 1 else "are"
    return [f"planned from config.json: {listed(files)} {verb} not here"] if files else []


def group_rows(plan: MemoryPlan) -> list[GroupRow]:
    """The plan's cache groups, in its order, and last the layers that need nothing."""
    shared = plan.inputs.shared_layers
    groups = [*plan.groups, SharedSpec(shared)] if shared else plan.groups
    return [_group_row(plan, group) for group in groups]


def bar(plan: MemoryPlan, width: int = BAR_WIDTH) -> str:
    """The device's memory as ``width`` characters; every part has at least one."""
    pieces = [part for part in parts(plan) if part.num_bytes > 0]
    cells = _shares([part.num_bytes for part in pieces], width)
    return "".join(_GLYPHS[part.kind] * count for part, count in zip(pieces, cells, strict=True))


def layer_ranges(layers: Sequence[int]) -> str:
    """``0-4, 6-10, 12``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _sums(plan: MemoryPlan) -> list[str]:
    """The bar's legend as a column sum, from the device's limit to the KV cache."""
    lines = [("", "  ", "device", gb(plan.device_limit), "")]
    lines.append(("", "× ", "fraction", f"{plan.fraction:.2f}", plan.inputs.memory_flag))
    lines.append(("", "= ", "usable", gb(plan.usable), ""))
    for part in parts(plan)[:-1]:
        sign = "= " if part.kind == "kv" else "− "
        lines.append((_GLYPHS[part.kind], sign, part.name, exact_size(part.num_bytes), part.remark))
    free = parts(plan)[-1]
    lines.append((_GLYPHS["outside"], "  ", free.name, gb(free.num_bytes), free.remark))
    return [
        f"{glyph or ' '} {sign}{name:<16}{value:>9}  {remark}".rstrip() for glyph, sign, name, value, remark in lines
    ]


def _blocks(plan: MemoryPlan) -> str:
    if not plan.per_block_bytes:
        return f"{count_text(plan.num_blocks)} blocks that cost nothing: no layer keeps tokens"
    return (
        f"{count_text(plan.num_blocks)} blocks × {plan.block_size} tokens = {count_text(plan.max_tokens_cached)} "
        f"tokens ({count_text(plan.per_block_bytes)} bytes a block)"
    )


def _group_row(plan: MemoryPlan, group: KVCacheSpec) -> GroupRow:
    return GroupRow(
        group.kind,
        _layers(group.layers),
        f"{group.bytes_per_token:,}B" if group.bytes_per_token else "–",
        exact_size(group.bytes_per_sequence(plan.max_model_len)),
        group.reach,
        str(group.block_size) if group.bytes_per_token else "–",
        f"{count_text(plan.num_blocks_of(group))}{group.unit}",
        exact_size(plan.bytes_of(group)),
    )


def _layers(layers: Sequence[int]) -> str:
    ranges = layer_ranges(layers)
    if len(ranges) > _MOST_RANGES:
        ranges = ranges[:_MOST_RANGES].rpartition(",")[0] + ", …"
    return f"{len(layers)} ({ranges})"


def _shares(sizes: Sequence[int], width: int) -> list[int]:
    """``width`` cells in proportion to ``sizes``, one at least for each, the largest remainders rounded up."""
    total = sum(sizes)
    exact = [max(1.0, width * one / total) for one in sizes]
    scale = (width - len(sizes)) / max(sum(exact) - len(sizes), 1e-9)
    exact = [1 + (one - 1) * scale for one in exact]
    cells = [int(one) for one in exact]
    rest = sorted(range(len(sizes)), key=lambda i: exact[i] - cells[i], reverse=True)
    for i in rest[: width - sum(cells)]:
        cells[i] += 1
    return cells

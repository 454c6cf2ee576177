"""``plan``: one plan, or one for every combination where flags list several values."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import EngineClosedError, UnsupportedOptionError
from engine.params.engine_args import ENGINE_FLAGS, EngineArgs
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.engine_flags import EngineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.terminal import say
from vm_magic.state import session as sessions

if TYPE_CHECKING:
    from engine.memory.plan import MemoryPlan

PLAN_SIZES = {
    "device_memory": "the device's memory, such as 51.54GB (default: this machine's)",
    "model_memory": "the weights' memory (default: from the files' headers)",
    "overhead": "memory of a step's arrays (default: an estimate)",
}
"""Sizes to plan with, and the help of their flags."""
LISTED = (
    "max_model_len",
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_dtype",
    "device_memory",
)
"""Flags that may list several values: ``--max-model-len 32K,64K``."""
_LIVE = {
    "gpu_memory_utilization": "fraction",
    "max_model_len": "max_model_len",
    "max_num_seqs": "max_num_seqs",
    "kv_cache_dtype": "kv_cache_dtype",
}
"""Flags that ask about the loaded model's plan, and :func:`engine.memory.planner.what_if`'s names for them."""
_KNOWN = frozenset((*PLAN_SIZES, *(flag.field for flag in ENGINE_FLAGS)))


class Plan(EngineCommand, LineCommand):
    """Plans memory: for a named model, or for the loaded one with other settings."""

    help = "the memory plan of a model, without loading it"
    needs_kernel = "without a MODEL is about the model in this kernel (%vllm_metal plan MODEL works here too)"
    takes_lists = True

    def works_remotely(self, line: str) -> bool:
        """A named model can be planned anywhere."""
        return line.strip() != ""

    def add_arguments(self, parser: CommandParser) -> None:
        """Sizes to plan with, besides the engine's flags."""
        for name, text in PLAN_SIZES.items():
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, metavar="BYTES", default=argparse.SUPPRESS, help=text)
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in LISTED[2:])
        parser.epilog = (
            "Several values with commas give a table: --max-model-len 32K,64K --gpu-memory-utilization 0.6,0.9\n"
            f"(also {listed}).\n"
            "Without MODEL: the plan of the loaded model, or what it would be with another fraction, length, number or "
            "type."
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> Any:
        """The plan, or a table of plans for lists of values."""
        given = {name: value for name, value in vars(parsed).items() if name in _KNOWN}
        lists = {name: values for name in given if name in LISTED and len(values := _values(given[name])) > 1}
        fixed = {name: value for name, value in given.items() if name not in lists}
        if parsed.model is None:
            if context.session.loaded is None:
                raise EngineClosedError("no model is loaded: name the one to plan, as in %vllm_metal plan smollm2")
            return _beside_others(_plan_of_loaded(context.session.require().plan, fixed, lists))
        if lists:
            return sessions.new_plan_table(parsed.model, **fixed, **lists)
        plan = sessions.new_plan(parsed.model, **fixed)
        return plan if "device_memory" in fixed else _beside_others(plan)


def _beside_others(plan: Any) -> Any:
    """``plan``; what other processes hold of this machine's memory is printed."""
    from engine.memory.plan import MemoryPlan

    if isinstance(plan, MemoryPlan) and (line := sessions.others_line(plan.usable)):
        say(line)
    return plan


def _plan_of_loaded(plan: "MemoryPlan", fixed: Mapping[str, Any], lists: Mapping[str, list[str]]) -> Any:
    if not fixed and not lists:
        return plan
    for name in (*fixed, *lists):
        if name not in _LIVE:
            flag = name.replace("_", "-")
            raise UnsupportedOptionError(
                f"--{flag}: the loaded model's plan keeps it; name the model to plan anew: "
                f"%vllm_metal plan MODEL --{flag} …",
                flag=name,
            )
    from engine.memory.plan_table import tabulate
    from engine.memory.planner import what_if

    def make(**settings: Any) -> "MemoryPlan":
        checked = EngineArgs.from_options("the loaded model", {**fixed, **settings}, env={})
        return what_if(plan, **{_LIVE[name]: getattr(checked, name) for name in (*fixed, *settings)})

    return tabulate(make, lists) if lists else make()


def _values(text: Any) -> list[str]:
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else [text]

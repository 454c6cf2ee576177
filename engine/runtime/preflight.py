"""What a load can be refused for before a weight is read: everything that files, their headers and flags tell."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from engine.memory.planner import plan_memory
from engine.memory.step_cost import StepCost
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.reading import reading
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.settings import Settings
from engine.runner.device.devices import describe_device, prepare_backend
from engine.runner.device.faults import check_device
from engine.runner.device.placement import place
from engine.runner.device.rlimits import check_process_room
from engine.runner.kv.attention_path import NO_KERNELS_ON_CPU, AttentionPath
from engine.text.parse.parser_choice import ParserChoice
from engine.text.template.chat_template import ChatTemplate
from engine.text.tokens.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
_OWN_TOKENIZER = "the tokenizer's files are damaged; fetch them again, or give another with --tokenizer"


@dataclass(frozen=True)
class FoundModel:
    """What the small files of a model say: its configuration, its side of text, and the parsers chosen for it."""

    args: EngineArgs
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    parsers: ParserChoice

    @classmethod
    def of(cls, args: EngineArgs, resolved: ResolvedModel) -> Self:
        """Read the files of ``resolved``. Raises ModelLoadError or ConfigError, MemoryPlanError where nothing fits."""
        if describe_device().kind == "cpu":
            check_process_room()
        with reading(resolved.name):
            config = read_model_config(resolved, args)
        with reading(resolved.name, _OWN_TOKENIZER):
            tokenizer = load_tokenizer(resolved, args)
            template = ChatTemplate.of_model(args, tokenizer)
            found = cls(args, config, tokenizer, template, ParserChoice.of_model(args, template, tokenizer))
        with reading(resolved.name):
            found._defaults(Settings()).check()
        return found

    def sampling_defaults(self, settings: Settings) -> SamplingDefaults:
        """The model's own sampling values under live ``settings``."""
        defaults = self._defaults(settings)
        if line := defaults.log_line():
            logger.info("%s", line)
        return defaults

    def _defaults(self, settings: Settings) -> SamplingDefaults:
        args, config = self.args, self.config
        return SamplingDefaults(
            config.generation_config,
            args.override_generation_config,
            settings,
            args.generation_config,
            config.sampling_source,
            config.model_card,
        )


def check_load(args: EngineArgs, progress: Progress | None = None) -> None:
    """Raise what a load of ``args`` would, as far as that is known beforehand; downloads a model that is not here.

    Whatever this process holds now counts as free. What a step's arrays take is measured by a load, and counts as
    nothing here: a plan that is refused here is refused then.
    """
    check_device()
    place(args.device)
    prepare_backend()
    from engine.runner.kv.kv_spec import ModelCaches
    from engine.runner.load.abstract_model import check_architecture
    from engine.runner.load.loader import WEIGHT_READERS, plan_inputs
    from engine.runtime.builder import check_attention

    resolved, device = resolve(args.model, args.revision, progress=progress), describe_device()
    config = FoundModel.of(args, resolved).config
    check_architecture(config)
    with reading(resolved.name):
        weights = WEIGHT_READERS[resolved.kind].abstract(resolved, config, args, device)
        inputs = plan_inputs(
            ModelCaches(weights.model),
            config,
            args,
            device,
            paged=args.use_paged_attention,
            model_memory=weights.num_bytes,
            overhead=StepCost(0.0),
        )
    plan = plan_memory(inputs)
    if device.kind == "cpu":
        check_attention(args, [AttentionPath.of_group(group, "reference", NO_KERNELS_ON_CPU) for group in plan.groups])

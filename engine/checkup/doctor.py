"""``engine.doctor()``: looks at everything that a model needs here. Raises nothing, and changes nothing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine.checkup import packages
from engine.checkup.device_probe import Probe, ask_device, here
from engine.checkup.environment import check_proxies, check_variables
from engine.checkup.findings import Check, Examination, Finding, attempt
from engine.checkup.privacy import Secrets
from engine.checkup.subject import Model

if TYPE_CHECKING:
    from engine.llm import LLM


def doctor(llm: "LLM | None" = None) -> Examination:
    """What is wrong with this installation and this machine, and with ``llm`` and its port, and how to mend it.

    ``print(found)`` shows every line with what to do; ``found.report()`` is text for a bug report, without keys,
    prompts, paths and names. MLX is asked in a process of its own unless ``llm`` runs here. Raises nothing.
    """
    models: list[Model] = []
    findings = attempt("model", lambda: _note_model(llm, models))
    model = models[0] if models else None
    probes: list[Probe] = []
    findings += attempt("device", lambda: _note_probe(llm, probes))
    probe = probes[0] if probes else Probe(error="it was not asked")
    for area, check in (*_of_installation(), *_of_machine(probe, model), *_of_model(model)):
        findings += attempt(area, check)
    order = ("installation", "device", "kernels", "memory", "model cache", "environment", "model", "port")
    findings.sort(key=lambda finding: order.index(finding.area))
    return Examination(tuple(findings), Secrets.here(_keys(model)), tuple(_facts(model)))


def _note_model(llm: "LLM | None", models: list[Model]) -> Iterator[Finding]:
    if llm is not None:
        models.append(Model.of(llm))
    yield from ()


def _note_probe(llm: "LLM | None", probes: list[Probe]) -> Iterator[Finding]:
    probes.append(ask_device() if llm is None or llm.closed else here(check_kernels=False))
    yield from ()


def _of_installation() -> list[tuple[str, Check]]:
    checks = (packages.check_python, packages.check_versions, packages.check_mlx_build, packages.check_shadows)
    return [(packages.AREA, check) for check in checks]


def _of_machine(probe: Probe, model: Model | None) -> list[tuple[str, Check]]:
    from engine.checkup import machine

    return [
        ("installation", lambda: machine.check_imports(probe)),
        ("device", lambda: machine.check_device(probe)),
        ("device", machine.check_failed_device),
        ("kernels", lambda: machine.check_kernels(probe, model)),
        ("memory", lambda: machine.check_memory(probe, model)),
        ("model cache", machine.check_model_cache),
        ("environment", check_variables),
    ]


def _of_model(model: Model | None) -> list[tuple[str, Check]]:
    from engine.checkup import port

    if model is None:
        return [("port", check_proxies)]
    return [
        ("model", lambda: port.check_model(model)),
        ("port", lambda: port.check_port(model)),
        ("port", check_proxies),
    ]


def _keys(model: Model | None) -> list[str]:
    """What must not be in a report: the port's key and the model's name."""
    if model is None:
        return []
    key = None if model.server is None else model.server.api_key
    return [model.name, *([key] if key else [])]


def _facts(model: Model | None) -> Iterator[tuple[str, str]]:
    yield from packages.version_facts()
    if model is not None:
        yield "plan", model.plan_line

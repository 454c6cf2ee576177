"""Functions of the notebook that a model may call: described by type hints and docstrings, checked by pydantic."""

import asyncio
import contextvars
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.format.names import did_you_mean
from engine.handover import Answer, BackgroundThread
from vm_magic.chat.docstrings import documentation
from vm_magic.show.tool_cards import ToolOutcome

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_RESULT_LENGTH = 8000
"""Most characters of a result that the model is sent; fewer where its context is short."""
CANCEL_SECONDS = 5.0


@dataclass(frozen=True)
class NotebookTool:
    """One function under the name that the model calls it by. ``schema`` is OpenAI's tool object."""

    name: str
    function: Callable[..., Any]
    schema: Mapping[str, Any]
    _arguments: "type[BaseModel]" = field(repr=False)
    _parameters: tuple[inspect.Parameter, ...] = field(repr=False)

    def call(self, arguments: str, longest: int = MAX_RESULT_LENGTH) -> ToolOutcome:
        """Check ``arguments`` (JSON) and call the function; a result of over ``longest`` characters is cut.

        An error is an outcome too; ■ is raised.
        """
        started = time.monotonic()
        try:
            text, failed = _result_text(self._run(self._checked(arguments))), False
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # noqa: BLE001 - the model reads it
            text, failed = _error_text(error), True
        return ToolOutcome(_bounded(text, longest), failed, time.monotonic() - started)

    def _checked(self, arguments: str) -> dict[str, Any]:
        from pydantic import ValidationError

        try:
            given = self._arguments.model_validate_json(arguments or "{}")
        except ValidationError as error:
            raise ArgumentsError("; ".join(map(_problem, error.errors(include_url=False)))) from None
        names = {f"argument_{i}": parameter.name for i, parameter in enumerate(self._parameters)}
        return {names[key]: getattr(given, key) for key in given.model_fields_set}

    def _run(self, values: Mapping[str, Any]) -> Any:
        bound = inspect.signature(self.function).bind_partial()
        bound.arguments.update(values)
        bound.apply_defaults()
        result = self.function(*bound.args, **bound.kwargs)
        return _awaited(result) if inspect.isawaitable(result) else result


class ArgumentsError(ValueError):
    """The model gave arguments that the function does not take."""


def read_tools(names: Iterable[str], namespace: Mapping[str, Any]) -> tuple[NotebookTool, ...]:
    """The functions ``names`` of the notebook. Raises RequestError naming what cannot be a tool, and why."""
    return tuple(_read_tool(name, namespace) for name in dict.fromkeys(names))


def _read_tool(name: str, namespace: Mapping[str, Any]) -> NotebookTool:
    if name not in namespace:
        functions = [known for known, value in namespace.items() if callable(value) and not known.startswith("_")]
        hint = did_you_mean(name, functions, "define it in a cell first")
        raise _refusal(f"--tools {name}: no function of that name in this notebook; {hint}")
    function = namespace[name]
    if not callable(function):
        raise _refusal(f"--tools {name}: {type(function).__name__} is not a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise _refusal(f"--tools {name}: its signature is not known; wrap it in a function with type hints") from None
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = tuple(one for one in signature.parameters.values() if one.kind not in kinds)
    written = function.func if isinstance(function, functools.partial) else function
    description, about = documentation(written)
    model = _arguments_model(name, written, parameters, about)
    schema = _json_schema(name, model)
    described = {"description": description} if description else {}
    tool = {"type": "function", "function": {"name": name, **described, "parameters": schema}}
    return NotebookTool(name, function, tool, model, parameters)


def _arguments_model(
    name: str, function: Callable[..., Any], parameters: Iterable[inspect.Parameter], about: Mapping[str, str]
) -> "type[BaseModel]":
    """A pydantic model of the arguments. Its fields are numbered, so that no argument's name can be in the way."""
    from typing import get_type_hints

    from pydantic import ConfigDict, Field, create_model

    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:  # noqa: BLE001 - hints are the user's own expressions
        raise _refusal(f"--tools {name}: its type hints cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    for i, parameter in enumerate(parameters):
        settings = {**_default(parameter), "alias": parameter.name}
        if parameter.name in about:
            settings["description"] = about[parameter.name]
        made = Field(**settings)
        fields[f"argument_{i}"] = (hints.get(parameter.name, Any), made)
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    except Exception as error:  # noqa: BLE001 - pydantic raises many kinds for types it cannot describe
        raise _undescribed(name, error) from None


def _default(parameter: inspect.Parameter) -> dict[str, Any]:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return {}
    plain = default is None or isinstance(default, str | int | float | bool)
    return {"default": default} if plain else {"default_factory": lambda: default}


def _json_schema(name: str, model: "type[BaseModel]") -> dict[str, Any]:
    from pydantic.json_schema import GenerateJsonSchema

    class Plain(GenerateJsonSchema):
        def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's signature
            return False

    try:
        schema = model.model_json_schema(schema_generator=Plain)
    except Exception as error:  # noqa: BLE001 - as above
        raise _undescribed(name, error) from None
    schema.pop("title", None)
    return schema


def _undescribed(name: str, error: Exception) -> RequestError:
    reason = str(error).splitlines()[0]
    return _refusal(
        f"--tools {name}: an argument's type has no JSON form ({reason}); use str, int, list, a pydantic model …"
    )


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="tools")


def _problem(error: Mapping[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    return f"{place}: {error['msg']}" if place else str(error["msg"])


def _error_text(error: BaseException) -> str:
    """One line: the error's class and message."""
    if isinstance(error, ArgumentsError):
        return " ".join(f"wrong arguments: {error}".split())
    return " ".join(f"{type(error).__name__}: {error}".split())


def _result_text(result: Any) -> str:
    """What the model reads: text as it is, JSON where there is a JSON form, else ``str``."""
    from pydantic_core import PydanticSerializationError, to_json

    if isinstance(result, str):
        return result
    try:
        return to_json(result, inf_nan_mode="constants").decode()
    except (PydanticSerializationError, ValueError, RecursionError):
        return str(result)


def _bounded(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n… ({len(text) - longest} of {len(text)} characters left out)"


def _awaited(awaitable: Awaitable[Any]) -> Any:
    """The result of a coroutine, run in a thread of its own: the kernel's loop is busy with this cell."""
    running: Answer[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Answer()
    result: Answer[Any] = Answer()

    async def main() -> Any:
        running.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await awaitable

    def run() -> None:
        try:
            result.set_result(asyncio.run(main()))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            result.set_exception(error)

    thread = BackgroundThread(contextvars.copy_context().run, "vm-tool", (run,))
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
    except KeyboardInterrupt:
        loop, task = running.result() if running.wait(CANCEL_SECONDS) else (None, None)
        if loop is not None and task is not None:
            loop.call_soon_threadsafe(task.cancel)
        thread.join(CANCEL_SECONDS)
        raise
    return result.result()

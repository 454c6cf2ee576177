"""``vm_magic.describe`` and ``{{ name }}``: a bounded text of whatever the notebook has."""

import dataclasses
import itertools
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy
import pandas
import pytest

import vm_magic
from engine.errors import RequestError
from engine.outputs import Reply
from tests.vm_magic import fakes
from tests.vm_magic.helpers import cell, shown
from vm_magic import describe
from vm_magic.state.conversation import render_prompt
from vm_magic.summaries.registry import DEFAULT_LIMIT


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no text")


class Told:
    def __llm__(self) -> str:
        return "what I am"


@dataclasses.dataclass
class Point:
    x: int
    name: str


@pytest.fixture
def registered() -> Iterator[None]:
    yield
    for kind in list(describe._registered):
        describe.unregister(kind)


def rendered(template: str, **names: Any) -> str:
    return render_prompt(template, names, [])


def test_a_frame_is_its_shape_types_missing_values_ranges_and_head() -> None:
    frame = pandas.DataFrame(
        {"town": ["Ulm", None, "Bonn"], "rain": [1.5, None, 4.5], "tags": [[1], {"a": 2}, None]}, index=["x", "x", "y"]
    )
    text = describe(frame)
    assert text.startswith("pandas DataFrame: 3 rows × 3 columns\nindex: Index of 3 labels, x … y, 1 repeated label")
    assert "1 missing, 2 different: Ulm, Bonn" in text
    assert "1 missing, 1.5 … 4.5, mean 3" in text
    assert "objects (dict, list)" in text
    assert text.splitlines()[-1].split() == ["y", "Bonn", "4.5", "None"]


@pytest.mark.parametrize(
    "frame",
    [
        pandas.DataFrame(numpy.zeros((5, 3000))),
        pandas.DataFrame({"text": ["word " * 100_000] * 3}),
        pandas.DataFrame({"x": [Unprintable()] * 3}),
        pandas.DataFrame({"long name " * 200: [1]}),
        pandas.DataFrame(),
        pandas.DataFrame({"a": [1, 2]}, index=pandas.MultiIndex.from_tuples([(1, "b"), (2, "c")], names=["p", "q"])),
        pandas.DataFrame([[1, 2]], columns=["same", "same"]),
    ],
)
def test_no_frame_is_too_wide_long_or_odd(frame: pandas.DataFrame) -> None:
    text = describe(frame)
    assert text.startswith(f"pandas DataFrame: {frame.shape[0]:,} row")
    assert len(text) <= DEFAULT_LIMIT
    assert len(describe(frame, 300)) <= 300
    if frame.shape[1] > 100:
        assert "2,975 more columns" in text


def test_other_things_of_pandas() -> None:
    series = pandas.Series([1.0, None], name="rain")
    assert describe(series).startswith("pandas Series 'rain': 2 values of float64")
    assert "1 missing, 1 … 1, mean 1" in describe(series)
    assert describe(series.index).startswith("pandas index: RangeIndex of 2 labels, 0 … 1")
    frame = pandas.DataFrame({"kind": ["a", "b", "a"], "n": [1, 2, 3]})
    assert "by kind: 2 groups of columns kind, n" in describe(frame.groupby("kind"))
    assert "  a  2" in describe(frame.groupby("kind").n)
    assert "1 group" in describe(frame.groupby(lambda _: 0))


def test_a_long_frame_is_read_in_a_sample() -> None:
    text = describe(pandas.DataFrame({"n": numpy.arange(1_000_000)}))
    assert "facts from a sample of 100,000 rows" in text
    assert "999990" in text


def test_arrays_have_shape_type_range_and_first_values() -> None:
    array = numpy.array([[1.0, numpy.nan], [3.0, 4.0]])
    assert describe(array).startswith("numpy array of shape (2, 2), float64: 1 … 4, mean 2.66667, 1 NaN")
    assert "[ 3.  4.]" in describe(array)
    assert describe(numpy.array(3.5)) == "3.5"
    assert "1 of 2 true" in describe(numpy.array([True, False]))
    assert describe(numpy.zeros((0, 3))).endswith("(0, 3), float64: empty")
    assert "fields a, b" in describe(numpy.zeros(3, dtype=[("a", int), ("b", float)]))
    assert "first values: ['aa'" in describe(numpy.array(["aa"] * 500))


def test_of_a_huge_array_only_a_sample_is_read(tmp_path: Any) -> None:
    huge = numpy.memmap(tmp_path / "huge", dtype=numpy.int8, mode="w+", shape=(1_000_000, 1000))
    huge[0, 0] = 7
    assert "0 … 7, mean" in describe(huge)
    assert "of a sample of 65,536" in describe(huge)
    assert "of a sample of 65,536" in describe(numpy.broadcast_to(numpy.float32(2), (100_000, 100_000)).T[::2])


def test_a_large_mlx_array_is_not_computed_and_a_small_one_is_shown() -> None:
    import mlx.core as mx

    assert describe(mx.arange(3).astype(mx.bfloat16)).startswith("mlx array of shape (3,), bfloat16: 0 … 2, mean 1")
    huge = mx.zeros((1_000_000, 1_000_000))  # computing it would need 4 TB
    assert "float32 (4,000,000,000,000 bytes; the values of so large an array are not computed" in describe(huge)


def test_an_mlx_model_is_its_layers() -> None:
    import mlx.nn as nn

    text = describe(nn.Sequential(*(nn.Linear(2, 3, bias=False) for _ in range(12))))
    assert text.startswith("mlx Sequential: 72 parameters (float32)")
    assert text.index("layers.2:") < text.index("layers.10: Linear(input_dims=2, output_dims=3, bias=False)")


def test_large_containers_are_counted_and_begun_small_ones_are_themselves() -> None:
    assert rendered("{{ x }}", x={"a": [1, 2]}) == "{'a': [1, 2]}"
    text = describe(list(range(100_000)))
    assert text.startswith("list of 100,000 items (int)\n0\n1\n")
    assert text.endswith("… 99,970 more")
    assert describe({i: "v" * i for i in range(999)}).startswith("dict of 999 entries (keys int; values str)")
    assert "Unprintable whose repr raises ValueError" in describe([Unprintable()])
    assert describe(b"x" * 9000).startswith("bytes of 9,000 bytes")
    endless: list[Any] = []
    endless.append(endless)
    assert describe(endless) == "list of 1 item (list)\n[[[[…]]]]"
    doubling: Any = [0]
    for _ in range(100):
        doubling = [doubling, doubling]
    assert describe(doubling).startswith("list of 2 items (list)")  # its text has 2**100 items
    assert len(describe([["x" * 10_000] * 500] * 500)) <= DEFAULT_LIMIT


def test_code_is_its_signature_docstring_and_source() -> None:
    text = describe(rendered)
    assert text.startswith("rendered(template: str, **names: Any) -> str\nsource:\ndef rendered(")
    assert "class Told" in describe(Told)
    assert describe(len) == "len(obj, /)\nReturn the number of items in a container."
    assert describe(types).startswith("module types\n")
    assert "names: " in describe(types)


def test_an_exception_is_what_was_raised_and_why() -> None:
    try:
        try:
            {}["k"]  # type: ignore[index]
        except KeyError as error:
            raise ValueError("bad") from error
    except ValueError as error:
        text = describe(error)
    assert text.startswith("ValueError: bad (in test_an_exception_is")
    assert "\ncaused by KeyError: 'k' (in" in text


def test_a_dataclass_is_its_fields_unless_it_says_itself_what_it_is() -> None:
    assert describe(Point(1, "n" * 5000)).startswith("Point:\n  x=1\n  name='nnn")
    assert rendered("{{ reply }}", reply=Reply("the text")) == "the text"


def test_text_and_numbers_stay_as_they_were() -> None:
    long = "x" * 50_000
    assert rendered("{{ a }} {{ b }} {{ c }} {{ d }}", a=1, b=0.5, c=None, d=True) == "1 0.5 None True"
    assert rendered("{{ long }}", long=long) == describe(long) == long
    array = numpy.arange(3)
    assert rendered("{{ a | string }} {{ a.tolist() }} {{ a.sum() }}", a=array) == "[0 1 2] [0, 1, 2] 3"
    assert rendered("{{ a | describe(100) }}", a=array).startswith("numpy array of shape (3,), int64")
    assert render_prompt("{{ a }}", {"a": array}) == "[0 1 2]"


def test_an_object_that_cannot_be_printed_does_not_stop_a_message_an_undefined_name_does() -> None:
    assert rendered("{{ x }}", x=Unprintable()) == "<Unprintable whose repr raises ValueError>"
    assert describe(Unprintable()) == "<Unprintable whose repr raises ValueError>"
    with pytest.raises(RequestError, match="'missing' is undefined"):
        rendered("{{ missing }}")


def test_an_object_says_itself_what_it_is() -> None:
    assert rendered("{{ x }}", x=Told()) == "what I am"

    class Long(Told):
        def __llm__(self) -> str:
            return "y" * 5000

    assert describe(Long()).endswith("more characters left out)")
    assert len(describe(Long())) <= DEFAULT_LIMIT


@pytest.mark.parametrize("given", [3, ZeroDivisionError("oh")])
def test_a_bad_description_is_told_and_replaced(given: Any) -> None:
    class Bad(Point):
        def __llm__(self) -> Any:
            if isinstance(given, Exception):
                raise given
            return given

    with pytest.warns(UserWarning, match=r"Bad\.__llm__ (gave int|raised ZeroDivisionError: oh)"):
        assert describe(Bad(1, "n")).startswith("Bad:\n  x=1")


def test_types_are_registered_by_class_or_name_and_subclasses_follow(registered: None) -> None:
    @describe.register("pandas.DataFrame")
    def frame(value: Any) -> str:
        return f"a table of {len(value)}"

    describe.register(Told, lambda _: "told by another")

    class Frame(pandas.DataFrame):
        pass

    assert describe(Frame({"a": [1]})) == frame(pandas.DataFrame({"a": [1]})) == "a table of 1"
    assert describe(Told()) == "told by another"
    describe.unregister("pandas.DataFrame")
    assert describe(pandas.DataFrame()).startswith("pandas DataFrame")
    with pytest.raises(KeyError, match="not registered"):
        describe.unregister("pandas.DataFrame")
    with pytest.raises(TypeError, match="a type or its dotted name"):
        describe.register("DataFrame")
    with pytest.raises(ValueError, match="at least 100"):
        describe([1], limit=5)


def test_describing_imports_nothing() -> None:
    code = (
        "import sys; from vm_magic import describe; import vm_magic; describe({'a': 1}); describe([object()] * 9999)\n"
        "print([n for n in ('numpy', 'pandas', 'matplotlib', 'mlx', 'torch', 'polars') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
    assert "describe" in vm_magic.__all__


def test_libraries_that_are_not_here_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class BaseEstimator:
        def __init__(self, alpha: float = 1.0, kind: str = "plain") -> None:
            self.alpha, self.kind = alpha, kind

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {"alpha": self.alpha, "kind": self.kind}

    library = types.ModuleType("sklearn.base")
    library.BaseEstimator = BaseEstimator  # type: ignore[attr-defined]
    BaseEstimator.__module__ = "sklearn.base"
    monkeypatch.setitem(sys.modules, "sklearn.base", library)
    model = BaseEstimator(alpha=0.5)
    assert describe(model) == (
        "BaseEstimator(alpha=0.5)\nother parameters have their defaults (2 parameters)\nnot fitted"
    )
    model.coef_ = numpy.array([1.5, 2.0])  # type: ignore[attr-defined]
    assert "coef_ = ndarray of shape (2,): [1.5, 2.0]" in describe(model)


def test_a_message_shows_what_was_sent_of_an_object(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.user_ns["df"] = pandas.DataFrame({"a": [1, 2]})
    cell(shell, "chat", "Look: {{ df }}")
    assert loaded.prompts[-1].startswith("<user>Look: pandas DataFrame: 2 rows × 1 column\nindex")
    first = shell.display_pub.outputs[0]["data"]
    assert first["text/plain"].startswith("sent with: pandas DataFrame: 2 rows × 1 column · ")
    assert first["text/markdown"].startswith("<details><summary>")
    shell.display_pub.outputs.clear()
    cell(shell, "vllm_metal complete", "{{ df }}")
    assert loaded.prompts[-1].startswith("pandas DataFrame")
    assert "pandas DataFrame" in shell.display_pub.outputs[0]["data"]["text/plain"]
    cell(shell, "chat -o kept", "{{ df }}")
    cell(shell, "chat --raw", "{{ df }}")
    assert loaded.prompts[-1].endswith("<user>{{ df }}<assistant>")
    assert "sent with" not in shown(shell)["text/plain"]


class _Metaclass(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise ValueError("of no module")


class _Matrix(numpy.ndarray[Any, Any]):
    """Has two axes however it is taken apart, as ``numpy.matrix``."""

    def __getitem__(self, place: Any) -> Any:
        return numpy.atleast_2d(numpy.asarray(self)[place]).view(_Matrix)


class _UntoldError(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _raising(*_: Any) -> Any:
    raise _UntoldError


@pytest.mark.filterwarnings("ignore")
def test_an_object_that_says_odd_things_of_itself_neither_stops_a_message_nor_holds_it_up() -> None:
    for odd in (  # not pytest's parameters: it looks at them itself
        type("Text", (str,), {"__str__": _raising})("x"),
        type("NoAttributes", (), {"__getattribute__": _raising})(),
        type("NoAttributes", (list,), {"__getattribute__": _raising})(),
        type("NoClass", (), {"__class__": property(_raising)})(),
        type("Failing", (), {"__llm__": _raising})(),
        type("Failing", (), {"__llm__": lambda _: type("Text", (str,), {"__str__": _raising})("x")})(),
        type("Moduleless", (), {"__module__": 5})(),
        _Metaclass("Moduleless", (), {})(),
        type("Endless", (list,), {"__iter__": lambda _: itertools.count()})([1]),
        numpy.zeros((40, 40)).view(_Matrix),
    ):
        assert len(describe(odd)) <= DEFAULT_LIMIT
    with pytest.raises(RequestError, match=r"prompt: _UntoldError: _UntoldError\(\)"):
        render_prompt("{{ odd }}", {"odd": type("NoClass", (), {"__class__": property(_raising)})()}, [])

"""Templates that write, keep or compute too much are stopped with one line; the process and its memory stay."""

import re
import time

import pytest

from engine import RequestError
from engine.batch.prompt_table import Prompts, read_table
from engine.text.template import budget as budgets
from engine.text.template.budget import Budget
from engine.text.template.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hello"}]
_BIG = "{% set big = 'x' * 1000000 %}"
_THRICE = "{% for a in r %}{% for b in r %}{% for c in r %}"
_ENDS = "{% endfor %}{% endfor %}{% endfor %}"
_ALL = "{% set r = range(100000) %}"

WRITES = {
    "repeats": "{{ 'x' * 10**9 }}",
    "repeats behind": "{{ 10**9 * 'x' }}",
    "repeats a list": "{{ [1, 2] * 10**9 }}",
    "repeats a list of texts": _BIG + "{{ [big] * 1000 }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent name": _BIG + "{{ ('%(a)s' * 1000) % {'a': big} }}",
    "format filter": "{{ '%1000000000s' | format('x') }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format many": _BIG + "{{ ('{0}' * 1000).format(big) }}",
    "center": "{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "rjust": "{{ 'x'.rjust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "replace method": _BIG + "{{ big.replace('x', 'y' * 1000) }}",
    "replace filter": _BIG + "{{ big | replace('x', 'y' * 1000) }}",
    "replace nothing": _BIG + "{{ big.replace('', 'y' * 1000) }}",
    "translate": _BIG + "{{ big.translate({120: 'y' * 1000}) }}",
    "join method": _BIG + "{{ (big).join(range(1000) | map('string')) }}",
    "join filter": _BIG + "{{ range(1000) | join(big) }}",
    "join parts": _BIG + "{{ ([big] * 50 + [big] * 50) | join }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "center filter": "{{ 'x' | center(10**9) }}",
    "indent": _BIG + "{{ (big | replace('x', '\\n')) | indent(1000) }}",
    "indent width": "{{ 'x\\ny' | indent(10**9) }}",
    "wordwrap": _BIG + "{{ big | wordwrap(1, wrapstring='y' * 1000) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "tojson indent": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "nested loops": _ALL + _THRICE + "xxxxxxxx" + _ENDS,
    "loops of a text": _BIG + _ALL + "{% for a in r %}{{ big }}{% endfor %}",
    "macro": _BIG + _ALL + "{% macro m() %}{% for a in r %}{{ big }}{% endfor %}{% endmacro %}{{ m() }}",
    "set block": _BIG + _ALL + "{% set t %}{% for a in r %}{{ big }}{% endfor %}{% endset %}",
    "concat": "{% set ns = namespace(t='xx') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "plus": "{% set ns = namespace(t='xx') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "list plus": "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "list in list": "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = [ns.t, ns.t] %}{% endfor %}",
    "dict in dict": "{% set ns = namespace(t={}) %}{% for i in range(60) %}"
    "{% set ns.t = {'a': ns.t, 'b': ns.t} %}{% endfor %}{{ ns.t | tojson }}",
    "keeps texts": _BIG + "{% set ns = namespace(t=[]) %}{% for i in range(5000) %}"
    "{% set ns.t = ns.t + [big ~ i] %}{% endfor %}",
    "constants": "{{ 'x' | center(60000) }}" * 200,
    "filter block": _BIG + "{% filter center(10**9) %}x{% endfilter %}",
    "mapped filter": "{{ ['x'] | map('center', 10**9) | list }}",
    "sum": "{{ ([[1] * 1000] * 1000) | sum(start=[]) }}",
}  # fmt: skip
COMPUTES = {
    "power": "{{ 10**(10**7) }}",
    "product": "{% set ns = namespace(n=10**9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "round": "{{ 5 | round(-1000000000) }}",
    "int": "{% set n = ('f' * 1000000) | int(base=16) %}{{ n % (n - 1) }}",
    "from_bytes": _BIG + "{{ (1).from_bytes(big.encode(), 'big') % 7 }}",
    "endless loops": _ALL + _THRICE + _ENDS,
    "loops over slices": _BIG + _ALL + "{% for a in r %}{% if big[1:] == 1 %}{% endif %}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "urlize": "{{ ('a@' + 'a.' * 100000 + '!') | urlize }}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Bounds that are reached quickly; what each template makes is far beyond the real ones too."""
    monkeypatch.setattr(budgets, "_CHARACTERS", 1 << 22)
    monkeypatch.setattr(Budget.__init__, "__defaults__", ("", 0.5, 1 << 22))


@pytest.mark.parametrize("source", [*WRITES.values(), *COMPUTES.values()], ids=[*WRITES, *COMPUTES])
def test_a_template_that_makes_too_much_is_stopped_with_one_line_that_names_it(source):
    template = ChatTemplate(source, named={"default": source})
    before = time.thread_time()
    with pytest.raises(RequestError, match=r"^The chat template 'default' was stopped: ") as caught:
        template.render(MESSAGES)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "chat_template"
    assert time.thread_time() - before < 5


@pytest.mark.parametrize("source", [WRITES["repeats"], COMPUTES["endless loops"]])
def test_the_template_of_a_request_is_stopped_too(source):
    with pytest.raises(RequestError, match="The chat template that was given was stopped"):
        ChatTemplate("x").chosen(source, with_tools=False).render(MESSAGES)


def test_probing_such_a_template_ends_as_soon():
    source = "{% for m in messages %}{{ m.role }}{% endfor %}" + COMPUTES["endless loops"]
    before = time.thread_time()
    assert ChatTemplate(source).system_place(with_tools=False) == "anywhere"
    assert time.thread_time() - before < 5


@pytest.mark.parametrize("source", [WRITES["repeats"], COMPUTES["endless loops"], WRITES["constants"]])
def test_a_row_whose_template_makes_too_much_fails_alone(source):
    table = read_table([{"bad": True}, {"bad": False}])
    tasks = list(Prompts(["{% if bad %}" + source + "{% endif %}fine"]).tasks(table, [{}]))
    assert re.match("template: stopped on this row: it ", tasks[0].error)
    assert (tasks[1].prompt, tasks[1].error) == ("fine", None)


def test_what_a_template_is_given_may_be_long():
    text = "word " * 600_000
    source = "{% for m in messages %}{{ (m.content | trim | replace('a', 'b')).strip() + '!' }}{% endfor %}"
    assert ChatTemplate(source).render([{"role": "user", "content": text}] * 3) == (text.strip() + "!") * 3


def test_many_messages_and_tools_stay_within_the_bounds():
    source = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}"
        "{% for m in ns.all %}<{{ m.role }}>{{ m | tojson(indent=2) }}{% endfor %}"
    )
    rendered = ChatTemplate(source).render(MESSAGES * 2000)
    assert rendered.count("<user>") == 2000


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ '%s-%05d|%-4s|%%' % ('a', 7, 'b') }}", "a-00007|b   |%"),
        ("{{ '{0}{1!r:>5}{a}'.format(1, 'x', a=2) }}", "1  'x'2"),
        ("{{ ['a', 'b'] | join('-') }}{{ messages | map(attribute='role') | join(',') }}", "a-buser"),
        ("{{ messages | join('-', attribute='content') }}", "Hello"),
        ("{{ 'a' ~ 1 ~ none ~ [1, 'x'] }}", "a1None[1, 'x']"),
        ("{% for a in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}", "1/2False 2/2True "),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}", "x1"),
        ("{% for a in missing %}x{% else %}none{% endfor %}", "none"),
        ("{{ 'a\nb' | indent(2) }}{{ 'ab'.center(4, '*') }}", "a\n  b*ab*"),
        ("{{ {'a': [1]} | tojson }}{{ [3, 1] | sort | list }}", '{"a": [1]}[1, 3]'),
        ("{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}", "310243[1, 2]abab"),
        ("{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is sequence else a }}{% endfor %}", "123"),
        ("{% macro m(x) %}{{ x }}{{ varargs }}{% endmacro %}{{ m(1, 2, 3) }}", "1(2, 3)"),
        ("{{ '-'.join(['a', 'b']) }}{{ 'x'.replace('x', 'yy') }}{{ 3.14159 | round(2) }}", "a-byy3.14"),
    ],
)
def test_below_the_bounds_templates_give_what_they_gave(source, shown):
    assert ChatTemplate(source).render(MESSAGES) == shown


@pytest.mark.parametrize("source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "-" * 20000 + "1 }}"])
def test_a_source_too_deep_to_compile_is_one_line(source):
    with pytest.raises(RequestError, match=r"^The chat template that was given cannot be compiled") as caught:
        ChatTemplate(source).render(MESSAGES)
    assert "\n" not in str(caught.value)

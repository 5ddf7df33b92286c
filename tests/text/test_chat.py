"""A conversation becomes the text that transformers makes of it."""

import datetime
import enum

import jinja2
import pytest
import transformers
from small_tokenizers import byte_level, write

from jaxinfer.text import Tokenizer

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|eot|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Answer with one of these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|eot|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot|>" }}
    {%- else %}
        {{- "<|head|>ipython<|eot|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|eot|>\\n\\n' }}
{%- endif %}
"""

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content if message.content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.split('</think>')[-1].lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start>model\n'}}{% endif %}"
)

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""

# what trims blocks, marks the assistant, breaks loops, dates, sorts and scopes
EVERYTHING = """
Cutting on {{ strftime_now("%d %B %Y") }}.
    {% set d = dict(a=1, b='<&>') %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% set x = 'outside' %}
  {% if message.role == 'assistant' %}
    {% generation %}
{% set x = 'inside' %}
{{ message.content }}{{ eos_token }}
    {% endgeneration %}
  {% else %}
  {{ message.content }} {{ x }}
  {% endif %}
{{ x }}
{% endfor %}
{{ d | tojson }} {{ dict.fromkeys(['q'], 2) | tojson }} {{ d.items() | list }}
{{ messages | tojson(sort_keys=true, separators=(',', ':'), indent=1) }} {{ 'é' | tojson(ensure_ascii=true) }}
{{ documents }} {{ tools }} {{ add_generation_prompt }} {{ note is defined and note }} {{ namespace(self=1).self }}
{% macro shout(word) %}{{ word | upper }}{% endmacro %}
{{ shout('quiet') }} {{ undefined_name }} {{ "a<b" }} {{ [3, 1, 2] | sort }} {{ pad_token }} {{ image_token }}
"""

TEMPLATES = {"llama3": LLAMA3, "chatml": CHATML, "gemma": GEMMA, "mistral": MISTRAL, "everything": EVERYTHING}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in <a place> & around, é",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich <north>", "days": [1, 2.5]}}}
USER = {"role": "user", "content": "  What's 2 < 3 & 'so on'?\n"}
REPLY = {"role": "assistant", "content": "It is <true>.\n"}
SYSTEM = {"role": "system", "content": "You are brief. 你好"}
CHATS = {
    "user": [USER],
    "turns": [USER, REPLY, {"role": "user", "content": "é 👍🏽 {{ not_a_template }}"}],
    "system": [SYSTEM, USER, REPLY, USER],
    "answered": [USER, REPLY],
    "calls": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}],
    "two calls": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}],
    "empty": [{"role": "user", "content": ""}],
    "reasoning": [USER, {**REPLY, "reasoning_content": "\nhm\n"}],
    "thinking": [USER, {**REPLY, "thinking": "hm", "tool_calls": None}],
    "twice": [USER, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
    "nothing": [{"role": "user"}],
}
ASKED = {
    "plain": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL]},
    "no tools": {"tools": []},
    "kwargs": {"enable_thinking": False, "note": {"a": (1, 2)}, "date_string": "now", "bos_token": "<other>"},
    "documents": {"documents": [{"title": "one", "text": "two"}]},
}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": None, "image_token": "<img>"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For each template (ours, transformers')."""
    made = {}
    for name, template in TEMPLATES.items():
        directory = write(tmp_path_factory.mktemp(name), byte_level(), TOKENS, {"chat_template.jinja": template})
        made[name] = Tokenizer(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return made


def rendered(theirs, messages, **asked) -> str | None:
    """What transformers renders, None where it fails."""
    try:
        return theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **asked})
    except (jinja2.TemplateError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_renders_it(pairs, template, chat, asked):
    ours, theirs = pairs[template]
    expected = rendered(theirs, CHATS[chat], **ASKED[asked])
    if expected is None:
        with refused("chat template"):
            ours.chat(CHATS[chat], **ASKED[asked])
    else:
        assert ours.chat(CHATS[chat], **ASKED[asked]) == expected


def test_the_comparison_sees_texts_and_refusals(pairs):
    """So that the law above cannot hold by both sides failing."""
    fails = {name: sum(rendered(pairs[name][1], chat) is None for chat in CHATS.values()) for name in TEMPLATES}
    assert fails == {"llama3": 1, "chatml": 2, "gemma": 3, "mistral": 3, "everything": 0}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rendered_chat_has_one_bos_once_encoded(pairs, template):
    ours, theirs = pairs[template]
    ids = ours.encode(ours.chat([USER]))
    text_ids = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    begins = template in ("llama3", "gemma", "mistral")  # the others leave BOS to the tokenizer
    assert ids == (text_ids if begins else [ours.bos_id, *text_ids])
    assert ids.count(ours.bos_id) == 1


def test_strftime_now_is_now(pairs):
    before = datetime.datetime.now()
    text = pairs["everything"][0].chat([USER])
    days = {day.strftime("%d %B %Y") for day in (before, datetime.datetime.now())}
    assert any(f"Cutting on {day}." in text for day in days)


def test_text_kinds_with_a_base_count_as_it(pairs):
    class Role(str, enum.Enum):  # noqa: UP042  as older clients write it
        USER = "user"

    ours, theirs = pairs["chatml"]
    messages = [{"role": Role.USER, "content": "hi"}]
    assert ours.chat(messages) == rendered(theirs, messages) == ours.chat([{"role": "user", "content": "hi"}])


# --- where templates come from -----------------------------------------------------------------------------------

PLACES = {
    "v4 config": ({"chat_template": CHATML}, {}),
    "v4 named": (
        {"chat_template": [{"name": "default", "template": GEMMA}, {"name": "tool_use", "template": CHATML}]},
        {},
    ),
    "v5 file": ({"chat_template": GEMMA}, {"chat_template.jinja": CHATML}),
    "v5 named": ({}, {"chat_template.jinja": GEMMA, "additional_chat_templates/tool_use.jinja": CHATML}),
    "v5 only named": ({"chat_template": GEMMA}, {"additional_chat_templates/rag.jinja": CHATML}),
    "line ends": ({}, {"chat_template.jinja": CHATML.replace("\n", "\r\n")}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("asked", [{}, {"tools": [TOOL]}, {"chat_template": "rag"}, {"chat_template": MISTRAL}])
def test_templates_are_found_where_transformers_finds_them(tmp_path, place, asked):
    config, files = PLACES[place]
    directory = write(tmp_path / "place", byte_level(), {**TOKENS, **config}, files)
    ours, theirs = Tokenizer(directory), transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    expected = rendered(theirs, [USER], **asked)
    assert ours.has_chat_template
    if expected is None:
        with refused("no default among its chat templates: pass chat_template=, one of rag"):
            ours.chat([USER], **asked)
    else:
        assert ours.chat([USER], **asked) == expected


def test_a_processors_template_is_the_last_resort(tmp_path):
    old = {"chat_template.json": {"chat_template": CHATML}}
    ours = Tokenizer(write(tmp_path / "old", byte_level(), TOKENS, old))
    assert ours.templates == {"default": CHATML}
    ours = Tokenizer(write(tmp_path / "both", byte_level(), {**TOKENS, "chat_template": GEMMA}, old))
    assert ours.templates == {"default": GEMMA}


# --- bad input ---------------------------------------------------------------------------------------------------


def refused(match: str):
    return pytest.raises(ValueError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.fixture(scope="module")
def plain(made) -> Tokenizer:
    return Tokenizer(made["byte_level"])


def test_a_model_without_a_template_says_so(plain):
    assert not plain.has_chat_template
    with refused("byte_level has no chat template: use a prompt without --chat, or a chat model"):
        plain.chat([USER])


def test_what_a_template_raises_is_the_message(pairs):
    with refused("refuses these messages: System role not supported; change"):
        pairs["gemma"][0].chat([SYSTEM, USER])


BAD = {
    "{% for %}": "syntax error in line 1",
    "\n\n{{ 'a' }": "syntax error in line 3",
    "{% nonsense %}": "syntax error",
    "{{ 'a' + none }}": "fails on these messages: TypeError",
    "{{ 1 / 0 }}": "fails on these messages: ZeroDivisionError",
    "{{ messages[0].content.nothing.more }}": "refuses these messages: .*no attribute",
    "{{ raise_exception('two\nlines') }}": "refuses these messages: two lines",
    "{{ messages | tojson(indent='\n') | fromjson }}": "No filter named",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    # out of the sandbox
    "{{ ''.__class__.__mro__ }}": "unsafe|no attribute",
    "{{ messages.append(1) }}": "refuses these messages: .*not safely callable|unsafe",
    "{{ dict.update(messages[0], role='system') }}": "refuses these messages: .*no attribute 'update'",
    "{% set ns = namespace(_x=1) %}": "underscore",
    "{% set ns = namespace() %}{% set ns._x = 1 %}": "underscore",
    "{{ range(10000000) | list }}": "OverflowError",
}


@pytest.mark.parametrize("template", BAD)
def test_a_bad_template_is_one_line(plain, template):
    with refused(BAD[template]):
        plain.chat([USER], chat_template=template)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str: it must be a list of dicts"),
        (USER, "messages is a dict: it must be a list of dicts"),
        (["hello"], "messages holds a str: it must be a list of dicts"),
        ([[USER]], "messages holds a list: .*for one conversation"),
        ([{"role": "user", "content": object()}], "messages holds a object: .*takes text"),
    ],
)
def test_messages_of_another_form_are_refused(pairs, messages, match):
    with refused(match):
        pairs["chatml"][0].chat(messages)


def test_arguments_of_another_form_are_refused(pairs):
    ours = pairs["chatml"][0]
    with refused("tools holds a function: it must be a list of dicts"):
        ours.chat([USER], tools=[lambda place: place])
    with refused("documents is a dict"):
        ours.chat([USER], documents={"title": "one"})
    with refused("chat does not take continue_final_message, tokenize"):
        ours.chat([USER], tokenize=True, continue_final_message=True)
    with refused("the template's arguments holds? a object"):
        ours.chat([USER], note=object())

"""Fields and loops of real clients: nothing that they send may be refused."""

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from dsv4serve.chat.tokenizer import ControlToken

D = ControlToken.DSML.value
MESSAGES = [{"role": "user", "content": "Hi"}]


def call_of(name, city):
    return (
        f'Hm.</think>\n\n<{D}tool_calls>\n<{D}invoke name="{name}">\n'
        f'<{D}parameter name="city" string="true">{city}</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>'
    )


@tool
def weather(city: str) -> str:
    """The weather."""
    return f"sunny in {city}"


@tool
def population(city: str) -> str:
    """How many people."""
    return f"many in {city}"


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_a_langchain_agent_with_two_tools(server, use_responses_api):
    model = ChatOpenAI(
        model="demo", base_url=server.url + "/v1", api_key="none", max_retries=0, use_responses_api=use_responses_api
    ).bind_tools([weather, population])
    history = [HumanMessage("Tell me of Bonn")]
    for name, result in (("weather", "sunny in Bonn"), ("population", "many in Bonn")):
        server.say(call_of(name, "Bonn"))
        answer = model.invoke(history)
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [(name, {"city": "Bonn"})]
        (call,) = answer.tool_calls
        done = {"weather": weather, "population": population}[name].invoke(call["args"])
        assert done == result
        history += [answer, ToolMessage(done, tool_call_id=call["id"])]
    server.say("</think>Bonn is sunny")
    assert model.invoke(history).text == "Bonn is sunny"
    prompt = server.tokenizer.decode(server.engine.submitted[-1].prompt_ids)
    assert "<tool_result>sunny in Bonn</tool_result>" in prompt
    assert "<tool_result>many in Bonn</tool_result>" in prompt
    assert "".join(chunk.text for chunk in model.stream(history)) == "Bonn is sunny"


def test_fields_without_effect_are_accepted(server):
    ignored = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
    }
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        assert client.chat.completions.create(model="demo", messages=MESSAGES, verbosity="low", **ignored).choices
        assert client.responses.create(model="demo", input="Hi", **ignored).output

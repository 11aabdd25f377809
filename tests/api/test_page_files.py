"""The playground's files: what is served, to whom, under which policy."""

import re

import pytest

from dsv4serve.api.routes_page import FILES


@pytest.mark.parametrize("path", FILES)
def test_files_need_no_key_and_carry_the_policy(serve, path):
    server = serve(api_key=("secret",))
    answer = server.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FILES[path][1]
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["connect-src"] == rules["style-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_calls_of_the_page_need_the_key(serve):
    server = serve(api_key=("secret",))
    assert {server.client.get(path).status_code for path in ("/v1/models", "/stats")} == {401}
    assert server.chat().status_code == 401


@pytest.mark.parametrize("path", FILES)
def test_one_flag_turns_it_off(serve, path):
    assert serve(page=False).client.get(path).status_code == 404


def test_every_file_that_the_page_names_is_served_and_nothing_of_others(server):
    named = set()
    for path in FILES:
        text = server.client.get(path).text
        named |= {"/" + name for name in re.findall(r'(?:href="|src="|from "\./)([\w.]+)"', text)}
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert named == set(FILES) - {"/"}


def test_no_script_makes_html_of_text(server):
    for path in FILES:
        text = server.client.get(path).text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", text), path

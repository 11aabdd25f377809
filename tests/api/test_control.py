"""What operators ask a server: abort, flush, information, and who may ask."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from support.api import wait_for

KEYS = {"api_key": ("user",), "admin_api_key": "boss"}


def post(server, path, key="boss", **body):
    return server.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize("how", [{"rid": "mine"}, {"abort_all": True}])
def test_a_request_is_aborted_by_its_id_or_with_all(serve, how):
    server = serve(**KEYS)
    server.engine.hold = True
    body = {"messages": [{"role": "user", "content": "Hi"}], "rid": "mine"}
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, server, "/v1/chat/completions", **body)
        wait_for(lambda: server.engine.waiting)
        assert post(server, "/abort_request", rid="min").json() == {"num_aborted": 0}
        assert post(server, "/abort_request", **how).json() == {"num_aborted": 1}
        assert answer.result().json()["choices"][0]["finish_reason"] == "abort"


def test_only_the_admin_key_aborts_everything_and_flushes(serve):
    for server, key, status in (
        (serve(**KEYS), "user", 403),
        (serve(**KEYS), "boss", 200),
        (serve(api_key=("user",)), "user", 403),
        (serve(), "whoever", 200),
    ):
        assert post(server, "/flush_cache", key).status_code == status
        assert post(server, "/abort_request", key, abort_all=True).status_code == status
        assert post(server, "/abort_request", key, rid="x").status_code == 200
    assert post(server, "/flush_cache").json() == {"num_freed_pages": 7}
    for body in ({}, {"rid": "x", "abort_all": True}, {"rid": ""}, {"x": 1}):
        assert post(server, "/abort_request", **body).status_code == 400


def test_server_info_has_no_keys(serve):
    server = serve(**KEYS)
    response = server.client.get("/server_info", headers={"x-api-key": "user"})
    body = response.json()
    assert body["settings"]["served_model_name"] == "demo"
    assert (body["engine"]["max_model_len"], body["stats"]["num_running"]) == (4096, 1)
    assert "boss" not in response.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/rerank", "/v1/audio/speech", "/v1/messages/batches", "/v1/no"])
def test_what_is_not_there_is_a_404(server, path):
    response = server.client.post(path, json={})
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    assert server.client.request("DELETE", "/v1/models").status_code == 405


def test_browsers_of_other_origins_may_call_only_when_told(serve):
    question = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    question["Access-Control-Request-Headers"] = "authorization, content-type"
    for settings, allowed in (({}, None), ({"cors_origin": ("https://a.example",)}, "https://a.example")):
        server = serve(**KEYS, **settings)
        asked = server.client.options("/v1/chat/completions", headers=question)
        assert asked.headers.get("access-control-allow-origin") == allowed
        answer = server.client.get("/v1/models", headers={"Origin": "https://a.example", "x-api-key": "user"})
        assert answer.status_code == 200
        assert answer.headers.get("access-control-allow-origin") == allowed

"""POST /tokenize and /detokenize: what the server makes of a prompt, for tests and debugging."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from dsv4serve.api.body import read_body
from dsv4serve.api.errors import json_response
from dsv4serve.api.frontend import Frontend
from dsv4serve.api.routes_chat import chat_ids
from dsv4serve.api.schemas import DetokenizeBody, TokenizeBody
from dsv4serve.chat.tokenizer import ControlToken
from dsv4serve.types import InvalidRequest

router = APIRouter()


@router.post("/tokenize")
async def tokenize(http: Request) -> Response:
    """Ids of `prompt` as completions reads it, or of `messages` exactly as chat completions renders them."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, TokenizeBody, frontend.config.max_body_bytes)
    frontend.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", "prompt")
    if body.messages is not None:
        messages = body.messages
        _, ids = await frontend.in_thread(lambda: chat_ids(frontend, messages, body, None))
    else:
        prompt = body.prompt or ""
        ids = await frontend.in_thread(lambda: frontend.tokenizer.encode(prompt))
        if body.add_special_tokens:
            ids = [frontend.tokenizer.control_ids[ControlToken.BOS], *ids]
    info = frontend.engine.info
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": info and info.max_model_len})


@router.get("/tokenizer_info")
async def tokenizer_info(http: Request) -> Response:
    """What a client must know to use /tokenize and /detokenize as its tokenizer, named as in tokenizer_config.json."""
    info = http.app.state.frontend.engine.info
    tokens = {"bos_token": ControlToken.BOS, "eos_token": ControlToken.EOS, "pad_token": ControlToken.EOS}
    facts = {"add_bos_token": False, "model_max_length": info and info.max_model_len}
    return json_response(tokens | facts)


@router.post("/detokenize")
async def detokenize(http: Request) -> Response:
    """Text of `tokens`; special tokens are shown unless `skip_special_tokens`."""
    frontend: Frontend = http.app.state.frontend
    body = await read_body(http, DetokenizeBody, frontend.config.max_body_bytes)
    frontend.check_model(body.model)
    text = await frontend.in_thread(lambda: frontend.tokenizer.decode(body.tokens, bool(body.skip_special_tokens)))
    return json_response({"text": text, "prompt": text})

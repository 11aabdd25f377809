"""`dsv4serve generate`: prompts in, one line of JSON per result out, through a private engine process."""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
from pathlib import Path
from typing import Any

from dsv4serve.chat.tokenizer import ChatTokenizer
from dsv4serve.cli.flags import add_engine_flags, engine_config
from dsv4serve.config import EngineConfig
from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.private import private_engine
from dsv4serve.types import ConfigError, Request, RequestOutput, SamplingParams

MAX_INPUT_BYTES = 1 << 30


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="generate offline, without a server",
        description="Generate from raw prompts (no chat template, no BOS) and print one line of JSON per prompt, in "
        "order: index, text, token_ids, finish_reason, num_prompt_tokens, num_cached_tokens.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="the prompt text")
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line (default: none)"
    )
    source.add_argument(
        "--input-ids", type=Path, metavar="FILE", help="JSON: a list of lists of token ids, or one list (default: none)"
    )
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 = greedy (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus, 0 to 1 (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="0 = no limit (default: 0)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X", help="0 to 1, of the top one (default: 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampler (default: 0)")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at EOS (default: stop)")
    parser.add_argument(
        "--logits-out",
        type=Path,
        metavar="FILE",
        help="write float32 logits as safetensors: `INDEX.output` [generated, vocab], the rows that chose each token, "
        "and `INDEX.prompt` [n, vocab], see --prompt-logits (default: none)",
    )
    parser.add_argument(
        "--prompt-logits",
        type=int,
        default=0,
        metavar="N",
        help="rows of the last N prompt tokens, for --logits-out; -1 = all (default: 0)",
    )
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate for every prompt; 1 if any of them failed."""
    config = engine_config(args)
    tokenizer = ChatTokenizer(config.model) if (config.model / "tokenizer.json").exists() else None
    prompts = _prompts(args, tokenizer)
    for name in ("max_tokens", "prompt_logits", "top_k", "temperature", "top_p", "min_p", "seed"):
        _check_range(name, getattr(args, name))
    return asyncio.run(_generate(args, config, tokenizer, prompts))


def _check_range(name: str, value: float) -> None:
    low, high = {
        "max_tokens": (1, 1 << 31),
        "prompt_logits": (-1, 1 << 31),
        "top_k": (0, 1 << 31),
        "temperature": (0, 100),
        "top_p": (1e-9, 1),
        "min_p": (0, 1),
        "seed": (0, 2**63 - 1),
    }[name]
    if not low <= value <= high:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}; allowed are {low} to {high}")


def _prompts(args: argparse.Namespace, tokenizer: ChatTokenizer | None) -> list[list[int]]:
    """Token ids of every prompt."""
    if args.input_ids is not None:
        return _id_lists(args.input_ids)
    if tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; use --input-ids")
    if args.prompt_file is None:
        return [tokenizer.encode(args.prompt)]
    return [tokenizer.encode(line) for line in _read(args.prompt_file).splitlines()]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_INPUT_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _id_lists(path: Path) -> list[list[int]]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    lists = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    good = isinstance(lists, list) and all(
        isinstance(ids, list) and ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
        for ids in lists
    )
    if not good:
        raise ConfigError(f"{path}: expected a JSON list of non-empty lists of token ids")
    return lists


async def _generate(
    args: argparse.Namespace, config: EngineConfig, tokenizer: ChatTokenizer | None, prompts: list[list[int]]
) -> int:
    failed = False
    tensors: dict[str, list[bytes]] = {}
    async with private_engine(config) as client:
        limit = asyncio.Semaphore(config.max_waiting_requests)

        async def one(index: int, ids: list[int]) -> RequestOutput:
            async with limit:
                return await _collect(client, _request(args, index, ids))

        tasks = [asyncio.create_task(one(index, ids)) for index, ids in enumerate(prompts)]
        for index, task in enumerate(tasks):
            output = await task
            failed |= output.error is not None
            print(_line(index, prompts[index], output, tokenizer), flush=True)
            tensors[f"{index}.output"] = list(output.logits)
            tensors[f"{index}.prompt"] = list(output.prompt_logits)
    if args.logits_out is not None:
        _write_rows(args.logits_out, tensors)
    return 1 if failed else 0


def _request(args: argparse.Namespace, index: int, ids: list[int]) -> Request:
    want_logits = args.logits_out is not None
    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        is_repeatable=True,
        ignore_eos=args.ignore_eos,
        return_logits=want_logits,
        num_prompt_logits=(len(ids) if args.prompt_logits < 0 else args.prompt_logits) if want_logits else 0,
    )
    return Request(request_id=str(index), prompt_ids=ids, sampling=sampling)


async def _collect(client: EngineClient, request: Request) -> RequestOutput:
    """All outputs of a request as one."""
    total = RequestOutput(request_id=request.request_id)
    async for part in client.submit(request):
        total.token_ids = total.token_ids + part.token_ids
        total.logits = [*total.logits, *part.logits]
        total.prompt_logits = [*total.prompt_logits, *part.prompt_logits]
        total.finish_reason, total.error = part.finish_reason, part.error
        if part.num_cached_tokens is not None:
            total.num_cached_tokens = part.num_cached_tokens
    return total


def _line(index: int, prompt: list[int], output: RequestOutput, tokenizer: ChatTokenizer | None) -> str:
    text = tokenizer.decode(output.token_ids, skip_special_tokens=True) if tokenizer else None
    result: dict[str, object] = {
        "index": index,
        "text": text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "num_prompt_tokens": len(prompt),
        "num_cached_tokens": output.num_cached_tokens,
    }
    if output.error is not None:
        result["error"] = output.error
        print(f"dsv4serve: prompt {index}: {output.error}", file=sys.stderr)
    return json.dumps(result, ensure_ascii=False)


def _write_rows(path: Path, tensors: dict[str, list[bytes]]) -> None:
    """Rows of float32 as a safetensors file: an 8-byte header length, a JSON header, the data. (The library's writer
    wants numpy or torch; this command imports neither.)"""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, rows in tensors.items():
        if rows:
            size = sum(map(len, rows))
            shape = [len(rows), len(rows[0]) // 4]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for rows in tensors.values():
            file.writelines(rows)

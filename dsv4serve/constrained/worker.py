"""The process that tries what clients send as grammars: `python -m dsv4serve.constrained.worker DIRECTORY VOCAB_SIZE`.

Compiling can take for ever, and nothing stops it inside a process. So this one ends itself when a grammar takes too
long or too much memory; its parent answers the client and starts another. One JSON line in (a structural tag), one out
(what is wrong with it, or null).
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import time
from pathlib import Path

import orjson
import torch
import xgrammar

from dsv4serve.constrained.compiler import Compiled, Compiler
from dsv4serve.constrained.vocabulary import read_vocabulary
from dsv4serve.types import Constraint, Dsv4Error, InvalidRequest

LIMIT_S = 1.5  # for one grammar
MAX_MEMORY_BYTES = 2 << 30  # beyond what the process has when it starts
MAX_GRAMMAR_BYTES = 64 << 20
TRIED_TOKENS = 96
MAX_TOKEN_S = 0.02  # processor time, on average over the last tokens that are tried
AVERAGED_TOKENS = 8


def try_grammar(compiled: Compiled, vocab_size: int) -> None:
    """Write some random tokens. Raises InvalidRequest for a grammar that nothing matches or that is too slow."""
    if compiled.grammar.memory_size_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidRequest("the grammar is too large; make it smaller")
    matcher, draw, costs = compiled.matcher(), random.Random(0), []
    bitmask = xgrammar.allocate_token_bitmask(1, vocab_size)
    for _ in range(TRIED_TOKENS):
        begin = time.process_time()
        matcher.fill_next_token_bitmask(bitmask)
        costs.append(time.process_time() - begin)
        bits = (bitmask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
        is_allowed = bits.flatten()[:vocab_size].bool()
        is_end = bool(is_allowed[compiled.eos_token_id])
        is_allowed[compiled.eos_token_id] = False
        going_on = is_allowed.nonzero().flatten()
        if not len(going_on):
            if is_end:
                return
            raise InvalidRequest("no text matches the grammar")
        begin = time.process_time()
        matcher.accept_token(int(going_on[draw.randrange(len(going_on))]))
        costs[-1] += time.process_time() - begin
        if sum(costs[-AVERAGED_TOKENS:]) > MAX_TOKEN_S * AVERAGED_TOKENS:
            raise InvalidRequest("the grammar is too ambiguous: each token would take too long; repeat less in repeats")


def main() -> int:
    """Serve until the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent decides
    torch.set_num_threads(1)
    directory, vocab_size = Path(sys.argv[1]), int(sys.argv[2])
    compiler = Compiler(lambda: read_vocabulary(directory, vocab_size))
    compiler.compile(Constraint('{"type":"structural_tag","format":{"type":"any_text"}}'))  # loads the vocabulary
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("null", flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)  # its signal ends the process
        wrong = None
        try:
            try_grammar(compiler.compile(Constraint(orjson.loads(line))), vocab_size)
        except Dsv4Error as error:
            wrong = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(orjson.dumps(wrong).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

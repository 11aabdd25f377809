"""Constraint -> compiled grammar, by xgrammar."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import xgrammar

from dsv4serve.constrained.vocabulary import MARKER, Vocabulary
from dsv4serve.types import Constraint, InvalidRequest

MAX_CACHE_BYTES = 256 << 20
# xgrammar writes a grammar as text with these escapes.
DSML, MARKER_ESCAPE = r"\uff5cDSML\uff5c", rf"\U{ord(MARKER):08x}"
# What it takes for a character of a JSON string that has a length: control characters too, which JSON forbids.
STRING_CHARACTER = r"[^\"\\\r\n]"
HEX_ESCAPE = re.compile(r"\\\\|\\x([0-9a-f]{2})")  # behind an escaped backslash x is a letter
# In front of what went wrong stand the time and the line of xgrammar's source.
SOURCE = re.compile(r"^\[[^\]]*\] \S+:\d+: ")


@dataclass(frozen=True)
class Compiled:
    """A grammar over the ids of one vocabulary. Only with `uses_marker` may the marker of calls be sampled."""

    grammar: xgrammar.CompiledGrammar
    uses_marker: bool
    eos_token_id: int
    marker_id: int

    def matcher(self) -> xgrammar.GrammarMatcher:
        """A matcher that has seen nothing."""
        return xgrammar.GrammarMatcher(self.grammar)


class Compiler:
    """Compiles and remembers, for any number of threads.

    Args:
        read: gives the vocabulary; called once, when it is needed first, because it takes a second.
    """

    def __init__(self, read: Callable[[], Vocabulary]) -> None:
        self._read = read
        self._vocabulary: Vocabulary | None = None
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Compiled] = OrderedDict()
        self._num_bytes = 0

    def knows(self, constraint: Constraint) -> bool:
        """Whether `compile` returns at once."""
        return constraint.text in self._known

    def compile(self, constraint: Constraint) -> Compiled:
        """The compiled grammar.

        Raises:
            InvalidRequest: it is no grammar; the message says what xgrammar does not understand.
            CheckpointError: there is no usable tokenizer.
        """
        with self._lock:
            compiled = self._known.get(constraint.text)
            if compiled is None:
                compiled = self._known[constraint.text] = self._compile(constraint.text)
                self._num_bytes += compiled.grammar.memory_size_bytes
            self._known.move_to_end(constraint.text)
            while self._num_bytes > MAX_CACHE_BYTES and len(self._known) > 1:
                self._num_bytes -= self._known.popitem(last=False)[1].grammar.memory_size_bytes
            return compiled

    def _compile(self, text: str) -> Compiled:
        if self._vocabulary is None or self._compiler is None:
            self._vocabulary = self._read()
            info = xgrammar.TokenizerInfo(self._vocabulary.token_bytes, stop_token_ids=[self._vocabulary.eos_token_id])
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        try:
            grammar = xgrammar.Grammar.from_structural_tag(text)
            written = str(grammar)
            uses_marker = DSML in written
            if STRING_CHARACTER in written and "json_schema" in text:
                written = written.replace(STRING_CHARACTER, r"[^\0-\x1f\"\\]")
                grammar = _read(written)
            if uses_marker:
                grammar = _read(_with_marker(written))
            compiled = self._compiler.compile_grammar(grammar)
        except (RuntimeError, ValueError) as error:
            # The library cuts what it cites inside of a character; the bytes are its message nevertheless.
            said = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
            raise InvalidRequest(f"not a grammar that can be enforced: {SOURCE.sub('', said).strip()}") from None
        return Compiled(compiled, uses_marker, self._vocabulary.eos_token_id, self._vocabulary.marker_id)


def _read(written: str) -> xgrammar.Grammar:
    """The grammar that xgrammar has written. It writes U+00DF as \\xdf, and reads a digit behind as a part of it."""
    fixed = HEX_ESCAPE.sub(lambda found: rf"\u00{found[1]}" if found[1] else found[0], written)
    return xgrammar.Grammar.from_ebnf(fixed)


def _with_marker(written: str) -> str:
    """A grammar in which calls are marked by the marker itself, and in which no text and no JSON string has it."""
    written = written.replace(DSML, MARKER_ESCAPE)
    written = written.replace(f'excludes=("</{MARKER_ESCAPE}parameter>")', f'excludes=("{MARKER_ESCAPE}")')
    return written.replace(r"[^\0-\x1f", rf"[^{MARKER_ESCAPE}\0-\x1f")

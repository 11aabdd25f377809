"""A frontend process with the duties of dsv4serve.api.process and nothing else, for tests of the supervisor.

GET /ready, GET /pid, and GET /generate/N, which streams one token a line and then the finish reason. Every
answer has its process in the header X-Pid.
"""

import asyncio
import os
import signal
import socket
import sys

from support.engine_process import request

from dsv4serve.engine.client import EngineClient
from dsv4serve.engine.spawn import ProcessSpec, die_with_parent

EXIT_AT_START = "exit-with-2"  # served_model_name that makes the frontend refuse to start


class FakeFrontend:
    def __init__(self, spec):
        self.client = EngineClient(spec.endpoint)
        self.listener = socket.socket(fileno=spec.listen_fd)
        self.signals, self.open, self.count = 0, set(), 0
        self.changed = asyncio.Event()

    async def run(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.on_signal)
        await self.client.start()
        server = await asyncio.start_server(self.answer, sock=self.listener)
        while not self.signals or self.open:
            await self.changed.wait()
            self.changed.clear()
            if self.signals > 1:
                for request_id in list(self.open):
                    await self.client.abort(request_id)
        await asyncio.sleep(0.05)  # the last lines go out
        server.close()
        await self.client.close()

    def on_signal(self):
        self.signals += 1
        self.changed.set()

    async def answer(self, reader, writer):
        line = await reader.readline()
        path = line.split()[1].decode() if line else ""
        busy = bool(self.signals) or not self.client.is_ready
        if path == "/pid":
            body(writer, 200, f"{os.getpid()}\n")
        elif busy or path == "/ready":
            body(writer, 503 if busy else 200, "\n")
        elif path.startswith("/generate/"):
            await self.generate(writer, int(path.rpartition("/")[2]))
        writer.close()

    async def generate(self, writer, max_tokens):
        body(writer, 200, "")
        self.count += 1
        asked = request(f"r{self.count}", max_tokens=max_tokens)
        self.open.add(asked.request_id)
        try:
            async for output in self.client.submit(asked):
                writer.write("".join(f"{token}\n" for token in output.token_ids).encode())
                if output.finish_reason is not None:
                    writer.write(f"{output.finish_reason} {output.error or ''}\n".encode())
                await writer.drain()
        finally:
            self.open.discard(asked.request_id)
            self.changed.set()


def body(writer, status, text):
    writer.write(f"HTTP/1.1 {status} X\r\nConnection: close\r\nX-Pid: {os.getpid()}\r\n\r\n{text}".encode())


if __name__ == "__main__":
    spec = ProcessSpec.from_environment()
    die_with_parent(spec.parent_pid)
    if spec.config["served_model_name"] == EXIT_AT_START:
        sys.exit(2)
    asyncio.run(FakeFrontend(spec).run())

"""A web server on this machine that can drop, delay, lie and refuse."""

import hashlib
import http.server
import random
import re
import threading
import time
from contextlib import suppress

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves one file, and misbehaves as it is told; notes every request."""

    def __init__(self):
        self.content = CONTENT
        self.requests = []
        self.answers = []
        """One a request, taken in turn: a status, or the bytes after which the connection is dropped."""
        self.headers = {}
        self.ranges = True
        self.length = True
        self.tag = '"one"'
        self.pause = 0.0
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/weights.pth"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.requests.append(asked)
        told = self.answers.pop(0) if self.answers else None
        self.gate.wait(60)
        if isinstance(told, tuple) and told[0] >= 300:
            handler.send_response(told[0])
            for name, value in told[1].items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = 0
        if asked and self.ranges and handler.headers.get("If-Range") in (None, self.tag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(self.content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(self.content)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        body = self.content[start:]
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", self.tag)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if isinstance(told, int):
            body = body[:told]
        handler.close_connection = True
        with suppress(ConnectionError):
            for at in range(0, len(body), 100_000):
                handler.wfile.write(body[at : at + 100_000])
                time.sleep(self.pause)

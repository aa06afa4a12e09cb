"""A fork server with a stand-in for Flower's client."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.deployment import fork_client, supernode

SERVER = """
import json, os, signal, sys, time
import numpy.random
from fedllm.deployment import fork_server

class Torch:
    seeded = False

    class default_generator:
        seed = staticmethod(lambda: setattr(Torch, "seeded", True))

sys.modules["torch"] = Torch

def client():
    said = {"argv": sys.argv, "folder": os.getcwd(), "mark": os.environ.get("MARK")}
    said |= {"pid": os.getpid(), "random": int(numpy.random.randint(2**31))}
    said |= {"torch": Torch.seeded}
    said |= {"interrupted": signal.getsignal(signal.SIGINT).__name__}
    ends = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
    said |= {"ends": [signal.getsignal(end) == signal.SIG_DFL for end in ends]}
    said |= {"descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1]}
    said |= {"input": "" if "sleep" in sys.argv else sys.stdin.read()}
    print(json.dumps(said), flush=True)
    print("wrong", file=sys.stderr, flush=True)
    if "note" in sys.argv:
        open("note", "w").close()
    if "sleep" in sys.argv:
        time.sleep(60)
    if "rest" in sys.argv:
        time.sleep(2)
    if "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))

fork_server._imported = lambda: client
fork_server._SECONDS_TO_ASK = 0.5
# MORE
fork_server.main()
"""


@dataclass
class Node:
    """What a SuperNode has: the program, and what ends the server if it ends."""

    program: Path
    socket: Path
    server: "subprocess.Popen[bytes]"
    alive: int

    def command(self, *arguments: str) -> list[str]:
        return [str(self.program), *arguments]

    def call(self, *arguments: str, **options: Any) -> tuple[int, dict[str, Any], str]:
        """Run the program; return its status, what its client said and its errors."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **{"input": "", **options},
        )
        return done.returncode, json.loads(done.stdout), done.stderr

    def end(self) -> None:
        """As the SuperNode's end does."""
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1


@contextlib.contextmanager
def started(cold: Path, more: str = "") -> Iterator[Node]:
    """A node whose server runs this too before it serves."""
    server = (sys.executable, "-P", "-c", SERVER.replace("# MORE", more))
    path, process, alive = supernode.start_fork_server(server)
    # As that of `programs/`, but for what it becomes without a fork server.
    program = cold.with_name("asks")
    words = shlex.join([sys.executable, "-I", "-S", fork_client.__file__, str(cold)])
    asks = f"{fork_client.FORK_SERVER}={shlex.quote(str(path))} exec {words}"
    program.write_text(f'#!/bin/sh\n{asks} "$@"\n')
    program.chmod(0o700)
    here = Node(program, path, process, alive)
    try:
        yield here
    finally:
        here.end()
        process.wait(timeout=30)
        # A server that was killed leaves it.
        shutil.rmtree(path.parent, ignore_errors=True)

"""Scripts without the price of their imports, seconds each: one process imports common and forks
every run, which is then as `python SCRIPT FLAGS`, but that str hashes alike in all of them.
"""

import ctypes
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def forker() -> tuple[socket.socket, subprocess.Popen]:
    """The process that has imported common, and how it is asked; it ends with this one."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: whoever loses its parent is a child of this process
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    theirs.close()
    return ours, process


class Popen(subprocess.Popen):
    """subprocess.Popen of [python, SCRIPT, FLAGS], forked."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        *_, in_read, in_write, out_read, out_write, err_read, err_write = rest[:9]
        begin = {"argv": list(map(str, args[1:])), "cwd": str(cwd or "."), "env": dict(env or os.environ)}
        standard = [own if fd == -1 else fd for own, fd in enumerate((in_read, out_write, err_write))]
        read, write = os.pipe()
        message = json.dumps(begin | {"new_session": rest[14]}).encode()
        socket.send_fds(forker()[0], [message], [*standard, write])
        os.close(write)
        with open(read) as reply:
            self.pid = int(reply.read())
        self._child_created = True
        self._close_pipe_fds(in_read, in_write, out_read, out_write, err_read, err_write)


def serve(requests: socket.socket) -> list[str]:
    """Fork a run for every request; in the run, return its argv."""
    while True:
        message, fds, *_ = socket.recv_fds(requests, 2**20, 4)
        if not message:
            sys.exit()
        if not (middle := os.fork()):
            if pid := os.fork():  # whose parent ends at once
                os.write(fds[3], str(pid).encode())
                os._exit(0)
            break
        os.waitpid(middle, 0)
        for fd in fds:
            os.close(fd)
    begin = json.loads(message)
    requests.close()
    for own, fd in enumerate(fds[:3]):
        os.dup2(fd, own)
    for fd in fds:
        os.close(fd)
    if begin["new_session"]:
        os.setsid()
    os.chdir(begin["cwd"])
    os.environ.clear()
    os.environ.update(begin["env"])
    return begin["argv"]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import common  # noqa: F401

    sys.argv[:] = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[:2] = [str(Path(sys.argv[0]).resolve().parent)]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""Runs command lines in forks of a process that has imported everything, which most of their time would go into.

A request is a line of JSON on stdin: arguments, folder, environment, and the files that take the output. The answers
are two lines on stdout: the number of the process, and later its exit status.
"""

from __future__ import annotations

import json
import os
import sys

import lightning.pytorch
import timm
import torchvision

import sparkmim.cli
import sparkmim.training.detect
import sparkmim.training.finetune
import sparkmim.training.pretrain
import sparkmim.training.segment

__all__ = ["lightning", "sparkmim", "timm", "torchvision"]


def serve() -> list[str]:
    """Answers requests; returns the arguments of one in the process that is to run it."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            os.setsid()
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, path in enumerate(request["files"], 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            found: list[str] = request["arguments"]
            return found
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


if __name__ == "__main__":
    arguments = serve()
    sys.argv = ["sparkmim", *arguments]
    sparkmim.cli.main()

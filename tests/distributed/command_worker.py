"""One of several processes that run commands together: `python -m tests.distributed.command_worker
SPEC`.

SPEC is JSON: `index` and `options`, which every command gets, and `commands`, each a name and its
words, in which INDEX stands for the process's index. Prints to stderr, as JSON, how they ended.
"""

import json
import sys

from tests.training.runs import command


def main(spec: dict) -> None:
    ended = []
    for words in spec["commands"]:
        name, *options = (str(word).replace("INDEX", str(spec["index"])) for word in words)
        ended.append(command(name, *options, *spec["options"])._asdict())
    print(json.dumps(ended), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

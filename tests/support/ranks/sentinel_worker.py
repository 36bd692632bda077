"""One rank of test_sentinel.py: watches the others while its main thread does what it reads, a word a line.

Called as `sentinel_worker.py rank world_size port patience_s`; rank 0 hosts the store. Prints "ready" once it watches.
"""

from __future__ import annotations

import sys
import threading
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sparsering.runtime.comm.place import connection_of_its_own
from sparsering.runtime.comm.sentinel import Sentinel, Watch

LONG = timedelta(seconds=600)


def main() -> None:
    """Obey: `wait` for a key that nobody sets, `verdict` prints what is found soon, `leave` in order, `go` without."""
    rank, world_size, port = map(int, sys.argv[1:4])
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=LONG)
    connection = connection_of_its_own(PrefixStore("outer", PrefixStore("inner", store)))
    assert connection is not None
    watch = Watch(
        rank=rank, world_size=world_size, store_host="rank 0", patience_s=float(sys.argv[4]), grace_s=0.3
    )  # fmt: skip
    sentinel = Sentinel(PrefixStore("watch", connection), watch)
    print("ready", flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "wait":
            store.wait(["never"], LONG)
        elif word == "verdict":
            threading.Event().wait(watch.patience_s)  # what happened before can be known by then
            print(sentinel.verdict(wait=False), flush=True)
        elif word == "leave":
            sentinel.say_goodbye()
            sentinel.close()
            return
        elif word == "go":
            return


if __name__ == "__main__":
    main()
